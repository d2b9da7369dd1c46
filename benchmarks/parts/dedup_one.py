"""One scorer over a pool on disk, as a process of its own: `python dedup_one.py POOL '{"name": "minhash"}' [WORKERS]`.

Prints seconds of work without imports: opening the pool, `init`, `score` and writing the checked Table; and the CPU
seconds of this process, which say more on a machine that others use.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch  # noqa: F401  # loaded before the clock starts, as the other side's packages are

from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.measure import Measurer


def main() -> None:
    path, spec = Path(sys.argv[1]), json.loads(sys.argv[2])
    workers = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    if spec["name"] == "minhash":
        import rensa  # noqa: F401
        import scipy.sparse.csgraph  # noqa: F401
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        run = Run.open(Path(folder, "run"), {"name": "benchmark"})
        run.close()
        start, spent = time.perf_counter(), time.process_time()
        pool = Pool.open(path)
        target = Pool.from_columns({"text": ["a target that these scorers do not read"]})
        table = Measurer(run, pool, target, workers=workers, shard=2048).table(make(Scorer, spec))
        seconds, spent = time.perf_counter() - start, time.process_time() - spent
        removed = int((table.column("score") < 0).sum())
    print(json.dumps({"seconds": seconds, "cpu": spent, "documents": len(table), "removed": removed}))


if __name__ == "__main__":
    main()
