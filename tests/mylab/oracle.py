"""A scorer whose scores are planted, for tests of what holds scores against a truth."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from assay.core.keys import uniform
from assay.core.method import Batch, Context, Cost, Scorer, Targets, target_columns


def planted(ids: np.ndarray, targets: tuple[str, ...], *salt: Any) -> np.ndarray:
    """Numbers in -1/2..1/2 for each example and target, `[n, q]`, keyed by both ids."""
    return np.stack([uniform(ids, "oracle", name, *salt) - 0.5 for name in targets], axis=1)


class Oracle(Scorer):
    """`sense` times the planted numbers of `salt`, and noise: with salt 0 they are the truth of `planted` itself.

    Formula: s_iq = sense planted_iq + noise other_iq
    Reference: none
    """

    targets: Targets = "each"
    salt: int = 0
    sense: float = 1.0
    noise: float = 0.0

    cost: ClassVar[Cost] = "none"
    unit: ClassVar[str] = "planted"

    def init(self, context: Context) -> Any:
        return target_columns(context, self.targets)

    def columns(self, state: Any) -> tuple[str, ...]:
        return state

    def score(self, state: Any, batch: Batch) -> Any:
        return self.sense * planted(batch.ids, state, self.salt) + self.noise * planted(batch.ids, state, "noise")
