"""datatrove's fastText filter over documents, timed in processes that have the model and have judged a few.

    python classify_datatrove.py documents.jsonl model.bin out.json [--processes N]

Line ends become spaces there as here: its own default joins the words of two lines.
"""

from __future__ import annotations

import argparse
import json
import time
from multiprocessing import get_context
from pathlib import Path

from datatrove.data import Document  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.filters import FastTextClassifierFilter  # pyright: ignore[reportMissingImports]

WARM = 50


def work(task: tuple[str, str, list[str]]) -> tuple[float, float, float, list[float]]:
    """Start and end on the wall clock, CPU seconds, and the probability of the good label."""
    model, label, texts = task
    keep = (label.removeprefix("__label__"), 0.5)
    made = FastTextClassifierFilter(model, keep_labels=keep, newline_replacement=" ")
    for text in texts[:WARM]:
        made.filter(Document(text=text, id="0"))
    documents = [Document(text=text, id="0") for text in texts]
    start, cpu = time.time(), time.process_time()
    for document in documents:
        made.filter(document)
    end, cpu = time.time(), time.process_time() - cpu
    return start, end, cpu, [float(d.metadata[label]) for d in documents]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("documents", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--label", default="__label__hq")
    parser.add_argument("--processes", type=int, default=1)
    chosen = parser.parse_args()
    with open(chosen.documents, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    n = chosen.processes
    with get_context("spawn").Pool(n, maxtasksperchild=1) as pool:
        done = pool.map(work, [(chosen.model, chosen.label, texts[k::n]) for k in range(n)], chunksize=1)
    seconds = max(d[1] for d in done) - min(d[0] for d in done)
    scores = [0.0] * len(texts)
    for k, (*_, found) in enumerate(done):
        scores[k::n] = found
    chosen.out.write_text(json.dumps({"seconds": seconds, "cpu": sum(d[2] for d in done), "scores": scores}))


if __name__ == "__main__":
    main()
