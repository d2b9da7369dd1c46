"""Solving (H + damping I) x = v: one protocol, and every solve says how well it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.core.errors import InputError


@dataclass(frozen=True)
class Solution:
    """`x` `[p]` or `[p, k]`; `residual` = |(H + damping I) x - v| / |v|, the largest over columns."""

    x: Tensor
    residual: float
    iterations: int
    damping: float


def relative_damping(share: float, trace: float, size: int) -> float:
    """damping = share x mean eigenvalue = share x tr(H) / p: the same share means the same on any scale of the loss."""
    return share * max(trace, 0.0) / size


def exact(matrix: Tensor, v: Tensor, *, damping: float = 0.0) -> Solution:
    """Cholesky of `matrix + damping I`. Raises `InputError` when that is not positive definite."""
    _check_finite(matrix.isfinite().all() and v.isfinite().all())
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        least = float(torch.linalg.eigvalsh(damped)[0])
        raise InputError(
            f"the curvature is not positive definite: smallest eigenvalue {least:.3g} at damping {damping:.3g}",
            why="the model is not at a minimum, or is not convex",
            fix="raise `damping`, or use curvature = 'ggn'",
        )
    x = torch.cholesky_solve(v if v.dim() == 2 else v[:, None], factor)
    x = x if v.dim() == 2 else x[:, 0]
    return Solution(x, _residual(damped @ x - v, v), 1, damping)


def cg(
    product: Callable[[Tensor], Tensor], v: Tensor, *, damping: float = 0.0, tolerance: float = 1e-6, limit: int = 1000
) -> Solution:
    """Conjugate gradients (Hestenes & Stiefel 1952) for one right-hand side `[p]`.

    Stops at residual <= tolerance or after `limit` products. Raises `InputError` on negative curvature, where the
    recursion would go on and mean nothing.
    """
    x, r = torch.zeros_like(v), v.clone()
    d, rr, scale = r.clone(), r @ r, float(v.norm())
    if scale == 0:
        return Solution(x, 0.0, 0, damping)
    done = 0
    while float(rr.sqrt()) > tolerance * scale and done < limit:
        hd = product(d) + damping * d
        curvature = d @ hd
        _check_finite(curvature.isfinite())
        if float(curvature) <= 0:
            raise InputError(
                f"negative curvature after {done} steps of CG at damping {damping:.3g}",
                why="the Hessian is indefinite here", fix="raise `damping`, or use curvature = 'ggn'",
            )  # fmt: skip
        step = rr / curvature
        x, r = x + step * d, r - step * hd
        fresh = r @ r
        d, rr, done = r + (fresh / rr) * d, fresh, done + 1
    return Solution(x, _residual(product(x) + damping * x - v, v), done, damping)


def _check_finite(finite: Tensor | bool) -> None:
    if not bool(finite):
        raise InputError(
            "the curvature or the gradients are not finite",
            why="the model diverged, or numbers left the range of their type",
            fix="lower the learning rate",
        )


def _residual(gap: Tensor, v: Tensor) -> float:
    size = v.norm(dim=0).clamp_min(torch.finfo(v.dtype).tiny)
    return float((gap.norm(dim=0) / size).max())
