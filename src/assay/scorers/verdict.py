"""What another program said of each document."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import decode_ids, digest
from assay.core.method import Batch, Bounds, Context, FilePath, Scorer
from assay.core.pool import Pool
from assay.data import verdicts
from assay.data.verdicts import Ask, Form, Hash, Verdicts

# What a listed id means, where the form says it.
LISTED = {"datatrove": "keep", "datacomp": "keep", "curator": "drop"}


class Verdict(Scorer):
    """Others' keep-lists, removal lists and attributes, joined by id or by the hash of the text.

    Formula: a list: s_i = 1 where i is kept, else 0; a column: s_i = its value v_i (1 - v_i where it means drop);
        dolma's spans [start, end, score]: v_i = sum (end - start) score / length of the text
    Reference: Penedo et al. 2024, arXiv:2406.17557 (datatrove); Soldaini et al. 2024, arXiv:2402.00159 (dolma);
        Gadre et al. 2023, arXiv:2304.14108 (DataComp); NVIDIA NeMo Curator
    Note: as a filter it keeps scores of 0.5 and more; further columns of spans: `covered` (share of characters in spans
        with a score above zero), `highest` (score of a span) and `spans`; ids that are in the file and not in the pool
        are counted in the report's checks; with by = "hash" exact copies share one verdict
    """

    path: FilePath = ""
    format: Form = "auto"
    means: Literal["auto", "keep", "drop"] = "auto"
    column: str = ""
    by: Literal["id", "hash"] = "id"
    key: str = ""
    hash: Hash = "md5"
    missing: float | None = None

    unit: ClassVar[str] = "verdict"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"keep": {"score": (0.5, None)}}

    @cached_property
    def _contents(self) -> str:
        return verdicts.fingerprint(self.path) if self.path else ""

    def code(self) -> str:
        """The files are part of the method: other contents make stored scores stale."""
        return digest(super().code(), self._contents)

    def columns(self, state: Any) -> tuple[str, ...]:
        return verdicts.SPANS if state[1] else ("score",)

    def init(self, context: Context) -> Any:
        """Where the pool's ids, sorted, and their numbers lie; and whether those are of spans."""
        if not self.path:
            raise InputError("verdict has no file", fix="set path: a file, a folder or a glob")
        asked = verdicts.settle(self.path, Ask(self.format, self.column, self.key, self.by == "hash"))
        values = self._joined(context, asked)
        order = np.argsort(context.pool.ids, kind="stable")
        np.save(context.folder / "verdict-ids.npy", context.pool.ids[order], allow_pickle=False)
        np.save(context.folder / "verdict-values.npy", values[order], allow_pickle=False)
        flip = self.means == "drop" and bool(asked.column)
        return str(context.folder), asked.form == "dolma" and bool(asked.column), flip

    def score(self, state: Any, batch: Batch) -> Any:
        folder, spans, flip = state
        ids = np.load(f"{folder}/verdict-ids.npy", mmap_mode="r", allow_pickle=False)
        values = np.load(f"{folder}/verdict-values.npy", mmap_mode="r", allow_pickle=False)
        where = np.minimum(np.searchsorted(ids, batch.ids), len(ids) - 1)
        if (ids[where] != batch.ids).any():
            first = batch.ids[ids[where] != batch.ids][0].decode()
            raise InputError(f"no verdict on id {first!r}", where=self.path, why="it is of another pool")
        found = np.array(values[where])
        if spans:
            lengths = np.array([len(text) for text in batch.column("text")], dtype=np.float64)
            found = _shares(found, lengths)
        if flip:
            found[:, 0] = 1 - found[:, 0]
        return found

    def _joined(self, context: Context, asked: Ask) -> np.ndarray:
        """One row of numbers for each of the pool, `[n, c]`."""
        pool, listing = context.pool, not asked.column
        means = LISTED.get(asked.form, "") if self.means == "auto" else self.means
        if listing and not means:
            raise InputError(
                "a list of ids does not say what it means", where=self.path,
                why="it may name what to keep, or what to remove", fix="set means = 'keep' or means = 'drop'",
            )  # fmt: skip
        values = np.full((len(pool), len(verdicts.SPANS) if asked.form == "dolma" else 1), np.nan)
        seen, known = np.zeros(len(pool), dtype=bool), _Known(self._keys(pool, asked))
        count = strangers = 0
        for part in verdicts.read(self.path, asked):
            rows, which = known.rows(self._theirs(part, asked))
            count, strangers = count + len(part.keys), strangers + len(part.keys) - len(np.unique(which))
            given = np.ones((len(rows), 1)) if part.values is None else part.values[which]
            # A row with nothing in that column says nothing, wherever it stands.
            says = ~np.isnan(given[:, 0])
            rows, given = rows[says], given[says]
            _same(pool, seen, values, rows, given, part.where)
            values[rows], seen[rows] = given, True
        self._told(context, count, strangers, int(seen.sum()))
        if listing:
            return np.where(seen, float(means == "keep"), float(means == "drop"))[:, None]
        return self._filled(pool, values, seen)

    def _keys(self, pool: Pool, asked: Ask) -> np.ndarray:
        """What the pool's rows are joined by."""
        if self.by == "id":
            return pool.ids
        kind: Hash = "xxh3_128" if asked.key == "text" else self.hash
        shards = (verdicts.hashed(shard.column("text"), kind) for shard in pool.shards(4096))
        return np.array([key for keys in shards for key in keys])

    def _theirs(self, part: Verdicts, asked: Ask) -> list[bytes]:
        if self.by == "hash" and asked.key == "text":
            return verdicts.hashed([key.decode("utf-8", "surrogatepass") for key in part.keys], "xxh3_128")
        return part.keys if self.by == "id" else [key.lower() for key in part.keys]

    def _told(self, context: Context, count: int, strangers: int, joined: int) -> None:
        if count and not joined:
            other = (
                "set by = 'hash'" if self.by == "id" else f"its hashes may not be {self.hash}: set hash, or by = 'id'"
            )
            raise InputError(
                f"none of {count} keys is in the pool", where=self.path,
                why=f"rows are joined by {self.by}, and no two agree", fix=f"name the column of ids (key), or {other}",
            )  # fmt: skip
        if not count:
            context.warn(f"verdict: {self.path} lists nothing")
        of_pool, of_file = f"{joined:,} of {len(context.pool):,} rows", f"{strangers:,} of its {count:,} keys"
        detail = f"{of_pool} are in {self.path}; {of_file} are not in the pool"
        context.note("joined", detail, joined=joined, strangers=strangers, keys=count)

    def _filled(self, pool: Pool, values: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """With the number for rows that the file does not hold, or an error that names them."""
        absent = np.flatnonzero(~seen)
        if len(absent) and self.missing is None:
            first = decode_ids(pool.ids[absent[:1]])[0]
            raise InputError(
                f"{len(absent)} of {len(pool)} rows have no verdict, the first is id {first!r}",
                where=self.path, why="it does not hold them, or nothing in that column",
                fix="set missing to the score that they get, such as missing = 1",
            )  # fmt: skip
        if len(absent):
            values[absent] = 0.0
            values[absent, 0] = self.missing if self.means != "drop" else 1 - float(self.missing or 0)
            if values.shape[1] > 1:
                values[absent, 1] = np.inf  # a bare number: of the whole text
        return values


class _Known:
    """Rows by key; a key may have several."""

    def __init__(self, keys: np.ndarray) -> None:
        self.order = np.argsort(keys, kind="stable")
        self.sorted = keys[self.order]

    def rows(self, wanted: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Rows that have one of these keys, and the place of that key in `wanted`."""
        width = self.sorted.dtype.itemsize
        places = np.array([k for k, key in enumerate(wanted) if len(key) <= width], dtype=np.int64)
        if not len(places) or not len(self.sorted):
            return places[:0], places[:0]
        asked = np.array([wanted[k] for k in places.tolist()], dtype=self.sorted.dtype)
        low, high = (np.searchsorted(self.sorted, asked, side=side) for side in ("left", "right"))
        counts = high - low
        start = np.repeat(low - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        return self.order[start + np.arange(counts.sum())], np.repeat(places, counts)


def _same(pool: Pool, seen: np.ndarray, values: np.ndarray, rows: np.ndarray, given: np.ndarray, where: str) -> None:
    """Raise an `InputError` where a row was given two verdicts that differ, earlier or here."""
    order = np.argsort(rows, kind="stable")
    twice = order[1:][rows[order][1:] == rows[order][:-1]]
    before = order[:-1][rows[order][1:] == rows[order][:-1]]
    bad = rows[twice[_differ(given[twice], given[before])]].tolist()
    bad += rows[seen[rows] & _differ(values[rows], given)].tolist()
    if bad:
        first = decode_ids(pool.ids[bad[:1]])[0]
        raise InputError(
            f"two verdicts on id {first!r}", where=where, why="its key stands there more than once",
            fix="keep one row for each key",
        )  # fmt: skip


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a != b).any(axis=1)


def _shares(found: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums over spans as shares of the text's characters; a bare number (infinite cover) is of the whole."""
    whole, size = np.isinf(found[:, 1]), np.maximum(lengths, 1.0)
    made = found.copy()
    made[:, 0] = np.where(whole, found[:, 0], found[:, 0] / size)
    made[:, 1] = np.where(whole, found[:, 0] > 0, np.minimum(np.where(whole, 0.0, found[:, 1]) / size, 1.0))
    return made
