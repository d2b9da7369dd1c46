"""File formats: one function per format, from a path to chunks of rows as the file has them.

A new format is one function with the signature of `Reader` and one line in `FORMATS`. A row that
cannot be parsed becomes a `Rejected`; a file that cannot be read raises `InputError`. Nothing here
holds more than one chunk of a file in memory, and no column has a meaning yet (`readers` gives it one).
"""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.errors import InputError, nearest

BOM = b"\xef\xbb\xbf"
CHUNK_BYTES = 64 * 2**20  # a chunk ends here even when it has fewer rows than asked for
PREVIEW_CHARS = 120
MISSING: Any = object()  # the value of a column that this row does not have (null is another thing)


@dataclass(frozen=True)
class Rejected:
    """A row that was set aside: its file, its row (line of a jsonl file, else data row; from 1), why, how it begins."""

    where: str
    row: int
    reason: str
    preview: str


class Want(NamedTuple):
    """What a reader is asked for: columns (None is all), rows per chunk, the longest row in bytes."""

    columns: tuple[str, ...] | None
    rows: int
    max_bytes: int


@dataclass
class Chunk:
    """Consecutive rows of one file. `data` has, of the wanted columns, those that the file has.

    A column is an Arrow array or a list of Python values; `loose` says that every value is a string
    whose type is a matter of looks (csv). `show(i)` is the preview of the i-th row.
    """

    names: list[str]
    rows: Sequence[int]
    data: dict[str, Any]
    rejected: list[Rejected]
    show: Callable[[int], str]
    loose: bool = False


Chunks = Generator[Chunk, None, None]
Reader = Callable[[str, Want], Chunks]


def preview(value: object) -> str:
    """The beginning of a value on one line, at most 120 characters, with control characters escaped."""
    if isinstance(value, bytes):
        value = value[: 4 * PREVIEW_CHARS].decode("utf-8", "replace").rstrip("\r\n")
    text = value if isinstance(value, str) else repr(value)
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: PREVIEW_CHARS + 1])
    return shown if len(shown) <= PREVIEW_CHARS else shown[: PREVIEW_CHARS - 1] + "…"


def value_of(scalar: Any) -> Any:
    """The Python value of an Arrow scalar; strings that are not UTF-8 as bytes, other values that hold such as None."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else None


def suggest(word: str, known: Iterable[str]) -> str:
    """`nearest`, with a long list cut to the eight names that are most alike."""
    names = list(known)
    return nearest(word, names if len(names) <= 8 else difflib.get_close_matches(word, names, n=8, cutoff=0.0))


# ---- refusing a whole file ----


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path inside it."""
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise InputError(
            "a package for this kind of URL is missing", where=path, why=str(error), fix="pip install it"
        ) from error
    except ValueError as error:
        raise InputError(
            "unknown kind of URL",
            where=path,
            why=str(error),
            fix=suggest(path.split(":")[0], fsspec.available_protocols()),
        ) from error


def missing(path: str) -> InputError:
    """The error for a path that does not exist, with the nearest name in its directory."""
    fs, inner = filesystem(path)
    parent, _, name = inner.rstrip("/").rpartition("/")
    try:
        beside = [entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(parent or "/", detail=False)]
    except (OSError, NotImplementedError):
        return InputError(
            "no such file", where=path, why=f"there is no directory {parent or '/'}", fix="check the path"
        )
    fix = suggest(name, [entry for entry in beside if not entry.startswith(".")])
    return InputError("no such file", where=path, why="the directory exists, the file does not", fix=fix)


@contextmanager
def refusing(path: str, at: Callable[[], str] = str) -> Iterator[None]:
    """Turn what reading can raise into an `InputError` that names the file and, by `at()`, the place in it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise missing(path) from error
    except PermissionError as error:
        raise InputError(
            "permission denied", where=path, why="this user may not read it", fix="chmod it, or run as its owner"
        ) from error
    except (EOFError, zlib.error, OSError, pa.ArrowException, UnicodeDecodeError) as error:
        place = f"{path} ({at()})" if at() else path
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError) and error.errno is not None:  # the system refused, the data did not
            raise InputError("cannot read the file", where=place, why=why) from error
        fix = "copy, download or write the file again"
        raise InputError("the file is truncated or corrupt", where=place, why=why, fix=fix) from error


def unreachable(path: str, error: Exception) -> InputError:
    """The error for what a remote filesystem or the hub raised."""
    why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    fix = "check the name and the network, and log in where that is needed; a downloaded copy works as a path"
    return InputError("cannot reach the data", where=path, why=why, fix=fix)


def opened(path: str) -> Any:
    """The raw bytes of a file as a seekable stream, from whatever filesystem."""
    fs, inner = filesystem(path)
    try:
        return fs.open(inner, "rb")
    except OSError:
        raise
    except Exception as error:  # each remote filesystem has its own exceptions
        raise unreachable(path, error) from error


def unpacked(path: str, raw: Any) -> io.BufferedReader:
    """The bytes of a text file, with .gz and .zst undone on the fly."""
    stream = raw
    if _bare(path).endswith(".gz"):
        stream = gzip.GzipFile(fileobj=raw)
    elif _bare(path).endswith(".zst"):
        # Arrow's codec raises on a truncated frame; the stream reader of zstandard ends quietly.
        stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return io.BufferedReader(stream, 2**18)


def _numbered(path: str, stream: io.BufferedReader, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(line number from 1, line, whether it is whole): a line beyond `limit` bytes is cut, not kept."""
    number = 0
    while line := stream.readline(limit):
        number += 1
        whole = len(line) < limit or line.endswith(b"\n")
        if not whole:
            while (rest := stream.readline(2**20)) and not rest.endswith(b"\n"):
                pass
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                fix = "iconv -f UTF-16 -t UTF-8"
                raise InputError("the file is UTF-16, not UTF-8", where=path, why="by its first two bytes", fix=fix)
            line = line.removeprefix(BOM)
        yield number, line, whole


def not_utf8(error: UnicodeDecodeError) -> str:
    """The reason of a row that is not UTF-8. Positions count bytes from 0."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start})"


# ---- the formats ----


def _object(line: bytes, whole: bool) -> dict[str, Any] | str:
    """The object on a line, or the reason why there is none."""
    if not whole:
        return f"line is longer than {len(line)} bytes; split the document"
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except json.JSONDecodeError as error:
        return f"line is not JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return "line is not JSON: nested too deeply"
    except ValueError as error:  # an integer with thousands of digits
        return f"line is not JSON: {error}"
    return value if isinstance(value, dict) else f"not a JSON object ({type(value).__name__})"


def jsonl(path: str, want: Want) -> Chunks:
    """One JSON object per line. Blank lines are nothing, but lines are numbered as an editor does."""
    number, size, first = 0, 0, True
    names: dict[str, None] = {}
    rows: list[int] = []
    objects: list[dict[str, Any]] = []
    lines: list[bytes] = []
    rejected: list[Rejected] = []

    def chunk() -> Chunk:
        columns = [name for name in names if want.columns is None or name in want.columns]
        columns += [name for name in want.columns or () if name not in names]
        data = {name: [row.get(name, MISSING) for row in objects] for name in columns}
        return Chunk(list(names), rows, data, rejected, lambda i, lines=lines: preview(lines[i]))

    with refusing(path, lambda: f"after line {number}"), opened(path) as raw_file, unpacked(path, raw_file) as stream:
        for number, line, whole in _numbered(path, stream, want.max_bytes):
            if not line.strip():
                continue
            found = _object(line, whole)
            if isinstance(found, str):
                if number == 1 and _spread(line):
                    fix = "jq -c '.[]' FILE > FILE.jsonl (jq -c . for one object)"
                    raise InputError("one JSON document, not one object per line", where=path, why=found, fix=fix)
                rejected.append(Rejected(path, number, found, preview(line)))
            else:
                rows.append(number)
                objects.append(found)
                lines.append(line)
                if first:
                    names.update(dict.fromkeys(found))
            size += len(line)
            if len(rows) + len(rejected) >= want.rows or size > CHUNK_BYTES:
                yield chunk()
                rows, objects, lines, rejected, size, first = [], [], [], [], 0, False
        yield chunk()


def _spread(line: bytes) -> bool:
    """Whether a first line begins an array, or an object that ends on a later line."""
    return line.strip() in (b"[", b"{") or line.lstrip().startswith((b"[{", b"[ {"))


def record(reader: Iterator[list[str]], limit: int) -> list[str] | str | None:
    """The next csv record, the reason why it cannot be parsed, or None at the end."""
    # The limit is global to the csv module: set for this record only, so that other users keep theirs.
    before = csv.field_size_limit(limit)
    try:
        return next(reader, None)
    except csv.Error as error:
        return f"not CSV: {error}"
    finally:
        csv.field_size_limit(before)


def delimited(path: str, want: Want, delimiter: str) -> Chunks:
    """A header, then one record per row; quotes as in RFC 4180. Blank lines are nothing."""
    row, size = 0, 0
    raw: list[bytes] = []  # the lines of the record at hand: the csv reader never reads ahead

    def decoded(stream: io.BufferedReader) -> Iterator[str]:
        for _, line, _whole in _numbered(path, stream, want.max_bytes):
            raw.append(line)
            yield line.decode("utf-8", "surrogateescape")

    with refusing(path, lambda: f"after row {row}"), opened(path) as raw_file, unpacked(path, raw_file) as stream:
        reader = csv.reader(decoded(stream), delimiter=delimiter, strict=True)
        header = _header(path, reader, want.max_bytes)
        for name in header:
            if header.count(name) > 1 and (want.columns is None or name in want.columns):
                raise InputError(f"two columns are called '{name}'", where=path, why="which one is meant is unclear")
        kept = [(j, name) for j, name in enumerate(header) if want.columns is None or name in want.columns]
        rows, cells, lines, rejected = [], [], [], []

        def chunk() -> Chunk:
            data = {name: [cell[j] for cell in cells] for j, name in kept}
            return Chunk(header, rows, data, rejected, lambda i, lines=lines: preview(lines[i]), loose=True)

        while header:
            raw.clear()
            found = record(reader, want.max_bytes)
            if found is None:
                break
            if not found:
                continue
            row += 1
            line = b"".join(raw)
            reason = _fault(found, line, len(header), want.max_bytes)
            if reason:
                rejected.append(Rejected(path, row, reason, preview(line)))
            elif isinstance(found, list):
                rows.append(row)
                cells.append(found)
                lines.append(line[: 4 * PREVIEW_CHARS])
            size += len(line)
            if len(rows) + len(rejected) >= want.rows or size > CHUNK_BYTES:
                yield chunk()
                rows, cells, lines, rejected, size = [], [], [], [], 0
        yield chunk()


def _fault(record: list[str] | str, line: bytes, width: int, limit: int) -> str:
    """Why a csv record cannot be used, or nothing."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return not_utf8(error)
    if len(line) >= limit:
        return f"row is longer than {limit} bytes; split the document, or close its quotes"
    if isinstance(record, str):
        return record
    return "" if len(record) == width else f"row has {len(record)} fields, the header has {width}"


def _header(path: str, reader: Iterator[list[str]], limit: int) -> list[str]:
    header: list[str] | str | None = []
    while header == []:
        header = record(reader, limit)
    if isinstance(header, str) or any("\udc80" <= c <= "\udcff" for name in header or () for c in name):
        why = header if isinstance(header, str) else "not UTF-8"
        raise InputError("the header cannot be read", where=f"{path} (line 1)", why=why)
    return header or []


def comma(path: str, want: Want) -> Chunks:
    """Comma separated values."""
    return delimited(path, want, ",")


def tab(path: str, want: Want) -> Chunks:
    """Tab separated values."""
    return delimited(path, want, "\t")


def parquet(path: str, want: Want) -> Chunks:
    """Parquet, row group by row group."""
    with refusing(path), opened(path) as raw:
        file = pq.ParquetFile(raw, buffer_size=2**20)
        names = list(file.schema_arrow.names)
        columns = [name for name in names if want.columns is None or name in want.columns]
        yield from tables(path, file.iter_batches(batch_size=want.rows, columns=columns), names, want)


def arrow(path: str, want: Want) -> Chunks:
    """An Arrow stream, as `datasets` saves it, or an Arrow (Feather 2) file."""
    with refusing(path), opened(path) as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        if is_file:
            file: Any = pa.ipc.open_file(raw)
            batches: Any = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            file = batches = pa.ipc.open_stream(raw)
        names = list(file.schema.names)
        places = [i for i, name in enumerate(names) if want.columns is None or name in want.columns]
        yield from tables(path, (_checked(batch.select(places)) for batch in batches), names, want)


def _checked(batch: Any) -> Any:
    """The batch, after a look at its offsets: Arrow reads them unchecked, and a corrupt one ends the process."""
    for column in batch.columns:
        # As bytes, because a string that is not UTF-8 costs its row and not the file.
        kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
        (column.view(kinds[column.type]) if column.type in kinds else column).validate(full=True)
    return batch


def tables(path: str, batches: Iterable[Any], names: list[str], want: Want) -> Chunks:
    """Chunks of record batches, each cut to the rows and to the bytes a chunk may have."""
    done = 0

    def chunk(piece: Any) -> Chunk:
        data = {} if piece is None else {name: piece.column(name) for name in piece.schema.names if name in wanted}
        count = 0 if piece is None else piece.num_rows
        first = next(iter(data), None)
        show = (lambda i: preview(value_of(data[first][i]))) if first else (lambda i: "")
        return Chunk(names, range(done + 1, done + 1 + count), data, [], show)

    wanted = set(names if want.columns is None else want.columns)
    with refusing(path, lambda: f"after row {done}"):
        for batch in batches:
            step = max(1, min(want.rows, batch.num_rows * CHUNK_BYTES // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, step):
                piece = batch.slice(start, step)
                if len(set(piece.schema.names) & wanted) < sum(name in wanted for name in piece.schema.names):
                    raise InputError("two columns have one name", where=path, why=f"it has: {', '.join(names)}")
                yield chunk(piece)
                done += piece.num_rows
        if not done:
            yield chunk(None)


def hub(path: str, want: Want) -> Chunks:
    """A dataset of the hub, streamed: "hf://owner/name", with "?split=train&name=...&revision=..." at will."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise _no_hub(path) from error
    name, _, query = path.removeprefix("hf://").partition("?")
    options: dict[str, Any] = {key: values[-1] for key, values in parse_qs(query).items()}
    try:
        stream = datasets.load_dataset(name, streaming=True, **({"split": "train"} | options))
        batches = iter(stream.with_format("arrow").iter(batch_size=want.rows))
        head = next(batches, None)
    except Exception as error:  # the network, the hub and `datasets` have dozens of their own
        raise unreachable(path, error) from error

    def pieces() -> Iterator[Any]:
        try:
            if head is not None:
                yield from head.to_batches()
            for table in batches:
                yield from table.to_batches()
        except Exception as error:
            raise unreachable(path, error) from error

    yield from tables(path, pieces(), list(head.schema.names) if head is not None else [], want)


def hub_commit(path: str) -> str:
    """The commit that a hub id means now: it changes whenever the data do."""
    name, _, query = path.removeprefix("hf://").partition("?")
    revision = parse_qs(query).get("revision", [None])[-1]
    try:
        api: Any = importlib.import_module("huggingface_hub").HfApi()
        return f"{name}?{query}@{api.dataset_info(name, revision=revision).sha}"
    except ImportError as error:
        raise _no_hub(path) from error
    except Exception as error:
        raise unreachable(path, error) from error


def _no_hub(path: str) -> InputError:
    fix = "pip install 'assay-data[hf]'"
    return InputError("reading the hub needs `datasets`", where=path, why="it is not installed", fix=fix)


class Format(NamedTuple):
    """A format: its name, its reader, whether .gz and .zst may be added to the suffix."""

    name: str
    read: Reader
    packs: bool


FORMATS: dict[str, Format] = {
    ".jsonl": Format("jsonl", jsonl, True),
    ".ndjson": Format("jsonl", jsonl, True),
    ".json": Format("jsonl", jsonl, True),
    ".csv": Format("csv", comma, True),
    ".tsv": Format("tsv", tab, True),
    ".parquet": Format("parquet", parquet, False),
    ".pq": Format("parquet", parquet, False),
    ".arrow": Format("arrow", arrow, False),
}


def is_hub(path: str) -> bool:
    """Whether a path is "hf://owner/name", as against a file in a repository ("hf://datasets/owner/name/file")."""
    parts = path.removeprefix("hf://").partition("?")[0].strip("/").split("/")
    return path.startswith("hf://") and len(parts) == 2 and parts[0] not in ("datasets", "models", "spaces", "buckets")


def _bare(path: str) -> str:
    return (path.split("?")[0].split("#")[0] if "://" in path else path).lower()  # signed URLs end in a query


def format_of(path: str) -> Format | None:
    """The format of a path by its suffix, or None."""
    if is_hub(path):
        return Format("hub", hub, False)
    bare = _bare(path)
    stem = bare.removesuffix(".gz").removesuffix(".zst")
    found = FORMATS.get(os.path.splitext(stem)[1])
    return found if found and (found.packs or stem == bare) else None
