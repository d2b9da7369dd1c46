"""Adjoints of one training step: what clipping and an optimiser hand back, in closed form.

Legend: k targets; every adjoint has them as its first axis, `[k, *shape]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.train.optim import State
from assay.train.recipe import Recipe


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
    b1, b2 = recipe.betas
    one, two = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
    push, means, squares = [], [], []
    rows = zip(
        grads, state["mean"], state["square"], after.params, after.slots["mean"], after.slots["square"], strict=True
    )
    for g, mean, square, a, mean_a, square_a in rows:
        root = ((b2 * square + (1 - b2) * g * g) / two + recipe.eps_root).sqrt()
        divisor = root + recipe.eps
        moment = torch.lerp(mean, g, 1 - b1) / one
        bend = torch.where(root > 0, lr * moment / (2 * two * divisor * divisor * root), torch.zeros_like(root))
        m = mean_a - (lr / one) / divisor * a
        v = square_a + bend * a
        push.append((1 - b1) * m + 2 * (1 - b2) * g * v)
        means.append(b1 * m)
        squares.append(b2 * v)
    params = [(1 - lr * recipe.weight_decay) * a for a in after.params]
    return push, Adjoint(params, {"mean": means, "square": squares})
