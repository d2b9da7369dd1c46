"""DsDm: what a datamodel says of the target as a whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Scorer


@dataclass(frozen=True)
class _State:
    estimates: Scorer
    weights: np.ndarray
    """Of each column of the estimates."""
    passes: float = 0.0


class DsDm(Scorer):
    """Mean over the target's examples of a datamodel's coefficients: the pool's best set is the top of these.

    Formula: s_i = mean over q of tau_qi, tau the coefficients that `estimates` finds; per 'group': the mean over the
        groups of the means within them
    Reference: Engstrom et al. 2024, arXiv:2401.12926
    Note: with the default estimates and per 'example' this is trak, by definition: take it for a target of several
        tasks that count alike whatever their sizes, or with other estimates of coefficients. `group` is a column of
        the target
    """

    estimates: Scorer = "trak"  # type: ignore[assignment]
    per: Literal["example", "group"] = "example"
    group: str = "group"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "as the estimates"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        if self.per == "example":
            columns = context.table(self.estimates).columns
            count = len(columns) if getattr(self.estimates, "targets", "mean") == "each" else 1
            return _State(self.estimates, np.full(count, 1 / count))
        if self.group not in context.target.columns or not hasattr(self.estimates, "targets"):
            raise InputError(
                "dsdm: per = 'group' needs groups, and estimates for each target example",
                why=f"the target has the columns {', '.join(context.target.columns)}; estimates are "
                f"{self.estimates.spec()}",
                fix="name the column in `group`, and take estimates with the option `targets`, or per = 'example'",
            )
        each: Any = dataclasses.replace(self.estimates, **{"targets": "each"})
        context.table(each)
        groups = np.array([str(g) for g in context.target.column(self.group)])
        _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
        return _State(each, 1 / counts[index] / len(counts))

    def score(self, state: _State, batch: Batch) -> Any:
        values = batch.table(state.estimates)
        return values[:, : len(state.weights)] @ state.weights
