"""Copies in 62 thousand real documents whose defects are known: found or not, at what speed and in what memory.

    python -m benchmarks.parts.duplicates [--quick] [--data DIR] [--peers PYTHON] [--threads N] [--json FILE]

`exact_dup`: against a plain dictionary of normal forms. `near_dup`: recall by decile of the true Jaccard index of word
5-grams beside what the bands promise, 1 - (1 - J^r)^b, and precision with verification. `leak`: evaluation items in
documents, by the 13-word gate. `speed`: each scorer as a process, turn about with datatrove's blocks for the same, on
the same Parquet files; imports are not counted on either side. `memory`: peak of the process tree at two sizes of pool.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from benchmarks.core import Row, written

from . import peers
from .pool_size import watched

pc: Any = pyarrow.compute  # its functions are made at run time, where type checkers do not see them
DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[3] / "shared" / "data"))
ONE, PEER = Path(__file__).with_name("dedup_one.py"), Path(__file__).parent / "peer_scripts" / "dedup_datatrove.py"
DATATROVE = peers.Peer("datatrove", "datatrove.pipeline.dedup", lambda *_: [], lambda _: np.zeros(0), "")
EVALUATIONS = ("gsm8k", "bbh", "mmlu", "humaneval", "lambada")
LEAST = 0.7


def rows(data: Path, quick: bool, peer: Path | None = None, threads: int = 1) -> list[Row]:
    """All rows of the cases above. `data`: the folder of `domains` and of the evaluation sets."""
    clean = pq.read_table(data / "domains" / "domains.parquet", columns=["id", "text", "domain"])
    defects = pq.read_table(data / "domains" / "defects.parquet")
    # A quick run has every defect, with its original, and fewer of the other documents.
    some = clean.slice(0, 8000) if quick else clean
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        place = Path(folder)
        found = exact(place / "exact", some, clean, defects)
        found += near(place / "near", some, clean, defects)
        found += leaks(data, some, defects)
        found += speed(place, clean, quick, peers.interpreter(peer), threads)
        return found + memory(place, clean, quick)


def row(case: str, method: str, metric: str, value: Any, seconds: float, **more: Any) -> Row:
    return {
        "bench": "filters", "case": case, "tool": "assay", "method": method, "metric": metric, "value": float(value),
        "ci": None, "seconds": seconds, **more,
    }  # fmt: skip


# Found or not.


def mixed(some: pa.Table, clean: pa.Table, defects: pa.Table, kind: str) -> tuple[pa.Table, pa.Table]:
    """Documents with the defects of one kind and their originals; and those defects."""
    planted = defects.filter(pc.equal(defects["defect"], kind))
    originals = clean.filter(pc.is_in(clean["id"], pc.unique(planted["of"])))
    rest = some.filter(pc.invert(pc.is_in(some["id"], originals["id"])))
    names = ["id", "text", "domain"]
    return pa.concat_tables([rest, originals, planted.select(names)]), planted


@dataclass(frozen=True)
class Verdicts:
    """What a scorer says of a pool, by id: minus the copies before, and the survivor of those in a cluster."""

    score: dict[str, float]
    survivor: dict[str, str]
    seconds: float


def judged(folder: Path, table: pa.Table, spec: dict[str, Any]) -> Verdicts:
    from assay.core.method import Scorer, make
    from assay.core.pool import Pool
    from assay.core.run import Run
    from assay.measure import Measurer

    run = Run.open(folder, {"name": "benchmark"})
    run.close()
    method = make(Scorer, spec)
    measurer = Measurer(run, Pool.from_columns(table), Pool.from_columns({"text": ["no target"]}), shard=2048)
    start = time.perf_counter()
    found = measurer.table(method)
    seconds = time.perf_counter() - start
    names, place = [i.decode() for i in found.ids.tolist()], measurer.path(method, measurer.pool)
    survivor: dict[str, str] = {}
    if (place / "near-ids.npy").exists():
        ids, first = (np.load(place / f"near-{n}.npy").tolist() for n in ("ids", "survivors"))
        survivor = {i.decode(): s.decode() for i, s in zip(ids, first, strict=True)}
    return Verdicts(dict(zip(names, found.column("score").tolist(), strict=True)), survivor, seconds)


def exact(folder: Path, some: pa.Table, clean: pa.Table, defects: pa.Table) -> list[Row]:
    """Removed are all but the lowest id of each class of equal normal forms, and nothing else."""
    table, planted = mixed(some, clean, defects, "exact_dup")
    told = judged(folder, table, {"name": "exact_dup"})
    classes: dict[str, list[str]] = {}
    for identity, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
        classes.setdefault(" ".join(text.lower().split()), []).append(identity)
    truth = {i for ids in classes.values() for i in sorted(ids)[1:]}
    removed = {i for i, s in told.score.items() if s < 0}
    assert len(truth) >= planted.num_rows, "each planted copy has its original in the pool"
    more = {"documents": table.num_rows, "planted": planted.num_rows}
    return [
        row("exact_dup", "exact_dup", "recall", len(truth & removed) / len(truth), told.seconds, **more),
        row("exact_dup", "exact_dup", "precision", len(truth & removed) / len(removed), told.seconds, **more),
    ]


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """Word n-grams of the plain form, one character at a time: nothing is shared with what is measured."""
    out = ""
    for c in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(c)
        out += "" if kind in ("Mn", "Me") else "0" if kind == "Nd" else c if kind[0] in "LMN" else " "
    words = out.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} or ({tuple(words)} if words else set())


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / max(1, len(one | other))


def near(folder: Path, some: pa.Table, clean: pa.Table, defects: pa.Table) -> list[Row]:
    """Each near copy has one original, so a pair is found if both have one survivor."""
    table, planted = mixed(some, clean, defects, "near_dup")
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    pairs = list(zip(planted["id"].to_pylist(), planted["of"].to_pylist(), strict=True))
    alike = np.array([jaccard(shingles(texts[a]), shingles(texts[b])) for a, b in pairs])
    told = judged(folder / "plain", table, {"name": "minhash"})
    met = np.array([told.survivor.get(a, a) == told.survivor.get(b, b) for a, b in pairs])
    found = by_decile(alike, met, told.seconds)
    found.append(row("near_dup", "minhash", "recall", met.mean(), told.seconds, pairs=len(pairs)))
    known = {i for pair in pairs for i in pair}
    for clusters in ("components", "star"):
        spec = {"name": "minhash", "verify": LEAST, "clusters": clusters}
        sure = judged(folder / clusters, table, spec)
        name = f"minhash verify {LEAST:g} {clusters}"
        gone = [i for i, s in sure.score.items() if s < 0]
        # Right is a removed document that is as much like one that stays: its survivor, or for chains any other in
        # its cluster.
        cluster: dict[str, list[str]] = {}
        for i, s in sure.survivor.items():
            cluster.setdefault(s, []).append(i)
        sets = {i: shingles(texts[i]) for ids in cluster.values() for i in ids}
        others = {i: [sure.survivor[i]] if clusters == "star" else cluster[sure.survivor[i]] for i in gone}
        right = [any(j != i and jaccard(sets[i], sets[j]) >= LEAST for j in others[i]) for i in gone]
        natural = sum(i not in known for i in gone)
        found.append(
            row("near_dup", name, "precision", np.mean(right), sure.seconds, removed=len(gone), natural=natural)
        )
        high = np.array([sure.survivor.get(a, a) == sure.survivor.get(b, b) for a, b in pairs])[alike >= LEAST]
        found.append(row("near_dup", name, "recall", high.mean(), sure.seconds, pairs=len(high)))
    return found


def by_decile(alike: np.ndarray, met: np.ndarray, seconds: float) -> list[Row]:
    """Recall in each tenth of the pairs by Jaccard index, beside the mean of the curve over the same pairs."""
    from assay.scorers.minhash import curve

    found, order = [], np.argsort(alike, kind="stable")
    for tenth, part in enumerate(np.array_split(order, 10)):
        promised = curve(alike[part], 14, 8)
        spread = math.sqrt(float((promised * (1 - promised)).sum())) / len(part)
        low, high = float(alike[part].min()), float(alike[part].max())
        recall, expected = float(met[part].mean()), float(promised.mean())
        # Where the curve is all but 1, one pair in the part is the least that can be missing.
        within = abs(recall - expected) <= max(3 * spread, 1 / len(part))
        found.append(
            row(
                f"near_dup decile {tenth + 1}, J {low:.3f} to {high:.3f}", "minhash", "recall", recall, seconds,
                expected=expected, sd=spread, within_3_sd=within, pairs=len(part),
            )
        )  # fmt: skip
    return found


def leaks(data: Path, some: pa.Table, defects: pa.Table) -> list[Row]:
    """Documents that have evaluation items whole, whole within other text, or the question alone."""
    from assay.core.pool import Pool
    from assay.core.target import Target
    from assay.data.gate import contamination

    planted = defects.filter(pc.equal(defects["defect"], "leak"))
    sets = [pq.read_table(data / n / f"{n}.parquet", columns=["id", "text"]) for n in EVALUATIONS]
    items = pa.concat_tables(sets)
    items = Pool.from_columns(items.filter(pc.is_in(items["id"], pc.unique(planted["detail"]))))
    half = len(items) // 2
    target = Target("evaluations", items.at(slice(0, half)), items.at(slice(half, None)))
    pool = Pool.from_columns(pa.concat_tables([some.select(["id", "text"]), planted.select(["id", "text"])]))
    start = time.perf_counter()
    hits = {i.decode() for i in contamination(pool, target).ids.tolist()}
    seconds, found = time.perf_counter() - start, []
    for kind in ("verbatim", "embedded", "question_only"):
        ids = planted.filter(pc.equal(planted["kind"], kind))["id"].to_pylist()
        found.append(
            row("leak", f"gate {kind}", "recall", np.mean([i in hits for i in ids]), seconds, planted=len(ids))
        )
    natural = {o["pool"] for o in json.loads((data / "domains" / "natural_overlap.json").read_text())["items"]}
    true = set(planted["id"].to_pylist()) | natural
    return [*found, row("leak", "gate", "precision", len(hits & true) / len(hits), seconds, hits=len(hits))]


# Speed and memory.


def write_pool(path: Path, table: pa.Table, rounds: int = 1) -> Path:
    """A pool on disk; in further rounds each document comes again, with every fortieth word turned round."""
    from assay.core.pool import PoolWriter

    writer = PoolWriter(path)
    for again in range(rounds):
        for batch in table.to_batches(2048):
            texts, ids = batch["text"].to_pylist(), batch["id"].to_pylist()
            if again:
                texts, ids = [edited(t, again) for t in texts], [f"{i}-{again}" for i in ids]
            writer.write(pa.table({"id": ids, "text": texts, "domain": batch["domain"]}))
    writer.finish()
    return path


def edited(text: str, again: int) -> str:
    words = text.split(" ")
    words[again::40] = [word[::-1] for word in words[again::40]]
    return " ".join(words)


def ours(folder: Path, pool: Path, spec: dict[str, Any], threads: int) -> dict[str, Any]:
    """What one scorer's process says of itself, its peak memory and its whole wall-clock time."""
    start = time.perf_counter()
    command = [sys.executable, str(ONE), str(pool), json.dumps(spec), str(threads)]
    peak, said = watched(command, folder)
    whole = time.perf_counter() - start
    return {**json.loads(said.splitlines()[-1]), "peak": peak, "whole": whole}


def theirs(folder: Path, pool: Path, name: str, python: Path, threads: int) -> dict[str, Any]:
    start = time.perf_counter()
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [str(python), str(PEER), str(pool), name, str(out), "--threads", str(threads)]
    kept, before = peers.environment(DATATROVE, out / "cache", threads), dict(os.environ)
    os.environ.update(kept)
    os.environ.pop("PYTHONPATH", None)
    try:
        peak, said = watched(command, out)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {**json.loads(said.splitlines()[-1]), "peak": peak, "whole": time.perf_counter() - start}


def speed(place: Path, clean: pa.Table, quick: bool, python: Path, threads: int) -> list[Row]:
    """Documents a second, turn about; exact copies on all documents, near ones on fewer, for the peer's sake."""
    version, found = peers.version(python, DATATROVE), []
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    for name, count in (("exact_dup", 60_000), ("minhash", 20_000), ("paragraph_dup", 20_000)):
        table = clean.slice(0, count // 10 if quick else count)
        pool = write_pool(place / f"speed-{name}", table)
        sides: dict[str, Callable[[], dict[str, Any]]] = {
            "assay": lambda n=name, p=pool: ours(place, p, {"name": n}, threads)
        }
        if version and name != "paragraph_dup":
            sides[f"datatrove {version}"] = lambda n=name, p=pool: theirs(place, p, n, python, threads)
        turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(1 if quick else 3):
            for side, call in sides.items():
                turns[side].append(call())
        for side, said in turns.items():
            pace = table.num_rows / np.array([s["seconds"] for s in said])
            low, middle, high = (float(x) for x in np.percentile(pace, [10, 50, 90]))
            found.append(
                row("speed", name, "docs_per_second", middle, sum(s["whole"] for s in said), documents=table.num_rows,
                    threads=threads, removed=said[0]["removed"], peak_rss_bytes=max(s["peak"] for s in said),
                    # Of one process: with more, those of the others are not in it.
                    **({"cpu_seconds": float(np.median([s["cpu"] for s in said]))} if threads == 1 else {}))
                | {"tool": side, "ci": [low, high] if len(said) > 1 else None}
            )  # fmt: skip
    return found


def memory(place: Path, clean: pa.Table, quick: bool) -> list[Row]:
    """Peak memory of each scorer on a pool, and on one ten times as large; by one process, as more of them begin to
    work at some size of pool, and what grows with it would not show."""
    found, table = [], clean.slice(0, 6_000 if quick else 60_000)
    for rounds in (1, 10):
        pool = write_pool(place / f"memory-{rounds}", table, rounds)
        case = f"memory-{table.num_rows * rounds // 1000}k"
        for name in ("exact_dup", "minhash"):
            said = ours(place, pool, {"name": name}, 1)
            more = {k: said[k] for k in ("documents", "removed")} | {"threads": 1, "cpu_seconds": said["cpu"]}
            found.append(row(case, name, "peak_rss_bytes", said["peak"], said["whole"], **more))
            pace = said["documents"] / said["seconds"]
            found.append(row(case, name, "docs_per_second", pace, said["whole"], **more))
    return found


SHOWN = ("expected", "sd", "within_3_sd", "pairs", "removed", "planted", "cpu_seconds")


def show(found: list[Row]) -> None:
    for r in found:
        more = {k: v for k, v in r.items() if k in SHOWN}
        said = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
        print(f"{r['case']:<38} {r['tool']:<18} {r['method']:<30} {r['metric']:<16} {r['value']:>14,.4f}   {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer documents, one turn")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the shared data (or ASSAY_DATA)")
    parser.add_argument("--peers", type=Path, help="python of their environment (or ASSAY_PEERS)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    chosen = parser.parse_args()
    if not (chosen.data / "domains" / "defects.parquet").exists():
        parser.error(f"no documents at {chosen.data / 'domains'}: name the folder with --data or ASSAY_DATA")
    found = rows(chosen.data, chosen.quick, chosen.peers, chosen.threads)
    show(found)
    written(found, chosen.json)


if __name__ == "__main__":
    main()
