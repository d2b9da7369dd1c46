"""Adjoints of one training step: what clipping and an optimiser hand back, in closed form.

Legend: k targets; every adjoint has them as its first axis, `[k, *shape]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.train.optim import State
from assay.train.recipe import Recipe

# Numbers of a parameter, of all targets, that are handed back at a time: a dozen arrays of so many fit in a core's
# cache.
STRETCH = 2**16


@dataclass(frozen=True)
class Adjoint:
    """d f / d(weights, moments) at one moment of training, for k targets f."""

    params: list[Tensor]
    slots: State

    @classmethod
    def of(cls, recipe: Recipe, slopes: list[Tensor]) -> Adjoint:
        """At the end of training: the slopes of f; the moments have no say any more."""
        names = {"sgd": (), "momentum": ("momentum",), "adamw": ("mean", "square")}[recipe.optimiser]
        return cls(slopes, {name: [torch.zeros_like(p) for p in slopes] for name in names})

    def contiguous(self) -> Adjoint:
        """In the one layout in which it is also kept: of another, a product may differ in its last bit."""
        slots = {name: [p.contiguous() for p in values] for name, values in self.slots.items()}
        return Adjoint([p.contiguous() for p in self.params], slots)


def clip_back(grads: list[Tensor], limit: float, push: list[Tensor]) -> list[Tensor]:
    """The adjoint of `optim.clip` at the gradients that it was given.

    With c = limit / |g| < 1: c (a - g <g, a> / (|g| (|g| + 1e-12))); a where nothing is clipped.
    """
    if not limit:
        return push
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = limit / (norm + 1e-12)
    if scale >= 1:
        return push
    along = sum((g * a).flatten(1).sum(dim=1) for g, a in zip(grads, push, strict=True))
    share = along / (norm * (norm + 1e-12))
    return [scale * (a - g * _wide(share, g)) for g, a in zip(grads, push, strict=True)]


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """`[k]` as `[k, 1, ...]` over a parameter."""
    return x.view(-1, *[1] * like.dim())


def update_back(
    recipe: Recipe, grads: list[Tensor], state: State, step: int, after: Adjoint
) -> tuple[list[Tensor], Adjoint]:
    """The adjoint of `optim.update`, with the clipped gradients and the state that it was given.

    Returns the adjoint of those gradients, and that of weights and moments before the step, but for what reaches them
    through the gradients. AdamW: with D = sqrt(v' + eps_root) + eps and v', m' the moments without their bias,
        M = M+ - lr / ((1-b1^t) D) A,  V = V+ + lr m' / (2 D^2 sqrt(v' + eps_root) (1-b2^t)) A,
        gradients: (1-b1) M + 2 (1-b2) g V,  weights: (1 - lr wd) A,  moments: b1 M and b2 V.
    """
    lr, decay = recipe.rate(step), recipe.weight_decay
    if recipe.optimiser == "adamw":
        return _adamw_back(recipe, grads, state, step, after, lr)
    if recipe.optimiser == "sgd":
        push = [-lr * a for a in after.params]
        return push, Adjoint([(1 - lr * decay) * a for a in after.params], {})
    push = [u - lr * a for a, u in zip(after.params, after.slots["momentum"], strict=True)]
    params = [a + decay * u for a, u in zip(after.params, push, strict=True)]
    return push, Adjoint(params, {"momentum": [recipe.momentum * u for u in push]})


def _adamw_back(
    recipe: Recipe, grads: list[Tensor], state: State, step: int, after: Adjoint, lr: float
) -> tuple[list[Tensor], Adjoint]:
    push, means, squares = (
        [torch.empty_like(a, memory_format=torch.contiguous_format) for a in after.params] for _ in range(3)
    )
    size = max(1, STRETCH // max(1, len(after.params[0])))
    made = zip(push, means, squares, strict=True)
    given = zip(
        grads, state["mean"], state["square"], after.params, after.slots["mean"], after.slots["square"], strict=True
    )
    # Elementwise, a stretch at a time: nine arrays are read or written once each, all between stays in the cache.
    for (g, mean, square, *asked), found in zip(given, made, strict=True):
        flat = [x.reshape(-1) for x in (g, mean, square)]
        wide = [x.reshape(len(x), -1) for x in asked]
        into = [x.view(len(x), -1) for x in found]
        for at in range(0, g.numel(), size):
            part = slice(at, at + size)
            _adamw_part(
                recipe, step, lr, [x[part] for x in flat], [x[:, part] for x in wide], [x[:, part] for x in into]
            )
    params = [(1 - lr * recipe.weight_decay) * a for a in after.params]
    return push, Adjoint(params, {"mean": means, "square": squares})


def _adamw_part(
    recipe: Recipe, step: int, lr: float, given: list[Tensor], asked: list[Tensor], into: list[Tensor]
) -> None:
    """Of `[m]` numbers of a parameter, its adjoints `[k, m]`: `into` has those of the gradient and of both moments."""
    (g, mean, square), (a, mean_a, square_a), (push, before_mean, before_square) = given, asked, into
    (b1, b2), t = recipe.betas, step + 1
    one, two = 1 - b1**t, 1 - b2**t
    root = torch.mul(square, b2).addcmul_(g, g, value=1 - b2).div_(two).add_(recipe.eps_root).sqrt_()
    divisor = root + recipe.eps
    flat = root == 0  # where eps_root is 0 in this precision and nothing was seen: its slope is taken as 0
    bend = torch.lerp(mean, g, 1 - b1).mul_(lr / (2 * one * two)).div_(root.mul_(divisor).mul_(divisor))
    bend.masked_fill_(flat, 0.0)
    torch.addcmul(square_a, bend, a, out=before_square)
    torch.addcdiv(mean_a, a, divisor, value=-lr / one, out=before_mean)
    torch.mul(before_square, g.mul(2 * (1 - b2)), out=push).add_(before_mean, alpha=1 - b1)
    before_mean.mul_(b1)
    before_square.mul_(b2)
