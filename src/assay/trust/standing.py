"""The LDS of every contestant: options chosen on one half of the targets, figures on the other, nulls beside."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import digest_ids
from assay.numerics import lds
from assay.summary import cost
from assay.trust.contest import RANDOM, Entry, scores
from assay.trust.ground import Trust, protocol, retrained

Verdict = Literal["beats the nulls", "better than random", "no better than random", "misleading", "null"]


def train_bank(trust: Trust) -> None:
    """The truth: what the model does on the targets after training on each random subset."""
    from assay.train.bank import subsets

    spec, job = trust.spec, trust.job
    trust.masks = subsets(job.pool.ids, spec.subsets, spec.share, job.study.seed)
    trust.values, spent = retrained(trust, trust.masks, "retrain on subsets")
    reported = trust.values[:, :, trust.judge]
    facts = {**protocol(trust), "share": spec.share, "level": spec.level, "targets": digest_ids(trust.target.ids)}
    top = lds.ceiling(reported)
    trust.facts["bank"] = {
        "subsets": spec.subsets, "share": spec.share, "examples": int(trust.masks[0].sum()), "seeds": spec.seeds,
        "protocol": spec.protocol, "measure": spec.measure, "trainings": spec.subsets * spec.seeds,
        "fingerprint": lds.fingerprint(facts, trust.masks), "seconds": spent["wall"], "flops": spent["flops"],
        "steps": trust.recipe.steps, "terms_per_step": trust.recipe.terms_per_step,
        "recipe": trust.recipe.spec(), "ceiling": {"one": top.one, "average": top.average},
    }  # fmt: skip


def score(trust: Trust) -> None:
    """Every variant's scores; of each entry the variant with the best LDS on the selecting half is kept."""
    job = trust.job
    for entry in trust.entries:
        found = []
        for method, about in zip(entry.variants, entry.tried, strict=True):
            values, single = scores(job, method)
            about["each"] = single
            try:
                about["selecting"] = float(np.mean(_lds(trust, values, trust.select)))
            except InputError as error:
                about["error"] = str(error)
            found.append(values)
        usable = [k for k, about in enumerate(entry.tried) if "selecting" in about]
        entry.error = "" if usable else str(entry.tried[0]["error"])
        entry.chosen = max(usable, key=lambda k: entry.tried[k]["selecting"], default=0)
        entry.scores = found[entry.chosen]
        for name in edges(entry):
            job.warn(f"the best {name} of {entry.name} is at the edge of its grid: a wider grid may do better")
    job.warnings += [m for m in job.measurer.warnings if m not in job.warnings]


def edges(entry: Entry) -> list[str]:
    """Options of numbers whose chosen value is the least or the greatest of three or more."""
    found = []
    for name, value in entry.tried[entry.chosen].items():
        tried = [one.get(name) for one in entry.tried]
        if name not in ("selecting", "each", "error") and all(isinstance(v, int | float) for v in tried):
            known = sorted({v for v in tried if v is not None})
            found += [name] if len(known) > 2 and value in (known[0], known[-1]) else []
    return found


def _lds(trust: Trust, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Of the mean over seeds, by target; no interval."""
    return lds.lds(trust.masks, values[:, columns], trust.values[:, :, columns].mean(axis=1))


def standing(trust: Trust) -> list[dict[str, Any]]:
    """A row for each entry: both figures on the reported half, its gain over random scores and its least over a null,
    verdict and cost."""
    label: lds.Label = "lds_avg" if trust.spec.seeds > 1 else "lds_fixed"
    measured = {e.name: _measured(trust, e) for e in trust.entries if not e.error}
    nulls = [e.name for e in trust.entries if e.null and e.name in measured and measured[e.name]]
    rows = []
    for entry in trust.entries:
        row = _about(trust, entry)
        if entry.error or entry.name not in measured:
            rows.append(row | {"error": entry.error})
            continue
        own = measured[entry.name]
        row |= {
            name: {"value": found.value, "ci": [found.low, found.high], "by_target": found.by_target.tolist()}
            for name, found in own.items()
        }
        gains = {n: _gain(n, own[label], measured[n][label]) for n in nulls if n != entry.name}
        if RANDOM in gains:
            row["over_random"] = gains[RANDOM]
        if gains:
            row["over_null"] = least(list(gains.values()))
        rows.append(row | {"verdict": verdict(row, label), "label": label})
    return rows


def _measured(trust: Trust, entry: Entry) -> dict[str, lds.Lds]:
    spec, columns = trust.spec, trust.judge
    labels: tuple[lds.Label, ...] = ("lds_fixed", "lds_avg") if spec.seeds > 1 else ("lds_fixed",)
    try:
        return {
            label: lds.score(
                trust.masks, entry.scores[:, columns], trust.values[:, :, columns], label=label, level=spec.level,
                draws=spec.draws, seed=trust.job.study.seed, fingerprint=trust.facts["bank"]["fingerprint"],
            )
            for label in labels
        }  # fmt: skip
    except InputError as error:
        entry.error = str(error)
        return {}


def _gain(name: str, own: lds.Lds, other: lds.Lds) -> dict[str, Any]:
    value, low, high = lds.difference(own, other)
    return {"name": name, "value": value, "ci": [low, high]}


def least(gains: list[dict[str, Any]]) -> dict[str, Any]:
    """The gain that is least sure. All of them are above zero only if its interval is: a method beats the nulls when it
    beats each of them, so that none need be picked by the figures, and no level need be corrected for their number
    (the intersection-union test, Berger 1982)."""
    return min(gains, key=lambda gain: gain["ci"][0])


def verdict(row: dict[str, Any], label: str) -> Verdict:
    """In words. Random scores have an LDS of zero, so what has zero in its interval is no better."""
    low, high = row[label]["ci"]
    if row["null"]:
        return "null"
    if low <= 0:
        return "misleading" if high < 0 else "no better than random"
    over = row.get("over_null")
    return "beats the nulls" if over and over["ci"][0] > 0 else "better than random"


def _about(trust: Trust, entry: Entry) -> dict[str, Any]:
    """Options and costs; scoring models are part of the cost of whoever reads them."""
    flops, seconds = cost(trust.job, entry.method)
    assert trust.job.task is not None
    one = trust.job.task.training_flops(trust.job.sizes, trust.recipe.steps * trust.recipe.terms_per_step)
    return {
        "name": entry.name, "null": entry.null, "options": entry.method.spec(), "cost_class": entry.method.cost,
        "each": entry.tried[entry.chosen].get("each", False), "seconds": seconds, "flops": flops,
        "trainings": flops / one, "tuning_seconds": cost(trust.job, *entry.variants)[1],
        "tried": entry.tried if len(entry.tried) > 1 else [],
    }  # fmt: skip
