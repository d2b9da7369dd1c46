"""Likeness to the target's examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Featurizer, Scorer, Targets, target_columns
from assay.core.table import unit_rows


@dataclass(frozen=True)
class _State:
    columns: tuple[str, ...]
    rows: list[tuple[Featurizer, np.ndarray]]
    """Features of each model, and the target's unit rows `[q, d]`."""


class Nearest(Scorer):
    """Cosine of an example's features with those of the target example that is most like it.

    Formula: s_i = max or mean over q of <x_q, x_i> / (|x_q| |x_i|); 0 where features are zero
    Reference: nearest neighbours as a null of attribution methods, as in Hanawa et al. 2021, arXiv:2006.04528
    Note: features = {name = "column", column = "pixels"} are the inputs themselves: for vectors what bm25 is for text;
        not a measure of utility; averaged over the scoring models; targets = 'each' gives a column for each target
        example
    """

    features: Featurizer = "embed"  # type: ignore[assignment]
    targets: Targets = "mean"
    reduce: Literal["mean", "max"] = "max"

    unit: ClassVar[str] = "cosine"

    def init(self, context: Context) -> _State:
        if self.targets == "each" and self.reduce != "max":
            raise InputError(
                f"nearest: reduce = {self.reduce!r} has no effect", why="targets = 'each' keeps every target example",
                fix="leave it out",
            )  # fmt: skip
        state = []
        for member in context.members(self.features):
            context.table(member)
            state.append((member, unit_rows(context.target_table(member).values.astype(np.float64))[0]))
        return _State(target_columns(context, self.targets), state)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        total = np.zeros((len(batch.ids), 1))
        for member, asked in state.rows:
            cosines = unit_rows(batch.table(member).astype(np.float64))[0] @ asked.T
            if self.targets == "mean":
                cosines = getattr(cosines, self.reduce)(axis=1, keepdims=True)
            total = total + cosines / len(state.rows)
        return total
