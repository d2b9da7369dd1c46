"""Datamodels against numpy's ridge, the lasso's own conditions, and outputs that are linear in the memberships."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.core.errors import InputError
from assay.core.keys import encode_ids
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.measure import Measurer
from assay.scorers.datamodel import fit
from assay.train import bank
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from helpers import prepared, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = {"steps": 8, "terms_per_step": 10, "lr": 0.3, "optimiser": "sgd", "clip": 0.0}


def options(name: str = "datamodel", **changes: Any) -> Any:
    return make(Scorer, {"name": name, "recipe": RECIPE, **changes})


def planted(count: int, n: int, q: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Memberships of half-size subsets, weights `[n, q]` of mean 0, and outputs with an intercept."""
    masks = bank.subsets(encode_ids(map(str, range(n))), count, 0.5, 0)
    theta = np.random.default_rng(0).normal(size=(n, q))
    theta -= theta.mean(axis=0)  # subsets of one size cannot tell a constant in theta from the intercept
    return masks, theta, masks @ theta + np.arange(3)[:q]


@pytest.mark.parametrize("count", [30, 90])
def test_ridge_equals_numpys(count):
    masks, _, f = planted(count, 40)
    f = f + np.random.default_rng(1).normal(size=f.shape)
    x = masks - masks.mean(axis=0)
    scale = 0.7 * np.trace(x @ x.T) / count
    want = np.linalg.solve(x.T @ x + scale * np.eye(40), x.T @ (f - f.mean(axis=0)))
    assert np.allclose(fit(masks, f, options(penalty=0.7)), want, rtol=1e-9, atol=1e-12)


def test_linear_outputs_are_found():
    masks, theta, f = planted(200, 40)
    assert np.allclose(fit(masks, f, options(penalty=0.0)), theta, atol=1e-9)
    assert np.allclose(fit(masks, f, options(penalty=1e-6)), theta, atol=1e-4)
    few = fit(masks[:25], f[:25], options(penalty=0.0))
    shortest = np.linalg.pinv(masks[:25] - masks[:25].mean(axis=0), rcond=1e-10) @ f[:25]
    assert np.allclose(few, shortest, atol=1e-9)


def test_the_lasso_meets_its_conditions_and_finds_the_few():
    masks, theta, _ = planted(120, 60)
    theta[np.abs(theta) < 1.6] = 0.0
    f = masks @ theta
    found = fit(masks, f, options(kind="lasso", penalty=0.02))
    x, centred = masks - masks.mean(axis=0), f - f.mean(axis=0)
    for q in range(3):
        slope = x.T @ (centred[:, q] - x @ found[:, q]) / len(x)
        alpha = 0.02 * np.abs(x.T @ centred[:, q]).max() / len(x)
        used = found[:, q] != 0
        assert np.allclose(slope[used], alpha * np.sign(found[used, q]), atol=1e-3 * alpha)
        assert np.abs(slope).max() < alpha * 1.001
        assert set(np.flatnonzero(theta[:, q])) <= set(np.flatnonzero(np.abs(found[:, q]) > 0.05))
    assert not fit(masks, f, options(kind="lasso", penalty=1.0)).any(), "at penalty 1 nothing is left"
    assert not fit(masks, f * 0, options(kind="lasso")).any()


class World:
    def __init__(self, folder: Path, method: str = "datamodel") -> None:
        self.task, self.folder, self.method = Classifier(inputs=5, classes=3), folder, method
        self.pool, self.target = vector_pool(24), vector_pool(6, seed=1)

    def table(self, name: str, pool: Pool | None = None, **changes: Any) -> Any:
        pool = pool or self.pool
        encodings = {}
        for part in (pool, self.target):
            encodings[part.fingerprint] = self.folder / f"{name}-{part.fingerprint}"
            prepared(self.task, part, encodings[part.fingerprint])
        run = Run.open(self.folder / name, {"name": name})
        run.close()
        given = {k: changes.pop(k) for k in ("barred", "seed", "recipe") if k in changes}
        scorer = options(self.method, **changes)
        scorer = dataclasses.replace(scorer, recipe=None) if "recipe" in given else scorer
        measurer = Measurer(run, pool, self.target, task=self.task, models=[], encodings=encodings, key="none", **given)
        cost = json.loads((measurer.path(scorer, pool) / "cost.json").read_text())
        return measurer.table(scorer), cost["flops"], scorer


def test_scores_are_the_regression_of_a_bank(tmp_path):
    world = World(tmp_path)
    recipe = Recipe(**RECIPE)
    table, flops, scorer = world.table("each", subsets=40, seeds=2, targets="each", penalty=0.5, seed=3)
    encoded, target = (prepared(world.task, p, tmp_path / str(k)) for k, p in enumerate((world.pool, world.target)))
    from assay.core.keys import digest

    masks = bank.subsets(world.pool.ids, 40, 0.5, int(digest("datamodel", 3)[:8], 16))
    losses = bank.retrain(
        world.task, encoded, world.pool.ids, masks, recipe, seeds=(203_000, 203_001), targets={"t": target}
    )["t"].mean(axis=1)
    assert np.allclose(table.values, -fit(masks, losses, scorer), atol=1e-9)
    assert table.columns == tuple(i.decode() for i in world.target.ids)
    mean, *_ = world.table("mean", subsets=40, seeds=2, penalty=0.5, seed=3)
    assert np.allclose(mean.column("score"), table.values.mean(axis=1), atol=1e-12), "ridge is linear in the outputs"
    assert flops == bank.flops(world.task, encoded, masks, recipe, seeds=(0, 1), targets={"t": target})
    assert flops == 40 * 2 * (3 * 8 * 10 + 6) * 2 * 5 * 3


def test_the_sign_is_that_of_utility(tmp_path):
    """A subset whose scores add up to more has the lower loss."""
    world = World(tmp_path)
    table, *_ = world.table("run", subsets=300, penalty=0.1)
    encoded, target = (prepared(world.task, p, tmp_path / str(k)) for k, p in enumerate((world.pool, world.target)))
    masks = bank.subsets(world.pool.ids, 60, 0.5, 99)
    losses = bank.retrain(
        world.task, encoded, world.pool.ids, masks, Recipe(**RECIPE), seeds=(200_000,), targets={"t": target}
    )["t"][:, 0].mean(axis=1)
    assert np.corrcoef(masks @ table.column("score"), -losses)[0, 1] > 0.9


def test_barred_rows_are_not_trained_on(tmp_path):
    world = World(tmp_path)
    rest = np.arange(24) != 5
    barred, *_ = world.table("barred", subsets=40, barred=world.pool.ids[5:6])
    without, *_ = world.table("without", subsets=40, pool=world.pool.at(np.flatnonzero(rest)))
    assert np.allclose(barred.values[rest], without.values, atol=1e-9) and barred.values[5, 0] == 0.0


def test_whose_recipe_it_is(tmp_path):
    world = World(tmp_path)
    own, *_ = world.table("own", subsets=30)
    given, *_ = world.table("given", subsets=30, recipe=Recipe(**RECIPE))
    assert np.array_equal(own.values, given.values)
    with pytest.raises(InputError, match="does not know how to train"):
        world.table("none", subsets=30, recipe=None)
    with pytest.raises(InputError, match="recipe.stps"):
        options(recipe={"stps": 3}).training_terms(10, 10)
    terms = options(subsets=10, seeds=2, protocol="subset", share=0.25).training_terms(1000, 10)
    assert terms == 10 * 2 * 0.25 * 8 * 10
