"""The main job: pool -> measure -> select -> train -> verify -> report, each arrow a kept step of one Run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from assay import __version__, filters
from assay.core.errors import InputError, nearest
from assay.core.keys import canonical, digest, digest_sources, encode_ids, hash_ids, write_json
from assay.core.method import Method, Scorer, Selector, make
from assay.core.pool import Pool
from assay.core.progress import Progress
from assay.core.run import Ledger, Meter, Run, environment
from assay.core.selection import Budget, Selection
from assay.core.table import Table
from assay.core.target import Target
from assay.data import gate, readers
from assay.data.ingest import read_step, store
from assay.engine import local
from assay.measure import Measurer
from assay.proxies import train_proxies
from assay.study import Study
from assay.summary import summarise
from assay.tasks import MODELLING, build_task

if TYPE_CHECKING:
    from assay.core.task import Task


@dataclass
class Job:
    """Everything the stages hand on. Each stage fills its part, in the order of `STAGES`."""

    study: Study
    run: Run
    workers: int
    progress: Progress
    command: str = ""
    pool: Pool = field(init=False)
    target: Target = field(init=False)
    truth: dict[bytes, str] = field(default_factory=dict)
    source: list[str] = field(default_factory=list)
    """The steps that the pool was read by: columns besides its contents may differ between two of them."""
    quarantined: dict[str, Any] = field(default_factory=dict)
    hits: gate.Hits = field(init=False)
    withheld: np.ndarray | None = None
    """Ids of the target that are scored but on which no scorer may choose its options."""
    task: Task | None = None
    encodings: dict[str, Path] = field(default_factory=dict)
    proxies: list[Path] = field(default_factory=list)
    measurer: Measurer = field(init=False)
    methods: dict[str, Method] = field(default_factory=dict)
    selectors: dict[str, Selector] = field(default_factory=dict)
    filters: dict[str, list[filters.Filter]] = field(default_factory=dict)
    """Of every arm, `everything` included: those of the study, then its own."""
    sieves: dict[str, filters.Sieve] = field(default_factory=dict)
    """What they left of the pool, for every arm that has some."""
    orders: dict[str, Any] = field(default_factory=dict)
    """Of the arms that have one: what is trained on is their selection in this order."""
    budget: Budget = field(init=False)
    free: dict[str, Selection] = field(default_factory=dict)
    """What each arm would take if nothing were barred: the contamination of a method is read here."""
    selections: dict[str, Selection] = field(default_factory=dict)
    recipe: Any = None
    judged: dict[str, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def sifters(self) -> list[Scorer]:
        """The scorers of all filters."""
        return [one.method for pipeline in self.filters.values() for one in pipeline]

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.progress.warn(message)

    @property
    def sizes(self) -> np.ndarray:
        """Loss terms of each pool example."""
        assert self.task is not None
        return self.task.encoded(self.encodings[self.pool.fingerprint]).sizes


def read_pool(job: Job) -> None:
    """Ingest the pool and the target, hold the target out, split it, load the truth if there is one."""
    study = job.study
    job.progress.begin("read", 2, "read pool and target")
    if study.pool.builtin:
        pool, target, job.truth = _builtin(job)
    else:
        pool, job.quarantined = _ingested(job, "pool")
        target = None
        if study.target.path is not None:
            target, _ = _ingested(job, "target")
    job.progress.advance()
    if target is None:
        pool, target = _held_out(study, pool)
    if study.pool.sample is not None and study.pool.sample < len(pool):
        keep = np.argsort(hash_ids(pool.ids, "sample", study.seed), kind="stable")[: study.pool.sample]
        pool = pool.at(np.sort(keep))
    if study.pool.truth:
        job.truth = _truth(study)
    known = set(pool.ids.tolist())
    job.truth = {i: kind for i, kind in job.truth.items() if i in known}
    job.source = list(job.run.used)
    _distinct(pool, target, study.target.id is not None and study.pool.id is not None)
    job.pool, job.target = (
        pool,
        Target.split(target, name=study.target.name, seed=study.seed, group=study.target.group or "group"),
    )
    job.progress.advance()
    job.progress.end()


def _builtin(job: Job) -> tuple[Pool, Pool, dict[bytes, str]]:
    from assay.data import images
    from assay.data.supplied import supplied

    study = job.study
    options = study.supplied()
    source = images.fingerprint(options["path"]) if study.pool.builtin == "images" else sys.version

    def build(part: Path, _: Ledger) -> None:
        *tables, about = supplied(**options)
        for name, table in zip(("pool", "target"), tables[:2], strict=True):
            store(table, part / name)
        pq.write_table(tables[2], part / "truth.parquet")
        write_json(part / "made.json", about)

    key = {**options, "path": None, "source": source}
    path = job.run.step("builtin", key, build, label="build the pool")
    truth = pq.read_table(path / "truth.parquet")
    kinds = dict(zip([i.encode() for i in truth["id"].to_pylist()], truth["kind"].to_pylist(), strict=True))
    return Pool.open(path / "pool"), Pool.open(path / "target"), kinds


def _ingested(job: Job, what: str) -> tuple[Pool, dict[str, Any]]:
    """The pool of the study's pool or target, and what was set aside: the user is told how many rows and why."""
    spec = job.study.pool if what == "pool" else job.study.target
    assert spec.path is not None
    key = spec.model_dump(mode="json", exclude={"path", "sample", "truth"})
    columns = job.study.columns(what)
    if job.study.task.module is not None:
        key |= {"columns": [columns["text"], *columns["keep"]]}
    source = readers.Source(paths=spec.path, **columns)
    step, quarantined, told = read_step(job.run, source, what=what, max_bad=spec.max_bad, key=key)
    if told:
        job.warn(told)
    return Pool.open(step), quarantined


def _held_out(study: Study, pool: Pool) -> tuple[Pool, Pool]:
    """The target is `count` keyed examples of a domain, which leave the pool."""
    domains = pool.domains()
    name = study.target.domain
    own = np.flatnonzero(domains == name)
    if len(own) < 2:
        fix = nearest(str(name), set(domains.tolist()))
        raise InputError(f"the pool has {len(own)} rows of domain {name!r}", where="target.domain", fix=fix)
    order = own[np.argsort(hash_ids(pool.ids[own], "target", study.seed), kind="stable")]
    chosen = np.sort(order[: study.target.count or study.target.HELD_OUT])
    rest = np.setdiff1d(np.arange(len(pool)), chosen)
    if not len(rest):
        raise InputError("the held-out target is the whole pool", where="target.count", fix="lower target.count")
    return pool.at(rest), pool.at(chosen)


def _truth(study: Study) -> dict[bytes, str]:
    """Kinds of known defects by id, for the report only."""
    path = Path(str(study.pool.truth))
    try:
        table = pq.read_table(path, columns=["id", study.pool.truth_kind])
    except Exception as error:
        raise InputError(
            "unreadable truth", where=path, why=str(error).splitlines()[0], fix="a Parquet file with `id` and a kind"
        ) from error
    pairs = zip(table["id"].to_pylist(), table[study.pool.truth_kind].to_pylist(), strict=True)
    return {str(i).encode(): str(kind) for i, kind in pairs}


def _distinct(pool: Pool, target: Pool, named: bool) -> None:
    if named:
        shared = np.intersect1d(pool.ids, target.ids)
        if len(shared):
            raise InputError(
                f"{len(shared)} ids stand in both the pool and the target, the first is {shared[0].decode()!r}",
                where="target", why="a target that is trained on proves nothing",
                fix="remove them from one of the two files",
            )  # fmt: skip
    same = np.isin(target.contents, pool.contents)
    if len(target) and same.mean() > 0.5:
        raise InputError(
            f"{int(same.sum())} of {len(target)} target examples stand word for word in the pool",
            where="target", why="a target that is trained on proves nothing",
            fix="hold the target out: give a file that is not in the pool, or target.domain to hold one out",
        )  # fmt: skip


def check_contamination(job: Job) -> None:
    """The gate: pool examples that contain target items are found before anything is scored."""

    def build(part: Path, _: Ledger) -> None:
        hits = gate.contamination(job.pool, job.target)
        write_json(part / "hits.json", {**dataclasses.asdict(hits), "ids": [i.decode() for i in hits.ids.tolist()]})

    job.progress.begin("gate", 1, "contamination gate")
    key = job.pool.fingerprint, job.target.selecting.fingerprint, job.target.judging.fingerprint, gate.NGRAM
    held = json.loads((job.run.step("gate", key, build, label="contamination gate") / "hits.json").read_text())
    job.hits = gate.Hits(**{**held, "ids": encode_ids(held["ids"])})
    if np.isin(job.target.judging.contents, job.pool.contents).all():
        raise InputError(
            "every judging item of the target stands word for word in the pool", where="target",
            why="nothing is left to judge on", fix="hold the target out of the pool, or give more target examples",
        )  # fmt: skip
    job.progress.advance()
    job.progress.end()


def score(job: Job) -> None:
    """Every arm's Table of scores over the pool; those of filters first, so that what they drop is known early."""
    job.measurer.check = filters.checking([one for pipeline in job.filters.values() for one in pipeline])
    for method in job.sifters:
        job.measurer.path(method, job.pool)
    _sieves(job)
    for method in job.methods.values():
        job.measurer.path(method, job.pool)
    if job.proxies:
        job.measurer.path(make(Scorer, "loss"), job.pool)
    job.warnings += job.measurer.warnings


def _sieves(job: Job) -> None:
    """What each arm's filters leave; told are those that change the mixture of domains."""
    made: dict[str, filters.Sieve] = {}
    for name, pipeline in job.filters.items():
        key = canonical([one.spec() for one in pipeline])
        if pipeline and key not in made:
            made[key] = _sieve(job, pipeline)
            for sentence in filters.findings(made[key].stages):
                if sentence not in job.warnings:
                    job.warn(sentence)
        if pipeline:
            job.sieves[name] = made[key]


def _sieve(job: Job, pipeline: list[filters.Filter], gated: bool = True) -> filters.Sieve:
    """What a pipeline leaves of the pool, or would leave if no row contained a target item."""
    barred = np.isin(job.pool.ids, job.hits.ids) & gated
    tables = [job.measurer.table(one.method) for one in pipeline]
    found = filters.sift(pipeline, tables, job.sizes, job.pool.domains(), barred)
    if not found.left.any():
        last = next(stage for stage in found.stages if not stage["out"]["rows"])
        raise InputError(
            f"the filters leave nothing: {last['name']!r} drops the last {last['in']['rows']} rows", where="filters",
            why=", ".join(f"{count} x {reason}" for reason, count in last["reasons"].items()),
            fix="loosen its bounds, or drop it",
        )  # fmt: skip
    return found


def select(job: Job) -> None:
    """Each arm's Selection at the one budget, and what it would have taken had nothing been barred."""
    job.progress.begin("select", len(job.methods), "select")
    if job.study.verify.random == 1:
        job.warn("one random arm: no interval can see how lucky its draw was; set verify.random to 3 or more")
    sizes = job.sizes
    barred = {filters.GATE: job.hits.ids}
    eligible = ~np.isin(job.pool.ids, job.hits.ids)
    countable = job.task is not None and job.task.countable
    tokens = int(sizes[eligible].sum()) if countable else None
    sieve = digest_sources(Path(filters.__file__))
    job.budget = Budget.parse(job.study.budget, examples=int(eligible.sum()), tokens=tokens)
    for name, method in job.methods.items():
        scores, selector, pipeline = job.measurer.table(method), job.selectors[name], job.filters[name]

        def build(
            part: Path, _: Ledger, scores: Any = scores, selector: Selector = selector, name: str = name,
            pipeline: list[filters.Filter] = pipeline,
        ) -> None:  # fmt: skip
            free = _sieve(job, pipeline, gated=False).dropped if pipeline else {}
            final = barred | (job.sieves[name].dropped if pipeline else {})
            for folder, bars in (("free", free), ("final", final)):
                selector.select(scores, sizes, job.budget, barred=bars).save(part / folder)

        key = {
            "scores": _place(job, method), "select": selector.spec(), "code": selector.code(),
            "budget": [job.budget.amount, job.budget.unit], "sizes": job.encodings[job.pool.fingerprint].name,
            "barred": digest([i.decode() for i in job.hits.ids.tolist()]),
            # Named only where there are some, so that what was made without them is found again.
            **({"filters": [[f.spec(), _place(job, f.method)] for f in pipeline], "sieve": sieve} if pipeline else {}),
        }  # fmt: skip
        path = job.run.step("select", key, build, label="select")
        job.free[name], job.selections[name] = Selection.open(path / "free"), Selection.open(path / "final")
        _warn_unfilled(job, name)
        job.progress.advance()
    if job.study.verify.everything:
        left = job.sieves["everything"].left if "everything" in job.sieves else eligible
        job.free["everything"] = Selection.everything(job.pool.ids)
        job.selections["everything"] = Selection.everything(job.pool.ids[left])
    job.progress.end()


def _place(job: Job, method: Method) -> str:
    """The step that holds a method's Table over the pool."""
    return job.measurer.path(method, job.pool).name


def _warn_unfilled(job: Job, name: str) -> None:
    """An arm whose filters leave less than the budget sees its examples more often: that is no equal comparison."""
    amount, unit = job.budget.amount, job.budget.unit
    if name in job.sieves:
        left = job.sieves[name].stages[-1]["out"]["tokens" if unit == "tokens" else "rows"]
        if left < amount:
            job.warn(f"the filters of {name} leave {left:,} of the {amount:,} {unit} of the budget: it is not filled")


def train_arms(job: Job) -> None:
    """Paired retraining: every arm at the same seeds, the same number of steps, judged on the judging half."""
    from assay.verify import paired_training

    spec, task = job.study.train, job.task
    assert task is not None
    budget = job.budget.amount if job.budget.unit == "tokens" else float(job.sizes.mean()) * job.budget.amount
    steps = spec.steps or max(1, math.ceil(spec.repeats * budget / spec.recipe.terms_per_step))
    job.recipe = spec.recipe.model_copy(update={"steps": steps, "seed": job.study.seed})
    trained: dict[str, Selection | list[Selection]] = dict(job.selections)
    trained |= {name: _in_order(job, name) for name in job.orders}
    job.judged = paired_training(
        job.run, task, job.pool, job.encodings, job.target.judging, trained, job.recipe,
        seeds=job.study.verify.seeds, workers=job.workers, progress=job.progress,
    )  # fmt: skip


def _in_order(job: Job, name: str) -> list[Selection]:
    """All visits of an arm's training at each seed, in the arm's order; kept beside its selection.

    What an order leaves to chance is drawn for each seed anew, so that the interval knows of it.
    """
    from assay import ordering
    from assay.verify import seeded

    scores = job.measurer.table(job.methods[name])
    terms = Table(job.pool.ids, ["terms"], job.sizes[:, None])
    losses = (lambda: job.measurer.table(make(Scorer, "loss"))) if job.proxies else None
    made = []
    for number in range(job.study.verify.seeds):
        own = seeded(job.recipe, number)
        order = partial(ordering.ordered, job.orders[name], scores=scores, sizes=terms, losses=losses, seed=own.seed)
        made.append(ordering.fitted(job.selections[name], own, lambda ids: terms.align(ids).values[:, 0], order))
        made[-1].save(job.run.path / "orders" / name / str(number))
    return made


STAGES: tuple[Callable[[Job], None], ...] = (
    read_pool,
    check_contamination,
    build_task,
    train_proxies,
    score,
    select,
    train_arms,
)


def run_study(
    study: Study, out: Path, *, workers: int | None = None, progress: Progress | None = None, replace: bool = False,
    command: str = "", report: Callable[[Path], Path] | None = None, estimate: Callable[[Job], None] | None = None,
    store: Path | None = None, watch: Callable[[Job, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Do all that a study asks and return its result (also in `result.json`). Finished steps are not done again; with
    a `store` they are kept there, for other studies as well. `watch` sees the finished job before it is published.

    Raises `InputError` for bad input. Interrupted at any moment, the same call goes on and ends in the same
    bytes, but for clocks and memory.
    """
    progress = progress or Progress()
    if study.task.kind == "causal":
        local.warm(*MODELLING)
    run = Run.open(out, study.spec(), replace=replace, command=command, store=store)
    job = Job(study, run, workers or local.default_workers(), progress, command)
    try:
        for arm in study.contestants():
            if arm.grid:
                raise InputError(
                    f"{arm.name} has a grid", where="methods", why="a run does not choose options",
                    fix="name the options to use; `assay verify` chooses among a grid on half of the targets, and "
                    "{name = 'tuned', inner = ..., grid = ...} by short trainings",
                )  # fmt: skip
            job.methods[arm.name], job.selectors[arm.name] = make(Scorer, arm.method), make(Selector, arm.select)
            job.filters[arm.name] = study.pipeline(arm)
            if arm.order is not None:
                job.orders[arm.name] = arm.order
        if study.verify.everything:
            job.filters["everything"] = study.pipeline()
        with Meter() as meter:
            for stage in STAGES:
                stage(job)
                if stage is read_pool and estimate:
                    estimate(job)
            progress.begin("report", 2, "report")
            result = result_of(job)
            export(job, result)
            if watch:
                watch(job, result)
            progress.advance()
        result |= {"wall": meter.wall, "peak_rss": meter.peak, "cpu": meter.cpu}
        run.publish(result)
        if report:
            report(out)
        progress.advance()
        progress.end()
        run.clean()
        run.done()
        return result
    finally:
        run.close()


def result_of(job: Job) -> dict[str, Any]:
    """What `result.json` holds: numbers and reasons only, so that a report can be drawn without the pool or a model."""
    assert job.task is not None
    return summarise(job) | {
        "format": 1,
        "assay": __version__,
        "name": job.study.name,
        "command": job.command,
        "environment": environment(),
        "study": job.study.spec(),
        "warnings": job.warnings,
        "ledger": job.run.ledger,
    }


def export(job: Job, result: dict[str, Any]) -> None:
    """Selections as keep-lists, and the selected dataset of every measured arm as Parquet with its card."""
    from assay.card import write_dataset

    for folder, wanted in (("selections", job.selections), ("dataset", job.selections), ("orders", job.orders)):
        for old in (job.run.path / folder).glob("*"):
            if old.name not in wanted:
                shutil.rmtree(old)
    for name, selection in job.selections.items():
        selection.save(job.run.path / "selections" / name)
    for arm in result["arms"]:
        if arm["verdict"] != "baseline":
            write_dataset(job.run.path / "dataset" / arm["name"], job.pool, job.selections[arm["name"]], arm, result)
