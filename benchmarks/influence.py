"""How well scores foretell retraining: ours and other libraries', on the same models and the same bank, in one run.

    python benchmarks/influence.py [--quick] [--json FILE] [--cases R0,R1,R2,R3] [--cache FOLDER] [--peers PYTHON]
                                   [--images FILE_OR_FOLDER] [--threads N] [--only TEXT]

Worlds are those of parts/truth.py, contestants are treated as parts/contest.py says. LDS = Spearman's correlation, over
random halves of the pool, of what was measured after training on a half with the sum of its scores, averaged over
targets (Park et al. 2023, arXiv:2303.14186); intervals are two-way bootstraps over halves and targets. `lds_fixed` is
against one seed, the scoring model's; `lds_avg` against the mean of all seeds. `seconds`: of the chosen option, for
all targets, from models in memory to scores; choosing and the bank are not in it.
`auc` (R2, a tenth of the labels made wrong): the chance that a wrong label ranks above a right one.
Banks are most of a first run: of two idle cores they take about 10 s (R0), 30 s (R1), 3 min (R2) and 5 min (R3).
The peers' python is --peers, or ASSAY_PEERS; see requirements-peers.txt. Banks and models are kept in --cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.core import Row, written  # noqa: E402

CACHE = Path(__file__).parents[1] / "runs" / "influence"


def run(case: str, chosen: Any, libraries: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """The rows of one world, and what failed."""
    from benchmarks.parts import bank, entries, mislabels, truth
    from benchmarks.parts.contest import Contest

    folder = chosen.cache / (f"{case}-quick" if chosen.quick else case)
    start = time.perf_counter()
    world = truth.build(case, folder, quick=chosen.quick, images=chosen.images).measured(chosen.threads)
    print(f"{case}: bank of {world.values.shape} ready in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    contest = Contest(world, libraries, chosen.threads, chosen.quick)
    contest.rows += entries.ceilings(world)
    for contestant in entries.of(world, chosen.quick):
        if chosen.only in f"{contestant.tool} {contestant.method}":
            contest.enter(contestant)
    contest.rows += entries.differences(contest)
    if case == "R2":
        place = folder.with_name(f"{folder.name}-flipped")
        contest.rows += mislabels.rows(
            place, libraries, quick=chosen.quick, images=chosen.images, workers=chosen.threads
        )
    if case == "R0":
        contest.rows += [{**row, "options": {}} for row in bank.rows(chosen.quick)]
    return contest.rows, contest.failed


def table(rows: list[Row]) -> str:
    lines = []
    for r in rows:
        interval = "" if r["ci"] is None else f"[{r['ci'][0]:6.3f}, {r['ci'][1]:6.3f}]"
        options = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.get("options", {}).items()
        )
        lines.append(
            f"{r['case']:<8} {r['tool']:<18} {r['method']:<24} {r['metric']:<12} {r['value']:7.3f} {interval:<18}"
            f" {r['seconds']:9.2f} s  {options}"
        )
    return "\n".join(lines)


def finish(rows: list[Row], failed: list[str], file: Path | None, lines: list[str]) -> None:
    """Print the table, further lines and the JSON, which is also written to `file`; exit with what failed."""
    print("\n".join([table(rows), *lines]))
    written(rows, file)
    if failed:
        sys.exit("\n".join(["these contestants failed:", *failed]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer halves, targets and options; R0 alone unless told")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="R0,R1,R2,R3 (all, or R0 with --quick)")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where banks and models are kept ({CACHE})")
    parser.add_argument("--peers", type=Path, help="the peers' python")
    parser.add_argument("--images", type=Path, help="of R1 and R2: an .npz, or the folder of MNIST's own four files")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each contestant")
    parser.add_argument("--only", default="", help="contestants whose name has this text")
    chosen = parser.parse_args()

    from benchmarks.parts import attribution, bars, peers, truth

    chosen.cases = chosen.cases or (["R0"] if chosen.quick else list(truth.CASES))
    unknown = set(chosen.cases) - set(truth.CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}: choose from {', '.join(truth.CASES)}")
    libraries = attribution.installed(peers.interpreter(chosen.peers), chosen.threads)
    rows: list[Row] = []
    failed: list[str] = []
    for case in chosen.cases:
        found, missing = run(case, chosen, libraries)
        rows, failed = rows + found, failed + missing
    finish(rows, failed, chosen.json, list(bars.lines(rows)))


if __name__ == "__main__":
    main()
