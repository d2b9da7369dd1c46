"""What methods noted of themselves along the way, as lines over their own steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.report import figures
from assay.report.figures import Axis, finite, span

SCHEMA: dict[str, Any] = {
    "title": str, "x": str, "y": str, "at": [figures.NUMBER], "best?": int, "lines": {"*": [figures.NUMBER]},
    "columns?": {"*": [figures.NUMBER]},
}  # fmt: skip
MOST = 400


def view(result: dict) -> list[dict[str, Any]]:
    """The curves of each arm, drawn; none where there is nothing to draw."""
    drawn = []
    for name, entries in (result.get("curves") or {}).items():
        plots = [plot for plot in map(curve, entries or []) if plot]
        drawn += [{"name": name, "plot": plot} for plot in plots]
    return drawn


def curve(entry: dict) -> dict[str, Any] | None:
    """Lines on common axes, the step that was kept, and a table of all numbers."""
    at, lines = entry["at"], {n: v for n, v in entry["lines"].items() if len(v) == len(entry["at"])}
    keep = [k for k in figures.every(len(at), MOST) if finite(at[k])]
    values = [v[k] for v in lines.values() for k in keep if finite(v[k])]
    if not values:
        return None
    x, y = Axis(*span([at[k] for k in keep], 0.02)), Axis(*span(values))
    best, index = entry.get("best"), {k: row for row, k in enumerate(keep)}
    columns = {n: v for n, v in (entry.get("columns") or {}).items() if len(v) == len(at)}
    return {
        "title": entry["title"], "x": entry["x"], "y": entry["y"], "x_ticks": x.ticks(5), "y_ticks": y.ticks(5),
        "best": x.at(at[best]) if best in index else None, "best_at": at[best] if best in index else None,
        "lines": [
            {"name": n, "colour": min(c, figures.OTHER), "path": _path(at, v, keep, x, y)}
            for c, (n, v) in enumerate(lines.items())
        ],
        "heads": [entry["x"], *lines, *columns],
        "rows": [[v[k] for v in (at, *lines.values(), *columns.values())] for k in keep],
    }  # fmt: skip


def _path(at: Sequence[float], values: Sequence[Any], keep: Sequence[int], x: Axis, y: Axis) -> str:
    """In a box of 1000 by 1000; a gap where a value is no number."""
    parts, pen = [], "M"
    for k in keep:
        if finite(values[k]):
            parts.append(f"{pen}{10 * x.at(at[k]):.0f} {1000 - 10 * y.at(values[k]):.0f}")
        pen = "L" if finite(values[k]) else "M"
    return "".join(parts)
