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
    for seed in range(2):
        recipe = Recipe(steps=6, terms_per_step=20, seed=seed)
        visits = Counter(plain.ids[k] for b in islice(steps(recipe, plain, np.ones(60, dtype=int)), 6) for k in b)
        orders = opened(tmp_path / "run", seed)
        for name, order in orders.items():
            assert order.ordered and Counter(order.ids.tolist()) == visits
            chosen = Selection.open(tmp_path / "run" / "selections" / name)
            assert np.array_equal(chosen.ids, plain.ids) and not chosen.ordered
        assert np.array_equal(orders["back"].ids, orders["phases"].ids[::-1])
    losses = {arm["name"]: arm["judged_loss"] for arm in result["arms"]}
    assert len({losses[name] for name in ("plain", "phases", "back", "easy")}) == 4
    assert result["study"]["arms"][-1]["order"] == {"name": "loss_sorted"} and "order" not in result["study"]["arms"][1]


def opened(run: Path, seed: int) -> dict[str, Selection]:
    """What each ordered arm is trained on at a seed."""
    return {path.name: Selection.open(path / str(seed)) for path in sorted((run / "orders").iterdir())}


def test_an_order_is_drawn_anew_for_each_seed(tmp_path: Path) -> None:
    """So that the interval knows of its luck; what is shuffled is then the very training of an arm without an order."""
    again = {"name": "shuffled", "seed": 7}
    arms = [("plain", None), ("same", "shuffled"), ("other", again), ("late", "anneal"), ("hard", "loss_sorted")]
    asked = study([{"name": n, "method": PHASED, **({"order": o} if o else {})} for n, o in arms])
    result = run_study(asked, tmp_path / "run", workers=1)
    first, second = (opened(tmp_path / "run", seed) for seed in range(2))
    assert all(not np.array_equal(first[name].ids, second[name].ids) for name in ("same", "other", "late"))
    found = {arm["name"]: arm for arm in result["arms"]}
    assert found["same"]["judged_loss"] == found["plain"]["judged_loss"] and found["same"]["ci"] == found["plain"]["ci"]
    assert found["other"]["judged_loss"] != found["plain"]["judged_loss"], "a seed of its own is another draw"
    late = [sorted(o["late"].ids[-36:].tolist()) for o in (first, second)]
    assert late[0] == late[1], "the best come last at both seeds, though in another sequence"


def test_orders_are_refused_where_they_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no order called 'best'"):
        study([{"name": "x", "method": PHASED, "order": "best"}])
    with pytest.raises(InputError, match="no phases"):
        run_study(study([{"name": "x", "method": "loss", "order": "best_phase"}]), tmp_path / "run", workers=1)
    asked = study([], methods=["random", {"name": "length", "order": "reversed"}])
    from assay.core.pool import Pool

    with pytest.raises(InputError, match="an order does nothing here"):
        entries(asked, Pool.from_columns({"text": ["a", "b"]}))
