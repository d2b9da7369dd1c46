"""Influence functions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.method import Batch, Context, Cost, Count, NonNegative, Positive, Scorer


class Influence(Scorer):
    """Influence function: the first-order change of the target loss at the new optimum when an example gains weight.

    Formula: s_i = (1/N) grad f^T (H + damping tr(H)/p I)^-1 grad loss_i, f = mean target loss,
        H = (1/N) sum_j d2 loss_j + weight_decay I
    Reference: Koh & Liang 2017, arXiv:1703.04730; damping relative to the mean eigenvalue as in Grosse et al. 2023,
        arXiv:2308.03296
    Note: for models of a few thousand weights; 'exact' factorises H, 'cg' solves by products and estimates tr(H) from
        16 of them; averaged over the scoring models
    """

    solver: Literal["exact", "cg"] = "cg"
    curvature: Literal["hessian", "ggn"] = "ggn"
    damping: NonNegative = 0.01
    weight_decay: NonNegative = 0.0
    tolerance: Positive = 1e-6
    limit: Count = 500

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit weight"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> Any:
        return context.task, [(params, self._direction(context, params)) for params in context.models]

    def _direction(self, context: Context, params: Any) -> Any:
        """(1/N) (H + damping)^-1 grad f, `[p]` float64."""
        import torch

        from assay.numerics.curvature import curvature, exact_gradients
        from assay.numerics.solve import cg, exact, relative_damping

        wide = {n: p.double() for n, p in params.items()}
        inputs = lambda pool: (batch.inputs for batch in context.batches(pool))  # noqa: E731
        slopes = [exact_gradients(context.task, wide, i).sum(dim=0) for i in inputs(context.target)]
        slope = torch.stack(slopes).sum(dim=0) / len(context.target)
        operator = curvature(context.task, wide, lambda: inputs(context.pool), len(context.pool), kind=self.curvature)
        operator.decay = self.weight_decay
        forward = context.task.forward_flops(context.encoded(context.pool).sizes)
        if self.solver == "exact":
            matrix = operator.dense()
            context.spent(operator.flops(forward) + operator.size**3 / 3)
            damping = relative_damping(self.damping, float(matrix.trace()), operator.size)
            return exact(matrix, slope, damping=damping).x / len(context.pool)
        damping = relative_damping(self.damping, _trace(operator), operator.size)
        solution = cg(operator.product, slope, damping=damping, tolerance=self.tolerance, limit=self.limit)
        context.spent(operator.flops(forward))
        if solution.residual > 100 * self.tolerance:
            context.warn(
                f"influence: CG stopped at residual {solution.residual:.1e} after {solution.iterations} products"
            )
        return solution.x / len(context.pool)

    def score(self, state: Any, batch: Batch) -> Any:
        from assay.numerics.curvature import exact_gradients

        task, models = state
        dots = [
            exact_gradients(task, {n: p.double() for n, p in params.items()}, batch.inputs) @ v for params, v in models
        ]
        return np.mean([d.numpy() for d in dots], axis=0)


def _trace(operator: Any, probes: int = 16) -> float:
    """Hutchinson's estimate of tr(H) with keyed signs: E z^T H z, relative error about sqrt(2 / probes / rank)."""
    from assay.numerics.project import rademacher

    signs = rademacher(probes, operator.size, seed=0, label="trace").double() * probes**0.5
    return float(sum(z @ operator.product(z) for z in signs) / probes)
