"""The study that `assay init` writes: commented, filled in from a look at the pool."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from assay.core.errors import InputError
from assay.data import readers
from assay.data.formats import preview

_STUDY = """\
# A study for `assay run`. Every key may be overridden with --set key.subkey=value.
name = {name}
seed = 0

# How much to select: a share ("10%" of tokens), tokens ("5Mtok") or examples ("20k").
budget = "10%"

# The contestants; `assay methods` lists all. `random` is always there, {random} times.
methods = ["random", "length", "loss", "exact_dup", "bm25", "loss_diff", "graddot", "trak"]

# What leaves the pool before any budget is filled, that of `random` too; one after the other.
# filters = ["exact_dup"]

# {seen}
[pool]
path = {pool}
{text:<29} # columns: {columns}
{id:<29} # ids from content unless a column is named
{domain:<29} # for the report: what each arm selects by domain
# sample = 20000              # use a random part of the pool
# truth = "defects.parquet"   # known defects by id: counted in the report, seen by no method

# What the model should become good at: some hundred examples, split into a half that selects and a half that judges.
[target]
{target}

# The model that measures and is retrained: a small decoder with its own tokenizer.
[task]
vocab = 1024
width = 64
layers = 3
heads = 4
context = 160                 # tokens; longer documents are cut

[proxy]                       # the scoring model, trained on the whole pool
models = 1                    # more: averaged scores, more cost
passes = 1.0

[train]                       # the same for every arm
repeats = 2.0                 # times through the selection

[verify]
seeds = 4                     # paired trainings of each arm
random = 3                    # independent random selections
"""


def study_for(pool: str, target: str | None, out: Path = Path("study.toml")) -> str:
    """TOML text, with paths relative to the folder of `out`. Raises `InputError` when a file cannot be read."""
    seen = readers.sniff(pool)
    text = _text(seen, pool)
    if target:
        other = readers.sniff(target)
        own = text if text in other["columns"] else _text(other, target)
        part = f"path = {_quoted(_from(out, target))}\ntext = {_quoted(own)}"
    elif seen["domain"]:
        part = '# path = "target.jsonl"\ndomain = "..."                # hold out examples of this domain of the pool'
        part += "\ncount = 400"
    else:
        part = 'path = "target.jsonl"         # put its name here\ntext = ' + _quoted(text)
    rows = "rows" if seen["rows"] is None else f"about {seen['rows']:,} rows"
    return _STUDY.format(
        name=_quoted(stem(pool, "study")), random=3, seen=f"{seen['format']}, {rows}",
        pool=_quoted(_from(out, pool)), text=f"text = {_quoted(text)}", columns=_listing(seen["columns"]),
        id=_line("id", seen["id"]), domain=_line("domain", seen["domain"]), target=part,
    )  # fmt: skip


def stem(path: str, default: str) -> str:
    """A name for what a path leads to, fit for a file.

    >>> stem("data/web pages.jsonl.gz", "run"), stem("*.jsonl", "run")
    ('web-pages', 'run')
    """
    name = path.partition("?")[0].rstrip("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^\w-]+", "-", name).strip("-")[:60] or default


def _text(seen: dict[str, Any], path: str) -> str:
    if seen["text"] is None:
        why = f"columns: {_listing(seen['columns'])}" if seen["columns"] else "it has no rows"
        raise InputError("no column looks like text", where=path, why=why, fix="give a file with a column of documents")
    return seen["text"]


def _listing(names: list[str]) -> str:
    return ", ".join(preview(name) for name in names[:30]) + (", ..." if len(names) > 30 else "")


def _line(key: str, value: str | None) -> str:
    return f"{key} = {_quoted(value)}" if value else f'# {key} = "{key}"'


def _quoted(text: str) -> str:
    """A TOML string: as in JSON, but with DEL escaped and all else that is printable left as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _from(out: Path, path: str) -> str:
    """A path as the study has to name it: relative ones start at the study's folder."""
    if "://" in path or path.startswith(("/", "~")):
        return path
    return os.path.relpath(path, out.parent)
