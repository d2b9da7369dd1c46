"""What is expected of filters: recall and precision on known defects, pace, pace beside datatrove, flat memory."""

from __future__ import annotations

import math
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
# At 1% false drops on clean text: a bound that drops more has missed, whatever it finds.
FALSE_DROPS = 0.0125
TIMES = 2.0
# What a peer's block is timed beside, and what is not alike in it.
PEERS = ("exact_dup", "minhash", "rules", "gopher", "c4", "fineweb", "language", "fasttext")
UNLIKE = {"language": " (240 characters of each text against its whole documents)", "fasttext": " (the same .bin)"}
SMALL = "fasttext, one number a word"
# Memory for ten times the documents.
GROWTH = 1.25
GROWN = ("exact_dup", "minhash")


def ours(rows: list[Row], case: str, method: str, metric: str, more: dict[str, Any]) -> list[Row]:
    """Our rows of a case whose method has this name, or this name and further words."""
    return [
        r for r in rows
        if r["tool"] == "assay" and r["case"] == case and r["metric"] == metric
        and (r["method"] == method or r["method"].startswith(f"{method} "))
        and all(r.get(k) == v for k, v in more.items())
    ]  # fmt: skip


def unrun(what: str) -> Bar:
    """A bar without a row: neither met nor missed, and told."""
    return Bar(what, math.nan, False)


def check(rows: list[Row]) -> Iterator[Bar]:
    """All bars: those of what was run, and those that have no row."""
    for case, method, metric, more, least in FLOORS:
        found = ours(rows, case, method, metric, more)
        for row in found:
            false = row.get("false_drops")
            what = f"{case} {row['method']} {metric} at least {least:,g}" + _also(case, method)
            what += "" if false is None else f" at {FALSE_DROPS:.2%} false drops or fewer ({false:.2%})"
            yield Bar(what, row["value"], row["value"] >= least and (false is None or false <= FALSE_DROPS))
        if not found:
            yield unrun(f"{case} {method} {metric} at least {least:,g}" + _also(case, method))
    yield _deciles([r for r in rows if r["case"].startswith("near_dup decile")])
    yield from _paces(rows)
    yield from _growth(rows)


def _also(case: str, method: str) -> str:
    return " (240 characters of each text)" if (case, method) == ("speed", "language") else ""


def _deciles(deciles: list[Row]) -> Bar:
    """One pair of a decile may be missing or found beyond 3 sd: where the curve is all but 1, sd is less than that."""
    what = "near_dup deciles of Jaccard whose recall is within max(3 sd, 1 pair) of 1-(1-s^r)^b, all"
    if not deciles:
        return unrun(what)
    within = [r for r in deciles if r["within_3_sd"]]
    by_pair = sum(abs(r["value"] - r["expected"]) > 3 * r["sd"] for r in within)
    return Bar(f"{what} ({by_pair} by the pair alone)", len(within) / len(deciles), len(within) == len(deciles))


def _paces(rows: list[Row]) -> Iterator[Bar]:
    """Each scorer that a peer's block was timed beside, in the same run."""
    timed = [r for r in rows if (r["case"], r["metric"]) == ("speed", "docs_per_second")]
    for name in PEERS:
        what = f"speed {name} at least {TIMES:g} times datatrove's{UNLIKE.get(name, '')}"
        found = _ratio(timed, name, name)
        yield unrun(what) if found is None else Bar(what, found, found >= TIMES)


def _ratio(timed: list[Row], own: str, theirs: str) -> float | None:
    mine = [r["value"] for r in timed if r["tool"] == "assay" and r["method"] == own]
    others = [r["value"] for r in timed if r["tool"].startswith("datatrove") and r["method"] == theirs]
    return mine[0] / max(others) if mine and others else None


def _growth(rows: list[Row]) -> Iterator[Bar]:
    """Peak memory on the larger pool over that on the smaller one."""
    peaks: dict[str, dict[int, float]] = {method: {} for method in GROWN}
    for row in rows:
        size = re.fullmatch(r"memory-(\d+)k", row["case"])
        if size and row["metric"] == "peak_rss_bytes":
            peaks.setdefault(row["method"], {})[int(size[1])] = row["value"]
    for method, found in peaks.items():
        if len(found) > 1:
            least, most = min(found), max(found)
            ratio = found[most] / found[least]
            yield Bar(f"memory {method}, {most}k over {least}k documents at most {GROWTH:g}", ratio, ratio <= GROWTH)
        else:
            yield unrun(f"memory {method}, ten times the documents at most {GROWTH:g}")


def lines(rows: list[Row]) -> list[str]:
    told = [
        f"none {bar.what}: did not run" if math.isnan(bar.found)
        else f"{'met ' if bar.met else 'MISS'} {bar.what}: {bar.found:,.3f}" for bar in check(rows)
    ]  # fmt: skip
    # No bar: what is left of the pace beside the peer where it is given the file that we make of that .bin.
    timed = [r for r in rows if (r["case"], r["metric"]) == ("speed", "docs_per_second")]
    found = _ratio(timed, "fasttext", SMALL)
    told += (
        [] if found is None else [f"also speed fasttext over datatrove's (our .bin, one number a word): {found:,.3f}"]
    )
    return told
