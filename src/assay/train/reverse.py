"""One step of training backwards, for many targets at once.

Reference: as in `assay.train.replay`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.numerics.twice import differentiable_twice
from assay.train import loop, optim
from assay.train.adjoint import Adjoint, clip_back, update_back

if TYPE_CHECKING:
    from assay.train.replay import State, Training


@dataclass(frozen=True)
class Back:
    """What one reversed step gives."""

    weights: np.ndarray
    """d f / d w of the examples of the step, `[b, k]` float64."""
    push: list[Tensor]
    """d f / d(the step's gradient), `[k, *shape]`: f answers to an example added at this step by its product with the
    gradient of that example's share of the step's loss."""


@differentiable_twice()
@sdpa_kernel(SDPBackend.MATH)  # the one form of attention that has second derivatives
def reverse(training: Training, state: State, step: int, adjoint: Adjoint) -> Back:
    """One step of training backwards: one gradient with its graph, then one product with the Hessian for each target.
    The adjoint is that after the step, and becomes that before it.

    With g = (1/T) sum_i w_i n_i grad loss_i and a = d f/d g: d f/d w_i = (n_i/T) <grad loss_i, a>, and weights before
    the step get grad <g, a> besides what `update_back` hands them.
    """
    recipe, batch = training.recipe, training.batches[step]
    parts = _graphs(training, state, step, batch)
    total = [g.detach() for g in parts[0].grads] if parts else [torch.zeros_like(p) for p in state.params]
    for part in parts[1:]:
        total = [t + g.detach() for t, g in zip(total, part.grads, strict=True)]
    clipped = optim.clip(total, recipe.clip)
    push = update_back(recipe, clipped, state.slots, step, adjoint)
    push = clip_back(total, recipe.clip, push)
    dots = np.zeros((len(batch), len(push[0])))
    while parts:
        part = parts.pop()
        dots[part.block] = part.back(push, adjoint.params, training.together).T.double().numpy()
    return Back(dots, push)


@dataclass
class _Part:
    """The graph of one micro-batch: leaves, data weights, and gradients that can be differentiated once more."""

    block: np.ndarray
    leaves: list[Tensor]
    weights: Tensor
    grads: list[Tensor]

    def back(self, push: list[Tensor], held: list[Tensor], together: bool) -> Tensor:
        """Adds grad <g, a_k> of each leaf to `held`, `[k, *shape]`; returns that of the data weights, `[k, b]`."""
        inputs = [*self.leaves, self.weights]
        rows = [(g, a) for g, a in zip(self.grads, push, strict=True) if g.requires_grad]
        grads, given = [g for g, _ in rows], [a for _, a in rows]
        count, found = len(push[0]), []
        how: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
        if together and count > 1:
            *products, own = torch.autograd.grad(grads, inputs, given, is_grads_batched=True, **how)
            for total, product in zip(held, products, strict=True):
                total += product
            return own
        for k in range(count):
            how["retain_graph"] = k + 1 < count
            *products, own = torch.autograd.grad(grads, inputs, [a[k] for a in given], **how)
            for total, product in zip(held, products, strict=True):
                total[k] += product
            found.append(own)
        return torch.stack(found)


def _graphs(training: Training, state: State, step: int, batch: np.ndarray) -> list[_Part]:
    task, rows, noise = training.task, training.rows[batch], training.noise(step, batch)
    parts = []
    for block in loop.blocks(training.encoded.lengths[rows]):
        # Frozen ones are leaves as well: a fixed readout would take a short cut that has no second derivatives.
        held = {
            n: p.detach().requires_grad_() if p.is_floating_point() else p for n, p in training.named(state).items()
        }
        inputs = training.encoded.inputs(rows[block]) | ({} if noise is None else task.noise(noise[block]))
        leaves = [held[n] for n in training.moved]
        weights = torch.as_tensor(training.selection.weights[batch][block], dtype=training.dtype).requires_grad_()
        nll, mask = task.terms(held, inputs)
        loss = (nll * mask).sum(dim=1) @ weights / training.recipe.terms_per_step
        grads = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        parts.append(_Part(block, leaves, weights, list(grads)))
    return parts
