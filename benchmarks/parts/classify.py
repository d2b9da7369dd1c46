"""Classifier and importance weights timed, and what perplexity finds of garbled text, noise and spam.

    python -m benchmarks.parts.classify [--quick] [--data DIR] [--peers PYTHON] [--threads N] [--json FILE]

`speed`: documents a second of `fasttext` and `dsir`, in as many processes as `threads`, each of which has its model
and has scored a few documents before the clock starts; turn about with datatrove's fastText filter, on the same
documents and the same .bin of 100 numbers a word and two million buckets. What assay makes of that .bin once, a number
a word, is a .bin too, so datatrove is also timed with it: what is left then is not the model. `garbled`, `noise` and
`spam`: recall of each kind by the loss of a small decoder that was trained on clean text; on the side of high loss, and
on both sides at half a percent each. The bound drops 1% of other clean text; `false_drops` is its share of clean text
that neither the decoder nor the bound has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from benchmarks.core import Row, written

from . import peers

DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[3] / "shared" / "data"))
SCRIPT = peers.SCRIPTS / "classify_datatrove.py"
DATATROVE = peers.Peer("datatrove", "datatrove.pipeline.filters", lambda *_: [], lambda _: np.zeros(0), "")
FALSE = 0.01
WARM, SHARD = 50, 1024
TARGET = "biomed"


def rows(data: Path, quick: bool, peer: Path | None = None, threads: int = 1) -> list[Row]:
    """All rows of the cases above. `data`: the folder that has `domains`."""
    clean = pq.read_table(data / "domains" / "domains.parquet", columns=["text", "domain"])
    order = np.random.default_rng(0).permutation(clean.num_rows)
    texts, domains = clean["text"].to_pylist(), clean["domain"].to_pylist()
    texts, domains = [texts[i] for i in order], [domains[i] for i in order]
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        found = speed(Path(folder), texts, domains, quick, peers.interpreter(peer), threads)
        return found + defects(Path(folder), texts, pq.read_table(data / "domains" / "defects.parquet"), quick)


def row(case: str, method: str, metric: str, values: Any, seconds: float, **more: Any) -> Row:
    values = np.atleast_1d(np.asarray(values, dtype=np.float64))
    low, middle, high = (float(x) for x in np.percentile(values, [10, 50, 90]))
    return {
        "bench": "filters", "case": case, "tool": "assay", "method": method, "metric": metric, "value": middle,
        "ci": [low, high] if len(values) > 1 else None, "seconds": seconds, **more,
    }  # fmt: skip


# Speed.


def classifier(folder: Path, texts: list[str], domains: list[str]) -> Path:
    """A model of the usual size: its worth does not matter here, its number of vectors does."""
    import fasttext  # pyright: ignore[reportMissingImports]

    from assay.scorers.fasttext import GOOD, OTHER, cleared_memory, line

    lines = [f"{GOOD if d == TARGET else OTHER} {line(t)}\n" for t, d in zip(texts[:3000], domains[:3000], strict=True)]
    (folder / "lines.txt").write_text("".join(lines), encoding="utf-8")
    with cleared_memory():
        model = fasttext.train_supervised(str(folder / "lines.txt"), wordNgrams=2, thread=1, verbose=0, epoch=2)
    model.save_model(str(folder / "whole.bin"))
    return folder / "whole.bin"


def states(folder: Path, pool: list[str], domains: list[str], whole: Path) -> dict[str, tuple[Any, Any]]:
    """The scorers with their states, as a run makes them."""
    from assay.core.method import Scorer, make
    from assay.core.pool import Pool
    from assay.core.run import Run
    from assay.measure import Measurer

    run = Run.open(folder / "run", {"name": "benchmark"})
    run.close()
    target = [t for t, d in zip(pool, domains, strict=True) if d == TARGET][:200]
    some = Pool.from_columns({"text": pool[:2000]})
    at = Measurer(run, some, Pool.from_columns({"text": target}), shard=SHARD)
    found = {}
    for spec in ({"name": "fasttext", "classifier": str(whole)}, {"name": "dsir"}):
        method: Any = make(Scorer, spec)
        kept: list[Any] = []
        fill = at._fill
        at._fill = lambda work, *rest, kept=kept, fill=fill: (kept.append(work.state), fill(work, *rest))[1]  # type: ignore[method-assign]
        at.table(method)
        at._fill = fill  # type: ignore[method-assign]
        found[method.name] = method, kept[0]
    return found


def work(task: tuple[Any, Any, list[str]]) -> tuple[float, float, float, np.ndarray]:
    """Start and end on the wall clock, CPU seconds, and the scores."""
    method, state, texts = task
    batch = lambda some: SimpleNamespace(ids=np.arange(len(some)), column=lambda _: some)  # noqa: E731
    method.score(state, batch(texts[:WARM]))
    start, cpu = time.time(), time.process_time()
    found = [method.score(state, batch(texts[i : i + SHARD])) for i in range(0, len(texts), SHARD)]
    return start, time.time(), time.process_time() - cpu, np.concatenate(found)[:, 0]


def scored(method: Any, state: Any, texts: list[str], threads: int) -> tuple[float, float, np.ndarray]:
    """Seconds that processes side by side took, of CPU too, and the scores in the documents' order."""
    with get_context("spawn").Pool(threads, maxtasksperchild=1) as pool:
        done = pool.map(work, [(method, state, texts[k::threads]) for k in range(threads)], chunksize=1)
    scores = np.zeros(len(texts))
    for k, (*_, found) in enumerate(done):
        scores[k::threads] = found
    return max(d[1] for d in done) - min(d[0] for d in done), sum(d[2] for d in done), scores


def filtered(python: Path, folder: Path, model: Path, threads: int) -> tuple[float, float, np.ndarray]:
    """The same of datatrove's filter."""
    out = folder / "peer.json"
    command = [python, SCRIPT, folder / "texts.jsonl", model, out, "--processes", str(threads)]
    around = peers.environment(DATATROVE, folder / "cache", 1)
    subprocess.run([str(part) for part in command], check=True, capture_output=True, env=around)
    told = json.loads(out.read_text())
    return told["seconds"], told["cpu"], np.array(told["scores"])


def speed(folder: Path, texts: list[str], domains: list[str], quick: bool, python: Path, threads: int) -> list[Row]:
    pool = texts[: 4000 if quick else 20_000]
    whole = classifier(folder, texts, domains)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in pool))
    held = states(folder, texts, domains, whole)
    small = held["fasttext"][1].file
    version = peers.version(python, DATATROVE)
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    mine = np.zeros(len(pool))
    for _ in range(1 if quick else 3):
        for name, (method, state) in held.items():
            spent, used, scores = scored(method, state, pool, threads)
            seconds.setdefault(name, []).append(spent)
            cpu.setdefault(name, []).append(used)
            mine = scores if name == "fasttext" else mine
        for name, model in (("fasttext", whole), ("fasttext, one number a word", small)) if version else ():
            spent, used, found = filtered(python, folder, model, threads)
            seconds.setdefault(f"datatrove {name}", []).append(spent)
            cpu.setdefault(f"datatrove {name}", []).append(used)
            # It adds 1e-5 to a probability.
            assert np.abs(found - 1 / (1 + np.exp(-mine))).max() < 1e-4, "the same model says the same"
    about = {"documents": len(pool), "threads": threads, "characters": float(np.mean([len(t) for t in pool]))}
    found = []
    for name, spent in seconds.items():
        # Where other work shares the cores, CPU seconds say what the wall clock would without it.
        rates, alone = len(pool) / np.array(spent), float(len(pool) / np.median(cpu[name]))
        made = row("speed", name.removeprefix("datatrove "), "docs_per_second", rates, sum(spent), **about)
        found.append(made | {"docs_per_cpu_second": alone})
        if name.startswith("datatrove"):
            found[-1]["tool"] = f"datatrove {version}"
            for what, of in (("ratio", seconds), ("cpu_ratio", cpu)):
                ratios = np.array(of[name]) / np.array(of["fasttext"])
                found.append(row("speed", f"fasttext against {name}", what, ratios, 0.0, **about))
    return found


# What perplexity finds.


def outside(fit: np.ndarray, losses: np.ndarray) -> dict[str, np.ndarray]:
    """Which losses each bound drops; the bounds drop `FALSE` of `fit`."""
    high = np.quantile(fit, 1 - FALSE)
    lowest, highest = np.quantile(fit, [FALSE / 2, 1 - FALSE / 2])
    return {"perplexity": losses > high, "perplexity, both sides": (losses < lowest) | (losses > highest)}


def defects(folder: Path, texts: list[str], table: Any, quick: bool) -> list[Row]:
    """Recall where a bound drops 1% of the clean text that it was made on, by kind."""
    import torch

    from assay.core.pool import Pool
    from assay.core.selection import Selection
    from assay.train import loop
    from assay.train.models import LanguageModel, train_tokenizer
    from assay.train.recipe import Recipe

    torch.set_num_threads(1)
    learn, clean = (1000, 500) if quick else (8000, 3000)
    start = time.perf_counter()
    known = {name: table[name].to_pylist() for name in ("text", "defect", "kind")}
    wanted = [i for i, d in enumerate(known["defect"]) if d in ("garbled", "noise", "spam")]
    if quick:
        wanted = wanted[::10]
    parts = {
        "learn": texts[-learn:], "clean": texts[-learn - clean : -learn], "bad": [known["text"][i] for i in wanted],
    }  # fmt: skip
    pools = {name: Pool.from_columns({"text": part}) for name, part in parts.items()}
    task = LanguageModel(tokenizer=train_tokenizer(pools["learn"], vocab=1024), vocab=1024)
    encoded = {}
    for name, pool in pools.items():
        place = folder / f"encoded-{name}"
        place.mkdir()
        task.prepare(pool, place)
        encoded[name] = task.encoded(place)
    recipe = Recipe(steps=30 if quick else 400)
    everything = Selection.everything(pools["learn"].ids)
    params = loop.train(task, encoded["learn"], np.arange(learn), everything, recipe).params
    loss = {name: loop.evaluate(task, params, encoded[name])["loss"] for name in ("clean", "bad")}
    seconds = time.perf_counter() - start
    half = clean // 2
    dropped = outside(loss["clean"][:half], loss["bad"])
    false = {method: float(gone.mean()) for method, gone in outside(loss["clean"][:half], loss["clean"][half:]).items()}
    kinds = np.array([(known["defect"][i], known["kind"][i]) for i in wanted])
    found = []
    for method, gone in dropped.items():
        for defect in ("garbled", "noise", "spam"):
            here = kinds[:, 0] == defect
            about = {"false_drops": false[method], "steps": recipe.steps, "clean": clean - half}
            found.append(row(defect, method, "recall", gone[here].mean(), seconds, rows=int(here.sum()), **about))
            for kind in sorted(set(kinds[here, 1].tolist())):
                own = here & (kinds[:, 1] == kind)
                found.append(
                    row(defect, method, "recall", gone[own].mean(), seconds, kind=kind, rows=int(own.sum()), **about)
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer documents, one turn, a decoder of 30 steps")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that has `domains` (or ASSAY_DATA)")
    parser.add_argument("--peers", type=Path, help="python of their environment (or ASSAY_PEERS)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    chosen = parser.parse_args()
    if not (chosen.data / "domains" / "domains.parquet").exists():
        sys.exit(f"no real documents at {chosen.data}: set ASSAY_DATA to a folder that has them")
    found = rows(chosen.data, chosen.quick, chosen.peers, chosen.threads)
    for r in found:
        name = f"{r['method']}{' ' + r['kind'] if 'kind' in r else ''}"
        alone = f"   {r['docs_per_cpu_second']:>12,.1f} a CPU second" if "docs_per_cpu_second" in r else ""
        print(f"{r['case']:<8} {r['tool']:<16} {name:<56} {r['metric']:<16} {r['value']:>12,.3f}{alone}")
    written(found, chosen.json)


if __name__ == "__main__":
    main()
