"""`Pool`: ordered, immutable, lazy examples with stable ids and named columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from assay.core.errors import InputError, nearest
from assay.core.keys import decode_ids, digest, digest_ids, encode_ids, write_json

# Columns whose bytes make the content id, in this order, when they are present.
CONTENT = ("text", "image", "pixels", "label")
# Columns that say where an example comes from, not what it is.
ABOUT = ("id", "domain", "group", "source", "source_row")
FORMAT = 1


def content_id(fields: Sequence[Any]) -> str:
    """xxh3-128 of an example's mapped fields. Equal content gives an equal id, whatever the file or the row."""
    hasher = xxhash.xxh3_128()
    for field in fields:
        data = field if isinstance(field, bytes) else str(field).encode("utf-8", "surrogatepass")
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def row_ids(contents: Sequence[str]) -> list[str]:
    """Distinct ids for rows whose content ids may repeat: the first keeps it, later ones get `-1`, `-2`, ...

    >>> row_ids(["a", "b", "a"])
    ['a', 'b', 'a-1']
    """
    seen: dict[str, int] = {}
    ids = []
    for content in contents:
        count = seen.get(content, 0)
        seen[content] = count + 1
        ids.append(f"{content}-{count}" if count else content)
    return ids


def _contents(table: pa.Table) -> list[str]:
    """The content id of each row: of the known content columns, or, where there is no text, image or pixels, of all
    numbers that are not about the row. Raises `InputError` when none is left: rows would then all be one."""
    known = [name for name in CONTENT if name in table.column_names]
    if not {"text", "image", "pixels"} & set(known):
        words = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
        known = [f.name for f in table.schema if f.name not in ABOUT and not any(test(f.type) for test in words)]
    fields = [table[name].to_pylist() for name in known]
    if not fields:
        raise InputError(
            "the table has no content column", why=f"it has: {', '.join(table.column_names) or 'no columns'}",
            fix=f"name one of its columns {', '.join(CONTENT[:-1])} or {CONTENT[-1]}",
        )  # fmt: skip
    return [content_id(values) for values in zip(*fields, strict=True)]


class _MemoryRows:
    """Rows of one Arrow table held in memory."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.names, self.shard_rows = table, tuple(table.column_names), max(1, table.num_rows)

    def shard(self, index: int, column: str) -> pa.ChunkedArray:
        return self.table[column]


class _FileRows:
    """Rows of Parquet shards of equal size; the columns of one shard at a time are in memory."""

    def __init__(self, path: Path, names: tuple[str, ...], shard_rows: int) -> None:
        self.path, self.names, self.shard_rows = path, names, shard_rows
        self._cached: dict[str, tuple[int, pa.ChunkedArray]] = {}

    def shard(self, index: int, column: str) -> pa.ChunkedArray:
        held = self._cached.get(column)
        if held is None or held[0] != index:
            file = self.path / shard_name(index)
            held = index, pq.read_table(file, columns=[column], use_threads=False)[column]
            self._cached[column] = held
        return held[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": {}}


def shard_name(index: int) -> str:
    return f"rows-{index:05d}.parquet"


class Pool:
    """Examples in order, each with an id that never changes under filtering.

    `pool.ids` is a numpy array of bytes, `pool.column("text")` a list of values read when asked for;
    `take` and `at` give views that share the stored rows. Two pools with the same rows in the same order have the
    same `fingerprint`.

    >>> pool = Pool.from_columns({"text": ["one", "two", "one"]})
    >>> len(pool), pool.column("text"), [i[-2:] for i in pool.ids.tolist()][2]
    (3, ['one', 'two', 'one'], b'-1')
    """

    def __init__(self, store: _MemoryRows | _FileRows, ids: np.ndarray, contents: np.ndarray, rows: np.ndarray) -> None:
        assert len(ids) == len(contents) == len(rows)
        self._store, self.ids, self.contents, self._rows = store, ids, contents, rows
        self._span: tuple[int, int] | None = None
        """The stored rows that these are, when they are a run of a pool on disk: ids are then mapped, not held."""

    def __getstate__(self) -> dict[str, Any]:
        if self._span is None:
            return self.__dict__
        return {"_store": self._store, "_span": self._span, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._span is not None:
            self.__dict__.update(Pool.open(self._store.path).at(slice(*self._span)).__dict__)  # type: ignore[union-attr]

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]] | pa.Table) -> Pool:
        """A pool in memory. An `id` column, when given, must hold distinct strings."""
        table: Any = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        contents = _contents(table)
        ids = table["id"].to_pylist() if "id" in table.column_names else row_ids(contents)
        if len(set(ids)) != len(ids):
            raise InputError("the id column repeats ids", why="rows are joined by id", fix="drop the column or mend it")
        return cls(_MemoryRows(table), encode_ids(ids), encode_ids(contents), np.arange(len(ids)))

    @classmethod
    def bare(cls, ids: np.ndarray) -> Pool:
        """Ids without any column: for work on what was computed of the examples."""
        return cls(_MemoryRows(pa.table({})), ids, ids, np.arange(len(ids)))

    @classmethod
    def open(cls, path: Path) -> Pool:
        """A pool written by `PoolWriter`; only ids are read now."""
        info = json.loads((path / "pool.json").read_text())
        assert info["format"] == FORMAT, f"{path} has format {info['format']}, this is {FORMAT}"
        store = _FileRows(path, tuple(info["columns"]), info["shard_rows"])
        mapped: Any = "r" if info["rows"] else None  # an empty file cannot be mapped
        ids, contents = (np.load(path / f"{n}.npy", mmap_mode=mapped, allow_pickle=False) for n in ("ids", "contents"))
        pool = cls(store, ids, contents, np.arange(len(ids)))
        pool._span = 0, len(ids)
        return pool

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Pool({len(self)} rows, columns {', '.join(self.columns)})"

    @property
    def columns(self) -> tuple[str, ...]:
        return self._store.names

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ids and contents in order: what stages are keyed by."""
        return digest(len(self), digest_ids(self.ids), digest_ids(self.contents))

    def column(self, name: str) -> list[Any]:
        """Values of one column in this pool's order. Raises `InputError` for an unknown name."""
        if name not in self.columns:
            raise InputError(f"the pool has no column {name!r}", fix=nearest(name, self.columns))
        shards = self._rows // self._store.shard_rows
        values: list[Any] = [None] * len(self)
        for shard in np.unique(shards):
            where = np.flatnonzero(shards == shard)
            array = self._store.shard(int(shard), name)
            picked = array.take(pa.array(self._rows[where] - shard * self._store.shard_rows))
            for position, value in zip(where, picked.to_pylist(), strict=True):
                values[position] = value
        return values

    def domains(self) -> np.ndarray:
        """The `domain` column as an array of strings; one domain `all` when there is none."""
        if "domain" not in self.columns:
            return np.full(len(self), "all")
        return np.array([str(d) or "(none)" for d in self.column("domain")])

    def at(self, positions: np.ndarray | Sequence[int] | slice) -> Pool:
        """The rows at these positions, in the order given; ids stay."""
        index = positions if isinstance(positions, slice) else np.asarray(positions, dtype=np.int64)
        view = Pool(self._store, self.ids[index], self.contents[index], self._rows[index])
        if self._span is not None and isinstance(index, slice) and index.step in (None, 1) and len(view):
            view._span = int(view._rows[0]), int(view._rows[-1]) + 1
        return view

    def beside(self, other: Pool) -> Pool:
        """These rows, then those of another view of the same stored rows."""
        assert self._store is other._store, "two views of one pool"
        ids, contents, rows = (
            np.concatenate(pair)
            for pair in ((self.ids, other.ids), (self.contents, other.contents), (self._rows, other._rows))
        )
        return Pool(self._store, ids, contents, rows)

    def take(self, ids: Iterable[str | bytes]) -> Pool:
        """The rows with these ids, in the order given. Raises `InputError` for an unknown id."""
        return self.at(positions(self.ids, encode_ids(ids)))

    def shards(self, size: int) -> Iterator[Pool]:
        """Consecutive views of `size` rows (the last may be shorter)."""
        for start in range(0, len(self), size):
            yield self.at(slice(start, start + size))


def positions(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted id stands in `known`: the join of the whole house. Raises `InputError` for an unknown id."""
    if len(wanted) == 0:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(known, kind="stable")
    found = np.searchsorted(known, wanted, sorter=order) if len(known) else np.zeros(len(wanted), dtype=np.int64)
    index = order[np.minimum(found, len(known) - 1)] if len(known) else found
    wrong = np.flatnonzero(known[index] != wanted) if len(known) else np.arange(len(wanted))
    if len(wrong):
        raise InputError(
            f"{len(wrong)} of {len(wanted)} ids are not here, the first is {decode_ids(wanted[wrong[:1]])[0]!r}",
            why="rows are joined by id, never by position",
            fix="check that both come from the same pool",
        )
    return index


def among(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted id stands in the sorted ids `known`, and whether it is there at all; what is not has a place
    that means nothing.

    >>> among(np.array([b"a", b"c"]), np.array([b"c", b"b", b"d"]))[1].tolist()
    [True, False, False]
    """
    if not len(known):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    where = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return where, known[where] == wanted


class _Seen:
    """Which 16-byte keys were met: sorted runs of numpy arrays, of doubling lengths."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def among(self, keys: np.ndarray) -> np.ndarray:
        """Which of these were added before, `[n]` bool."""
        found = np.zeros(len(keys), dtype=bool)
        for run in self.runs:
            found |= among(run, keys)[1]
        return found

    def add(self, keys: np.ndarray) -> None:
        fresh = np.sort(keys)
        while self.runs and len(self.runs[-1]) <= 2 * len(fresh):
            fresh = np.sort(np.concatenate([self.runs.pop(), fresh]), kind="stable")
        self.runs += [fresh] if len(fresh) else []


def _keys(values: Sequence[str]) -> np.ndarray:
    return np.array([xxhash.xxh3_128_digest(v.encode()) for v in values], dtype="S16")


class PoolWriter:
    """Streams Arrow tables into a directory that `Pool.open` reads. Constant memory but for ids (16 B a row for those
    that were met, and their own bytes twice).

    Rows with an id that was used before are returned by `write` as positions, for the caller to quarantine.
    """

    def __init__(self, path: Path, *, shard_rows: int = 2048) -> None:
        self.path, self.shard_rows = path, shard_rows
        self._ids: list[np.ndarray] = []
        self._contents: list[np.ndarray] = []
        self._seen = _Seen()
        self._repeats: dict[str, int] = {}
        self._pending: list[pa.Table] = []
        self._shards = 0
        self._names: tuple[str, ...] = ()
        path.mkdir(parents=True, exist_ok=True)

    def write(self, table: pa.Table) -> list[int]:
        """Append rows; returns the positions in `table` whose user-given id repeats an earlier one (not written)."""
        contents = _contents(table)
        given = table["id"].to_pylist() if "id" in table.column_names else None
        names = contents if given is None else given
        keys = _keys(names)
        before, here = self._seen.among(keys), set[str]()
        kept, repeated, ids = [], [], []
        for row, (name, known) in enumerate(zip(names, before.tolist(), strict=True)):
            again = known or name in here
            here.add(name)
            if again and given is not None:
                repeated.append(row)
                continue
            kept.append(row)
            if again:
                count = self._repeats[name] = self._repeats.get(name, 0) + 1
                name = f"{name}-{count}"
            ids.append(name)
        self._seen.add(np.unique(keys[~before]))
        self._ids.append(encode_ids(ids))
        self._contents.append(encode_ids(contents[row] for row in kept))
        self._names = self._names or tuple(table.column_names)
        self._pending.append(table.take(pa.array(kept, pa.int64())) if repeated else table)
        self._flush(self.shard_rows)
        return repeated

    def _flush(self, at_least: int) -> None:
        rows = sum(t.num_rows for t in self._pending)
        if not rows or rows < at_least:
            return
        table = pa.concat_tables(self._pending)
        while table.num_rows >= at_least and table.num_rows:
            pq.write_table(table.slice(0, self.shard_rows), self.path / shard_name(self._shards), compression="zstd")
            self._shards += 1
            table = table.slice(self.shard_rows)
        self._pending = [table] if table.num_rows else []

    def finish(self, **info: Any) -> Pool:
        """Write what is left and the index; `info` is kept in `pool.json`."""
        self._flush(1)
        rows = _save(self.path / "ids.npy", self._ids)
        _save(self.path / "contents.npy", self._contents)
        about = {"format": FORMAT, "columns": list(self._names), "shard_rows": self.shard_rows, "rows": rows}
        write_json(self.path / "pool.json", {**about, **info})
        return Pool.open(self.path)


def _save(file: Path, blocks: list[np.ndarray]) -> int:
    """Ids, block after block, as one array file; how many there are."""
    blocks = [block for block in blocks if len(block)]
    width, rows = max((block.dtype.itemsize for block in blocks), default=1), sum(map(len, blocks))
    with open(file, "wb") as out:
        header = {"descr": f"|S{width}", "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(out, header)
        for block in blocks:
            out.write(block.astype(f"S{width}").tobytes())
    return rows
