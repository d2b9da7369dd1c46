"""The scorer `metagrad`: its columns are the derivatives of the run that it says, scaled and signed as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.core.errors import InputError
from assay.core.keys import digest, encode_ids
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Selection
from assay.measure import Measurer
from assay.numerics.curvature import slopes
from assay.scorers.metagrad import around
from assay.train import loop
from assay.train.bank import subsets
from assay.train.models import Classifier, first_weights
from assay.train.recipe import Recipe
from assay.train.replay import Training, metagradient
from helpers import language, prepared, text_pool, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(steps=12, terms_per_step=8, lr=0.3, optimiser="sgd", clip=0.0)


def table(folder: Path, task: Any, pool: Pool, target: Pool, recipe: Recipe, barred: Any = None, **options: Any) -> Any:
    """The Table by the verb itself, in `folder`/run."""
    encodings = {}
    for part in (pool, target):
        encodings[part.fingerprint] = folder / part.fingerprint
        prepared(task, part, folder / part.fingerprint)
    run = Run.open(folder / "run", {"name": "metagrad"})
    try:
        measurer = Measurer(run, pool, target, task=task, encodings=encodings, recipe=recipe, barred=barred, key="k")
        return measurer.table(make(Scorer, {"name": "metagrad", "precision": "float64", **options}))
    finally:
        run.close()


def direct(
    folder: Path, task: Any, pool: Pool, target: Pool, recipe: Recipe, center: float | np.ndarray = 1.0, **how: Any
) -> np.ndarray:
    """d f / d w by phase `[P, n, q]`, without the scorer."""
    asked = prepared(task, target, folder / "asked").inputs(np.arange(len(target)))
    encoded, rows = prepared(task, pool, folder / "own"), np.arange(len(pool))
    training = Training(
        task, encoded, rows, Selection(pool.ids, np.full(len(pool), center)), recipe, dtype=torch.float64
    )
    return metagradient(
        training, lambda p: slopes(task, p, [asked], task.loss, training.moved, each=True), **how
    ).phases


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Classifier, Pool, Pool, Recipe]:
    return tmp_path, Classifier(inputs=5, classes=3, hidden=(4,)), vector_pool(24), vector_pool(6, seed=1), RECIPE


@pytest.mark.parametrize("together", [256, 4])
def test_each_target_has_minus_the_derivative_at_the_center(world: Any, together: int) -> None:
    found = table(*world, center=0.5, targets="each", together=together)
    assert list(found.columns) == [i.decode() for i in world[3].ids]
    assert np.allclose(found.values, -direct(*world, center=0.5)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("center", "spread"), [(0.5, 1.0), (0.5, 0.5), (1.0, 0.5)])
def test_masks_are_the_mean_of_trainings_around_the_center(world: Any, center: float, spread: float) -> None:
    pool = world[2]
    found = table(*world, center=center, targets="each", masks=3, spread=spread)
    drawn = subsets(pool.ids, 3, 0.5, int(digest("metagrad", 0)[:8], 16))
    first, third = drawn[0], drawn[2]
    weights = [center * (1 + spread * (2 * x.astype(float) - 1)) for x in (first, ~first, third)]
    want = np.mean([-direct(*world, center=w)[0] for w in weights], axis=0)
    assert np.allclose(found.values, want, rtol=1e-9, atol=1e-12)


def test_adamw_without_a_root_has_that_of_its_first_gradient(tmp_path: Path) -> None:
    """To two digits of the mean square of its entries but zeros, clipped, of what may be trained on; a root that is
    given stays."""
    pool, target = text_pool(12), text_pool(4, seed=3)
    barred = pool.ids[:3]
    task, encoded = language(pool, tmp_path / "pool", width=8, vocab=280, context=12)
    recipe = Recipe(steps=4, terms_per_step=60, lr=0.01, optimiser="adamw", clip=0.05)
    params = {n: p.requires_grad_() for n, p in first_weights(task, recipe.seed, torch.float32).items()}
    rows = np.arange(3, 12)
    batch = rows[next(loop.steps(recipe, Selection.everything(pool.ids[rows]), encoded.sizes[rows]))]
    nll, mask = task.terms(params, encoded.inputs(batch))
    grads = torch.autograd.grad((nll * mask).sum() / recipe.terms_per_step, list(params.values()))
    entries = torch.cat([g.reshape(-1) for g in grads])
    assert (entries == 0).sum() > 100 and entries.norm() > 2 * recipe.clip
    root = float((entries[entries != 0] * recipe.clip / entries.norm()).square().mean())
    found = table(tmp_path / "none", task, pool, target, recipe, barred)
    said = found.meta["notes"]["metagrad: eps_root"]["eps_root"]
    assert said == pytest.approx(root, rel=0.05) and said == float(f"{said:.1e}")
    given = table(tmp_path / "given", task, pool, target, recipe.model_copy(update={"eps_root": said}), barred)
    other = table(tmp_path / "other", task, pool, target, recipe.model_copy(update={"eps_root": 100 * said}), barred)
    assert np.array_equal(found.values, given.values) and not np.allclose(found.values, other.values, rtol=0.05)
    assert "metagrad: eps_root" not in given.meta["notes"]


def test_a_spread_of_no_masks_is_refused(world: Any) -> None:
    with pytest.raises(InputError, match=r"spread = 0\.5 without masks"):
        table(*world, spread=0.5)


def test_no_weight_around_a_center_is_negative() -> None:
    for share in (0.1, 0.3, 0.5, 0.8, 1.0, 1.5):
        masks = subsets(encode_ids(map(str, range(40))), 4, share if share < 1 else 0.5, 0)
        for spread in (0.1, 0.5, 1.0):
            weights = around(masks, share, spread)
            assert weights.min() >= -1e-12 and np.allclose(weights.mean(axis=1), share)
            mirrored = np.allclose(weights[::2] + weights[1::2], 2 * share)
            assert mirrored == (spread * (1 - share) <= share)


def test_the_mean_target_is_scored_per_term(tmp_path: Path) -> None:
    """Documents of many lengths: what fills a budget of tokens is utility a token."""
    pool, target = text_pool(12), text_pool(4, seed=3)
    task, encoded = language(pool, tmp_path / "pool", width=8, vocab=270, context=12)
    recipe = Recipe(steps=10, terms_per_step=60, lr=0.1, optimiser="momentum", clip=0.0)
    values = table(tmp_path, task, pool, target, recipe).values[:, 0]
    want = -direct(tmp_path, task, pool, target, recipe)[0].mean(axis=1) / encoded.sizes
    assert len(np.unique(encoded.sizes)) > 2 and np.allclose(values, want, rtol=1e-9, atol=1e-12)


def test_phases_are_of_one_visit(world: Any) -> None:
    """24 examples, 8 a step: each is visited twice in either half of 12 steps."""
    values = table(*world, phases=2).values
    want = -direct(*world, phases=2).mean(axis=2)
    assert np.allclose(values[:, 0], want.sum(axis=0), rtol=1e-9) and np.allclose(values[:, 1:], want.T / 2, rtol=1e-9)


def test_where_a_phase_lacks_visits_all_are_scored_as_additions(world: Any) -> None:
    found = table(*world, phases=5)
    assert any("in every phase" in note["detail"] for note in found.meta["notes"].values())
    assert (found.values != 0).all()


def test_additions_to_every_step_are_the_visits_of_a_full_batch(world: Any) -> None:
    """With the whole pool in each step, an addition to all steps is what a unit of data weight is."""
    folder, task, pool, target, _ = world
    recipe = RECIPE.model_copy(update={"terms_per_step": 24})
    visits = table(folder, task, pool, target, recipe).values[:, 0]
    added = table(folder, task, pool, target, recipe, insert=12).values[:, 0]
    assert np.allclose(12 * added, visits, rtol=1e-9, atol=1e-12)


def test_rows_that_hold_target_items_are_not_trained_on(world: Any) -> None:
    folder, task, pool, target, recipe = world
    rest = pool.at(np.arange(2, 24))
    values = table(*world, barred=pool.ids[:2]).values[:, 0]
    want = -direct(folder, task, rest, target, recipe)[0].mean(axis=1)
    assert (values[:2] == 0).all() and np.allclose(values[2:], want, rtol=1e-9)


def test_other_data_under_the_same_ids_is_another_sweep(world: Any) -> None:
    folder, task, pool, target, recipe = world
    columns = {"id": [i.decode() for i in pool.ids], "pixels": pool.column("pixels")}
    labels = [(label + 1) % 3 for label in pool.column("label")]
    other = Pool.from_columns({**columns, "label": labels})
    same = Pool.from_columns({**columns, "label": pool.column("label")})
    assert np.array_equal(same.ids, other.ids)
    table(folder, task, same, target, recipe)
    found = table(folder, task, other, target, recipe).values
    fresh = table(folder / "fresh", task, other, target, recipe).values
    assert np.array_equal(found, fresh)


def test_a_bad_recipe_is_told_before_anything_runs() -> None:
    made = make(Scorer, {"name": "metagrad", "recipe": {"steps": 20, "steeps": 1}})
    with pytest.raises(InputError, match="steeps"):
        made.training_terms(100.0, 10.0)
