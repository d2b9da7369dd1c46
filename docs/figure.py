"""Draw `docs/demo.svg`, the README's figure, from the result of `assay demo text`: `python docs/figure.py runs/demo-text`."""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, ROW, LEFT, RIGHT, TOP = 780, 30, 170, 170, 64
COLOURS = {"better": "#0b7a53", "worse": "#b3372f", "unresolved": "#8a6d00", "baseline": "#6b7280"}


def draw(result: dict[str, Any]) -> str:
    """Gain over random with its interval, one row an arm; arms far below the others are cut at the edge."""
    arms = sorted(result["arms"], key=lambda a: -(a["gain_over_random"] or 0))
    low = min(-0.3, min(a["ci"][0] for a in arms if a["ci"][0] > -0.6))
    high = max(a["ci"][1] for a in arms) * 1.05
    span = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        return LEFT + span * (min(max(value, low), high) - low) / (high - low)

    height = TOP + ROW * len(arms) + 44
    target, level = result["target"], result["study"]["verify"]["level"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="600">Gain over random selection, {escape(target["name"])}</text>',
        f'<text x="16" y="46" fill="#4b5563">{escape(target["measure"])}, {level:.0%} intervals,'
        f" {len(result['training']['seeds'])} paired seeds, {target['judged']} judged items; right: garbled rows taken</text>",
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP - 6}" y2="{height - 36}" stroke="#9ca3af" stroke-dasharray="3 3"/>',
    ]
    for k, arm in enumerate(arms):
        y, colour = TOP + ROW * k + ROW / 2, COLOURS[arm["verdict"]]
        garbled = arm["planted"].get("garbled", {}).get("enrichment")
        note = "" if garbled is None else f"{garbled:.2f}x"
        gain = arm["gain_over_random"]
        edge = gain < low
        parts.append(f'<text x="{LEFT - 12}" y="{y + 5}" text-anchor="end">{escape(arm["name"])}</text>')
        if edge:
            parts.append(f'<text x="{LEFT}" y="{y + 5}" fill="{colour}">◂ {gain:+.2f}</text>')
        else:
            a, b, m = x(arm["ci"][0]), x(arm["ci"][1]), x(gain)
            parts.append(f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
            parts.append(f'<circle cx="{m:.1f}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 14}" y="{y + 5}" fill="{colour}">{arm["verdict"]}</text>')
        parts.append(f'<text x="{WIDTH - 16}" y="{y + 5}" text-anchor="end" fill="#4b5563">{note}</text>')
    for tick in (-0.2, 0.0, 0.2, 0.4, 0.6):
        if low <= tick <= high:
            parts.append(
                f'<text x="{x(tick):.1f}" y="{height - 16}" text-anchor="middle" fill="#4b5563">{tick:+.1f}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    found = json.loads((Path(sys.argv[1]) / "result.json").read_text(encoding="utf-8"))
    Path(__file__).with_name("demo.svg").write_text(draw(found), encoding="utf-8")
