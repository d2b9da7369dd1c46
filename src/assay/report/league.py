"""The league's page: all records of a folder as tables in README.md, and one figure, league.svg."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from assay.core.keys import write_text
from assay.report.figures import fixed
from assay.summary import LOT

COLOURS = {"better": "#0b7a53", "worse": "#b3372f", "unresolved": "#8a6d00", "oracle": "#1d4ed8", "zero": "#9ca3af"}
NAME, COLUMN, GAP, ROW, TOP, BOTTOM = 140, 190, 18, 19, 108, 16
HEAD = """# League

<!-- Written by `assay league` from the records beside it: run it again, do not edit. -->

Every method meets the same pool, target, budget, trainer and seeds ([how](../docs/league.md)); each arm of a table is
a fresh model for each seed, trained on what the method chose, and judged on target documents that no method saw.
**Gain** is what the method takes off the judged loss of random selections (nats per token, paired by seed), with an
interval over random draws, seeds and judged documents; its level stands above each table. **Together**: the interval
that is to hold for all contestants of the table at once (minP), for among many one is lucky; its verdict is the one to
quote. It errs on the narrow side: in simulations at a nominal 95% all of 12 such intervals held in 93.5% of the trials,
and those of differences in 91.5%. **Best**: `=` marks those whose gain cannot be told from the largest one's, by such
intervals. **Own**: share of the chosen tokens that are sound documents of the target's domains. **Cost**: operations of
scoring models, in trainings of one arm; 0 where none is run, so work on words, hashes and the training of a classifier
of words (`fasttext`) are not in it. The *oracle* reads the truth of the pool and is no method. †: more than half of the
selection fell by lot, in a draw from what a filter leaves or among equal scores; the luck of that draw is in the
intervals.
"""


def build_league(folder: Path) -> Path:
    """Write the page and the figure of all records in a folder; returns the page."""
    records = list(_records(folder))
    parts = [HEAD, "![Gain over random selection, by method and table](league.svg)", ""]
    for record in records:
        parts += _track(record, folder)
    write_text(folder / "league.svg", draw(records))
    write_text(folder / "README.md", "\n".join(parts).rstrip() + "\n")
    return folder / "README.md"


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of tracks among the JSON files of a folder; others are passed over."""
    for path in sorted(folder.glob("*.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(held, dict) and isinstance(held.get("track"), dict) and isinstance(held.get("tables"), dict):
            yield held


def _track(record: dict[str, Any], folder: Path) -> list[str]:
    track = record["track"]
    parts = [f"## {_plain(track['name'])}", "", f"{_plain(track['about'])}.", ""]
    for name, table in record["tables"].items():
        parts += [f"### {_plain(track['name'])}: {_plain(name)}", "", facts(table), "", *rows(table), ""]
    reading = folder / Path(f"{track['name']}.md").name
    if reading.exists():
        parts += [reading.read_text(encoding="utf-8").strip(), ""]
    return parts


def facts(table: dict[str, Any]) -> str:
    """What all arms of a table had in common, and whether random beats random, in one paragraph."""
    pool, budget, training, target = (table[k] for k in ("pool", "budget", "training", "target"))
    null = (table["nulls"] or {}).get("random_vs_random")
    said = (
        f"Pool {pool['rows']:,} documents, {pool['tokens']:,} tokens; budget {budget['amount']:,} {budget['unit']}"
        f" ({budget['share']:.0%}); {training['parameters']:,} weights, {training['steps']} steps of training"
        f" ({training['repeats']:.2g} times through a selection), {len(training['seeds'])} paired seeds, "
        f"{len(table['random'])} random draws; target {_plain(target['name'])}: {target['selecting']} documents select,"
        f" {target['judged']} judge. {table['family']['size']} contestants; a single interval is at"
        f" {table['level']:.0%}"
    )
    share = table["family"]["share"]
    said += "." if share is None else f", those that hold together at {1 - share:.2%}."
    if null:
        said += f" Random against random: {_gain(null['gain'], null['ci'])}, {null['verdict']}."
    return said


def rows(table: dict[str, Any]) -> Iterator[str]:
    """The table, the largest gain first; random selection stands where it belongs, at zero."""
    damaged = any(row["damaged"] for row in table["entries"])
    own = list(table["entries"][0]["own"]) if table["entries"] else []
    head = ["method", "judged loss", "gain over random", "verdict", "together", "verdict", "best"]
    head += [f"own: {_plain(domain)}" for domain in own] + (["shuffled"] if damaged else []) + ["cost"]
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * 2 + "---|---:|---|:-:|" + "---:|" * (len(own) + damaged + 1)
    for row in ordered(table):
        yield "| " + " | ".join(_cells(table, row, own, damaged)) + " |"


def ordered(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries and one row for all random draws, by falling gain."""
    draws = table["random"]
    mean = lambda key: sum(r[key] for r in draws) / len(draws)  # noqa: E731
    zero = {
        "name": f"random (mean of {len(draws)})", "gain": 0.0, "ci": None, "oracle": False, "cost": 0.0,
        "judged_loss": mean("judged_loss"), "damaged": mean("damaged"), "of_budget": mean("of_budget"),
        "own": {d: sum(r["own"][d] for r in draws) / len(draws) for d in (draws[0]["own"] if draws else ())},
    }  # fmt: skip
    return sorted([*table["entries"], zero], key=lambda row: (-row["gain"], row["name"]))


def _cells(table: dict[str, Any], row: dict[str, Any], own: list[str], damaged: bool) -> list[str]:
    family, name = table["family"], _plain(row["name"])
    together = family["entries"].get(row["name"])
    mark = "**=**" if row["name"] == family["best"] else "=" if row["name"] in family["tied"] else ""
    shown = f"*{name}*" if row["oracle"] else name
    shown += " †" if row.get("by_lot", 0) > LOT else ""
    if row["of_budget"] < 0.98:
        shown += f" ({row['of_budget']:.0%} of the budget)"
    gain = "0" if row["ci"] is None else _gain(row["gain"], row["ci"])
    cells = [shown, f"{row['judged_loss']:.3f}", gain, row.get("verdict") or ""]
    cells += [_interval(together["ci"]), together["verdict"]] if together else ["", ""]
    cells += [mark, *(f"{row['own'][domain]:.0%}" for domain in own)]
    return [*cells, *([f"{row['damaged']:.0%}"] if damaged else []), f"{row['cost']:.2g}"]


def _gain(gain: float, ci: list[float]) -> str:
    return f"{fixed(gain, 3, sign=True)} {_interval(ci)}"


def _interval(ci: list[float]) -> str:
    return f"[{fixed(ci[0], 3)}, {fixed(ci[1], 3)}]"


def _plain(text: str) -> str:
    """Words of a file, with nothing that Markdown would read."""
    kept = re.sub(r"([\\\[\]!_*|~#])", r"\\\1", " ".join(str(text).replace("`", "'").split()))
    # Links that need no brackets.
    return escape(kept).replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def draw(records: list[dict[str, Any]]) -> str:
    """A row for each method and a column for each table: gain, its interval, and thin the one that holds together."""
    tables = [(record["track"]["name"], name, t) for record in records for name, t in record["tables"].items()]
    names = _ranked([table for _, _, table in tables])
    width = max(NAME + len(tables) * (COLUMN + GAP) + 10, 780)
    height = TOP + ROW * len(names) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif"'
        ' font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="24" font-size="16" font-weight="600">Gain over random selection</text>',
        '<text x="12" y="44" fill="#4b5563">Nats per token taken off the judged loss; thick: its interval, thin: the'
        " one that holds for all contestants together.</text>",
        '<text x="12" y="60" fill="#4b5563">Green better, red worse, amber unresolved (together); blue the oracle; the'
        " large dot has the largest gain.</text>",
    ]
    for place, name in enumerate(names):
        y = TOP + ROW * place
        if place % 2 == 0:
            parts.append(f'<rect x="0" y="{y}" width="{width}" height="{ROW}" fill="#f6f7f9"/>')
        parts.append(f'<text x="{NAME - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
    for place, (track, name, table) in enumerate(tables):
        title = track if track == name else f"{track}: {name}"
        parts += _column(table, names, title, NAME + place * (COLUMN + GAP))
    return "\n".join([*parts, "</svg>", ""])


def _ranked(tables: list[dict[str, Any]]) -> list[str]:
    """Methods by their mean place in the tables they are in, from 0 (first) to 1."""
    places: dict[str, list[float]] = {}
    for table in tables:
        entries = sorted(table["entries"], key=lambda row: -row["gain"])
        for place, row in enumerate(entries):
            places.setdefault(row["name"], []).append(place / max(1, len(entries) - 1))
    return sorted(places, key=lambda name: (sum(places[name]) / len(places[name]), name))


def _column(table: dict[str, Any], names: list[str], title: str, left: float) -> list[str]:
    """One table's column. What is far below all others is cut at the edge, with its number."""
    entries = {row["name"]: row for row in table["entries"]}
    top = max([0.05, *(row["ci"][1] for row in entries.values())])
    low = max(min([-0.05, *(row["ci"][0] for row in entries.values())]), -0.7 * top)

    def x(value: float) -> float:
        return left + COLUMN * (min(max(value, low), top) - low) / (top - low)

    bottom = TOP + ROW * len(names)
    middle = f'x="{left + COLUMN / 2:.1f}" y="{TOP - 24}" text-anchor="middle"'
    parts = [f'<text {middle} font-weight="600">{escape(title)}</text>']
    step = next((s for s in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if (top - low) / s <= 5), 5.0)
    for k in range(int(low / step), int(top / step) + 1):
        at, dash = x(k * step), "" if k == 0 else ' stroke-dasharray="2 3"'
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}" stroke="{COLOURS["zero"]}"{dash}/>'
            f'<text x="{at:.1f}" y="{TOP - 8}" text-anchor="middle" fill="#4b5563" font-size="11">'
            f"{fixed(k * step, 2)}</text>"
        )
    for place, name in enumerate(names):
        if name in entries:
            parts += _point(table, entries[name], TOP + ROW * place + ROW / 2, x, low, left)
    return parts


def _point(table: dict[str, Any], row: dict[str, Any], y: float, x: Any, low: float, left: float) -> list[str]:
    together = table["family"]["entries"].get(row["name"])
    colour = COLOURS["oracle"] if together is None else COLOURS[together["verdict"]]
    if row["gain"] < low:
        return [f'<text x="{left}" y="{y + 4:.1f}" fill="{colour}" font-size="11">◂ {fixed(row["gain"], 2)}</text>']
    parts = []
    for ci, wide in ((together["ci"] if together else None, 1), (row["ci"], 3)):
        if ci:
            parts.append(
                f'<line x1="{x(ci[0]):.1f}" x2="{x(ci[1]):.1f}" y1="{y}" y2="{y}" stroke="{colour}"'
                f' stroke-width="{wide}"/>'
            )
    radius = 5 if row["name"] == table["family"]["best"] else 3.5
    return [*parts, f'<circle cx="{x(row["gain"]):.1f}" cy="{y}" r="{radius}" fill="{colour}"/>']
