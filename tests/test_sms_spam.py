"""The classifier and its nulls on real messages, where they are at hand: beside the checkout, or in $ASSAY_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.measure import Measurer
from assay.numerics.stats import auc

fasttext = pytest.importorskip("fasttext")

DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[2] / "shared" / "data")) / "sms_spam"
pytestmark = pytest.mark.skipif(
    not (DATA / "sms_spam.parquet").exists(),
    reason=f"no messages at {DATA}: set ASSAY_DATA to a folder that has them",
)


def test_spam_is_told_from_other_messages_and_the_nulls_do_worse(tmp_path: Path) -> None:
    """Positives are 300 spam messages, the pool is all others, spam among them: it ranks first, though the pool's own
    spam stood among the negatives. Length and punctuation alone know less, and this is noted."""
    table = pq.read_table(DATA / "sms_spam.parquet", columns=["id", "text", "label"])
    order = np.random.default_rng(0).permutation(table.num_rows)
    texts, labels = (
        np.array(table["text"].to_pylist(), dtype=object)[order],
        np.array(table["label"].to_pylist())[order],
    )
    first = np.unique(texts, return_index=True)[1]  # copies would be in both
    texts, labels = texts[first], labels[first]
    spam = np.flatnonzero(labels == "spam")
    target, rest = texts[spam[:300]], np.delete(np.arange(len(texts)), spam[:300])
    run = Run.open(tmp_path, {"name": "sms"})
    run.close()
    at = Measurer(
        run, Pool.from_columns({"text": texts[rest].tolist()}), Pool.from_columns({"text": target.tolist()})
    )  # fmt: skip
    small = {"name": "fasttext", "bucket": 50_000, "dim": 10}
    areas = {
        features: auc(at.table(make(Scorer, {**small, "features": features})).column("score"), labels[rest] == "spam")
        for features in ("words", "length", "punctuation")
    }
    assert areas["words"] > 0.93, areas
    assert max(areas["length"], areas["punctuation"]) < areas["words"] - 0.04, areas
    notes = at.table(make(Scorer, small)).meta["notes"]["fasttext beside classifiers that see no word"]
    assert notes["auc"]["words"] > max(notes["auc"]["length"], notes["auc"]["punctuation"])
