"""The known-answer test: copies of target examples are planted in the pool, and each must rank first for its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from assay.core.keys import decode_ids, hash_ids
from assay.core.pool import Pool, PoolWriter
from assay.core.run import Ledger
from assay.job import Job
from assay.numerics.stats import crossed_interval, verdict
from assay.proxies import train_proxies
from assay.trust.contest import scores
from assay.trust.ground import Trust


def known_answer(trust: Trust) -> dict[str, Any]:
    """The rank of each copy among the pool, by scores of models that were trained with the copies."""
    job, probes = _with_copies(trust), trust.probes
    train_proxies(job)
    count, rows = len(job.pool), []
    seconds = flops = 0.0
    for entry in trust.entries:
        if entry.error:
            continue
        values = scores(job, entry.method)[0]
        columns = [values[:, q] for q in probes]
        places = np.array([_place(v, count - len(probes) + p) for p, v in enumerate(columns)])
        share = 1 - places / (count - 1)  # 1: first, 0: last
        mean, low, high = crossed_interval(share, level=trust.spec.level)
        rows.append(
            {
                "name": entry.name, "null": entry.null, "value": mean, "ci": [low, min(1.0, high)],
                "first": float((places == 0).mean()), "reciprocal": float((1 / (1 + places)).mean()),
                "over_control": mean - 0.5, "control_ci": [low - 0.5, high - 0.5],
                "verdict": verdict(low - 0.5, high - 0.5),
            }
        )  # fmt: skip
    for name in (p.name for p in job.proxies):
        cost = job.run.cost(name)
        seconds, flops = seconds + cost["wall"], flops + cost["flops"]
    return {
        "rows": rows, "unit": "share of the pool ranked below the copy", "spent": {"wall": seconds, "flops": flops},
        "control": {"name": "random", "null": True, "value": 0.5, "ci": None},
        "detail": f"One copy of each of {len(probes)} targets among {count} examples; scoring models trained anew",
    }  # fmt: skip


def _place(values: np.ndarray, at: int) -> float:
    """Examples that rank above this one; of those that tie with it, half."""
    return float(len(values) - stats.rankdata(values)[at])


def _with_copies(trust: Trust) -> Job:
    """The job on a pool with the copies at its end; everything else is as it was."""
    job, copies = copy.copy(trust.job), trust.target.at(trust.probes)

    def build(part: Path, _: Ledger) -> None:
        writer = PoolWriter(part)
        writer.write(pa.table(_columns(job.pool, copies)))
        writer.finish()

    key = job.pool.fingerprint, copies.fingerprint
    job.pool = Pool.open(job.run.step("planted", key, build, label="plant copies"))
    task = job.task
    assert task is not None
    label = task.describe(), job.pool.fingerprint
    step = job.run.step("encode", label, lambda part, _: task.prepare(job.pool, part), label="tokenise")
    job.encodings = {**job.encodings, job.pool.fingerprint: step}
    return job


def _columns(pool: Pool, copies: Pool) -> dict[str, list[Any]]:
    """Columns of the pool and the copies; a column that the target lacks is empty for copies."""
    columns: dict[str, list[Any]] = {"id": decode_ids(pool.ids) + _names(pool, copies)}
    for name in pool.columns:
        if name not in ("id", "source", "source_row"):
            own = copies.column(name) if name in copies.columns else [None] * len(copies)
            columns[name] = pool.column(name) + own
    return columns


def _names(pool: Pool, copies: Pool) -> list[str]:
    """Ids that no example of the pool has."""
    known = set(pool.ids.tolist())
    hashes = hash_ids(copies.ids, "copy").tolist()
    names = [f"copy-{value:016x}" for value in hashes]
    assert not known & {n.encode() for n in names}, "a hash of 64 bits met an id"
    return names
