"""Rules, languages and lengths of text: what they find of known defects, how fast, and how like datatrove they are.

    python -m benchmarks.parts.rules [--quick] [--data FOLDER] [--peers PYTHON] [--threads N] [--json FILE]

`recall` is the share of a kind of defect that is dropped, with Wilson's 95% interval. `at` says by what bound:
published    the preset as it is in print; `false_drops` is then the share of clean text that goes with it
score        the score (minus the rules broken) at 1% false drops on clean text; ties at the bound are drawn
refitted     the preset's columns and directions, each bound moved to the same tail of clean text, so that 1% of it goes

Bounds are fitted on one half of the clean text, and `false_drops` is measured on the other. `speed`: documents of about
1 kB from memory to scores, in N processes that have loaded and warmed up before the clock starts, turn about with
datatrove's filters in as many; `cpu` is documents a CPU second. datatrove's own language model must be downloaded, so
its LanguageFilter is given py3langid there, the model that ours uses, on whole documents as it does.

`agreement`: the same verdict, or a statistic within 2% (`exact`: to the last digit), on the same documents. Statistics
of lines and paragraphs are the same to the last digit. Those of words differ where spaCy has exceptions that our
tokens have not: "and/or", "cannot" and "Ive", faces such as "):", symbols such as TM inside a word, and full stops
after letters that have no case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from benchmarks.core import Row, row, written
from benchmarks.parts import peers

BATCH = 1024  # rows of a shard, as the measuring driver hands them to a method of text
RATE = 0.01
NEAR = 0.02
CASES = ("foreign", "garbled", "noise", "spam")
SCRIPT = peers.SCRIPTS / "run_datatrove.py"
DATATROVE = peers.Peer("datatrove", "datatrove", lambda *_: [], lambda _: np.zeros(0), "")
DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[3] / "shared" / "data")) / "domains"
SCORERS: dict[str, dict[str, Any]] = {
    "gopher": {"name": "gopher"}, "gopher-dclm": {"name": "gopher", "style": "dclm"}, "c4": {"name": "c4"},
    "fineweb": {"name": "fineweb"}, "refinedweb": {"name": "refinedweb"}, "language": {"name": "language"},
    "length": {"name": "length"},
}  # fmt: skip
TIMED = ("gopher", "c4", "fineweb", "refinedweb", "language", "length")
RULES = ("gopher", "c4", "fineweb", "refinedweb")
PEER_TIMED = ("gopher", "c4", "fineweb", "rules", "language")
NOTES = {
    "rules": "ours: gopher, c4, fineweb and refinedweb; datatrove's: all but the last, which it has not",
    "gopher": "datatrove's two filters, one after the other, on the same cut words",
    "language": "datatrove's LanguageFilter with py3langid, whole documents; its own model cannot be downloaded here",
}


@dataclass
class Scored:
    """A scorer's columns over clean and defective documents."""

    columns: tuple[str, ...]
    presets: Mapping[str, Mapping[str, tuple[float | None, float | None]]]
    clean: np.ndarray
    faulty: np.ndarray
    seconds: float


def made(name: str) -> Any:
    from assay.core.method import Scorer, make

    scorer = make(Scorer, SCORERS[name])
    if name == "language":
        scorer.init(None)  # type: ignore[arg-type]
    return scorer


def score(scorer: Any, texts: list[str]) -> np.ndarray:
    parts = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        values = scorer.score(None, SimpleNamespace(ids=np.zeros(len(some)), column=lambda _, some=some: some))
        parts.append(values if values.ndim == 2 else values[:, None])
    return np.concatenate(parts)


def documents(data: Path, quick: bool) -> tuple[list[str], list[dict[str, Any]]]:
    import pyarrow.parquet as pq

    clean = pq.read_table(data / "domains.parquet", columns=["text"])["text"].to_pylist()
    faulty = pq.read_table(data / "defects.parquet", columns=["text", "defect", "kind", "lang"]).to_pylist()
    faulty = [r for r in faulty if r["defect"] in CASES]
    return (clean[:6000], faulty[::4]) if quick else (clean, faulty)


def wilson(hits: float, count: int) -> list[float]:
    """95% interval of a share."""
    z, share = 1.96, hits / count
    middle, spread = share + z * z / (2 * count), z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return [float((middle - spread) / (1 + z * z / count)), float((middle + spread) / (1 + z * z / count))]


def outside(scored: Scored, values: np.ndarray, bounds: Mapping[str, tuple[float | None, float | None]]) -> np.ndarray:
    from assay.numerics.bounds import broken

    return broken({n: values[:, scored.columns.index(n)] for n in bounds}, bounds) > 0


def drawn(values: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Chance that each value is dropped when the lowest `RATE` of clean ones are, ties at the bound drawn at random."""
    bound = np.quantile(clean, RATE, method="lower")
    below, at = (clean < bound).mean(), (clean == bound).mean()
    return (values < bound) + (values == bound) * max(0.0, RATE - below) / at


def tails(scored: Scored, fit: np.ndarray, values: np.ndarray, bounds: Mapping[str, Any]) -> np.ndarray:
    """Least share, over a preset's bounds, of fitted clean text that is at least as far out as each row."""
    least = np.ones(len(values))
    for name, (low, high) in bounds.items():
        at = scored.columns.index(name)
        known, x = np.sort(fit[:, at]), values[:, at]
        if low is not None:
            least = np.minimum(least, np.searchsorted(known, x, side="right") / len(known))
        if high is not None:
            least = np.minimum(least, 1 - np.searchsorted(known, x, side="left") / len(known))
    return least


def judged(scored: Scored, preset: str) -> Iterator[tuple[str, np.ndarray, float]]:
    """By each kind of bound: the chance that each defect is dropped, and the share of clean text that is."""
    bounds, clean, faulty = scored.presets[preset], scored.clean, scored.faulty
    yield "published", outside(scored, faulty, bounds).astype(float), float(outside(scored, clean, bounds).mean())
    fit, rest = clean[::2], clean[1::2]
    if preset == next(iter(scored.presets)):
        yield "score", drawn(faulty[:, 0], fit[:, 0]), float(drawn(rest[:, 0], fit[:, 0]).mean())
    if scored.columns[0] not in bounds and "best" not in bounds:
        own = tails(scored, fit, fit, bounds)
        share = lambda v: drawn(tails(scored, fit, v, bounds), own)  # noqa: E731
        yield "refitted", share(faulty), float(share(rest).mean())


def together(tables: Mapping[str, Scored]) -> Scored:
    """FineWeb's rules as one: Gopher's, C4's without the rule on ends, and its own."""
    parts = {"gopher": "gopher", "c4": "any_end", "fineweb": "fineweb"}
    names = tuple(f"{s}.{c}" for s in parts for c in tables[s].columns)
    bounds = {f"{s}.{c}": b for s, p in parts.items() for c, b in tables[s].presets[p].items()}
    joined = [np.column_stack([getattr(tables[s], half) for s in parts]) for half in ("clean", "faulty")]
    from assay.numerics.bounds import broken

    counts = [0.0 - broken({n: v[:, names.index(n)] for n in bounds}, bounds) for v in joined]
    both = [np.column_stack([c, v]) for c, v in zip(counts, joined, strict=True)]
    return Scored(("score", *names), {"together": bounds}, both[0], both[1], sum(tables[s].seconds for s in parts))


def recalls(data: Path, quick: bool) -> list[Row]:
    clean, faulty = documents(data, quick)
    texts = [r["text"] for r in faulty]
    tables = {}
    for name in SCORERS:
        if name == "length":
            continue
        scorer, start = made(name), time.perf_counter()
        values = score(scorer, clean), score(scorer, texts)
        tables[name] = Scored(scorer.columns(None), scorer.presets, *values, time.perf_counter() - start)
    tables["together"] = together(tables)
    sizes = np.array([len(t) for t in clean])
    long, found = sizes > 200, deciles(tables["language"], sizes)
    for name, scored in tables.items():
        if name == "language":
            scored.clean = scored.clean[long]
        for preset in scored.presets:
            method = name if preset in (name.split("-")[0], next(iter(scored.presets))) else f"{name}-{preset}"
            for at, dropped, false in judged(scored, preset):
                found += kinds(faulty, dropped, method, at, false, scored.seconds)
    return found


def deciles(scored: Scored, sizes: np.ndarray) -> list[Row]:
    """Share of clean documents of each tenth of lengths that the language preset drops: short ones are told worst."""
    bounds, rows = scored.presets[next(iter(scored.presets))], []
    dropped = outside(scored, scored.clean, bounds)
    for k, part in enumerate(np.array_split(np.argsort(sizes, kind="stable"), 10)):
        hits = float(dropped[part].sum())
        rows.append({
            "bench": "filters", "case": "clean", "tool": "assay", "method": "language", "metric": "false_drops",
            "value": hits / len(part), "ci": wilson(hits, len(part)), "seconds": scored.seconds,
            "kind": f"length decile {k + 1}, up to {sizes[part].max()} characters", "documents": len(part),
        })  # fmt: skip
    return rows


def kinds(
    faulty: list[dict[str, Any]], dropped: np.ndarray, method: str, at: str, false: float, seconds: float
) -> list[Row]:
    """A row for each kind, and one for each case as a whole; foreign ones over 200 characters."""
    found = []
    groups: dict[tuple[str, str], list[int]] = {}
    for k, r in enumerate(faulty):
        if r["defect"] == "foreign" and len(r["text"]) <= 200:
            continue
        groups.setdefault((r["defect"], "all"), []).append(k)
        groups.setdefault((r["defect"], r["lang"] if r["defect"] == "foreign" else r["kind"]), []).append(k)
    for (case, kind), rows in sorted(groups.items()):
        hits = float(dropped[rows].sum())
        found.append({
            "bench": "filters", "case": case, "tool": "assay", "method": method, "metric": "recall",
            "value": hits / len(rows), "ci": wilson(hits, len(rows)), "seconds": seconds, "kind": kind, "at": at,
            "false_drops": false, "documents": len(rows),
        })  # fmt: skip
    return found


def work(task: tuple[tuple[str, ...], list[str]]) -> tuple[float, float, float]:
    """Start and end on the wall clock, and CPU seconds, of one process."""
    names, texts = task
    scorers = [made(name) for name in names]
    for scorer in scorers:
        score(scorer, texts[:BATCH])
    start, cpu = time.time(), time.process_time()
    for scorer in scorers:
        score(scorer, texts)
    return start, time.time(), time.process_time() - cpu


def ours(names: tuple[str, ...], texts: list[str], threads: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    with get_context("spawn").Pool(threads, maxtasksperchild=1) as pool:
        done = pool.map(work, [(names, texts[k::threads]) for k in range(threads)], chunksize=1)
    return max(end for _, end, _ in done) - min(start for start, _, _ in done), sum(cpu for *_, cpu in done)


def asked(python: Path, what: str, texts: list[str], folder: Path, threads: int, *more: str) -> None:
    """Run datatrove's script; what it writes is in `folder`."""
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in texts)
    command = [str(python), str(SCRIPT), what, "documents.jsonl", ".", "--processes", str(threads), *more]
    around = peers.environment(DATATROVE, folder / "cache", 1)
    done = subprocess.run(command, cwd=folder, env=around, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"datatrove ended with {done.returncode}\n{done.stderr[-2000:]}")


def speeds(texts: list[str], quick: bool, python: Path | None, version: str | None, threads: int) -> list[Row]:
    own, theirs = texts[: 8 * BATCH if quick else 16 * BATCH], texts[: 400 if quick else 1000]
    entrants: dict[str, tuple[str, ...]] = {"rules": RULES, **{name: (name,) for name in TIMED}}
    spent: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for _ in range(1 if quick else 3):
        for name, members in entrants.items():
            seconds, cpu = ours(members, own, threads)
            spent.setdefault(("assay", name), []).append((seconds, cpu, len(own)))
            if version and python and name in PEER_TIMED:
                with tempfile.TemporaryDirectory(prefix="assay-rules-") as folder:
                    asked(python, "speed", theirs, Path(folder), threads, "--filters", name)
                    found = json.loads(Path(folder, "speed.json").read_text())[name]
                spent.setdefault((version, name), []).append((found["seconds"], found["cpu"], len(theirs)))
    rows = []
    for (tool, name), turns in spent.items():
        pace = np.array([count / seconds for seconds, _, count in turns])
        made = row("filters", "speed", name, "docs_per_second", pace, sum(s for s, *_ in turns))
        cpu = float(np.median([count / max(cpu, 1e-9) for _, cpu, count in turns]))
        note = {"note": NOTES[name]} if name in NOTES else {}
        rows.append({**made, "tool": tool, "threads": threads, "cpu": cpu, "documents": turns[0][2], **note})
    return rows


def agreements(texts: list[str], python: Path, version: str, threads: int) -> list[Row]:
    """On the same documents: the same verdict, and each statistic within `NEAR` of theirs."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="assay-rules-") as folder:
        asked(python, "statistics", texts, Path(folder), threads)
        with np.load(Path(folder, "statistics.npz")) as file:
            theirs = dict(file)
    seconds, rows = time.perf_counter() - start, []

    def add(method: str, column: str, same: np.ndarray, **more: float) -> None:
        count = len(same)
        rows.append({
            "bench": "filters", "case": "agreement", "tool": version, "method": method, "metric": "agreement",
            "value": float(same.mean()), "ci": wilson(float(same.sum()), count), "seconds": seconds, "column": column,
            "documents": count, **more,
        })  # fmt: skip

    for name in ("gopher", "c4", "fineweb"):
        scorer = made(name)
        values = score(scorer, texts)
        add(name, "verdict", (values[:, 0] == 0) == (theirs[f"passes_{name}"] > 0))
        for at, column in enumerate(scorer.columns(None)):
            known = theirs.get("fineweb_dup" if (name, column) == ("fineweb", "dup_line_chars") else column)
            if known is not None:
                apart = np.abs(values[:, at] - known)
                exact = float((apart < 1e-9).mean())
                add(name, column, apart <= np.maximum(NEAR * np.abs(known), 1e-9), exact=exact)
    return rows


def rows(data: Path, quick: bool, peer: Path | None, threads: int) -> list[Row]:
    """Recall by kind, agreement and speed; without the peers' python `peer` datatrove is left out, and said so."""
    python = peers.interpreter(peer)
    held = peers.version(python, DATATROVE)
    version = f"datatrove {held}" if held else None
    clean, faulty = documents(data, quick)
    found = recalls(data, quick)
    if version:
        some = clean[: 200 if quick else 1000] + [r["text"] for r in faulty][:: 20 if quick else 10]
        found += agreements(some, python, version, threads)
    return found + speeds(clean, quick, python, version, threads)


def table(found: list[Row]) -> Iterator[str]:
    """Lines to read: recall by kind (rows) and method (columns), then the rest."""
    recall = [r for r in found if r["metric"] == "recall"]
    for at in dict.fromkeys(r["at"] for r in recall):
        some = [r for r in recall if r["at"] == at]
        methods = list(dict.fromkeys(r["method"] for r in some))
        yield f"recall, {at}:" + " " * 12 + " ".join(f"{m[:15]:>15}" for m in methods)
        false = {r["method"]: r["false_drops"] for r in some}
        yield f"{'clean text (false drops)':<26}" + " ".join(f"{false[m]:15.4f}" for m in methods)
        for case, kind in dict.fromkeys((r["case"], r["kind"]) for r in some):
            value = {r["method"]: r["value"] for r in some if (r["case"], r["kind"]) == (case, kind)}
            yield f"{case + ' ' + kind:<26}" + " ".join(f"{value[m]:15.3f}" for m in methods)
    for r in found:
        if r["metric"] == "false_drops":
            yield f"language drops of clean text, {r['kind']:<44} {r['value']:.4f}"
        elif r["metric"] == "agreement":
            exact = r.get("exact", r["value"])
            yield f"agreement {r['method']:<12} {r['column']:<20} {r['value']:.4f}  exact {exact:.4f}"
        elif r["metric"] == "docs_per_second":
            yield f"speed {r['method']:<12} {r['tool']:<18} {r['value']:>12,.0f} docs/s  {r['cpu']:>12,.0f} / CPU s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents, one turn")
    parser.add_argument(
        "--data", type=Path, default=DATA, help=f"folder of domains.parquet and defects.parquet ({DATA})"
    )
    parser.add_argument("--peers", type=Path, help="python of the peers' environment (or ASSAY_PEERS)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    chosen = parser.parse_args()
    if not (chosen.data / "defects.parquet").exists():
        sys.exit(f"there is no {chosen.data / 'defects.parquet'}: name the folder with --data, or set ASSAY_DATA")
    found = rows(chosen.data, chosen.quick, chosen.peers, chosen.threads)
    print("\n".join(table(found)))
    written(found, chosen.json)


if __name__ == "__main__":
    main()
