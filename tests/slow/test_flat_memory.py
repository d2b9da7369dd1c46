"""Ten times the pool: the same memory, and the same time a document."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not (ROOT / "benchmarks" / "parts").exists(), reason="the package is installed without benchmarks")
def test_memory_and_pace_do_not_depend_on_the_size_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("benchmarks", None)
    from benchmarks.parts.pool_size import rows

    found = {(row["case"], row["metric"]): row["value"] for row in rows()}
    for metric in ("peak_rss_bytes", "seconds_per_document"):
        small, large = found["pool-20k", metric], found["pool-200k", metric]
        assert large < 1.1 * small, f"{metric}: {small:.3g} at 20,000 documents, {large:.3g} at 200,000"
