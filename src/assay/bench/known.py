"""The oracle of a track: what is known of its pool, as scores."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import shuffled, uniform
from assay.core.method import Batch, Context, Cost, Scorer
from assay.core.pool import positions

SOUND = "sound"
"""The pool's column that says which rows are what their domain says, and no damaged copies."""


class Known(Scorer):
    """Sound examples of the target's own domains, as many tokens of each: an oracle to measure methods against.

    Formula: s_i = -sum of n_j over the sound examples j of i's own domain that come before i in a keyed order, for i
        sound and of one of `domains`; below all of these, the others in a keyed order
    Reference: none
    Note: reads the truth of a track's pool, so it is no method; a pool without that truth is refused
    """

    domains: tuple[str, ...] = ()
    seed: int = 0

    cost: ClassVar[Cost] = "none"
    unit: ClassVar[str] = "minus tokens"

    def init(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        pool = context.pool
        if SOUND not in pool.columns:
            raise InputError(
                "the oracle has nothing to read", where=self.name,
                why=f"the pool has no column {SOUND!r}: its truth is not known",
                fix="leave it out: it is the row of a track's pool, and no method",
            )  # fmt: skip
        sound = np.array(pool.column(SOUND), dtype=bool)
        domains, sizes = pool.domains(), context.encoded(pool).sizes
        missing = sorted(set(self.domains) - set(domains[sound].tolist()))
        if missing or not self.domains:
            raise InputError(f"the pool has no sound rows of {missing or 'no domains'}", where=f"{self.name}: domains")
        scores = -float(sizes.sum()) - 1.0 - uniform(pool.ids, "known", self.seed)
        order = shuffled(pool.ids, "known", self.seed)
        for domain in self.domains:
            own = order[(sound & (domains == domain))[order]]
            scores[own] = -(np.cumsum(sizes[own]) - sizes[own])
        rank = np.argsort(pool.ids, kind="stable")
        return pool.ids[rank], scores[rank]

    def score(self, state: Any, batch: Batch) -> Any:
        ids, scores = state
        return scores[positions(ids, batch.ids)]
