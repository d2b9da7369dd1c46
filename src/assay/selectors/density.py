"""Density-based pruning: clusters share the budget by their complexity, and give their hardest examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import hash_ids
from assay.core.method import NonNegative, Positive, Selector
from assay.core.selection import Budget, Selection, by_reason, refused
from assay.core.table import Table


class Density(Selector):
    """A budget shared out among clusters by how wide and how lonely they are, and filled with the farthest of each.

    Formula: C_c = mean distance of members to their centroid x mean distance of the centroid to its nearest others;
        P = softmax(C / temperature); x = argmin |x - N P|^2 with sum x = N, l_c <= x_c <= n_c, that is x_c =
        clip(N P_c + nu, l_c, n_c), l_c = min(floor(balance N / K), n_c - 1); whole numbers by the largest remainder
    Reference: Abbas et al. 2024, arXiv:2401.04578 (density-based pruning, SSP pruning)
    Note: for scores with the columns `cluster`, `distance` and `spacing`: those of `prototypes`, or of `semdedup`,
        where bounds = {score = [0.05, null]} dedup first, as the method wants; complexities and counts are of what
        the bounds leave. The highest of `column` come first in each cluster, ties by a hash of the id. temperature =
        0.5 is near to equal shares, for C is mostly under 0.5; what full clusters leave over goes to all others in
        equal parts. A cluster that is split in two gets two shares. With a budget in tokens, shares are tokens, and
        what does not fit in a share is filled from all clusters
    """

    temperature: Positive = 0.5
    balance: NonNegative = 0.5
    column: str = "distance"
    bounds: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def select(
        self, scores: Table, sizes: np.ndarray, budget: Budget, *, barred: Mapping[str, np.ndarray]
    ) -> Selection:
        for name in ("cluster", "distance", "spacing", self.column):
            if name not in scores.columns:
                raise InputError(
                    f"density needs a column {name!r}", why=f"the scores have {', '.join(scores.columns)}",
                    fix="use it with the scorer prototypes or semdedup",
                )  # fmt: skip
            if not np.isfinite(scores.column(name)).all():
                raise InputError(f"column {name!r} has NaN or infinity", fix="mend the scorer")
        reason = refused(scores, barred, self.bounds)
        free = np.flatnonzero(reason == "")
        # Best first, whatever the cluster.
        values = scores.column(self.column)[free]
        free = free[np.lexsort((scores.ids[free], hash_ids(scores.ids[free], "tie"), -values))]
        costs = np.ones(len(scores), dtype=np.int64) if budget.unit == "examples" else sizes
        chosen, shares = self._filled(scores, costs, budget.amount, free)
        reason[np.setdiff1d(free, chosen)] = "outside its cluster's share"
        dropped = by_reason(scores.ids, reason)
        meta: dict[str, Any] = {
            "column": self.column, "budget": budget.amount, "unit": budget.unit, "terms": int(sizes[chosen].sum()),
            "clusters": len(shares), "shares": [int(min(shares, default=0)), int(max(shares, default=0))],
        }  # fmt: skip
        return Selection(scores.ids[chosen], np.ones(len(chosen)), dropped, meta=meta)

    def _filled(self, scores: Table, costs: np.ndarray, amount: int, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions taken, best first, and the share of each cluster."""
        from assay.numerics.allocate import box_simplex, whole

        if not len(free):
            return free, free
        names, labels = np.unique(scores.column("cluster")[free], return_inverse=True)
        count = np.bincount(labels)
        held = np.bincount(labels, weights=costs[free]).astype(np.int64)
        intra, inter = (np.bincount(labels, weights=scores.column(c)[free]) / count for c in ("distance", "spacing"))
        total = min(amount, int(held.sum()))
        wanted = total * softmax(intra * inter / self.temperature)
        low = np.minimum(np.floor(self.balance * total / len(names)), held - 1)
        shares = whole(box_simplex(wanted, low, held, total), total)
        taken, left = np.zeros(len(free), dtype=bool), shares.copy()
        for place, (label, cost) in enumerate(zip(labels.tolist(), costs[free].tolist(), strict=True)):
            if cost <= left[label]:
                taken[place], left[label] = True, left[label] - cost
        rest = total - int(costs[free][taken].sum())
        for place in np.flatnonzero(~taken).tolist() if rest else []:
            if costs[free[place]] <= rest:
                taken[place], rest = True, rest - int(costs[free[place]])
        return free[taken], shares


def softmax(z: np.ndarray) -> np.ndarray:
    """exp(z) over its sum, safe from overflow.

    >>> softmax(np.array([1000.0, 1000.0])).tolist()
    [0.5, 0.5]
    """
    e = np.exp(z - z.max())
    return e / e.sum()
