"""What other programs say of documents: keep-lists, lists of ids to remove, and attribute files, as keys and numbers.

Forms: `datatrove` (documents as jsonl or Parquet: text, id, metadata), `curator` (NeMo Curator: Parquet of the ids to
remove), `dolma` (attributes: id and, for each attribute, spans [start, end, score]), `datacomp` (a sorted .npy of
128-bit uids as two u8, or Parquet with uid), and `ids` (any table or .txt of ids). No file is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xxhash

from assay.core.errors import InputError
from assay.data.columns import listed
from assay.data.formats import MISSING, Chunk, Want, filesystem, format_of, missing, opened, preview, refusing, suggest
from assay.data.locate import expand

Form = Literal["auto", "ids", "datatrove", "curator", "dolma", "datacomp"]
Hash = Literal["md5", "sha1", "sha256", "xxh3_128"]
ROWS, MOST_BYTES = 4096, 2**28
KEYS = ("id", "uid", "_curator_dedup_id")
UID = np.dtype("u8,u8")
SPANS = ("score", "covered", "highest", "spans")
"""What is read from the spans of a document, see `spanned`."""


@dataclass(frozen=True)
class Verdicts:
    """Keys of some documents and what is said of each: `[n, c]` numbers, or nothing but that they are listed."""

    keys: list[bytes]
    values: np.ndarray | None
    where: str


@dataclass(frozen=True)
class Ask:
    """How to read: the form, the column of values (none: a list), the column of keys, and whether keys are of texts."""

    form: Form = "auto"
    column: str = ""
    key: str = ""
    hashed: bool = False


def hashed(texts: Sequence[str], kind: Hash) -> list[bytes]:
    """Hexadecimal digests of texts in UTF-8."""
    call: Callable[[bytes], str] = (
        xxhash.xxh3_128_hexdigest if kind == "xxh3_128" else lambda data: hashlib.new(kind, data).hexdigest()
    )
    return [call(text.encode("utf-8", "surrogatepass")).encode() for text in texts]


def files(path: str) -> list[str]:
    """The files behind a path: a file, a directory, a glob; besides those that hold rows, .npy and .txt."""
    if path.endswith((".npy", ".txt")):
        fs, inner = filesystem(path)
        if not fs.exists(inner):
            raise missing(path)
        return [path]
    found = expand(path)
    return sorted(found, key=found.__getitem__)


def fingerprint(path: str) -> str:
    """The xxh3-128 of the bytes of all files, in order."""
    state = xxhash.xxh3_128()
    for file in files(path):
        with refusing(file), opened(file) as raw:
            while block := raw.read(2**20):
                state.update(block)
        state.update(b"\0")
    return state.hexdigest()


def settle(path: str, asked: Ask) -> Ask:
    """The form and columns of a path's files, told by the beginning of the first. Raises `InputError` if none fits."""
    first = files(path)[0]
    if first.endswith(".npy"):
        if asked.form not in ("auto", "datacomp") or asked.column or asked.hashed:
            raise InputError(
                "an .npy of uids is a list of DataComp", where=first, why="it has no columns and no texts",
                fix="drop format, column and by",
            )  # fmt: skip
        return Ask("datacomp", key="uid")
    if first.endswith(".txt"):
        return Ask("ids", key="id", hashed=asked.hashed)
    with closing(_chunks(first, None)) as chunks:
        chunk = next(chunks)
    _whole(first, chunk)
    if not chunk.names:
        raise InputError("the file holds no rows", where=first, fix="give a file with at least a column of ids")
    form = _form(chunk.names) if asked.form == "auto" else asked.form
    return Ask(form, _column(first, asked.column, form, chunk), _key(first, asked, chunk.names), asked.hashed)


def _form(names: list[str]) -> Form:
    if "attributes" in names:
        return "dolma"
    if "_curator_dedup_id" in names:
        return "curator"
    if "uid" in names:
        return "datacomp"
    return "datatrove" if "text" in names and "id" in names else "ids"


def _key(path: str, asked: Ask, names: list[str]) -> str:
    """The column that joins: the one that is named, or a text to be hashed, or the usual name of ids."""
    wanted = asked.key or ("text" if asked.hashed else next((name for name in KEYS if name in names), ""))
    if wanted not in names:
        what = "text to hash" if asked.hashed else "ids"
        fix = suggest(wanted, names) if wanted else "name it: key = '...'"
        raise InputError(f"no column of {what}", where=path, why=f"it has: {', '.join(names[:50])}", fix=fix)
    return wanted


def _column(path: str, column: str, form: Form, chunk: Chunk) -> str:
    """The attribute of a dolma file, where there is one alone; of other forms what was asked for."""
    if column or form != "dolma":
        return column
    if "attributes" not in chunk.data:
        raise InputError(
            "no attributes", where=path, why=f"it has: {', '.join(chunk.names[:50])}", fix="another format"
        )
    held = [row for row in listed(chunk.data["attributes"]) if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in held for name in row))
    if len(names) != 1:
        why = f"they are: {', '.join(names[:50])}" if names else "the first lines have none"
        raise InputError(f"{len(names)} attributes", where=path, why=why, fix="name one: column = '...'")
    return names[0]


def read(path: str, asked: Ask) -> Iterator[Verdicts]:
    """Keys and values, chunk by chunk. `asked` is what `settle` said. Raises `InputError` at the first bad row."""
    met, others = False, set[str]()
    for file in files(path):
        if file.endswith(".npy"):
            yield Verdicts(_uids(file), None, file)
            continue
        if file.endswith(".txt"):
            yield from _lines(file)
            continue
        for chunk in _chunks(file, _wanted(file, asked)):
            _whole(file, chunk)
            keys = [_keyed(file, chunk, i, value) for i, value in enumerate(_values(file, chunk, asked.key))]
            if not asked.column:
                yield Verdicts(keys, None, file)
                continue
            found = [_found(row, asked.column) for row in _rows(chunk, asked)]
            met = met or any(value is not MISSING for value in found)
            others |= {name for row in _rows(chunk, asked)[:100] if isinstance(row, dict) for name in row}
            yield Verdicts(keys, _numbers(file, chunk, found, asked), file)
    if asked.column and not met:
        why = f"there are: {', '.join(sorted(others)[:50])}" if others else ""
        raise InputError(f"no row has {asked.column!r}", where=path, why=why, fix=suggest(asked.column, others))


def _whole(file: str, chunk: Chunk) -> None:
    """A list with a hole is no list: unlike those of a pool, its bad rows are not set aside."""
    if chunk.rejected:
        bad = chunk.rejected[0]
        raise InputError("unreadable row", where=f"{file}, row {bad.row}", why=bad.reason, fix="write it again")


def _wanted(file: str, asked: Ask) -> tuple[str, ...]:
    own = ("attributes",) if asked.form == "dolma" else (asked.column, asked.column.split(".")[0], "metadata")
    with closing(_chunks(file, None)) as chunks:
        names = next(chunks).names
    extra = [name for name in own if name in names] if asked.column else []
    return tuple(dict.fromkeys((asked.key, *extra)))


def _chunks(path: str, columns: tuple[str, ...] | None) -> Any:
    form = format_of(path)
    if form is None:
        raise InputError("unknown kind of file", where=path, fix="give .jsonl, .parquet, .csv, .npy or .txt")
    return form.read(path, Want(columns, 100 if columns is None else ROWS, MOST_BYTES))


def _values(path: str, chunk: Chunk, name: str) -> list[Any]:
    if name not in chunk.data:
        raise InputError(f"no column {name!r}", where=path, fix=suggest(name, chunk.names))
    return listed(chunk.data[name])


def _keyed(path: str, chunk: Chunk, row: int, value: Any) -> bytes:
    fine = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))
    if not fine or value == "":
        shown = "nothing" if value is MISSING or value is None else preview(value)
        raise InputError(f"{shown} where a key should be", where=f"{path}, row {chunk.rows[row]}", fix="mend the row")
    return str(value).encode("utf-8", "surrogatepass")


def _rows(chunk: Chunk, asked: Ask) -> list[Any]:
    """What each row holds besides its key: its attributes, or its columns."""
    if asked.form == "dolma":
        return listed(chunk.data.get("attributes", [MISSING] * len(chunk.rows)))
    columns = {name: listed(values) for name, values in chunk.data.items()}
    return [{name: values[i] for name, values in columns.items()} for i in range(len(chunk.rows))]


def _found(row: Any, column: str) -> Any:
    """A value by its name, by a dotted path, or by its name in `metadata` (a table, or JSON in a string)."""
    if not isinstance(row, dict):
        return MISSING
    if column in row:
        return row[column]
    head, _, rest = column.partition(".")
    inner = row.get(head if rest else "metadata", MISSING)
    if isinstance(inner, str):
        try:
            inner = json.loads(inner)
        except (ValueError, RecursionError):
            return MISSING
    return _found(inner, rest or column) if isinstance(inner, dict) and (rest or column in inner) else MISSING


def _numbers(path: str, chunk: Chunk, found: list[Any], asked: Ask) -> np.ndarray:
    """`[n, 1]`, or `[n, 4]` of dolma's spans. A row without the attribute has no span of it; NaN in other forms."""
    made = []
    for i, value in enumerate(found):
        one = spanned(value) if asked.form == "dolma" else _number(value)
        if one is None:
            what = "spans [start, end, score]" if asked.form == "dolma" else "a number, true or false"
            raise InputError(
                f"{asked.column} is {preview(value)}", where=f"{path}, row {chunk.rows[i]}", why=f"it must be {what}",
                fix="name another column, or mend the row",
            )  # fmt: skip
        made.append(one)
    return np.array(made, dtype=np.float64).reshape(len(found), -1)


def _number(value: Any) -> tuple[float] | None:
    if value is MISSING or value is None:
        return (np.nan,)
    if isinstance(value, str):  # a table of text, such as csv
        try:
            value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), None) or float(value)
        except ValueError:
            return (0.0,) if value.strip().lower() == "false" else None
    if not isinstance(value, bool | int | float) or not np.isfinite(value):
        return None
    return (float(value),)


def spanned(value: Any) -> tuple[float, float, float, float] | None:
    """Of spans [start, end, score]: sum of (end - start) score, characters in spans with a score above zero, highest
    score, number of spans. A bare number, or true, is a span over the whole, told by infinite length; None: unreadable.

    >>> spanned([[0, 10, 1.0], [10, 30, 0.5]])
    (20.0, 30.0, 1.0, 2.0)
    """
    if value is MISSING or value is None:
        return (0.0, 0.0, 0.0, 0.0)
    if isinstance(value, bool | int | float) and np.isfinite(value):
        return (float(value), np.inf, float(value), 0.0)
    if not isinstance(value, list):
        return None
    total, covered, highest = 0.0, 0.0, -np.inf
    for span in value:
        fine = isinstance(span, list) and len(span) == 3
        if not fine or not all(isinstance(x, int | float) and np.isfinite(x) for x in span) or span[0] > span[1]:
            return None
        start, end, score = span
        total, highest = total + (end - start) * score, max(highest, float(score))
        covered += (end - start) * (score > 0)
    return (float(total), float(covered), highest if value else 0.0, float(len(value)))


def _lines(path: str) -> Iterator[Verdicts]:
    """One id on each line."""
    with refusing(path), opened(path) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8")
        lines = [line.strip() for line in stream]
    yield Verdicts([line.encode() for line in lines if line], None, path)


def _uids(path: str) -> list[bytes]:
    """DataComp's: 128-bit numbers, each as two u8, as 32 hexadecimal digits."""
    with refusing(path), opened(path) as raw:
        data = raw.read()
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, MemoryError, OverflowError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError("not an array of uids", where=path, why=why, fix="numpy.save of dtype 'u8,u8'") from error
    names = array.dtype.names or ()
    if array.ndim != 1 or [array.dtype[name] for name in names] != [np.dtype(np.uint64)] * 2:
        why = f"its dtype is {array.dtype}, its shape {array.shape}"
        raise InputError("not an array of uids", where=path, why=why, fix="numpy.save of dtype 'u8,u8', one dimension")
    high, low = (array[name].tolist() for name in names)
    return [f"{a:016x}{b:016x}".encode() for a, b in zip(high, low, strict=True)]


def uids(ids: Sequence[bytes]) -> np.ndarray:
    """The inverse, sorted, as DataComp's resharder wants it. Raises `InputError` for ids of another form."""
    made = []
    for name in ids:
        if not re.fullmatch(rb"[0-9a-f]{32}", name):
            raise InputError(
                f"id {name.decode()!r} is no uid", why="DataComp's are 128-bit numbers in 32 hexadecimal digits",
                fix="export in another form, or drop copies first: ids from contents are such numbers but for copies",
            )  # fmt: skip
        number = int(name, 16)
        made.append((number >> 64, number & (2**64 - 1)))
    return np.sort(np.array(made, dtype=UID))
