"""`assay verify --metasmooth`: can this training be differentiated usefully, and what would help; all of it measured.

The same few trainings, of data weights w, w + h v and w + 2 h v, are run for the study's training and for each change
that its recipe and task allow.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import write_json
from assay.core.run import tree_rss
from assay.core.selection import Selection
from assay.engine import local
from assay.trust.ground import Trust, protocol

if TYPE_CHECKING:
    from assay.core.task import Task
    from assay.train.recipe import Recipe
    from assay.train.smooth import Probe

FIGURES = ("agreement", "mended", "curvature", "metric", "linearity")
# Of linearity: of nine trainings at data weights of 1 and 1/2 (benchmarks/parts/smoothness.py), metagradients had an
# LDS above .8 wherever linearity to halves was above .8, and below .2 wherever it was below .5; from 0 to .7 between.
# Small moves say it less surely: above .9 as well, and below that anything. A line through finite moves does not prove
# that the derivative lies along it: `check` of metagrad compares the two.
WELL, PARTLY, WELL_TO_HALVES = 0.9, 0.5, 0.8
# A base beyond this is not told of remedies.
ENOUGH = 0.98
# In the place of no eps_root, which has no derivative: too small to change a bit of an update in float32.
NO_ROOT = 1e-36
HALVES = "as it is, to random halves"
# A part of the steps that the remedy of the window differentiates alone; the recipe's own decay and root times these.
LAST, MORE_DECAY, MORE_ROOT = 10, 10.0, 100.0


@dataclass(frozen=True)
class Variant:
    """The training as it is, or with one change; `how` says how a study asks for it."""

    name: str
    how: str
    task: Task
    recipe: Recipe
    center: float
    h: float
    since: int = 0

    @property
    def run(self) -> Recipe:
        """As the arithmetic takes it."""
        lacks = self.recipe.optimiser == "adamw" and not self.recipe.eps_root
        return self.recipe.model_copy(update={"eps_root": NO_ROOT}) if lacks else self.recipe


def variants(task: Task, recipe: Recipe, center: float, h: float, root: float) -> list[Variant]:
    """The training as it is first, then every single change that means something for it; and first of them how far a
    line goes when examples are left out and not only moved: from data weights of a half to 0 and 1, a random half.
    `root`: an eps_root for AdamW at least, `train.root.mean_square` as metagradients take it where there is none."""
    base = Variant("as it is", "", task, recipe, center, h)
    halves = dataclasses.replace(base, name=HALVES, how="center = 0.5 of metagrad", center=0.5, h=0.5)
    return [base, halves, *_of_the_recipe(base, root), *_of_the_task(base)]


def _of_the_recipe(base: Variant, root: float) -> Iterator[Variant]:
    recipe, steps = base.recipe, base.recipe.steps

    def change(name: str, **keys: float) -> Variant:
        said = [f"proxy.{key}={keys[key]:g}" for key in keys if key == "steps"]
        said += [f"proxy.recipe.{key}={value:g}" for key, value in keys.items() if key != "steps"]
        how = " ".join(f"--set {one}" for one in said)
        return dataclasses.replace(base, name=name, how=how, recipe=recipe.model_copy(update=keys))

    if base.center == 1:
        yield dataclasses.replace(base, name="data weights of a half", how="center = 0.5 of metagrad", center=0.5)
    if steps >= 2:
        last = max(1, steps // LAST)
        how = f"window = {last} of metagrad: what these steps do, and no others"
        yield dataclasses.replace(base, name="the last tenth alone", how=how, since=steps - last)
    yield change("half the learning rate", lr=recipe.lr / 2)
    if steps >= 2:
        yield change("twice the batch, half the steps", terms_per_step=2 * recipe.terms_per_step, steps=steps // 2)
        yield change("half the steps", steps=steps // 2)
    if recipe.optimiser == "adamw":
        more = max(MORE_ROOT * recipe.eps_root, root)
        yield change("more eps_root" if recipe.eps_root else "eps_root", eps_root=more)
    name = "ten times the weight decay" if recipe.weight_decay else "weight decay"
    yield change(name, weight_decay=MORE_DECAY * recipe.weight_decay or 1e-2)
    if recipe.clip:
        yield change("no clipping", clip=0.0)


def _of_the_task(base: Variant) -> Iterator[Variant]:
    """Changes of the built-in classifiers: other tasks have no such keys."""
    task = base.task
    known = {f.name for f in dataclasses.fields(task)} if dataclasses.is_dataclass(task) else set()  # type: ignore[arg-type]
    for key, old, new, name in (
        ("activation", "relu", "gelu", "GELU for ReLU"), ("dropout", None, 0.0, "no dropout"),
        ("first", "normal", "uniform", "first weights of PyTorch"),
    ):  # fmt: skip
        if key == "first" and not getattr(task, "hidden", ()):
            continue  # a convex problem: where it begins is not what is in the way
        own = getattr(task, key, None) if key in known else None
        if own == old if old is not None else own:
            value = f"'{new}'" if isinstance(new, str) else f"{new:g}"
            changed = dataclasses.replace(task, **{key: new})  # type: ignore[type-var]
            yield dataclasses.replace(base, name=name, how=f"--set task.{key}={value}", task=changed)


@dataclass(frozen=True)
class _Bench:
    """What all trainings share; sent to each worker once."""

    ids: np.ndarray
    pool: Path
    target: Path
    measure: Any
    seed: int


@dataclass(frozen=True)
class _Item:
    """One training; `times` 0 is the one at w, which keeps the state that the others of a window begin from."""

    variant: Variant
    folder: Path
    key: str
    direction: int
    times: int

    @property
    def file(self) -> Path:
        return self.folder / f"end-{self.direction}-{self.times}.safetensors"


def _probe(bench: _Bench, variant: Variant) -> Probe:
    import torch

    from assay.numerics.curvature import reading
    from assay.train.loop import AREA, blocks
    from assay.train.replay import Training
    from assay.train.smooth import Probe

    task = variant.task
    encoded, target = task.encoded(bench.pool), task.encoded(bench.target)
    f = reading(task, bench.measure)

    def read(params: Any) -> np.ndarray:
        found = np.zeros(len(target))
        with torch.no_grad():
            for block in blocks(target.lengths, 2 * AREA):
                found[block] = f(params, target.inputs(block)).double().numpy()
        return found

    chosen = Selection(bench.ids, np.full(len(bench.ids), variant.center))
    training = Training(task, encoded, np.arange(len(bench.ids)), chosen, variant.run)
    return Probe(training, read, variant.h, variant.since, bench.seed)


def _train(bench: _Bench, item: _Item) -> str:
    """Train once and keep what it ends in; returns why it could not. Runs in a worker."""
    from assay.train.smooth import load_state, save_end, save_state

    wall, cpu = time.perf_counter(), time.process_time()
    probe = _probe(bench, item.variant)
    file = item.folder / "before.safetensors"
    before = load_state(file, probe.training, item.key) if probe.since and item.times else None
    before = before or probe.before()
    if probe.since and not item.times:
        save_state(file, probe.training, before, item.key)
    try:
        end = probe.end(before, item.direction, item.times)
    except InputError as error:
        return f"{error.what}: {error.why}" if error.why else error.what
    save_end(item.file, end, item.key)
    steps = item.variant.recipe.steps - (probe.since if item.times else 0)
    terms, sizes = steps * item.variant.recipe.terms_per_step, probe.training.encoded.sizes
    flops = item.variant.task.training_flops(np.asarray(sizes), terms)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "flops": flops}
    write_json(item.file.with_suffix(".json"), spent)
    return ""


@dataclass(frozen=True)
class _Place:
    variant: Variant
    final: Path
    part: Path
    about: dict[str, Any]

    @property
    def done(self) -> bool:
        return (self.final / "step.json").exists()

    def items(self, directions: int) -> list[_Item]:
        ends = [(0, 0)] + [(k, times) for k in range(directions) for times in (1, 2)]
        return [_Item(self.variant, self.part, self.about["hash"], *end) for end in ends]


def listed(trust: Trust, root: float) -> list[Variant]:
    """What the study wants measured; how many there are does not depend on the `root` of `variants`."""
    job, spec = trust.job, trust.job.study.smooth
    assert job.task is not None
    found = variants(job.task, trust.recipe.with_seed(trust.seeds[0]), spec.center, spec.h, root)
    return found if spec.remedies else found[:1]


def _root(trust: Trust) -> float:
    from assay.train.root import LEAST, mean_square

    job, recipe = trust.job, trust.recipe.with_seed(trust.seeds[0])
    if recipe.optimiser != "adamw" or not job.study.smooth.remedies:
        return LEAST  # nobody looks at it
    assert job.task is not None
    encoded = job.task.encoded(job.encodings[job.pool.fingerprint])
    found = mean_square(job.task, encoded, job.pool.ids, np.arange(len(encoded)), recipe)
    return found if 0 < found < math.inf else LEAST  # what diverges at once is refused as it is measured


def measured(trust: Trust) -> list[dict[str, Any]]:
    """A row for each variant: every figure with its spread over directions, and what the target's loss was.

    Each variant is a step of the run, and within it each training is kept as it ends.
    """
    job, spec, kinds = trust.job, trust.job.study.smooth, listed(trust, _root(trust))
    pool, target = (job.encodings[p.fingerprint] for p in (job.pool, trust.target))
    bench = _Bench(job.pool.ids, pool, target, trust.spec.measure, job.study.seed)
    places = [_place(trust, variant) for variant in kinds]
    each = 1 + 2 * spec.directions
    job.progress.begin("smooth", each * len(places), "train at moved data weights")
    todo = [place for place in places if not place.done]
    job.progress.skip(each * (len(places) - len(todo)))
    faults: dict[Path, str] = {}
    for first in (True, False):
        items = [i for place in todo for i in place.items(spec.directions) if (i.times == 0) == first]
        items = [i for i in items if i.folder not in faults]
        left = [i for i in items if not _kept(i)]
        job.progress.skip(len(items) - len(left))
        for item, fault in zip(left, local.map(_train, bench, left, workers=job.workers), strict=True):
            if fault and item.variant is kinds[0]:
                raise InputError(fault.split(": ")[0], why="training diverged", fix="lower proxy.recipe.lr")
            faults |= {item.folder: fault} if fault else {}
            job.progress.advance()
    for place in todo:
        _commit(trust, bench, place, faults.get(place.part, ""), base=place is places[0])
    job.progress.end()
    job.run.absorb("metasmoothness", [place.final.name for place in places], job.workers)
    return [json.loads((place.final / "smooth.json").read_text(encoding="utf-8")) for place in places]


def _place(trust: Trust, variant: Variant) -> _Place:
    spec = trust.job.study.smooth
    key = protocol(trust) | {
        "task": variant.task.describe(), "recipe": variant.recipe.spec(), "center": variant.center,
        "since": variant.since, "target": trust.target.fingerprint, "h": variant.h, "directions": spec.directions,
        "seed": trust.job.study.seed, "name": variant.name, "how": variant.how,
    }  # fmt: skip
    final, part, full = trust.job.run.place("smooth", key)
    if not (final / "step.json").exists():
        part.mkdir(parents=True, exist_ok=True)
    return _Place(variant, final, part, {"name": "smooth", "key": key, "hash": full})


def _kept(item: _Item) -> bool:
    from assay.train.smooth import load_end

    return item.file.with_suffix(".json").exists() and load_end(item.file, item.key) is not None


def _commit(trust: Trust, bench: _Bench, place: _Place, fault: str, *, base: bool) -> None:
    """A variant's figures, in the place of all that its trainings ended in."""
    job, costs = trust.job, []
    row: dict[str, Any] = {"name": place.variant.name, "how": place.variant.how}
    row |= {
        "center": place.variant.center,
        "h": place.variant.h,
        "steps": place.variant.recipe.steps,
        "since": place.variant.since,
    }
    try:
        row |= {"error": fault} if fault else _figures(trust, bench, place)
    except InputError as error:
        if base:
            raise
        row["error"] = error.what
    for file in place.part.glob("end-*.json"):
        costs.append(json.loads(file.read_text(encoding="utf-8")))
    total = {name: sum(cost[name] for cost in costs) for name in ("wall", "cpu", "flops")}
    for file in [*place.part.glob("end-*"), *place.part.glob("before.*")]:
        file.unlink()
    row |= {"seconds": total["wall"], "flops": total["flops"]}
    write_json(place.part / "smooth.json", row)
    job.run.commit(place.final, place.part, place.about, {"stage": "metasmoothness", **total, "peak_rss": tree_rss()})


def _figures(trust: Trust, bench: _Bench, place: _Place) -> dict[str, Any]:
    from assay.train.smooth import load_end

    probe, directions = _probe(bench, place.variant), trust.job.study.smooth.directions
    items = place.items(directions)
    ends = [load_end(item.file, item.key) for item in items]
    assert all(end is not None for end in ends)
    first = ends[0]
    found = [
        dataclasses.asdict(probe.figures(first, ends[2 * k + 1], ends[2 * k + 2]))  # type: ignore[arg-type]
        for k in range(directions)
    ]
    row: dict[str, Any] = {"loss": float(first.values.mean())}  # type: ignore[union-attr]
    for name in FIGURES:
        values = np.array([one[name] for one in found])
        known = bool(np.isfinite(values).all())
        row[name] = float(values.mean()) if known else None
        row[f"{name}_by_direction"] = values.tolist() if known else None
    return row


# In words.


def verdict(row: dict[str, Any]) -> str:
    """By what the targets say: weights that no target looks at may bend as they like."""
    value = row.get("linearity")
    if value is None:
        return "unknown"
    well = WELL_TO_HALVES if row["name"] == HALVES else WELL
    return "usefully" if value >= well else "with care" if value >= PARTLY else "not usefully"


def sentences(rows: list[dict[str, Any]], h: float, measure: str = "loss") -> list[str]:
    """The headline, what the weights say, how far it goes, what helps, and what could not be measured."""
    base, others = rows[0], [row for row in rows[1:] if row.get("linearity") is not None]
    if base["linearity"] is None:
        return ["The targets do not answer to the data weights: no figure can say whether a derivative would."]
    head = {
        "usefully": "This training can be differentiated usefully",
        "with care": "This training can be differentiated, with care",
        "not usefully": "This training cannot be differentiated usefully",
    }[verdict(base)]
    said = [
        f"{head}: when data weights move by {2 * h:.0%}, what the targets do has linearity {base['linearity']:.3f} "
        "(1 is a straight line; 0 is trainings that have nothing to do with one another).",
        f"In the weights: S {base['agreement']:.3f}, S' {base['mended']:.3f}, curvature {base['curvature']:.2f}"
        + (f", S in the optimiser's metric {base['metric']:.3f}" if base["metric"] is not None else "")
        + ".",
    ]
    for row in others:
        if row["name"] == HALVES:
            said.append(
                f"From data weights of a half to a random half of the examples, linearity is {row['linearity']:.3f}: "
                f"what is chosen by derivatives there can be {_words(row)}."
            )
    said += _helps(base, [row for row in others if row["name"] != HALVES], measure)
    failed = [f"{row['name']} ({row['error']})" for row in rows if row.get("error")]
    return said + ([f"Could not be measured: {'; '.join(failed)}."] if failed else [])


def _words(row: dict[str, Any]) -> str:
    return {
        "usefully": "foretold well", "with care": "foretold in part", "not usefully": "foretold hardly at all",
    }[verdict(row)]  # fmt: skip


def _helps(base: dict[str, Any], others: list[dict[str, Any]], measure: str) -> list[str]:
    """What helped by more than directions differ, where there is anything to be won."""
    if not others:
        return []
    if base["linearity"] >= ENOUGH:
        return ["Nothing needs changing: no change could add to that."]
    helped = sorted((row for row in others if _surer(row, base)), key=lambda row: -row["linearity"])
    if not helped:
        return ["None of the changes that were tried helped by more than directions differ."]
    read = "minus the margin" if measure == "margin" else "loss"
    told = [
        f"{row['name']} (linearity {row['linearity']:.3f}, {read} {row['loss']:.3f}; {row['how']})"
        for row in helped[:3]
    ]
    return [f"What helped most, against {base['linearity']:.3f} at {base['loss']:.3f}: {'; '.join(told)}."]


def _surer(row: dict[str, Any], base: dict[str, Any]) -> bool:
    """Directions are the same for both: their paired differences, beyond twice the standard error of the mean."""
    gaps = np.array(row["linearity_by_direction"]) - np.array(base["linearity_by_direction"])
    if len(gaps) < 2:
        return bool(gaps.mean() > 0)
    return bool(gaps.mean() > 2 * gaps.std(ddof=1) / math.sqrt(len(gaps)))
