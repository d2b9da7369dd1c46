"""Cost of compressing gradients to 8192 numbers: the sparse sketch against a dense Gaussian matrix of equal variance.

    python -m benchmarks.parts.projection [--quick]

64 gradients of p = 196,608 entries (65,536 with --quick). The Gaussian matrix is multiplied at once, held in memory
(6.4 GB) where twice that is free, and also made anew piece by piece for each batch; the speed-up is over the cheaper.
The sketch's tables are held. Contestants take turns. Variances are mean squared errors of the 2016 inner products
between gradients, one value for each of several seeds.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import psutil
import torch
from benchmarks.core import Row, row, take_turns
from torch import Tensor

from assay.numerics.project import Sparse

CASE, SIZE, BATCH, PIECE = "projection-8192", 8192, 64, 4096


def vectors(entries: int) -> Tensor:
    """`[64, entries]`: entries of very different sizes, as in gradients, and rows that have something in common."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.randn(entries, generator=rng).exp_()
    return (torch.randn(BATCH, entries, generator=rng) + 0.5 * torch.randn(entries, generator=rng)) * scale


def anew(x: Tensor, seed: int) -> Tensor:
    """Times a Gaussian matrix that is never whole."""
    rng, found = torch.Generator().manual_seed(seed), x.new_zeros(len(x), SIZE)
    piece = x.new_empty(PIECE, SIZE)
    for cells in x.split(PIECE, dim=1):
        found.addmm_(cells, piece.normal_(generator=rng)[: cells.shape[1]])
    return found / SIZE**0.5


def errors(x: Tensor, kept: Tensor) -> float:
    """Mean square of the errors of inner products between rows, each divided by the rows' lengths."""
    unit, scale = x.double(), x.double().norm(dim=1, keepdim=True)
    unit, kept = unit / scale, kept.double() / scale
    gap = kept @ kept.T - unit @ unit.T
    return float(gap.square()[tuple(np.triu_indices(len(x), 1))].mean())


def speeds(x: Tensor, threads: int, held: Tensor | None, turns: int) -> list[Row]:
    torch.set_num_threads(threads)
    sparse = Sparse(SIZE, 0)

    def contestant(call: Any) -> Any:
        def turn() -> float:
            call()
            return float(BATCH)

        return turn

    calls = {"sparse": lambda: sparse.full("w", x), "gaussian, made anew": lambda: anew(x, 0)}
    if held is not None:
        calls["gaussian, held"] = lambda: x @ held
    pace, spent = take_turns({name: contestant(call) for name, call in calls.items()}, turns)
    case = CASE if threads == 1 else f"{CASE}, {threads} threads"
    found = [row("projection", case, name, "ms_per_example", 1e3 * pace[name], spent[name]) for name in calls]
    cheaper = min((name for name in calls if name != "sparse"), key=lambda name: float(np.median(pace[name])))
    ratio = pace[cheaper] / pace["sparse"]
    return [row("projection", case, "sparse", "speedup_over_gaussian", ratio, spent["sparse"]), *found]


def variances(x: Tensor, seeds: int) -> list[Row]:
    dense = np.array([errors(x, anew(x, seed)) for seed in range(seeds)])
    sparse = np.array([errors(x, Sparse(SIZE, seed).full("w", x)) for seed in range(4 * seeds)])
    return [
        row("projection", CASE, "sparse", "variance_over_gaussian", sparse / dense.mean(), 0.0),
        row("projection", CASE, "gaussian", "error_variance", dense, 0.0),
        row("projection", CASE, "sparse", "error_variance", sparse, 0.0),
    ]


def rows(quick: bool) -> list[Row]:
    before, x = torch.get_num_threads(), vectors(65_536 if quick else 196_608)
    fits = 2 * 4 * x.shape[1] * SIZE < psutil.virtual_memory().available
    held = None
    if fits:
        held = torch.randn(x.shape[1], SIZE, generator=torch.Generator().manual_seed(0)).div_(SIZE**0.5)
    try:
        found = [r for threads in (1, 2) for r in speeds(x, threads, held, 2 if quick else 5)]
        held = None
        return found + variances(x, 2 if quick else 4)
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, a smaller matrix")
    for r in rows(parser.parse_args().quick):
        low, high = r["ci"]
        print(f"{r['case']:<28}{r['method']:<22}{r['metric']:<24}{r['value']:>12.6g}  [{low:.6g}, {high:.6g}]")


if __name__ == "__main__":
    main()
