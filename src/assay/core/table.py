"""`Table`: numbers keyed by pool ids, in checked shards on disk. Features and scores are both Tables.

A table of dtype float16 holds each row at unit length, beside its float32 norm: `value = norm * unit`. An entry u of a
unit row is then wrong by at most max(|u| 2^-11, 2^-25), and gradients of any size fit.
"""

from __future__ import annotations

import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from assay.core.errors import InputError, nearest
from assay.core.keys import decode_ids, digest, digest_ids, encode_ids, write_bytes, write_json
from assay.core.pool import positions

FORMAT = 2
# What is counted of each shard and added up in the table's meta.
COUNTS = ("zero_rows", "underflow", "overflow")


def unit_rows(x_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows scaled to length 1 in their own dtype, and their lengths `[n]`, float64; zero rows stay zero.

    Squares are summed in float64: those of small gradients leave the range of float32.
    """
    norms = np.sqrt(np.einsum("nd,nd->n", x_nd, x_nd, dtype=np.float64))
    return x_nd / np.where(norms > 0, norms, 1.0).astype(x_nd.dtype)[:, None], norms


class Table:
    """`[n, c]` numbers with ids for rows and names for columns; rows align by id, and higher means keep.

    In memory (`Table(ids, columns, values)`) or on disk (`Table.open(path)`), where shards are read and their
    checksums verified one at a time.

    >>> t = Table(encode_ids(["a", "b"]), ("score",), np.array([[1.0], [2.0]]))
    >>> t.align(encode_ids(["b", "a"])).column("score")
    array([2., 1.])
    """

    def __init__(self, ids: np.ndarray, columns: Sequence[str], values: np.ndarray, meta: dict[str, Any] | None = None):
        assert values.shape == (len(ids), len(columns)), (values.shape, len(ids), len(columns))
        self.ids, self.columns, self.meta = ids, tuple(columns), dict(meta or {})
        self._values: np.ndarray | None = values
        self._path: Path | None = None
        self._shards: list[dict[str, Any]] = []

    @classmethod
    def open(cls, path: Path) -> Table:
        """A finished Table on disk. Raises `InputError` when a file is missing, or not what its checksum says."""
        try:
            manifest = _unsealed(path / "manifest.json")
            index, columns, meta, shards = (manifest[k] for k in ("ids", "columns", "meta", "shards"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "not a finished table", where=path, why=str(error), fix=_remedy(path / "manifest.json")
            ) from error
        table = cls.__new__(cls)
        table.ids, table.columns, table.meta = _load(path, index), tuple(columns), meta
        table._values, table._path, table._shards = None, path, shards
        return table

    @staticmethod
    def about(path: Path) -> dict[str, Any] | None:
        """The meta of a finished table, none of whose numbers are read; None where there is none, or not as it was."""
        try:
            return _unsealed(path / "manifest.json")["meta"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Table({len(self)} rows, {len(self.columns)} columns)"

    def intact(self) -> bool:
        """Whether every shard is there and is what its checksum says; reads them all."""
        try:
            return sum(len(block) for block in self.shards()) == len(self)
        except InputError:
            return False

    def shards(self) -> Iterator[np.ndarray]:
        """Blocks of rows in order; from disk, each is read and verified when it is reached."""
        if self._path is None or self._values is not None:
            assert self._values is not None
            yield self._values
            return
        for shard in self._shards:
            yield _load(self._path, shard)

    @property
    def values(self) -> np.ndarray:
        """All numbers at once, `[n, c]`; kept after the first call."""
        if self._values is None:
            blocks = list(self.shards())
            self._values = np.concatenate(blocks) if blocks else np.zeros((0, len(self.columns)), dtype=np.float32)
        return self._values

    def column(self, name: str) -> np.ndarray:
        """One column, `[n]`, float64. Raises `InputError` for an unknown name."""
        if name not in self.columns:
            raise InputError(f"the table has no column {name!r}", fix=nearest(name, self.columns))
        return self.values[:, self.columns.index(name)].astype(np.float64)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the table's own order; from disk, only the shards that hold them are read."""
        if self._values is not None:
            return self._values[start:stop]
        assert self._path is not None
        blocks, at = [], 0
        for shard in self._shards:
            if at + shard["rows"] > start and at < stop:
                blocks.append(_load(self._path, shard)[max(0, start - at) : stop - at])
            at += shard["rows"]
        return np.concatenate(blocks) if blocks else np.zeros((0, len(self.columns)), dtype=np.float32)

    def align(self, ids: np.ndarray) -> Table:
        """The rows with these ids, in this order. Raises `InputError` for an id that is not here."""
        return Table(ids, self.columns, self.values[positions(self.ids, ids)], self.meta)

    def to_parquet(self, path: Path) -> None:
        """Columns `id` and one for each column of the table."""
        columns: dict[str, Any] = {"id": decode_ids(self.ids)}
        columns |= {name: self.values[:, i] for i, name in enumerate(self.columns)}
        pq.write_table(pa.table(columns), path)

    @classmethod
    def from_parquet(cls, path: Path, ids: np.ndarray, *, id_column: str = "id") -> Table:
        """Numbers computed elsewhere, joined by id: every id must be there once; numeric columns only."""
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError("unreadable Parquet file", where=path, why=str(error).splitlines()[0]) from error
        if id_column not in table.column_names:
            raise InputError(f"no column {id_column!r}", where=path, fix=nearest(id_column, table.column_names))
        numeric = [f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
        names = [name for name in numeric if name != id_column]
        if not names:
            raise InputError("no numeric column", where=path, why=f"it has: {', '.join(table.column_names)}")
        given = list(map(str, table[id_column].to_pylist()))
        if len(set(given)) != len(given):
            twice = next(i for i, count in Counter(given).items() if count > 1)
            raise InputError(f"id {twice!r} stands in the file twice", where=path, fix="keep one row for each id")
        values = np.stack([table[n].to_numpy().astype(np.float64) for n in names], axis=1)
        return cls(encode_ids(given), names, values).align(ids)

    def save(self, path: Path) -> Table:
        """Write to disk as one shard and open it again."""
        writer = TableWriter(path, self.ids, self.columns, shard_rows=max(1, len(self)), dtype=self.values.dtype)
        if len(self):
            writer.write(0, self.values)
        return writer.finish(self.meta)


def sorted_units(table: Table, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ids in their own order, or in the one given, and their rows at length 1 in float32: the same whatever the order
    of the pool. Of a table on disk one shard is held beside them."""
    order = np.argsort(table.ids, kind="stable") if order is None else order
    place, at = np.empty(len(order), dtype=np.int64), 0
    place[order] = np.arange(len(order))
    rows = np.empty((len(order), len(table.columns)), dtype=np.float32)
    for block in table.shards():
        rows[place[at : at + len(block)]] = unit_rows(block.astype(np.float32))[0]
        at += len(block)
    return table.ids[order], rows


def join(parts: Sequence[Table], path: Path, meta: dict[str, Any]) -> None:
    """Write at `path` a Table of the rows of several on disk, one after the other, that reads their own shards.

    Nothing but ids is copied. Raises `InputError` for other columns, or for an id that two of them have.
    """
    folders = [Path(os.path.abspath(str(part._path))) for part in parts if part._path is not None]
    where = ", ".join(map(str, folders))
    assert len(folders) == len(parts), "only tables on disk are joined"
    if any(part.columns != parts[0].columns for part in parts):
        raise InputError("the tables have other columns", where=where, fix="join tables of one method and model")
    width = max(part.ids.dtype.itemsize for part in parts)
    ids = np.concatenate([part.ids.astype(f"S{width}") for part in parts])
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise InputError(
            f"{len(twice)} ids stand in more than one of the tables", where=where,
            why=f"the first is {decode_ids(twice[:1])[0]!r}", fix="give each part once",
        )  # fmt: skip
    shards = [_moved(shard, at) for part, at in zip(parts, folders, strict=True) for shard in part._shards]
    path.mkdir(parents=True, exist_ok=True)
    _write_manifest(path, ids, parts[0].columns, shards, meta)


class TableWriter:
    """Writes a Table shard by shard; what a killed process had finished is kept and the rest is redone.

    Each shard is `00000.npy` (of float16 tables also `00000.norm.npy`), written aside and renamed, then `00000.json`
    with its xxh3-128. Shards may be written in any order and by several processes. `finish` checks that every row is
    there, and writes the manifest last. On a finished table, only shards that are missing or damaged need be written.
    """

    def __init__(
        self, path: Path, ids: np.ndarray, columns: Sequence[str], *, shard_rows: int, dtype: Any = np.float32
    ) -> None:
        self.path, self.ids, self.columns = path, ids, tuple(columns)
        self.shard_rows, self.dtype = shard_rows, np.dtype(dtype)
        self._form = digest(FORMAT, self.columns, self.dtype.str)
        path.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return -(-len(self.ids) // self.shard_rows)

    def span(self, index: int) -> tuple[int, int]:
        return index * self.shard_rows, min(len(self.ids), (index + 1) * self.shard_rows)

    def _key(self, index: int) -> str:
        start, stop = self.span(index)
        return digest(self._form, digest_ids(self.ids[start:stop]))

    def _marker(self, index: int) -> dict[str, Any] | None:
        """What is noted of a shard that was published for the same ids and columns."""
        try:
            marker = _unsealed(self.path / f"{index:05d}.json")
            return marker if marker["key"] == self._key(index) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def has(self, index: int) -> bool:
        """Whether this shard was finished, for the same ids and columns, and its bytes are still what they were."""
        marker = self._marker(index)
        try:
            return marker is not None and len(_load(self.path, marker)) == marker["rows"]
        except InputError:
            return False

    def write(self, index: int, values: np.ndarray) -> None:
        """Publish one shard. Raises `InputError` when a number is not finite."""
        start, stop = self.span(index)
        values = np.asarray(values)
        if values.ndim == 1:
            values = values[:, None]
        assert values.shape == (stop - start, len(self.columns)), (values.shape, stop - start, len(self.columns))
        narrow, norms, counts = self._narrowed(values)
        fine = np.isfinite(narrow).all(axis=1) & (np.isfinite(norms) if norms is not None else True)
        bad = np.flatnonzero(~fine)
        if len(bad):
            first = decode_ids(self.ids[start + bad[:1]])[0]
            raise InputError(
                f"{len(bad)} rows have numbers that are not finite, the first is id {first!r}",
                where=self.path,
                why=f"NaN or infinity, or over the range of {self.dtype if norms is None else np.dtype(np.float32)}",
                fix="look at that example; lower the learning rate if the model diverged",
            )
        marker: dict[str, Any] = {"rows": stop - start, "key": self._key(index), "counts": counts}
        if norms is not None:
            marker["norms"] = _publish(self.path / f"{index:05d}.norm.npy", norms)
        marker |= _publish(self.path / f"{index:05d}.npy", narrow)
        write_json(self.path / f"{index:05d}.json", _sealed(marker))

    def _narrowed(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, dict[str, int]]:
        """Values in the table's dtype, norms if it keeps them, and counts of what did not fit."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if self.dtype == np.float16:
                unit, lengths = unit_rows(values.astype(np.float32))
                narrow, norms = unit.astype(np.float16), lengths.astype(np.float32)
            else:
                narrow, norms = values.astype(self.dtype), None
        zero = ~values.any(axis=1)
        lost = np.count_nonzero(narrow == 0) - np.count_nonzero(values == 0)
        over = np.count_nonzero(np.isinf(narrow)) - np.count_nonzero(np.isinf(values))
        return narrow, norms, dict(zip(COUNTS, map(int, (zero.sum(), lost, over)), strict=True))

    def finish(self, meta: dict[str, Any] | None = None) -> Table:
        """Check coverage and write ids and manifest. Every id is there exactly once, by construction of the spans."""
        markers = [self._marker(i) for i in range(len(self))]
        missing = [i for i, marker in enumerate(markers) if marker is None]
        assert not missing, f"shards {missing[:5]} of {self.path} are missing"
        shards = [marker for marker in markers if marker is not None]
        ordered = np.sort(self.ids)
        assert not (ordered[1:] == ordered[:-1]).any(), "ids repeat"
        counts = {name: sum(shard["counts"][name] for shard in shards) for name in COUNTS}
        about = {**(meta or {}), "coverage": 1.0, "nan": 0, **counts}
        _write_manifest(self.path, self.ids, self.columns, shards, about)
        return Table.open(self.path)


def _publish(file: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array file; returns its name and checksum."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    data = buffer.getbuffer()
    write_bytes(file, data)
    return {"file": file.name, "xxh3": xxhash.xxh3_128_hexdigest(data)}


def _write_manifest(
    path: Path, ids: np.ndarray, columns: Sequence[str], shards: list[dict[str, Any]], meta: dict[str, Any]
) -> None:
    index = _publish(path / "ids.npy", ids)
    about = {"format": FORMAT, "columns": list(columns), "rows": len(ids), "ids": index, "shards": shards, "meta": meta}
    write_json(path / "manifest.json", _sealed(about))


def _moved(shard: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A shard's entry with the place of its files written out."""
    moved = {**shard, "file": str(folder / shard["file"])}
    if "norms" in shard:
        moved["norms"] = {**shard["norms"], "file": str(folder / shard["norms"]["file"])}
    return moved


def _sealed(about: dict[str, Any]) -> dict[str, Any]:
    """With a checksum of its own."""
    return {**about, "seal": digest(about)}


def _unsealed(file: Path) -> dict[str, Any]:
    """What `_sealed` closed. Raises `ValueError` when the file is not what it was."""
    about = json.loads(file.read_text())
    if not isinstance(about, dict) or about.pop("seal", None) != digest(about):
        raise ValueError(f"{file.name} does not match its own checksum")
    if about.get("format", FORMAT) != FORMAT:
        raise ValueError(f"it has format {about['format']}, this is {FORMAT}")
    return about


def _load(path: Path, marker: dict[str, Any]) -> np.ndarray:
    """One shard as numbers, after its checksums were compared."""
    values = _read(path / marker["file"], marker["xxh3"])
    if "norms" not in marker:
        return values
    norms = _read(path / marker["norms"]["file"], marker["norms"]["xxh3"])
    wide = values.astype(np.float32)
    wide *= norms[:, None]
    return wide


def _read(file: Path, checksum: str) -> np.ndarray:
    """One array file, after its checksum was compared."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError("a shard is missing", where=file, why=str(error), fix=_remedy(file)) from error
    if xxhash.xxh3_128_hexdigest(data) != checksum:
        why = "its bytes do not match the checksum in the manifest"
        raise InputError("a shard is damaged", where=file, why=why, fix=_remedy(file))
    return np.load(io.BytesIO(data), allow_pickle=False)


def _remedy(file: Path) -> str:
    """How to mend a table: the command of the run that it lies in, where there is one."""
    for folder in file.parents[:4]:
        try:
            told = json.loads((folder / "command.json").read_text(encoding="utf-8"))
            where = "" if told["folder"] == os.getcwd() else f"cd {shlex.quote(told['folder'])} && "
            return f"run it again, and only what is damaged is computed anew: {where}{told['command']}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "run the same command again: only what is damaged is computed anew"
