"""Curvature as products: matrix-free operators of a mean loss, over flat parameters, for many vectors at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.numerics.project import rademacher

Params = Mapping[str, Tensor]
Closure = Callable[[Params], tuple[Tensor, "Tensor | None"]]
"""Per-example losses `[b]` at given parameters, and the outputs that they are a function of."""

# Vectors of Hutchinson's estimate of a trace.
PROBES = 16
# Numbers of one vmapped backward pass: so many vectors go at a time that no tensor has many more.
HELD = 1 << 21


def flat(params: Params) -> Tensor:
    """All parameters as one vector, names in their own order."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def unflat(vector: Tensor, like: Params) -> dict[str, Tensor]:
    """The inverse of `flat`."""
    sizes = [p.numel() for p in like.values()]
    return {n: v.view_as(p) for (n, p), v in zip(like.items(), vector.split(sizes), strict=True)}


class Operator(ABC):
    """`product(v) = (1/N) sum_i H_i v + decay v`, the sum over *all* batches.

    Summing inside the product, never inverses of batches, is what makes a solver's answer free of the batch size.
    """

    def __init__(self, params: Params, count: int, decay: float) -> None:
        self.params, self.count, self.decay = dict(params), count, decay
        self.products = 0
        self.size = sum(p.numel() for p in params.values())

    @abstractmethod
    def total(self, v_pk: Tensor) -> Tensor:
        """sum_i H_i v for each column, `[p, k]`."""

    @abstractmethod
    def flops(self, forward: float) -> float:
        """Operations so far, for `forward` operations of one pass over the data."""

    def product(self, v: Tensor) -> Tensor:
        """`[p] -> [p]` or `[p, k] -> [p, k]`; `products` counts the vectors, for the ledger."""
        self.products += 1 if v.dim() == 1 else v.shape[1]
        return self.total(v[:, None] if v.dim() == 1 else v).view_as(v) / self.count + self.decay * v

    def dense(self) -> Tensor:
        """The matrix itself, `[p, p]`, by p products; for models of a few thousand parameters, and for tests."""
        eye = torch.eye(self.size, dtype=flat(self.params).dtype)
        return torch.cat([self.product(part) for part in eye.split(256, dim=1)], dim=1)

    def trace(self) -> float:
        """Hutchinson's estimate of the trace with keyed signs: E z^T H z, relative error about sqrt(2 / 16 / rank)."""
        like = flat(self.params)
        z = (rademacher(PROBES, self.size, seed=0, label="trace") * PROBES**0.5).T.to(like.dtype).contiguous()
        return float((z * self.product(z)).sum() / PROBES)


class Curvature(Operator):
    """By differentiating twice; nothing of the size of a matrix, or of n x p, is held.

    hessian: H_i = d2 l_i.  ggn: H_i = J_i^T B_i J_i with J_i = d outputs/d params and B_i the loss's Hessian in the
    outputs (for cross-entropy, diag(p) - p p^T): positive semi-definite (Schraudolph 2002).
    """

    def __init__(
        self,
        params: Params,
        batches: Callable[[], Iterable[Closure]],
        count: int,
        *,
        kind: Literal["hessian", "ggn"] = "hessian",
        decay: float = 0.0,
    ) -> None:
        super().__init__(params, count, decay)
        self.batches, self.kind = batches, kind

    def total(self, v_pk: Tensor) -> Tensor:
        found = torch.zeros_like(v_pk)
        step = self._hessian if self.kind == "hessian" else self._ggn
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for closure in self.batches():
                found += step(closure, v_pk)
        return found

    def flops(self, forward: float) -> float:
        """A product goes forward, backward, and back through both; the first two are shared by those of one call, which
        is left out."""
        return 6.0 * self.products * forward

    def _leaves(self) -> dict[str, Tensor]:
        return {n: p.detach().requires_grad_() for n, p in self.params.items()}

    def _hessian(self, closure: Closure, v_pk: Tensor) -> Tensor:
        leaves = self._leaves()
        losses, _ = closure(leaves)
        names = list(leaves.values())
        slope = _joined(torch.autograd.grad(losses.sum(), names, create_graph=True, materialize_grads=True))
        if not slope.requires_grad:  # a loss that is linear in the parameters
            return torch.zeros_like(v_pk)
        parts = [_pulled(slope, names, some.T) for some in self._some(v_pk, losses)]
        return torch.cat(parts).T

    def _ggn(self, closure: Closure, v_pk: Tensor) -> Tensor:
        leaves = self._leaves()
        losses, outputs = closure(leaves)
        assert outputs is not None, "a Gauss-Newton product needs the model's outputs"
        names = list(leaves.values())
        # J v by the double-backward trick: J^T u is linear in u, and its own pull-back is J.
        u = torch.zeros_like(outputs, requires_grad=True)
        back = _joined(torch.autograd.grad(outputs, names, grad_outputs=u, create_graph=True, materialize_grads=True))
        slope = torch.autograd.grad(losses.sum(), outputs, create_graph=True)[0]
        parts = []
        for some in self._some(v_pk, outputs):
            tangent = _pulled(back, [u], some.T).view(-1, *u.shape)
            bent = _pulled(slope, [outputs], tangent).view(-1, *u.shape)
            parts.append(_pulled(outputs, names, bent))
        return torch.cat(parts).T

    def _some(self, v_pk: Tensor, outputs: Tensor) -> Sequence[Tensor]:
        return v_pk.split(max(1, HELD // max(self.size, outputs.numel())), dim=1)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def _pulled(output: Tensor, leaves: Sequence[Tensor], along: Tensor) -> Tensor:
    """The pull-back of each row of `along` `[k, *output]` to the leaves, `[k, p]`."""
    single = len(along) == 1
    grads = torch.autograd.grad(
        output, leaves, grad_outputs=along[0] if single else along, is_grads_batched=not single, retain_graph=True,
        allow_unused=True,
    )  # fmt: skip
    k = len(along)
    parts = [p.new_zeros(k, p.numel()) if g is None else g.reshape(k, -1) for g, p in zip(grads, leaves, strict=True)]
    return torch.cat(parts, dim=1).detach()
