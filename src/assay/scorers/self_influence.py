"""Self-influence: how much an example props up its own prediction."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, NonNegative, Scorer

# Parameters up to which the curvature is made as a matrix: 3 GB in float64.
LARGEST = 20_000
# A residual above this is of a matrix too ill-conditioned for float64.
SHORT = 1e-4


class SelfInfluence(Scorer):
    """Minus the influence of an example on its own loss: wrongly labelled and odd examples come last.

    Formula: s_i = -(1/N) grad loss_i^T (H + damping tr(H)/p I)^-1 grad loss_i,
        H = (1/N) sum_j d2 loss_j (or its Gauss-Newton part) + weight_decay I;
        of = 'weights': s_i = -|(1/N) (H + damping tr(H)/p I)^-1 grad loss_i|^2
    Reference: Koh & Liang 2017, arXiv:1703.04730, sec. 5.4; 'weights' Barshan et al. 2020, arXiv:2003.11630
    Note: a diagnostic, not a utility; H is factorised, so for models of up to 20,000 weights; averaged over the
        scoring models. of = 'weights' is how far the example moves the weights, squared; scale as of `influence`
    """

    of: Literal["loss", "weights"] = "loss"
    curvature: Literal["hessian", "ggn", "fisher", "empirical"] = "ggn"
    layers: Literal["all", "linear"] = "all"
    damping: NonNegative = 0.1
    scale: Literal["eigenvalue", "run"] = "eigenvalue"
    weight_decay: NonNegative = 0.0
    seed: int = 0

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "minus nats per term and unit weight"
    measures_utility: ClassVar[bool] = False

    def init(self, context: Context) -> Any:
        from assay.numerics.curvature import parameters
        from assay.train.rules import audited

        names = tuple(parameters(context.task, context.models[0], self.layers))
        factors = []
        for index, params in enumerate(context.models):
            wide = {n: p.double() for n, p in params.items()}
            slow = audited(context, self.name, wide, names)
            factors.append((wide, self._factor(context, wide, names, index, slow), slow))
        return context.task, names, len(context.pool), factors

    def _factor(self, context: Context, params: Any, names: tuple[str, ...], index: int, slow: set[str]) -> Any:
        """The Cholesky factor of H + damping, `[p, p]`."""
        from assay.core.keys import hash_ids
        from assay.numerics import solve
        from assay.numerics.curvature import curvature, size
        from assay.numerics.project import rademacher

        pool, p = context.pool, size(params, names)
        if p > LARGEST:
            raise InputError(
                f"self_influence: the curvature of {p} weights is too large to factorise",
                why=f"it is for up to {LARGEST}", fix="layers = 'linear', or a smaller model",
            )  # fmt: skip
        operator = curvature(
            context.task, params, lambda: (b.inputs for b in context.batches(pool)), len(pool), kind=self.curvature,
            only=names, keys=lambda: (hash_ids(b.ids) for b in context.batches(pool)), seed=self.seed,
            fallback=slow,
        )  # fmt: skip
        operator.decay = self.weight_decay
        matrix = operator.dense()
        forward = context.task.forward_flops(context.encoded(pool).sizes)
        context.spent(operator.flops(forward) + p**3 / 3 + 2 * len(pool) * p**2)
        damping = solve.relative_damping(self.damping, float(matrix.trace()), p)
        if self.scale == "run":
            damping = self.damping / solve.training_time(context.trajectories[index])
        lower, probe = solve.factor(matrix, damping), rademacher(1, p, seed=0, label="probe")[0][:, None].double()
        found = solve.residual(lambda x: matrix @ x, probe.cholesky_solve(lower), probe, damping)
        if not found <= SHORT:
            context.warn(f"self_influence: the factors' residual is {found:.1e}; give more damping")
        context.note(
            "self_influence: factorised",
            f"residual {found:.1e} of a random vector (to {SHORT:.0e} is well), damping {damping:.3g}",
            ok=found <= SHORT, residual=found, damping=damping,
        )  # fmt: skip
        return lower

    def score(self, state: Any, batch: Batch) -> Any:
        import torch

        from assay.numerics.curvature import exact_gradients

        task, names, count, factors = state
        found = []
        for params, lower, slow in factors:
            grads = exact_gradients(task, params, batch.inputs, only=names, fallback=slow).T
            if self.of == "loss":
                halves = torch.linalg.solve_triangular(lower, grads, upper=False)
                found.append(halves.square().sum(dim=0).numpy() / count)
            else:
                found.append((grads.cholesky_solve(lower) / count).square().sum(dim=0).numpy())
        return -np.mean(found, axis=0)
