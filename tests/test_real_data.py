"""On real documents with known defects, where they are at hand: beside the checkout, or in $ASSAY_DATA."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from assay.core.pool import Pool
from assay.data.ingest import ingest
from assay.data.readers import Source
from assay.scorers.exact_dup import ExactDup

DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[2] / "shared" / "data")) / "domains"
pytestmark = pytest.mark.skipif(
    not (DATA / "defects.parquet").exists(),
    reason=f"no real documents at {DATA}: set ASSAY_DATA to a folder that has them",
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Pool, set[str]]:
    """A thousand exact copies, their originals and a thousand near duplicates, read through the readers."""
    columns = ["id", "text", "domain", "defect", "of"]
    defects = pq.read_table(DATA / "defects.parquet", columns=columns)
    kind = lambda name: defects.filter(pa.compute.equal(defects["defect"], name)).slice(0, 1000)  # type: ignore[attr-defined]  # noqa: E731
    copies, near = kind("exact_dup"), kind("near_dup")
    originals = pq.read_table(DATA / "domains.parquet", columns=["id", "text", "domain"])
    wanted = pa.array(sorted(set(copies["of"].to_pylist()) | set(near["of"].to_pylist())))
    originals = originals.filter(pa.compute.is_in(originals["id"], wanted))  # type: ignore[attr-defined]
    keep = ["id", "text", "domain"]
    path = tmp_path_factory.mktemp("real")
    pq.write_table(pa.concat_tables([originals, copies.select(keep), near.select(keep)]), path / "mixed.parquet")
    pool = ingest(Source(paths=str(path / "mixed.parquet"), id="id"), path / "pool")
    return pool, set(copies["of"].to_pylist())


def test_reader_keeps_every_real_row(mixed):
    pool, _ = mixed
    assert len(pool) > 3000 and len(set(pool.ids.tolist())) == len(pool)
    assert min(map(len, pool.column("text"))) >= 100 and len(set(pool.domains().tolist())) >= 10


def test_exact_duplicates_of_real_documents_are_found_and_nothing_else(mixed):
    pool, _ = mixed
    scorer = ExactDup()
    state = scorer.init(SimpleNamespace(pool=pool))  # type: ignore[arg-type]
    scores = scorer.score(state, SimpleNamespace(ids=pool.ids))[:, 0]  # type: ignore[arg-type]
    classes: dict[str, list[bytes]] = {}
    for identity, text in zip(pool.ids.tolist(), pool.column("text"), strict=True):
        classes.setdefault(" ".join(text.lower().split()), []).append(identity)
    expected = {i for ids in classes.values() for i in sorted(ids)[1:]}
    assert {i for i, s in zip(pool.ids.tolist(), scores, strict=True) if s < 0} == expected
    assert len(expected) >= 1000, "each of the thousand planted copies has its original in the pool"
    assert np.all(scores <= 0)


def test_semantic_duplicates_of_real_documents(tmp_path):
    """Near copies of 300 documents among 700 others, by hashed words and pairs of words."""
    from sklearn.feature_extraction.text import HashingVectorizer

    from assay.core.method import Scorer, make
    from assay.core.run import Run
    from assay.measure import Measurer

    defects = pq.read_table(DATA / "defects.parquet", columns=["id", "text", "defect", "of", "jaccard5"])
    near = defects.filter(pa.compute.equal(defects["defect"], "near_dup")).slice(0, 300)  # type: ignore[attr-defined]
    near = near.filter(pa.compute.greater_equal(near["jaccard5"], 0.7)).to_pydict()  # type: ignore[attr-defined]
    texts = dict(
        zip(*pq.read_table(DATA / "domains.parquet", columns=["id", "text"]).to_pydict().values(), strict=True)
    )
    known = {of: text for of, text in zip(near["of"], near["text"], strict=True) if of in texts}
    others = [i for i in texts if i not in known][:700]
    ids = [*known, *(f"{of}-near" for of in known), *others]
    rows = HashingVectorizer(n_features=512, ngram_range=(1, 2)).transform(
        [*(texts[of] for of in known), *known.values(), *(texts[i] for i in others)]
    )
    pool = Pool.from_columns({"id": ids, "x": np.asarray(rows.todense()).tolist()})  # type: ignore[attr-defined]
    run = Run.open(tmp_path, {"name": "real"})
    run.close()
    method = make(Scorer, {"name": "semdedup", "features": {"name": "column", "column": "x"}})
    scores = Measurer(run, pool, pool.at([0])).table(method).column("score")
    gone = {identity for identity, score in zip(ids, scores, strict=True) if score < 0.1}
    found = sum(of in gone or f"{of}-near" in gone for of in known)
    right = sum(identity.removesuffix("-near") in known for identity in gone)
    assert len(known) > 200 and found >= 0.98 * len(known) and right >= 0.98 * len(gone)
