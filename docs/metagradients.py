"""Writes the tables of docs/metagradients.md from the benchmark's result.

    python docs/metagradients.py [RESULT.json ...]

Each is what `benchmarks/metagrad.py --json` wrote, of some cases; docs/metagradients.json keeps the last of every case.
"""

from __future__ import annotations

from pathlib import Path

from influence import Row, figure, gathered, replaced

DOCS = Path(__file__).parent
BEGIN, END = "<!-- figures of {case}: written by docs/metagradients.py -->", "<!-- end of {case} -->"
CASES = ("R0", "R2-10", "R2-50", "R3", "R3-smooth")
METRICS = {"lds_fixed": "LDS, the run itself", "lds_avg": "LDS, mean of seeds", "lds_leave_1pct": "LDS, 1% left out"}


def foretold(rows: list[Row], case: str) -> str:
    """One line a contestant, the best first."""
    own = {(r["method"], r["metric"]): r for r in rows if r["case"] == case and r["method"] != "ceiling"}
    # Of one seed, the mean of seeds is the run itself.
    seeds = any(own[m, "lds_avg"]["value"] != own[m, "lds_fixed"]["value"] for m, k in own if k == "lds_avg")
    metrics = [m for m in METRICS if any(k == m for _, k in own) and (m != "lds_avg" or seeds)]
    lines = ["| method | " + " | ".join([*(METRICS[m] for m in metrics), "seconds"]) + " |"]
    lines.append("|" + "---|" * (len(metrics) + 2))
    held = [r for (_, metric), r in own.items() if metric == "lds_fixed"]
    for r in sorted(held, key=lambda r: -r["value"]):
        cells = [figure(own[r["method"], m]) if (r["method"], m) in own else "" for m in metrics]
        lines.append("| " + " | ".join([r["method"], *cells, f"{r['seconds']:.1f}"]) + " |")
    return "\n".join(lines)


def costs(rows: list[Row]) -> str:
    held = [r for r in rows if r["case"].startswith("cost-T") and r["metric"] == "ratio_to_training"]
    lines = ["| one reversed step, in training steps | tool | median | 10% to 90% of the turns |", "|---|---|---|---|"]
    for r in held:
        low, high = r["ci"]
        lines.append(f"| {r['method']} | {r['tool']} | {r['value']:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def main() -> None:
    rows = gathered(DOCS / "metagradients.json")
    page = DOCS / "metagradients.md"
    text = page.read_text(encoding="utf-8")
    made = {case: foretold(rows, case) for case in CASES if any(r["case"] == case for r in rows)}
    if any(r["case"].startswith("cost-T") for r in rows):
        made["cost"] = costs(rows)
    for case, table in made.items():
        text = replaced(text, BEGIN.format(case=case), END.format(case=case), table)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
