"""Head, middle and tail of a pool, by hand and against the losses that the model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from assay.core.method import Batch, Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Budget
from assay.core.table import Table
from assay.measure import Measurer
from assay.selectors.cut import Cut
from assay.train.models import init_params
from helpers import language, text_pool

pytestmark = pytest.mark.usefixtures("one_thread")


class MinusGiven(Scorer):
    """Minus a column: losses that are chosen by hand.

    Formula: s_i = -x_i
    Reference: none
    """

    unit: ClassVar[str] = "minus nats per term"

    def score(self, state: Any, batch: Batch) -> Any:
        return -np.array([float(t) for t in batch.column("text")])


def placed(out: Path, losses: list[float], **fields: Any) -> tuple[Scorer, Table]:
    run = Run.open(out, {"name": "perplexity"})
    run.close()
    pool = Pool.from_columns({"text": [str(x) for x in losses]})
    method = make(Scorer, {"name": "perplexity", "of": MinusGiven(), **fields})
    return method, Measurer(run, pool, pool).table(method)


def test_quantiles_by_hand(tmp_path: Path) -> None:
    """The share of the pool with a lower loss: ties share a place, and nothing is lower than the lowest."""
    _, table = placed(tmp_path / "0", [3.0, 1.0, 2.0, 2.0, 9.0])
    np.testing.assert_allclose(table.column("quantile"), [0.6, 0.0, 0.2, 0.2, 0.8])
    np.testing.assert_allclose(table.column("loss"), [3, 1, 2, 2, 9])
    np.testing.assert_allclose(table.column("score"), [-0.6, 0.0, -0.2, -0.2, -0.8])
    for centre, best in ((0.0, "1.0"), (0.6, "3.0"), (1.0, "9.0")):
        _, table = placed(tmp_path / f"{centre}", [3.0, 1.0, 2.0, 2.5, 9.0], centre=centre)
        chosen = Cut().select(table, np.ones(5, dtype=np.int64), Budget(1, "examples"), barred={})
        assert chosen.ids[0] == table.ids[[3.0, 1.0, 2.0, 2.5, 9.0].index(float(best))]


def test_presets_cut_the_pool_in_thirds(tmp_path: Path) -> None:
    """Head, middle and tail are a third each, in the order of the loss, and each example is in one of them."""
    losses = np.random.default_rng(0).permutation(90).astype(float).tolist()
    method, table = placed(tmp_path, losses)
    parts = []
    for name in ("head", "middle", "tail"):
        bounds: Any = dict(method.presets[name])
        kept = Cut(bounds=bounds).select(table, np.ones(90, dtype=np.int64), Budget(90, "examples"), barred={})
        parts.append(set(table.align(kept.ids).column("loss").tolist()))
    assert list(method.presets) == ["head", "middle", "tail"]
    # The one example that stands on a border is in both.
    assert parts[0] == set(range(31)) and parts[1] == set(range(30, 61)) and parts[2] == set(range(60, 90))


def test_it_reads_the_scoring_model_and_a_shift_changes_nothing(tmp_path: Path) -> None:
    """The order at centre 0 is that of `loss`; quantiles do not change when all losses grow alike."""
    pool = text_pool(30)
    task, _ = language(pool, tmp_path / "pool")
    run = Run.open(tmp_path / "run", {"name": "perplexity"})
    run.close()
    at = Measurer(
        run, pool, pool, task=task, models=[init_params(task.module, 1)], key="k",
        encodings={pool.fingerprint: tmp_path / "pool"},
    )  # fmt: skip
    loss = at.table(make(Scorer, "loss")).values[:, 0]
    made = at.table(make(Scorer, "perplexity"))
    np.testing.assert_allclose(made.column("loss"), -loss)
    assert (np.argsort(-made.column("score"), kind="stable") == np.argsort(-loss, kind="stable")).all()
    found = [placed(tmp_path / str(c), [x + c for x in (3.0, 1.0, 7.0)])[1].column("quantile") for c in (0.0, 5.0)]
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("losses", [[*range(10)], [0, 1, 1, 1, 1, 2, 2, 3, 4], [5, 5, 5], [1, 2], [7], [*range(300)]])
def test_the_thresholds_that_are_noted_are_those_of_the_presets(tmp_path: Path, losses: list[float]) -> None:
    method, table = placed(tmp_path, [float(x) for x in losses[::-1]])
    noted, loss, quantile = table.meta["notes"]["thirds of the pool by loss"], table.column("loss"), table.column(
        "quantile"
    )  # fmt: skip
    (_, head), (tail, _) = (method.presets[name]["quantile"] for name in ("head", "tail"))
    assert head is not None and tail is not None
    np.testing.assert_array_equal(loss <= noted["head"], quantile <= head)
    np.testing.assert_array_equal(loss > noted["tail"], quantile >= tail)
