"""Copies of an earlier example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import xxhash

from assay.core.keys import encode_ids
from assay.core.method import Batch, Bounds, Context, Scorer


def normal(text: str) -> str:
    """Lower case, white space collapsed.

    >>> normal(" Two  Words\\n")
    'two words'
    """
    return " ".join(text.lower().split())


class ExactDup(Scorer):
    """How many copies of this example stand before it, by id: the first is 0 and stays, later ones are negative.

    Formula: s_i = -#{j : key_j = key_i, id_j < id_i}, key = xxh3-128 of the text in lower case, white space collapsed
    Reference: Lee et al. 2022, arXiv:2107.06499
    Note: the survivor is the lowest id, so files may be read in any order; texts that are empty once normalised are
        no copies
    """

    column: str = "text"

    unit: ClassVar[str] = "minus copies before"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"first": {"score": (0.0, None)}}

    def _keys(self, values: list[Any]) -> list[bytes]:
        texts = [v if isinstance(v, bytes) else normal(str(v)).encode() for v in values]
        return [xxhash.xxh3_128_digest(t) if t else b"" for t in texts]

    def init(self, context: Context) -> Any:
        keys = [k for shard in context.pool.shards(4096) for k in self._keys(shard.column(self.column))]
        first: dict[bytes, int] = {}
        copies: list[tuple[bytes, int]] = []
        ids = context.pool.ids
        for position in np.argsort(ids, kind="stable").tolist():
            key = keys[position]
            if key:
                rank = first.get(key, 0)
                first[key] = rank + 1
                if rank:
                    copies.append((bytes(ids[position]), rank))
        return encode_ids([i for i, _ in copies]), np.array([r for _, r in copies], dtype=np.float64)

    def score(self, state: Any, batch: Batch) -> Any:
        ids, ranks = state
        if not len(ids):
            return np.zeros(len(batch.ids))
        # The copies were found in id order, so their ids are sorted.
        where = np.minimum(np.searchsorted(ids, batch.ids), len(ids) - 1)
        return np.where(ids[where] == batch.ids, -ranks[where], 0.0)
