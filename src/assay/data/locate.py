"""Which files a path means: a file, a directory, a glob, a directory saved by `datasets`, a hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

from assay.core.errors import InputError
from assay.data.formats import FORMATS, filesystem, format_of, is_hub, missing, suggest, unreachable

Found = dict[str, tuple[str, int, str]]  # path -> sort key: directory, place among its parts, name

DATASETS_OWN = ("state.json", "dataset_info.json", "dataset_dict.json")  # descriptions, not rows


def expand(path: str) -> Found:
    """The files behind one path, each with its sort key."""
    if not path:
        raise InputError("an empty path", where="paths", fix="name a file, a directory or a glob")
    if is_hub(path):
        return {path: _key(path)}
    fs, inner = filesystem(path)
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    name: Callable[[str], str] = (lambda p: p) if local else fs.unstrip_protocol
    try:
        is_directory, exists = fs.isdir(inner), fs.exists(inner)
    except OSError:
        raise
    except Exception as error:  # each remote filesystem has its own exceptions
        raise unreachable(path, error) from error
    if is_directory:
        return _directory(path, fs, inner, name)
    if exists:
        if not format_of(path):
            raise _unknown(path)
        return {name(inner): _key(name(inner))}
    if not set("*?[") & set(inner):
        raise missing(path)
    matches = {p: info for p, info in fs.glob(inner, detail=True).items() if not _hidden(p[len(_fixed(inner)) :])}
    if not matches:
        raise InputError(
            "no file matches", where=path, fix="check the pattern; quote it so that the shell leaves it alone"
        )
    found = {name(p): _key(name(p)) for p, info in matches.items() if info["type"] != "directory" and format_of(p)}
    for p, info in matches.items():
        if info["type"] == "directory" and "**" not in inner:
            found.update(_directory(name(p), fs, p, name))
    if not found:
        raise _unknown(name(next(iter(matches))))
    return found


def _directory(path: str, fs: Any, inner: str, name: Callable[[str], str]) -> Found:
    root = inner.rstrip("/") + "/"
    inside = [p for p in fs.find(inner, on_error="raise") if not _hidden(p.removeprefix(root))]
    if root + "dataset_dict.json" in inside:
        splits = _json(fs, root + "dataset_dict.json").get("splits", [])
        if len(splits) > 1:
            why, fix = f"it has: {', '.join(splits)}", f"name one: {path.rstrip('/')}/{splits[0]}"
            raise InputError("a dataset of several splits", where=path, why=why, fix=fix)
    found: Found = {}
    saved: dict[str, list[str]] = {}  # directory written by `datasets` -> its files in order
    for p in inside:
        if p.endswith("/state.json") and "_data_files" in (state := _json(fs, p)):
            try:
                saved[p.removesuffix("/state.json")] = [str(entry["filename"]) for entry in state["_data_files"]]
            except (KeyError, TypeError) as error:
                raise InputError("the file is not one of `datasets`", where=p, why="bad _data_files") from error
    for folder, parts in saved.items():
        for i, part in enumerate(parts):
            if not fs.exists(f"{folder}/{part}"):
                raise missing(name(f"{folder}/{part}"))
            found[name(f"{folder}/{part}")] = (name(folder), i, part)
    described = {p.rpartition("/")[0] for p in inside if p.endswith("/dataset_info.json")}
    for p in inside:
        folder, _, base = p.rpartition("/")
        cache = folder in described and base.startswith("cache-")  # what `map` left behind
        if format_of(p) and folder not in saved and base not in DATASETS_OWN and not cache:
            found[name(p)] = _key(name(p))
    if not found:
        known = " ".join(FORMATS)
        raise InputError("no data files in this directory", where=path, why=f"suffixes looked for: {known}")
    return found


def _json(fs: Any, path: str) -> dict[str, Any]:
    try:
        value = json.loads(fs.cat_file(path))
    except ValueError as error:
        raise InputError("the file is truncated or corrupt", where=path, why=str(error)) from error
    return value if isinstance(value, dict) else {}


def _key(path: str) -> tuple[str, int, str]:
    folder, _, base = path.rpartition("/")
    return folder, 0, base


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _fixed(pattern: str) -> str:
    """The directories of a glob before its first wildcard: a hidden one among them was named on purpose."""
    return re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]


def _unknown(path: str) -> InputError:
    suffix = os.path.splitext(path.removesuffix(".gz").removesuffix(".zst"))[1] or path.rpartition("/")[2]
    return InputError("unknown kind of file", where=path, why=f"by its suffix, {suffix}", fix=suggest(suffix, FORMATS))
