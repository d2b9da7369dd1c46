"""Filters on real documents whose defects are known: what they find, how fast, in what memory; and datatrove.

    python benchmarks/filters.py [--quick] [--json FILE] [--parts duplicates,rules,mixture,classify,embeddings]
                                 [--data FOLDER] [--peers PYTHON] [--threads N]

Each part is a module of benchmarks/parts with `rows(data, quick, peer, threads)`, and can be run alone; its docstring
says what its rows mean. `recall`: the share of the known defects of a case that a filter drops; `precision`: the share
of what it drops that is one; `docs_per_second`: of documents of about 1 kB. At the end stand the bars, met or not.
The data is the folder that has domains/domains.parquet and domains/defects.parquet: --data, or ASSAY_DATA. The peers'
python is --peers, or ASSAY_PEERS; see requirements-peers.txt; without it, and without a package that a part needs,
those rows are left out and said so.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.core import Row, written  # noqa: E402

DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
PARTS = ("duplicates", "rules", "mixture", "classify", "embeddings")
# What rows of one case differ in, besides the method.
APART = ("kind", "at", "variant", "column", "documents", "threads")


def run(part: str, chosen: Any) -> list[Row]:
    """The rows of one part. Raises `ModuleNotFoundError` for one that is not there."""
    module = importlib.import_module(f"benchmarks.parts.{part}")
    # A part works on the folder of `domains`, or on the one above, whichever its own default is.
    inner = getattr(module, "DATA", chosen.data).name == "domains"
    start = time.perf_counter()
    found = module.rows(chosen.data / "domains" if inner else chosen.data, chosen.quick, chosen.peers, chosen.threads)
    print(f"{part}: {len(found)} rows in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return [{**row, "bench": "filters", "part": part} for row in found]


def table(rows: list[Row]) -> list[str]:
    """One line for each row, a heading for each case."""
    lines, case = [], ""
    for row in sorted(rows, key=lambda r: PARTS.index(r["part"])):
        if (row["part"], row["case"]) != case:
            case = row["part"], row["case"]
            lines += ["", f"{row['part']}: {row['case']}"]
        value = f"{row['value']:,.0f}" if abs(row["value"]) >= 1000 else f"{row['value']:.4g}"
        ends = "" if row.get("ci") is None else f"[{row['ci'][0]:,.4g}, {row['ci'][1]:,.4g}]"
        apart = ", ".join(f"{k} {row[k]}" for k in APART if k in row)
        lines.append(f"  {row['tool']:<18} {row['method']:<30} {row['metric']:<18} {value:>12} {ends:<22} {apart}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer documents and turns")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--parts", "--cases", type=lambda t: t.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of the data ({DATA})")
    parser.add_argument("--peers", type=Path, help="the peers' python")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each contestant")
    chosen = parser.parse_args()
    unknown = [part for part in chosen.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    for name in ("domains.parquet", "defects.parquet"):
        if not (chosen.data / "domains" / name).exists():
            parser.error(f"there is no {chosen.data / 'domains' / name}: name the folder with --data or ASSAY_DATA")

    from benchmarks.parts import filter_bars

    rows, failed = [], []
    for part in chosen.parts:
        try:
            rows += run(part, chosen)
        except Exception as error:  # one part must not cost the others
            failed.append(f"{part}: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr)
    print("\n".join([*table(rows), "", *filter_bars.lines(rows)]))
    written(rows, chosen.json)
    if failed:
        sys.exit("\n".join(["these parts failed:", *failed]))


if __name__ == "__main__":
    main()
