"""Cosine of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from assay.core.method import Batch, Context, Cost, Featurizer, Scorer, Targets, target_columns
from assay.core.table import unit_rows


@dataclass(frozen=True)
class _State:
    columns: tuple[str, ...]
    slopes: list[tuple[Featurizer, np.ndarray]]
    """Features of each scoring model, and the target's unit rows `[c, d]`."""


class GradCos(Scorer):
    """Mean cosine of an example's gradient with the target's gradients: direction without size.

    Formula: s_i = mean over q of <phi_q, phi_i> / (|phi_q| |phi_i|); 0 where a gradient is zero
    Reference: Xia et al. 2024, arXiv:2402.04333 (cosine of gradients in LESS)
    Note: averaged over the scoring models; `queries`: features of the target where they are other than the pool's;
        targets = 'each' gives a column for each target example
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]
    queries: Featurizer | None = None
    targets: Targets = "mean"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "cosine"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        asked, state = self.queries or self.features, []
        for own, other in zip(context.members(self.features), context.members(asked), strict=True):
            context.table(own)
            slopes = unit_rows(context.target_table(other).values.astype("float64"))[0]
            kept = slopes if self.targets == "each" else slopes.mean(axis=0, keepdims=True)
            state.append((own, own.sense * other.sense * kept))
        return _State(target_columns(context, self.targets), state)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        rows = ((unit_rows(batch.table(m).astype("float64"))[0], slopes) for m, slopes in state.slopes)
        return sum(unit @ slopes.T for unit, slopes in rows) / len(state.slopes)
