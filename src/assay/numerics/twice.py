"""Cross-entropy of a readout whose second derivatives are as cheap as their matrix products.

Autograd differentiates softmax twice by a dozen visits to every logit; in closed form there are four.
Legend: n rows, d width, v vocabulary; P = softmax(Z), Z = H W^T + b, c the weights of the rows' losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_wanted: ContextVar[bool] = ContextVar("twice", default=False)


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Within this, readouts take the form below."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted() -> bool:
    """Whether the code at work asked for second derivatives."""
    return _wanted.get()


def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """-log P[y] of each row, `[n]`, of hidden `[n, d]`, weight `[v, d]`, bias `[v]` and targets `[n]`."""
    return _Loss.apply(hidden, weight, bias, targets)  # type: ignore[no-any-return]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        z = F.linear(hidden, weight, bias)
        own, top = z.gather(1, targets[:, None]), z.amax(dim=1, keepdim=True)
        p = z.sub_(top).exp_()
        total = p.sum(dim=1, keepdim=True)
        p.div_(total)
        ctx.save_for_backward(hidden, weight, bias, targets, p)
        return (total.log() + top - own)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, p = ctx.saved_tensors
        return *_Slopes.apply(hidden, weight, bias, grads[0], p, targets), None


class _Slopes(torch.autograd.Function):
    """G = (P - Y) c, and from it the slopes G W, G^T H and the sum of G's rows.

    Backwards, with U_H, U_W, u_b the adjoints of those three: A = U_H W^T + H U_W^T + u_b is the adjoint of G, that of
    Z is B = c P (A - sum_v P A), and
        c: sum_v (P - Y) A;  H: B W + G U_W;  W: B^T H + G^T U_H;  b: sum of B's rows.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, p: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        g = p * scale[:, None]
        g.scatter_add_(1, targets[:, None], -scale[:, None])
        ctx.save_for_backward(hidden, weight, bias, scale, p, g, targets)
        ctx.set_materialize_grads(False)  # of a frozen readout nothing is asked
        return g @ weight, g.T @ hidden, None if bias is None else g.sum(dim=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, scale, p, g, targets = ctx.saved_tensors
        at_h, at_w, at_b = grads
        a = None if at_b is None else at_b.expand(len(hidden), -1).clone()
        a = a if at_w is None else _plus(a, hidden, at_w.T)
        a = a if at_h is None else _plus(a, at_h, weight.T)
        if a is None:
            return (None,) * 6
        # The mean of A under P, row by row; B comes of P (A - mean) in one more visit.
        mean = torch.bmm(p[:, None], a[:, :, None])[:, 0]
        to_scale = (mean - a.gather(1, targets[:, None]))[:, 0]
        b = a.sub_(mean).mul_(p).mul_(scale[:, None])
        to_hidden = _plus(None if at_w is None else g @ at_w, b, weight)
        to_weight = _plus(None if at_h is None else g.T @ at_h, b.T, hidden)
        return to_hidden, to_weight, None if bias is None else b.sum(dim=0), to_scale, None, None


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if total is None else torch.addmm(total, left, right)
