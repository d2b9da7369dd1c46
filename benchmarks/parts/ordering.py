"""Whether the order of the same visits matters, and whether a derivative by time knows which: paired retraining.

    python -m benchmarks.parts.ordering [--quick]

ordering-digits: R0's 1000 digits with a tenth of the labels made wrong, 15 passes of SGD. ordering-decoder: 768
documents of 64 tokens of twelve domains, 4 passes of AdamW, a target of one domain. At every seed the shuffled run is
differentiated by phases of time, on one half of the target; each order is then the same visits of the same examples
(same terms, same steps, same first weights) in another sequence, and is judged on the other half of the target.
`gain_over_shuffled`: judged loss of the trainer's own order less that of this one, positive = the order is better, with
a 95 % interval over seeds and target items as crossed factors. `shuffled again` is the null: another random order.
Ten orders are tried beside the trainer's own; were they all alike, one would still seem to win up to four times in ten.
So intervals are those that hold for all ten of a case together (`family_intervals`), and verdicts are read from them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from benchmarks.core import Row
from benchmarks.parts import truth

from assay import ordering
from assay.core.keys import encode_ids, shuffled, uniform
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.core.task import Encoded, Params, Task
from assay.engine import local
from assay.numerics.curvature import slopes
from assay.numerics.stats import crossed_interval, family_intervals, verdict
from assay.train import loop
from assay.train.recipe import Recipe
from assay.train.replay import Training, metagradient

SEEDS, WRONG, SHARE, MOVED = 6, 0.1, 0.3, 1 / 3
DOMAIN = "biomed"


@dataclass(frozen=True)
class World:
    """All that a seed needs; sent to each worker once."""

    case: str
    task: Task
    pool: Pool
    paths: tuple[Path, Path, Path]
    """Encoded: the pool, the half of the target that is differentiated, the half that is judged on."""
    recipe: Recipe
    passes: int
    phases: int


def digits(folder: Path, quick: bool) -> World:
    world = truth.digits(folder, quick)
    labels = np.array(world.pool.column("label"))
    ids = world.pool.ids
    wrong = shuffled(ids, "ordering", "wrong")[: int(WRONG * len(ids))]
    moved = 1 + (9 * uniform(ids, "ordering", "label")).astype(np.int64)
    labels[wrong] = (labels[wrong] + moved[wrong]) % 10
    pool = truth.vectors(np.array(world.pool.column("pixels")), labels, "p")
    passes = 3 if quick else 15
    steps = passes * len(pool) // world.recipe.terms_per_step
    recipe = world.recipe.model_copy(update={"steps": steps})
    order = shuffled(world.targets.ids, "ordering", "sides")
    sides = [world.targets.at(np.sort(order[k::2])) for k in (0, 1)]
    return _world("ordering-digits", world.task, pool, sides, recipe, passes, 3 if quick else 5, folder)


def decoder(folder: Path, quick: bool) -> World:
    """Documents that fill the context, so that every order has the same terms in every step."""
    import pyarrow.parquet as pq

    from assay.train.models import LanguageModel, train_tokenizer

    table = pq.read_table(truth.DATA / "domains" / "domains.parquet", columns=["id", "text", "domain"])
    rows = table.filter(np.array([len(t) >= 500 for t in table["text"].to_pylist()])).to_pylist()
    order = shuffled(encode_ids(row["id"] for row in rows), "ordering", "documents")
    own, count = [k for k in order if rows[k]["domain"] == DOMAIN], 64 if quick else 192
    held = own[:count]
    taken = set(held)
    rest = [k for k in order if k not in taken][: 128 if quick else 768]

    def made(where: list[int]) -> Pool:
        return Pool.from_columns({key: [rows[k][key] for k in where] for key in ("id", "text")})

    pool, sides = made(rest), [made(held[: count // 3]), made(held[count // 3 :])]
    task = LanguageModel(
        tokenizer=train_tokenizer(pool, vocab=1024), vocab=1024, width=64, layers=2, heads=4, context=64
    )
    passes = 2 if quick else 4
    recipe = Recipe(
        steps=passes * len(pool) // 32, terms_per_step=32 * 64, optimiser="adamw", lr=2e-3, betas=(0.9, 0.95),
        eps_root=1e-8, weight_decay=0.01, schedule="linear", warmup=0.1, final=0.0, clip=0.0,
    )  # fmt: skip
    return _world("ordering-decoder", task, pool, sides, recipe, passes, 2, folder)


def _world(
    case: str, task: Task, pool: Pool, sides: list[Pool], recipe: Recipe, passes: int, phases: int, folder: Path
) -> World:
    paths = []
    for name, part in zip(("pool", "selecting", "judging"), (pool, *sides), strict=True):
        path = folder / f"{case}-{name}"
        path.mkdir(parents=True, exist_ok=True)
        task.prepare(part, path)
        paths.append(path)
    sizes = task.encoded(paths[0]).sizes
    assert (sizes == sizes[0]).all(), "orders of unequal examples fill steps unequally"
    return World(case, task, pool, (paths[0], paths[1], paths[2]), recipe, passes, phases)


def one(world: World, seed: int) -> dict[str, list[float]]:
    """Judged losses of every order at one seed, by item; and the seconds of the derivative."""
    task, recipe = world.task, world.recipe.with_seed(seed)
    encoded, asked, judging = (task.encoded(path) for path in world.paths)
    everything = Selection.everything(world.pool.ids)
    rows = np.arange(len(encoded))
    start = time.perf_counter()
    training = Training(task, encoded, rows, everything, recipe)
    found = metagradient(training, _objective(task, asked, training.moved), phases=world.phases)
    seconds = time.perf_counter() - start
    visits = ordering.repeated(everything, world.passes)
    # By phase and pass, so that an example's visits are alike: d f / d w sums over them.
    utility = -np.tile(found.phases[:, :, 0].T, (world.passes, 1))
    losses = np.tile(loop.evaluate(task, found.final, encoded)["loss"], world.passes)
    judged = {}
    for name, order in orders(visits, utility, losses, np.tile(encoded.sizes, world.passes), seed).items():
        assert order.ordered and len(order) == len(visits)
        where = _places(world.pool.ids, order.ids)
        trained = loop.train(task, encoded, where, order, recipe)
        judged[name] = loop.evaluate(task, trained.params, judging)["loss"].tolist()
    return judged | {"seconds": [seconds]}


def orders(
    visits: Selection, utility: np.ndarray, losses: np.ndarray, sizes: np.ndarray, seed: int
) -> dict[str, Selection]:
    whole = utility.sum(axis=1)
    best = ordering.best_phase(visits, utility, sizes, moved=1, seed=seed)
    return {
        "shuffled": ordering.shuffled(visits, seed=seed),
        "shuffled again": ordering.shuffled(visits, seed=seed + 1000),
        "best_phase": ordering.best_phase(visits, utility, sizes, moved=MOVED, seed=seed),
        "best_phase, all": best,
        "best_phase, all, reversed": ordering.reversed_(best),
        "anneal": ordering.anneal(visits, whole, sizes, share=SHARE, seed=seed),
        "anneal, worst last": ordering.anneal(visits, -whole, sizes, share=SHARE, seed=seed),
        "curriculum, rising": ordering.curriculum(visits, whole, seed=seed),
        "curriculum, falling": ordering.curriculum(visits, whole, rising=False, seed=seed),
        "loss_sorted, easy first": ordering.loss_sorted(visits, losses, seed=seed),
        "loss_sorted, hard first": ordering.loss_sorted(visits, losses, rising=False, seed=seed),
    }


def _objective(task: Task, asked: Encoded, names: list[str]) -> Any:
    def found(params: Params) -> torch.Tensor:
        batches = (asked.inputs(block) for block in loop.blocks(asked.lengths, 4 * loop.AREA))
        return slopes(task, params, batches, task.loss, names, each=False)

    return found


def _places(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    from assay.core.pool import positions

    return positions(known, wanted)


def rows(quick: bool, workers: int) -> list[Row]:
    """Both cases; the verdict of each is printed, whatever it is."""
    made: list[Row] = []
    for build in (digits, decoder):
        with TemporaryDirectory() as folder:
            world = build(Path(folder), quick)
            start = time.perf_counter()
            seeds = list(range(2 if quick else SEEDS))
            found = list(local.map(one, world, seeds, workers=workers))
            made += _rows(world.case, found, time.perf_counter() - start)
    return made


def _rows(case: str, found: list[dict[str, list[float]]], seconds: float) -> list[Row]:
    base = np.array([one["shuffled"] for one in found])
    derivative = float(np.mean([one["seconds"] for one in found]))
    common = {"bench": "metagrad", "case": case, "tool": "assay"}
    made: list[Row] = [
        {**common, "method": "order-shuffled", "metric": "judged_loss", "value": float(base.mean()),
         "ci": list(crossed_interval(base)[1:]), "seconds": seconds}
    ]  # fmt: skip
    names = [name for name in found[0] if name not in ("shuffled", "seconds")]
    gains = np.stack([base - np.array([one[name] for one in found]) for name in names], axis=-1)  # [seeds, items, k]
    means, lows, highs, a = family_intervals([gains.mean(axis=1), gains.mean(axis=0)])
    for name, value, low, high in zip(names, means.tolist(), lows.tolist(), highs.tolist(), strict=True):
        made.append(
            {**common, "method": f"order-{name}", "metric": "gain_over_shuffled", "value": value, "ci": [low, high],
             "seconds": derivative, "options": {"together": len(names)}}
        )  # fmt: skip
        print(f"{case}: {name} is {verdict(low, high)} against shuffled: {value:+.4f} ({low:+.4f} to {high:+.4f})")
    best = max(made[1:], key=lambda row: row["ci"][0])
    say = (
        f"{best['method']} gains {best['value']:.4f} nats"
        if best["ci"][0] > 0
        else "no order is shown to beat shuffling"
    )
    print(
        f"{case}: {say}, over {len(found)} seeds; shuffled has {base.mean():.4f}. The intervals of {len(names)} orders "
        f"hold together: each is at level {1 - a:.4f}"
    )
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    chosen = parser.parse_args()
    print(json.dumps({"rows": rows(chosen.quick, chosen.workers)}))
