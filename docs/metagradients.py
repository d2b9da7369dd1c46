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

MOVES = {
    "center-1": "of a tenth at weight 1", "center-alpha": "of a tenth at 1/2", "halves": "of a half, to halves",
}  # fmt: skip


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
    moves = {k.partition("-")[2]: r["value"] for (k, metric), r in own.items() if metric == "linearity"}
    if moves:
        said = [f"{MOVES[name]} {value:.2f}" for name, value in moves.items()]
        lines += ["", f"Linearity: {', '.join(said)}."]
    return "\n".join(lines)


DESCENT = {
    "gain_over_random": "a random draw", "gain_over_best_null": "n-grams, the best that sees no gradient",
    "gain_over_loss_diff": "`loss_diff`", "gain_over_influence": "influence (EK-FAC)",
    "gain_over_metagrad": "one metagradient", "gain_over_mgd-from-random": "descent from a random start",
    "gain_over_oracle": "the oracle: equal parts of the three; the clean ones",
}  # fmt: skip


def descent(rows: list[Row]) -> str:
    """What `mgd` gains over others, in both worlds of text."""
    own = {(r["case"], r["metric"]): r for r in rows if r["method"] == "mgd"}
    best = {r["options"]["against"] for r in own.values() if r["metric"] == "gain_over_best_null" and r["options"]}
    assert best <= {"n-grams", "loss"}, f"another null is the best: {best}"
    lines = ["| gain of `mgd` over | three domains in equal parts | one domain, half of it shuffled |", "|---|---|---|"]
    for metric, name in DESCENT.items():
        cells = [figure(own[case, metric]) for case in ("mgd-mixture", "mgd-noisy-domain")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
    if any(r["case"] == "mgd-mixture" for r in rows):
        made["descent"] = descent(rows)
    for case, table in made.items():
        text = replaced(text, BEGIN.format(case=case), END.format(case=case), table)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
