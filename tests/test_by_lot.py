"""A selection that fell by lot is a random draw itself: how much of it did, and what that does to its interval."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from assay.core.keys import encode_ids
from assay.core.method import Scorer, Selector, make
from assay.core.selection import Budget
from assay.core.table import Table
from assay.summary import LOT, by_lot
from assay.verify import compare, verify

COUNT = 10


def job(method: Any, scores: list[float], select: Any = "cut", barred: dict[str, np.ndarray] | None = None) -> Any:
    """What `by_lot` reads of a job with the one arm `own`, of which half of the pool is chosen."""
    ids = encode_ids(f"{k:02}" for k in range(len(scores)))
    table, sizes = Table(ids, ["score"], np.array(scores, dtype=float)[:, None]), np.full(len(scores), 3)
    selector, scorer = make(Selector, select), make(Scorer, method)
    chosen = selector.select(table, sizes, Budget(len(scores) // 2, "examples"), barred=barred or {})
    return SimpleNamespace(
        pool=SimpleNamespace(ids=ids), sizes=sizes, methods={"own": scorer}, selectors={"own": selector},
        selections={"own": chosen}, measurer=SimpleNamespace(table=lambda _: table),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "scores", "select", "share"),
    [
        ("exact_dup", [0] * 10, "cut", 1.0),  # nothing is a copy
        ("exact_dup", [0, 0, 0, 0, 0, -1, -1, -1, -1, -1], "cut", 0.0),  # the cut is where the scores change
        ("gopher", [0, 0, 0, -1, -1, -1, -1, -2, -2, -2], "cut", 0.4),  # two of four
        ("bm25", list(range(10)), "cut", 0.0),
        ("random", list(range(10)), "cut", 1.0),  # no ties, and yet all luck
        ("dsir", list(range(10)), {"name": "cut", "temperature": 0.5}, 1.0),
    ],
)  # fmt: skip
def test_the_share_that_chance_chose(method: str, scores: list[float], select: Any, share: float) -> None:
    assert by_lot(job(method, scores, select), "own") == pytest.approx(share)


def test_a_draw_from_what_filters_left_is_a_draw() -> None:
    ids = encode_ids(f"{k:02}" for k in range(COUNT))
    assert by_lot(job("random", list(range(10)), barred={"gopher: words below 50": ids[:3]}), "own") == 1.0


def test_everything_and_an_empty_selection_are_no_draws() -> None:
    assert by_lot(job("bm25", list(range(10))), "everything") == 0.0
    none = job("exact_dup", [0] * 10, barred={"gone": encode_ids(f"{k:02}" for k in range(COUNT))})
    assert by_lot(none, "own") == 0.0


def equal(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Four draws of one kind `[seeds, items]`, of which one is called `filter`."""
    item, seed = rng.normal(2, 0.5, 60), rng.normal(0, 0.05, (5, 1))
    names = ["random-1", "random-2", "random-3", "filter"]
    return {
        n: item + seed + rng.normal(0, 0.03) + rng.normal(0, 0.01, (5, 1)) + rng.normal(0, 0.05, (5, 60)) for n in names
    }


def test_equal_draws_are_seldom_told_apart() -> None:
    """The luck of an arm's draw is in its interval; without it, more than one in ten is called better or worse."""
    rng, wrong = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(300):
        losses = equal(rng)
        for known in wrong:
            found = verify(losses, drawn=["filter"] if known else [])["filter"]
            wrong[known] += found["verdict"] != "unresolved"
    assert wrong[True] <= 300 * 0.05 + 3 * (300 * 0.05 * 0.95) ** 0.5 and wrong[False] > 30


def test_only_what_fell_by_lot_is_widened() -> None:
    losses = equal(np.random.default_rng(1))
    losses["ranked"] = losses["filter"]
    found, draws = verify(losses, drawn={"filter"}), np.stack([losses[f"random-{k}"] for k in (1, 2, 3)])
    for name, draw in (("filter", True), ("ranked", False)):
        assert {k: found[name][k] for k in ("gain", "ci", "verdict")} == compare(losses[name], draws, draw=draw)
    assert np.ptp(found["filter"]["ci"]) > np.ptp(found["ranked"]["ci"]) and 0 < LOT < 1
