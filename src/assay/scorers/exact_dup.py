"""Copies of an earlier example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import xxhash

from assay.core.errors import InputError
from assay.core.method import Batch, Bounds, Context, Scorer
from assay.engine import local
from assay.numerics.shingles import written

SPACE = ord(" ")
# Lower case and one kind of white space, for the bytes of ASCII; others stay.
_PLAIN = bytes(SPACE if chr(b).isspace() and b < 128 else ord(chr(b).lower()) if b < 128 else b for b in range(256))
# Documents that are hashed together (their bytes stay in the cache), that are read together, and those of one item of
# work; fewer than so many are not worth more processes.
FEW, ROWS, BLOCK, MANY = 256, 2048, 1 << 16, 1 << 19


def normal(text: str) -> str:
    """Lower case, white space collapsed.

    >>> normal(" Two  Words\\n")
    'two words'
    """
    return " ".join(text.lower().split())


def keys(values: Sequence[Any]) -> np.ndarray:
    """xxh3-128 of `normal` of each text, or of bytes as they are: `[n, 2]` uint64; zeros for what is empty or missing.

    ASCII, by far the commonest, is made normal for all texts at once; the others one by one.
    """
    binary = np.array([isinstance(v, bytes) for v in values], dtype=bool)
    if binary.any() and not binary.all():
        # A value's key is its own, whatever stands beside it.
        made = np.zeros((len(values), 2), dtype=np.uint64)
        for some in (binary, ~binary):
            made[some] = keys([values[i] for i in np.flatnonzero(some).tolist()])
        return made
    if binary.any():
        raw, ends = b"".join(values), np.cumsum([0, *map(len, values)])
        starts, stops = ends[:-1], ends[1:]
    else:
        raw, starts, stops = _normal([written(v) for v in values])
    digest = xxhash.xxh3_128_digest
    found = b"".join([digest(raw[a:b]) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])
    return np.where((starts == stops)[:, None], np.uint64(0), np.frombuffer(found, dtype=np.uint64).reshape(-1, 2))


def _normal(texts: list[str]) -> tuple[bytes, np.ndarray, np.ndarray]:
    """All texts in normal form, one after the other, and where each begins and ends."""
    plain = [t.encode() if t.isascii() else normal(t).encode("utf-8", "surrogatepass") for t in texts]
    joined = np.frombuffer(b"".join(plain).translate(_PLAIN), dtype=np.uint8)
    ends = np.cumsum([0, *map(len, plain)])
    space = joined == SPACE
    kept = ~space
    kept[1:] |= ~space[:-1]  # of white space, what follows something else
    # What begins a text follows the text before it: there white space goes, whatever that one ended with.
    begins = ends[:-1][ends[:-1] < ends[1:]]
    kept[begins] = ~space[begins]
    out = joined[kept]
    ends -= np.searchsorted(np.flatnonzero(~kept), ends)
    starts, stops = ends[:-1], ends[1:].copy()
    some = starts < stops
    stops[some] -= out[stops[some] - 1] == SPACE
    return out.tobytes(), starts, stops


class ExactDup(Scorer):
    """How many copies of this example stand before it: the first is 0 and stays, later ones are negative.

    Formula: s_i = -#{j : key_j = key_i, j before i}, key = xxh3-128 of the text in lower case, white space collapsed
    Reference: Lee et al. 2022, arXiv:2107.06499
    Note: the order is that of ids, so files may be read in any order; or first by a column of numbers, `priority`,
        whose highest value stays. Texts that are empty once normalised are no copies. Two texts of n have one key by
        chance with probability n^2 / 2^129. The column `cluster` numbers the groups of copies, -1 without any: as a
        filter, the first copy that earlier filters left stays
    """

    column: str = "text"
    priority: str = ""

    unit: ClassVar[str] = "minus copies before"
    lookup: ClassVar[bool] = True
    group: ClassVar[str] = "cluster"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"first": {"score": (0.0, None)}}

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("score", "cluster")

    def init(self, context: Context) -> Any:
        pool = context.pool
        workers = context.workers if len(pool) >= MANY else 1
        starts, found = range(0, len(pool), BLOCK), np.empty((len(pool), 2), dtype=np.uint64)
        for start, block in zip(starts, local.map(_block, (self, pool), starts, workers=workers), strict=True):
            found[start : start + BLOCK] = block
        rows = candidates(found)
        ids, keyed = pool.ids[rows], found[rows]
        order = np.lexsort((ids, -self._priorities(pool, rows), keyed[:, 0], keyed[:, 1]))
        ids, keyed = ids[order], keyed[order]
        fresh = np.ones(len(rows), dtype=bool)
        fresh[1:] = (keyed[1:] != keyed[:-1]).any(axis=1)
        at = np.arange(len(rows))
        before = at - np.maximum.accumulate(np.where(fresh, at, 0))
        alone = fresh.copy()
        alone[:-1] &= fresh[1:]
        ids, before, fresh = ids[~alone], before[~alone], fresh[~alone]
        by_id = np.argsort(ids, kind="stable")
        # Groups are numbered in the order of their keys, which no order of files can change.
        numbers = np.stack([-before.astype(np.float64), np.cumsum(fresh) - 1.0], axis=1) + 0.0  # no negative zero
        return ids[by_id], numbers[by_id]

    def _priorities(self, pool: Any, rows: np.ndarray) -> np.ndarray:
        if not self.priority:
            return np.zeros(len(rows))
        try:
            values = np.array(pool.at(rows).column(self.priority), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.name}: column {self.priority!r} does not hold numbers", why=str(error),
                fix="name a column of numbers as priority, or none",
            ) from error  # fmt: skip
        return np.where(np.isnan(values), -np.inf, values)

    def score(self, state: Any, batch: Batch) -> Any:
        ids, numbers = state
        found = np.tile(np.array([0.0, -1.0]), (len(batch.ids), 1))
        if len(ids):
            where = np.minimum(np.searchsorted(ids, batch.ids), len(ids) - 1)
            here = ids[where] == batch.ids
            found[here] = numbers[where[here]]
        return found


def _block(job: tuple[ExactDup, Any], start: int) -> np.ndarray:
    """Keys of the documents from `start` on, `[b, 2]`."""
    method, pool = job
    part = pool.at(slice(start, start + BLOCK))
    found: list[np.ndarray] = []
    shards = part.shards(ROWS)

    def read() -> list[Any]:
        shard = next(shards, None)
        return [] if shard is None else shard.column(method.column)

    # The next documents are read and unpacked while these are hashed: much of both leaves Python's lock alone.
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(read)
        while values := waiting.result():
            waiting = thread.submit(read)
            found += [keys(values[at : at + FEW]) for at in range(0, len(values), FEW)]
    return np.concatenate(found)


def candidates(found: np.ndarray) -> np.ndarray:
    """Rows, ascending, of `[n, 2]` keys whose first half another row has as well; the key of zeros is none.

    Where one half is alone, so is the whole: only what is left is sorted by both.
    """
    order = np.argsort(found[:, 0], kind="stable")
    half = found[order, 0]
    same = half[1:] == half[:-1]
    shared = np.zeros(len(found), dtype=bool)
    shared[1:] = same
    shared[:-1] |= same
    rows = np.sort(order[shared])
    return rows[found[rows].any(axis=1)]
