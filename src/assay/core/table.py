"""`Table`: numbers keyed by pool ids, in checked shards on disk. Features and scores are both Tables."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from assay.core.errors import InputError, nearest
from assay.core.keys import decode_ids, digest, encode_ids, write_bytes, write_json
from assay.core.pool import positions

FORMAT = 1


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
            manifest = json.loads((path / "manifest.json").read_text())
            index, columns, meta, shards = (manifest[k] for k in ("ids", "columns", "meta", "shards"))
        except (OSError, ValueError, KeyError) as error:
            raise InputError("not a finished table", where=path, why=str(error), fix="run the step again") from error
        table = cls.__new__(cls)
        table.ids, table.columns, table.meta = _load(path, index), tuple(columns), meta
        table._values, table._path, table._shards = None, path, shards
        return table

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Table({len(self)} rows, {len(self.columns)} columns)"

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


class TableWriter:
    """Writes a Table shard by shard; what a killed process had finished is kept and the rest is redone.

    Each shard is `00000.npy`, written aside and renamed, then `00000.json` with its xxh3-128. Shards may be written
    in any order. `finish` checks that every row is there and finite, and writes the manifest last.
    """

    def __init__(
        self, path: Path, ids: np.ndarray, columns: Sequence[str], *, shard_rows: int, dtype: Any = np.float32
    ) -> None:
        self.path, self.ids, self.columns = path, ids, tuple(columns)
        self.shard_rows, self.dtype = shard_rows, np.dtype(dtype)
        path.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return -(-len(self.ids) // self.shard_rows)

    def span(self, index: int) -> tuple[int, int]:
        return index * self.shard_rows, min(len(self.ids), (index + 1) * self.shard_rows)

    def _key(self, index: int) -> str:
        start, stop = self.span(index)
        return digest(
            self.columns, self.dtype.str, xxhash.xxh3_128_hexdigest(b"\n".join(self.ids[start:stop].tolist()))
        )

    def has(self, index: int) -> bool:
        """Whether this shard was finished, for the same ids and columns, and its bytes are still what they were."""
        try:
            marker = json.loads((self.path / f"{index:05d}.json").read_text())
            _load(self.path, marker)
            return marker["key"] == self._key(index)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write(self, index: int, values: np.ndarray) -> None:
        """Publish one shard. Raises `InputError` when a number is not finite."""
        start, stop = self.span(index)
        values = np.asarray(values)
        if values.ndim == 1:
            values = values[:, None]
        assert values.shape == (stop - start, len(self.columns)), (values.shape, stop - start, len(self.columns))
        with np.errstate(over="ignore"):
            narrow = values.astype(self.dtype)
        bad = np.flatnonzero(~np.isfinite(narrow).all(axis=1))
        if len(bad):
            first = decode_ids(self.ids[start + bad[:1]])[0]
            raise InputError(
                f"{len(bad)} rows have numbers that are not finite, the first is id {first!r}",
                where=self.path,
                why=f"NaN or infinity, or over the range of {self.dtype}",
                fix="look at that example; lower the learning rate if the model diverged",
            )
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(narrow), allow_pickle=False)
        data = buffer.getvalue()
        name = f"{index:05d}.npy"
        write_bytes(self.path / name, data)
        marker = {"file": name, "rows": stop - start, "xxh3": xxhash.xxh3_128_hexdigest(data), "key": self._key(index)}
        write_json(self.path / f"{index:05d}.json", marker)

    def finish(self, meta: dict[str, Any] | None = None) -> Table:
        """Check coverage and write ids and manifest. Every id is there exactly once, by construction of the spans."""
        missing = [i for i in range(len(self)) if not self.has(i)]
        assert not missing, f"shards {missing[:5]} of {self.path} are missing"
        assert len(np.unique(self.ids)) == len(self.ids), "ids repeat"
        buffer = io.BytesIO()
        np.save(buffer, self.ids, allow_pickle=False)
        write_bytes(self.path / "ids.npy", buffer.getvalue())
        shards = [json.loads((self.path / f"{i:05d}.json").read_text()) for i in range(len(self))]
        ids = {"file": "ids.npy", "rows": len(self.ids), "xxh3": xxhash.xxh3_128_hexdigest(buffer.getvalue())}
        about = {"format": FORMAT, "columns": list(self.columns), "dtype": self.dtype.str, "rows": len(self.ids)}
        manifest = {**about, "ids": ids, "shards": shards, "meta": {**(meta or {}), "coverage": 1.0, "nan": 0}}
        write_json(self.path / "manifest.json", manifest)
        return Table.open(self.path)


def _load(path: Path, marker: dict[str, Any]) -> np.ndarray:
    """One array file, after its checksum was compared."""
    file = path / marker["file"]
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            "a shard is missing", where=file, why=str(error), fix="delete the folder and run again"
        ) from error
    if xxhash.xxh3_128_hexdigest(data) != marker["xxh3"]:
        raise InputError(
            "a shard is damaged",
            where=file,
            why="its bytes do not match the checksum in the manifest",
            fix=f"delete the folder {path} and run again: only this step is computed anew",
        )
    return np.load(io.BytesIO(data), allow_pickle=False)
