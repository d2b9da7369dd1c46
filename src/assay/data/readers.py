"""User files to Arrow record batches: `read`, `files`, `sniff`, `fingerprint`.

A `Source` says where the files are and which columns mean what. Rows that cannot be used are set
aside with a reason (`Rejected`); a file that cannot be used raises `InputError`. Everything streams,
and the same rows come out in the same order whatever the format and the batch size.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import xxhash

from assay.core.errors import InputError
from assay.data.columns import (
    FLAG,
    PEEK_ROWS,
    STRING,
    chat_columns,
    image_column,
    is_scalar,
    is_text,
    kept_column,
    kind_of,
    listed,
    merged,
    note,
    plain,
    string_column,
    text_column,
)
from assay.data.formats import (
    MISSING,
    Chunk,
    Rejected,
    Want,
    filesystem,
    format_of,
    hub_commit,
    is_hub,
    opened,
    preview,
    record,
    refusing,
    suggest,
    unpacked,
)
from assay.data.locate import expand

__all__ = ["Rejected", "Source", "files", "fingerprint", "read", "sniff"]

pc: Any = pyarrow.compute  # its functions are made at run time, where type checkers do not see them

IMAGE_ROWS = 64  # images a batch: see IMAGE_BYTES
OUTPUT = ("text", "image", "prompt", "completion", "id", "domain", "source", "source_row")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the examples are, and what their columns are called.

    Args:
        paths: A file, a directory, a glob, an fsspec URL, a directory saved by `datasets`, "hf://owner/name", or
            several of these.
        text: The column of documents, or None.
        image: The column of encoded images, or of their paths relative to the file, or None.
        prompt: The column of prompts, which may be empty; a completion goes with it. The text is then both, joined by
            a line break, whatever `text` says.
        completion: The column of completions.
        messages: In the place of both, the column of chats: lists of {role, content}, of which the last turn of the
            assistant is the completion and those before it are the prompt.
        id: The column of ids: strings or integers.
        domain: The column of domains. When None, a column called "domain" is used if there is one.
        keep: Further columns to carry along: numbers (as float64), booleans, strings, lists of numbers of one length.
        max_chars: The longest document, in characters.
    """

    paths: str | tuple[str, ...]
    text: str | None = "text"
    image: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    id: str | None = None
    domain: str | None = None
    keep: tuple[str, ...] = ()
    max_chars: int = 1_000_000

    @property
    def plain(self) -> str | None:
        """The column of whole texts; None where there are prompts and completions."""
        return self.text if self.completion is None and self.messages is None else None


# ---- which files ----


def files(source: Source) -> list[str]:
    """The files of a source, in the order in which they are read: by directory, then by name, each once.

    Directories are searched to any depth (links to directories are not followed); hidden files and
    files of other kinds are skipped. Raises `InputError` when a path gives nothing.
    """
    paths = [source.paths] if isinstance(source.paths, (str, os.PathLike)) else list(source.paths)
    if not paths:
        raise InputError(
            "no paths were given", where="paths", why="the file set is empty", fix="name a file, a directory or a glob"
        )
    found: dict[str, tuple[str, int, str]] = {}
    for path in map(os.fspath, paths):
        with refusing(path):
            found.update(expand(path))
    return sorted(found, key=found.__getitem__)


# ---- what the files hold ----


@dataclass(frozen=True)
class _Plan:
    source: Source
    domain: str | None
    kinds: dict[str, Any]  # keep column -> Arrow type
    labels: dict[str, str]  # path -> what the `source` column calls it


def _columns(source: Source) -> list[str]:
    dialogue = (source.prompt, source.completion, source.messages)
    named = [source.plain, source.image, *dialogue, source.id, source.domain, *source.keep]
    return list(dict.fromkeys(name for name in named if name is not None))


def _check_source(source: Source) -> None:
    if (source.prompt is None) != (source.completion is None):
        raise InputError("prompt and completion go together", fix="name the columns of both")
    if source.completion is not None and source.messages is not None:
        raise InputError("completion and messages are both named", fix="drop one of them")
    words = source.text or source.completion or source.messages
    if words is None and source.image is None and not source.keep:
        raise InputError("neither a text nor an image column is named", fix="text='...' or image='...'")
    for name in source.keep:
        if name in OUTPUT or source.keep.count(name) > 1:
            why = "the output has a column of this name already"
            raise InputError(f"cannot keep column '{name}'", why=why, fix="rename it, or leave it out of `keep`")
    if source.max_chars < 1:
        raise InputError("max_chars must be positive", why=f"it is {source.max_chars}")


def _plan(source: Source, paths: list[str]) -> _Plan:
    """Look at the beginning of every file, so that wrong names and types are found before the work starts."""
    _check_source(source)
    names = _columns(source)
    want = Want((*names, "domain"), PEEK_ROWS, _max_bytes(source))
    domain, some, kinds = source.domain, False, dict.fromkeys(source.keep)
    for path in paths:
        chunk = _first(path, want)
        some = some or bool(chunk.rows or chunk.rejected)
        if not chunk.names:  # nothing in it, or nothing that parses: told row by row
            continue
        for name in names:
            if name not in chunk.names:
                why = f"it has: {', '.join(chunk.names[:50])}"
                raise InputError(f"no column '{name}'", where=path, why=why, fix=suggest(name, chunk.names))
        if domain is None and "domain" in chunk.names and is_scalar(chunk.data["domain"]):
            domain = "domain"
        _check_types(path, source, chunk)
        for name in source.keep:
            kinds[name] = merged(name, path, kinds[name], kind_of(name, path, chunk.data[name], chunk.loose))
    if not some:
        raise InputError("the files hold no rows", where=", ".join(paths[:3]), why=f"files read: {len(paths)}")
    settled = {name: STRING if kind is None else kind for name, kind in kinds.items()}
    return _Plan(source, domain, settled, _labels(paths))


def _first(path: str, want: Want) -> Chunk:
    form = format_of(path)
    assert form is not None
    with closing(form.read(path, want)) as chunks:
        return next(chunks)


def _max_bytes(source: Source) -> int:
    return 12 * source.max_chars + 2**24  # JSON may escape a character in 12 bytes; the rest is for other columns


def _labels(paths: list[str]) -> dict[str, str]:
    """File names, with as many directories as tell equal names apart: paths below the common directory."""
    folders = [path.split("/")[:-1] for path in paths]
    common = len(os.path.commonprefix(folders)) if folders else 0
    return {path: "/".join(path.split("/")[common:]) for path in paths}


def _check_types(path: str, source: Source, chunk: Chunk) -> None:
    """Columns of typed formats whose type no row can mend."""
    words = [("text", source.plain, False), ("prompt", source.prompt, False), ("completion", source.completion, False)]
    for role, name, numbers in (*words, ("id", source.id, True), ("domain", source.domain, True)):
        values = chunk.data.get(name or "")
        if not isinstance(values, pa.Array):
            continue
        kind = plain(values).type
        fits = is_text(kind) or (numbers and pa.types.is_integer(kind)) or (role == "domain" and is_scalar(values))
        if not fits:
            fix = f"name another column as the {role}, or convert this one to strings"
            raise InputError(f"column '{name}' cannot be the {role}", where=path, why=f"its type is {kind}", fix=fix)


# ---- rows ----


def read(source: Source, *, batch_rows: int = 1024) -> Iterator[tuple[pa.RecordBatch, list[Rejected]]]:
    """Record batches of the good rows, each with the rows that were set aside on the way.

    Columns: `text`, `image`, `id`, `domain` (as far as mapped or found; no domain is ""), those of
    `keep`, `source` (the file's name) and `source_row` (from 1). A batch has at most `batch_rows`
    rows and never spans two files. Raises `InputError` for what no row can mend: before the first
    batch where the beginning of a file shows it, else on reaching it.
    """
    if batch_rows < 1:
        raise InputError("batch_rows must be positive", why=f"it is {batch_rows}")
    paths = files(source)
    return _batches(_plan(source, paths), paths, batch_rows)


def _batches(plan: _Plan, paths: list[str], batch_rows: int) -> Iterator[tuple[pa.RecordBatch, list[Rejected]]]:
    source = plan.source
    names = _columns(source)
    if plan.domain is not None and plan.domain not in names:
        names.append(plan.domain)
    rows = batch_rows if source.image is None else min(batch_rows, IMAGE_ROWS)
    for path in paths:
        form = format_of(path)
        assert form is not None
        for chunk in form.read(path, Want(tuple(names), rows, _max_bytes(source))):
            if chunk.rows or chunk.rejected:
                yield _clean(plan, path, chunk)


def _clean(plan: _Plan, path: str, chunk: Chunk) -> tuple[pa.RecordBatch, list[Rejected]]:
    """Convert and check one chunk; the first reason found for a row is the one it gets."""
    source, count = plan.source, len(chunk.rows)
    bad: dict[int, str] = {}
    columns: dict[str, Any] = {}
    absent = [MISSING] * count

    def values(name: str) -> Any:
        return chunk.data.get(name, absent)

    if source.plain is None and (source.completion or source.messages):
        if source.messages is not None:
            prompts, completions = chat_columns(values(source.messages), source.messages, bad)
        else:
            prompts, completions = values(source.prompt or ""), values(source.completion or "")
        columns["completion"] = text_column(completions, source.completion or "", source.max_chars, bad)
        prompt = string_column(prompts, "prompt", f"no column '{source.prompt}'", (str,), bad)
        columns["prompt"] = prompt.fill_null("")
        columns["text"] = pc.binary_join_element_wise(columns["prompt"], columns["completion"], "\n")
    elif source.text is not None:
        columns["text"] = text_column(values(source.text), source.text, source.max_chars, bad)
    if source.image is not None:
        columns["image"] = image_column(values(source.image), source.image, path, bad)
    if source.id is not None:
        columns["id"] = string_column(values(source.id), "id", "no id", (str, int), bad)
        note(bad, pc.equal(columns["id"], ""), lambda i: "no id")
        note(bad, pc.is_null(columns["id"]), lambda i: "no id")
    if plan.domain is not None:
        found = string_column(values(plan.domain), "domain", "", (str, int, float, bool), bad)
        columns["domain"] = found.fill_null("")
    for name, kind in plan.kinds.items():
        columns[name] = kept_column(values(name), name, kind, chunk.loose, bad)
    columns["source"] = pa.array([plan.labels[path]] * count, STRING)
    columns["source_row"] = pa.array(chunk.rows, pa.int64())
    batch = pa.RecordBatch.from_pydict(columns)
    rejected = [Rejected(path, chunk.rows[i], reason, chunk.show(i)) for i, reason in bad.items()]
    if bad:
        batch = batch.filter(pa.array([i not in bad for i in range(count)], FLAG))
    return batch, sorted(chunk.rejected + rejected, key=lambda row: row.row)


# ---- looking without reading ----


def sniff(path: str) -> dict[str, Any]:
    """What a file, directory or glob seems to hold, judged by the first 100 rows of its first file.

    Returns `format`, `columns`, `text`, `id` and `domain` (names or None), `examples` (up to three
    previews per column), `rows` (an estimate; None for the hub) and `files` (how many).
    """
    paths = files(Source(paths=path))
    form = format_of(paths[0])
    assert form is not None
    chunk = _first(paths[0], Want(None, PEEK_ROWS, _max_bytes(Source(paths=path))))
    columns: dict[str, list[Any]] = {}
    for name, values in chunk.data.items():
        columns[name] = [value for value in listed(values) if value is not None and value is not MISSING]
    strings = {name: [v for v in values if isinstance(v, str)] for name, values in columns.items()}
    length = {name: sum(map(len, values)) / len(values) for name, values in strings.items() if values}
    text = max(length, key=length.__getitem__, default=None)
    rest = [name for name in columns if name != text]
    return {
        "format": form.name,
        "columns": chunk.names,
        "text": text,
        "id": _guess(rest, ("id", "_id", "uid", "uuid", "key", "doc_id", "example_id"), lambda n: n.endswith("id")),
        "domain": _guess(rest, ("domain", "source", "subset", "category", "dataset", "lang", "language"), None),
        "examples": {name: [preview(value) for value in values[:3]] for name, values in columns.items()},
        "rows": None if is_hub(paths[0]) else _estimate(paths, chunk),
        "files": len(paths),
    }


def _guess(names: list[str], usual: tuple[str, ...], also: Callable[[str], bool] | None) -> str | None:
    lowered = {name.lower(): name for name in reversed(names)}
    hits = [lowered[name] for name in usual if name in lowered]
    hits += [name for name in names if also and also(name.lower())]
    return hits[0] if hits else None


def _estimate(paths: list[str], chunk: Chunk) -> int:
    """Rows of all files: exact for parquet and for one short text file, else by the density of the first file."""
    form = format_of(paths[0])
    assert form is not None
    if form.name == "parquet":
        return sum(_parquet_rows(path) for path in paths if path.endswith((".parquet", ".pq")))
    size = sum(fs.size(inner) or 0 for fs, inner in map(filesystem, paths))
    if form.name == "arrow":
        return round(size * len(chunk.rows) / max(1, sum(values.nbytes for values in chunk.data.values())))
    with refusing(paths[0]), opened(paths[0]) as raw, unpacked(paths[0], raw) as stream:
        head = stream.read(2**22)
        unpacked_bytes = len(head)
        while unpacked_bytes < 2**26 and (
            block := stream.read(2**22)
        ):  # decompressors read far ahead of a short sample
            unpacked_bytes += len(block)
        used = raw.tell() * len(head) / max(1, unpacked_bytes)
    sample = head.decode("utf-8", "replace")
    if form.name == "jsonl":
        rows = sum(1 for line in sample.split("\n") if line.strip())
    else:
        reader = csv.reader(io.StringIO(sample), delimiter="," if form.name == "csv" else "\t")
        rows = sum(1 for found in iter(lambda: record(reader, len(sample) + 1), None) if found) - 1
    return round(max(0, rows) * size / max(1, used))


def _parquet_rows(path: str) -> int:
    with refusing(path), opened(path) as raw:
        return pq.ParquetFile(raw).metadata.num_rows


def fingerprint(source: Source) -> str:
    """The xxh3-128 hash, in hexadecimal, of the files' bytes in order, of images they point to, and of the mapping.

    Names and places of the files do not enter: a moved copy has the same fingerprint. Of a hub dataset the
    commit stands for the bytes. Raises `InputError` when a file cannot be read.
    """
    _check_source(source)
    mapping = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name != "paths"}
    state = xxhash.xxh3_128(json.dumps(mapping).encode())
    for path in files(source):
        form = format_of(path)
        assert form is not None
        state.update(f"\0{form.name}\0".encode())
        if is_hub(path):
            state.update(hub_commit(path).encode())
            continue
        _hash_file(state, path)
        if source.image is not None:
            _hash_images(state, source, path)
    return state.hexdigest()


def _hash_file(state: Any, path: str) -> None:
    size = 0
    with refusing(path, lambda: f"after byte {size}"), opened(path) as raw:
        while block := raw.read(2**20):
            state.update(block)
            size += len(block)
    state.update(size.to_bytes(8, "little"))  # so that bytes cannot move from one file to the next unseen


def _hash_images(state: Any, source: Source, path: str) -> None:
    """Add the image files that a table points to: the table's own bytes do not change with them."""
    form = format_of(path)
    assert form is not None and source.image is not None
    for chunk in form.read(path, Want((source.image,), IMAGE_ROWS, _max_bytes(source))):
        values = chunk.data.get(source.image, [])
        if isinstance(values, pa.Array) and plain(values).type in (pa.binary(), pa.large_binary()):
            return
        for data in image_column(values, source.image, path, {}).to_pylist():
            state.update(len(data or b"").to_bytes(8, "little") + (data or b""))
