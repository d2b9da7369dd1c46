"""What a report needs to know, as plain JSON: verdicts, distributions, examples, agreement, truth, costs."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from assay import checks
from assay.core.method import Scorer, make
from assay.core.pool import positions
from assay.measure import closure, uses_model
from assay.numerics.stats import auc, spearman
from assay.verify import compare, detectable, verify

if TYPE_CHECKING:
    from assay.core.selection import Selection
    from assay.job import Job

EXAMPLES, SCATTER, BINS, TEXT = 12, 1200, 30, 1500
# Where more of a selection than this fell by lot, it is itself a random draw, and its luck counts in its interval.
LOT = 0.5


def summarise(job: Job) -> dict[str, Any]:
    """The body of `result.json`; its schema is checked by the report, in `report/page.py`."""
    assert job.task is not None
    clean = clean_items(job)
    losses = {arm: np.stack([seed["loss"][clean] for seed in seeds]) for arm, seeds in job.judged.items()}
    lots = {name: by_lot(job, name) for name in job.judged}
    drawn = {name for name, lot in lots.items() if lot > LOT}
    verdicts = verify(losses, level=job.study.verify.level, drawn=drawn)
    domains = job.pool.domains()
    arms = [_arm(job, name, {**verdicts[name], "by_lot": lots[name]}, domains, clean) for name in job.judged]
    scored = [name for name in job.methods if not name.startswith("random-")]
    loss = -job.measurer.table(make(Scorer, "loss")).column("score") if job.proxies else None
    ranked = {name: scores_of(job, name) for name in scored}
    return {
        "pool": _pool(job, domains),
        "target": {
            "name": job.target.name, "selecting": len(job.target.selecting), "judging": len(job.target.judging),
            "judged": int(clean.sum()), "measure": job.task.measure_unit,
        },
        "budget": {"unit": job.budget.unit, "amount": job.budget.amount, "share": _share(job)},
        "training": _training(job),
        "arms": arms,
        "nulls": _nulls(losses, job.study.verify.level),
        "detectable": _finite(detectable(losses)),
        "recommended": _recommended(arms),
        "scores": {name: _distribution(job, values, domains, loss) for name, values in ranked.items()},
        "curves": _curves(job),
        "agreement": _agreement(ranked),
        "contamination": _contamination(job),
        "pipelines": _pipelines(job),
        "checks": checks.of(job),
        "files": {a["name"]: f"dataset/{a['name']}" for a in arms if a["verdict"] != "baseline"},
    }  # fmt: skip


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def clean_items(job: Job) -> np.ndarray:
    """Judging items that no example of the pool repeats word for word: only these are judged.

    Pool examples that contain a target item were kept from the scoring models and barred from every selection already;
    an item that has a copy is left out of the judgement as well.
    """
    return ~np.isin(job.target.judging.contents, job.pool.contents)


def _share(job: Job) -> float:
    free = ~np.isin(job.pool.ids, job.hits.ids)
    whole = int(job.sizes[free].sum()) if job.budget.unit == "tokens" else int(free.sum())
    return job.budget.amount / whole


def _pool(job: Job, domains: np.ndarray) -> dict[str, Any]:
    sizes, spec = job.sizes, job.study.pool
    assert job.task is not None
    by_domain = {}
    for domain in sorted(set(domains.tolist())):
        rows = domains == domain
        by_domain[domain] = {"rows": int(rows.sum()), "tokens": int(sizes[rows].sum())}
    paths = (spec.path,) if isinstance(spec.path, str) else spec.path
    source = f"built-in: {spec.builtin}" if spec.builtin else ", ".join(paths or ())
    return {
        "source": source, "rows": len(job.pool), "tokens": int(sizes.sum()) if job.task.countable else None,
        "domains": by_domain, "fingerprint": job.pool.fingerprint,
        "quarantined": job.quarantined or {"total": 0, "reasons": {}, "examples": []},
    }  # fmt: skip


def _training(job: Job) -> dict[str, Any]:
    assert job.task is not None
    recipe = job.recipe
    parameters = sum(p.numel() for p in job.task.module.parameters())
    chosen = [
        int(job.sizes[positions(job.pool.ids, s.ids)].sum()) for n, s in job.selections.items() if n != "everything"
    ]
    seen = recipe.steps * recipe.terms_per_step
    return {
        "model": job.study.task.kind, "parameters": parameters, "steps": recipe.steps,
        "tokens": seen if job.task.countable else None, "repeats": seen / max(1.0, float(np.mean(chosen))),
        "seeds": [recipe.seed * 1000 + s for s in range(job.study.verify.seeds)], "loss": job.task.reduction,
    }  # fmt: skip


def scores_of(job: Job, name: str) -> np.ndarray:
    """The column an arm was cut by, in pool order."""
    table = job.measurer.table(job.methods[name])
    return table.column(getattr(job.selectors[name], "column", "") or table.columns[0])


def by_lot(job: Job, name: str) -> float:
    """Share of an arm's loss terms that chance chose, from 0 to 1.

    That is all of it for the method `random`, whatever its filters, and for a cut with a temperature; else what stands
    in rows whose score is also that of rows below the cut, for a hash of the id chose among them.
    """
    if name not in job.methods:
        return 0.0
    selector = job.selectors[name]
    if job.methods[name].name == "random" or (selector.name == "cut" and getattr(selector, "temperature", 0.0) > 0):
        return 1.0
    selection = job.selections[name]
    below, own = selection.dropped.get("below the cut", selection.ids[:0]), positions(job.pool.ids, selection.ids)
    scores, sizes = scores_of(job, name), job.sizes[own]
    tied = np.isin(scores[own], scores[positions(job.pool.ids, below)])
    return float(sizes[tied].sum() / max(1, sizes.sum()))


def _arm(job: Job, name: str, found: dict[str, Any], domains: np.ndarray, clean: np.ndarray) -> dict[str, Any]:
    assert job.task is not None
    selection, method = job.selections[name], job.methods.get(name)
    rows = positions(job.pool.ids, selection.ids)
    training = job.task.training_flops(job.sizes[rows], job.recipe.steps * job.recipe.terms_per_step)
    flops, seconds = cost(job, *([] if method is None else [method]), *(f.method for f in job.filters[name]))
    baseline = name.startswith("random-") or name == "everything"
    metrics: dict[str, float] = {}
    for metric in job.judged[name][0]:
        if metric != "loss":
            metrics[metric] = float(np.mean([seed[metric][clean].mean() for seed in job.judged[name]]))
    entry = {
        "name": name, "cost_class": getattr(method, "cost", "none"),
        "measures_utility": getattr(method, "measures_utility", False), "judged_loss": found["judged_loss"],
        "judged_loss_ci": found["judged_loss_ci"],
        "by_seed": found["by_seed"], "gain_over_random": found.get("gain"), "ci": found.get("ci"),
        "by_lot": found["by_lot"],
        "verdict": "baseline" if baseline else found["verdict"],
        "versus_random": found.get("verdict"), "selection_flops": flops, "training_flops": training,
        "selection_flops_share": flops / training, "selection_seconds": seconds, "selected": len(selection),
        "tokens": int(job.sizes[rows].sum()) if job.task.countable else None,
        "domains": dict(Counter(domains[rows].tolist())), "contamination": _hits(job, job.free[name]),
        "planted": _planted(job, name, selection), "dropped": selection.reasons(), "metrics": metrics,
    }  # fmt: skip
    if "over_everything" in found:
        entry["over_everything"] = found["over_everything"]
    return entry


def cost(job: Job, *methods: Any) -> tuple[float, float]:
    """Operations and wall seconds behind the scores of methods, scoring models included; each step once."""
    names: dict[str, None] = {}
    for method in methods:
        names |= dict.fromkeys(closure(job.measurer.path(method, job.pool)))
        names |= dict.fromkeys(p.name for p in job.proxies if uses_model(method))
    costs = [job.run.cost(name) for name in names]
    return sum(c["flops"] for c in costs), sum(c["wall"] for c in costs)


def _hits(job: Job, free: Selection) -> dict[str, Any]:
    """Contaminated rows an arm would have taken, and how many times more than a fair share that is."""
    taken, base = int(np.isin(free.ids, job.hits.ids).sum()), len(job.hits.ids) / len(job.pool)
    return {"hits": taken, "enrichment": taken / len(free) / base if base and len(free) else None}


def _planted(job: Job, name: str, selection: Selection) -> dict[str, Any]:
    """For every known kind: how many were selected, against a fair share of the rows that may be selected."""
    if not job.truth:
        return {}
    barred = set(job.hits.ids.tolist())
    inside = Counter(job.truth[i] for i in job.truth if i not in barred)
    taken = Counter(job.truth[i] for i in selection.ids.tolist() if i in job.truth)
    kinds = np.array([job.truth.get(i, "") for i in job.pool.ids.tolist()])
    share = len(selection) / max(1, len(job.pool) - len(barred))
    table: dict[str, Any] = {}
    values = scores_of(job, name) if name in job.methods else None
    for kind, count in sorted(inside.items()):
        entry = {
            "selected": taken[kind],
            "in_pool": count,
            "enrichment": taken[kind] / count / share if share else None,
        }
        if values is not None:
            # Probability that a row of this kind is scored below a row that is not planted.
            rows = (kinds == kind) | (kinds == "")
            entry["auc"] = _finite(auc(-values[rows], (kinds == kind)[rows]))
        table[kind] = entry
    return table


def _nulls(losses: dict[str, np.ndarray], level: float) -> dict[str, Any] | None:
    """The first random arm against the others: a verdict other than `unresolved` would be noise taken for signal."""
    draws = [v for n, v in losses.items() if n.startswith("random-")]
    return (
        {"random_vs_random": compare(draws[0], np.stack(draws[1:]), level=level, draw=True)} if len(draws) > 1 else None
    )


def _recommended(arms: list[dict[str, Any]]) -> str | None:
    """The arm with the largest gain whose interval is clear of zero, if there is one."""
    better = [a for a in arms if a["verdict"] == "better"]
    return max(better, key=lambda a: a["gain_over_random"])["name"] if better else None


def _distribution(job: Job, values: np.ndarray, domains: np.ndarray, loss: np.ndarray | None) -> dict[str, Any]:
    """Histogram by domain on common edges, a keyed scatter sample, and the examples at both ends."""
    from assay.core.keys import shuffled

    low, high = np.percentile(values, [0.2, 99.8])
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    clipped = np.clip(values, edges[0], edges[-1])
    histograms = {
        d: {"edges": edges.tolist(), "counts": np.histogram(clipped[domains == d], edges)[0].tolist()}
        for d in sorted(set(domains.tolist()))
    }
    sample = np.sort(shuffled(job.pool.ids, "report", job.study.seed)[:SCATTER])
    texts = _texts(job, sample)
    lengths = job.sizes.astype(float)
    scatter = {
        "length": lengths[sample].tolist(), "score": values[sample].tolist(), "domain": domains[sample].tolist(),
        "id": [i.decode() for i in job.pool.ids[sample].tolist()], "preview": [t[:160] for t in texts],
    }  # fmt: skip
    if loss is not None:
        scatter["loss"] = loss[sample].tolist()
    order = np.lexsort((job.pool.ids, -values))
    return {
        "domains": histograms, "scatter": scatter, "spearman_length": _finite(spearman(values, lengths)),
        "spearman_loss": None if loss is None else _finite(spearman(values, loss)),
        "top": _examples(job, values, order[:EXAMPLES], domains),
        "bottom": _examples(job, values, order[::-1][:EXAMPLES], domains),
    }  # fmt: skip


def _texts(job: Job, rows: np.ndarray) -> list[str]:
    part = job.pool.at(rows)
    if "text" in part.columns:
        return part.column("text")
    return [f"label {label}" for label in part.column("label")] if "label" in part.columns else [""] * len(rows)


def _examples(job: Job, values: np.ndarray, rows: np.ndarray, domains: np.ndarray) -> list[dict[str, Any]]:
    ranks = (values[:, None] <= values[rows][None]).mean(axis=0) * 100
    sizes, ids = job.sizes, job.pool.ids[rows].tolist()
    return [
        {
            "id": name.decode(), "domain": str(domains[row]), "score": float(values[row]),
            "percentile": float(rank), "length": int(sizes[row]), "text": text[:TEXT],
            "planted": job.truth.get(name),
        }
        for row, name, rank, text in zip(rows.tolist(), ids, ranks.tolist(), _texts(job, rows), strict=True)
    ]  # fmt: skip


def _agreement(ranked: dict[str, np.ndarray]) -> dict[str, Any] | None:
    if len(ranked) < 2:
        return None
    names = list(ranked)
    matrix = [[1.0 if a == b else _finite(spearman(ranked[a], ranked[b])) for b in names] for a in names]
    return {"arms": names, "spearman": matrix}


def _curves(job: Job) -> dict[str, list[dict[str, Any]]]:
    """What methods that go step by step noted along the way."""
    notes = {name: job.measurer.table(method).meta.get("notes", {}) for name, method in job.methods.items()}
    found = {name: [note["curve"] for note in own.values() if "curve" in note] for name, own in notes.items()}
    return {name: curves for name, curves in found.items() if curves}


def _pipelines(job: Job) -> list[dict[str, Any]]:
    """Each pipeline of filters once, with the arms that it is of and what its stages did."""
    found: list[dict[str, Any]] = []
    for name, sieve in job.sieves.items():
        same = next((entry for entry in found if entry["stages"] is sieve.stages), None)
        if same is None:
            specs = [one.spec() for one in job.filters[name]]
            found.append({"arms": [name], "filters": specs, "stages": sieve.stages})
        else:
            same["arms"].append(name)
    return found


def _contamination(job: Job) -> dict[str, Any]:
    hits, leaks = job.hits, [i for i, kind in job.truth.items() if kind == "leak"]
    found = set(hits.ids.tolist())
    return {
        "items": hits.items, "hits": len(hits.ids), "by_half": hits.by_half, "ngram": 13, "examples": hits.examples,
        "planted_recall": sum(i in found for i in leaks) / len(leaks) if leaks else None,
    }  # fmt: skip
