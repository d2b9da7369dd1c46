"""What per-example gradients cost: our engine, a plain training step and the peers that are installed, in one run.

    python benchmarks/gradients.py [--quick] [--json FILE] [--peers PYTHON] [--documents N] [--parts engine,peers,...]

Parts: engine (the inner loop and the command line, two models), peers (bergson, dattri, traker: whole processes on the
documents of the smaller model), projection (sparse against dense Gaussian), r0 (what forward passes foretell), pool
(peak memory by pool size). `ratio_to_training` is seconds a token over those of transformers' forward and backward
pass. The peers' python is `--peers`, or ASSAY_PEERS; see benchmarks/requirements-peers.txt.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.core import Row, written  # noqa: E402

PARTS = ("engine", "peers", "projection", "r0", "pool")


def engine_and_peers(chosen: Any) -> list[Row]:
    """The engine's two models; the peers on the documents of the smaller, right after our own whole process."""
    from benchmarks.parts import engine, peers
    from benchmarks.parts.world import world

    found: list[Row] = []
    quick = chosen.quick
    with tempfile.TemporaryDirectory(prefix="assay-world-") as folder:
        small = world(Path(folder, "small"), 400 if quick else chosen.documents)
        large = world(Path(folder, "large"), 100 if quick else chosen.documents // 5, layers=6, width=384)
        for place in (small, large) if "engine" in chosen.parts else ():
            inner, base = engine.inner(place, quick)
            found += inner + engine.end_to_end(place, base, 1)
        if "peers" in chosen.parts:
            found += peers.rows(True, len(small.lengths), chosen.peers, small, threads=engine.CORES)
    return found


def others(chosen: Any) -> list[Row]:
    found: list[Row] = []
    if "projection" in chosen.parts:
        from benchmarks.parts import projection

        found += projection.rows(chosen.quick)
    if "r0" in chosen.parts:
        from benchmarks.parts import r0

        found += r0.rows(chosen.quick)
    if "pool" in chosen.parts:
        from benchmarks.parts import pool_size

        found += pool_size.rows(chosen.quick)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, fewer documents")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--peers", type=Path, help="the peers' python")
    parser.add_argument("--documents", type=int, default=20_000, help="of the smaller model; the larger takes a fifth")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    chosen = parser.parse_args()
    unknown = set(chosen.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    rows = engine_and_peers(chosen) if {"engine", "peers"} & set(chosen.parts) else []
    rows += others(chosen)
    for r in rows:
        tool = "" if r["tool"] == "assay" else r["tool"]
        print(f"{r['case']:<16} {tool:<16} {r['method']:<36} {r['metric']:<22} {r['value']:>14,.3f}")
    written(rows, chosen.json)


if __name__ == "__main__":
    main()
