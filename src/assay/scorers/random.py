"""The null that everything is held against."""

from __future__ import annotations

from typing import Any, ClassVar

from assay.core.keys import uniform
from assay.core.method import Batch, Cost, Scorer


class Random(Scorer):
    """A fair draw, keyed by id.

    Formula: s_i = uniform(0, 1) from xxh3_64(seed, id_i)
    Reference: the baseline of any selection experiment
    """

    seed: int = 0

    cost: ClassVar[Cost] = "none"
    unit: ClassVar[str] = "none"

    def score(self, state: Any, batch: Batch) -> Any:
        return uniform(batch.ids, "random", self.seed)
