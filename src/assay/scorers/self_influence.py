"""Self-influence: how much an example props up its own prediction."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.method import Batch, Context, Cost, NonNegative, Scorer


class SelfInfluence(Scorer):
    """Minus the influence of an example on its own loss: wrongly labelled and odd examples come last.

    Formula: s_i = -(1/N) grad loss_i^T (H + damping tr(H)/p I)^-1 grad loss_i,
        H = (1/N) sum_j d2 loss_j (or its Gauss-Newton part)
    Reference: Koh & Liang 2017, arXiv:1703.04730, sec. 5.4
    Note: a diagnostic, not a utility; H is factorised, so for models of a few thousand weights; averaged over the
        scoring models
    """

    curvature: Literal["hessian", "ggn"] = "ggn"
    damping: NonNegative = 0.1

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "minus nats per term and unit weight"
    measures_utility: ClassVar[bool] = False

    def init(self, context: Context) -> Any:
        import torch

        from assay.numerics.curvature import curvature
        from assay.numerics.solve import exact, relative_damping

        inverses = []
        for params in context.models:
            wide = {n: p.double() for n, p in params.items()}
            count = len(context.pool)
            operator = curvature(
                context.task,
                wide,
                lambda: (b.inputs for b in context.batches(context.pool)),
                count,
                kind=self.curvature,
            )
            matrix = operator.dense()
            forward = context.task.forward_flops(context.encoded(context.pool).sizes)
            context.spent(operator.flops(forward) + 2 * operator.size**3 + 2 * count * operator.size**2)
            damping = relative_damping(self.damping, float(matrix.trace()), operator.size)
            eye = torch.eye(operator.size, dtype=matrix.dtype)
            inverses.append((wide, exact(matrix, eye, damping=damping).x / count))
        return context.task, inverses

    def score(self, state: Any, batch: Batch) -> Any:
        from assay.numerics.curvature import exact_gradients

        task, models = state
        grads = [(exact_gradients(task, params, batch.inputs), inverse) for params, inverse in models]
        return -np.mean([((g @ inverse) * g).sum(dim=1).numpy() for g, inverse in grads], axis=0)
