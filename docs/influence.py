"""Writes the tables of docs/influence.md and draws docs/influence.svg from the benchmark's result.

    python docs/influence.py [RESULT.json ...]

Each is what `benchmarks/influence.py --json` wrote, of some cases; docs/influence.json keeps the last of every case.
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
BEGIN, END = "<!-- figures of {case}: written by docs/influence.py -->", "<!-- end of {case} -->"
CASES = {"R0": "lds_avg", "R1": "lds_avg", "R2": "lds_avg", "R3": "lds_avg", "mislabels": "auc"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 600, 62, 210, 76, 44
COLOURS = {"assay": "#0b7a53", "dattri": "#b3372f", "kronfluence": "#1d4ed8", "bergson": "#8a6d00"}
NULLS = {"random", "loss", "nearest", "bm25"}

Row = dict[str, Any]


def of(rows: list[Row], case: str) -> list[Row]:
    metric = CASES[case]
    own = "R2" if case == "mislabels" else case
    return [r for r in rows if r["case"] == own and r["metric"] == metric and r["method"] != "ceiling"]


def table(rows: list[Row], case: str) -> str:
    """One line a contestant, the best first; both LDS where there are both."""
    fixed = {(r["tool"], r["method"]): r for r in rows if r["case"] == case and r["metric"] == "lds_fixed"}
    head = ["method", "tool", "AUC" if case == "mislabels" else "LDS, mean of seeds"]
    head += ["LDS, one seed"] if fixed else []
    lines = ["| " + " | ".join([*head, "seconds", "options chosen"]) + " |", "|" + "---|" * (len(head) + 2)]
    for r in sorted(of(rows, case), key=lambda r: -r["value"]):
        name = f"**{r['method']}**" if r["tool"] == "assay" else r["method"]
        cells = [name, r["tool"], figure(r)]
        cells += [figure(fixed[r["tool"], r["method"]])] if fixed else []
        lines.append("| " + " | ".join([*cells, f"{r['seconds']:.2f}", chosen(r["options"])]) + " |")
    most = [r for r in rows if (r["case"], r["method"]) == (case, "ceiling")]
    said = "; ".join(f"{r['metric']} {r['value']:.3f}" for r in most)
    return "\n".join([*lines, *(["", f"What noise of seeds lets perfect scores reach: {said}."] if most else [])])


def figure(row: Row) -> str:
    low, high = row["ci"]
    return f"{row['value']:.3f} [{low:.3f}, {high:.3f}]"


def chosen(options: Row) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items())


def draw(rows: list[Row], case: str) -> str:
    """LDS against seconds. The points of a method are joined, and named at ours; nulls are left out."""
    held = [r for r in of(rows, case) if r["method"] not in NULLS]
    seconds = [math.log10(max(r["seconds"], 1e-3)) for r in held]
    low, high = math.floor(min(seconds)), math.ceil(max(seconds))
    bottom = min(0.3, min(r["value"] for r in held) - 0.03)
    top = max(r["value"] for r in held) + 0.04

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(max(value, 1e-3)) - low) / (high - low)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - value) / (top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="600">How well scores foretell retraining, and what they cost ({case})</text>',
        '<text x="16" y="46" fill="#4b5563">LDS on reported targets against seconds of the chosen option; same models, same retrainings</text>',
        *_axes(low, high, bottom, top, x, y),
    ]
    by_method: dict[str, list[Row]] = {}
    for r in sorted(held, key=lambda r: r["tool"] != "assay"):
        by_method.setdefault(r["method"], []).append(r)
    for pair in by_method.values():
        for other in pair[1:]:
            parts.append(
                f'<line x1="{x(pair[0]["seconds"]):.1f}" y1="{y(pair[0]["value"]):.1f}" x2="{x(other["seconds"]):.1f}"'
                f' y2="{y(other["value"]):.1f}" stroke="#d1d5db"/>'
            )
    for r in held:
        colour = COLOURS[r["tool"].split()[0]]
        parts.append(f'<circle cx="{x(r["seconds"]):.1f}" cy="{y(r["value"]):.1f}" r="4.5" fill="{colour}"/>')
    parts += _labels([(x(r["seconds"]), y(r["value"]), r) for r in (pair[0] for pair in by_method.values())])
    for place, (tool, colour) in enumerate(COLOURS.items()):
        if any(r["tool"].startswith(tool) for r in held):
            parts.append(f'<circle cx="{LEFT + 14 + 130 * place}" cy="{TOP - 8}" r="4.5" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + 24 + 130 * place}" y="{TOP - 4}">{escape(tool)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes(low: int, high: int, bottom: float, top: float, x: Any, y: Any) -> list[str]:
    parts = []
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP + 6}" y2="{HEIGHT - BOTTOM}" stroke="#e5e7eb"/>'
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#4b5563">{10.0**power:g} s</text>'
        )
    for tenth in range(math.ceil(bottom * 10), math.floor(top * 10) + 1):
        at = y(tenth / 10)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e5e7eb"/>'
            f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="#4b5563">{tenth / 10:.1f}</text>'
        )
    return parts


def _labels(points: list[tuple[float, float, Row]]) -> list[str]:
    """Names in a column at the right, in the order of their points, a thin line to each."""
    ordered = sorted(points, key=lambda p: p[1])
    step, edge = min(17.0, (HEIGHT - TOP - BOTTOM) / max(len(ordered), 1)), WIDTH - RIGHT + 26
    parts, at = [], TOP + 4.0
    for place, (x, y, r) in enumerate(ordered):
        at = max(at, min(y, HEIGHT - BOTTOM - step * (len(ordered) - 1 - place)))
        colour = COLOURS[r["tool"].split()[0]]
        parts.append(
            f'<line x1="{x + 6:.1f}" y1="{y:.1f}" x2="{edge - 4}" y2="{at:.1f}" stroke="{colour}" stroke-opacity=".25"/>'
            f'<text x="{edge}" y="{at + 4:.1f}" font-size="12" fill="{colour}">{escape(r["method"])}</text>'
        )
        at += step
    return parts


def replaced(text: str, begin: str, end: str, table: str) -> str:
    """A page with `table` between its marks."""
    before, rest = text.split(begin)
    return before + begin + "\n" + table + "\n" + end + rest.split(end)[1]


def gathered(kept: Path) -> list[Row]:
    """The rows of `kept` and of the files that the command line names, written to `kept`. A file's case takes the place
    of what was there of it: figures of one table are of one run, so give one that has the peers."""
    by_case: dict[str, list[Row]] = {}
    for source in [kept, *map(Path, sys.argv[1:])]:
        new: dict[str, list[Row]] = {}
        for r in json.loads(source.read_text(encoding="utf-8"))["rows"]:
            new.setdefault(r["case"], []).append(r)
        by_case |= new
    rows = [r for case in by_case for r in by_case[case]]
    kept.write_text(json.dumps({"rows": rows}) + "\n", encoding="utf-8")
    return rows


def main() -> None:
    rows = gathered(DOCS / "influence.json")
    page = DOCS / "influence.md"
    text = page.read_text(encoding="utf-8")
    for case in CASES:
        if of(rows, case):
            text = replaced(text, BEGIN.format(case=case), END.format(case=case), table(rows, case))
    page.write_text(text, encoding="utf-8")
    (DOCS / "influence.svg").write_text(draw(rows, "R0"), encoding="utf-8")


if __name__ == "__main__":
    main()
