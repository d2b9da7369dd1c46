"""The stage that trains the scoring models, and the `Measurer` that uses them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.core.keys import digest
from assay.core.method import Mark
from assay.core.run import Meter
from assay.core.selection import Selection
from assay.engine import local
from assay.measure import Measurer, uses_model

if TYPE_CHECKING:
    from assay.core.task import Task
    from assay.job import Job
    from assay.study import Study
    from assay.train.recipe import Recipe


def train_proxies(job: Job) -> None:
    """The scoring models: the task's model trained on the pool but for contaminated rows, from independent seeds."""
    spec, task = job.study.proxy, job.task
    assert task is not None
    wanted = any(uses_model(m) for m in (*job.methods.values(), *job.sifters))
    trajectories: list[list[Mark]] = []
    recipe = None
    if wanted:
        # Rows that contain target items are kept from the scoring models too.
        rows = np.flatnonzero(~np.isin(job.pool.ids, job.hits.ids))
        recipe = full_recipe(job, job.sizes[rows])
        job.proxies = _proxies(job, task, recipe, rows)
        trajectories = [trajectory(path, recipe, spec.checkpoints, spec.weight) for path in job.proxies]
    study = job.study
    job.measurer = Measurer(
        job.run, job.pool, job.target.selecting, seed=study.seed, task=task, encodings=job.encodings,
        models=[run[-1].params for run in trajectories], optimisers=[run[-1].optimiser for run in trajectories],
        trajectories=trajectories, key=digest([p.name for p in job.proxies]), workers=job.workers, batch=study.batch,
        shard=study.shard, area=study.area, progress=job.progress, source=job.source, barred=job.hits.ids,
        recipe=recipe and recipe.with_seed(seed_of(study, 0)), withheld=job.withheld,
    )  # fmt: skip


def trajectory(path: Path, recipe: Recipe, checkpoints: int, weight: float = 1.0) -> list[Mark]:
    """The marks that a training run left in its folder, in time order."""
    from assay.train.loop import load, mark_file, mark_steps

    inertia = recipe.momentum if recipe.optimiser == "momentum" else 0.0
    about = {
        "betas": recipe.betas, "eps": recipe.eps, "inertia": inertia, "decay": recipe.weight_decay, "weight": weight,
    }  # fmt: skip
    marks, before = [], 0
    for step in mark_steps(recipe.steps, checkpoints):
        trained = load(path / "checkpoint.safetensors" if step == recipe.steps else mark_file(path, step))
        rate = sum(recipe.rate(k) for k in range(before, step))
        marks.append(
            Mark(trained.params, {**trained.state, "steps": len(trained.losses), **about}, step - before, rate)
        )
        before = step
    return marks


def full_recipe(job: Job, sizes: np.ndarray) -> Recipe:
    """How a scoring model is trained on examples with these numbers of terms."""
    spec = job.study.proxy
    steps = spec.steps or max(1, math.ceil(spec.passes * int(sizes.sum()) / spec.recipe.terms_per_step))
    return spec.recipe.model_copy(update={"steps": steps})


def seed_of(study: Study, number: int) -> int:
    """Seed of a scoring model: its first weights and its order."""
    return 100_000 + 1000 * study.seed + number


@dataclass(frozen=True)
class _Proxy:
    task: Any
    pool: Path
    rows: np.ndarray
    selection: Selection
    checkpoints: int


def _train_proxy(shared: _Proxy, item: tuple[Any, Path]) -> dict[str, float]:
    from assay.train.loop import train

    recipe, folder = item
    with Meter() as meter:
        encoded = shared.task.encoded(shared.pool)
        train(shared.task, encoded, shared.rows, shared.selection, recipe, folder, marks=shared.checkpoints)
    return {"wall": meter.wall, "cpu": meter.cpu, "peak_rss": meter.peak}


def _proxies(job: Job, task: Task, recipe: Recipe, rows: np.ndarray) -> list[Path]:
    from assay.train.models import write_task

    spec, encoded = job.study.proxy, job.encodings[job.pool.fingerprint]
    chosen = Selection(job.pool.ids[rows], np.full(len(rows), spec.weight))
    marks = {"checkpoints": spec.checkpoints} if spec.checkpoints > 1 else {}
    done, missing = [], []
    for k in range(spec.models):
        own = recipe.with_seed(seed_of(job.study, k))
        key = {
            "task": task.describe(), "pool": job.pool.fingerprint, "recipe": own.spec(),
            "selection": chosen.fingerprint, **marks,
        }  # fmt: skip
        final, part, full = job.run.place("proxy", key)
        done.append(final)
        if not (final / "step.json").exists():
            part.mkdir(parents=True, exist_ok=True)
            missing.append((own, part, final, {"name": "proxy", "key": key, "hash": full}))
    job.progress.begin("proxy", len(done), "train scoring model")
    job.progress.advance(len(done) - len(missing))
    items = [(own, part) for own, part, _, _ in missing]
    costs = local.map(_train_proxy, _Proxy(task, encoded, rows, chosen, spec.checkpoints), items, workers=job.workers)
    for (own, part, final, about), cost in zip(missing, costs, strict=True):
        write_task(part / "task.json", task)
        flops = task.training_flops(job.sizes[rows], own.steps * own.terms_per_step)
        job.run.commit(final, part, about, {"stage": "train scoring model", "flops": flops, **cost})
        job.progress.advance()
    job.progress.end()
    job.run.absorb("train scoring model", [p.name for p in done], job.workers)
    return done
