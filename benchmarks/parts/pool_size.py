"""Memory and pace of `assay featurize` against the size of the pool, measured from outside on the whole process tree.

    python -m benchmarks.parts.pool_size [--quick]

Short documents and a tiny decoder, so that what grows with the pool shows beside what does not. `peak_rss_bytes` is
the largest sum, over the tree, of resident bytes (pages that processes share are split between them where the system
can tell). `seconds_per_document` is the steady pace of the features, without the start of the program and of its
workers: the median over tenths of the shards, by the times at which they were written.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SIZES = {"pool-20k": 20_000, "pool-200k": 200_000}
QUICK = {"pool-2k": 2_000, "pool-20k": 20_000}
SHARD, PERIOD = 256, 0.1
WORDS = "the a cat dog tree sees runs under over green small x = y + 1 def return if not of in and to".split()


def write_pool(path: Path, documents: int, seed: int = 0) -> None:
    """Distinct documents of 4 to 24 words, a line each; the same distribution for any size."""
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(documents):
            words = [WORDS[k] for k in rng.integers(0, len(WORDS), rng.integers(4, 25))]
            file.write(json.dumps({"text": f"{i} " + " ".join(words)}) + "\n")


def write_model(path: Path, texts: list[str]) -> None:
    """A tiny decoder as a run leaves its scoring model, not trained: time and memory do not depend on its weights."""
    from assay.core.pool import Pool
    from assay.train.loop import Trained, save
    from assay.train.models import LanguageModel, init_params, train_tokenizer, write_task

    tokenizer = train_tokenizer(Pool.from_columns({"text": texts}), vocab=512)
    task = LanguageModel(tokenizer=tokenizer, vocab=512, width=32, layers=2, heads=2, context=48)
    path.mkdir()
    write_task(path / "task.json", task)
    save(path / "checkpoint.safetensors", Trained(init_params(task.module, 0), {}, []), "benchmark")


def watched(command: list[str], folder: Path) -> tuple[int, str]:
    """Peak resident bytes of a command and all below it, and what it said."""
    from assay.core.run import resident

    with open(folder / "said", "w+", encoding="utf-8") as said:
        process = psutil.Popen(command, stdout=said, cwd=folder)
        peak = 0
        while process.poll() is None:
            total = 0
            for one in _tree(process):
                try:
                    total += resident(one)
                except psutil.Error:
                    continue
            peak = max(peak, total)
            time.sleep(PERIOD)
        assert process.returncode == 0, f"{command} ended with {process.returncode}"
        said.seek(0)
        return peak, said.read()


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def pace(store: Path) -> np.ndarray:
    """Seconds a document in each tenth of the time that shards were written."""
    written = np.sort([file.stat().st_mtime_ns for file in store.glob("steps/features-*/?????.npy")]) / 1e9
    # The last shard is shorter, and at the first not all workers were there.
    edges = np.linspace(2, len(written) - 2, 11).astype(int)
    return np.diff(written[edges]) / (np.diff(edges) * SHARD)


def measured(folder: Path, documents: int, workers: int) -> tuple[int, dict[str, Any]]:
    """Peak bytes and what `assay featurize --json` says of itself; `pace` is added."""
    write_pool(folder / "pool.jsonl", documents)
    with open(folder / "pool.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(500), strict=False)]
    write_model(folder / "model", texts)
    words = ["featurize", "--pool", "pool.jsonl", "--model", "model", "--out", "store", "--set", "rank=4"]
    words += ["--set", f"shard={SHARD}"]
    command = [sys.executable, "-m", "assay.cli", *words, "--workers", str(workers), "--json"]
    peak, said = watched(command, folder)
    return peak, {**json.loads(said.splitlines()[-1]), "pace": pace(folder / "store")}


def rows(quick: bool = False, workers: int = 2) -> list[dict[str, Any]]:
    """Two rows for each size: peak memory, and seconds a document."""
    found = []
    for case, documents in (QUICK if quick else SIZES).items():
        with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
            peak, facts = measured(Path(folder), documents, workers)
        assert facts["computed"] == documents
        low, middle, high = (float(x) for x in np.percentile(facts["pace"], [10, 50, 90]))
        for metric, value, ci in (
            ("peak_rss_bytes", float(peak), None), ("seconds_per_document", middle, [low, high]),
        ):  # fmt: skip
            found.append(
                {
                    "bench": "pool_size", "case": case, "tool": "assay", "method": "featurize", "metric": metric,
                    "value": value, "ci": ci, "seconds": facts["wall"],
                }
            )  # fmt: skip
    return found


if __name__ == "__main__":
    for one in rows("--quick" in sys.argv[1:]):
        print(json.dumps(one))
