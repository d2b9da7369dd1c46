"""Memorisation against plain trainings, one after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_datamodel import RECIPE, World, options

from assay.core.errors import InputError
from assay.core.keys import encode_ids
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.numerics.stats import auc_interval
from assay.scorers.memorization import dealt
from assay.train.loop import train
from assay.train.recipe import Recipe
from helpers import prepared, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = encode_ids(f"e{k}" for k in range(23))


def test_every_example_is_left_out_once_a_repeat() -> None:
    masks = dealt(IDS, 4, 3, 0).reshape(3, 4, 23)
    assert ((~masks).sum(axis=1) == 1).all()
    assert set((~masks).sum(axis=2).ravel().tolist()) == {5, 6}
    assert len(np.unique(masks.reshape(12, 23), axis=0)) == 12, "repeats deal anew"


def test_who_is_left_out_does_not_hang_on_the_order_of_ids() -> None:
    order = np.random.default_rng(0).permutation(23)
    assert np.array_equal(dealt(IDS, 2, 4, 1)[:, order], dealt(IDS[order], 2, 4, 1))
    assert not np.array_equal(dealt(IDS, 2, 4, 1), dealt(IDS, 2, 4, 2)), "and on the seed it does"


def by_hand(world: World, masks: np.ndarray, seeds: tuple[int, ...], folder: Path) -> np.ndarray:
    """Loss of every example after every training, `[m, n]`, averaged over seeds."""
    encoded, rows = prepared(world.task, world.pool, folder), np.arange(len(world.pool))
    found = []
    for mask in masks:
        losses = []
        for seed in seeds:
            chosen = Selection(world.pool.ids, mask.astype(float))
            made = train(world.task, encoded, rows, chosen, Recipe(**RECIPE).with_seed(seed))
            losses.append(world.task.loss(made.params, encoded.inputs(rows)).detach().double().numpy().ravel())
        found.append(np.mean(losses, axis=0))
    return np.array(found)


@pytest.mark.parametrize(("folds", "repeats", "seeds"), [(2, 3, 1), (3, 2, 2), (24, 1, 1)])
def test_it_is_the_loss_of_models_that_saw_it_less_that_of_those_that_did_not(
    folds: int, repeats: int, seeds: int, tmp_path: Path
) -> None:
    """The last case is leaving each example out."""
    world = World(tmp_path, "memorization")
    table, flops, _ = world.table("run", folds=folds, repeats=repeats, seeds=seeds, seed=3)
    masks = dealt(world.pool.ids, folds, repeats, 3)
    losses = by_hand(world, masks, tuple(303_000 + k for k in range(seeds)), tmp_path / "plain")
    for n in range(24):
        seen, unseen = losses[masks[:, n], n].mean(), losses[~masks[:, n], n].mean()
        assert table.column("score")[n] == pytest.approx(seen - unseen, abs=2e-6)
        assert table.column("unseen")[n] == pytest.approx(-unseen, abs=2e-6)
    assert np.abs(table.column("score")).max() > 1e-3
    assert flops == folds * repeats * seeds * (3 * 8 * 10 + 24) * 2 * 5 * 3


def test_wrong_labels_come_last(tmp_path: Path) -> None:
    world = World(tmp_path, "memorization")
    clean = vector_pool(120)
    x = np.array(clean.column("pixels"))
    right = np.array(clean.column("label"))
    x[np.arange(120), right] += 2.0
    wrong = np.arange(120) % 10 == 0
    labels = np.where(wrong, (right + 1) % 3, right).tolist()
    pool = Pool.from_columns({"id": [i.decode() for i in clean.ids.tolist()], "pixels": x.tolist(), "label": labels})
    recipe = {**RECIPE, "steps": 120}
    table, *_ = world.table("run", pool, recipe=Recipe(**recipe), repeats=4)
    assert auc_interval(-table.column("score"), wrong)[0] > 0.9
    assert auc_interval(-table.column("unseen"), wrong)[0] > 0.9


def test_barred_rows_are_not_trained_on_and_score_the_median(tmp_path: Path) -> None:
    world, rest = World(tmp_path, "memorization"), np.arange(24) != 5
    barred, *_ = world.table("barred", barred=world.pool.ids[5:6])
    without, *_ = world.table("without", pool=world.pool.at(np.flatnonzero(rest)))
    assert np.allclose(barred.values[rest], without.values, atol=1e-9)
    assert np.allclose(barred.values[5], np.median(without.values, axis=0))


@pytest.mark.parametrize("folds", [1, 25])
def test_folds_that_leave_nothing_out_are_refused(folds: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folds from 2 to 24"):
        World(tmp_path, "memorization").table("run", folds=folds)


def test_what_a_plan_is_told() -> None:
    one = options("memorization", folds=3, repeats=4, seeds=2)
    assert one.training_terms(1000, 10) == pytest.approx(3 * 4 * 2 * (8 * 10 + 1000 / 3))
    subset = options("memorization", folds=3, repeats=4, protocol="subset")
    assert subset.training_terms(1000, 10) == pytest.approx(3 * 4 * (8 * 10 * 2 / 3 + 1000 / 3))
