"""Copies and leaks in real documents whose defects are known, where they are at hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("ASSAY_DATA", ROOT.parent / "shared" / "data"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    not (DATA / "domains" / "defects.parquet").exists(),
    reason=f"no real documents at {DATA}: set ASSAY_DATA to a folder that has them",
)
def test_known_copies_and_leaks_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("benchmarks", None)
    from benchmarks.parts import duplicates

    clean = pq.read_table(DATA / "domains" / "domains.parquet", columns=["id", "text", "domain"])
    defects = pq.read_table(DATA / "domains" / "defects.parquet")
    some = clean.slice(0, 8000)
    found: list[dict[str, Any]] = duplicates.exact(tmp_path / "exact", some, clean, defects)
    assert [row["value"] for row in found] == [1.0, 1.0]
    found = duplicates.near(tmp_path / "near", some, clean, defects)
    deciles = [row for row in found if "within_3_sd" in row]
    assert len(deciles) == 10 and all(row["within_3_sd"] for row in deciles), deciles
    assert min(row["value"] for row in found if row["metric"] == "precision") >= 0.99
    recall = {row["method"]: row["value"] for row in duplicates.leaks(DATA, some, defects)}
    assert recall["gate verbatim"] == recall["gate embedded"] == 1.0
