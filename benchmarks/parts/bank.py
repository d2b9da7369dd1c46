"""The retrain bank against a loop that trains one model after another: the digits perceptron of `r0.py`, 100 halves.

    python -m benchmarks.parts.bank [--quick]

Both compute on every core at once, a process each; a pair of timings is taken right after each other, and the ratio is
the median over pairs. The loop is `assay.train.loop.train`, which has no file to write and nothing to log here.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay.core.pool import Pool
from assay.core.task import Encoded
from assay.data import toys
from assay.engine import local
from assay.train import bank, loop
from assay.train.models import Classifier
from assay.train.recipe import Recipe

TASK = Classifier(inputs=64, hidden=(64,), classes=10)
RECIPE = Recipe(
    steps=300, terms_per_step=50, optimiser="sgd", lr=0.5, weight_decay=1e-3, warmup=0.0, final=0.0, clip=0.0
)
CORES, MODELS, ALONE, PAIRS = 2, 100, 6, 7


def world(folder: Path) -> tuple[Pool, Encoded, Encoded]:
    """1000 digits and 300 to test on."""
    train, test, _ = toys.digits(flip=0.0, train=1000, test=300)
    found = []
    for name, table in (("pool", train), ("target", test)):
        pool = Pool.from_columns(table)
        (folder / name).mkdir()
        TASK.prepare(pool, folder / name)
        found.append((pool, TASK.encoded(folder / name)))
    (pool, encoded), (_, target) = found
    return pool, encoded, target


def timed(shared: tuple[Pool, Encoded, Encoded, int], item: tuple[str, int]) -> float:
    """Seconds a model: `bank` trains a whole chunk, `loop` a few models one after another, of a seed."""
    (pool, encoded, target, models), (kind, seed) = shared, item
    masks = bank.subsets(pool.ids, models, 0.5, 0)
    chunk = masks if kind == "bank" else masks[:ALONE]
    start = time.perf_counter()
    if kind == "bank":
        bank.retrain(TASK, encoded, pool.ids, chunk, RECIPE, seeds=(seed,), targets={"test": target}, measure="margin")
    else:
        made = bank.Bank(TASK, encoded, pool.ids, RECIPE, {"test": target}, "margin", "weights", torch.float32, None)
        for mask in chunk:
            rows, selection = made.selection(mask)
            trained = loop.train(TASK, encoded, rows, selection, RECIPE.with_seed(seed))
            TASK.margin(trained.params, target.inputs(np.arange(len(target))))
    return (time.perf_counter() - start) / len(chunk)


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """One row: how many times faster a model of the bank is than one of the loop."""
    pairs = 2 if quick else PAIRS
    items = [(kind, seed) for pair in range(pairs) for kind in ("loop", "bank") for seed in range(CORES)]
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        shared = (*world(Path(folder)), MODELS)
        # One more pair in front: the first of everything is slower.
        seconds = list(local.map(timed, shared, [*items[: 2 * CORES], *items], workers=CORES))[2 * CORES :]
    by_kind = np.array(seconds).reshape(pairs, 2, CORES).mean(axis=2)
    ratios = by_kind[:, 0] / by_kind[:, 1]
    low, high = (float(x) for x in np.percentile(ratios, [10, 90]))
    return [
        {
            "bench": "influence", "case": "bank-R0", "tool": "assay", "method": "bank", "metric": "speedup_over_loop",
            "value": float(np.median(ratios)), "ci": [low, high], "seconds": float(np.median(by_kind[:, 1]) * MODELS),
        }
    ]  # fmt: skip


if __name__ == "__main__":
    for one in rows("--quick" in sys.argv[1:]):
        print(json.dumps(one))
