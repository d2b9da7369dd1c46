"""SGD, momentum and AdamW as pure functions: (gradients, state, params, rate) -> (params, state)."""

# torch's own optimisers use the same fused loops over lists of tensors; they have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import torch
from torch import Tensor

from assay.train.recipe import Recipe

State = dict[str, list[Tensor]]


def init(recipe: Recipe, params: list[Tensor]) -> State:
    """Zero moments, in the order of `params`; SGD has none."""
    slots = {"sgd": (), "momentum": ("momentum",), "adamw": ("mean", "square")}[recipe.optimiser]
    return {slot: [torch.zeros_like(p) for p in params] for slot in slots}


def clip(grads: list[Tensor], limit: float) -> list[Tensor]:
    """Scale all gradients by min(1, limit / global norm); `limit = 0` leaves them."""
    if not limit:
        return grads
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return list(torch._foreach_mul(grads, torch.clamp(limit / (norm + 1e-12), max=1.0)))


def update(
    recipe: Recipe, grads: list[Tensor], state: State, params: list[Tensor], step: int
) -> tuple[list[Tensor], State]:
    """One step; nothing is changed in place.

    sgd:       g <- g + wd p;  p <- p - lr g
    momentum:  g <- g + wd p;  u <- mu u + g;  p <- p - lr u
    adamw:     m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;
               p <- (1 - lr wd) p - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t) + eps_root) + eps),  t = step + 1
    """
    lr, decay = recipe.rate(step), recipe.weight_decay
    if recipe.optimiser == "adamw":
        return _adamw(recipe, grads, state, params, step, lr)
    grads = list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads
    if recipe.optimiser == "sgd":
        return list(torch._foreach_add(params, grads, alpha=-lr)), state
    velocity = list(torch._foreach_add(torch._foreach_mul(state["momentum"], recipe.momentum), grads))
    return list(torch._foreach_add(params, velocity, alpha=-lr)), {"momentum": velocity}


def _adamw(
    recipe: Recipe, grads: list[Tensor], state: State, params: list[Tensor], step: int, lr: float
) -> tuple[list[Tensor], State]:
    b1, b2 = recipe.betas
    mean = torch._foreach_lerp(state["mean"], grads, 1 - b1)
    square = torch._foreach_add(torch._foreach_mul(state["square"], b2), torch._foreach_mul(grads, grads), alpha=1 - b2)
    variance = torch._foreach_div(square, 1 - b2 ** (step + 1))
    if recipe.eps_root:
        variance = torch._foreach_add(variance, recipe.eps_root)
    root = torch._foreach_sqrt(variance)
    move = torch._foreach_div(mean, torch._foreach_add(root, recipe.eps))
    shrunk = torch._foreach_mul(params, 1 - lr * recipe.weight_decay)
    moved = torch._foreach_add(shrunk, move, alpha=-lr / (1 - b1 ** (step + 1)))
    return list(moved), {"mean": list(mean), "square": list(square)}
