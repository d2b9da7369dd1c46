"""`Target`: a small named pool and how it is measured, split into a half that selects and a half that judges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import encode_ids, hash_ids
from assay.core.pool import Pool


@dataclass(frozen=True, eq=False)
class Target:
    """What the user cares about. Scores may only ever see `selecting`; verdicts are read on `judging`.

    Rows that share a value of the `group` column (a source document, a subtask) stay in one half, so that the judging
    half is not half-seen.
    """

    name: str
    selecting: Pool
    judging: Pool

    @classmethod
    def split(cls, pool: Pool, *, name: str = "target", seed: int = 0, group: str = "group") -> Target:
        """Halves of about equal size, groups (or contents) taken in the order of their keyed hashes.

        `group` names the column of groups, if the pool has it; a row without one stands for itself.

        Raises `InputError` for fewer than two rows or groups.
        """
        if len(pool) == 0:
            raise InputError(
                "the target is empty", why="utility is measured against its loss", fix="give at least 2 examples"
            )
        keys = pool.contents
        if group in pool.columns:
            given = zip(pool.column(group), pool.contents.tolist(), strict=True)
            keys = encode_ids(content if value is None else str(value) for value, content in given)
        groups, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        if len(groups) < 2:
            raise InputError(
                "the target cannot be split",
                why=f"it has {len(pool)} rows in {len(groups)} group; one half selects and the other judges",
                fix="give at least 2 distinct examples",
            )
        halves, filled = np.zeros(len(groups), dtype=np.int64), [0, 0]
        for g in np.lexsort((groups, hash_ids(groups, "target", seed))):
            halves[g] = int(filled[1] < filled[0])
            filled[halves[g]] += int(counts[g])
        side = halves[inverse]
        return cls(name, pool.at(np.flatnonzero(side == 0)), pool.at(np.flatnonzero(side == 1)))
