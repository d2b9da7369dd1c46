"""Speed of the core on this machine: training, a forward pass and gradient features of the decoder; Tables on disk.

    python benchmarks/core.py [--quick] [--json FILE]

Contestants of one case take turns, one thread each; medians are reported, with the 10th and 90th percentile of the
turns. `ratio_to_training` is seconds a token over those of a training step: 1 means as dear as training on it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Turn = Callable[[], float]


def row(bench: str, case: str, method: str, metric: str, values: np.ndarray, seconds: float) -> Row:
    """One line of the long form; `values` are those of the turns."""
    low, middle, high = (float(x) for x in np.percentile(values, [10, 50, 90]))
    return {
        "bench": bench, "case": case, "tool": "assay", "method": method, "metric": metric, "value": middle,
        "ci": [low, high], "seconds": seconds,
    }  # fmt: skip


def written(rows: list[Row], file: Path | None) -> None:
    """Print the rows as one JSON object, the last line of a benchmark; and write it to `file`, if there is one."""
    text = json.dumps({"rows": rows})
    if file:
        file.write_text(text + "\n", encoding="utf-8")
    print(text)


def take_turns(contestants: dict[str, Turn], turns: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Seconds a unit of each contestant, by turn, and seconds in all; each `Turn` returns how many units it did."""
    pace: dict[str, list[float]] = {name: [] for name in contestants}
    spent = dict.fromkeys(contestants, 0.0)
    for call in contestants.values():
        call()
    for _ in range(turns):
        for name, call in contestants.items():
            start = time.perf_counter()
            units = call()
            seconds = time.perf_counter() - start
            pace[name].append(seconds / units)
            spent[name] += seconds
    return {name: np.array(values) for name, values in pace.items()}, spent


def decoder(folder: Path, quick: bool) -> list[Row]:
    """Training steps, forward passes and gradient features of the built-in decoder on Python's own documentation."""
    import torch

    from assay.core.pool import Pool
    from assay.data import builtin
    from assay.numerics.persample import flatten, gradients
    from assay.numerics.project import Factored, Sketch, Sparse
    from assay.train import loop, optim
    from assay.train.models import LanguageModel, init_params, train_tokenizer
    from assay.train.recipe import Recipe

    torch.set_num_threads(1)
    pool = Pool.from_columns(builtin.python_text(target="docs", size=1000, seed=0).pool)
    task = LanguageModel(tokenizer=train_tokenizer(pool, vocab=1024), vocab=1024)
    task.prepare(pool, folder)
    encoded, recipe = task.encoded(folder), Recipe()
    params = init_params(task.module, 0)
    held, rng = [params, optim.init(recipe, list(params.values()))], np.random.default_rng(0)
    blocks = loop.blocks(encoded.sizes, 2 * loop.AREA)

    def train() -> float:
        rows = rng.permutation(len(encoded))[:24]
        grads, _ = loop.gradient(task, held[0], encoded, rows, np.ones(len(rows)), recipe.terms_per_step)
        values, held[1] = optim.update(recipe, optim.clip(grads, recipe.clip), held[1], list(held[0].values()), 0)
        held[0] = dict(zip(held[0], values, strict=True))
        return float(encoded.sizes[rows].sum())

    def forward() -> float:
        rows = blocks[rng.integers(len(blocks))]
        with torch.no_grad():
            task.loss(params, encoded.inputs(rows))
        return float(encoded.sizes[rows].sum())

    def features(made: Sketch) -> Turn:
        def turn() -> float:
            rows = blocks[rng.integers(len(blocks))]
            flatten(gradients(task.module, task.loss, params, encoded.inputs(rows), made)[0], made)
            return float(encoded.sizes[rows].sum())

        return turn

    names = {"train": train, "forward": forward}
    names |= {"gradients sparse 4096": features(Sparse(4096, 0)), "gradients rank 16": features(Factored(16, 0))}
    pace, spent = take_turns(names, 10 if quick else 60)
    weights = sum(p.numel() for p in params.values())
    case, rows = f"decoder, {weights:,} parameters, 1 thread", []
    for name, values in pace.items():
        rows.append(row("decoder", case, name, "tokens_per_second", 1 / values, spent[name]))
        if name != "train":
            ratio = values / float(np.median(pace["train"]))
            rows.append(row("decoder", case, name, "ratio_to_training", ratio, spent[name]))
    return rows


def tables(folder: Path, quick: bool) -> list[Row]:
    """Tables written to disk and read again with every checksum verified."""
    from assay.core.keys import encode_ids
    from assay.core.table import Table, TableWriter

    n, d, shard = (4096 if quick else 32_768), 2048, 1024
    ids = encode_ids(f"{i:08d}" for i in range(n))
    values = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    columns = tuple(f"c{i}" for i in range(d))

    def write() -> float:
        writer = TableWriter(folder, ids, columns, shard_rows=shard)
        for index in range(len(writer)):
            writer.write(index, values[index * shard : (index + 1) * shard])
        writer.finish()
        return values.nbytes / 1e6

    def read() -> float:
        assert sum(len(block) for block in Table.open(folder).shards()) == n
        return values.nbytes / 1e6

    pace, spent = take_turns({"write": write, "read": read}, 3 if quick else 7)
    case = f"{n} x {d} float32"
    return [row("table", case, name, "megabytes_per_second", 1 / v, spent[name]) for name, v in pace.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, smaller tables")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        rows: list[Row] = []
        for bench in (decoder, tables):
            place = Path(folder, bench.__name__)
            place.mkdir()
            rows += bench(place, chosen.quick)
    for r in rows:
        print(f"{r['bench']:<8} {r['method']:<22} {r['metric']:<22} {r['value']:>12,.2f}   {r['case']}")
    written(rows, chosen.json)


if __name__ == "__main__":
    main()
