"""First-order influence."""

from __future__ import annotations

from typing import Any, ClassVar

from assay.core.method import Batch, Context, Cost, Featurizer, Scorer


class GradDot(Scorer):
    """Dot product of an example's gradient with the target's mean gradient: the effect of one infinitesimal SGD step.

    Formula: s_i = mean over q of <phi_q, phi_i>
    Reference: Pruthi et al. 2020, arXiv:2002.08484 (TracIn at one checkpoint)
    Note: averaged over the scoring models; grows with the size of the example's gradient
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit step"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> Any:
        state = []
        for member in context.members(self.features):
            context.table(member)
            state.append((member, context.target_table(member).values.astype("float64").mean(axis=0)))
        return state

    def score(self, state: Any, batch: Batch) -> Any:
        return sum(batch.table(m).astype("float64") @ mean for m, mean in state) / len(state)
