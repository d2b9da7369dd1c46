"""The page of `assay verify`: LDS with intervals under the ceiling, LDS against cost, removal curves, every check; or
whether training can be differentiated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from assay.report import figures
from assay.report.figures import Axis, finite, span
from assay.report.page import NUMBER

VERDICTS = {
    "beats the nulls": "better", "better than random": "unresolved", "no better than random": "unresolved",
    "misleading": "worse", "null": "baseline", "better": "better", "worse": "worse", "unresolved": "unresolved",
}  # fmt: skip
ROWS, TEXT = 60, 600

MEASURED = {"value": NUMBER, "ci?": [NUMBER]}
SCHEMA: dict[str, Any] = {
    "name": str, "level": NUMBER, "findings": [str], "command?": str,
    "pool": {"rows": int, "used": int, "contain_target?": int},
    "target": {"name": str, "selecting": int, "judging": int, "measure": str},
    "model": {"kind": str, "parameters": NUMBER},
    "bank": {
        "subsets": int, "share": NUMBER, "seeds": int, "protocol": str, "trainings": int, "fingerprint": str,
        "ceiling": {"one?": NUMBER, "average?": NUMBER}, "seconds": NUMBER, "flops": NUMBER, "steps": int,
    },
    "methods": [
        {
            "name": str, "null": bool, "verdict?": str, "label?": str, "error?": str, "seconds": NUMBER,
            "flops": NUMBER, "lds_fixed?": MEASURED, "lds_avg?": MEASURED, "over_null?": {"name": str, **MEASURED},
            "over_random?": {"name": str, **MEASURED}, "tried?": [dict],
        }
    ],
    "checks": [
        {
            "check": str, "title": str, "seconds": NUMBER, "flops": NUMBER, "refused?": str, "detail?": str,
            "unit?": str, "rows?": [{"name": str, "null": bool}],
            "curves?": [{"name": str, "points": [{"share": NUMBER, "value": NUMBER, "ci?": [NUMBER]}]}],
        }
    ],
    "examples?": [dict], "ledger?": [{"stage": str}], "warnings?": [str], "environment?": dict,
}  # fmt: skip

SMOOTH: dict[str, Any] = {
    "name": str, "findings": [str], "command?": str,
    "pool": {"rows": int, "used": int, "contain_target?": int},
    "target": {"name": str, "used": int, "measure": str},
    "model": {"kind": str, "parameters": NUMBER},
    "training": {"steps": int, "recipe": {"optimiser": str, "lr": NUMBER, "terms_per_step": int}},
    "smooth": {
        "h": NUMBER, "directions": int, "center": NUMBER,
        "rows": [
            {
                "name": str, "how": str, "verdict": str, "seconds": NUMBER, "flops": NUMBER, "error?": str,
                "loss?": NUMBER, "linearity?": NUMBER, "linearity_by_direction?": [NUMBER], "agreement?": NUMBER,
                "mended?": NUMBER, "curvature?": NUMBER, "metric?": NUMBER,
            }
        ],
    },
    "ledger?": [{"stage": str}], "warnings?": [str], "environment?": dict,
}  # fmt: skip
SMOOTH_VERDICTS = {"usefully": "better", "with care": "unresolved", "not usefully": "worse", "unknown": "baseline"}


def smooth(result: dict) -> dict[str, Any]:
    """What the template draws of a measurement of metasmoothness."""
    rows = result["smooth"]["rows"]
    known = [row for row in rows if finite(row.get("linearity"))]
    ends = [end for row in known for end in row["linearity_by_direction"]]
    axis = Axis(*span([0.0, 1.0, *ends], 0.04))
    drawn = [
        {"row": row, "at": axis.at(row["linearity"]), "ends": [axis.at(end) for end in row["linearity_by_direction"]]}
        for row in known
    ]
    return {
        "r": result, "verdicts": SMOOTH_VERDICTS, "smooth_rows": rows,
        "outcome": "gain" if rows[0]["verdict"] == "usefully" else "none",
        "read": "minus the margin" if result["target"]["measure"] == "margin" else "loss",
        "metric": any(finite(row.get("metric")) for row in rows),
        "lines": {"rows": drawn, "zero": axis.at(0.0), "one": axis.at(1.0), "ticks": axis.ticks(6)},
        "ledger": figures.ledger(result.get("ledger") or []), "rows_shown": ROWS, "checks": [],
        "study": json.dumps(result.get("study"), indent=2, ensure_ascii=False) if result.get("study") else "",
    }  # fmt: skip


def view(result: dict) -> dict[str, Any]:
    """What the template draws."""
    rows = sorted(result["methods"], key=_place)
    known = [row for row in rows if not row.get("error")]
    label = known[0]["label"] if known else "lds_avg"
    top = result["bank"]["ceiling"].get("average" if label == "lds_avg" else "one")
    costs = {row["name"]: row for row in rows}
    colours = {row["name"]: at for at, row in enumerate(known)}
    return {
        "r": result, "rows": rows, "label": label, "level": f"{100 * result['level']:g}%", "verdicts": VERDICTS,
        "ceiling": top, "outcome": "gain" if any(r["verdict"] == "beats the nulls" for r in known) else "none",
        "forest": forest(known, label, top), "price": price(known, label, top), "costs": costs,
        "checks": [
            {**check, "rows": sorted(check.get("rows") or [], key=lambda r: -r.get("value", -1e300))}
            for check in result["checks"]
        ],
        "removal": [
            {**check, "plot": curves(check["curves"], colours)} for check in result["checks"] if check.get("curves")
        ],
        "tuned": [row for row in rows if row.get("tried")],
        "ledger": figures.ledger(result.get("ledger") or []), "rows_shown": ROWS, "text_shown": TEXT,
        "study": json.dumps(result.get("study"), indent=2, ensure_ascii=False) if result.get("study") else "",
    }  # fmt: skip


def _place(row: dict) -> tuple[bool, float, str]:
    value = (row.get(row.get("label") or "") or {}).get("value")
    return bool(row.get("error")), -value if finite(value) else 0.0, row["name"]


def forest(rows: Sequence[dict], label: str, top: float | None) -> dict[str, Any] | None:
    """A line a method: LDS and its interval on one axis, with zero and the ceiling."""
    if not rows:
        return None
    ends = [end for row in rows for end in row[label].get("ci") or ()]
    axis = Axis(*span([0.0, *ends, *([top] if top is not None else [])], 0.04))
    drawn = []
    for row in rows:
        found = row[label]
        ci = [axis.at(end) for end in found["ci"]] if found.get("ci") else None
        drawn.append({"row": row, "at": axis.at(found["value"]), "ci": ci, "found": found})
    return {
        "rows": drawn, "zero": axis.at(0.0), "ceiling": None if top is None else axis.at(top), "ticks": axis.ticks(6),
    }  # fmt: skip


def price(rows: Sequence[dict], label: str, top: float | None) -> dict[str, Any] | None:
    """LDS against wall seconds, by ratio; scoring models are part of the price."""
    priced = [row for row in rows if row["seconds"] > 0]
    if len(priced) < 2:
        return None
    seconds = [row["seconds"] for row in priced]
    x = Axis(min(seconds) / 1.6, max(seconds) * 1.6, log=True)
    ends = [end for row in priced for end in row[label].get("ci") or ()]
    y = Axis(*span([0.0, *ends, *([top] if top is not None else [])]))
    points = []
    for row in sorted(priced, key=lambda r: r[label]["value"]):
        low, high = row[label].get("ci") or (row[label]["value"],) * 2
        points.append(
            {
                "name": row["name"], "null": row["null"], "x": x.at(row["seconds"]), "y": y.at(row[label]["value"]),
                "low": y.at(low), "high": y.at(high), "left": x.at(row["seconds"]) > 60,
            }
        )  # fmt: skip
    _apart(points)
    return {
        "points": points, "x_ticks": x.ticks(4), "y_ticks": y.ticks(5), "zero": y.at(0.0),
        "ceiling": None if top is None else y.at(top),
    }  # fmt: skip


def _apart(points: list[dict[str, Any]], gap: float = 6.0) -> None:
    """Names on one side are moved up until none covers another."""
    for side in (False, True):
        at = -gap
        for point in (p for p in points if p["left"] is side):
            at = point["text"] = max(point["y"], at + gap)


def curves(found: Sequence[dict], colours: dict[str, int]) -> dict[str, Any]:
    """Rise of a target's loss against the share of the pool that was removed, a line for each method."""
    points = [p for curve in found for p in curve["points"]]
    x = Axis(0.0, 1.06 * max(p["share"] for p in points))
    ends = [end for p in points for end in (p.get("ci") or (p["value"],))]
    y = Axis(*span([0.0, *ends]))
    lines = []
    for at, curve in enumerate(found):
        aside = 0.5 * (at - (len(found) - 1) / 2)  # so that no interval covers another
        places = [(0.0, 0.0), *((p["share"], p["value"]) for p in curve["points"])]
        path = "M" + "L".join(f"{10 * x.at(a):.0f} {1000 - 10 * y.at(b):.0f}" for a, b in places)
        bars = [
            {"x": x.at(p["share"]) + aside, "y": y.at(p["value"]), "low": y.at(p["ci"][0]), "high": y.at(p["ci"][1])}
            for p in curve["points"] if p.get("ci")
        ]  # fmt: skip
        colour = min(colours.get(curve["name"], figures.OTHER), figures.OTHER)
        lines.append({"name": curve["name"], "path": path, "bars": bars, "colour": colour})
    ticks = [{**tick, "label": figures.percent(tick["value"])} for tick in x.ticks(5)]
    return {"lines": lines, "x_ticks": ticks, "y_ticks": y.ticks(5), "zero": y.at(0.0)}
