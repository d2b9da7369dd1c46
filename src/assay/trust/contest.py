"""Who is held against retraining: the methods with their grids, the nulls, and their scores for each target."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import decode_ids
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.study import Study, variants

if TYPE_CHECKING:
    from assay.job import Job

# What is asked of scores when the study does not say; `trak` with the option it depends on most.
DEFAULT_METHODS: tuple[Any, ...] = ("gradcos", {"name": "trak", "grid": {"damping": [0.01, 0.1, 1.0, 10.0]}})
RANDOM = "random"


@dataclass
class Entry:
    """A contestant: the variants among which the selecting half chooses, then the one chosen and its scores."""

    name: str
    null: bool
    variants: list[Scorer]
    tried: list[dict[str, Any]]
    """The options in which the variants differ, and their LDS on the selecting half."""
    chosen: int = 0
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """`[n, q]` of the chosen variant, a column for each target."""
    error: str = ""

    @property
    def method(self) -> Scorer:
        return self.variants[self.chosen]


def nulls(pool: Pool) -> dict[str, Any]:
    """What any method must beat: chance, what the model finds easy, likeness to the target, and one dot product."""
    likeness: dict[str, Any] = {}
    if "text" in pool.columns:
        likeness = {"bm25": "bm25"}
    elif column := vectors(pool):
        likeness = {"nearest": {"name": "nearest", "features": {"name": "column", "column": column}}}
    return {RANDOM: RANDOM, "loss": "loss", **likeness, "graddot": "graddot"}


def vectors(pool: Pool) -> str | None:
    """The longest column of vectors, if there is one."""
    first = pool.at([0])
    sizes = {name: len(first.column(name)[0]) for name in pool.columns if isinstance(first.column(name)[0], list)}
    return max(sizes, key=lambda name: sizes[name], default=None)


def entries(study: Study, pool: Pool) -> list[Entry]:
    """The study's methods and the nulls, each asked for every target by itself where it can be."""
    if "methods" in study.model_fields_set or study.arms:
        listed = [arm for arm in study.contestants() if not arm.name.startswith("random-")]
    else:
        listed = study.model_copy(update={"methods": DEFAULT_METHODS}).contestants()
        listed = [arm for arm in listed if not arm.name.startswith("random-")]
    if told := [arm.name for arm in listed if arm.order is not None]:
        raise InputError(
            f"{', '.join(told)}: an order does nothing here", where="methods", why="scores are held against retraining",
            fix="drop it; `assay run` trains in it",
        )  # fmt: skip
    wanted, found = nulls(pool), []
    for name, null in wanted.items():
        if name not in [arm.name for arm in listed]:
            found.append(Entry(name, True, [each(make(Scorer, null), study)], [{}]))
    for arm in listed:
        kinds = variants(arm.method, arm.grid) if arm.grid else [arm.method]
        tried = [{key: kind[key] for key in arm.grid} for kind in kinds] if arm.grid else [{}]
        found.append(Entry(arm.name, arm.name in wanted, [each(make(Scorer, k), study) for k in kinds], tried))
    return found


def each(method: Scorer, study: Study) -> Scorer:
    """The method, and the scorers that it holds, with a score for each target example, of what is measured, where
    their options allow."""
    known = {f.name for f in dataclasses.fields(method)}
    changes: dict[str, Any] = {"targets": "each"} if "targets" in known else {}
    if study.lds.measure == "margin":
        features, queries = (getattr(method, name, None) for name in ("features", "queries"))
        if "measure" in known:
            changes["measure"] = "margin"
        elif "queries" in known and queries is None and hasattr(features, "measure"):
            changes["queries"] = dataclasses.replace(features, measure="margin")  # type: ignore[type-var]
    held = {name: getattr(method, name) for name in known}
    changes |= {name: each(inner, study) for name, inner in held.items() if isinstance(inner, Scorer)}
    return dataclasses.replace(method, **changes)


def scores(job: Job, method: Scorer) -> tuple[np.ndarray, bool]:
    """Scores `[n, q]` in the order of pool and target, and whether they are for each target by itself."""
    table = job.measurer.table(method).align(job.pool.ids)
    wanted = decode_ids(job.target.selecting.ids)
    place = {name: at for at, name in enumerate(table.columns)}
    if len(wanted) > 1 and all(name in place for name in wanted):
        return table.values[:, [place[name] for name in wanted]].astype(np.float64), True
    return np.repeat(table.values[:, :1].astype(np.float64), len(wanted), axis=1), False
