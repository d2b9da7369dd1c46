"""RDS+ against a round robin in plain loops, and the means of hidden states that it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.core.keys import encode_ids, shuffled
from assay.core.method import Featurizer, Scorer, Selector, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Budget
from assay.core.table import Table
from assay.measure import Measurer
from assay.scorers.rds import round_robin
from assay.train.models import init_params
from helpers import language, text_pool

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(out: Path, x: np.ndarray, y: np.ndarray, ids: list[str] | None = None, **options: Any) -> Table:
    ids = ids or [f"{i:04d}" for i in range(len(x))]
    pool = Pool.from_columns({"id": ids, "x": x.tolist()})
    target = Pool.from_columns({"id": [f"q{i}" for i in range(len(y))], "x": y.tolist()})
    run = Run.open(out, {"name": "vectors"})
    run.close()
    method = {"name": "rds", "features": {"name": "column", "column": "x", "store": "float32"}}
    return Measurer(run, pool, target, **options).table(make(Scorer, method)).align(encode_ids(sorted(ids)))


def slowly(x: np.ndarray, y: np.ndarray) -> tuple[list[int], list[float]]:
    """What the round robin takes, turn by turn, and the cosines."""
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    turns = shuffled(encode_ids([f"q{i}" for i in range(len(y))]), "turn")
    left, order, cosines = set(range(len(x))), [], []
    while left:
        asking = y[turns[len(order) % len(y)]]
        best = max(left, key=lambda i: float(x[i] @ asking))
        left.remove(best)
        order.append(best)
        cosines.append(float(x[best] @ asking))
    return order, cosines


@pytest.mark.parametrize(("n", "m"), [(90, 7), (5, 9), (200, 1)])
def test_scores_are_the_order_of_the_round_robin(tmp_path: Path, n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 6)), rng.normal(size=(m, 6))
    table = measured(tmp_path, x, y)
    order, cosines = slowly(x, y)
    assert np.argsort(-table.column("score")).tolist() == order
    np.testing.assert_allclose(table.column("score")[order], 1 - np.arange(n) / n)
    np.testing.assert_allclose(table.column("cosine")[order], cosines, atol=1e-6)


def test_the_cut_takes_what_so_many_turns_take(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 6)), rng.normal(size=(4, 6))
    table = measured(tmp_path, x, y)
    for k in (1, 4, 13):
        chosen = make(Selector, "cut").select(table, np.ones(60, dtype=int), Budget(k, "examples"), barred={})
        assert [int(i) for i in chosen.ids.tolist()] == slowly(x, y)[0][:k]


def test_targets_that_are_all_alike_take_turns_down_one_list(tmp_path: Path) -> None:
    x = np.random.default_rng(2).normal(size=(150, 5))
    table = measured(tmp_path, x, np.repeat(x[:1], 3, axis=0))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.argsort(-table.column("score")).tolist() == np.argsort(-(unit @ unit[0])).tolist()


def test_ties_fall_by_a_hash_of_the_id(tmp_path: Path) -> None:
    """Equal vectors: the order is that of `shuffled(ids, 'tie')`, wherever they stand."""
    x = np.ones((40, 3))
    ids = [f"{i:04d}" for i in range(40)]
    mixed = np.random.default_rng(0).permutation(40)
    one = measured(tmp_path / "one", x, np.eye(3), ids)
    other = measured(tmp_path / "other", x, np.eye(3), [ids[i] for i in mixed])
    assert np.argsort(-one.column("score")).tolist() == shuffled(encode_ids(ids), "tie").tolist()
    assert one.values.tobytes() == other.values.tobytes()


def test_order_shards_blocks_and_workers_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(120, 6)), rng.normal(size=(5, 6))
    x[60:] = x[:60]  # ties everywhere
    ids, mixed = [f"{i:04d}" for i in range(120)], rng.permutation(120)
    one = measured(tmp_path / "one", x, y, ids)
    assert measured(tmp_path / "m", x[mixed], y, [ids[i] for i in mixed]).values.tobytes() == one.values.tobytes()
    assert measured(tmp_path / "s", x, y, ids, shard=5, workers=2).values.tobytes() == one.values.tobytes()
    for name, value in (("CELLS", 130), ("BLOCK", 7), ("WINDOW", 1)):
        monkeypatch.setattr(f"assay.scorers.rds.{name}", value)
    found = measured(tmp_path / "blocks", x, y, ids)
    assert (found.column("score") == one.column("score")).all()


def test_round_robin_by_hand() -> None:
    order = np.array([[2, 0, 1, 3], [2, 3, 0, 1], [0, 2, 3, 1]])
    assert round_robin(order).tolist() == [2, 3, 0, 1]


def test_position_weighted_means_of_hidden_states(tmp_path: Path) -> None:
    """r = sum_t t h_t / sum_t t over a text's own tokens, one text at a time and without padding."""
    pool = text_pool(20)
    task, encoded = language(pool, tmp_path / "pool")
    params = init_params(task.module, 0)
    run = Run.open(tmp_path / "run", {"name": "embed"})
    run.close()
    encodings = {pool.fingerprint: tmp_path / "pool"}
    found = {}
    for pooling in ("mean", "position"):
        method = make(Featurizer, {"name": "embed", "pooling": pooling, "store": "float32"})
        measurer = Measurer(run, pool, pool, task=task, models=[params], encodings=encodings, key="k")
        found[pooling] = measurer.table(method).values
    for row in range(20):
        hidden = task.hidden(params, encoded.inputs(np.array([row])))[0].detach().double()
        t = torch.arange(1, len(hidden) + 1, dtype=torch.float64)
        for pooling, weights in (("mean", torch.ones_like(t)), ("position", t)):
            mean = (weights[:, None] * hidden).sum(dim=0) / weights.sum()
            np.testing.assert_allclose(found[pooling][row], (mean / mean.norm()).numpy(), atol=1e-5)
    assert make(Scorer, "rds").spec()["features"]["pooling"] == "position"
