"""Orderings: every visit is kept, pool order never matters, phases hold equal terms, and the best phase is the best."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay import ordering
from assay.core.errors import InputError
from assay.core.keys import encode_ids
from assay.core.selection import Selection
from assay.core.table import Table
from assay.ordering import (
    ORDERS,
    anneal,
    best_phase,
    curriculum,
    fitted,
    loss_sorted,
    repeated,
    reversed_,
    shuffled,
    visits,
)
from assay.train.loop import steps, train
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from helpers import prepared, vector_pool

N, PASSES, PHASES = 12, 3, 4


def selection(n: int = N, passes: int = PASSES) -> Selection:
    ids = encode_ids(f"z{(7 * i) % n:03d}" for i in range(n))
    return repeated(Selection(ids, 1.0 + np.arange(n) / n), passes)


def columns(chosen: Selection, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Utility by phase and terms, by id."""
    rng = np.random.default_rng(seed)
    number = np.array([int(i[1:]) for i in chosen.ids.tolist()])
    return rng.normal(size=(1000, PHASES))[number], rng.integers(3, 40, 1000)[number]


def apply(name: str, chosen: Selection, utility: np.ndarray, sizes: np.ndarray, **options: Any) -> Selection:
    given = {
        "nothing": [], "utility": [utility.sum(axis=1)], "phases": [utility], "loss": [utility[:, 0]]
    }[ORDERS[name][1]]  # fmt: skip
    given += [sizes] if name in ("anneal", "best_phase") else []
    return ORDERS[name][0](chosen, *given, **options)


def pairs(chosen: Selection) -> list[tuple[bytes, float]]:
    return list(zip(chosen.ids.tolist(), chosen.weights.tolist(), strict=True))


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_every_order_keeps_every_visit_and_its_weight_and_is_keyed_by_id(name: str) -> None:
    chosen = selection()
    utility, sizes = columns(chosen)
    found = apply(name, chosen, utility, sizes)
    assert found.ordered and Counter(pairs(found)) == Counter(pairs(chosen))
    if name == "reversed":
        assert np.array_equal(found.ids, chosen.ids[::-1])
        return
    mixed = np.random.default_rng(3).permutation(len(chosen))
    other = Selection(chosen.ids[mixed], chosen.weights[mixed])
    again = apply(name, other, utility[mixed], sizes[mixed])
    assert pairs(again) == pairs(found)
    assert pairs(apply(name, chosen, utility, sizes, seed=1)) != pairs(found) or name in ("curriculum", "loss_sorted")


def test_visits_are_counted_by_id() -> None:
    assert visits(encode_ids(["b", "a", "b", "b", "a"])).tolist() == [0, 0, 1, 2, 1]
    assert visits(encode_ids([])).tolist() == []
    with pytest.raises(InputError, match="0 passes"):
        repeated(selection(), 0)


def test_shuffled_is_the_trainers_own_order(tmp_path: Path) -> None:
    """The same steps as a selection that is not ordered, and the same weights, bit for bit."""
    pool = vector_pool(12)
    task, own = Classifier(inputs=5, hidden=(4,), classes=3), Selection.everything(pool.ids)
    encoded, recipe = prepared(task, pool, tmp_path), Recipe(steps=9, terms_per_step=4, seed=5)
    every = shuffled(repeated(own, 3), seed=5)
    rows = np.array([pool.ids.tolist().index(i) for i in every.ids.tolist()])
    want = [pool.ids[b].tolist() for b in steps(recipe, own, np.ones(12, dtype=int))]
    assert [every.ids[b].tolist() for b in steps(recipe, every, np.ones(36, dtype=int))] == want
    one = train(task, encoded, np.arange(12), own, recipe).params
    two = train(task, encoded, rows, every, recipe).params
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_curriculum_rises_or_falls_and_ties_fall_by_the_key() -> None:
    chosen = selection(passes=1)
    utility, sizes = columns(chosen)
    by_id = dict(zip(chosen.ids.tolist(), utility[:, 0].tolist(), strict=True))

    def values(found: Selection) -> list[float]:
        return [by_id[i] for i in found.ids.tolist()]

    assert values(curriculum(chosen, utility[:, 0])) == sorted(by_id.values())
    assert values(curriculum(chosen, utility[:, 0], rising=False)) == sorted(by_id.values(), reverse=True)
    assert pairs(loss_sorted(chosen, utility[:, 0])) == pairs(curriculum(chosen, utility[:, 0]))
    assert pairs(curriculum(chosen, 0 * sizes)) != pairs(curriculum(chosen, 0 * sizes, seed=1))
    assert pairs(reversed_(reversed_(chosen))) == pairs(chosen)


def test_annealing_ends_on_the_best_share_of_terms() -> None:
    chosen = selection(30)
    utility, sizes = columns(chosen)
    found = anneal(chosen, utility[:, 0], sizes, share=0.25)
    table = Table(chosen.ids[:30], ["u", "n"], np.stack([utility[:30, 0], sizes[:30]], axis=1))
    u, n = table.align(found.ids).values.T
    split = next(k for k in range(len(n)) if n[k:].sum() <= 0.25 * n.sum())
    late = u[split:]
    # Nothing before the end is better than what is in it, but for the one visit that did not fit.
    cut = np.sort(u)[::-1][len(late)]
    assert (late >= cut).all() and (u[:split] <= late.min()).all()
    assert n[split:].sum() > 0.25 * n.sum() - n.max()
    assert not np.array_equal(late, np.sort(late)) and not np.array_equal(u[:split], np.sort(u[:split]))
    with pytest.raises(InputError, match="share = 1"):
        anneal(chosen, utility[:, 0], sizes, share=1)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_best_phase_is_the_best_of_all_ways_to_fill_equal_phases(passes: int) -> None:
    """Six visits of equal terms in three phases: 90 ways, tried one by one."""
    n = 6 // passes
    chosen = selection(n, passes)
    for seed in range(5):
        utility = np.random.default_rng(seed).normal(size=(n, 3))
        every = np.tile(utility, (passes, 1))
        best = max(
            sum(every[i, p] for i, p in enumerate(way))
            for way in itertools.product(range(3), repeat=6) if Counter(way) == {0: 2, 1: 2, 2: 2}
        )  # fmt: skip
        found = best_phase(chosen, every, np.full(6, 5), moved=1, seed=seed)
        own = dict(zip(chosen.ids.tolist(), every, strict=True))
        assert sum(own[i][k // 2] for k, i in enumerate(found.ids.tolist())) == pytest.approx(best)


def test_phases_hold_equal_terms_but_for_less_than_one_example() -> None:
    """Of unequal examples; and what the few that cannot be divided lose of the bound is what they can be worth."""
    for seed in range(6):
        chosen = selection(40)
        utility, sizes = columns(chosen, seed)
        keys = np.lexsort((ordering._keys(chosen, 0), chosen.ids))
        ids, own, terms = chosen.ids[keys], utility[keys], sizes[keys]
        phase = ordering._assigned(ids, own, terms, 1.0)
        assert np.bincount(phase, weights=terms, minlength=PHASES).max() < terms.sum() / PHASES + terms.max()
        first = np.unique(ids, return_index=True)[1]
        room = np.full(PHASES, terms.sum() / PHASES)
        whole = ordering._transport(own[first], np.full(40, PASSES), terms[first], room)
        bound, got = (own[first] * whole).sum(), own[np.arange(len(phase)), phase].sum()
        assert got >= bound - PHASES * np.ptp(own, axis=1).max() and got > own.mean(axis=1).sum()
        found = best_phase(chosen, utility, sizes)
        assert Counter(found.ids.tolist()) == Counter(chosen.ids.tolist()) and found.meta["phases"] == PHASES
    odd = ordering._assigned(ids[:10], own[:10, :3], np.full(10, 4), 1.0)
    assert sorted(np.bincount(odd)) == [3, 3, 4]


def test_visits_that_may_not_move_stay_in_every_phase() -> None:
    chosen = selection(10, 8)
    utility, _ = columns(chosen)
    found = best_phase(chosen, utility, np.ones(80), moved=0.5)
    for part in np.split(found.ids, PHASES):
        counts = Counter(part.tolist())
        assert len(counts) == 10 and min(counts.values()) >= 1
    everything = best_phase(chosen, utility, np.ones(80), moved=1.0)
    assert any(len(Counter(part.tolist())) < 10 for part in np.split(everything.ids, PHASES))
    with pytest.raises(InputError, match="moved = 0"):
        best_phase(chosen, utility, np.ones(80), moved=0)


def test_a_study_names_orders_and_they_compose() -> None:
    chosen = selection(passes=1)
    utility, sizes = columns(chosen)
    names = ["mean", *(f"phase {p + 1}" for p in range(PHASES))]
    table = Table(chosen.ids, names, np.column_stack([utility.sum(axis=1), utility]))
    terms = Table(chosen.ids, ["terms"], sizes[:, None].astype(float))
    found = ordering.ordered(["best_phase", "reversed"], chosen, table, terms)
    assert pairs(found) == pairs(reversed_(best_phase(chosen, utility, sizes)))
    down = ordering.ordered({"name": "curriculum", "rising": False}, chosen, table, terms)
    assert pairs(down) == pairs(curriculum(chosen, utility.sum(axis=1), rising=False))
    losses = ordering.ordered("loss_sorted", chosen, table, terms, lambda: Table(chosen.ids, ["l"], utility[:, :1]))
    assert pairs(losses) == pairs(loss_sorted(chosen, utility[:, 0]))


def test_a_training_in_an_order_makes_the_visits_that_it_makes_without() -> None:
    """Of equal examples, for whole and broken numbers of passes."""
    own = selection(10, 1)
    utility = dict(zip(own.ids.tolist(), np.random.default_rng(0).normal(size=10).tolist(), strict=True))

    def order(every: Selection) -> Selection:
        return curriculum(every, np.array([utility[i] for i in every.ids.tolist()]))

    for length in (3, 5, 7, 15):
        recipe = Recipe(steps=length, terms_per_step=8, seed=2)
        found = fitted(own, recipe, lambda ids: np.full(len(ids), 2), order)
        want = [own.ids[k] for b in islice(steps(recipe, own, np.full(10, 2)), length) for k in b]
        assert Counter(found.ids.tolist()) == Counter(want) and len(found) == 4 * length
        values = [utility[i] for i in found.ids.tolist()]
        assert values == sorted(values)


def test_the_last_visit_of_an_order_is_the_last_of_training_where_examples_are_unequal() -> None:
    own = selection(100, 1)
    _, sizes = columns(own)
    table = Table(own.ids, ["n"], sizes[:, None].astype(float))

    def terms(ids: np.ndarray) -> np.ndarray:
        return table.align(ids).values[:, 0].astype(int)

    for seed, rising in itertools.product(range(2), (True, False)):
        recipe = Recipe(steps=9, terms_per_step=400, seed=seed)
        up = partial(curriculum, rising=rising)
        found = fitted(own, recipe, terms, lambda every, up=up: up(every, terms(every.ids)))
        *early, last = islice(steps(recipe, found, terms(found.ids)), 9)
        read, end = [k for b in early for k in b], len(found) - 1
        assert read == list(range(len(read))) and end in last  # once each, in order, to the end
        done = list(last).index(end) + 1
        assert last[:done].tolist() == list(range(len(read), end + 1))
        assert last[done:].tolist() == list(range(len(last) - done))  # what room is left
        plain, ours = Counter(own.ids[k] for b in islice(steps(recipe, own, sizes), 9) for k in b), Counter(found.ids)
        apart = sum((ours - plain).values()) + sum((plain - ours).values())
        assert apart <= 0.15 * len(found)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("best_fase", "best_phase"), ({"name": "anneal", "shore": 0.3}, "share"),
        ({"name": "anneal", "share": "much"}, "cannot be 'much'"), ({"share": 0.3}, "not an order"),
        ({"name": "curriculum", "rising": 1}, "cannot be 1"), ([3], "not an order"),
    ],
)  # fmt: skip
def test_an_order_that_there_is_not_is_refused(order: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ordering.parse(order)


def test_utilities_without_phases_or_with_nan_are_refused() -> None:
    chosen = selection()
    utility, sizes = columns(chosen)
    with pytest.raises(InputError, match="no phases"):
        best_phase(chosen, utility[:, :1], sizes)
    with pytest.raises(InputError, match="NaN"):
        curriculum(chosen, np.full(len(chosen), np.nan))
