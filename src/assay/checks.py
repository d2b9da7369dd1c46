"""The checks of a run: what its methods measured of themselves, and the rules that every selection is held to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.core.keys import canonical
from assay.core.pool import positions
from assay.core.table import Table
from assay.measure import closure

if TYPE_CHECKING:
    from pathlib import Path

    from assay.job import Job

# Arms that a check is named after.
NAMED = 3


def of(job: Job) -> list[dict[str, Any]]:
    """Each with its `name` and `detail`, the `arms` that it is of, and `ok`: None where there is no bound. Those with a
    `rule` hold for every arm of every run."""
    return [*_notes(job), *_rules(job)]


def _rules(job: Job) -> Iterator[dict[str, Any]]:
    def rule(arm: str, what: str, ok: bool, detail: str) -> dict[str, Any]:
        return {"name": f"{arm}: {what}", "ok": ok, "detail": detail, "arms": [arm], "rule": True}

    for name, method in job.methods.items():
        ids = job.measurer.table(method).ids
        whole = len(ids) == len(job.pool) and bool((ids == job.pool.ids).all())
        yield rule(name, "every id scored once", whole, f"{len(ids)} of {len(job.pool)} rows")
    limit, unit = job.budget.amount, job.budget.unit
    for name, selection in job.selections.items():
        if name != "everything":
            used = int(job.sizes[positions(job.pool.ids, selection.ids)].sum()) if unit == "tokens" else len(selection)
            yield rule(name, "within budget", used <= limit, f"{used:,} of {limit:,} {unit}")
    for name, selection in job.selections.items():
        clean = not np.isin(selection.ids, job.hits.ids).any()
        yield rule(name, "no contaminated row", clean, f"{len(job.hits.ids)} rows barred")


def _notes(job: Job) -> list[dict[str, Any]]:
    """Of every filter and arm, then of the Tables that these rest on, each once."""
    filters = [(f"filter {m.name}", m, arms) for m, arms in _filters(job)]
    asked = [*filters, *((name, method, [name]) for name, method in job.methods.items())]
    named = [(name, job.measurer.path(method, job.pool), arms) for name, method, arms in asked]
    own = {path for _, path, _ in named}
    resting: dict[Path, list[str]] = {}
    for _, path, arms in named:
        for inside in (path.parent / step for step in closure(path)[1:]):
            if inside not in own:
                resting.setdefault(inside, []).extend(arms)
    told = [_check(f"{name}: {said}", note, arms) for name, path, arms in named for said, note in _of(job, path)]
    inner: dict[str, dict[str, Any]] = {}
    for path, several in resting.items():
        arms = list(dict.fromkeys(several))
        who = ", ".join(arms[:NAMED]) + (f" and {len(arms) - NAMED} more" if arms[NAMED:] else "")
        for said, note in _of(job, path, who):
            # Of several models there is one line: one that is not ok, if any.
            if said not in inner or note.get("ok") is False:
                inner[said] = _check(said, note, arms)
    return [*told, *inner.values()]


def _check(name: str, note: dict[str, Any], arms: list[str]) -> dict[str, Any]:
    return {"name": name, "ok": note.get("ok"), "detail": note["detail"], "arms": arms}


def _of(job: Job, path: Path, who: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The notes of a Table by what they are about, after `who` rests on it and its method. None of what a method only
    tried: that stands in Tables over another pool or for another target."""
    meta = Table.about(path) or {}
    if meta.get("pool") != job.pool.fingerprint or meta["target"] not in (None, job.target.selecting.fingerprint):
        return
    own = meta["estimator"]["name"]
    for what, note in meta.get("notes", {}).items():
        said = what.removeprefix(f"{own}: ")
        yield f"{who} ({own}): {said}" if who else said, note


def _filters(job: Job) -> list[tuple[Any, list[str]]]:
    """Each filter's method once, and the arms that have it."""
    held: dict[str, tuple[Any, list[str]]] = {}
    for arm, filters in job.filters.items():
        for one in filters:
            held.setdefault(canonical(one.method.spec()), (one.method, []))[1].append(arm)
    return list(held.values())
