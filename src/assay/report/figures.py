"""The report's figures as plain numbers: positions in percent, SVG paths, ticks with their labels.

Nothing here knows HTML. The template draws what these functions return, so a figure follows the page's colours, is
sharp in print and needs no script. Positions along an axis are percentages, 0 at its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

PALETTE = 8  # colours of domains in the template; further domains share the grey one
OTHER = PALETTE
NUMBER = (int, float)


def number(value: Any, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, thousands separated, a true minus sign.

    >>> number(1234567), number(0.01234), number(-2.5), number(None), number(3.2e-9)
    ('1,234,567', '0.0123', '−2.5', '—', '3.2e−9')
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "—"
    if not finite(value):
        return "not a number" if value != value else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if isinstance(value, int) and size < 1e15:
        text = f"{value:,}"
    elif size != 0 and (size < 1e-4 or size >= 1e9):
        mantissa, exponent = f"{float(value):.{digits - 1}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        decimals = max(0, digits - 1 - (math.floor(math.log10(size)) if size else 0))
        text = f"{value:,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text.replace("-", "−")


def finite(value: Any) -> TypeGuard[float]:
    """Whether the value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def decimals(values: Iterable[Any]) -> int:
    """Decimals, 2 to 5, at which no value other than zero rounds to zero, and a small interval keeps its width.

    >>> decimals([0.21, 0.17, 0.25]), decimals([0.0042, 0.001, 0.007]), decimals([0.0])
    (2, 3, 2)
    """
    sizes = [abs(value) for value in values if finite(value) and value]
    least = min(sizes, default=1.0)
    return min(5, max(2, -math.floor(math.log10(least)))) if least >= 1e-9 else 5


def fixed(value: Any, places: int, sign: bool = False) -> str:
    """A number with that many decimals and a true minus sign.

    >>> fixed(-0.1234, 2), fixed(0.5, 2, sign=True), fixed(None, 2)
    ('−0.12', '+0.50', '—')
    """
    if not finite(value):
        return number(value)
    text = f"{value:{'+' if sign else ''},.{places}f}"
    return f"{0:.{places}f}" if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def ratio_text(share: Any) -> str:
    """A cost relative to one training run: a percentage below one, a multiple above.

    >>> ratio_text(0.31), ratio_text(3.1), ratio_text(0), ratio_text(0.0004)
    ('31%', '3.1×', '0', '0.04%')
    """
    if not finite(share):
        return number(share)
    if share < 0.995:
        return f"{number(100 * share, 2 if share < 0.1 else 3)}%" if share else "0"
    return f"{number(float(share), 2 if share < 10 else 3)}×"


def ratio_fixed(ratio: Any) -> str:
    """
    >>> ratio_fixed(1), ratio_fixed(0.5312), ratio_fixed(12.34)
    ('1.0×', '0.53×', '12×')
    """
    size = abs(ratio) if finite(ratio) else 0
    return f"{fixed(ratio, 2 if size < 0.995 else 1 if size < 9.95 else 0)}×"


def percent(share: Any) -> str:
    return f"{number(100.0 * share, 2)}%" if finite(share) else "—"


def duration(seconds: Any) -> str:
    """
    >>> duration(0.25), duration(75), duration(7260), duration(None)
    ('0.25 s', '1 min 15 s', '2 h 1 min', '—')
    """
    if not finite(seconds):
        return "—"
    if seconds < 60:
        return f"{number(float(seconds), 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def scaled(value: Any, unit: str = "FLOP", base: int = 1000) -> str:
    """
    >>> scaled(3.2e15), scaled(2**30, "B", 1024), scaled(None), scaled(1_234_567, "")
    ('3.2 PFLOP', '1 GiB', '—', '1.23 M')
    """
    if not finite(value):
        return "—"
    names, level = ["", "k", "M", "G", "T", "P", "E", "Z"], 0
    while abs(value) >= 0.9995 * base and level < len(names) - 1:
        value, level = value / base, level + 1
    prefix = names[level].upper() + "i" if base == 1024 and level else names[level]
    return f"{number(float(value))} {prefix}{unit}".rstrip()


@dataclass(frozen=True)
class Axis:
    """A scale from `lo` to `hi`, by ratio where `log`, with round ticks.

    >>> Axis(0, 10).at(2.5), [tick["label"] for tick in Axis(8, 1200, log=True).ticks()]
    (25.0, ['10', '100', '1,000'])
    """

    lo: float
    hi: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value falls, in percent; what lies beyond is drawn at the edge."""
        scale: Callable[[float], float] = math.log if self.log else float
        span = scale(self.hi) - scale(self.lo)
        share = (scale(max(value, self.lo)) - scale(self.lo)) / span if span else 0.5
        return round(100 * min(max(share, 0.0), 1.0), 3)

    def ticks(self, about: int = 5) -> list[dict[str, Any]]:
        values = self._by_ratio() if self.log else []
        if len(values) < 2:
            values = _round_values(self.lo, self.hi, about)
        return [{"at": self.at(value), "label": number(value), "value": value} for value in values]

    def _by_ratio(self) -> list[float]:
        first, last = math.ceil(math.log10(self.lo) - 1e-9), math.floor(math.log10(self.hi) + 1e-9)
        tens = [float(10**power) for power in range(first, last + 1)]
        if len(tens) >= 3:
            return tens[:: max(1, len(tens) // 6)]
        steps = [m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 3)]
        return [step for step in steps if self.lo <= step <= self.hi]


def _round_values(lo: float, hi: float, about: int) -> list[float]:
    if not hi > lo:
        return [lo]
    rough = (hi - lo) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(lo / step - 1e-9)
    return [(first + i) * step for i in range(math.floor(hi / step + 1e-9) - first + 1)]


def span(values: Iterable[float], pad: float = 0.05) -> tuple[float, float]:
    """Least and greatest of the finite values, with a margin; never empty."""
    known = [float(value) for value in values if finite(value)]
    lo, hi = (min(known), max(known)) if known else (0.0, 1.0)
    margin = (hi - lo) * pad or abs(hi) * 0.1 or 1.0
    return lo - margin, hi + margin


# ---------------------------------------------------------------------------------------------------- forest


def place(arm: dict) -> tuple[bool, float, str]:
    """Sorts arms: the greatest gain first, the baselines last and by name."""
    gain = arm.get("gain_over_random")
    baseline = arm["verdict"] == "baseline"
    return baseline, -gain if finite(gain) and not baseline else math.inf, arm["name"] if baseline else ""


def forest(arms: Sequence[dict], null: dict | None) -> dict[str, Any] | None:
    """Gain over random with its interval, best first; the baselines last, and the band of random against random."""
    measured = [arm for arm in arms if finite(arm.get("gain_over_random"))]
    if not any(arm["verdict"] != "baseline" for arm in measured):
        return None
    measured.sort(key=place)
    null_ci = _interval(null or {})
    values = [0.0, *(null_ci or ())]
    for arm in measured:
        values += [arm["gain_over_random"], *(_interval(arm) or ())]
    axis = Axis(*span(values, 0.06))
    seeds = paired_gains(arms)
    rows = []
    for arm in measured:
        ci = _interval(arm)
        ends = [axis.at(end) for end in ci] if ci else None
        dots = [axis.at(gain) for gain in seeds.get(arm["name"], [])]
        rows.append({"arm": arm, "at": axis.at(arm["gain_over_random"]), "ci": ends, "seeds": dots})
    band = {"at": axis.at(null_ci[0]), "width": axis.at(null_ci[1]) - axis.at(null_ci[0])} if null_ci else None
    return {"rows": rows, "zero": axis.at(0.0), "band": band, "ticks": axis.ticks(5), "seeds": bool(seeds)}


def _interval(item: dict) -> tuple[float, float] | None:
    ci = item.get("ci")
    return (float(ci[0]), float(ci[1])) if ci and len(ci) == 2 and all(map(finite, ci)) else None


def paired_gains(arms: Sequence[dict]) -> dict[str, list[float]]:
    """Gain of each arm seed by seed: mean loss of the random arms minus the arm's, with the same seed.

    Given only where the mean over seeds is the stated gain, so that the dots never tell another story.
    """
    baselines = [arm["by_seed"] for arm in arms if arm["verdict"] == "baseline" and arm["name"].startswith("random")]
    if not baselines or not all(len(run) == len(baselines[0]) and all(map(finite, run)) for run in baselines):
        return {}
    random = [sum(losses) / len(losses) for losses in zip(*baselines, strict=True)]
    gains = {}
    for arm in arms:
        if arm["verdict"] == "baseline" or len(arm["by_seed"]) != len(random) or not all(map(finite, arm["by_seed"])):
            continue
        by_seed = [ours - theirs for ours, theirs in zip(random, arm["by_seed"], strict=True)]
        stated, spread = arm.get("gain_over_random"), max(by_seed, default=0) - min(by_seed, default=0)
        if len(by_seed) > 1 and finite(stated) and abs(sum(by_seed) / len(by_seed) - stated) <= 0.02 * spread + 1e-9:
            gains[arm["name"]] = by_seed
    return gains


# ------------------------------------------------------------------------------------------------ composition


@dataclass(frozen=True)
class Domains:
    """The domains in the pool's order of size; the largest get a colour, the rest are drawn together."""

    names: list[str]

    @classmethod
    def of(cls, result: dict) -> Domains:
        sizes = {name: entry.get("rows", 0) for name, entry in (result["pool"].get("domains") or {}).items()}
        for arm in result["arms"]:
            for name in arm.get("domains") or {}:
                sizes.setdefault(name, 0)
        for entry in (result.get("scores") or {}).values():
            for name in [*(entry.get("domains") or {}), *((entry.get("scatter") or {}).get("domain") or [])]:
                sizes.setdefault(str(name), 0)
        return cls(sorted(sizes, key=lambda name: -sizes[name]))

    def colour(self, name: str) -> int:
        index = self.names.index(name) if name in self.names else OTHER
        return index if index < PALETTE or len(self.names) <= PALETTE else OTHER

    def legend(self) -> list[dict[str, Any]]:
        rows = [{"name": name, "colour": index} for index, name in enumerate(self.names[:PALETTE])]
        rest = len(self.names) - PALETTE
        return rows + ([{"name": f"{rest} smaller domains", "colour": OTHER}] if rest > 0 else [])


def composition(result: dict, domains: Domains) -> dict[str, Any] | None:
    """What the pool holds and what each arm selected, by domain: stacked bars, and the shares with their ratio."""
    pool = {name: entry.get("rows", 0) for name, entry in (result["pool"].get("domains") or {}).items()}
    chosen = [(arm["name"], arm.get("domains") or {}) for arm in result["arms"]]
    rows = [("pool", pool), *((name, counts) for name, counts in chosen if sum(counts.values()))]
    total = sum(pool.values())
    if not total or len(rows) < 2 or len(domains.names) < 2:
        return None
    bars = []
    for name, counts in rows:
        size, parts = sum(counts.values()), [0] * (PALETTE + 1)
        for domain, count in counts.items():
            parts[domains.colour(domain)] += count
        segments = [{"colour": i, "width": round(100 * part / size, 3)} for i, part in enumerate(parts) if part]
        cells = []
        for domain in domains.names:
            share, base = counts.get(domain, 0) / size, pool.get(domain, 0) / total
            cells.append({"share": share, "ratio": share / base if base else None})
        bars.append({"name": name, "rows": size, "segments": segments, "cells": cells, "pool": name == "pool"})
    return {"bars": bars}


def tint(ratio: Any) -> float:
    """Strength of a heat map's cell for a ratio to the pool, -1 (absent) to 1 (four times or more); 0 at parity.

    >>> tint(1), tint(4), tint(0.5), tint(0), tint(None)
    (0.0, 1.0, -0.5, -1.0, 0.0)
    """
    if not isinstance(ratio, (int, float)) or ratio != ratio:
        return 0.0
    if ratio <= 0:
        return -1.0
    return round(max(-1.0, min(1.0, math.log2(min(ratio, 1e9)) / 2)), 3)


# -------------------------------------------------------------------------------------------------- histograms


def histograms(entry: dict, domains: Domains, limit: int = 12) -> dict[str, Any] | None:
    """Score histograms of one arm, a row per domain on one axis, each scaled to its own peak."""
    known = entry.get("domains") or {}
    usable = {name: known[name] for name in domains.names if name in known and _is_histogram(known[name])}
    bins = [
        (edges[i], edges[i + 1], count)
        for edges, counts in ((item["edges"], item["counts"]) for item in usable.values())
        for i, count in enumerate(counts)
        if count > 0
    ]
    if not bins:
        return None
    (lo, hi), outside = _body(bins)
    axis = Axis(lo, hi)
    rows = []
    for name, item in list(usable.items())[:limit]:
        middle = median(item["edges"], item["counts"])
        rows.append(
            {
                "name": name,
                "colour": domains.colour(name),
                "path": _steps(item["edges"], item["counts"], axis),
                "rows": sum(item["counts"]),
                "median": axis.at(middle),
                "median_value": middle,
            }
        )
    zero = axis.at(0.0) if lo < 0 < hi else None
    return {
        "rows": rows,
        "ticks": axis.ticks(5),
        "zero": zero,
        "outside": outside,
        "hidden": len(usable) - len(rows),
    }


def _is_histogram(item: dict) -> bool:
    edges, counts = item.get("edges") or [], item.get("counts") or []
    return len(edges) == len(counts) + 1 and all(map(finite, [*edges, *counts])) and sum(counts) > 0


def _body(bins: list[tuple[float, float, float]], tail: float = 0.002) -> tuple[tuple[float, float], int]:
    """The range to draw: all of it, or without the outermost 0.2 % at each end where they take most of the width."""
    full = min(left for left, _, _ in bins), max(right for _, right, _ in bins)
    total = sum(count for *_, count in bins)
    seen, lo = 0.0, full[0]
    for left, _, count in sorted(bins):
        seen, lo = seen + count, left
        if seen > tail * total:
            break
    seen, hi = 0.0, full[1]
    for _, right, count in sorted(bins, key=lambda item: -item[1]):
        seen, hi = seen + count, right
        if seen > tail * total:
            break
    if not 0 < hi - lo < 0.6 * (full[1] - full[0]):
        return (full if full[1] > full[0] else span(full)), 0
    outside = sum(count for left, right, count in bins if right <= lo or left >= hi)
    return (lo, hi), int(outside)


def _steps(edges: Sequence[float], counts: Sequence[float], axis: Axis) -> str:
    """Outline of a histogram in a box of 1000 by 100, its floor at y = 100."""
    peak, parts = max(counts), [f"M{axis.at(edges[0]) * 10:.0f} 100"]
    for i, count in enumerate(counts):
        if edges[i + 1] > axis.lo and edges[i] < axis.hi:
            parts.append(
                f"H{axis.at(edges[i]) * 10:.0f}V{100 - 92 * count / peak:.1f}H{axis.at(edges[i + 1]) * 10:.0f}"
            )
    return "".join(parts) + "V100Z"


def median(edges: Sequence[float], counts: Sequence[float]) -> float:
    """Median of a histogram, the counts spread evenly within their bins.

    >>> median([0, 1, 2], [1, 1])
    1.0
    """
    half, seen = sum(counts) / 2, 0.0
    for i, count in enumerate(counts):
        if count and seen + count >= half:
            return float(edges[i] + (half - seen) / count * (edges[i + 1] - edges[i]))
        seen += count
    return float(edges[-1])


# --------------------------------------------------------------------------------------------------- scatters


def every(count: int, keep: int) -> list[int]:
    """At most `keep` of `range(count)`, evenly spaced.

    >>> every(3, 5), every(10, 4)
    ([0, 1, 2], [0, 2, 5, 7])
    """
    return list(range(count)) if count <= keep else [i * count // keep for i in range(keep)]


def scatters(entry: dict, domains: Domains, keep: int) -> dict[str, Any] | None:
    """Score against length and against loss: points of at most `keep` examples, and what they show on hover."""
    raw = entry.get("scatter") or {}
    score, label = raw.get("score") or [], raw.get("domain") or []
    known = [i for i in range(len(score)) if finite(score[i])]
    rows = [known[i] for i in every(len(known), keep)]
    if not rows:
        return None
    colours = [domains.colour(str(label[i])) if i < len(label) else OTHER for i in rows]
    y_axis = Axis(*robust([score[i] for i in rows]))
    ys = [round(1000 - 10 * y_axis.at(score[i])) for i in rows]
    plots = []
    for key, title in (("length", "length"), ("loss", "loss")):
        values = raw.get(key) or []
        if len(values) != len(score) or not any(finite(values[i]) for i in rows):
            continue
        drawn = [values[i] for i in rows if finite(values[i])]
        axis = _x_axis(drawn)
        xs = [round(10 * axis.at(values[i])) if finite(values[i]) else None for i in rows]
        beyond = sum(not (axis.lo <= values[i] <= axis.hi) for i in rows if finite(values[i]))
        plots.append(
            {
                "key": key,
                "title": title,
                "log": axis.log,
                "x_ticks": axis.ticks(4),
                "y_ticks": y_axis.ticks(5),
                "zero": y_axis.at(0.0) if y_axis.lo < 0 < y_axis.hi else None,
                "paths": _dots(xs, ys, colours),
                "xs": xs,
                "beyond": beyond + sum(not (y_axis.lo <= score[i] <= y_axis.hi) for i in rows),
                "spearman": entry.get(f"spearman_{key}"),
            }
        )
    return {"plots": plots, "ys": ys, "rows": rows, "total": len(score)} if plots else None


def robust(values: Sequence[float]) -> tuple[float, float]:
    """The range to draw: all values, unless the outermost 0.5 % at each end would take most of the axis."""
    ordered = sorted(values)
    lo, hi = ordered[int(0.005 * (len(ordered) - 1))], ordered[math.ceil(0.995 * (len(ordered) - 1))]
    full = ordered[-1] - ordered[0]
    margin = 0.25 * (hi - lo)
    return (lo - margin, hi + margin) if 0 < 3 * (hi - lo) < full else span(ordered)


def _x_axis(values: Sequence[float]) -> Axis:
    lo, hi = min(values), max(values)
    if lo > 0 and hi / lo > 30:
        return Axis(lo / 1.15, hi * 1.15, log=True)
    return Axis(*robust(values))


def _dots(xs: Sequence[int | None], ys: Sequence[int], colours: Sequence[int], chunk: int = 24) -> list[dict[str, Any]]:
    """Dots as zero-length strokes, a few dozen to a path, the colours taking turns so that none covers the others."""
    piles: dict[int, list[str]] = {}
    for x, y, colour in zip(xs, ys, colours, strict=True):
        if x is not None:
            piles.setdefault(colour, []).append(f"M{x} {y}h.01")
    chunks = [
        (start, colour, "".join(pile[start : start + chunk]))
        for colour, pile in piles.items()
        for start in range(0, len(pile), chunk)
    ]
    return [{"colour": colour, "path": path} for _, colour, path in sorted(chunks)]


# ----------------------------------------------------------------------------------------------------- ledger


def ledger(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """The compute ledger with a bar per stage, each its share of the time of all."""
    walls = [row["wall"] if finite(row.get("wall")) else 0.0 for row in rows]
    longest, total = max(walls, default=0.0) or 1.0, sum(walls) or 1.0
    return [
        {**row, "width": round(100 * wall / longest, 2), "share": wall / total}
        for row, wall in zip(rows, walls, strict=True)
    ]
