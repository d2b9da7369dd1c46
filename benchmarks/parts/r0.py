"""R0: how well scores foretell retraining, on digits. LDS at a fixed seed, for what forward passes can read.

    python benchmarks/parts/r0.py [--quick] [--json FILE]

1000 of scikit-learn's digits to train on, 300 to test on (keyed split), a 64-64-10 GELU perceptron, SGD at lr .5 down
to 0 linearly, batches of 50, 15 epochs, weight_decay/2 |params|^2 with weight_decay .001 in the loss. 100 random halves
as data weights of 0 and 1, all from the same first weights in the same order of batches, every batch divided by 50.
Target q is minus the margin, f_q = log(1 - p) - log p of test example q. LDS = Spearman's correlation, over the halves,
of the retrained margin with the sum of a half's scores; averaged over targets (Park et al. 2023, arXiv:2303.14186).

Options are chosen on 25 targets of one half of them, and reported on all of the other, with a bootstrap interval over
targets and halves of the data. Scores are of one model, trained on all data from the same first weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.func import functional_call, vmap

from assay.core.keys import digest, encode_ids, shuffled, uniform
from assay.train.models import Classifier, init_params

Row = dict[str, Any]
Weights = dict[str, Tensor]
TRAIN, TEST, BATCH, EPOCHS, LR, DECAY = 1000, 300, 50, 15, 0.5, 1e-3
TASK = Classifier(inputs=64, hidden=(64,), classes=10)


@dataclass(frozen=True)
class World:
    """Data, the halves as weights `[halves, train]`, and the margins `[halves, test]` after training on them."""

    x: Tensor
    y: Tensor
    tx: Tensor
    ty: Tensor
    masks: np.ndarray
    margins: np.ndarray
    paths: dict[Any, dict[int, Weights]] = field(default_factory=dict)
    """Continued runs by what they are of, and by their number of steps."""


def logits(params: Weights, x: Tensor) -> Tensor:
    """`[m, n, classes]` of m models, `x` `[n, inputs]` for all or `[m, n, inputs]` for each."""
    module = TASK.module  # made here, for its first weights are random, and vmap allows nothing that is
    return vmap(lambda p, z: functional_call(module, p, (z,)), in_dims=(0, None if x.dim() == 2 else 0))(params, x)


def losses(params: Weights, x: Tensor, y: Tensor) -> Tensor:
    """`[m, n]` cross-entropies."""
    z = logits(params, x)
    return z.logsumexp(dim=2) - z.gather(2, y.expand(len(z), -1)[..., None])[..., 0]


def margins(params: Weights, x: Tensor, y: Tensor) -> Tensor:
    """`[m, n]`: log p - log(1 - p) of the label; `x`, `y` of each model its own where they have three and two axes."""
    z, label = logits(params, x), y.expand(len(next(iter(params.values()))), -1)[..., None]
    others = z.scatter(2, label, float("-inf")).logsumexp(dim=2)
    return z.gather(2, label)[..., 0] - others


def decay(params: Weights) -> Tensor:
    """Sum over models of |params|^2 / 2."""
    return sum((p.square().sum() / 2 for p in params.values()), torch.zeros(()))


def stacked(params: Weights, count: int) -> Weights:
    return {n: p.expand(count, *p.shape).clone() for n, p in params.items()}


def descend(params: Weights, objective: Tensor, leaves: Weights, lr: float) -> Weights:
    grads = torch.autograd.grad(objective, list(leaves.values()))
    return {n: p - lr * g for (n, p), g in zip(params.items(), grads, strict=True)}


def leaf(params: Weights) -> Weights:
    return {n: p.detach().requires_grad_() for n, p in params.items()}


def order(count: int, epoch: int) -> np.ndarray:
    return shuffled(encode_ids(str(i) for i in range(count)), "r0", "order", epoch)


def train(x: Tensor, y: Tensor, weights: Tensor, epochs: int) -> Weights:
    """All models at once, one for each row of data weights `[m, train]`."""
    params = stacked(init_params(TASK.module, 0), len(weights))
    total, step = epochs * (len(x) // BATCH), 0
    for epoch in range(epochs):
        for batch in order(len(x), epoch).reshape(-1, BATCH):
            leaves = leaf(params)
            loss = (losses(leaves, x[batch], y[batch]) * weights[:, batch]).sum() / BATCH + DECAY * decay(leaves)
            params = descend(params, loss, leaves, LR * (1 - step / total))
            step += 1
    return params


def build(quick: bool) -> World:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.tensor(bunch.data / 16, dtype=torch.float32)  # type: ignore[attr-defined]
    labels = torch.tensor(bunch.target)  # type: ignore[attr-defined]
    split = shuffled(encode_ids(str(i) for i in range(len(labels))), "r0", "split")
    own, test = split[:TRAIN], split[TRAIN : TRAIN + (80 if quick else TEST)]
    ids = encode_ids(str(i) for i in range(TRAIN))
    halves = 40 if quick else 100
    masks = np.stack([uniform(ids, "r0", "half", k) for k in range(halves)]).argsort(axis=1).argsort(axis=1) < TRAIN / 2
    x, y, tx, ty = pixels[own], labels[own], pixels[test], labels[test]
    models = train(x, y, torch.tensor(masks, dtype=torch.float32), EPOCHS)
    with torch.no_grad():
        after = margins(models, tx, ty).double().numpy()
    return World(x, y, tx, ty, masks, after)


# Scores `[targets, train]`, positive where an example raises the target's margin.


def single(params: Weights) -> Weights:
    return {n: p[0] for n, p in params.items()}


def slopes(params: Weights, x: Tensor, y: Tensor, margin: bool) -> Tensor:
    """Gradients `[n, parameters]` of the losses, or of minus the margins, at one model."""
    value = (lambda p, a, b: -margins(p, a, b)) if margin else losses

    def one(p: Weights, a: Tensor, b: Tensor) -> Tensor:
        return value({n: q[None] for n, q in p.items()}, a[None], b[None])[0, 0]

    found = vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in found.values()], dim=1)


def graddot(w: World, base: Weights, targets: np.ndarray) -> np.ndarray:
    own, asked = slopes(base, w.x, w.y, False), slopes(base, w.tx[targets], w.ty[targets], True)
    return (asked.double() @ own.double().T).numpy()


def fall(w: World, before: Weights, after: Weights, scale: float) -> np.ndarray:
    """What `assay.numerics.probe` reads: (loss before - loss after) / scale; one `before` for all, or one each."""
    with torch.no_grad():
        gap = losses(before, w.x, w.y).double() - losses(after, w.x, w.y).double()
    return (gap / scale).numpy()


def moved(base: Weights, direction: Tensor, length: np.ndarray | float) -> Weights:
    """One model for each row of `direction` `[m, parameters]`, at base + length x direction."""
    found, start = {}, 0
    step = direction * torch.as_tensor(length, dtype=direction.dtype).reshape(-1, 1)
    for name, p in base.items():
        found[name] = p + step[:, start : start + p.numel()].view(-1, *p.shape)
        start += p.numel()
    return found


def size(base: Weights) -> float:
    return float(torch.cat([p.flatten() for p in base.values()]).norm())


def directional(w: World, base: Weights, targets: np.ndarray, step: float, sides: str = "both") -> np.ndarray:
    """Differences over a step down (`toward`) or up (`away`) the target's gradient, of length `step` x |params|."""
    down = -slopes(base, w.tx[targets], w.ty[targets], True)
    length = (step * size(base) / down.norm(dim=1)).numpy()
    low, high = {"both": (-1.0, 1.0), "toward": (0.0, 1.0), "away": (-1.0, 0.0)}[sides]
    before, after = (moved(base, down, e * length) for e in (low, high))
    return fall(w, before, after, high - low) / length[:, None]


def loss_diff(w: World, base: Weights, targets: np.ndarray, steps: int, lr: float) -> np.ndarray:
    """After `steps` steps on the target alone; f_q is followed, each step a fresh gradient."""
    params = stacked(base, len(targets))
    x, y = w.tx[targets][:, None], w.ty[targets][:, None]
    for _ in range(steps):
        leaves = leaf(params)
        params = descend(params, -margins(leaves, x, y).sum(), leaves, lr)
    return fall(w, stacked(base, 1), params, steps * lr)


def continued(
    w: World, base: Weights, targets: np.ndarray, steps: int, lr: float, eps: float, weight: float
) -> Weights:
    """`steps` full-batch steps on (1/N) sum_i weight loss_i + decay + eps f_q, a model for each target; at eps = 0 all
    are the same model, so one is enough.
    """
    # Runs that differ in length alone are one run.
    path = w.paths.setdefault((lr, eps, weight, tuple(targets) if eps else ()), {})
    path.setdefault(0, stacked(base, len(targets) if eps else 1))
    reached = max(k for k in path if k <= steps)
    params, x, y = path[reached], w.tx[targets][:, None], w.ty[targets][:, None]
    for _ in range(reached, steps):
        leaves = leaf(params)
        loss = weight * losses(leaves, w.x, w.y).mean(dim=1).sum() + DECAY * decay(leaves)
        loss = loss - eps * margins(leaves, x, y).sum() if eps else loss
        params = descend(params, loss, leaves, lr)
    path[steps] = params
    return params


def response(
    w: World, base: Weights, targets: np.ndarray, steps: int, lr: float, eps: float, sides: str, weight: float = 1.0
) -> np.ndarray:
    low, high = {"both": (-eps, eps), "toward": (0.0, eps), "away": (-eps, 0.0)}[sides]
    before, after = (continued(w, base, targets, steps, lr, e, weight) for e in (low, high))
    return fall(w, before, after, high - low)


# LDS.


def ranks(values: np.ndarray) -> np.ndarray:
    return stats.rankdata(values, axis=0)


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the ranks of each column: Spearman's, `[columns]`."""
    a, b = (ranks(v) - (len(v) + 1) / 2 for v in (a, b))
    return (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))


def lds(w: World, scores: np.ndarray, targets: np.ndarray) -> float:
    return float(correlations(w.masks @ scores.T, w.margins[:, targets]).mean())


def interval(w: World, scores: np.ndarray, targets: np.ndarray, draws: int = 300) -> list[float]:
    """95 % bootstrap over targets and halves together; draws are keyed."""
    predicted, found = w.masks @ scores.T, w.margins[:, targets]
    rng = np.random.default_rng(int(digest("r0", "bootstrap")[:8], 16))
    values = []
    for _ in range(draws):
        rows, columns = (rng.integers(n, size=n) for n in predicted.shape)
        values.append(correlations(predicted[np.ix_(rows, columns)], found[np.ix_(rows, columns)]).mean())
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


Grid = list[Row]
SIDES = ("toward", "away", "both")
STEPS = [2.0**-k for k in range(12, -1, -2)]


def grids(quick: bool) -> dict[str, Grid]:
    """The options that are tried of each method. `response` in three forms, and at a model of half-weighted data."""
    counts = (60, 100) if quick else (30, 60, 100, 150)
    sizes = (1e-3, 1e-2) if quick else (1e-3, 3e-3, 1e-2, 3e-2)
    finite = [2.0**-k for k in range(8, 1, -1)]

    def responses(sides: str) -> Grid:
        return [{"steps": k, "lr": 0.2, "eps": e, "sides": sides} for e, k in itertools.product(sizes, counts)]

    return {
        "graddot": [{}],
        "directional": [{"step": s} for s in (2.0**-12, 2.0**-10, 2.0**-8)],
        "directional, long": [{"step": s, "sides": e} for s, e in itertools.product(finite, SIDES)],
        "loss_diff": [{"steps": k, "lr": r} for k, r in itertools.product((1, 10, 40), (1e-5, 1e-4, 1e-3, 1e-2, 0.1))],
        "response": responses("both"),
        "response, toward": responses("toward"),
        "response, away": responses("away"),
        "response, centred": [
            {"steps": k, "lr": 0.2, "eps": e, "sides": "both", "weight": 0.5}
            for e, k in itertools.product((3e-3, 1e-2), (100, 200))
        ],
    }


FUNCTIONS = {"graddot": graddot, "directional": directional, "loss_diff": loss_diff, "response": response}


def scored(w: World, models: dict[float, Weights], name: str, options: Row, targets: np.ndarray) -> np.ndarray:
    """At the model whose training examples weighed 1, or `weight`."""
    return FUNCTIONS[name.split(",")[0]](w, models[options.get("weight", 1.0)], targets, **options)


def best(w: World, models: dict[float, Weights], name: str, grid: Grid, targets: np.ndarray) -> Row:
    """The options of the largest LDS on the tuning targets; the first of equals."""
    tried = [lds(w, scored(w, models, name, options, targets), targets) for options in grid]
    return grid[int(np.nanargmax(tried))]


def rows(quick: bool = False) -> list[Row]:
    """LDS of every method on the targets that tuned nothing; on the tuning targets, how it goes with the step."""
    torch.set_num_threads(1)  # many small products: threads only wait for each other
    w = build(quick)
    weights = {1.0: torch.ones(1, TRAIN), 0.5: torch.full((1, TRAIN), 0.5)}
    models = {k: single(train(w.x, w.y, v, EPOCHS)) for k, v in weights.items()}
    halves = np.array_split(np.arange(len(w.ty)), 2)
    tuning, reporting = halves[0][: 15 if quick else 25], halves[1]
    found = []
    for name, grid in grids(quick).items():
        options = best(w, models, name, grid, tuning) if len(grid) > 1 else grid[0]
        w.paths.clear()
        start = time.perf_counter()
        scores = scored(w, models, name, options, reporting)
        seconds = time.perf_counter() - start
        found.append(
            row(name, "lds_fixed", lds(w, scores, reporting), interval(w, scores, reporting), seconds, options)
        )
    for step, sides in itertools.product(STEPS, SIDES):
        options = {"step": step, "sides": sides}
        scores = directional(w, models[1.0], tuning, **options)
        found.append(
            row("directional", "lds_by_step", lds(w, scores, tuning), interval(w, scores, tuning), 0.0, options)
        )
    for options in grids(quick)["response"]:
        for sides in SIDES:
            one = {**options, "sides": sides}
            scores = response(w, models[1.0], tuning, **one)
            found.append(row("response", "lds_by_step", lds(w, scores, tuning), interval(w, scores, tuning), 0.0, one))
    return found


def row(method: str, metric: str, value: float, ci: list[float], seconds: float, options: Row) -> Row:
    """One line of the long form."""
    return {
        "bench": "gradients", "case": "R0", "tool": "assay", "method": method, "metric": metric, "value": value,
        "ci": ci, "seconds": seconds, "options": options,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer targets, halves and options")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    chosen = parser.parse_args()
    made = rows(chosen.quick)
    for r in made:
        low, high = r["ci"]
        options = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in r["options"].items())
        print(f"{r['method']:<20} {r['metric']:<18} {r['value']:6.3f} [{low:.3f}, {high:.3f}]   {options}")
    text = json.dumps({"rows": made})
    if chosen.json:
        chosen.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
