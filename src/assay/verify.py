"""The verbs `train`, `evaluate` and `verify`: paired retraining of every arm, and what it proves."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.core.keys import write_bytes
from assay.core.pool import Pool, positions
from assay.core.progress import Progress
from assay.core.run import Meter, Run, tree_rss
from assay.core.selection import Selection
from assay.engine import local
from assay.numerics.stats import crossed_interval, verdict

if TYPE_CHECKING:
    from assay.core.task import Task
    from assay.train.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """One training run: an arm at one seed, in its own folder; and the folder of its judgement."""

    arm: str
    seed: int
    recipe: Recipe
    rows: np.ndarray
    selection: Selection
    folder: Path
    verdict: Path


@dataclass(frozen=True)
class Bench:
    """What all jobs share: the task, the encoded pool and the encoded judging half."""

    task: Task
    pool: Path
    judging: Path


def train_one(bench: Bench, job: Job) -> dict[str, dict[str, float]]:
    """Train, unless that was done for another judging half; evaluate every judging item; keep both. Returns what each
    cost. Runs in a worker."""
    from assay.train.loop import evaluate, load, train

    with Meter() as training:
        if (job.folder / "step.json").exists():
            params = load(job.folder / "checkpoint.safetensors").params
        else:
            encoded = bench.task.encoded(bench.pool)
            params = train(bench.task, encoded, job.rows, job.selection, job.recipe, job.folder).params
    with Meter() as judging:
        found = evaluate(bench.task, params, bench.task.encoded(bench.judging))
        arrays = "\n".join(
            json.dumps({"metric": name, "values": values.tolist()}) for name, values in sorted(found.items())
        )
        write_bytes(job.verdict / "judged.jsonl", (arrays + "\n").encode())
    return {what: {"wall": m.wall, "cpu": m.cpu} for what, m in (("train", training), ("judge", judging))}


def judged(folder: Path) -> dict[str, np.ndarray]:
    """Per-item numbers of one job, `[items]` each."""
    lines = (folder / "judged.jsonl").read_text().splitlines()
    return {entry["metric"]: np.array(entry["values"]) for entry in map(json.loads, lines)}


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe of the judged trainings at the seed of this number."""
    return recipe.with_seed(recipe.seed * 1000 + seed)


def paired_training(
    run: Run, task: Task, pool: Pool, encodings: Mapping[str, Path], judging: Pool,
    selections: Mapping[str, Selection | Sequence[Selection]], recipe: Recipe, *, seeds: int, workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, list[dict[str, np.ndarray]]]:  # fmt: skip
    """Train every arm at the same `seeds` seeds; returns per-item numbers by arm, a list over seeds.

    Pairing: at one seed all arms start from the same weights, and the order of two arms' common examples has one key.
    What was trained does not depend on what judges it: another target finds the trainings of equal selections made.
    An arm that says itself in which order it is trained on has a Selection for each seed.
    """
    progress = progress or Progress()
    bench = Bench(task, encodings[pool.fingerprint], encodings[judging.fingerprint])
    made: dict[tuple[str, int], _Made] = {}
    missing: dict[Path, tuple[Job, _Made]] = {}
    for seed in range(seeds):
        for arm, given in selections.items():
            own, selection = seeded(recipe, seed), given if isinstance(given, Selection) else given[seed]
            key = {
                "task": task.describe(), "pool": pool.fingerprint, "recipe": own.spec(),
                "selection": selection.fingerprint,
            }  # fmt: skip
            train = _Place("train", key, *run.place("train", key))
            judge_key = {"train": train.hash, "judging": judging.fingerprint}
            judge = _Place("judge", judge_key, *run.place("judge", judge_key))
            made[arm, seed] = one = _Made(train, judge)
            if not (train.done and judge.done) and judge.final not in missing:
                folders = [place.final if place.done else place.part for place in (train, judge)]
                for folder in folders:
                    folder.mkdir(parents=True, exist_ok=True)
                rows = positions(pool.ids, selection.ids)
                missing[judge.final] = Job(arm, seed, own, rows, selection, *folders), one
    _work_off(run, bench, list(missing.values()), len(made), workers, progress)
    names = sorted({place.final.name for one in made.values() for place in (one.train, one.judge)})
    run.absorb("train arms", names, workers)
    return {arm: [judged(made[arm, seed].judge.final) for seed in range(seeds)] for arm in selections}


@dataclass(frozen=True)
class _Place:
    """A step of the run: what it is, and where it stands when done and while it is made."""

    name: str
    key: dict[str, Any]
    final: Path
    part: Path
    hash: str

    @property
    def done(self) -> bool:
        return (self.final / "step.json").exists()

    def commit(self, run: Run, cost: dict[str, Any]) -> None:
        run.commit(self.final, self.part, {"name": self.name, "key": self.key, "hash": self.hash}, cost)


@dataclass(frozen=True)
class _Made:
    train: _Place
    judge: _Place


def _work_off(
    run: Run, bench: Bench, missing: list[tuple[Job, _Made]], total: int, workers: int, progress: Progress
) -> None:
    progress.begin("train arms", total)
    progress.advance(total - len(missing))
    jobs = [job for job, _ in missing]
    for (job, made), cost in zip(missing, local.map(train_one, bench, jobs, workers=workers), strict=True):
        if not made.train.done:
            sizes = bench.task.encoded(bench.pool).sizes[job.rows]
            flops = bench.task.training_flops(sizes, job.recipe.steps * job.recipe.terms_per_step)
            stage = {"stage": f"train {job.arm} seed {job.seed}", "flops": flops, "peak_rss": tree_rss()}
            made.train.commit(run, {**stage, **cost["train"]})
        if not made.judge.done:
            stage = {"stage": f"judge {job.arm} seed {job.seed}", "flops": 0.0, "peak_rss": tree_rss()}
            made.judge.commit(run, {**stage, **cost["judge"]})
        progress.advance()
    progress.end()


def compare(arm: np.ndarray, baseline: np.ndarray, *, level: float = 0.95, draw: bool = False) -> dict[str, Any]:
    """Gain of an arm over baseline draws, with a verdict.

    `arm` is `[seeds, items]`, `baseline` `[draws, seeds, items]`, both judged losses; gain = baseline - arm, in the
    unit of the loss, positive = the arm is better. The interval treats draws, seeds and items as crossed random
    factors (`crossed_interval`). With `draw`, the arm is itself a random draw, and the luck of its draw
    counts too; without, the verdict is about the one set that was selected.
    """
    mean, low, high = crossed_interval(baseline - arm[None], level=level, single=(0,) if draw else ())
    return {"gain": mean, "ci": [low, high], "verdict": verdict(low, high)}


def verify(
    losses: Mapping[str, np.ndarray], *, level: float = 0.95, drawn: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Every arm against the random arms (names `random-*`), and each random arm against the other ones.

    `losses[arm]` is `[seeds, items]` on the judging half. With a single random arm its own comparison is missing. Arms
    in `drawn` fell by lot as random ones do: the luck of their draw is in their intervals.
    """
    draws = [name for name in losses if name.startswith("random-")]
    result: dict[str, dict[str, Any]] = {}
    for name, own in losses.items():
        others = [losses[d] for d in draws if d != name]
        seeds = own.mean(axis=1)
        _, low, high = crossed_interval(own, level=level)
        entry: dict[str, Any] = {
            "judged_loss": float(own.mean()),
            "judged_loss_ci": [low, high],
            "by_seed": seeds.tolist(),
        }
        if others:
            entry |= compare(own, np.stack(others), level=level, draw=name in draws or name in drawn)
        if "everything" in losses and name != "everything":
            entry["over_everything"] = compare(own, losses["everything"][None], level=level)
        result[name] = entry
    return result


def detectable(losses: Mapping[str, np.ndarray]) -> float:
    """Smallest gain that these seeds find four times in five: 2.8 sd sqrt(2 / n) over seeds of the random arms."""
    draws = [v.mean(axis=1) for name, v in losses.items() if name.startswith("random-")]
    if not draws or len(draws[0]) < 2:
        return math.nan
    sd = float(np.sqrt(np.mean([d.var(ddof=1) for d in draws])))
    return 2.8 * sd * math.sqrt(2 / len(draws[0]))
