"""The ground truth: what the stages of a verification share, and retraining on masks as a kept step."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from assay.core.errors import InputError
from assay.core.keys import hash_ids
from assay.core.pool import Pool
from assay.core.run import Ledger
from assay.core.target import Target
from assay.data import gate
from assay.job import Job
from assay.numerics.lds import FEWEST_SUBSETS, FEWEST_TARGETS
from assay.proxies import full_recipe, seed_of
from assay.specs import LdsSpec
from assay.trust.contest import Entry

if TYPE_CHECKING:
    from assay.train.recipe import Recipe


@dataclass
class Trust:
    """One verification. `select` and `judge` are the target's columns that choose options and that are reported."""

    job: Job
    spec: LdsSpec
    facts: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    select: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    judge: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    masks: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))

    @property
    def target(self) -> Pool:
        """All target examples, those of `select` and of `judge`."""
        return self.job.target.selecting

    @property
    def recipe(self) -> Recipe:
        """How scoring models and all retrainings are trained."""
        return full_recipe(self.job, self.job.sizes)

    @property
    def seeds(self) -> list[int]:
        """Of the retrainings. The first is that of the first scoring model: same first weights, same order."""
        return [seed_of(self.job.study, k) for k in range(self.spec.seeds)]

    @property
    def probes(self) -> np.ndarray:
        """Columns of the reported targets that the further checks look at: a keyed sample."""
        order = np.argsort(hash_ids(self.target.ids[self.judge], "probe", self.job.study.seed), kind="stable")
        return np.sort(self.judge[order[: self.spec.probes]])


def trim(trust: Trust) -> None:
    """Pool and target as they are used: without rows that contain a target item, and keyed samples of what is left.

    Scores are asked for every target example, for each alone: which half it is in decides what its figures may be used
    for, and those that are reported are withheld from scorers that choose their own options.
    """
    job, spec, study = trust.job, trust.spec, trust.job.study
    if spec.subsets < FEWEST_SUBSETS:
        raise InputError(
            f"{spec.subsets} subsets are too few", where="lds.subsets", fix=f"give {FEWEST_SUBSETS} or more",
            why="a correlation over so few says nothing",
        )  # fmt: skip
    whole, items = len(job.pool), (job.target.selecting.contents, job.target.judging.contents)
    copies = np.isin(job.pool.contents, np.concatenate(items))
    clean = np.flatnonzero(~np.isin(job.pool.ids, job.hits.ids) & ~copies)
    order = np.argsort(hash_ids(job.pool.ids[clean], "examples", study.seed), kind="stable")
    job.pool = job.pool.at(np.sort(clean[order[: spec.examples]]))
    trust.facts = {"rows": whole, "used": len(job.pool), "contain_target": whole - len(clean)}
    if len(job.pool) < 20:
        raise InputError(
            f"the pool has {len(job.pool)} usable examples", where="pool",
            why=f"{whole - len(clean)} of {whole} contain a target item" if len(clean) < whole else "subsets need some",
            fix="give at least 20",
        )  # fmt: skip
    halves = [_some(half, spec.targets // 2, study.seed) for half in (job.target.selecting, job.target.judging)]
    if min(map(len, halves)) < FEWEST_TARGETS:
        raise InputError(
            f"{sum(map(len, halves))} target examples are too few", where="target",
            why=f"half of them choose options and half are reported, and {FEWEST_TARGETS} is the least of each",
            fix=f"give at least {2 * FEWEST_TARGETS} examples (and lds.targets of at least that many)",
        )  # fmt: skip
    both = halves[0].beside(halves[1])
    trust.select, trust.judge = np.arange(len(halves[0])), np.arange(len(halves[0]), len(both))
    job.target, job.withheld = Target(job.target.name, both, both), halves[1].ids
    job.hits = gate.Hits(job.pool.ids[:0], job.hits.items, job.hits.by_half)
    known = set(job.pool.ids.tolist())
    job.truth = {i: kind for i, kind in job.truth.items() if i in known}


def _some(pool: Pool, count: int, seed: int) -> Pool:
    order = np.argsort(hash_ids(pool.ids, "targets", seed), kind="stable")
    return pool.at(np.sort(order[:count]))


def retrained(trust: Trust, masks: np.ndarray, label: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Measured values `[M, R, q]` after training on each mask from each seed, and what that cost; kept."""
    from assay.train import bank

    job, spec, recipe = trust.job, trust.spec, trust.recipe
    task = job.task
    assert task is not None
    encoded, target = (task.encoded(job.encodings[p.fingerprint]) for p in (job.pool, trust.target))
    key = protocol(trust) | {
        "recipe": recipe.spec(), "target": trust.target.fingerprint, "shape": list(masks.shape),
        "masks": xxhash.xxh3_128_hexdigest(np.packbits(masks, axis=1).tobytes()),
    }  # fmt: skip

    def build(part: Path, ledger: Ledger) -> None:
        options: dict[str, Any] = {"seeds": trust.seeds, "targets": {"target": target}, "protocol": spec.protocol}
        found = bank.retrain(
            task, encoded, job.pool.ids, masks, recipe, measure=spec.measure, path=part, workers=job.workers,
            progress=job.progress, **options,
        )  # fmt: skip
        ledger.spent(bank.flops(task, encoded, masks, recipe, **options))
        np.save(part / "values.npy", found["target"], allow_pickle=False)

    path = job.run.step("bank", key, build, label=label)
    cost = job.run.cost(path.name)
    return np.load(path / "values.npy", allow_pickle=False), {k: cost[k] for k in ("wall", "flops")}


def protocol(trust: Trust) -> dict[str, Any]:
    """What decides the figures besides the scores and the subsets, as JSON."""
    job, spec = trust.job, trust.spec
    assert job.task is not None
    return {
        "task": job.task.describe(), "pool": job.pool.fingerprint, "recipe": trust.recipe.spec(), "seeds": trust.seeds,
        "protocol": spec.protocol, "measure": spec.measure,
        "device": f"cpu {platform.machine()}",
    }  # fmt: skip
