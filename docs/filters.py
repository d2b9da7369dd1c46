"""Writes the measured tables of docs/filters.md from the benchmark's result.

    python docs/filters.py [RESULT.json]

RESULT.json is what `benchmarks/filters.py --json` wrote; what the tables need of the last one is kept as
docs/filters.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from influence import Row, replaced

DOCS = Path(__file__).parent
BEGIN, END = "<!-- {name}: written by docs/filters.py -->", "<!-- end of {name} -->"
# Heading -> method and the bounds that its column is of.
COLUMNS = {
    "`language`": ("language", "published"),
    "`gopher` as published": ("gopher", "published"),
    "`gopher`": ("gopher", "refitted"),
    "`gopher`, dclm, quality": ("gopher-dclm-quality", "refitted"),
    "`c4`, any_end": ("c4-any_end", "refitted"),
    "`fineweb`": ("fineweb", "refitted"),
    "`refinedweb`": ("refinedweb", "refitted"),
    "`perplexity`": ("perplexity", None),
}
AT_ONE_PERCENT = [
    key for key in COLUMNS if "published" not in key and "language" not in key and "perplexity" not in key
]
# Below this share of a kind, at 1% false drops, a filter is as good as blind to it.
MISSED = 0.05


def found(rows: list[Row]) -> str:
    """One line a kind of defect; **bold**: rules at 1% false drops find fewer than MISSED of it, each of them."""
    recalls: dict[tuple[str, str], dict[str, float]] = {}
    drops: dict[str, float] = {}
    for heading, (method, at) in COLUMNS.items():
        for r in rows:
            own = r["metric"] == "recall" and r["case"] in ("foreign", "garbled", "noise", "spam")
            if not own or r["method"] != method or r.get("at") != at:
                continue
            drops[heading] = r["false_drops"]
            kind = r.get("kind", "all")
            # Languages and the one kind of spam are not told apart here.
            if (kind == "all") == (r["case"] in ("foreign", "spam")):
                recalls.setdefault((r["case"], kind), {})[heading] = r["value"]
    lines = ["| defect | kind | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    lines.append(
        "| *sound text dropped* | | " + " | ".join(f"{drops[h]:.1%}" if h in drops else "" for h in COLUMNS) + " |"
    )
    for (case, kind), values in recalls.items():
        blind = all(values.get(h, 0.0) < MISSED for h in AT_ONE_PERCENT)
        name = f"**{kind}**" if blind and kind != "all" else "" if kind == "all" else kind
        lines.append(
            f"| {case} | {name} | " + " | ".join(f"{values[h]:.2f}" if h in values else "" for h in COLUMNS) + " |"
        )
    return "\n".join(lines)


def speeds(rows: list[Row]) -> str:
    """Documents a second of ours and of datatrove, in the same run."""
    own = [r for r in rows if r["case"] == "speed" and r["metric"] == "docs_per_second"]
    theirs = {r["method"]: r for r in own if r["tool"] != "assay"}
    lines = ["| scorer | docs/s | datatrove 0.10.1 | times as fast |", "|---|---|---|---|"]
    for r in own:
        if r["tool"] == "assay":
            peer = theirs.get(r["method"])
            rest = f"{peer['value']:,.0f} | {r['value'] / peer['value']:.1f}" if peer else " | "
            lines.append(f"| `{r['method']}` | {r['value']:,.0f} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    kept = DOCS / "filters.json"
    rows = json.loads((Path(sys.argv[1]) if len(sys.argv) > 1 else kept).read_text(encoding="utf-8"))["rows"]
    wanted = {at for at in COLUMNS.values()}
    rows = [r for r in rows if r["case"] == "speed" or (r["method"], r.get("at")) in wanted]
    page = DOCS / "filters.md"
    text = page.read_text(encoding="utf-8")
    for name, table in (("defects", found(rows)), ("speed", speeds(rows))):
        text = replaced(text, BEGIN.format(name=name), END.format(name=name), table)
    page.write_text(text, encoding="utf-8")
    kept.write_text(json.dumps({"rows": rows}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
