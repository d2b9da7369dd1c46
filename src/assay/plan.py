"""`plan`: what a study will take in time, memory and disk, from a few seconds of measurement on this machine."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from assay.core.errors import InputError
from assay.core.keys import shuffled
from assay.core.method import Featurizer, Method, Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run, resident, tree_rss
from assay.core.selection import Budget
from assay.core.target import Target
from assay.data import gate, readers
from assay.data.supplied import supplied
from assay.engine import local
from assay.measure import PASSES, Measurer, family, uses_model
from assay.study import Study
from assay.tasks import sketch_task
from assay.trust import contest
from assay.trust.cost import pace as bank_pace
from assay.trust.cost import trainings
from assay.trust.run import settled

SAMPLE = 1500
# Scorers of products with a target, which meet features that need no Table.
MEETING = ("graddot", "gradcos", "tracin")
# Seconds to fork the first worker with the heavy packages loaded, and for each later set of workers.
START, RESTART = 3.0, 0.3


@dataclass(frozen=True)
class Step:
    """One stage: seconds, and bytes of memory and disk."""

    stage: str
    seconds: float
    memory: float = 0.0
    disk: float = 0.0


@dataclass
class Plan:
    """All stages in order; `seconds` adds up, `memory` is the highest."""

    steps: list[Step] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.steps)

    @property
    def memory(self) -> float:
        return max((s.memory for s in self.steps), default=0.0)

    @property
    def disk(self) -> float:
        return sum(s.disk for s in self.steps)

    def spec(self) -> dict[str, Any]:
        steps = [asdict(s) for s in self.steps]
        return {"seconds": self.seconds, "memory": self.memory, "disk": self.disk, "steps": steps, **self.facts}


@dataclass(frozen=True)
class _Probe:
    """What a worker needs to measure the rates of a task on a sample."""

    task: Any
    path: Path
    recipe: Any
    feature: Any
    batch: int
    pace: float


def _rates(probe: _Probe, worker: int) -> dict[str, float]:
    """Terms per second of training, of a forward pass and of gradient features, with all workers busy; and memory."""
    import psutil

    from assay.train import loop, optim
    from assay.train.models import init_params

    encoded = probe.task.encoded(probe.path)
    rng = np.random.default_rng(worker)
    params = init_params(probe.task.module, 0)
    state = optim.init(probe.recipe, list(params.values()))
    held = [params, state]

    def train() -> float:
        order = rng.permutation(len(encoded))
        take = max(1, int(np.searchsorted(np.cumsum(encoded.sizes[order]), probe.recipe.terms_per_step)))
        rows = order[:take]
        grads, _ = loop.gradient(probe.task, held[0], encoded, rows, np.ones(take), probe.recipe.terms_per_step)
        values, held[1] = optim.update(
            probe.recipe, optim.clip(grads, probe.recipe.clip), held[1], list(held[0].values()), 0
        )
        held[0] = dict(zip(held[0], values, strict=True))
        return float(encoded.sizes[rows].sum())

    cut = loop.blocks(encoded.lengths, 2 * loop.AREA)
    blocks = [b[i : i + probe.batch] for b in cut for i in range(0, len(b), probe.batch)]
    order = rng.permutation(len(blocks))

    def forward(at: int) -> float:
        import torch

        with torch.no_grad():
            probe.task.loss(params, encoded.inputs(blocks[order[at % len(order)]]))
        return float(encoded.sizes[blocks[order[at % len(order)]]].sum())

    def features(at: int) -> float:
        inputs = encoded.inputs(blocks[order[at % len(order)]])
        flatten(gradients(probe.task.module, probe.task.loss, params, inputs, sketch, only=only)[0], sketch).numpy()
        return float(encoded.sizes[blocks[order[at % len(order)]]].sum())

    if probe.feature is not None:
        from assay.numerics.persample import flatten, gradients

        sketch, only = probe.feature.sketch(), set(probe.feature.names(probe.task))
    found = {"train": _pace(lambda _: train(), 2.0 * probe.pace), "forward": _pace(forward, 0.7 * probe.pace)}
    if probe.feature is not None:
        found["gradient"] = _pace(features, 1.2 * probe.pace)
    return {**found, "rss": float(resident(psutil.Process()))}


def _pace(call: Callable[[int], float], seconds: float) -> float:
    """Units per second of `call(k) -> units`, after one call to warm up."""
    call(0)
    start, units, k = time.perf_counter(), 0.0, 0
    while time.perf_counter() - start < seconds:
        units += call(k := k + 1)
    return units / (time.perf_counter() - start)


def plan(study: Study, workers: int) -> Plan:
    """Estimate a study without running it: the pool is sampled, the machine is timed for a few seconds.

    Raises `InputError` for what the run itself would refuse about its inputs.
    """
    start = time.perf_counter()
    pool, target, rows, read_seconds, disk = _sample(study)
    halves = Target.split(target, name=study.target.name, seed=study.seed)
    estimated = estimate(study, pool, halves, rows, workers)
    estimated.steps.insert(0, Step("read", read_seconds, tree_rss(), disk))
    estimated.facts["calibration_seconds"] = time.perf_counter() - start
    return estimated


def _sample(study: Study) -> tuple[Pool, Pool, int, float, float]:
    """A sample of the pool, the target, rows of the whole pool, seconds and bytes that reading it all would take."""
    start = time.perf_counter()
    if study.pool.builtin:
        train, test, *_ = supplied(**study.supplied())
        seconds = (time.perf_counter() - start) * 1.1
        pool = Pool.from_columns(train)
        return pool, Pool.from_columns(test), len(pool), seconds, 0.4 * train.nbytes
    spec = study.pool
    assert spec.path is not None
    source = readers.Source(paths=spec.path, **{**study.columns("pool"), "id": None})
    size = int(sum(readers.sniff(path)["rows"] for path in readers.files(source)))
    batches = list(islice(readers.read(source, batch_rows=512), 4))
    tables = [pa.Table.from_batches([b]) for b, _ in batches if b.num_rows]
    if not tables:
        raise InputError(
            "the pool is empty",
            where=spec.path,
            why="none of its first rows can be used",
            fix="see `assay run` for reasons",
        )
    table = pa.concat_tables(tables)
    whole = max(size, table.num_rows)
    pool = Pool.from_columns(table)
    rate = (time.perf_counter() - start) / table.num_rows
    rows = whole if spec.sample is None else min(whole, spec.sample)
    if study.target.path is not None:
        source = readers.Source(paths=study.target.path, **{**study.columns("target"), "id": None})
        parts = [pa.Table.from_batches([b]) for b, _ in readers.read(source) if b.num_rows]
        target = Pool.from_columns(pa.concat_tables(parts)) if parts else pool.at([])
    else:
        target = pool.at(np.arange(min(len(pool), study.target.count or study.target.HELD_OUT)))
    return pool, target, rows, rate * whole, 0.4 * table.nbytes / table.num_rows * whole


def estimate(study: Study, pool: Pool, target: Target, rows: int, workers: int, pace: float = 1.0) -> Plan:
    """The stages after reading, for a pool of `rows` rows like those of `pool`; `pace` x 4 seconds are measured."""
    sample = pool.at(np.sort(shuffled(pool.ids, "plan")[:SAMPLE]))
    scale, busy = rows / len(sample), max(1, workers)
    methods = [make(Scorer, arm.method) for arm in study.contestants()]
    sifters = _sifters(study)
    with tempfile.TemporaryDirectory(prefix="assay-plan-") as folder:
        clock = _Clock()
        gate.contamination(sample, target)
        gating = clock.lap() * scale
        task = sketch_task(study, sample, Path(folder))
        encoding = clock.lap() * min(scale, 20_000 / len(sample))  # the tokenizer learns from 20,000 texts at most
        task.prepare(sample, Path(folder))
        encoding += clock.lap() * scale
        encoded = task.encoded(Path(folder))
        probe = _Probe(task, Path(folder), study.train.recipe, _sketched([*methods, *sifters]), study.batch, pace)
        measured = list(local.map(_rates, probe, list(range(busy)), workers=workers))
        text = _text_seconds(sample) * scale
        sifting = {one.name: _sift_seconds(one, sample, target.selecting, rows, Path(folder)) for one in sifters}
        recipe = settled(study).proxy.recipe
        asked = "lds" in study.model_fields_set
        pace_of_bank = bank_pace(task, encoded, sample.ids, recipe, study.lds) if asked else 0.0
    rates = {k: float(np.mean([m[k] for m in measured])) for k in measured[0]}
    base = float(tree_rss()) + (rates["rss"] * busy if workers > 1 else 0.0)
    every = [*sifters, *methods]
    draft = _Draft(study, task, every, target, rows, float(encoded.sizes.mean()) * rows, rates, busy, base, text)
    draft.add(Step("gate", gating, base / 2), Step("encode", encoding, base / 2, 2 * draft.terms))
    draft.first()
    draft.proxy()
    draft.filters(sifting)
    draft.scores()
    draft.training()
    draft.bank(pace_of_bank, sample)
    draft.add(Step("report", 1.0 + 0.3 * len(methods) * min(1.0, rows / 10_000), base))
    facts = {"rows": rows, "terms": draft.terms, "rates": rates, "workers": workers, **draft.facts}
    return Plan(list(draft.steps.values()), facts)


def expectation(job: Any) -> dict[str, float]:
    """Seconds of each stage of a running job, by the names its progress uses: what the time left is computed from.

    Takes the pool that was read, and about three seconds of measurement.
    """
    trainings = (len(job.methods) + int(job.study.verify.everything)) * job.study.verify.seeds
    if len(list(job.run.steps.glob("train-*"))) >= trainings:
        return {}  # a finished run that is drawn anew
    job.progress.begin("estimate", 1, "estimate the time")
    made = estimate(job.study, job.pool, job.target, len(job.pool), job.workers, pace=0.4)
    job.progress.end()
    return {step.stage: step.seconds for step in made.steps}


class _Clock:
    def __init__(self) -> None:
        self.at = time.perf_counter()

    def lap(self) -> float:
        before, self.at = self.at, time.perf_counter()
        return self.at - before


def _features(method: Method) -> list[Method]:
    return [c for c in method.children() if isinstance(c, Featurizer)]


def _sketched(methods: list[Scorer]) -> Any:
    """The first featurizer of gradients among the methods, or None."""
    known = [f for m in methods for f in family(m) if hasattr(f, "sketch")]
    return known[0] if known else None


def _sifters(study: Study) -> list[Scorer]:
    """The scorers of all filters, each once."""
    found: list[Scorer] = []
    for arm in (None, *study.contestants()):
        found += [one.method for one in study.pipeline(arm) if one.method not in found]
    return found


def _sift_seconds(method: Scorer, sample: Pool, target: Pool, rows: int, folder: Path) -> float | None:
    """What a filter that reads text takes, from two pieces of the sample: a start and seconds for each row. None for
    one that needs a model, or that cannot work on a piece."""
    if method.cost != "text" or method.children():
        return None
    spent = []
    for part in (sample.at(slice(0, max(1, len(sample) // 4))), sample):
        run = Run.open(folder / f"filter-{method.name}-{len(spent)}", {"plan": method.spec()})
        clock = _Clock()
        try:
            Measurer(run, part, target).table(method)
        except InputError:
            return None
        finally:
            run.close()
        spent.append((len(part), clock.lap()))
    (few, least), (many, most) = spent
    slope = max(0.0, most - least) / max(1, many - few)
    return max(0.0, least - slope * few) + slope * rows


def _text_seconds(sample: Pool) -> float:
    """One pass over the texts as a word-counting scorer makes it."""
    if "text" not in sample.columns:
        return 0.0
    start = time.perf_counter()
    for text in sample.column("text"):
        gate.words(text)
    return 3 * (time.perf_counter() - start)


@dataclass
class _Draft:
    """The stages of one study as they are worked out; each once, however many arms share it."""

    study: Study
    task: Any
    methods: list[Scorer]
    target: Target
    rows: int
    terms: float
    rates: dict[str, float]
    busy: int
    base: float
    text: float
    steps: dict[str, Step] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    _started: bool = False

    def add(self, *steps: Step) -> None:
        for step in steps:
            self.steps.setdefault(step.stage, step)

    def _start(self) -> float:
        """Seconds until workers compute: the first ones load torch, later ones are forked from a server that has it."""
        seconds = START if self.busy > 1 and not self._started else RESTART
        self._started = True
        return seconds

    def first(self) -> None:
        passes = self.study.task.pretrain.passes
        if self.study.task.kind == "causal" and passes:
            self.add(Step("pretrain", passes * self.terms / self.rates["train"], self.base, 4.0 * self._weights()))

    def proxy(self) -> None:
        spec = self.study.proxy
        if not any(uses_model(m) for m in self.methods):
            return
        steps = spec.steps or math.ceil(spec.passes * self.terms / spec.recipe.terms_per_step)
        one = steps * spec.recipe.terms_per_step / self.rates["train"]
        seconds = math.ceil(spec.models / self.busy) * one
        # A single model is trained in the main process.
        seconds += self._start() if spec.models > 1 else 0.0
        # Weights and two moments of each mark, on disk and, from then on, in the main process.
        size = 12.0 * self._weights() * spec.models * spec.checkpoints
        self.base += size
        self.add(Step("proxy", seconds, self.base, size))

    def _models(self, *methods: Method) -> int:
        """How many models are read: those that are scored with, or every mark of each."""
        spec, every = self.study.proxy, any(getattr(inner, "every", False) for m in methods for inner in family(m))
        return spec.models * (spec.checkpoints if every else 1)

    def _weights(self) -> int:
        return sum(p.numel() for p in self.task.module.parameters())

    def filters(self, seconds: dict[str, float | None]) -> None:
        """The filters that were timed; the others are scored as any method is."""
        for name, one in seconds.items():
            if one is not None:
                self.add(Step(f"score: {name}", one, self.base, 8.0 * self.rows))

    def scores(self) -> None:
        model = any(uses_model(m) for m in self.methods)
        for method in [*self.methods, *([make(Scorer, "loss")] if model else [])]:
            self._score(method)

    def _score(self, method: Scorer) -> None:
        """A method, after the features and the scores that it reads."""
        if f"score: {method.name}" in self.steps:
            return
        features = _features(method)
        if features and method.name in MEETING and all(getattr(f, "met", False) for f in features):
            self._of_meetings(method, features[0])
            return
        for feature in features:
            self._featurize(feature, self._models(*(m for m in self.methods if feature in family(m))))
        for inner in method.children():
            if isinstance(inner, Scorer):
                self._score(inner)
        self._of_features(method, features) if features else self._of_examples(method)

    def _width(self, feature: Any) -> int:
        from assay.numerics.persample import layout

        if not hasattr(feature, "sketch"):
            return getattr(self.task, "width", 64)
        return sum(w for _, w in layout(self.task.module, feature.sketch(), set(feature.names(self.task))))

    def _featurize(self, feature: Method, models: int) -> None:
        stage = f"features: {feature.name}"
        if stage in self.steps:
            return
        width = self._width(feature)
        rate = (
            self.rates["forward"]
            if getattr(feature, "cost", "") == "forward"
            else self.rates.get("gradient", self.rates["train"])
        )
        entry = np.dtype(getattr(feature, "store", "float32")).itemsize
        seconds, size = self.terms * models / rate / self.busy, float(entry) * self.rows * width * models
        # Each process holds one shard of features, as numbers, as units and as bytes on their way to the disk.
        held = 12.0 * min(self.rows, self.study.shard) * width * (1 + self.busy)
        self.add(Step(stage, self._start() + seconds, self.base + held, size))
        part = len(self.target.selecting) / self.rows
        self.add(Step(f"{stage} (target)", RESTART + seconds * part, self.base, size * part))

    def _of_meetings(self, method: Scorer, feature: Method) -> None:
        """Exact gradients that are computed where they are met: of the pool a batch at a time, of the target all."""
        rate, models = self.rates.get("gradient", self.rates["train"]), self._models(method)
        targets = len(self.target.selecting)
        share = 1 / self.busy + targets / self.rows  # the target's are computed by the main process
        kept = 8.0 * targets * self._width(feature) * models * (1 + self.busy)
        seconds = self.terms * models / rate * share
        self.add(Step(f"score: {method.name}", self._start() + seconds, self.base + kept, 8.0 * self.rows))

    def _of_features(self, method: Scorer, features: list[Method]) -> None:
        width = max(self._width(f) for f in features)
        cells = float(self.rows) * width * self._models(method)
        # Features are read and checked once by the main process and once by the workers, at about 1 GB/s.
        seconds = 8 * cells / 1e9 + self._start()
        if method.name in ("trak", "trackstar"):
            # Its Gram matrix takes 2 n d^2 operations, and the solution of the system d^3; unit length is a copy.
            seconds += 2 * cells * width / 6e10 + width**3 / 3e10 + 8 * cells / 1e9
        held = 12.0 * min(self.rows, self.study.shard) * width * (1 + self.busy)
        heavy = held + (24.0 * width**2 if method.name in ("trak", "trackstar") else 0.0)
        self.add(Step(f"score: {method.name}", seconds, self.base + heavy, 8.0 * self.rows))

    def _of_examples(self, method: Scorer) -> None:
        name, models = f"score: {method.name}", self.study.proxy.models
        if not uses_model(method):
            self.add(Step(name, self.text if method.cost == "text" else 0.02, self.base, 8.0 * self.rows))
            return
        # One that holds others reads what they found.
        passes = 0.0 if method.children() else PASSES[method.cost] * method.passes
        seconds = passes * self.terms * models / self.rates["forward"] / self.busy
        target = len(self.target.selecting) * self.terms / self.rows
        seconds += method.training_terms(self.terms, target) * models / self.rates["train"]
        self.add(Step(name, self._start() + seconds, self.base, 8.0 * self.rows))

    def bank(self, pace: float, sample: Pool) -> None:
        """The retrainings of `assay verify`, where the study has `[lds]`: at `pace` seconds a step."""
        if not pace:
            return
        study = settled(self.study)
        spec, proxy = study.lds, study.proxy
        terms = self.terms * min(1.0, spec.examples / self.rows)
        steps = proxy.steps or math.ceil(proxy.passes * terms / proxy.recipe.terms_per_step)
        usual = [] if self.task.countable else ["removal"]
        own = sum(not e.null for e in contest.entries(study, sample))
        counts = trainings(spec, own + 1, usual if spec.checks is None else [*spec.checks])
        jobs = sum(counts.values())
        held = 40.0 * self._weights() * min(128, spec.subsets)
        self.add(Step("retrain (assay verify)", self._start() + jobs * steps * pace / self.busy, self.base + held))
        self.facts["retrainings"] = counts

    def training(self) -> None:
        study, rows = self.study, self.rows
        budget = Budget.parse(study.budget, examples=rows, tokens=int(self.terms) if self.task.countable else None)
        amount = budget.amount if budget.unit == "tokens" else budget.amount * self.terms / rows
        steps = study.train.steps or math.ceil(study.train.repeats * amount / study.train.recipe.terms_per_step)
        arms = len(study.contestants()) + int(study.verify.everything)
        jobs = arms * study.verify.seeds
        judging = len(self.target.judging) * self.terms / rows
        one = steps * study.train.recipe.terms_per_step / self.rates["train"] + judging / self.rates["forward"]
        self.add(Step("select", 0.05 * arms * (1 + rows / 1e5), self.base, 60.0 * rows * arms))
        seconds = self._start() + math.ceil(jobs / self.busy) * one
        self.add(Step("train arms", seconds, self.base, jobs * 12.0 * self._weights()))
        self.facts |= {"jobs": jobs, "training_steps": steps, "budget": budget.amount, "unit": budget.unit}
