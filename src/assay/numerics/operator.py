"""Curvature as products: matrix-free Hessian and Gauss-Newton operators of a mean loss, over flat parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call  # noqa: F401 - re-exported for tasks that are written against this module
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = Mapping[str, Tensor]


def flat(params: Params) -> Tensor:
    """All parameters as one vector, names in their own order."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def unflat(vector: Tensor, like: Params) -> dict[str, Tensor]:
    """The inverse of `flat`."""
    sizes = [p.numel() for p in like.values()]
    return {n: v.view_as(p) for (n, p), v in zip(like.items(), vector.split(sizes), strict=True)}


class Curvature:
    """`product(v) = (1/N) sum_i H_i v + decay v` for per-example losses summed over *all* batches.

    hessian: H_i = d2 l_i.  ggn: H_i = J_i^T B_i J_i with J_i = d outputs/d params and B_i the loss's Hessian in the
    outputs (for cross-entropy, diag(p) - p p^T): positive semi-definite (Schraudolph 2002). Summing inside the product,
    never inverses of batches, is what makes a solver's answer independent of the batch size.
    """

    def __init__(
        self,
        params: Params,
        batches: Callable[[], Iterable[Callable[[Params], tuple[Tensor, Tensor | None]]]],
        count: int,
        *,
        kind: Literal["hessian", "ggn"] = "hessian",
        decay: float = 0.0,
    ) -> None:
        self.params, self.batches, self.count, self.kind, self.decay = dict(params), batches, count, kind, decay
        self.products = 0
        self.size = sum(p.numel() for p in params.values())

    def product(self, v: Tensor) -> Tensor:
        """`[p] -> [p]`; `products` counts how often, for the ledger."""
        self.products += 1
        total = torch.zeros_like(v)
        step = self._hessian if self.kind == "hessian" else self._ggn
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for closure in self.batches():
                total = total + step(closure, v)
        return total / self.count + self.decay * v

    def _leaves(self) -> dict[str, Tensor]:
        return {n: p.detach().requires_grad_() for n, p in self.params.items()}

    def _hessian(self, closure: Callable[[Params], tuple[Tensor, Tensor | None]], v: Tensor) -> Tensor:
        leaves = self._leaves()
        losses, _ = closure(leaves)
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()), create_graph=True, materialize_grads=True)
        inner = torch.cat([g.reshape(-1) for g in grads]) @ v
        return _flat_grad(inner, leaves)

    def _ggn(self, closure: Callable[[Params], tuple[Tensor, Tensor | None]], v: Tensor) -> Tensor:
        leaves = self._leaves()
        losses, outputs = closure(leaves)
        assert outputs is not None, "a Gauss-Newton product needs the model's outputs"
        # J v by the double-backward trick: differentiate u^T J in u.
        u = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(
            outputs, list(leaves.values()), grad_outputs=u, create_graph=True, materialize_grads=True
        )
        parts = zip(back, unflat(v, self.params).values(), strict=True)
        tangent = torch.autograd.grad(torch.stack([(b * w).sum() for b, w in parts]).sum(), u, retain_graph=True)[0]
        slope = torch.autograd.grad(losses.sum(), outputs, create_graph=True)[0]
        bent = torch.autograd.grad((slope * tangent.detach()).sum(), outputs, retain_graph=True)[0]
        return _flat_grad((outputs * bent.detach()).sum(), leaves)

    def flops(self, forward: float) -> float:
        """Operations of all products so far, for `forward` operations of one pass over the data: a product goes
        forward, backward, and back through both."""
        return 6.0 * self.products * forward

    def dense(self) -> Tensor:
        """The matrix itself, `[p, p]`, by p products; for models of a few thousand parameters, and for tests."""
        eye = torch.eye(self.size, dtype=flat(self.params).dtype)
        return torch.stack([self.product(row) for row in eye])


def _flat_grad(value: Tensor, leaves: Params) -> Tensor:
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves.values(), strict=True)]
    return torch.cat([g.reshape(-1) for g in parts]).detach()
