"""How many trainings a verification takes, and how long they will be, measured on a few steps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from assay.core.task import Encoded, Inputs
from assay.specs import LdsSpec
from assay.trust.checks import DRAWS

if TYPE_CHECKING:
    from assay.core.task import Task
    from assay.train.recipe import Recipe

# Models that are trained at once for the measurement, steps of it, and examples that are read after it.
MODELS, STEPS, READ = 16, 4, 8


def trainings(spec: LdsSpec, methods: int, checks: list[str]) -> dict[str, int]:
    """Trainings of the bank and of each check that retrains, for so many methods that removal looks at."""
    removal = 1 + spec.probes * len(spec.removed) * (methods + DRAWS)
    each = {"removal": removal, "leave_one_out": spec.left_out}
    return {"bank": spec.subsets * spec.seeds} | {c: each[c] * spec.seeds for c in checks if c in each}


def pace(task: Task, encoded: Encoded, ids: np.ndarray, recipe: Recipe, spec: LdsSpec) -> float:
    """Seconds of one step of one training in the bank, in one process: it trains many at once where it can."""
    from assay.train import bank

    masks = bank.subsets(ids, min(spec.subsets, MODELS), spec.share, 0)
    spent = []
    for steps in (1, 1 + STEPS):  # what does not grow with the steps falls out of the difference
        start = time.perf_counter()
        few = recipe.model_copy(update={"steps": steps})
        bank.retrain(task, encoded, ids, masks, few, seeds=[0], targets={"target": _First(encoded)})
        spent.append(time.perf_counter() - start)
    return max(spent[1] - spent[0], 0.05 * spent[1]) / (STEPS * len(masks))


class _First(Encoded):
    """The first examples of an encoded pool."""

    def __init__(self, whole: Encoded) -> None:
        self._whole, self.sizes = whole, whole.sizes[:READ]

    @property
    def lengths(self) -> np.ndarray:
        return self._whole.lengths[:READ]

    def inputs(self, rows: np.ndarray) -> Inputs:
        return self._whole.inputs(rows)
