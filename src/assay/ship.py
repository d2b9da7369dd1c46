"""A Selection in the forms that other programs read: what `scorers/verdict.py` reads as well."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.errors import InputError, nearest
from assay.core.keys import decode_ids
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.data import verdicts

SHARD = 2048
LEFT_OUT = ("text", "id")
"""Columns of the pool that stand beside a document's metadata, not in it."""


def recommended(run: Path) -> str:
    """The arm that a run recommends. Raises `InputError` where it recommends none."""
    file = run / "result.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("recommended") if file.exists() else None
    if not found:
        why = "no arm was shown to beat random" if file.exists() else "it is not finished"
        raise InputError("the run recommends no arm", where=run, why=why, fix="name one: --arm NAME")
    return str(found)


def opened(run: Path, arm: str) -> tuple[Pool, Selection]:
    """The pool of a finished run in its own order, and what an arm selected of it."""
    folder = run / "selections"
    if not (run / "result.json").exists() or not folder.is_dir():
        raise InputError("no finished run", where=run, why="there is no result", fix="give the --out of an `assay run`")
    arms = sorted(path.name for path in folder.iterdir())
    if arm not in arms:
        raise InputError(f"no arm called {arm!r}", where=run, fix=nearest(arm, arms))
    selection = Selection.open(folder / arm)
    places = [*run.glob("steps/read-pool-*"), *run.glob("steps/builtin-*/pool")]
    places = [place for place in places if (place / "pool.json").exists()]
    known = np.concatenate([selection.ids, *selection.dropped.values()])
    for place in places:
        pool = Pool.open(place)
        rows = np.flatnonzero(np.isin(pool.ids, known))
        if len(rows) == len(np.unique(known)):
            return pool.at(rows), selection
    raise InputError("the run's pool is gone", where=run / "steps", fix="run its command again")


def write(form: str, path: Path, pool: Pool, selection: Selection, name: str = "assay") -> list[Path]:
    """Write a selection of a pool in one form into a folder; returns the files. `name` is that of the arm.

    Raises `InputError` for a form that the pool cannot be told in.
    """
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}", fix=nearest(form, FORMS))
    if form in ("datatrove", "dolma") and "text" not in pool.columns:
        raise InputError(f"the pool has no text, which {form} asks for", fix="use curator, datacomp or ids")
    path.mkdir(parents=True, exist_ok=True)
    return FORMS[form](path, pool, selection, name)


def _datatrove(path: Path, pool: Pool, selection: Selection, name: str) -> list[Path]:
    """The selected documents in the selection's order: `JsonlReader` reads them."""
    file = path / "00000.jsonl.gz"
    with _jsonl(file) as out:
        for start in range(0, len(selection), SHARD):
            part = pool.take(selection.ids[start : start + SHARD].tolist())
            more = [c for c in part.columns if c not in LEFT_OUT]
            columns = {c: part.column(c) for c in more}
            for row, (one, text) in enumerate(zip(decode_ids(part.ids), part.column("text"), strict=True)):
                about = {c: values[row] for c, values in columns.items() if _plain(values[row])}
                about["weight"] = float(selection.weights[start + row])
                _line(out, {"text": text, "id": one, "metadata": about})
    return [file]


def _dolma(path: Path, pool: Pool, selection: Selection, name: str) -> list[Path]:
    """Attributes of every document, kept or not: one file for each file of the pool, in its order, as the mixer wants
    it; a span over the whole text, in characters, with score 1 (kept) or 0.

    The mixer pairs lines by their number: with the pool's own files that holds only if no row of them was quarantined
    or left out of the run. What is joined by id is not touched by that.
    """
    attribute, kept = f"assay__{name}__keep", np.isin(pool.ids, selection.ids)
    sources = np.array(pool.column("source")) if "source" in pool.columns else np.full(len(pool), "")
    made, called = [], _stems(list(dict.fromkeys(sources.tolist())))
    for source, stem in called.items():
        file = path / "attributes" / f"assay_{name}" / stem
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = np.flatnonzero(sources == source)
        with _jsonl(file) as out:
            for start in range(0, len(rows), SHARD):
                part, stay = pool.at(rows[start : start + SHARD]), kept[rows[start : start + SHARD]].tolist()
                for one, text, keep in zip(decode_ids(part.ids), part.column("text"), stay, strict=True):
                    span = [0, len(text), float(keep)]
                    _line(out, {"id": one, "source": source, "attributes": {attribute: [span]}})
        made.append(file)
    return made


def _curator(path: Path, pool: Pool, selection: Selection, name: str) -> list[Path]:
    """Ids to remove, for `TextDuplicatesRemovalWorkflow`."""
    gone = pool.ids[~np.isin(pool.ids, selection.ids)]
    pq.write_table(pa.table({"id": pa.array(decode_ids(gone), pa.string())}), path / "part.0.parquet")
    return [path / "part.0.parquet"]


def _datacomp(path: Path, pool: Pool, selection: Selection, name: str) -> list[Path]:
    """A sorted subset file of uids, for the resharder."""
    np.save(path / f"{name}.npy", verdicts.uids(np.unique(selection.ids).tolist()), allow_pickle=False)
    return [path / f"{name}.npy"]


def _ids(path: Path, pool: Pool, selection: Selection, name: str) -> list[Path]:
    """Ids kept, one a line, in the selection's order. Raises `InputError` for one that would not come back."""
    for one in decode_ids(selection.ids):
        if one != one.strip() or "\n" in one or "\r" in one:
            raise InputError(
                f"id {one!r} cannot stand on a line of its own", why="line breaks and outer blanks would be lost",
                fix="export in another form, such as curator or datatrove",
            )  # fmt: skip
    (path / f"{name}.txt").write_bytes(b"".join(one + b"\n" for one in selection.ids.tolist()))
    return [path / f"{name}.txt"]


FORMS: dict[str, Callable[[Path, Pool, Selection, str], list[Path]]] = {
    "datatrove": _datatrove, "dolma": _dolma, "curator": _curator, "datacomp": _datacomp, "ids": _ids,
}  # fmt: skip


def _stems(sources: list[str]) -> dict[str, str]:
    """The name of each file's attributes. Of files that differ in their ending alone, the one whose documents already
    have that name keeps it, else the first; the others are numbered.

    >>> _stems(["d/x.parquet", "d/x.jsonl.gz", "d/x-2.jsonl"])
    {'d/x.parquet': 'd/x-3.jsonl.gz', 'd/x.jsonl.gz': 'd/x.jsonl.gz', 'd/x-2.jsonl': 'd/x-2.jsonl.gz'}
    """
    wanted = {source: _stem(source) for source in sources}
    holder: dict[str, str] = {}
    for source in sorted(sources, key=lambda s: not s.endswith(wanted[s])):
        holder.setdefault(wanted[source], source)
    found, used = {}, set(holder)
    for source, stem in wanted.items():
        number, made = 1, stem
        while holder[stem] != source and made in used:
            number += 1
            made = f"{stem.removesuffix('.jsonl.gz')}-{number}.jsonl.gz"
        used.add(made)
        found[source] = made
    return found


def _stem(source: str) -> str:
    """The name of an attribute file: that of the documents' file, as gzipped jsonl."""
    parts = [part for part in source.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    name = "/".join(parts) or "00000"
    for ending in (".gz", ".zst", ".jsonl", ".json", ".ndjson", ".parquet", ".pq", ".csv", ".tsv", ".arrow"):
        name = name.removesuffix(ending)
    return f"{name}.jsonl.gz"


def _plain(value: Any) -> bool:
    """Whether JSON has a word for it: it has none for NaN and infinity."""
    return isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))


def _line(out: Any, value: dict[str, Any]) -> None:
    out.write((json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


@contextlib.contextmanager
def _jsonl(file: Path) -> Iterator[gzip.GzipFile]:
    """A gzipped file that always has the same bytes: no name and no time in its head."""
    with open(file, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as out:
        yield out
