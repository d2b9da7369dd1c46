"""Adjoints of one training step: what clipping and an optimiser hand back, in closed form.

Legend: k targets; every adjoint has them as its first axis, `[k, *shape]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.train.optim import State
from assay.train.recipe import Recipe

# Numbers of a parameter that are handed back at a time, over 1 + k for k targets: what is at work then, six arrays of
# the parameter and four of each target, is some 5 MB. The fastest of 2^14 to 2^20 at k = 1 and 16 (LOG.md).
STRETCH = 2**18


@dataclass(frozen=True)
class Adjoint:
    """d f / d(weights, moments) at one moment of training, for k targets f. A reversed step turns what is after it into
    what is before it in the same memory: of k targets a second one would be k states more."""

    params: list[Tensor]
    slots: State

    @classmethod
    def of(cls, recipe: Recipe, slopes: list[Tensor]) -> Adjoint:
        """At the end of training: a copy of the slopes of f; the moments have no say any more. In the one layout, and
        aligned, as it is also read back: of another, a product may differ in its last bit."""
        names = {"sgd": (), "momentum": ("momentum",), "adamw": ("mean", "square")}[recipe.optimiser]
        params = [p.clone(memory_format=torch.contiguous_format) for p in slopes]
        return cls(params, {name: [torch.zeros_like(p) for p in params] for name in names})


def clip_back(grads: list[Tensor], limit: float, push: list[Tensor]) -> list[Tensor]:
    """The adjoint of `optim.clip` at the gradients that it was given.

    With c = limit / |g| < 1: c (a - g <g, a> / (|g| (|g| + 1e-12))), in the place of a; a where nothing is clipped.
    """
    if not limit:
        return push
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = limit / (norm + 1e-12)
    if scale >= 1:
        return push
    along = sum(a.reshape(len(a), -1) @ g.reshape(-1) for g, a in zip(grads, push, strict=True))
    share = along * scale / (norm * (norm + 1e-12))
    return [a.mul_(scale).addcmul_(g, _wide(share, g), value=-1) for g, a in zip(grads, push, strict=True)]


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """`[k]` as `[k, 1, ...]` over a parameter."""
    return x.view(-1, *[1] * like.dim())


def update_back(recipe: Recipe, grads: list[Tensor], state: State, step: int, adjoint: Adjoint) -> list[Tensor]:
    """The adjoint of `optim.update`, with the clipped gradients and the state that it was given.

    Returns the adjoint of those gradients; `adjoint` becomes that of weights and moments before the step, but for what
    reaches them through the gradients. AdamW: with D = sqrt(v' + eps_root) + eps and v', m' the moments without their
    bias,
        M = M+ - lr / ((1-b1^t) D) A,  V = V+ + lr m' / (2 D^2 sqrt(v' + eps_root) (1-b2^t)) A,
        gradients: (1-b1) M + 2 (1-b2) g V,  weights: (1 - lr wd) A,  moments: b1 M and b2 V.
    """
    lr, decay = recipe.rate(step), recipe.weight_decay
    if recipe.optimiser == "momentum":
        moved = adjoint.slots["momentum"]
        push = [torch.add(u, a, alpha=-lr) for a, u in zip(adjoint.params, moved, strict=True)]
        for a, u, own in zip(adjoint.params, push, moved, strict=True):
            a.add_(u, alpha=decay)
            torch.mul(u, recipe.momentum, out=own)
        return push
    adamw = recipe.optimiser == "adamw"
    push = _adamw_back(recipe, grads, state, step, adjoint, lr) if adamw else [-lr * a for a in adjoint.params]
    for a in adjoint.params:
        a.mul_(1 - lr * decay)
    return push


def _adamw_back(
    recipe: Recipe, grads: list[Tensor], state: State, step: int, adjoint: Adjoint, lr: float
) -> list[Tensor]:
    push = [torch.empty_like(a) for a in adjoint.params]
    size = max(1, STRETCH // (1 + len(push[0])))
    of_targets = zip(adjoint.params, adjoint.slots["mean"], adjoint.slots["square"], push, strict=True)
    # Elementwise, a stretch at a time: every array is read and written once, all between stays in the cache.
    for own, asked in zip(zip(grads, state["mean"], state["square"], strict=True), of_targets, strict=True):
        flat = [x.reshape(-1) for x in own]
        wide = [x.view(len(x), -1) for x in asked]
        for at in range(0, len(flat[0]), size):
            part = slice(at, at + size)
            _adamw_part(recipe, step, lr, [x[part] for x in flat], [x[:, part] for x in wide])
    return push


def _adamw_part(recipe: Recipe, step: int, lr: float, own: list[Tensor], asked: list[Tensor]) -> None:
    """Of `[m]` numbers of a parameter, its adjoints `[k, m]`: the last of `asked` becomes that of the gradient."""
    (g, mean, square), (a, mean_a, square_a, push) = own, asked
    (b1, b2), t = recipe.betas, step + 1
    one, two = 1 - b1**t, 1 - b2**t
    root = torch.mul(square, b2 / two).addcmul_(g, g, value=(1 - b2) / two).add_(recipe.eps_root).sqrt_()
    divisor = root + recipe.eps
    bend = torch.lerp(mean, g, 1 - b1).div_(divisor).div_(divisor).div_(root)
    if recipe.eps_root < torch.finfo(g.dtype).tiny:  # 0 in this precision: where nothing was seen its slope is 0
        bend.masked_fill_(root == 0, 0.0)
    square_a.addcmul_(bend, a, value=lr / (2 * one * two))
    mean_a.addcdiv_(a, divisor, value=-lr / one)
    torch.mul(mean_a, 1 - b1, out=push).addcmul_(square_a, g, value=2 * (1 - b2))
    mean_a.mul_(b1)
    square_a.mul_(b2)
