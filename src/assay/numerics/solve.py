"""Solving (H + damping I) x = v: one protocol for four solvers, and every solve says how well it did.

H is symmetric, given as a matrix (`exact`) or as products `[p, k] -> [p, k]` (the others); v is `[p]` or `[p, k]`, all
columns solved at once. A product sums over the whole pool: inverses of batches are never added up. All are linear in v
and symmetric, <u, solve(v)> = <solve(u), v>, as far as the residual goes (`arnoldi`: exactly).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.numerics.project import rademacher

Product = Callable[[Tensor], Tensor]

# Minibatches whose largest eigenvalue is looked at before a sampled LiSSA starts.
PROBED = 8
# Room above the largest eigenvalue that power iteration found, which is never too large.
ROOM = 1.05


@dataclass(frozen=True)
class Solution:
    """`x` shaped as v; `residual` = |(H + damping I) x - v| / |v|, the largest over columns, by one more product.

    `damping` is what was in force: x approximates (H + damping I)^-1 v and nothing else.
    """

    x: Tensor
    residual: float
    iterations: int
    damping: float


def relative_damping(share: float, trace: float, size: int) -> float:
    """damping = share x mean eigenvalue = share x tr(H) / p: the same share means the same on any scale of the loss."""
    return share * max(trace, 0.0) / size


def training_time(marks: Sequence[Any]) -> float:
    """t = data weight x sum of learning rates / (1 - momentum) of a run's marks: a quadratic loss followed for a time t
    answers much as with damping 1 / t (Ali, Kolter & Tibshirani 2019, arXiv:1810.10082)."""
    about = marks[-1].optimiser
    if "weight" not in about:
        raise InputError(
            "it is not known how the scoring model was trained", why="scale = 'run' needs its learning rates",
            fix="scale = 'eigenvalue'",
        )  # fmt: skip
    if about.get("square"):
        raise InputError(
            "the scoring model was trained with AdamW", why="its steps are not those of its learning rate alone",
            fix="scale = 'eigenvalue', or train it with optimiser = 'sgd' or 'momentum'",
        )  # fmt: skip
    return about["weight"] * sum(mark.rate for mark in marks) / (1 - about["inertia"])


def factor(matrix: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of `matrix + damping I`. Raises `InputError` when that is not positive definite."""
    _check_finite(matrix.isfinite().all())
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        least = float(torch.linalg.eigvalsh(damped)[0])
        raise InputError(
            f"the curvature is not positive definite: smallest eigenvalue {least:.3g} at damping {damping:.3g}",
            why="the model is not at a minimum, or is not convex",
            fix="raise `damping`, or use curvature = 'ggn'",
        )
    return lower


def exact(matrix: Tensor, v: Tensor, *, damping: float = 0.0) -> Solution:
    """Cholesky of `matrix + damping I`. Raises `InputError` when that is not positive definite."""
    _check_finite(v.isfinite().all())
    x = torch.cholesky_solve(_columns(v), factor(matrix, damping)).view_as(v)
    return Solution(x, residual(lambda y: matrix @ y, x, v, damping), 1, damping)


def cg(
    product: Product, v: Tensor, *, damping: float = 0.0, tolerance: float = 1e-6, limit: int = 1000,
    precondition: Product | None = None,
) -> Solution:  # fmt: skip
    """Conjugate gradients (Hestenes & Stiefel 1952), each column by its own recursion, until all have converged.

    A column that reaches `tolerance` leaves the products. `precondition` applies a symmetric positive definite M^-1 to
    columns; what it is changes the path, not the answer. Stops after `limit` products. Raises `InputError` on negative
    curvature, where the recursion would go on and mean nothing.
    """
    apply = precondition or (lambda r: r)
    b = _columns(v)
    _check_finite(b.isfinite().all())
    scale, x, done = b.norm(dim=0), torch.zeros_like(b), 0
    live = scale.nonzero()[:, 0]
    y, r = x[:, live], b[:, live].clone()
    z = apply(r)
    d, rz = z.clone(), (r * z).sum(dim=0)
    while len(live) and done < limit:
        hd = product(d) + damping * d
        bend = (d * hd).sum(dim=0)
        _check_finite(bend.isfinite().all())
        if float(bend.min()) <= 0:
            raise _negative(f"negative curvature after {done} steps of CG at damping {damping:.3g}")
        step = rz / bend
        y, r, done = y.addcmul_(d, step.expand_as(d)), r.addcmul_(hd, -step.expand_as(d)), done + 1
        going = r.norm(dim=0) > tolerance * scale[live]
        if not bool(going.all()):
            x[:, live[~going]] = y[:, ~going]
            live, y, r, d, rz = live[going], y[:, going], r[:, going], d[:, going], rz[going]
        if not len(live):
            break
        z = apply(r)
        fresh = (r * z).sum(dim=0)
        d, rz = z + (fresh / rz) * d, fresh
    x[:, live] = y
    x = x.view_as(v)
    return Solution(x, residual(product, x, v, damping), done, damping)


def subspace(product: Product, size: int, rank: int, damping: float, *, dtype: torch.dtype = torch.float64) -> Product:
    """A preconditioner from `2 rank` products: H inverted on a subspace that a keyed random block finds the top of.

    With Q spanning H Omega and U, L the eigenpairs of Q^T H Q (Halko et al. 2011), M^-1 = U (L + damping)^-1 U^T +
    (1 / (l + damping)) (I - U U^T), l the smallest L: the condition number falls from top / damping to about
    l / damping (Frangella et al. 2023). For hundreds of vectors it costs what two products of all of them do.
    """
    omega = rademacher(rank, size, seed=0, label="subspace").T.to(dtype).contiguous()
    drawn = product(omega)
    _check_finite(drawn.isfinite().all())
    q = torch.linalg.qr(drawn)[0]
    values, vectors = torch.linalg.eigh(q.T @ product(q))
    rounding = size * torch.finfo(dtype).eps * float(values.abs().max())
    if float(values[0]) + damping < -rounding:
        raise _negative(f"negative curvature: eigenvalue {float(values[0]):.3g} at damping {damping:.3g}")
    damped = (values + damping).clamp_min(rounding)
    # M^-1 but for the factor 1 / the smallest, which does not change the path of CG.
    u, share = q @ vectors, 1 - damped[0] / damped
    return lambda r: r - u @ (share[:, None] * (u.T @ r))


def power(product: Product, size: int, *, dtype: torch.dtype = torch.float64, steps: int = 30) -> float:
    """The largest |eigenvalue|, from below, by power iteration from a keyed start; stops when three digits stand."""
    x, top = rademacher(1, size, seed=0, label="power")[0].to(dtype), 0.0
    for _ in range(steps):
        y = product((x / x.norm())[:, None])[:, 0]
        _check_finite(y.isfinite().all())
        before, top, x = top, float(y.norm()), y
        if top == 0 or abs(top - before) <= 1e-3 * top:
            break
    return top


def lissa(
    product: Product, v: Tensor, *, damping: float = 0.0, tolerance: float = 1e-6, limit: int = 10_000,
    sampled: Callable[[int, Tensor], Tensor] | None = None,
) -> Solution:  # fmt: skip
    """The Neumann series of Agarwal et al. 2017 (LiSSA): x <- v + (1 - d) x - H x / s, and x / s in the end.

    Its fixed point is (H + d s I)^-1 v, so d = damping / s; and s is no option, but the largest eigenvalue, by power
    iteration, and the damping: no eigenvalue of the iteration is then outside of [0, 1), and about s / (smallest +
    damping) steps are needed for each factor e. With `sampled(step, x)`, unbiased products of minibatches, all `limit`
    steps are taken and the later half of the iterates is averaged; its mean is right only if each step's minibatch is
    drawn independently of the others (not from one pass over the pool, which ties it to x). Raises `InputError` on
    negative curvature.
    """
    b = _columns(v)
    _check_finite(b.isfinite().all())
    tops = [power(product, len(b), dtype=b.dtype)]
    if sampled is not None:
        tops += [power(partial(sampled, k), len(b), dtype=b.dtype) for k in range(PROBED)]
    s = ROOM * max(tops) + damping
    if s == 0:
        raise InputError("the curvature is zero, and so is the damping", fix="raise `damping`")
    sizes = b.norm(dim=0).clamp_min(torch.finfo(b.dtype).tiny)
    x, mean, averaged, done = torch.zeros_like(b), torch.zeros_like(b), 0, 0
    while done < limit:
        hx = product(x) if sampled is None else sampled(done, x)
        move = b - (damping / s) * x - hx / s
        x, done = x + move, done + 1
        # In full batches the move is the residual of x / s, and shrinks; only a negative eigenvalue makes it grow.
        size = float((move.norm(dim=0) / sizes).max())
        if not size < (2.0 if sampled is None else 1e3):
            raise _negative(f"LiSSA diverges after {done} steps at damping {damping:.3g}")
        if sampled is None and size <= tolerance:
            break
        if sampled is not None and done > limit // 2:
            mean, averaged = mean + x, averaged + 1
    x = ((mean / averaged if averaged else x) / s).view_as(v)
    return Solution(x, residual(product, x, v, damping), done, damping)


def lanczos(product: Product, size: int, steps: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Orthonormal columns Q `[p, m]` and T = Q^T H Q `[m, m]` of a Krylov space from a keyed start, m <= steps, p.

    Reorthogonalised twice against all columns. When the space closes, a fresh keyed direction goes on outside of it:
    eigenvalues that repeat are found as often as they occur.
    """
    m = min(steps, size)
    q, t = torch.zeros(size, m, dtype=dtype), torch.zeros(m, m, dtype=dtype)
    q[:, 0] = rademacher(1, size, seed=0, label="lanczos")[0].to(dtype) / size**0.5
    scale = 0.0
    for j in range(m):
        w = product(q[:, j : j + 1])[:, 0]
        _check_finite(w.isfinite().all())
        t[j, j], scale = q[:, j] @ w, max(scale, float(w.norm()))
        if j + 1 == m:
            break
        w = _outside(w, q[:, : j + 1])
        beta = w.norm()
        if float(beta) <= 1e2 * torch.finfo(dtype).eps * scale:
            w = _outside(rademacher(1, size, seed=0, label=f"lanczos/{j}")[0].to(dtype), q[:, : j + 1])
            beta, w = beta * 0, w / w.norm()
            w = _outside(w, q[:, : j + 1])
            q[:, j + 1] = w / w.norm()
        else:
            q[:, j + 1] = w / beta
        t[j, j + 1] = t[j + 1, j] = beta
    return q, t


def _outside(w: Tensor, q: Tensor) -> Tensor:
    for _ in range(2):
        w = w - q @ (q.T @ w)
    return w


def arnoldi(
    product: Product, v: Tensor, *, damping: float = 0.0, rank: int | None = None, limit: int = 500
) -> Solution:  # fmt: skip
    """The top `rank` eigenpairs of a Krylov space of `limit` products, as one inverse for all columns.

    With U, L the kept eigenvectors and values (Schioppa et al. 2022 for influence; for a symmetric H Arnoldi's
    recursion is Lanczos's): damping = 0 gives the pseudo-inverse U L^-1 U^T v, blind outside of U; damping > 0 gives
    U (L + damping)^-1 U^T v + (v - U U^T v) / damping, which takes H for zero outside of U. All pairs are kept unless
    `rank` says otherwise. Raises `InputError` when a kept eigenvalue, damped, is negative.
    """
    b = _columns(v)
    _check_finite(b.isfinite().all())
    q, t = lanczos(product, len(b), limit, dtype=b.dtype)
    values, vectors = torch.linalg.eigh(t)
    order = values.abs().argsort(descending=True)[: rank or len(values)]
    values, u = values[order], q @ vectors[:, order]
    if damping == 0:  # what is zero but for rounding has no inverse
        kept = values.abs() > len(b) * torch.finfo(b.dtype).eps * values.abs().max()
        values, u = values[kept], u[:, kept]
    if len(values) and float((values + damping).min()) <= 0:
        raise _negative(f"eigenvalue {float(values.min()):.3g} in the Krylov space at damping {damping:.3g}")
    inside = u.T @ b
    x = u @ (inside / (values + damping)[:, None])
    if damping > 0:
        x = x + (b - u @ inside) / damping
    x = x.view_as(v)
    return Solution(x, residual(product, x, v, damping), q.shape[1], damping)


def residual(product: Product, x: Tensor, v: Tensor, damping: float) -> float:
    """|(H + damping I) x - v| / |v|, the largest over columns; 0 for columns of zeros."""
    x, v = _columns(x), _columns(v)
    gap = product(x) + damping * x - v
    size = v.norm(dim=0).clamp_min(torch.finfo(v.dtype).tiny)
    return float((gap.norm(dim=0) / size).max()) if v.shape[1] else 0.0


def _columns(v: Tensor) -> Tensor:
    return v if v.dim() == 2 else v[:, None]


def _negative(what: str) -> InputError:
    return InputError(what, why="the Hessian is indefinite here", fix="raise `damping`, or use curvature = 'ggn'")


def _check_finite(finite: Tensor | bool) -> None:
    if not bool(finite):
        raise InputError(
            "the curvature or the gradients are not finite",
            why="the model diverged, or numbers left the range of their type",
            fix="lower the learning rate",
        )
