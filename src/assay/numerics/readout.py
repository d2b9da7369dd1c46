"""The readout of a language model and its cross-entropy in one: logits are made in chunks and never held.

Legend: n rows (tokens), d width, v vocabulary, r what a sketch keeps of the output side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.numerics import twice

Keep = Callable[[Tensor], Tensor]

# Rows of logits at a time. They are written and read several times over, so a chunk should stay in the caches.
CHUNK = 512


class Readout(nn.Linear):
    """`forward(hidden)` gives logits `[..., v]`; `forward(hidden, targets)` gives the cross-entropy of each, `[...]`.

    While only gradients to the hidden states are asked for (the weights require none), the second form is computed in
    chunks: loss, its gradient softmax(z) - onehot, and what is wanted of that gradient, in one visit to each logit.
    `keep` is applied to the gradient at the logits of one row, as if that row's loss had weight 1, and handed back.
    """

    @classmethod
    def adopt(cls, linear: nn.Linear) -> Readout:
        """The same layer with the same parameters (shared ones stay shared)."""
        made = cls(1, 1, bias=linear.bias is not None, device="meta")
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, hidden: Tensor, targets: Tensor | None = None, keep: Keep | None = None) -> Any:  # type: ignore[override]
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        rows, wanted = hidden.flatten(0, -2), targets.flatten()
        if torch.is_grad_enabled() and (self.weight.requires_grad or _transformed(hidden)):
            if twice.wanted() and not _transformed(hidden):
                return twice.cross_entropy(rows, self.weight, self.bias, wanted).view(targets.shape)
            z = F.linear(rows, self.weight, self.bias)
            losses = F.cross_entropy(z.float() if z.dtype != torch.float64 else z, wanted, reduction="none")
            assert keep is None, "what is kept of the output gradient is for weights that are held fixed"
            return losses.view(targets.shape)
        losses, kept = _Fused.apply(rows, self.weight, self.bias, wanted, keep)  # type: ignore[misc]
        if keep is None:
            return losses.view(targets.shape)
        return losses.view(targets.shape), kept.view(*targets.shape, -1)


def _transformed(x: Tensor) -> bool:
    """Whether a function transform (vmap, jvp) is at work on x: those need ordinary operations."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, held: Tensor) -> Tensor:
    """hidden W^T + b `[n, v]`, in `held`."""
    out = held[: len(rows)]
    if rows.dtype != held.dtype or torch.is_autocast_enabled(rows.device.type):
        return out.copy_(F.linear(rows, weight, bias))
    with torch.no_grad():
        return torch.mm(rows, weight.T, out=out) if bias is None else torch.addmm(bias, rows, weight.T, out=out)


class _Fused(torch.autograd.Function):
    """Cross-entropy of each row, `[n]`; its gradient to the hidden row is computed on the way and scaled later."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, keep: Keep | None
    ) -> tuple[Tensor, Tensor]:
        backward = ctx.needs_input_grad[0] or keep is not None
        exact = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kept = []
        # One chunk's logits are the largest tensor by far: fresh memory for each costs more than the arithmetic on it.
        held = torch.empty(min(CHUNK, len(hidden)), len(weight), dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            z = _logits(hidden[rows], weight, bias, held)
            own, top = z.gather(1, targets[rows, None]), z.amax(dim=1, keepdim=True)
            total = z.sub_(top).exp_().sum(dim=1, keepdim=True)
            losses[rows] = (total.log() + top - own)[:, 0]
            if not backward:
                continue
            z.mul_(total.reciprocal()).scatter_add_(1, targets[rows, None], z.new_full((len(z), 1), -1.0))
            if slopes is not None:
                slopes[rows] = z.to(weight.dtype) @ weight
            if keep is not None:
                with torch.autocast(z.device.type, enabled=False):
                    kept.append(keep(z))
        ctx.save_for_backward(slopes)
        extra = torch.cat(kept) if kept else losses.new_zeros(0)
        ctx.mark_non_differentiable(extra)
        return losses, extra

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        # The slopes are numbers: a second derivative would miss theirs without a word.
        assert not torch.is_grad_enabled(), "no second derivatives here: let the readout's weights require grad"
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0][:, None].to(slopes.dtype), None, None, None, None
