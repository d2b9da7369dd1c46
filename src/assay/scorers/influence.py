"""Influence functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from assay.core.errors import InputError
from assay.core.method import (
    Batch,
    Context,
    Cost,
    Count,
    NonNegative,
    Positive,
    Scorer,
    Targets,
    batch_places,
    target_columns,
)

if TYPE_CHECKING:
    from torch import Tensor

    from assay.numerics.operator import Operator
    from assay.numerics.solve import Solution

# Parameters up to which the curvature is made as a matrix: 3 GB in float64.
LARGEST = 20_000
# A residual that is called poor: so many times the tolerance, or, of a subspace that has none, this.
SHORT, POOR = 100, 0.1


@dataclass(frozen=True)
class _State:
    task: Any
    columns: tuple[str, ...]
    names: tuple[str, ...]
    models: list[tuple[dict[str, Tensor], Tensor, set[str]]]
    """Parameters, the directions `[p, c]`: (1/N) (H + damping)^-1 grad f, and the parameters that go without rules."""


class Influence(Scorer):
    """Influence function: the first-order change of the target loss at the new optimum when an example gains weight.

    Formula: s_i = (1/N) grad f^T (H + damping tr(H)/p I)^-1 grad loss_i, f = mean target loss,
        H = (1/N) sum_j d2 loss_j + weight_decay I; kfac, ekfac: sum over layers, H and its mean eigenvalue of each
    Reference: Koh & Liang 2017, arXiv:1703.04730; damping relative to the mean eigenvalue as in Grosse et al. 2023,
        arXiv:2308.03296; lissa Agarwal et al. 2017, arXiv:1602.03943; arnoldi Schioppa et al. 2022, arXiv:2112.03052;
        kfac Martens & Grosse 2015, arXiv:1503.05671; ekfac George et al. 2018, arXiv:1806.03884
    Note: every solver sums over the whole pool in each product and reports its residual. 'exact' factorises H, up to
        20,000 weights; 'cg' solves by products, with precondition = 'subspace' after 2 x rank of them that find the
        largest eigenvalues (a good rank is the number of columns); 'lissa' sums the Neumann series, its scale found by
        power iteration, in full batches or in keyed minibatches of so many examples; 'arnoldi' keeps the top `rank`
        eigenvalues of `limit` products and takes the rest of H for zero (damping = 0: leaves the rest out).
        'kfac' and 'ekfac' take two passes over the pool and no products: the Fisher information of each layer as a
        Kronecker product, or diagonal in its basis, each term of the pool counting once as in training, sides cut into
        pieces of at most `block`, `draws` labels for each term (0: 10,000 in all), of models of any size (precision =
        'float32' halves their time); precondition = 'ekfac' has them ease the way of CG; query_rank = r
        keeps the r largest singular values of a target's gradient at each matrix (0: all). curvature
        'ggn' drops the model's own bend; 'fisher' is made from labels drawn from the model, 'empirical' from the given
        ones. measure = 'margin' takes f = -margin, for classifiers; targets = 'each' gives a column for each target
        example; layers = 'linear' holds all others fixed. tr(H) is exact where H's rows fit into memory, else
        estimated from 16 products. scale = 'model' has kfac and ekfac, too, count damping in mean eigenvalues
        of the whole model, not of each layer: much of it then leaves dot products, as suits a short run. scale = 'run'
        (SGD, momentum) counts damping not in mean eigenvalues but in 1 / t,
        t = data weight x sum of learning rates of the scoring model's run: damping = 1 then needs no tuning, for
        training for a time t regularises like damping 1 / t (Ali et al. 2019, arXiv:1810.10082). Averaged over the
        scoring models
    """

    solver: Literal["exact", "cg", "lissa", "arnoldi", "kfac", "ekfac"] = "cg"
    curvature: Literal["hessian", "ggn", "fisher", "empirical"] = "ggn"
    targets: Targets = "mean"
    measure: Literal["loss", "margin"] = "loss"
    layers: Literal["all", "linear"] = "all"
    damping: NonNegative = 0.1
    scale: Literal["eigenvalue", "model", "run"] = "eigenvalue"
    weight_decay: NonNegative = 0.0
    tolerance: Positive = 1e-6
    limit: Count = 1000
    rank: Count = 100
    precondition: Literal["none", "subspace", "ekfac"] = "subspace"
    block: Count = 512
    draws: int = 0
    query_rank: Annotated[int, pydantic.Field(ge=0)] = 0
    minibatch: int = 0
    seed: int = 0
    precision: Literal["float64", "float32"] = "float64"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit weight"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        import torch

        from assay.numerics.curvature import parameters
        from assay.train.rules import audited

        if self.minibatch < 0 or (self.minibatch and self.solver != "lissa"):
            raise InputError(
                f"influence: minibatch = {self.minibatch} has no effect", why=f"solver is {self.solver!r}",
                fix="leave it out; for solver = 'lissa' it is a number of examples",
            )  # fmt: skip
        names = tuple(parameters(context.task, context.models[0], self.layers))
        models = []
        for index, params in enumerate(context.models):
            held = {n: p.to(getattr(torch, self.precision)) for n, p in params.items()}
            slow = audited(context, self.name, held, names)
            models.append((held, self._directions(context, held, names, index, slow) / len(context.pool), slow))
        return _State(context.task, target_columns(context, self.targets), names, models)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def _directions(
        self, context: Context, params: Any, names: tuple[str, ...], index: int, slow: set[str]
    ) -> Tensor:  # fmt: skip
        """(H + damping)^-1 grad f, `[p, c]`."""
        from assay.numerics.curvature import reading, slopes

        f, inputs = reading(context.task, self.measure), (batch.inputs for batch in context.batches(context.target))
        v = slopes(context.task, params, inputs, f, names, each=self.targets == "each", fallback=slow)
        v = v[:, batch_places(context, context.target)] if self.targets == "each" else v
        if self.query_rank:
            v = of_rank(v, {n: params[n] for n in names}, self.query_rank)
        if self.solver in ("kfac", "ekfac"):
            return self._factored(context, params, names, index)(v)
        solution = self._solved(context, params, names, v, index, slow)
        # A few vectors leave something out, and what is sampled keeps noise for long: ranks bear more than digits do.
        poor = POOR if self.solver == "arnoldi" or self.minibatch else SHORT * self.tolerance
        said = f"{solution.iterations} products, residual {solution.residual:.1e}, damping {solution.damping:.3g}"
        if not solution.residual <= poor:
            called = {"cg": "CG", "lissa": "LiSSA"}.get(self.solver, self.solver)
            context.warn(
                f"influence: {called} stopped at residual {solution.residual:.1e} after {solution.iterations} products"
            )
        context.note(
            f"influence: solve by {self.solver}", f"{said} (to {poor:.0e} is well)", ok=solution.residual <= poor,
            residual=solution.residual, products=solution.iterations, damping=solution.damping,
        )  # fmt: skip
        return solution.x

    def _solved(
        self, context: Context, params: Any, names: tuple[str, ...], v: Tensor, index: int, slow: set[str]
    ) -> Solution:  # fmt: skip
        from assay.numerics import solve

        operator = self._operator(context, params, names, slow)
        operator.decay = self.weight_decay
        if self.solver == "exact":
            if operator.size > LARGEST:
                raise InputError(
                    f"influence: the curvature of {operator.size} weights is too large to factorise",
                    why=f"'exact' is for up to {LARGEST}", fix="solver = 'cg', or layers = 'linear'",
                )  # fmt: skip
            matrix = operator.dense()
            damping = self._damping(context, index, float(matrix.trace()), operator.size)
            context.spent(operator.size**3 / 3 + 4 * operator.size**2 * v.shape[1])
            solution = solve.exact(matrix, v, damping=damping)
        else:
            damping = self._damping(context, index, 0.0 if self.scale == "run" else operator.trace(), operator.size)
            how: dict[str, Any] = {"damping": damping, "limit": self.limit}
            if self.solver == "cg":
                eased = self._eased(context, operator, damping, index)
                solution = solve.cg(operator.product, v, tolerance=self.tolerance, precondition=eased, **how)
            elif self.solver == "lissa":
                sampled = self._sampled(context, params, names) if self.minibatch else None
                solution = solve.lissa(operator.product, v, tolerance=self.tolerance, sampled=sampled, **how)
            else:
                solution = solve.arnoldi(operator.product, v, rank=self.rank, **how)
        context.spent(operator.flops(context.task.forward_flops(context.encoded(context.pool).sizes)))
        return solution

    def _damping(self, context: Context, index: int, trace: float, size: int) -> float:
        """What `damping` is of this model's curvature, or of the time it was trained for."""
        from assay.numerics.solve import relative_damping, training_time

        if self.scale == "run":
            return self.damping / training_time(context.trajectories[index])
        return relative_damping(self.damping, trace, size)

    def _eased(self, context: Context, operator: Operator, damping: float, index: int) -> Any:
        """The preconditioner of CG, or None."""
        from assay.numerics.operator import flat
        from assay.numerics.solve import subspace

        if self.precondition == "none":
            return None
        if self.precondition == "ekfac":
            params = {**context.models[index], **operator.params}
            return self._factored(context, params, tuple(operator.params), index, shift=damping)
        dtype = flat(operator.params).dtype
        return subspace(operator.product, operator.size, min(self.rank, operator.size), damping, dtype=dtype)

    def _factored(
        self, context: Context, params: Any, names: tuple[str, ...], index: int, shift: float | None = None
    ) -> Any:
        """v -> (H + damping)^-1 v over columns `[p, c]` by Kronecker factors; `shift` is damping that is no share."""
        from assay.numerics.kfac import damped, joined, parted, shifted
        from assay.train.factors import Fisher, fit, passes

        if self.curvature == "hessian":
            raise InputError(
                "influence: Kronecker factors are of Fisher information", why="curvature is 'hessian'",
                fix="curvature = 'fisher', or 'empirical'; or solver = 'cg'",
            )  # fmt: skip
        labels = "true" if self.curvature == "empirical" else "sampled"
        fisher = Fisher(labels=labels, draws=self.draws, block=self.block, seed=self.seed)
        pool, encoded = context.pool, context.encoded(context.pool)
        path = context.folder / f"factors-{index}"
        factors = fit(context.task, [params], encoded, pool.ids, fisher, only=set(names), path=path)
        context.spent(passes(fisher, encoded) * context.task.forward_flops(encoded.sizes))
        context.note(
            "influence: Kronecker factors",
            f"{len(factors.blocks)} blocks with {100 * factors.share:.1f}% of the squared gradient norm",
            share=factors.share, blocks=len(factors.blocks),
        )  # fmt: skip
        own, kind = {n: params[n] for n in names}, "kfac" if self.solver == "kfac" else "ekfac"
        if shift is None and self.scale != "eigenvalue":
            shift = self._damping(context, index, factors.trace(kind, self.weight_decay), factors.size)
        each = damped(self.damping, self.weight_decay)
        function = each if shift is None else shifted(shift + self.weight_decay)
        return lambda v: joined(factors.apply(function, parted(v, own), kind), own)

    def _operator(self, context: Context, params: Any, names: tuple[str, ...], slow: set[str]) -> Operator:
        from assay.core.keys import hash_ids
        from assay.numerics.curvature import curvature

        pool = context.pool
        return curvature(
            context.task, params, lambda: (b.inputs for b in context.batches(pool)), len(pool), kind=self.curvature,
            only=names, keys=lambda: (hash_ids(b.ids) for b in context.batches(pool)), seed=self.seed,
            fallback=slow,
        )  # fmt: skip

    def _sampled(self, context: Context, params: Any, names: tuple[str, ...]) -> Any:
        """Products of minibatches drawn with replacement, keyed by the step and by ids, whatever the pool's order."""
        from assay.core.keys import hash_ids, shuffled
        from assay.numerics.curvature import curvature
        from assay.numerics.project import splitmix64

        pool, encoded, size = context.pool, context.encoded(context.pool), self.minibatch
        forward = context.task.forward_flops(encoded.sizes) / len(pool) * size
        order = shuffled(pool.ids, "lissa", self.seed)

        def product(step: int, x: Tensor) -> Tensor:
            drawn = splitmix64(np.arange(step * size, (step + 1) * size, dtype=np.uint64))
            rows = order[(drawn % np.uint64(len(pool))).astype(np.int64)]
            operator = curvature(
                context.task, params, lambda: [encoded.inputs(rows)], size, kind=self.curvature, only=names,
                keys=lambda: [hash_ids(pool.ids[rows])], seed=self.seed, cache=0,
            )  # fmt: skip
            operator.decay = self.weight_decay
            found = operator.product(x)
            context.spent(operator.flops(forward))
            return found

        return product

    def score(self, state: _State, batch: Batch) -> Any:
        from assay.numerics.curvature import dots

        task, inputs, names = state.task, batch.inputs, state.names
        found = [dots(task, params, inputs, x, names, slow).numpy() for params, x, slow in state.models]
        return np.mean(found, axis=0, dtype=np.float64)


def of_rank(v: Tensor, like: dict[str, Tensor], rank: int) -> Tensor:
    """Directions `[p, c]`, at each matrix of `like` the nearest ones of this rank; exact where theirs is no higher."""
    import torch

    from assay.numerics.kfac import joined, parted

    found = parted(v, like)
    for name, g in found.items():
        if g.dim() > 2 and min(g.shape[1], g[0, 0].numel()) > rank:
            u, s, w = torch.linalg.svd(g.flatten(2), full_matrices=False)
            found[name] = ((u[..., :rank] * s[:, None, :rank]) @ w[:, :rank]).view_as(g)
    return joined(found, like)
