"""Languages and rules on real documents with known defects, where they are at hand: here, or in $ASSAY_DATA."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from assay.core.method import Scorer, make

DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[2] / "shared" / "data")) / "domains"
pytestmark = pytest.mark.skipif(
    not (DATA / "defects.parquet").exists(),
    reason=f"no real documents at {DATA}: set ASSAY_DATA to a folder that has them",
)


@pytest.fixture(scope="module")
def clean() -> list[str]:
    texts = pq.read_table(DATA / "domains.parquet", columns=["text"])["text"].slice(0, 3000).to_pylist()
    return [t for t in texts if len(t) > 200]


@pytest.fixture(scope="module")
def faulty() -> list[dict[str, Any]]:
    rows = pq.read_table(DATA / "defects.parquet", columns=["text", "defect", "kind"]).to_pylist()
    return [r for r in rows[::4] if len(r["text"]) > 200]


def scores(name: str, texts: list[str]) -> np.ndarray:
    return make(Scorer, name).score(None, SimpleNamespace(column=lambda _: texts))  # type: ignore[arg-type]


def test_foreign_documents_are_found_at_one_percent_false_drops(clean, faulty):
    pytest.importorskip("py3langid")
    foreign = scores("language", [r["text"] for r in faulty if r["defect"] == "foreign"])
    bound = np.quantile(scores("language", clean)[:, 0], 0.01)
    assert len(foreign) > 500 and (foreign[:, 0] < bound).mean() >= 0.98


def test_what_gopher_drops_as_published_and_what_it_lets_pass(clean, faulty):
    """Loops, text without blanks and hexadecimal go; shuffled words pass as easily as clean text does."""
    dropped = {
        kind: (scores("gopher", [r["text"] for r in faulty if r["kind"] == kind])[:, 0] < 0).mean()
        for kind in ("loop", "no_spaces", "hex", "word_shuffle", "spliced")
    }
    assert min(dropped["loop"], dropped["no_spaces"], dropped["hex"]) >= 0.98
    false = (scores("gopher", clean)[:, 0] < 0).mean()
    assert max(dropped["word_shuffle"], dropped["spliced"]) < false + 0.05
