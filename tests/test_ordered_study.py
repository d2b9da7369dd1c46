"""Orders in a study: what is trained is the same visits in another sequence, and nothing else of the arm changes."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.core.errors import InputError
from assay.core.selection import Selection
from assay.job import run_study
from assay.study import parse
from assay.train.loop import steps
from assay.train.recipe import Recipe
from assay.trust.contest import entries

pytestmark = pytest.mark.usefixtures("one_thread")

PHASED = {"name": "metagrad", "phases": 2, "check": 0}


def study(arms: list[dict[str, Any]], **more: Any) -> Any:
    recipe = {"optimiser": "sgd", "lr": 0.3, "terms_per_step": 20, "clip": 0.0}
    return parse(
        {
            "pool": {"builtin": "digits", "size": 100}, "target": {"count": 40}, "budget": "60%",
            "task": {"kind": "classifier"}, "proxy": {"steps": 10, "recipe": recipe},
            "train": {"repeats": 2, "recipe": recipe}, "verify": {"seeds": 2, "random": 1}, "methods": ["random"],
            "arms": arms, **more,
        }
    )  # fmt: skip


def test_arms_differ_in_order_alone(tmp_path: Path) -> None:
    asked = study(
        [
            {"name": "plain", "method": PHASED},
            {"name": "phases", "method": PHASED, "order": "best_phase"},
            {"name": "back", "method": PHASED, "order": ["best_phase", "reversed"]},
            {"name": "easy", "method": PHASED, "order": {"name": "loss_sorted"}},
        ]
    )
    result = run_study(asked, tmp_path / "run", workers=1)
    plain = Selection.open(tmp_path / "run" / "selections" / "plain")
    recipe = Recipe(steps=6, terms_per_step=20, seed=0)
    visits = Counter(plain.ids[k] for b in islice(steps(recipe, plain, np.ones(60, dtype=int)), 6) for k in b)
    orders = {name: Selection.open(tmp_path / "run" / "orders" / name) for name in ("phases", "back", "easy")}
    for name, order in orders.items():
        assert order.ordered and Counter(order.ids.tolist()) == visits
        chosen = Selection.open(tmp_path / "run" / "selections" / name)
        assert np.array_equal(chosen.ids, plain.ids) and not chosen.ordered
    assert np.array_equal(orders["back"].ids, orders["phases"].ids[::-1])
    losses = {arm["name"]: arm["judged_loss"] for arm in result["arms"]}
    assert len({losses[name] for name in ("plain", *orders)}) == 4
    assert result["study"]["arms"][-1]["order"] == {"name": "loss_sorted"} and "order" not in result["study"]["arms"][1]


def test_orders_are_refused_where_they_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no order called 'best'"):
        study([{"name": "x", "method": PHASED, "order": "best"}])
    with pytest.raises(InputError, match="no phases"):
        run_study(study([{"name": "x", "method": "loss", "order": "best_phase"}]), tmp_path / "run", workers=1)
    asked = study([], methods=["random", {"name": "length", "order": "reversed"}])
    from assay.core.pool import Pool

    with pytest.raises(InputError, match="an order does nothing here"):
        entries(asked, Pool.from_columns({"text": ["a", "b"]}))
