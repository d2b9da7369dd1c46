"""From scores to a set: the best first, until the budget is full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import hash_ids, uniform
from assay.core.method import NonNegative, Selector
from assay.core.selection import Budget, Selection, by_reason, refused
from assay.core.table import Table


class Cut(Selector):
    """Bounds on columns first, then the highest scores while they fit in the budget.

    Formula: order by s_i (temperature 0), or by z_i / temperature + G_i with z = standardised s (s itself without
        `standardise`), G_i = -log(-log u_i), u_i keyed by id
    Reference: Gumbel top-k: Kool et al. 2019, arXiv:1903.06059
    Note: an example that does not fit is passed over and smaller ones may follow, so a token budget is missed by less
        than the smallest example left; ties fall by a hash of the id, a fair draw that no file order changes. Scores
        that are log weights, such as dsir's, are drawn without replacement in proportion to their weights at
        temperature 1 and standardise = false
    """

    column: str = ""
    bounds: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    temperature: NonNegative = 0.0
    standardise: bool = True
    seed: int = 0

    def select(
        self, scores: Table, sizes: np.ndarray, budget: Budget, *, barred: Mapping[str, np.ndarray]
    ) -> Selection:
        column = self.column or scores.columns[0]
        values = scores.column(column)
        if not np.isfinite(values).all():
            bad = scores.ids[~np.isfinite(values)][0].decode()
            raise InputError(
                f"scores have NaN or infinity, first at id {bad!r}", fix="mend the scorer: a rank needs numbers"
            )
        reason = refused(scores, barred, self.bounds)
        free = np.flatnonzero(reason == "")
        chosen = self._fill(scores.ids, self._keys(scores.ids, values), sizes, budget, free)
        reason[np.setdiff1d(free, chosen)] = "below the cut"
        dropped = by_reason(scores.ids, reason)
        used = int(sizes[chosen].sum())
        meta: dict[str, Any] = {"column": column, "budget": budget.amount, "unit": budget.unit, "terms": used}
        return Selection(scores.ids[chosen], np.ones(len(chosen)), dropped, meta=meta)

    def _keys(self, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        if not self.temperature or not len(values):
            return values
        z = values
        if self.standardise:
            spread = values.std()
            z = (values - values.mean()) / (spread if spread > 0 else 1.0)
        return z / self.temperature - np.log(-np.log(uniform(ids, "gumbel", self.seed)))

    def _fill(
        self, ids: np.ndarray, keys: np.ndarray, sizes: np.ndarray, budget: Budget, free: np.ndarray
    ) -> np.ndarray:
        """Positions taken, best first."""
        order = free[np.lexsort((ids[free], hash_ids(ids[free], "tie"), -keys[free]))]
        if budget.unit == "examples":
            return order[: budget.amount]
        taken, left = [], budget.amount
        smallest = np.minimum.accumulate(sizes[order][::-1])[::-1] if len(order) else sizes
        for place, position in enumerate(order.tolist()):
            if left < smallest[place]:
                break
            if sizes[position] <= left:
                taken.append(position)
                left -= int(sizes[position])
        return np.array(taken, dtype=np.int64)
