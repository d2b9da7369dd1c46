"""Per-example gradients and forward-only utility against a plain training step, on one model in one process; and the
command line end to end.

Plain is transformers' own forward and backward pass on the same batches. Contestants take turns; both cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.core import Row, Turn, row, take_turns
from benchmarks.parts.world import World

AREA = 4096  # padded tokens of a batch: the same batches for all
CORES = 2


def contestants(place: World, folder: Path) -> dict[str, Turn]:
    """A call each, on the next batch of its own; each returns its tokens."""
    from assay.core.pool import Pool
    from assay.data import readers
    from assay.data.ingest import ingest
    from assay.numerics.persample import flatten, gradients, linear
    from assay.numerics.probe import Probe, central, forward
    from assay.numerics.project import Factored, Sparse
    from assay.train import loop
    from assay.train.hf import CausalLM

    ingest(readers.Source(paths=str(place.documents), text="text", id="id"), folder / "pool", what="pool", max_bad=0.0)
    task, pool = CausalLM(path=str(place.model), context=96), Pool.open(folder / "pool")
    (folder / "tokens").mkdir()
    task.prepare(pool, folder / "tokens")
    encoded, params = task.encoded(folder / "tokens"), task.params()
    batches = [encoded.inputs(block) for block in loop.blocks(encoded.sizes, AREA)][-12:]
    only = linear(task.module)
    rng = torch.Generator().manual_seed(0)
    along = {n: torch.randn(p.shape, generator=rng) * 1e-3 for n, p in params.items()}
    first = Probe.of(task, [[[central(params, along, 1.0)]]])
    pairs = [[forward(params, {n: v * (k + 1) for n, v in along.items()}, 1.0)] for k in range(3)]
    more = Probe.of(task, [pairs], columns=("a", "b", "c"))

    def over(call: Any, share: float = 1.0) -> Turn:
        """`share`: the part of a call's time that counts."""
        at = iter(range(10**9))

        def turn() -> float:
            inputs = batches[next(at) % len(batches)]
            call(inputs)
            return float(inputs["mask"].sum()) / share

        return turn

    def sketched(sketch: Any, names: set[str] | None) -> Turn:
        return over(
            lambda b: flatten(
                gradients(task.module, task.loss, params, b, sketch, only=names, fallback=set())[0], sketch
            )
        )

    return {
        "plain": over(plain(place)),
        "features": sketched(Factored(16, 0), only),
        "features, all layers": sketched(Factored(16, 0), None),
        "features, all layers, sparse 4096": sketched(Sparse(4096, 0), None),
        "forward-only-first": over(first.read),
        # Base and three targets, four passes: one further target is a quarter of them.
        "forward-only-next": over(more.read, share=1 / more.passes),
    }


def plain(place: World) -> Any:
    """Forward and backward pass as transformers does them, weight gradients and all."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place.model, attn_implementation="sdpa", dtype=torch.float32)
    model.train()

    def step(inputs: Any) -> None:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs["tokens"], use_cache=False).logits
        nll = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten(), reduction="none")
        ((nll * inputs["mask"].flatten()).sum() / inputs["mask"].sum()).backward()

    return step


def inner(place: World, quick: bool) -> tuple[list[Row], float]:
    """Rows of the inner loop, and the seconds that a token of plain training takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    try:
        with tempfile.TemporaryDirectory(prefix="assay-engine-") as folder:
            pace, spent = take_turns(contestants(place, Path(folder)), 3 if quick else 15)
    finally:
        torch.set_num_threads(before)
    base = float(np.median(pace["plain"]))
    found = [
        row("gradients", place.case, n, "ratio_to_training", p / (base if n != "plain" else p), spent[n])
        for n, p in pace.items()
    ]
    found.append(row("gradients", place.case, "plain", "tokens_per_second", 1 / pace["plain"], spent["plain"]))
    found.append(row("gradients", place.case, "features", "tokens_per_second", 1 / pace["features"], spent["features"]))
    return found, base


def end_to_end(place: World, base: float, turns: int) -> list[Row]:
    """`assay featurize` as a process of its own, reading the documents and writing the store, its start included."""
    command = [
        sys.executable, "-m", "assay.cli", "featurize", "--pool", str(place.documents), "--model", str(place.model),
        "--context", "96", "--id-column", "id", "--set", "projection=factored", "--set", "rank=16",
        "--set", "layers=linear", "--workers", str(CORES), "--quiet",
    ]  # fmt: skip
    seconds = []
    for _ in range(turns):
        with tempfile.TemporaryDirectory(prefix="assay-end-") as folder:
            start = time.perf_counter()
            subprocess.run([*command, "--out", f"{folder}/store"], check=True, env={**os.environ})
            seconds.append(time.perf_counter() - start)
    pace, spent = np.array(seconds) / place.tokens, float(sum(seconds))
    return [
        row("gradients", place.case, "features-end-to-end", "ratio_to_training", pace / base, spent),
        row("gradients", place.case, "features-end-to-end", "tokens_per_second", 1 / pace, spent),
    ]
