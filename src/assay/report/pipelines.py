"""What the filters of a run did, stage by stage: rows left, the mixture of domains, the reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.report import figures

COUNTS = {"rows": figures.NUMBER, "tokens?": figures.NUMBER}
SCHEMA: dict[str, Any] = {
    "arms": [str],
    "stages": [
        {
            "name": str,
            "in": COUNTS,
            "out": COUNTS,
            "domains": {"*": {"in": figures.NUMBER, "out": figures.NUMBER}},
            "reasons?": {"*": figures.NUMBER},
            "starved?": [{"domain": str, "kept": figures.NUMBER, "others": figures.NUMBER}],
        }
    ],
}
REASONS = 12
COLUMNS = 24


def view(result: dict, domains: figures.Domains) -> list[dict[str, Any]]:
    """One entry for each pipeline: who it is of, and a row for each stage, the whole pool first."""
    found = []
    for pipeline in result.get("pipelines") or []:
        stages = pipeline["stages"]
        if not stages:
            continue
        names = [name for name in domains.names if name in stages[0]["domains"]][:COLUMNS]
        whole = max(1, stages[0]["in"]["rows"])
        first = {name: counts["in"] for name, counts in stages[0]["domains"].items()}
        rows = [
            {"name": "whole pool", "rows": stages[0]["in"]["rows"], "bar": _bar(first, whole, domains), "cells": []}
        ]
        rows += [_row(stage, names, whole, domains) for stage in stages]
        several = len(stages[0]["domains"]) > 1
        found.append(
            {
                "who": _who(pipeline["arms"]),
                "rows": rows,
                "domains": names if several else [],
                "reasons": _reasons(stages),
            }
        )
    return found


def _who(arms: Sequence[str]) -> str:
    shown = ", ".join(arms[:8])
    return shown + (f" and {len(arms) - 8} more" if len(arms) > 8 else "")


def _row(stage: dict, names: Sequence[str], whole: int, domains: figures.Domains) -> dict[str, Any]:
    before, after = stage["in"]["rows"], stage["out"]["rows"]
    starved = {one["domain"] for one in stage.get("starved") or []}
    kept = after / before if before else None
    cells = []
    for name in names:
        own = stage["domains"].get(name) or {"in": 0, "out": 0}
        share = own["out"] / own["in"] if own["in"] else None
        ratio = share / kept if share is not None and kept else None
        cells.append({"share": share, "out": own["out"], "ratio": ratio, "starved": name in starved})
    left = {name: counts["out"] for name, counts in stage["domains"].items()}
    return {
        "name": stage["name"], "rows": after, "dropped": before - after, "kept": kept,
        "bar": _bar(left, whole, domains), "cells": cells,
    }  # fmt: skip


def _bar(counts: dict[str, int], whole: int, domains: figures.Domains) -> list[dict[str, Any]]:
    """Widths in percent of the whole pool, by the colours of domains."""
    parts = [0] * (figures.PALETTE + 1)
    for name, count in counts.items():
        parts[domains.colour(name)] += count
    return [{"colour": i, "width": round(100 * part / whole, 3)} for i, part in enumerate(parts) if part]


def _reasons(stages: Sequence[dict]) -> list[dict[str, Any]]:
    """The reasons that dropped most, with their filter."""
    found = [
        {"reason": reason, "rows": count}
        for stage in stages
        for reason, count in (stage.get("reasons") or {}).items()
        if count
    ]
    return sorted(found, key=lambda one: -one["rows"])[:REASONS]
