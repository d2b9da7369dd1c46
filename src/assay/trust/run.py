"""`assay verify`: read, train, retrain, score, check, report; every step of it kept, so that a killed one goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from assay import __version__
from assay.core.errors import InputError
from assay.core.keys import decode_ids
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.progress import Progress
from assay.core.run import Meter, Run, environment
from assay.engine import local
from assay.job import Job, build_task, check_contamination, read_pool
from assay.proxies import train_proxies
from assay.specs import LdsSpec
from assay.study import Study
from assay.trust import checks, contest, planted, smooth, standing
from assay.trust.findings import findings
from assay.trust.ground import Trust, trim

# Unless the study says otherwise: a small pool is read more than once, and a language model, whose every training costs
# more, is trained on fewer examples and subsets.
PASSES, BATCH = 10.0, 64
TEXT_PASSES, TOKENS, TEXT_LDS = 2.0, 1024, {"examples": 500, "subsets": 40}
# Targets shown with their best examples, how many of these, and characters of each.
LOOKS, BEST, TEXT = 4, 3, 600

CHECKS: dict[str, tuple[str, Callable[[Trust], dict[str, Any]]]] = {
    "removal": ("Removal of the best examples", checks.removal),
    "leave_one_out": ("Leave-one-out", checks.leave_one_out),
    "known_answer": ("Known answer: planted copies", planted.known_answer),
    "tail_patch": ("Tail patch: one step on the best examples", checks.tail_patch),
    "mislabel": ("Wrong labels", checks.mislabel),
}


def settled(study: Study) -> Study:
    """The study with what it leaves open decided by the kind of its model."""
    proxy, words = study.proxy, study.task.kind in ("text", "causal")
    batch, passes = (TOKENS, TEXT_PASSES) if words else (BATCH, PASSES)
    recipe = {} if "terms_per_step" in proxy.recipe.model_fields_set else {"terms_per_step": batch}
    length = {} if {"passes", "steps"} & proxy.model_fields_set else {"passes": passes}
    few = {k: v for k, v in TEXT_LDS.items() if words and k not in study.lds.model_fields_set}
    proxy = proxy.model_copy(update={"recipe": proxy.recipe.model_copy(update=recipe), **length})
    return study.model_copy(update={"proxy": proxy, "lds": study.lds.model_copy(update=few)})


def spec(study: Study) -> dict[str, Any]:
    """What a verification is decided by, as JSON; what only `assay run` reads is left out."""
    unread = ("arms", "methods", "budget", "train", "verify", "filters")
    plain = {k: v for k, v in study.spec().items() if k not in unread}
    listed = [
        {"name": a.name, "grid": {k: list(v) for k, v in a.grid.items()}, "options": make(Scorer, a.method).spec()}
        for a in study.contestants()
        if not a.name.startswith("random-")
    ]
    chosen = "methods" in study.model_fields_set or study.arms
    return plain | {"lds": study.lds.model_dump(mode="json"), "methods": listed if chosen else "default"}


def smooth_spec(study: Study) -> dict[str, Any]:
    """What metasmoothness is decided by, as JSON."""
    plain = {k: v for k, v in spec(study).items() if k not in ("lds", "methods")}
    sample = {k: getattr(study.lds, k) for k in ("examples", "targets", "measure")}
    return plain | {"lds": sample, "smooth": study.smooth.model_dump(mode="json")}


def wanted(trust: Trust) -> list[str]:
    """The further checks: those that were asked for, or all that mean something here."""
    asked = trust.spec.checks
    if asked is not None:
        return [name for name in CHECKS if name in asked]
    task = trust.job.task
    assert task is not None
    # Removal retrains more often than the bank: of language models, it must be asked for.
    fits = {
        "removal": not task.countable, "leave_one_out": checks.convex(task),
        "mislabel": bool(checks.flipped(trust).any()),
    }  # fmt: skip
    return [name for name in CHECKS if fits.get(name, True)]


def verify_study(
    study: Study, out: Path, *, workers: int | None = None, progress: Progress | None = None, replace: bool = False,
    command: str = "", report: Callable[[Path], Path] | None = None, begin: Callable[[Trust], None] | None = None,
    metasmooth: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Hold the study's methods against retraining and return the result (also in `result.json`). With `metasmooth`,
    say instead whether the scoring models' training can be differentiated.

    Raises `InputError` for bad input. Interrupted at any moment, the same call goes on.
    """
    study, progress = settled(study), progress or Progress()
    about = {"metasmooth": smooth_spec(study)} if metasmooth else {"verify": spec(study)}
    run = Run.open(out, about, replace=replace, command=command)
    trust = Trust(Job(study, run, workers or local.default_workers(), progress, command), study.lds)
    try:
        with Meter() as meter:
            result = (_smooth if metasmooth else _work)(trust, begin)
        result |= {"wall": meter.wall, "peak_rss": meter.peak, "cpu": meter.cpu}
        run.publish(result)
        if report:
            report(out)
        run.clean()
        run.done()
        return result
    finally:
        run.close()


def _prepare(trust: Trust) -> None:
    study = trust.job.study
    if study.filters or any(arm.filters for arm in study.contestants()):
        trust.job.warn("filters are left out: scores are held against retraining on subsets of the pool as it is")
    for stage in (read_pool, check_contamination):
        stage(trust.job)
    trim(trust)
    build_task(trust.job)
    _check_measure(trust.spec, trust.job.task)


def _smooth(trust: Trust, begin: Callable[[Trust], None] | None) -> dict[str, Any]:
    job, own = trust.job, trust.job.study.smooth
    _prepare(trust)
    if begin:
        begin(trust)
    rows = [row | {"verdict": smooth.verdict(row)} for row in smooth.measured(trust)]
    return {
        "format": 1, "kind": "metasmooth", "assay": __version__, "name": job.study.name, "command": job.command,
        "environment": environment(), "study": smooth_spec(job.study), "pool": trust.facts,
        "target": {"name": job.target.name, "used": len(trust.target), "measure": trust.spec.measure},
        "model": {"kind": job.study.task.kind, "parameters": _parameters(job.task)},
        "training": {"steps": trust.recipe.steps, "recipe": trust.recipe.spec()},
        "smooth": {"h": own.h, "directions": own.directions, "center": own.center, "rows": rows},
        "findings": smooth.sentences(rows, own.h, trust.spec.measure),
        "ledger": job.run.ledger, "warnings": job.warnings,
    }  # fmt: skip


def _work(trust: Trust, begin: Callable[[Trust], None] | None) -> dict[str, Any]:
    job = trust.job
    _prepare(trust)
    trust.entries = contest.entries(job.study, job.pool)
    if not any(e.name in ("bm25", "nearest") for e in trust.entries):
        job.warn("the pool has neither text nor a column of vectors: likeness to the target is not among the nulls")
    job.methods = {f"{e.name} {k}": m for e in trust.entries for k, m in enumerate(e.variants)}
    if begin:
        begin(trust)
    train_proxies(job)
    standing.train_bank(trust)
    standing.score(trust)
    methods = standing.standing(trust)
    found = [_checked(trust, name) for name in wanted(trust)]
    result = {
        "format": 1, "kind": "verify", "assay": __version__, "name": job.study.name, "command": job.command,
        "environment": environment(), "study": spec(job.study), "pool": trust.facts, "level": trust.spec.level,
        "target": {
            "name": job.target.name, "selecting": len(trust.select), "judging": len(trust.judge),
            "measure": trust.spec.measure,
        },
        "model": {"kind": job.study.task.kind, "parameters": _parameters(job.task)},
        "bank": trust.facts.pop("bank"), "methods": methods, "checks": found, "ledger": job.run.ledger,
        "warnings": job.warnings,
    }  # fmt: skip
    return result | {"findings": findings(result), "examples": _look(trust, methods)}


def _checked(trust: Trust, name: str) -> dict[str, Any]:
    title, call = CHECKS[name]
    start = time.perf_counter()
    found = call(trust)
    spent = {"wall": time.perf_counter() - start, "flops": 0.0} | found.pop("spent", {})
    return {"check": name, "title": title, **found, "seconds": spent["wall"], "flops": spent["flops"]}


def _look(trust: Trust, methods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few reported targets with the best examples of the method that did best, to be read by a person."""
    own = {r["name"]: r[r["label"]]["value"] for r in methods if not r.get("error") and r["name"] != contest.RANDOM}
    if not own:
        return []
    entry = next(e for e in trust.entries if e.name == max(own, key=lambda n: own[n]))
    found = []
    for q in trust.probes[:LOOKS].tolist():
        order = np.argsort(-entry.scores[:, q], kind="stable")[:BEST]
        top = [
            {**about, "score": float(entry.scores[i, q])}
            for i, about in zip(order.tolist(), _shown(trust.job.pool.at(order)), strict=True)
        ]
        found.append({"method": entry.name, "target": _shown(trust.target.at([q]))[0], "top": top})
    return found


def _shown(pool: Pool) -> list[dict[str, Any]]:
    texts = pool.column("text") if "text" in pool.columns else [""] * len(pool)
    return [
        {"id": name, "class": str(kind), "text": text[:TEXT]}
        for name, kind, text in zip(decode_ids(pool.ids), checks.classes(pool), texts, strict=True)
    ]


def _parameters(task: Any) -> int:
    return sum(p.numel() for p in task.module.parameters())


def _check_measure(spec: LdsSpec, task: Any) -> None:
    if spec.measure == "margin" and not hasattr(task, "margin"):
        raise InputError(
            "the task has no margin", where="lds.measure", why="a margin is of a class among others",
            fix='set lds.measure = "loss"',
        )  # fmt: skip
