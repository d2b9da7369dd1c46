"""Vectors that stand in the pool."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Featurizer


class Column(Featurizer):
    """A column of vectors, as it stands: the inputs themselves, or embeddings that were made elsewhere.

    Formula: x_i = the numbers of row i
    Reference: none
    Note: every row must have as many numbers
    """

    column: str = "pixels"

    cost: ClassVar[Cost] = "text"

    def init(self, context: Context) -> int:
        known = context.pool.columns or context.target.columns
        if self.column not in known:
            raise InputError(
                f"column: there is no column {self.column!r}", why=f"the pool has {', '.join(known)}",
                fix="name a column of vectors that the pool and the target have",
            )  # fmt: skip
        return self._vectors(context.sample(1).column(self.column), None).shape[1]

    def columns(self, state: int) -> tuple[str, ...]:
        return tuple(f"{self.column}:{i}" for i in range(state))

    def featurize(self, state: int, batch: Batch) -> Any:
        return self._vectors(batch.column(self.column), state)

    def _vectors(self, values: list[Any], width: int | None) -> np.ndarray:
        try:
            found = np.array(values, dtype=np.float32).reshape(len(values), -1)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"column: {self.column!r} does not hold vectors", why=str(error).splitlines()[0],
                fix="give lists of as many numbers in each row",
            ) from error  # fmt: skip
        if width not in (None, found.shape[1]) or not np.isfinite(found).all():
            raise InputError(
                f"column: a row of {self.column!r} has {found.shape[1]} numbers, another {width or found.shape[1]}",
                why="all rows must be as long, and finite",
                fix="give lists of as many finite numbers in each row",
            )
        return found
