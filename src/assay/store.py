"""The feature store: a pool's features on disk, made once in parts that need not know of each other; then scores of any
target from them, without the pool's text and without its gradients.

A store is a `Run` directory with `store.json`, which says what the features are of. A part is a run of whole shards of
the pool: each shard is then computed from the same rows in the same batches as in one piece, and has the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.core.errors import InputError, nearest
from assay.core.keys import decode_ids, digest, write_json
from assay.core.method import Featurizer, Scorer, discover, find, make
from assay.core.pool import Pool
from assay.core.progress import Progress
from assay.core.run import Meter, Run
from assay.core.table import Table, join
from assay.data.ingest import read_step
from assay.data.readers import Source
from assay.engine import local
from assay.measure import Measurer
from assay.study import override

if TYPE_CHECKING:
    from assay.core.task import Task

FORMAT = 1
DEFAULT_METHODS = ("graddot", "gradcos", "trak")
# Options of the store itself; all others are the featurizer's. Shards by default: see `shard_of`.
SIZES: dict[str, int | None] = {"shard": None, "batch": 64, "area": 4096}
LEAST, MOST, SHARDS = 128, 1024, 64
# What workers import for any model of transformers: seconds, and as long as the main process takes to begin.
MODELLING = ("assay.train.hf", "transformers.modeling_utils", "transformers.modeling_layers")
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be featurized. `shard`: rows of one file; `batch` and `area`: most rows and padded tokens at once."""

    pool: str
    model: str
    method: Featurizer
    text: str = "text"
    id: str | None = None
    context: int | None = None
    part: tuple[int, int] = (1, 1)
    shard: int | None = None
    batch: int = 64
    area: int = 4096

    def spec(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"featurize": {**fields, "method": self.method.spec(), "part": list(self.part)}}


def order(
    pool: str, model: str, *, method: str = "gradients", sets: Sequence[str] = (), part: str = "1/1",
    text: str | None = None, id: str | None = None, context: int | None = None,
) -> Order:  # fmt: skip
    """An `Order` from words as users give them. Raises `InputError` for unknown options and impossible values."""
    options = override({}, sets)
    sizes = {name: options.pop(name, default) for name, default in SIZES.items()}
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} cannot be {value!r}", where=f"--set {name}", fix="give a whole number above zero")
    made = make(Featurizer, {"name": method, **options})
    if getattr(made, "model", 0) != 0:
        raise InputError("there is one model, number 0", where="--set model", fix="drop it")
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"unreadable part {part!r}", where="--part", fix="write --part 2/4 for the second of four")
    return Order(
        pool=pool, model=model, method=made, text=text or "text", id=id, context=context,
        part=(int(number), int(count)), **sizes,
    )  # fmt: skip


def shard_of(rows: int) -> int:
    """Rows of a shard for a pool: a power of two, from 128 to 1024, that makes 64 shards if the pool has the rows.

    Small enough that workers end together, and the same on every machine: bytes depend on it.
    """
    size = MOST
    while size > LEAST and rows < size * SHARDS:
        size //= 2
    return size


# Models.


@dataclass(frozen=True)
class Model:
    """A task and the weights that features are taken at."""

    task: Task
    params: dict[str, Any]

    @property
    def checkpoint(self) -> str:
        from assay.train.loop import fingerprint

        return fingerprint(self.params)


def open_model(path: str, context: int | None = None) -> Model:
    """A model of transformers (a directory, or an id on the hub), or the first scoring model of an `assay run`.

    Raises `InputError` when it is neither, or is a model of something else than text.
    """
    proxy = _proxy(Path(path))
    if proxy is None:
        from assay.train.hf import open_model as open_transformers

        task = open_transformers(path, **({} if context is None else {"context": context}))
        model = Model(task, task.params())
    else:
        from assay.train.loop import load
        from assay.train.models import read_task

        if context is not None:
            why = "its positions were learnt with the model"
            raise InputError("the context of this model is fixed", where=path, why=why, fix="drop --context")
        model = Model(read_task(proxy / "task.json"), load(proxy / "checkpoint.safetensors").params)
    if not model.task.countable:
        raise InputError("this model does not read text", where=path, fix="give a causal language model")
    return model


def _proxy(path: Path) -> Path | None:
    """The folder with the checkpoint: the path itself, or that of the first scoring model of the run there."""
    if (path / "checkpoint.safetensors").exists():
        return path
    found = []
    for step in path.glob("steps/proxy-*/step.json"):
        try:
            found.append((json.loads(step.read_text())["key"]["recipe"]["seed"], step.parent))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("a finished step is damaged", where=step, why=str(error), fix="run it again") from error
    if not found and (path / "study.json").exists():
        why = "no method of its study uses one, or it has not come that far"
        raise InputError("this run has no scoring model", where=path, why=why, fix="run a study with graddot, say")
    return min(found)[1] if found else None


# Featurize.


def featurize(
    order: Order, out: Path, *, workers: int | None = None, progress: Progress | None = None, replace: bool = False,
    command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write the features of a pool, or of a part of it, to a store; returns what it took.

    Killed at any moment, the same call goes on where it was; shards that are missing or damaged are computed anew, and
    no others. Memory does not grow with the pool but for ids and offsets (about 100 bytes an example).
    """
    progress, run = progress or Progress(), Run.open(out, order.spec(), replace=replace, command=command)
    try:
        with Meter() as meter:
            about, facts = _featurized(order, run, workers or local.default_workers(), progress)
            write_json(out / "store.json", about)
        facts |= {"wall": meter.wall, "peak_rss": meter.peak, "store": str(out)}
        run.publish(facts)
        run.clean()
        run.done()
        return facts
    finally:
        run.close()


def _featurized(order: Order, run: Run, workers: int, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """`store.json`, and the figures of this call."""
    if workers > 1:
        local.warm(*MODELLING if _proxy(Path(order.model)) is None else ())
    pool, told = _read(run, Source(paths=order.pool, text=order.text, id=order.id), "pool", progress)
    shard = order.shard or shard_of(len(pool))
    part = _part(pool, order.part, shard)
    model = open_model(order.model, order.context)
    encoding = _encoded(run, model.task, part, progress)
    measurer = Measurer(
        run, pool, pool, task=model.task, models=[model.params], encodings={part.fingerprint: encoding},
        key=model.checkpoint, workers=workers, batch=order.batch, shard=shard, area=order.area, progress=progress,
    )  # fmt: skip
    start = time.perf_counter()
    step = measurer.path(order.method, part)
    seconds, table = time.perf_counter() - start, Table.open(step)
    about = {
        "format": FORMAT, "features": step.name, "method": order.method.spec(), "model": _absolute(order.model),
        "context": order.context, "checkpoint": model.checkpoint, "task": digest(model.task.describe()),
        "pool": pool.fingerprint, "part": list(order.part), "rows": len(part), "columns": len(table.columns),
        "text": order.text, "shard": shard, "batch": order.batch, "area": order.area,
    }  # fmt: skip
    share, tokens = measurer.computed / len(part), int(model.task.encoded(encoding).sizes.sum())
    facts = {
        "rows": len(part), "computed": measurer.computed, "columns": len(table.columns), "tokens": tokens,
        "bytes": sum(file.stat().st_size for file in step.iterdir()), "seconds": seconds,
        "rows_per_second": measurer.computed / seconds, "tokens_per_second": share * tokens / seconds,
        "zero_rows": table.meta["zero_rows"], "underflow": table.meta["underflow"], "part": list(order.part),
        "warnings": [*told, *measurer.warnings],
    }  # fmt: skip
    return about, facts


def _read(run: Run, source: Source, what: str, progress: Progress) -> tuple[Pool, list[str]]:
    progress.begin(f"read {what}", 1)
    step, _, told = read_step(run, source, what=what, key=dataclasses.asdict(source) | {"paths": None})
    if told:
        progress.warn(told)
    progress.advance()
    progress.end()
    return Pool.open(step), [told] if told else []


def _encoded(run: Run, task: Task, pool: Pool, progress: Progress) -> Path:
    progress.begin("tokenise", 1)
    key = task.describe(), pool.fingerprint
    step = run.step("encode", key, lambda part, _: task.prepare(pool, part), label="tokenise")
    progress.advance()
    progress.end()
    return step


def _part(pool: Pool, part: tuple[int, int], shard: int) -> Pool:
    """Whole shards, one after the other, as evenly as they go."""
    (number, count), shards = part, -(-len(pool) // shard)
    if count > shards:
        raise InputError(
            f"the pool does not go into {count} parts", where="--part",
            why=f"it has {len(pool)} rows, {shards} {'shard' if shards == 1 else 'shards'} of {shard}",
            fix=f"use at most {shards} parts, or smaller shards in all of them: --set shard=N",
        )  # fmt: skip
    first, last = (shards * (number - 1) // count, shards * number // count)
    return pool if count == 1 else pool.at(slice(first * shard, last * shard))


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


# Score.


@dataclass(frozen=True)
class Store:
    """A finished store, or part of one: what `store.json` says, and where."""

    path: Path
    about: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Store:
        """Raises `InputError` for a directory that is no finished store."""
        try:
            about = json.loads((path / "store.json").read_text(encoding="utf-8"))
            version = about["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "no finished store", where=path, why=str(error), fix="`assay featurize` makes one, or finishes it"
            ) from error
        if version != FORMAT:
            raise InputError(f"the store has format {version}, this is {FORMAT}", where=path, fix="make it anew")
        return cls(path, about)

    @property
    def features(self) -> Path:
        return self.path / "steps" / str(self.about["features"])

    @property
    def method(self) -> Featurizer:
        return make(Featurizer, self.about["method"])


def whole(paths: Sequence[Path]) -> list[Store]:
    """The parts in order. Raises `InputError` unless they are all parts, each once, of one store."""
    stores = [Store.open(path) for path in paths]
    first = stores[0]
    for store in stores[1:]:
        for key in ("pool", "method", "checkpoint", "task", "shard"):
            if store.about[key] != first.about[key]:
                why = f"{key} is {first.about[key]!r} there and {store.about[key]!r} here"
                raise InputError(
                    "these are no parts of one store", where=f"{first.path}, {store.path}", why=why,
                    fix="give the parts that one pool, model and method made",
                )  # fmt: skip
    count, held = first.about["part"][1], {}
    for store in stores:
        number, own = store.about["part"]
        if own != count or number in held:
            same = own == count
            why = f"{held[number]} is part {number} as well" if same else f"one is of {count} parts, one of {own}"
            raise InputError("a part too many", where=store.path, why=why, fix="give each part once")
        held[number] = store.path
    missing = [f"{k}/{count}" for k in range(1, count + 1) if k not in held]
    if missing:
        raise InputError(
            f"{len(missing)} of {count} parts are missing: {', '.join(missing)}", where=first.path,
            fix=f"make them with `assay featurize ... --part {missing[0]}`, and give all of them",
        )  # fmt: skip
    return sorted(stores, key=lambda store: store.about["part"][0])


def scorers() -> list[str]:
    """The methods that score from features alone."""
    return [name for name, cls in discover(Scorer).items() if "features" in {f.name for f in dataclasses.fields(cls)}]


def score(
    paths: Sequence[Path], target: str, *, methods: Sequence[str] = DEFAULT_METHODS, out: Path | None = None,
    text: str | None = None, id: str | None = None, model: str | None = None, workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores of a store's examples for a target, higher = keep, as Parquet: `id` and a column for each method.

    Only the target's features are computed, with the model that the store was made with; `model` says where it is now.
    Raises `InputError` for parts that are missing or do not belong together, another model, a damaged shard.
    """
    stores, progress = whole(paths), progress or Progress()
    about, feature, chosen = stores[0].about, stores[0].method, _chosen(methods, stores[0].method)
    held = open_model(model or about["model"], about["context"])
    if held.checkpoint != about["checkpoint"] or digest(held.task.describe()) != about["task"]:
        raise InputError(
            "the features were made with another model", where=model or about["model"],
            why=f"its hash is {held.checkpoint}, that of the store's is {about['checkpoint']}",
            fix="give the model that the store was made with: --model DIR",
        )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="assay-score-") as folder, Meter() as meter:
        run = Run.open(Path(folder, "run"), {"score": [str(path) for path in paths]})
        try:
            asked, told = _read(run, Source(paths=target, text=text or about["text"], id=id), "target", progress)
            tables = [Table.open(store.features) for store in stores]
            key = [str(store.features.absolute()) for store in stores]
            place = run.step("joined", key, lambda part, _: join(tables, part, tables[0].meta))
            joined = Table.open(place)
            pool, encoding = Pool.bare(joined.ids), _encoded(run, held.task, asked, progress)
            measurer = Measurer(
                run, pool, asked, task=held.task, models=[held.params], encodings={asked.fingerprint: encoding},
                key=held.checkpoint, workers=workers or local.default_workers(), batch=about["batch"],
                shard=about["shard"], area=about["area"], progress=progress,
            )  # fmt: skip
            measurer.given(feature, pool, place)
            columns = {name: measurer.table(method).values[:, 0] for name, method in chosen.items()}
        finally:
            run.close()
    scores = Table(joined.ids, tuple(columns), np.stack(list(columns.values()), axis=1))
    if out is not None:
        scores.to_parquet(out)
    found = {name: _summary(scores, name) for name in columns}
    return {
        "rows": len(scores), "target": len(asked), "parts": len(stores), "methods": found, "wall": meter.wall,
        "peak_rss": meter.peak, "out": None if out is None else str(out), "warnings": [*told, *measurer.warnings],
    }  # fmt: skip


def _chosen(methods: Sequence[str], feature: Featurizer) -> dict[str, Scorer]:
    """Scorers over this store's features, by name."""
    chosen = {}
    for name in methods:
        if "features" not in {f.name for f in dataclasses.fields(find(Scorer, name))}:
            why = "it reads more of the pool than its features"
            raise InputError(f"{name!r} cannot score a store", why=why, fix=nearest(name, scorers()))
        chosen[name] = make(Scorer, {"name": name, "features": feature.spec()})
    if not chosen:
        raise InputError("no methods are given", where="--methods", fix=nearest("", scorers()))
    return chosen


def _summary(scores: Table, name: str) -> dict[str, Any]:
    """Spread of one column, and its best examples."""
    values = scores.column(name)
    best = np.lexsort((scores.ids, -values))[:SHOWN]
    spread = dict(zip(("lowest", "quarter", "median", "three_quarters", "highest"),
                      np.percentile(values, [0, 25, 50, 75, 100]).tolist(), strict=True))  # fmt: skip
    top = [{"id": i, "score": float(v)} for i, v in zip(decode_ids(scores.ids[best]), values[best], strict=True)]
    return {**spread, "positive": float((values > 0).mean()), "top": top}
