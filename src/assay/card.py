"""The selected dataset: Parquet, keep-list and a card that carries the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.keys import decode_ids, write_json, write_text
from assay.core.pool import Pool
from assay.core.selection import Selection


def write_dataset(path: Path, pool: Pool, selection: Selection, arm: dict[str, Any], result: dict[str, Any]) -> None:
    """`data.parquet` (the pool's columns with `id` and `weight`, in the selection's order), `README.md` and
    `manifest.json`."""
    path.mkdir(parents=True, exist_ok=True)
    aside = path / ".data.parquet.tmp"
    writer: pq.ParquetWriter | None = None
    size = 4096
    for start in range(0, len(selection), size):
        ids = selection.ids[start : start + size]
        part = pool.take(ids.tolist())
        columns: dict[str, Any] = {"id": decode_ids(ids), "weight": selection.weights[start : start + size]}
        columns |= {name: part.column(name) for name in pool.columns if name != "id"}
        table = pa.table(columns, schema=writer.schema) if writer else pa.table(columns)
        writer = writer or pq.ParquetWriter(aside, table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()
        aside.replace(path / "data.parquet")
    write_text(path / "README.md", card(arm, result))
    write_json(path / "manifest.json", manifest(arm, result))


def _interval(ci: list[float] | None) -> str:
    return "not estimated" if ci is None else f"{ci[0]:+.4f} to {ci[1]:+.4f}"


def card(arm: dict[str, Any], result: dict[str, Any]) -> str:
    """The dataset card, in the Markdown with YAML front matter that dataset hubs read."""
    pool, target, training = result["pool"], result["target"], result["training"]
    tokens = "" if arm["tokens"] is None else f", {arm['tokens']:,} tokens"
    rows = [
        f"| {_plain(d)[:80]} | {pool['domains'][d]['rows']:,} | {n:,} |"
        for d, n in sorted(arm["domains"].items())
        if d in pool["domains"]
    ]
    planted = [
        f"| {_plain(k)[:80]} | {v['in_pool']:,} | {v['selected']:,} | {_times(v['enrichment'])} |"
        for k, v in arm["planted"].items()
    ]
    lines = [
        "---", "configs:", "- config_name: default", "  data_files: data.parquet", "tags:", "- data-selection",
        "- assay", "---", "",
        f"# {_plain(result['name'])}: selected by {_plain(arm['name'])}", "",
        f"{arm['selected']:,} rows{tokens}, chosen from a pool of {pool['rows']:,} rows for the target"
        f" `{_plain(target['name'])}` with [assay](https://pypi.org/project/assay-data/) {result['assay']}.", "",
        "## Evidence", "",
        f"Verdict against random selection at the same budget: **{arm['verdict']}**.",
        f"Gain {arm['gain_over_random']:+.4f} {target['measure']}, interval {_interval(arm['ci'])}"
        f" at level {result['study']['verify']['level']:.0%}; judged on {target['judged']} held-out items,"
        f" {len(training['seeds'])} paired seeds, {result['study']['verify']['random']} random draws.",
        f"Judged loss {arm['judged_loss']:.4f} {target['measure']}, a {training['parameters']:,}-parameter model"
        f" trained for {training['steps']} steps, {training['repeats']:.1f} times through the selection.",
        f"Selecting cost {arm['selection_flops_share']:.2f} times the operations of one such training run.",
        "",
        *_failed(arm, result),
        "The figures hold for this pool, budget, model size and number of repeats, and for no other.", "",
        "## Composition", "", "| domain | in pool | selected |", "|---|---|---|", *rows, "",
    ]  # fmt: skip
    if planted:
        lines += [
            "## Known defects of the pool",
            "",
            "| kind | in pool | selected | enrichment |",
            "|---|---|---|---|",
            *planted,
            "",
        ]
    stages = [
        f"| {_plain(stage['name'])[:80]} | {stage['in']['rows']:,} | {stage['out']['rows']:,} |"
        for stage in pipeline(arm, result).get("stages", [])
    ]
    if stages:
        lines += ["## Filters", "", "| stage | rows in | rows out |", "|---|---|---|", *stages, ""]
    hits = result["contamination"]
    lines += [
        "## Contamination", "",
        f"{hits['hits']} pool rows share a run of {hits['ngram']} words (or a whole shorter item) with the target;"
        " they were removed before selection."
        f" Left alone, this method would have taken {arm['contamination']['hits']}.", "",
        "## Licence", "", "The rows keep the licences of the pool they came from; nothing here grants more.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def checks(arm: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of an arm."""
    return [one for one in result["checks"] if arm["name"] in one["arms"]]


def _failed(arm: dict[str, Any], result: dict[str, Any]) -> list[str]:
    names = [one["name"] for one in checks(arm, result) if one["ok"] is False]
    return ["", "Checks that failed:", "", *(f"- {_plain(name)}" for name in names), ""] if names else []


def pipeline(arm: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What the filters before an arm's budget did; empty where there are none."""
    return next((one for one in result["pipelines"] if arm["name"] in one["arms"]), {})


def manifest(arm: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What makes the dataset auditable, for machines."""
    keys = ("pool", "target", "budget", "training", "contamination", "environment", "study")
    filters = {k: v for k, v in pipeline(arm, result).items() if k != "arms"}
    own = {"arm": arm, "filters": filters, "checks": checks(arm, result)}
    return {"assay": result["assay"], **own, **{k: result[k] for k in keys}}


def _plain(text: str) -> str:
    """A name that cannot open markup."""
    return "".join(c if c.isalnum() or c in " -_.,:" else "?" for c in text)


def _times(x: float | None) -> str:
    return "-" if x is None or not np.isfinite(x) else f"{x:.2f}x"
