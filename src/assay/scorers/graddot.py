"""First-order influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from assay.core.method import Batch, Context, Cost, Featurizer, Scorer, Targets, target_columns


@dataclass(frozen=True)
class _State:
    columns: tuple[str, ...]
    slopes: list[tuple[Featurizer, np.ndarray]]
    """Features of each scoring model, and the target's `[c, d]`."""


class GradDot(Scorer):
    """Dot product of an example's gradient with the target's mean gradient: the effect of one infinitesimal SGD step.

    Formula: s_i = mean over q of <phi_q, phi_i>
    Reference: Pruthi et al. 2020, arXiv:2002.08484 (TracIn at one checkpoint)
    Note: averaged over the scoring models; grows with the size of the example's gradient; `queries`: features of the
        target where they are other than the pool's; targets = 'each' gives a column for each target example
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]
    queries: Featurizer | None = None
    targets: Targets = "mean"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit step"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        asked, state = self.queries or self.features, []
        for own, other in zip(context.members(self.features), context.members(asked), strict=True):
            context.table(own)
            slopes = context.target_table(other).values.astype("float64")
            kept = slopes if self.targets == "each" else slopes.mean(axis=0, keepdims=True)
            state.append((own, own.sense * other.sense * kept))
        return _State(target_columns(context, self.targets), state)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        return sum(batch.table(m).astype("float64") @ slopes.T for m, slopes in state.slopes) / len(state.slopes)
