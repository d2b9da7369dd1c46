"""What is expected of the figures: floors, and speed beside the peers. Each is printed, met or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .contest import OURS, Row

# case, method, metric, least value; and where the number comes from
FLOORS = [
    ("R0", "exact", "lds_avg", 0.73), ("R0", "cg", "lds_avg", 0.73), ("R0", "ekfac", "lds_avg", 0.70),
    ("R0", "trak-1", "lds_avg", 0.58), ("R0", "trak-5", "lds_avg", 0.63), ("R0", "graddot", "lds_avg", 0.40),
    ("R1", "cg", "lds_avg", 0.76), ("R1", "trak-10", "lds_avg", 0.62), ("R2", "trak-10", "lds_avg", 0.40),
    ("R2", "trak-self", "auc", 0.97), ("R2", "memorization", "auc", 0.97),
    ("bank-R0", "bank", "speedup_over_loop", 6.0),
]  # fmt: skip
# how many times as fast as the fastest peer of that method
FASTER = [("R0", "cg", 5.0)] + [
    ("R0", method, 1.0) for method in ("exact", "ekfac", "kfac", "trak-1", "trak-5", "graddot")
]
# differences whose interval must lie above zero
ABOVE = [("R3", f"ekfac-minus-{other}") for other in ("graddot", "trackstar", "bm25")]


@dataclass(frozen=True)
class Bar:
    what: str
    found: float
    met: bool


def check(rows: list[Row]) -> Iterator[Bar]:
    """The bars of the cases that were run."""
    own = {(r["case"], r["method"], r["metric"]): r for r in rows if r["tool"] == OURS}
    for case, method, metric, least in FLOORS:
        if row := own.get((case, method, metric)):
            yield Bar(f"{case} {method} {metric} at least {least}", row["value"], row["value"] >= least)
    for case, method, times in FASTER:
        mine = own.get((case, method, "lds_avg"))
        others = [
            r["seconds"] for r in rows
            if r["tool"] != OURS and (r["case"], r["method"], r["metric"]) == (case, method, "lds_avg")
        ]  # fmt: skip
        if mine and others:
            ratio = min(others) / mine["seconds"]
            yield Bar(f"{case} {method} at least {times:g} times as fast as the fastest peer", ratio, ratio >= times)
    for case, method in ABOVE:
        row = own.get((case, method, "difference"))
        if row and row["ci"]:
            yield Bar(f"{case} {method}: low end of the interval above 0", row["ci"][0], row["ci"][0] > 0)


def lines(rows: list[Row]) -> list[str]:
    return [f"{'met ' if bar.met else 'MISS'} {bar.what}: {bar.found:.3f}" for bar in check(rows)]
