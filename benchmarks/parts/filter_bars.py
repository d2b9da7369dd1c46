"""What is expected of filters: recall and precision on known defects, pace, pace beside datatrove, flat memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .bars import Bar

Row = dict[str, Any]
# case, start of the method's name, metric, what else the row must say, least value
FLOORS: list[tuple[str, str, str, dict[str, Any], float]] = [
    ("exact_dup", "exact_dup", "recall", {}, 1.0), ("exact_dup", "exact_dup", "precision", {}, 1.0),
    ("near_dup", "minhash verify", "precision", {}, 0.99),
    ("foreign", "language", "recall", {"kind": "all", "at": "score"}, 0.98),
    ("leak", "gate verbatim", "recall", {}, 1.0), ("leak", "gate embedded", "recall", {}, 1.0),
    ("speed", "exact_dup", "docs_per_second", {}, 100_000), ("speed", "minhash", "docs_per_second", {}, 8_000),
    ("speed", "rules", "docs_per_second", {}, 10_000), ("speed", "language", "docs_per_second", {}, 20_000),
    ("speed", "fasttext", "docs_per_second", {}, 20_000),
]  # fmt: skip
# At 1% false drops on clean text: a bound that drops more is not this bar's.
FALSE_DROPS = 0.0125
TIMES = 2.0
# Memory for ten times the documents.
GROWTH = 1.25


def ours(rows: list[Row], case: str, method: str, metric: str, more: dict[str, Any]) -> list[Row]:
    """Our rows of a case whose method has this name, or this name and further words."""
    return [
        r for r in rows
        if r["tool"] == "assay" and r["case"] == case and r["metric"] == metric
        and (r["method"] == method or r["method"].startswith(f"{method} "))
        and all(r.get(k) == v for k, v in more.items()) and r.get("false_drops", 0.0) <= FALSE_DROPS
    ]  # fmt: skip


def check(rows: list[Row]) -> Iterator[Bar]:
    """The bars of what was run."""
    for case, method, metric, more, least in FLOORS:
        for row in ours(rows, case, method, metric, more):
            yield Bar(f"{case} {row['method']} {metric} at least {least:,g}", row["value"], row["value"] >= least)
    deciles = [r for r in rows if r["case"].startswith("near_dup decile")]
    if deciles:
        within = sum(bool(r["within_3_sd"]) for r in deciles)
        what = "near_dup deciles of Jaccard whose recall is within 3 sd of 1-(1-s^r)^b, all"
        yield Bar(what, within / len(deciles), within == len(deciles))
    yield from _paces(rows)
    yield from _growth(rows)


def _paces(rows: list[Row]) -> Iterator[Bar]:
    """Each scorer that a peer's block was timed beside, in the same run."""
    timed = [r for r in rows if (r["case"], r["metric"]) == ("speed", "docs_per_second")]
    for row in (r for r in timed if r["tool"] == "assay"):
        others = [r["value"] for r in timed if r["tool"].startswith("datatrove") and r["method"] == row["method"]]
        if others:
            ratio = row["value"] / max(others)
            yield Bar(f"speed {row['method']} at least {TIMES:g} times datatrove's", ratio, ratio >= TIMES)


def _growth(rows: list[Row]) -> Iterator[Bar]:
    """Peak memory on the larger pool over that on the smaller one."""
    peaks: dict[str, dict[int, float]] = {}
    for row in rows:
        size = re.fullmatch(r"memory-(\d+)k", row["case"])
        if size and row["metric"] == "peak_rss_bytes":
            peaks.setdefault(row["method"], {})[int(size[1])] = row["value"]
    for method, found in peaks.items():
        if len(found) > 1:
            least, most = min(found), max(found)
            ratio = found[most] / found[least]
            yield Bar(f"memory {method}, {most}k over {least}k documents at most {GROWTH:g}", ratio, ratio <= GROWTH)


def lines(rows: list[Row]) -> list[str]:
    return [f"{'met ' if bar.met else 'MISS'} {bar.what}: {bar.found:,.3f}" for bar in check(rows)]
