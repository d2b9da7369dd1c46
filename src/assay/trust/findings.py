"""What a verification found, in sentences: the terminal and the page say the same."""

from __future__ import annotations

from typing import Any

# Of these checks a method that passes may owe it to what any of these baselines sees.
CHEAP = {"mislabel": ("loss",), "known_answer": ("loss", "bm25", "nearest")}


def findings(result: dict[str, Any]) -> list[str]:
    """The headline first; then who is no better than chance, what noise allows, and what the checks say."""
    rows = [r for r in result["methods"] if not r.get("error")]
    if not rows:
        return ["No method could be measured."]
    label, level = rows[0]["label"], f"{result['level']:.0%}"
    own = sorted((r for r in rows if not r["null"]), key=lambda r: -r[label]["value"])
    nulls = [r for r in rows if r["null"] and r["name"] != "random"]
    best_null = max(nulls, key=lambda r: r[label]["value"], default=None)
    said = []
    if own:
        best = own[0]
        said.append(_headline(best, label, level, result, len(own)))
        if best.get("over_null"):
            said.append(_over(best, level))
    elif best_null:
        said.append(f"Only baselines were measured; the best is {best_null['name']} with {_number(best_null, label)}.")
    said += _groups(own[1:], label)
    said += _noise(result["bank"], label)
    said += [_check(check) for check in result["checks"]]
    return [s for s in said if s]


def _headline(best: dict[str, Any], label: str, level: str, result: dict[str, Any], count: int) -> str:
    low, high = best[label]["ci"]
    figure = f"LDS {best[label]['value']:.2f} ({level} CI {low:.2f} to {high:.2f})"
    on = f"on {result['target']['judging']} reported targets"
    if best["verdict"] in ("no better than random", "misleading"):
        return f"No method predicts retraining better than random {on}; the best, {best['name']}, has {figure}."
    top = result["bank"]["ceiling"]["average" if label == "lds_avg" else "one"]
    share = f", {best[label]['value'] / top:.0%} of what noise allows ({top:.2f})" if top else ""
    if count == 1:
        return f"{best['name']} predicts retraining: {figure}{share}, {on}."
    picked = f"It is the best of {count} by these very figures; its interval is not corrected for that choice."
    return f"{best['name']} predicts retraining best: {figure}{share}, {on}. {picked}"


def _over(best: dict[str, Any], level: str) -> str:
    over = best["over_null"]
    low, high = over["ci"]
    figure = f"{over['value']:+.2f} ({level} CI {low:+.2f} to {high:+.2f})"
    if low > 0:
        return f"It beats every baseline; its least sure gain is over {over['name']}: {figure}."
    return f"It is not shown to beat every baseline: over {over['name']} it gains {figure}. The cheap one would do."


def _groups(rows: list[dict[str, Any]], label: str) -> list[str]:
    said = []
    for verdict, one, many in (
        ("beats the nulls", "also beats every baseline", "also beat every baseline"),
        ("better than random", "is better than random", "are better than random"),
        ("no better than random", "is no better than random", "are no better than random"),
        ("misleading", "is worse than random: its sign is wrong", "are worse than random: their sign is wrong"),
    ):
        names = [f"{r['name']} ({r[label]['value']:.2f})" for r in rows if r["verdict"] == verdict]
        if names:
            said.append(f"{', '.join(names)} {many if len(names) > 1 else one}.")
    return said


def _noise(bank: dict[str, Any], label: str) -> list[str]:
    if label == "lds_fixed":
        return ["One seed was trained: no figure says how much of the losses is chance; set lds.seeds = 2 or more."]
    top = bank["ceiling"]["average"]
    if top is not None and top < 0.5:
        return [f"Most of the differences between subsets are noise of seeds (ceiling {top:.2f}): raise lds.seeds."]
    return []


def _number(row: dict[str, Any], label: str) -> str:
    return f"LDS {row[label]['value']:.2f}"


def _check(check: dict[str, Any]) -> str:
    """One sentence a check: who passes against its control, among the methods that are no baselines."""
    title = check["title"].split(":")[0]
    if check.get("refused"):
        return f"{title}: left out, {check['refused']}."
    rows = [r for r in check["rows"] if not r.get("error")]
    own = [r for r in rows if not r["null"]] or rows
    passed = [r["name"] for r in own if r["verdict"] == "better"]
    failed = [r["name"] for r in own if r["verdict"] != "better"]
    control = check["control"]["name"]
    parts = [f"{', '.join(passed)} better than {control}"] if passed else []
    parts += [f"{', '.join(failed)} not shown to be"] if failed else []
    parts += _cheap(check, rows)
    return f"{title}: {'; '.join(parts)}."


def _cheap(check: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Whether what costs next to nothing does as well as the best method: for some checks it often does."""
    best = max((r["value"] for r in rows if not r["null"]), default=None)
    said = []
    for row in rows if best is not None else []:
        if row["null"] and row["name"] in CHEAP.get(check["check"], ()):
            does = "does as well" if row["value"] >= best else "does not do as well"
            said.append(f"{row['name']} alone {does} ({row['value']:.2f}, the best method {best:.2f})")
    return said
