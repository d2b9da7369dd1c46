"""Columns as users have them, to Arrow columns: strings, images, and what is carried along.

Each function notes in `bad` (row -> reason) the rows that do not fit; the first reason stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute

from assay.core.errors import InputError
from assay.data.formats import MISSING, filesystem, is_hub, not_utf8, preview, value_of

pc: Any = pyarrow.compute  # its functions are made at run time, where type checkers do not see them

IMAGE_BYTES = 32 * 2**20 - 1  # with 64 images a batch this keeps within the 2 GiB of an Arrow binary column
PEEK_ROWS = 100  # what the columns and types of a file are judged by
NUMBER, FLAG, STRING = pa.float64(), pa.bool_(), pa.string()


def plain(array: Any) -> Any:
    """The values of an Arrow column without dictionary and extension."""
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def listed(values: Any) -> list[Any]:
    """The Python values of a column of either kind."""
    if not isinstance(values, pa.Array):
        return values
    try:
        return plain(values).to_pylist()
    except UnicodeDecodeError:
        return [value_of(scalar) for scalar in plain(values)]


def is_text(kind: Any) -> bool:
    t = pa.types
    tests = (t.is_null, t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary)
    return any(test(kind) for test in tests)


def is_scalar(values: Any) -> bool:
    if isinstance(values, pa.Array):
        return not pa.types.is_nested(plain(values).type)
    return not any(isinstance(value, (list, dict)) for value in values)


def kind_of(name: str, path: str, values: Any, loose: bool) -> Any:
    """The Arrow type under which a column is kept, or None when it is all null so far."""
    if not isinstance(values, pa.Array):
        kind = None
        for value in values:
            kind = merged(name, path, kind, _value_kind(_parsed(value) if loose else value), lists=False)
        return kind
    array, t = plain(values), pa.types
    if t.is_nested(array.type):
        if not t.is_list(array.type) and not t.is_large_list(array.type) and not t.is_fixed_size_list(array.type):
            raise InputError(f"cannot keep column '{name}'", where=path, why=f"its type is {array.type}")
        return kind_of(name, path, array.slice(0, PEEK_ROWS).to_pylist(), False)
    if t.is_null(array.type):
        return None
    if t.is_integer(array.type) or t.is_floating(array.type) or t.is_decimal(array.type):
        return NUMBER
    return FLAG if t.is_boolean(array.type) else STRING


def _value_kind(value: Any) -> Any:
    if value is None or value is MISSING:
        return None
    if isinstance(value, list):
        return pa.list_(NUMBER, len(value))
    return FLAG if isinstance(value, bool) else NUMBER if isinstance(value, (int, float)) else STRING


def merged(name: str, path: str, a: Any, b: Any, *, lists: bool = True) -> Any:
    """One type for two: scalars of two kinds are kept as strings; lists of two lengths have none (between files)."""
    if a is None or b is None or a == b:
        return b if a is None else a
    if not pa.types.is_nested(a) and not pa.types.is_nested(b):
        return STRING
    if lists:
        why = f"{b} here, {a} in the files before"
        raise InputError(f"column '{name}' changes its type", where=path, why=why, fix=f"leave '{name}' out of `keep`")
    return a  # within a file the first row decides, and other rows are set aside


def _parsed(cell: Any) -> Any:
    """The value that a csv cell looks like: nothing, a number, true or false, a list of numbers, or itself."""
    if not isinstance(cell, str) or not cell.strip():
        return None
    if cell in ("true", "false", "True", "False"):
        return cell in ("true", "True")
    try:
        if cell[0] == "[":
            return json.loads(cell)
        return cell if "_" in cell else float(cell)  # float("1_000") is 1000, and 1_000 is a name
    except (ValueError, RecursionError):
        return cell


def note(bad: dict[int, str], mask: Any, reason: Callable[[int], str]) -> None:
    for i in pc.indices_nonzero(mask.fill_null(False)).to_pylist():
        bad.setdefault(i, reason(i))


def text_column(values: Any, name: str, max_chars: int, bad: dict[int, str]) -> Any:
    text = string_column(values, "text", f"no column '{name}'", (str,), bad)
    note(bad, pc.is_null(text), lambda i: "null text")
    note(bad, pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0), lambda i: "empty text")
    note(bad, pc.match_substring(text, "\0"), lambda i: "text contains NUL bytes")
    length = pc.utf8_length(text)
    long = f"characters exceeds max_chars={max_chars}; split the document"
    note(bad, pc.greater(length, max_chars), lambda i: f"text of {length[i]} {long}")
    return text


def chat_columns(values: Any, name: str, bad: dict[int, str]) -> tuple[list[str | None], list[str | None]]:
    """Prompts and completions of chats, lists of {role, content}: the last turn of the assistant is the completion,
    and the prompt is the turns before it, a line each, `role: content`. Turns may also stand there as JSON."""
    prompts: list[str | None] = []
    completions: list[str | None] = []
    for i, value in enumerate(listed(values)):
        prompt, completion, reason = None, None, f"no column '{name}'" if value is MISSING else ""
        if not reason:
            try:
                given = json.loads(value) if isinstance(value, str) else value
                turns = [(turn["role"], turn["content"]) for turn in given]
                last = max(k for k, (role, _) in enumerate(turns) if role == "assistant")
                prompt = "\n".join(f"{role}: {content}" for role, content in turns[:last])
                completion = turns[last][1]
            except ValueError:
                reason = "no turn of the assistant" if not isinstance(value, str) else "not a chat"
            except (TypeError, KeyError):
                reason = "not a chat: turns are {role, content}"
        if reason:
            bad.setdefault(i, reason)
        prompts.append(prompt)
        completions.append(completion)
    return prompts, completions


def string_column(values: Any, label: str, absent: str, accept: tuple[type, ...], bad: dict[int, str]) -> Any:
    """A column as Arrow strings. Null where it is null, where it is missing (for the reason `absent`) or bad."""
    try:
        if not isinstance(values, pa.Array):
            return pa.array(values, STRING)
        values = plain(values)
        # Files may carry strings that are not UTF-8, and only the cast from binary looks.
        return values.cast(pa.large_binary()).cast(STRING) if is_text(values.type) else values.cast(STRING)
    except (pa.ArrowException, UnicodeEncodeError):
        pass  # at least one value does not fit: find out which
    if isinstance(values, pa.Array):
        values = (values.cast(pa.large_binary()) if is_text(values.type) else values).to_pylist()
    out: list[str | None] = []
    for i, value in enumerate(values):
        found, reason = _string(value, label, absent, accept)
        if reason:
            bad.setdefault(i, reason)
        out.append(found)
    return pa.array(out, STRING)


def _string(value: Any, label: str, absent: str, accept: tuple[type, ...]) -> tuple[str | None, str]:
    """(the string or None, why it is bad or nothing)."""
    if value is MISSING or value is None:
        return None, absent if value is MISSING else ""
    try:
        if isinstance(value, bytes):
            return value.decode(), ""
        if isinstance(value, str):
            value.encode()
            return value, ""
    except UnicodeDecodeError as error:
        return None, not_utf8(error)
    except UnicodeEncodeError:
        return None, f"{label} has lone surrogates"
    if type(value) in accept:
        return json.dumps(value), ""
    return None, f"{label} is not a string ({type(value).__name__})"


def kept_column(values: Any, name: str, kind: Any, loose: bool, bad: dict[int, str]) -> Any:
    """A column of `keep` in its type; rows that do not fit are set aside."""
    if kind == STRING:
        if loose:
            values = [value or None for value in values]
        return string_column(values, f"column '{name}'", "", (str, int, float, bool), bad)
    if isinstance(values, pa.Array):
        try:
            return plain(values).cast(kind)
        except pa.ArrowException:
            values = values.to_pylist()
    out: list[Any] = []
    for i, value in enumerate(values):
        value = _parsed(value) if loose else value
        fits = value is None or value is MISSING or _fits(value, kind)
        if not fits:
            bad.setdefault(i, f"column '{name}' is not {_described(kind)} ({preview(value)[:40]})")
        out.append(None if value is MISSING or not fits else value)
    return pa.array(out, kind)


def _fits(value: Any, kind: Any) -> bool:
    if kind == FLAG:
        return isinstance(value, bool)
    if kind == NUMBER:
        exact = not isinstance(value, int) or abs(value) <= 2**53  # beyond this a float64 would change it
        return isinstance(value, (int, float)) and not isinstance(value, bool) and exact
    return isinstance(value, list) and len(value) == kind.list_size and all(_fits(item, NUMBER) for item in value)


def _described(kind: Any) -> str:
    if kind == FLAG:
        return "true or false"
    return "a number exact in float64" if kind == NUMBER else f"a list of {kind.list_size} numbers"


def image_column(values: Any, name: str, path: str, bad: dict[int, str]) -> Any:
    """Encoded image bytes, from bytes, from paths, or from the structs of `datasets`."""
    out: list[bytes | None] = []
    for i, value in enumerate(listed(values)):
        data, reason = _image(value, name, path)
        if data is not None and len(data) > IMAGE_BYTES:
            data, reason = None, f"image of {len(data)} bytes exceeds {IMAGE_BYTES}"
        if not reason and not data:
            reason = "empty image"
        if reason:
            bad.setdefault(i, reason)
        out.append(data)
    return pa.array(out, pa.binary())


def _image(value: Any, name: str, path: str) -> tuple[bytes | None, str]:
    """(the bytes or None, why they are bad or nothing)."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is MISSING:
        return None, f"no column '{name}'"
    if value is None:
        return None, "null image"
    if isinstance(value, bytes):
        return value, ""
    if not isinstance(value, str):
        return None, f"image is neither bytes nor a path ({type(value).__name__})"
    if not value.strip():
        return None, "empty image"
    shown = preview(value)
    if "://" in value or is_hub(path):
        return None, f"image is a URL, not a file beside its table: {shown}"
    if value.startswith(("/", "~")) or ".." in value.replace("\\", "/").split("/"):
        # A table from elsewhere could otherwise carry any file of this machine into the published dataset.
        return None, f"image path leaves the folder of its table: {shown}"
    try:
        fs, inner = filesystem(path)
        place = f"{inner.rpartition('/')[0]}/{value}"
        if (fs.info(place)["size"] or 0) > IMAGE_BYTES:
            return None, f"image of {fs.info(place)['size']} bytes exceeds {IMAGE_BYTES}"
        return fs.cat_file(place), ""
    except FileNotFoundError:
        return None, f"file not found: {shown}"
    except (OSError, ValueError) as error:
        return None, f"image cannot be read ({getattr(error, 'strerror', None) or error}): {shown}"
