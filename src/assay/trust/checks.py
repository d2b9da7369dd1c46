"""Further checks, each with its null and its interval: leave-one-out, removal, mislabels, tail patch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import hash_ids, uniform, write_json
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Ledger
from assay.numerics import lds
from assay.numerics.stats import auc_interval, crossed_interval, verdict
from assay.trust.contest import RANDOM, Entry, scores
from assay.trust.ground import Trust, retrained

if TYPE_CHECKING:
    from assay.core.task import Task

# Kinds of the known truth that mean a wrong label.
FLIPS = frozenset({"flipped", "mislabel", "mislabeled", "mislabelled", "wrong_label"})
# Fair draws beside each removal.
DRAWS = 2
# Self-influence factorises a matrix of all weights: below this many it is quick.
DENSE = 4000
# Leave-one-out effects that agree less than this between seeds are chance.
AGREEMENT = 0.3


def row(name: str, null: bool, values: np.ndarray, control: np.ndarray | None, level: float) -> dict[str, Any]:
    """Mean of an effect over crossed factors (target first), and its gain over a control on the same targets."""
    mean, low, high = crossed_interval(values, level=level)
    found: dict[str, Any] = {"name": name, "null": null, "value": mean, "ci": _finite(low, high)}
    if control is not None:
        gain, low, high = crossed_interval(values - control, level=level)
        found |= {"over_control": gain, "control_ci": _finite(low, high), "verdict": verdict(low, high)}
    return found


def _finite(low: float, high: float) -> list[float] | None:
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def scored(trust: Trust) -> list[Entry]:
    """The entries whose scores can be ranked; chance is in each check's control already."""
    return [e for e in trust.entries if e.name != RANDOM and not e.error]


def contestants(trust: Trust) -> list[Entry]:
    """The study's own methods and the best null, for what costs a training each."""
    known = scored(trust)
    best = max((e for e in known if e.null), key=lambda e: e.tried[e.chosen]["selecting"], default=None)
    return [e for e in known if not e.null or e is best]


# Removal.


def removal(trust: Trust) -> dict[str, Any]:
    """How much worse a target is learnt without its best examples, against as many of its class drawn at random."""
    job, n, probes = trust.job, len(trust.job.pool), trust.probes
    counts = _counts(trust)
    masks, at = [np.ones(n, dtype=bool)], {b"": 0}

    def without(rows: np.ndarray) -> int:
        mask = np.ones(n, dtype=bool)
        mask[rows] = False
        place = at.setdefault(mask.tobytes(), len(masks))
        if place == len(masks):
            masks.append(mask)
        return place

    ties = hash_ids(job.pool.ids, "ties", job.study.seed)
    contest = contestants(trust)
    picked = {
        e.name: [[without(np.lexsort((ties, -e.scores[:, q]))[:k]) for k in counts] for q in probes] for e in contest
    }
    fair = [[[without(_draw(trust, q, k, d)) for d in range(DRAWS)] for k in counts] for q in probes]
    values, spent = retrained(trust, np.stack(masks), "retrain without the best")
    effect = values - values[0]  # [K, R, q]: the rise of the loss, or the fall of the margin

    def curve(places: list[list[int]]) -> np.ndarray:
        """`[probes, counts, seeds]`."""
        return np.stack([effect[places[p], :, q] for p, q in enumerate(probes)])

    control = np.mean([curve([[k[d] for k in probe] for probe in fair]) for d in range(DRAWS)], axis=0)
    level, known = trust.spec.level, np.isin(classes(trust.target)[probes], classes(job.pool)).all()
    several = known and len(np.unique(classes(job.pool))) > 1
    rows, curves = [], [_curve("random, same class" if several else "random", control, counts, n, level)]
    for entry in contest:
        effects = curve(picked[entry.name])
        rows.append(row(entry.name, entry.null, effects[:, -1], control[:, -1], level))
        curves.append({**_curve(entry.name, effects, counts, n, level), "null": entry.null})
    # The bank holds minus the margin: what is lost is higher for both.
    unit = "fall of the margin" if trust.spec.measure == "margin" else f"rise of the {trust.spec.measure}"
    return {
        "rows": rows, "curves": curves, "unit": unit, "spent": spent,
        "control": row("random", True, control[:, -1], None, level), "trainings": len(masks) * trust.spec.seeds,
        "detail": f"{counts[-1]} of {n} examples taken away for each of {len(probes)} targets",
    }  # fmt: skip


def _counts(trust: Trust) -> list[int]:
    """How many examples are removed: the shares of the pool, but at most half of the smallest class in question, so
    that a fair draw from it still leaves something to draw."""
    pool, own = trust.job.pool, classes(trust.target)[trust.probes]
    known, sizes = np.unique(classes(pool), return_counts=True)
    room = min((int(size) for name, size in zip(known, sizes, strict=True) if name in own), default=len(pool)) // 2
    return sorted({max(1, min(round(share * len(pool)), room)) for share in trust.spec.removed})


def _curve(name: str, effects: np.ndarray, counts: list[int], n: int, level: float) -> dict[str, Any]:
    points = []
    for at, count in enumerate(counts):
        mean, low, high = crossed_interval(effects[:, at], level=level)
        points.append({"share": count / n, "count": count, "value": mean, "ci": _finite(low, high)})
    return {"name": name, "points": points}


def _draw(trust: Trust, column: int, count: int, draw: int) -> np.ndarray:
    """Rows drawn fairly: of the target's class first, where classes are known; others only when there are too few."""
    job = trust.job
    keys = uniform(job.pool.ids, "removal", job.study.seed, trust.target.ids[column].decode(), draw)
    same = classes(job.pool) == classes(trust.target)[column]
    return np.lexsort((keys, ~same))[:count]


def classes(pool: Pool) -> np.ndarray:
    """What examples are alike in: the label, else the domain."""
    return np.array([str(v) for v in pool.column("label")]) if "label" in pool.columns else pool.domains()


# Leave-one-out.


def convex(task: Any) -> bool:
    """Whether the task's loss is convex in its weights: logistic regression is; of others it is not known."""
    return getattr(task, "hidden", None) == () and hasattr(task, "classes")


def leave_one_out(trust: Trust) -> dict[str, Any]:
    """Scores of single examples against retraining without them, at the same seed and order."""
    job, spec = trust.job, trust.spec
    if not convex(job.task) and spec.seeds < 2:
        return {
            "refused": "the model is not known to be convex, and with one seed no effect can be told from chance: set "
            "lds.seeds to 2 or more"
        }  # fmt: skip
    order = np.argsort(hash_ids(job.pool.ids, "leave one out", job.study.seed), kind="stable")
    rows = np.sort(order[: min(spec.left_out, len(job.pool) - 1)])
    masks = np.ones((len(rows), len(job.pool)), dtype=bool)
    masks[np.arange(len(rows)), rows] = False
    values, spent = retrained(trust, masks, "retrain without one")
    values = values[:, :, trust.judge]
    top = lds.ceiling(values)
    agreement = None if top.one is None else top.one**2
    if not convex(job.task) and agreement is not None and agreement < AGREEMENT:
        return {
            "refused": f"the effects of leaving one out agree between seeds by no more than {agreement:.2f}: they are "
            "chance, and no scores can be judged by them", "spent": spent,
        }  # fmt: skip
    found, label = [], "lds_avg" if spec.seeds > 1 else "lds_fixed"
    for entry in scored(trust):
        try:
            one = lds.score(
                masks, entry.scores[:, trust.judge], values, label=label, level=spec.level, draws=spec.draws,
                seed=job.study.seed, fingerprint=trust.facts["bank"]["fingerprint"],
            )  # fmt: skip
        except InputError as error:
            found.append({"name": entry.name, "null": entry.null, "error": str(error)})
            continue
        about = {"name": entry.name, "null": entry.null, "value": one.value, "ci": [one.low, one.high]}
        gain = {"over_control": one.value, "control_ci": about["ci"], "verdict": verdict(one.low, one.high)}
        found.append(about | gain)
    return {
        "rows": found, "unit": "Spearman's correlation", "spent": spent, "ceiling": top.average,
        "trainings": len(masks) * spec.seeds, "detail": f"{len(rows)} examples left out, one by one",
        "control": {"name": "random", "null": True, "value": 0.0, "ci": None},
    }  # fmt: skip


# Wrong labels.


def flipped(trust: Trust) -> np.ndarray:
    """Which pool examples are known to have a wrong label, `[n]` bool."""
    truth = trust.job.truth
    return np.array([truth.get(i) in FLIPS for i in trust.job.pool.ids.tolist()])


def mislabel(trust: Trust) -> dict[str, Any]:
    """How well low utility finds the wrong labels; beside it the loss, which is often better."""
    job, wrong, level = trust.job, flipped(trust), trust.spec.level
    if not wrong.any():
        return {"refused": "no example is known to have a wrong label: name them in pool.truth with kind 'flipped'"}
    if min(wrong.sum(), (~wrong).sum()) < 2:
        return {
            "refused": f"{wrong.sum()} of {len(wrong)} examples have a wrong label: an AUC takes two of either kind"
        }
    ranked = [(e.name, e.null, -e.scores[:, trust.judge].mean(axis=1)) for e in scored(trust)]
    assert job.task is not None
    if hasattr(job.task, "logits") and sum(p.numel() for p in job.task.module.parameters()) <= DENSE:
        if "self_influence" not in [name for name, _, _ in ranked]:
            ranked.append(("self_influence", False, -scores(job, make(Scorer, "self_influence"))[0][:, 0]))
    ranked.append((RANDOM, True, uniform(job.pool.ids, "mislabel", job.study.seed)))
    rows = []
    for name, null, values in ranked:
        value, low, high = auc_interval(values, wrong, level=level)
        entry = {"name": name, "null": null, "value": value, "ci": [low, high]}
        gain = {"over_control": value - 0.5, "control_ci": [low - 0.5, high - 0.5]}
        rows.append(entry | gain | {"verdict": verdict(low - 0.5, high - 0.5)})
    return {
        "rows": rows, "unit": "AUC", "control": {"name": "random", "null": True, "value": 0.5, "ci": None},
        "detail": f"{int(wrong.sum())} of {len(wrong)} examples have a wrong label; lowest mean utility first",
    }  # fmt: skip


# Tail patch.


def tail_patch(trust: Trust) -> dict[str, Any]:
    """What one training step on each of a target's best examples does to its log-probability, beside random ones."""
    job, probes, ties = trust.job, trust.probes, hash_ids(trust.job.pool.ids, "ties", trust.job.study.seed)
    count = min(trust.spec.proponents, len(job.pool))
    best = {e.name: [np.lexsort((ties, -e.scores[:, q]))[:count] for q in probes] for e in scored(trust)}
    drawn = [_draw(trust, q, count, DRAWS) for q in probes]
    rows = np.unique(np.concatenate([*drawn, *(r for places in best.values() for r in places)]))
    key = {
        "models": job.measurer.key, "pool": job.pool.fingerprint, "target": trust.target.fingerprint,
        "recipe": trust.recipe.spec(), "rows": rows.tolist(), "probes": probes.tolist(),
    }  # fmt: skip

    def build(part: Path, ledger: Ledger) -> None:
        job.progress.begin("tail patch", len(rows))
        write_json(part / "gains.json", _steps(trust, rows, probes, ledger).tolist())
        job.progress.end()

    step = job.run.step("tail-patch", key, build, label="tail patch")
    gains = np.array(json.loads((step / "gains.json").read_text()))  # [rows, probes]

    def mean(places: list[np.ndarray]) -> np.ndarray:
        return np.array([gains[np.searchsorted(rows, r), p].mean() for p, r in enumerate(places)])

    control, level = mean(drawn), trust.spec.level
    spent = job.run.cost(step.name)
    return {
        "rows": [row(e.name, e.null, mean(best[e.name]), control, level) for e in scored(trust)],
        "unit": "gain in log-probability, nats per term", "control": row("random", True, control, None, level),
        "spent": {k: spent[k] for k in ("wall", "flops")},
        "detail": f"One step on each of the {count} best examples of {len(probes)} targets",
    }  # fmt: skip


def _steps(trust: Trust, rows: np.ndarray, probes: np.ndarray, ledger: Ledger) -> np.ndarray:
    """`[rows, probes]`: the fall of each target's loss by one step on each row at the recipe's last learning rate and
    with the optimiser's state, less that of a step on nothing (momentum alone)."""
    import torch

    from assay.train import loop, optim

    job, recipe, task = trust.job, trust.recipe, trust.job.task
    assert task is not None
    encoded = task.encoded(job.encodings[job.pool.fingerprint])
    inputs = task.encoded(job.encodings[trust.target.fingerprint]).inputs(probes)
    exact = torch.float64 if job.study.task.kind in ("text", "classifier", "convnet", "module") else torch.float32
    params = {n: p.to(exact) for n, p in job.measurer.models[0].items()}
    held, moved = job.measurer.optimisers[0], loop.trainable(task, params)
    slots = {s: [held[s][n].to(params[n].dtype) for n in moved] for s in ("momentum", "mean", "square") if s in held}

    def after(slopes: list[torch.Tensor]) -> np.ndarray:
        clipped, values = optim.clip(slopes, recipe.clip), [params[n] for n in moved]
        values, _ = optim.update(recipe, clipped, slots, values, recipe.steps - 1)
        with torch.no_grad():
            return task.loss(params | dict(zip(moved, values, strict=True)), inputs).double().numpy()

    still = after([torch.zeros_like(params[n]) for n in moved])
    gains = np.zeros((len(rows), len(probes)))
    for at, place in enumerate(rows):
        size = int(encoded.sizes[place])
        slopes, _ = loop.gradient(task, params, encoded, rows[at : at + 1], np.ones(1), size)
        gains[at] = still - after([g for n, g in zip(params, slopes, strict=True) if n in moved])
        job.progress.advance()
    ledger.spent(_flops(task, encoded.sizes[rows], len(rows), inputs))
    return gains


def _flops(task: Task, sizes: np.ndarray, steps: int, inputs: dict[str, Any]) -> float:
    reading = next(iter(inputs.values())).numel() if "tokens" in inputs else len(next(iter(inputs.values())))
    return 3 * task.forward_flops(sizes) + steps * task.forward_flops(np.array([reading]))
