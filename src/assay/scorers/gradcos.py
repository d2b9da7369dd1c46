"""Cosine of gradients."""

from __future__ import annotations

from typing import Any, ClassVar

from assay.core.method import Batch, Context, Cost, Featurizer, Scorer
from assay.core.table import unit_rows


class GradCos(Scorer):
    """Mean cosine of an example's gradient with the target's gradients: direction without size.

    Formula: s_i = mean over q of <phi_q, phi_i> / (|phi_q| |phi_i|); 0 where a gradient is zero
    Reference: Xia et al. 2024, arXiv:2402.04333 (cosine of gradients in LESS)
    Note: averaged over the scoring models
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "cosine"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> Any:
        state = []
        for member in context.members(self.features):
            context.table(member)
            target = context.target_table(member).values.astype("float64")
            state.append((member, unit_rows(target)[0].mean(axis=0)))
        return state

    def score(self, state: Any, batch: Batch) -> Any:
        return sum(unit_rows(batch.table(m).astype("float64"))[0] @ mean for m, mean in state) / len(state)
