"""Contestants of one world: how each is scored, how its options are chosen, and the rows that come of it.

Every contestant, ours or a peer's, is treated alike: its grid is scored on up to 50 targets of the side that chooses,
the option with the best LDS there is scored anew on all targets, timed, and its LDS is reported on the other side.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from assay.core.keys import digest
from assay.core.method import Mark, Scorer, make
from assay.core.run import Run
from assay.measure import Measurer
from assay.numerics import lds

from .attribution import Job, Library, export, run
from .truth import Truth

Row = dict[str, Any]
Options = dict[str, Any]
# At most so many targets choose.
TUNING = {"R0": 50, "R1": 25, "R2": 25, "R3": 32, "R3-smooth": 32, "R2-10": 16, "R2-50": 16}
OURS = "assay"


def grid(**choices: list[Any]) -> list[Options]:
    """Every combination; one empty one for no choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@dataclass(frozen=True)
class Contestant:
    """`method` names the row. `spec`: our scorer's table, or a peer's {"method": ...}; `options` are laid over it."""

    method: str
    spec: Mapping[str, Any]
    options: list[Options] = field(default_factory=lambda: [{}])
    tool: str = OURS
    kind: str = "full"
    """Of the scoring models, see `Truth.models`."""
    count: int = 1
    marks: int = 1
    function: Callable[[Truth, list[list[Mark]], Options, np.ndarray], np.ndarray] | None = None
    """Scores `[targets, pool]` in place of `spec`, where the scorer itself takes one target at a time."""
    reported: bool = False
    """Whether only the targets that figures are of are asked for: where nothing is chosen and each costs a sweep."""
    like: str = ""
    """The contestant of the same tool whose chosen option it takes: for one that is the same object, dearly solved."""


@dataclass
class Scores:
    """`values` [targets, pool] (or one row for all targets), and the seconds they took."""

    values: np.ndarray
    seconds: float


@dataclass
class Contest:
    """What was scored and chosen in one world."""

    world: Truth
    libraries: dict[str, Library]
    workers: int
    quick: bool = False
    chosen: dict[tuple[str, str], Options] = field(default_factory=dict)
    results: dict[tuple[str, str], dict[str, lds.Lds]] = field(default_factory=dict)
    scored: dict[tuple[str, str], Scores] = field(default_factory=dict)
    """For the targets that figures are of, or one row for all."""
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def tuning(self) -> np.ndarray:
        return self.world.sides[0][: 10 if self.quick else TUNING[self.world.case]]

    def enter(self, contestant: Contestant) -> None:
        """Choose the options, score, and add the rows. What fails is told at once, and again at the end of the run."""
        if contestant.tool != OURS and contestant.tool not in self.libraries:
            return
        try:
            self._enter(contestant)
        except Exception as error:
            self.failed.append(f"{self.world.case}: {contestant.tool} {contestant.method}: {error!r}")
            print(self.failed[-1], file=sys.stderr)

    def _enter(self, contestant: Contestant) -> None:
        self.chosen[contestant.tool, contestant.method] = options = self._choose(contestant)
        own = self.world.sides[1]
        (found,) = self.score(contestant, [options], own if contestant.reported else np.arange(len(self.world.targets)))
        values = found.values if len(found.values) in (1, len(own)) else found.values[own]
        self.scored[contestant.tool, contestant.method] = Scores(values, found.seconds)
        held = self.results.setdefault((contestant.tool, contestant.method), {})
        for label in ("lds_fixed", "lds_avg"):
            if label == "lds_fixed" and self.world.protocol == "subset":
                continue  # every half has an order of its own
            held[label] = result = self.lds(values, own, label)
            tool = OURS if contestant.tool == OURS else self.libraries[contestant.tool].tool
            ci, name = [result.low, result.high], contestant.method
            self.rows.append(row(self.world.case, tool, name, label, result.value, ci, found.seconds, options))
            told(self.rows[-1])

    def lds(self, values: np.ndarray, targets: np.ndarray, label: Any) -> lds.Lds:
        """LDS of scores `[targets or 1, pool]` with its interval."""
        return lds.score(
            self.world.masks, values.T, self.world.values[:, :, targets], label=label, fingerprint=self.print(targets)
        )

    def print(self, targets: np.ndarray) -> str:
        return lds.fingerprint({"case": self.world.case}, self.world.masks, self.world.values[:, :, targets])

    def _choose(self, contestant: Contestant) -> Options:
        if contestant.like:
            return self.chosen[contestant.tool, contestant.like]
        if len(contestant.options) == 1:
            return contestant.options[0]
        tuning, best = self.tuning, (-2.0, contestant.options[0])
        for options, found in zip(contestant.options, self.score(contestant, contestant.options, tuning), strict=True):
            if not np.isfinite(found.values).all():
                continue  # diverged
            measured = self.world.values[:, :, tuning].mean(axis=1)
            best = max(best, (float(lds.lds(self.world.masks, found.values.T, measured).mean()), options), key=_first)
        return best[1]

    def score(self, contestant: Contestant, options: list[Options], targets: np.ndarray) -> list[Scores]:
        trajectories = self.world.models(contestant.kind, contestant.count, contestant.marks)
        if contestant.function:
            return [timed(contestant.function, self.world, trajectories, o, targets) for o in options]
        if contestant.tool == OURS:
            return [ours(self.world, overlay(contestant.spec, o), trajectories, targets, self.workers) for o in options]
        return theirs(self.world, self.libraries[contestant.tool], contestant, options, trajectories, targets)


def row(
    case: str, tool: str, method: str, metric: str, value: float, ci: list[float] | None, seconds: float = 0.0,
    options: Options | None = None,
) -> Row:  # fmt: skip
    """One line of the long form."""
    return {
        "bench": "influence", "case": case, "tool": tool, "method": method, "metric": metric, "value": value, "ci": ci,
        "seconds": seconds, "options": options or {},
    }  # fmt: skip


def told(row: Row) -> None:
    """A line on stderr while the run goes on."""
    low, high = row["ci"] or (float("nan"), float("nan"))
    text = f"{row['case']:<4} {row['tool']:<18} {row['method']:<22} {row['metric']:<10} {row['value']:6.3f}"
    print(f"{text} [{low:.3f}, {high:.3f}] {row['seconds']:8.2f} s   {row['options'] or ''}", file=sys.stderr)


def _first(pair: tuple[float, Options]) -> float:
    return pair[0]


def overlay(spec: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """`options` over a table; a dotted key reaches into the table of a nested method."""
    made = {k: dict(v) if isinstance(v, Mapping) else v for k, v in spec.items()}
    for key, value in options.items():
        outer, _, inner = key.partition(".")
        if inner:
            made[outer] = overlay(made[outer], {inner: value})
        else:
            made[outer] = value
    return made


def timed(function: Any, *given: Any) -> Scores:
    start = time.perf_counter()
    values = function(*given)
    return Scores(values, time.perf_counter() - start)


def ours(
    world: Truth, spec: Mapping[str, Any], trajectories: list[list[Mark]], targets: np.ndarray, workers: int
) -> Scores:
    """By the verb `score` itself: features and scores on disk, checked and all, in a new run of its own."""
    asked = world.targets.at(targets)
    encodings = {pool.fingerprint: world.encoded(pool) for pool in (world.pool, asked)}
    method = make(Scorer, dict(spec))
    with tempfile.TemporaryDirectory(prefix="assay-influence-") as folder:
        opened = Run.open(Path(folder, "run"), {"name": "influence"})
        try:
            measurer = Measurer(
                opened, world.pool, asked, task=world.task, encodings=encodings, workers=workers, batch=256,
                models=[run[-1].params for run in trajectories], trajectories=trajectories,
                optimisers=[run[-1].optimiser for run in trajectories], key=digest(world.case, len(trajectories)),
                area=4096, recipe=world.recipe,
            )  # fmt: skip
            start = time.perf_counter()
            table = measurer.table(method)
            values = table.values.T
            seconds = time.perf_counter() - start
        finally:
            opened.close()
    if table.columns[0] == "score":
        values = values[:1]  # further columns are about the score
    else:
        assert list(table.columns) == [i.decode() for i in asked.ids.tolist()], "a column for each target, in order"
    return Scores(values, seconds)


def theirs(
    world: Truth, library: Library, contestant: Contestant, options: list[Options], trajectories: list[list[Mark]],
    targets: np.ndarray,
) -> list[Scores]:  # fmt: skip
    """By a peer: all options in one process, each timed alone."""
    marks = [mark for run in trajectories for mark in run]
    jobs = [job(contestant, o, marks) for o in options]
    with tempfile.TemporaryDirectory(prefix="assay-peers-") as place:
        folder = Path(place)
        export(folder, *described(world, targets), [mark.params for mark in marks], jobs)
        return [Scores(values, seconds) for values, seconds in run(library, folder, len(jobs))]


def job(contestant: Contestant, options: Options, marks: list[Mark]) -> Job:
    spec = dict(contestant.spec)
    method = spec.pop("method")
    rates = {"rates": [mark.rate for mark in marks]} if contestant.marks > 1 else {}
    return {"method": method, "models": list(range(len(marks))), "options": {**spec, **rates, **options}}


def described(world: Truth, targets: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The world as the peers' scripts read it: world.json but for the jobs, and the arrays."""
    task, pools = world.task, {"pool": world.pool, "targets": world.targets.at(targets)}
    about = task.describe()
    if about["task"] == "text":
        arrays: dict[str, np.ndarray] = {}
        for name, pool in pools.items():
            encoded = world.read(pool)
            rows = [np.concatenate([[0], encoded.padded(np.array([k]), 0)[0][0]]) for k in range(len(encoded))]  # type: ignore[attr-defined]
            arrays[name] = np.concatenate(rows).astype(np.int64)
            arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, rows)])
        return {k: about[k] for k in ("vocab", "width", "layers", "heads", "context")}, arrays
    read = {name: world.read(pool).inputs(np.arange(len(pool))) for name, pool in pools.items()}
    arrays = {
        "x": read["pool"]["x"].numpy(), "y": read["pool"]["y"].numpy(), "tx": read["targets"]["x"].numpy(),
        "ty": read["targets"]["y"].numpy(),
    }  # fmt: skip
    sizes = [about["inputs"], *about["hidden"], about["classes"]]
    return {"sizes": sizes, "activation": about.get("activation", "gelu"), "measure": world.measure}, arrays


def centred(contestant: Contestant) -> Contestant:
    """The same at a model that was trained at data weights 1/2, as halves have them on average."""
    return replace(contestant, method=f"{contestant.method}-center-alpha", kind="center")
