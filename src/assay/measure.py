"""The verbs `featurize` and `score`: a method over a pool, shard by shard, into a checked Table."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from assay.core import notes
from assay.core.errors import InputError
from assay.core.keys import canonical, digest_ids, hash_ids, write_json
from assay.core.method import Featurizer, Mark, Method, mark_of
from assay.core.pool import Pool
from assay.core.progress import Progress
from assay.core.run import Ledger, Run
from assay.core.table import Table, TableWriter
from assay.engine import local

if TYPE_CHECKING:
    from assay.core.task import Encoded, Task

M = TypeVar("M", bound=Method)

# Padded terms (rows x longest) of one batch of a model's method: bounds its memory, whatever the documents' length.
AREA = 1536
# A table of features with more zero rows than this share is a mistake somewhere above.
MOST_ZERO = 0.5
# Forward passes' worth of work for one example: what the ledger and the plan count with.
PASSES = {"none": 0.0, "text": 0.0, "forward": 1.0, "gradient": 3.0, "retrain": 3.0}


def uses_model(method: Method) -> bool:
    """Whether a method, or one it holds, needs the scoring models."""
    return method.uses_models or any(uses_model(c) for c in method.children())


def family(method: Method) -> Iterator[Method]:
    """A method and all that it holds, at any depth."""
    yield method
    for child in method.children():
        yield from family(child)


class Rows:
    """A batch: some rows of a pool, read when asked for."""

    def __init__(self, work: Work, rows: np.ndarray) -> None:
        self._work, self._rows = work, rows
        self.ids = work.pool.ids[rows]

    def column(self, name: str) -> list[Any]:
        return self._work.pool.at(self._rows).column(name)

    def table(self, method: Method) -> np.ndarray:
        start = int(self._rows.min()) // self._work.shard * self._work.shard
        return self._work.block(method, start)[self._rows - start]

    @property
    def inputs(self) -> dict[str, Any]:
        return self._inputs

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        return self._work.encoded.inputs(self._rows)


@dataclass
class Work:
    """What a worker needs to run a method over a pool; pickled to it once."""

    method: Method
    state: Any
    pool: Pool
    task: Task | None
    path: Path | None
    tables: dict[str, Path]
    batch: int
    shard: int
    area: int = AREA
    form: tuple[Path, tuple[str, ...], Any] | None = None
    """Where the Table is made, its columns and its dtype."""
    _open: dict[str, Table] = field(default_factory=dict)
    _held: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("encoded", "writer")} | {"_open": {}, "_held": {}}

    @cached_property
    def encoded(self) -> Encoded:
        assert self.task is not None and self.path is not None, (
            f"{self.method.name} asked for model inputs without a task"
        )
        return self.task.encoded(self.path)

    @cached_property
    def writer(self) -> TableWriter:
        assert self.form is not None
        path, columns, dtype = self.form
        return TableWriter(path, self.pool.ids, columns, shard_rows=self.shard, dtype=dtype)

    def opened(self, method: Method) -> Table:
        key = canonical(method.spec())
        if key not in self._open:
            self._open[key] = Table.open(self.tables[key])
        return self._open[key]

    def block(self, method: Method, start: int) -> np.ndarray:
        """The rows of a nested method's Table for the shard that begins at `start`; read and checked once."""
        key = canonical(method.spec())
        held = self._held.get(key)
        if held is None or held[0] != start:
            held = self._held[key] = start, self.opened(method).rows(start, start + self.shard)
        return held[1]

    def batches(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Positions of one shard, in batches. With a model: of like length, so that little is padding."""
        rows = np.arange(start, stop)
        if self.task is None or self.path is None or not uses_model(self.method):
            yield rows
            return
        for block in even(self.encoded.lengths[start:stop], self.area):
            for at in range(0, len(block), self.batch):
                yield rows[block[at : at + self.batch]]


def even(lengths: np.ndarray, area: int) -> list[np.ndarray]:
    """Positions cut as `loop.blocks` cuts them, but into batches of about one size: a small one wastes its start."""
    from assay.train.loop import blocks

    cut = blocks(lengths, area)
    padded = sum(len(block) * int(lengths[block].max()) for block in cut)
    tight = blocks(lengths, min(area, padded // len(cut) + int(lengths.max())))
    return tight if len(tight) == len(cut) else cut


def compute(work: Work, index: int) -> np.ndarray:
    """One shard of a method's Table, `[rows, c]`. Pure: the same bytes in any process."""
    start, stop = index * work.shard, min(len(work.pool), (index + 1) * work.shard)
    result: np.ndarray | None = None
    for rows in work.batches(start, stop):
        batch = Rows(work, rows)
        call = work.method.featurize if isinstance(work.method, Featurizer) else work.method.score  # type: ignore[attr-defined]
        values = _numpy(call(work.state, batch))
        values = values[:, None] if values.ndim == 1 else values
        if len(values) != len(rows):
            name = work.method.name
            raise InputError(
                f"{name} returned {len(values)} rows for {len(rows)} examples", fix="one row for each example, in order"
            )
        if result is None:
            result = np.zeros((stop - start, values.shape[1]), dtype=values.dtype)
        result[rows - start] = values
    assert result is not None
    return result


def publish(work: Work, index: int) -> None:
    """Compute one shard and write it where it belongs: no numbers travel between processes."""
    work.writer.write(index, compute(work, index))


def _numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


class Measurer:
    """Computes methods over the pool and the selecting half, each once, and hands methods their context."""

    def __init__(
        self, run: Run, pool: Pool, target: Pool, *, seed: int = 0, task: Task | None = None,
        models: list[dict[str, Any]] | None = None, encodings: dict[str, Path] | None = None, key: str = "",
        workers: int = 1, batch: int = 64, shard: int = 1024, area: int = AREA, progress: Progress | None = None,
        source: list[str] | None = None, optimisers: list[dict[str, Any]] | None = None,
        barred: np.ndarray | None = None, trajectories: list[list[Mark]] | None = None, recipe: Any = None,
        withheld: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        for what, part in (("pool", pool), ("target", target)):
            if not len(part):
                raise InputError(f"the {what} is empty", why="nothing can be measured", fix="give at least 1 example")
        self.run, self.pool, self.target, self.seed, self.task = run, pool, target, seed, task
        self.models, self.encodings, self.key = models or [], encodings or {}, key
        self.workers, self.batch, self.shard, self.area = workers, batch, shard, area
        self.progress, self.source = progress or Progress(), source or []
        self.optimisers = optimisers or [{} for _ in self.models]
        alone = [[Mark(p, o)] for p, o in zip(self.models, self.optimisers, strict=True)]
        self.trajectories = trajectories or alone
        assert all(run[-1].params is model for run, model in zip(self.trajectories, self.models, strict=True))
        self.barred, self.recipe = pool.ids[:0] if barred is None else barred, recipe
        self.withheld = target.ids[:0] if withheld is None else withheld
        self.warnings: list[str] = []
        self.computed = 0
        """Rows that this object computed itself; the others were found made."""
        self._prints: dict[int, str] = {}
        """Hashes of weights by the identity of what holds them; `trajectories` keeps that alive."""
        self._paths: dict[tuple[str, str], Path] = {}
        self._stack: list[_Frame] = []
        self.check: Callable[[Method, Sequence[str]], None] = lambda method, columns: None
        """Sees a method's columns once it is prepared, or its Table found, before anything is scored."""

    # What methods see (the `Context` protocol).

    @property
    def folder(self) -> Path:
        return self._stack[-1].part

    def table(self, method: Method) -> Table:
        return self._opened(method, self.pool)

    def target_table(self, method: Method) -> Table:
        return self._opened(method, self.target)

    def members(self, method: M, every: bool = False) -> list[M]:
        fields = {f.name for f in dataclasses.fields(method)}
        if "model" not in fields:
            return [method]
        own = [dataclasses.replace(method, model=k) for k in range(len(self.models))]
        if not every or "checkpoint" not in fields:
            return own
        # The last is written -1, so that methods that read it alone share its Table.
        counts = [len(self.trajectories[m.model]) for m in own]  # type: ignore[attr-defined]
        marks = [(m, c) for m, n in zip(own, counts, strict=True) for c in [*range(n - 1), -1]]
        return [dataclasses.replace(m, checkpoint=c) for m, c in marks]

    def asking(self, target: Pool, pool: Pool | None = None) -> Measurer:
        other = copy.copy(self)
        # Scores of this target are not those of another; the run knows the features that both share.
        other.target, other.pool, other._paths = target, pool or self.pool, {}
        if self.task is not None:
            for part in (other.target, other.pool):
                self.encoded(part)
        return other

    def encoded(self, pool: Pool) -> Encoded:
        task = self.task
        assert task is not None
        if pool.fingerprint not in self.encodings:
            # A pool that a method made itself, such as a corrupted copy of the target.
            key = task.describe(), pool.fingerprint
            step = self.run.step("encode", key, lambda part, _: task.prepare(pool, part), label="tokenise")
            self.encodings[pool.fingerprint] = step
            if self._stack:
                self._stack[-1].uses.append(step.name)
        return task.encoded(self.encodings[pool.fingerprint])

    def batches(self, pool: Pool) -> Iterator[Rows]:
        work = self._work(self._stack[-1].method, None, pool)
        for start in range(0, len(pool), self.shard):
            for rows in work.batches(start, min(len(pool), start + self.shard)):
                yield Rows(work, rows)

    def sample(self, count: int) -> Rows:
        # Where the pool itself is not read as a whole, its sample is; a pool of bare ids has the target speak for it.
        pool = self.pool if self.pool.columns else self.target
        rows = np.argsort(hash_ids(pool.ids, "sample", self.seed), kind="stable")[:count]
        if pool.fingerprint not in self.encodings and self.task is not None:
            pool, rows = pool.at(rows), np.arange(len(rows))
            self.encoded(pool)
        return Rows(self._work(self._stack[-1].method, None, pool), rows)

    def kept(self, what: str, key: Any, build: Callable[[Path], None], *, flops: float = 0.0) -> Path:
        def filled(part: Path, ledger: Ledger) -> None:
            ledger.spent(flops)
            build(part)

        frame = self._stack[-1]
        name = frame.method.name.rpartition(".")[2]
        step = self.run.step(f"{name}-{what}", (key, frame.method.code()), filled, label=f"{name}: {what}")
        frame.uses.append(step.name)
        return step

    def spent(self, flops: float) -> None:
        if self._stack:
            self._stack[-1].ledger.spent(flops)

    def warn(self, message: str) -> None:
        if self._stack:  # kept with the Table, so that a run that finds it made warns as well
            held = self._stack[-1].warnings
            held += [message] if message not in held else []
        if message not in self.warnings:
            self.warnings.append(message)
            self.progress.warn(message)

    def note(self, what: str, detail: str, *, ok: bool | None = None, **numbers: Any) -> None:
        if self._stack:
            notes.keep(self._stack[-1].notes, what, detail, ok, numbers)

    # The driver.

    def path(self, method: Method, pool: Pool) -> Path:
        """The directory of a method's Table over a pool, computed unless it is there."""
        path = self._path(method, pool)
        if self._stack:
            self._stack[-1].uses.append(path.name)
        return path

    def _path(self, method: Method, pool: Pool) -> Path:
        held = canonical(method.spec()), pool.fingerprint
        if held not in self._paths:
            (name, key), made = self._step(method, pool), []

            def build(part: Path, ledger: Ledger) -> None:
                made.append(part)
                self._build(method, pool, part, ledger)

            path = self.run.step(name, key, build, label=self._label(method, pool))
            if not made:
                self._mend(method, pool, path)
            table = Table.open(path)
            self.check(method, table.columns)
            self._paths[held] = path
            for message in table.meta.get("warnings", []):
                self.warn(message)
            for name in closure(path):
                self.run.touch(name)
        return self._paths[held]

    def given(self, method: Method, pool: Pool, path: Path) -> None:
        """Take a method's Table over a pool from elsewhere."""
        self._paths[canonical(method.spec()), pool.fingerprint] = path

    def _opened(self, method: Method, pool: Pool) -> Table:
        """A method's Table, made with the models that this object has. Raises `InputError` when it was not."""
        table = Table.open(self.path(method, pool))
        made = table.meta.get("checkpoints")
        if uses_model(method) and made != self.checkpoints(method):
            raise InputError(
                f"{method.name} was computed with the weights of another model", where=self.path(method, pool),
                why=f"their hashes are {made}, those of the models given {self.checkpoints(method)}",
                fix="give the model that it was made with, or choose another --out",
            )  # fmt: skip
        return table

    def checkpoints(self, method: Method) -> list[str]:
        """Hashes of the weights that a method uses: of one model if it names it, of one mark of it if it names that,
        else of every mark of all."""
        from assay.train.loop import fingerprint

        if hasattr(method, "checkpoint"):
            used = [mark_of(self, method)]
        elif hasattr(method, "model"):
            used = [self.trajectories[method.model][-1]]  # type: ignore[attr-defined]
        else:
            used = [mark for run in self.trajectories for mark in run]
        for mark in used:
            if id(mark.params) not in self._prints:
                self._prints[id(mark.params)] = fingerprint(mark.params)
        return [self._prints[id(mark.params)] for mark in used]

    def _mend(self, method: Method, pool: Pool, path: Path) -> None:
        """Compute the shards of a finished Table anew that are missing or damaged, and no others; and of the features
        that it was made from."""
        for child in method.children():
            for member in self.members(child) if isinstance(child, Featurizer) else []:
                for source in (self.pool, self.target):
                    if self.run.place(*self._step(member, source))[0].exists():
                        self._path(member, source)
        try:
            if Table.open(path).intact():
                return
        except InputError:
            pass
        self.progress.warn(f"{path} is damaged: the shards that are not whole are computed anew")
        self._build(method, pool, path, Ledger())

    def _step(self, method: Method, pool: Pool) -> tuple[str, dict[str, Any]]:
        """Name and key of the step that makes a method's Table."""
        kind, choosing = "features" if isinstance(method, Featurizer) else "scores", not isinstance(method, Featurizer)
        return f"{kind}-{method.name.rpartition('.')[2]}", {
            "method": method.spec(), "code": [m.code() for m in family(method)], "pool": pool.fingerprint,
            # Features do not look at the target: another target finds them made.
            "target": None if isinstance(method, Featurizer) else self.target.fingerprint,
            "reference": self.pool.fingerprint, "seed": self.seed, "source": self._read(method, pool),
            "models": self.key if uses_model(method) else "",
            "batch": self.batch, "shard": self.shard, "area": self.area,
            # Named only where there are some, so that what was made without them is found again.
            **({"withheld": digest_ids(self.withheld)} if choosing and len(self.withheld) else {}),
        }  # fmt: skip

    def _read(self, method: Method, pool: Pool) -> list[str]:
        """The steps that read what a method sees: features of the pool see nothing of the target's files."""
        alone = isinstance(method, Featurizer) and pool is self.pool
        return [name for name in self.source if not (alone and name.startswith("read-target"))]

    def _label(self, method: Method, pool: Pool) -> str:
        what = "features" if isinstance(method, Featurizer) else "score"
        return f"{what}: {method.name}" + (" (target)" if pool is self.target and pool is not self.pool else "")

    def _work(self, method: Method, state: Any, pool: Pool) -> Work:
        path = self.encodings.get(pool.fingerprint)
        tables = {spec: p for (spec, fingerprint), p in self._paths.items() if fingerprint == pool.fingerprint}
        return Work(method, state, pool, self.task, path, tables, self.batch, self.shard, self.area)

    def _build(self, method: Method, pool: Pool, part: Path, ledger: Ledger) -> None:
        frame = _Frame(method, ledger, part)
        self._stack.append(frame)
        try:
            self.progress.begin(self._label(method, pool), -(-len(pool) // self.shard))
            state = _one_thread(lambda: method.init(self))  # type: ignore[attr-defined]
            columns = method.columns(state)  # type: ignore[attr-defined]
            self.check(method, columns)
            work = self._work(method, state, pool)
            self._fill(work, part, columns, frame)
        finally:
            self._stack.pop()
        write_json(part / "uses.json", sorted(set(frame.uses)))
        if self.task is not None and uses_model(method) and pool.fingerprint in self.encodings:
            ledger.spent(self._passes(method, state) * self.task.forward_flops(work.encoded.sizes))
        if hasattr(state, "flops"):  # a model of its own, which knows what a pass over a pool takes
            ledger.spent(state.flops(pool))

    def _passes(self, method: Method, state: Any) -> float:
        """Forward passes' worth of work an example: none for a scorer that reads features made by another step.

        A state that counts its own passes, such as a probe, knows better than the method's options.
        """
        if any(isinstance(c, Featurizer) for c in method.children()) and not hasattr(state, "passes"):
            return 0.0
        single = isinstance(method, Featurizer) or "model" in method.spec()
        passes = getattr(state, "passes", getattr(method, "passes", 1.0))
        return PASSES[method.cost] * passes * (1 if single else len(self.models))  # type: ignore[attr-defined]

    def _fill(self, work: Work, part: Path, columns: tuple[str, ...], frame: _Frame) -> None:
        pool = work.pool
        spans = range(-(-len(pool) // self.shard))
        self.progress.begin(self._label(work.method, pool), len(spans))
        dtype = work.method.store if isinstance(work.method, Featurizer) else np.float64
        work.form = part, columns, dtype
        writer = work.writer
        missing = [i for i in spans if not writer.has(i)]
        self.progress.skip(len(spans) - len(missing))
        heavy = uses_model(work.method) or hasattr(work.state, "flops")
        many = len(pool) > 20 * self.shard and not getattr(work.method, "lookup", False)
        workers = self.workers if heavy or many else 1
        for _ in local.map(publish, work, missing, workers=workers):
            self.progress.advance()
        self.computed += sum(stop - start for start, stop in map(writer.span, missing))
        table = writer.finish(self._meta(work) | {"notes": frame.notes, "warnings": frame.warnings})
        zero = table.meta["zero_rows"]
        if isinstance(work.method, Featurizer) and zero > MOST_ZERO * len(table):
            raise InputError(
                f"{zero} of {len(table)} rows of {work.method.name} are zero", where=part,
                why="examples without features cannot be told apart",
                fix="look at the model: weights that are zero or have diverged, or a loss that does not reach them",
            )  # fmt: skip
        self.progress.end()

    def _meta(self, work: Work) -> dict[str, Any]:
        """Everything a number needs to be believed; a field that cannot be filled is an error, not a blank."""
        method, model = work.method, uses_model(work.method)
        assert not model or (self.key and self.task), "scores of a model need the model's key"
        return {
            "estimator": method.spec(), "code": method.code(), "sign": "higher = keep",
            "unit": getattr(method, "unit", "vector"), "measures_utility": getattr(method, "measures_utility", False),
            "target": None if isinstance(method, Featurizer) else self.target.fingerprint,
            "pool": work.pool.fingerprint, "models": self.key if model else None, "seed": self.seed,
            "checkpoints": self.checkpoints(method) if model else None,
            "loss_reduction": self.task.reduction if model and self.task else None, "device": "cpu",
        }  # fmt: skip


@dataclass
class _Frame:
    """One method being computed, and the steps it asked for."""

    method: Method
    ledger: Ledger
    part: Path
    uses: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def uses(path: Path) -> list[str]:
    """The steps that a step asked for while it was made."""
    file = path / "uses.json"
    return json.loads(file.read_text()) if file.exists() else []


def closure(path: Path) -> list[str]:
    """A step and all that it rests on, each once."""
    found, waiting = [path.name], uses(path)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.append(name)
            waiting += uses(path.parent / name)
    return found


def _one_thread(call: Any) -> Any:
    """Run in this process as a worker would: on one thread, so that sums have one order."""
    return next(iter(local.map(lambda _state, _item: call(), None, [0], workers=1)))
