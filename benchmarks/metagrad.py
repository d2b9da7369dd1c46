"""Metagradients: how well they foretell retraining, and what one reversed step costs.

    python benchmarks/metagrad.py [--quick] [--json FILE] [--parts lds,cost,mgd,ordering] [--cases CASE,CASE]
                                  [--cache FOLDER] [--images FILE_OR_FOLDER] [--threads N] [--peers PYTHON]
                                  [--only TEXT,TEXT]

lds: cases are R0, R2-10, R3, R3-smooth and R2-50 of parts/truth.py, halves and intervals those of influence.py;
`lds_fixed` is against the run that was differentiated, `lds_avg` against the mean of five seeds, `lds_leave_1pct`
against runs that lack a hundredth of the pool each, and `linearity` says how smooth the training is.
cost: see parts/reversal.py. mgd: see parts/descent.py. ordering: see parts/ordering.py.
Banks and models are kept in --cache, and shared with influence.py where a world is the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.core import Row  # noqa: E402

CACHE = Path(__file__).parents[1] / "runs" / "influence"
CASES = ("R0", "R2-10", "R3", "R3-smooth", "R2-50")
PARTS = ("lds", "cost", "mgd", "ordering")


def lds_rows(chosen: Any) -> tuple[list[Row], list[str]]:
    """The rows of all worlds, and what failed."""
    from benchmarks.parts import differentiated, entries, truth
    from benchmarks.parts.contest import Contest

    rows: list[Row] = []
    failed: list[str] = []
    for case in chosen.cases:
        folder = chosen.cache / (f"{case}-quick" if chosen.quick else case)
        start = time.perf_counter()
        world = truth.build(case, folder, quick=chosen.quick, images=chosen.images).measured(chosen.threads)
        print(f"{case}: bank of {world.values.shape} ready in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        contest = Contest(world, {}, chosen.threads, chosen.quick)
        contest.rows += entries.ceilings(world)
        for contestant in differentiated.of(world)[: 2 if chosen.quick else None]:
            if any(text in contestant.method for text in chosen.only):
                contest.enter(contestant)
        contest.rows += differentiated.differences(contest)
        contest.rows += [] if chosen.quick or chosen.only != [""] else differentiated.smooth(world)
        if case in truth.DECODERS and not chosen.quick:
            contest.rows += differentiated.without_a_hundredth(contest, world, world.halves, chosen.threads)
        rows, failed = rows + contest.rows, failed + contest.failed
    return [{**r, "bench": "metagrad"} for r in rows], failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer halves and contestants; R0 alone unless told")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--cases", type=lambda text: text.split(","), help=f"{','.join(CASES)} (or R0 with --quick)")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where banks and models are kept ({CACHE})")
    parser.add_argument("--images", type=Path, help="of R2: an .npz, or the folder of MNIST's own four files")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each contestant")
    parser.add_argument("--peers", type=Path, help="the peers' python")
    only = "of lds: contestants whose name has one of these"
    parser.add_argument("--only", type=lambda text: text.split(","), default=[""], help=only)
    chosen = parser.parse_args()

    chosen.cases = chosen.cases or (["R0"] if chosen.quick else list(CASES))
    for name, known in (("cases", CASES), ("parts", PARTS)):
        unknown = set(getattr(chosen, name)) - set(known)
        if unknown:
            parser.error(f"no such {name}: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    from benchmarks.influence import finish

    rows: list[Row] = []
    failed: list[str] = []
    if "lds" in chosen.parts:
        rows, failed = lds_rows(chosen)
    if "cost" in chosen.parts:
        from benchmarks.parts import peers, reversal

        rows += reversal.rows(chosen.quick, chosen.threads, peers.interpreter(chosen.peers))
    if "mgd" in chosen.parts:
        from benchmarks.parts import descent

        rows += descent.rows(chosen.quick, chosen.threads)
    if "ordering" in chosen.parts:
        from benchmarks.parts import ordering

        rows += ordering.rows(chosen.quick, chosen.threads)
    finish(rows, failed, chosen.json, [])


if __name__ == "__main__":
    main()
