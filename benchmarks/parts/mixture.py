"""What the presets of rules leave of clean documents, by domain: how far a filter for prose changes the mixture.

    python benchmarks/filters.py --parts mixture

`kept`: the share of a domain's documents, no planted defects, that the first preset of each scorer lets pass;
`kind` is the domain, `all` for the whole. `flagged` is true where `assay run` would warn: less than half of what is
kept of the other domains.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[3] / "shared" / "data")) / "domains"
RULES = ("gopher", "c4", "fineweb", "refinedweb", "language")


def rows(data: Path, quick: bool, peer: Path | None, threads: int) -> list[Row]:
    """`peer` and `threads` are not used: a share has no speed."""
    del peer, threads
    import pyarrow.parquet as pq

    from assay import filters
    from assay.core.pool import Pool
    from assay.core.run import Run
    from assay.measure import Measurer

    table = pq.read_table(data / "domains.parquet", columns=["id", "text", "domain"])
    pool, found = Pool.from_columns(table.slice(0, 8000) if quick else table), []
    ones, none = np.ones(len(pool)), np.zeros(len(pool), dtype=bool)
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        run = Run.open(Path(folder, "run"), {"name": "mixture"})
        measurer, domains = Measurer(run, pool, pool), pool.domains()
        for name in RULES:
            start, one = time.perf_counter(), filters.parse(name)
            stage = filters.sift([one], [measurer.table(one.method)], ones, domains, none).stages[-1]
            seconds, flagged = time.perf_counter() - start, {entry["domain"] for entry in stage["starved"]}
            whole = {"in": stage["in"]["rows"], "out": stage["out"]["rows"]}
            for domain, counts in [("all", whole), *stage["domains"].items()]:
                found.append({
                    "bench": "filters", "case": "mixture", "tool": "assay", "method": name, "metric": "kept",
                    "value": counts["out"] / counts["in"], "ci": None, "seconds": seconds, "kind": domain,
                    "documents": counts["in"], "flagged": domain in flagged,
                })  # fmt: skip
        run.close()
    return found
