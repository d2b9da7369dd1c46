"""Influence by Kronecker factors, and CG with them as its preconditioner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_scorers import DECAY, N, World, best, gradients, near, three  # noqa: F401 - fixtures
from torch import Tensor

from assay.core.errors import InputError
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.task import Task
from assay.measure import Measurer
from assay.train.factors import Fisher, fit
from helpers import classifier, language, looped, prepared, text_pool, vector_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"name": "influence", "weight_decay": DECAY, "draws": 2}


def measured(folder: Path, task: Task, pool: Pool, target: Pool) -> Measurer:
    run = Run.open(folder / "run", {"name": "t"})
    run.close()
    encodings = {pool.fingerprint: folder / "pool", target.fingerprint: folder / "target"}
    return Measurer(run, pool, target, task=task, models=[wide(task)], encodings=encodings, key="k")


@pytest.mark.parametrize("solver", ["kfac", "ekfac"])
def test_scores_are_the_quadratic_form_of_the_factors(three: World, best: Tensor, tmp_path: Path, solver: Any) -> None:  # noqa: F811
    """(1/N) grad f^T (F + damping)^-1 grad loss_i, with F written out as a matrix."""
    got = three.scores(tmp_path, {**QUICK, "solver": solver, "damping": 0.2}, [three.params(best)])
    (factor,) = fit(three.task, [three.params(best)], three.encoded, three.pool.ids, Fisher(draws=2)).blocks.values()
    size = factor.block.shape[0] * factor.block.shape[1]
    eye = torch.eye(size, dtype=torch.float64).view(size, *factor.block.shape)
    basis = factor.turned(eye).flatten(1)
    values = factor.values(solver).flatten()
    matrix = (
        basis @ torch.diag(values) @ basis.T + (DECAY + 0.2 * (DECAY + float(values.mean()))) * torch.eye(size).double()
    )

    def by_rows(flat: Tensor) -> Tensor:
        return factor.joined({n: p[None] for n, p in three.params(flat).items()}).flatten()

    slope = by_rows(torch.func.grad(three.asked_loss)(best))
    grads = torch.stack([by_rows(g) for g in gradients(three, best)])
    near(got, grads @ torch.linalg.solve(matrix, slope) / N, 1e-9)


def test_factors_come_near_the_exact_answer(three: World, best: Tensor, tmp_path: Path) -> None:  # noqa: F811
    """One layer, all of whose Fisher is a sum of products: not the same, but the same order of examples."""
    models = [three.params(best)]
    exact = three.scores(tmp_path / "exact", {**QUICK, "solver": "exact", "curvature": "ggn"}, models)
    plain = three.scores(tmp_path / "plain", {**QUICK, "solver": "ekfac", "damping": 1e6, "draws": 16}, models)
    for solver in ("kfac", "ekfac"):
        found = three.scores(tmp_path / solver, {**QUICK, "solver": solver, "draws": 16}, models)
        near_by = float(np.corrcoef(found, exact)[0, 1])
        assert near_by > 0.9 and near_by > float(np.corrcoef(plain, exact)[0, 1]), (solver, near_by)


def test_weight_decay_is_part_of_the_mean_eigenvalue(three: World, best: Tensor, tmp_path: Path) -> None:  # noqa: F811
    """Where decay outweighs the curvature every solver has the same answer: decay is damped as it is by 'exact'."""
    spec, models = {"name": "influence", "weight_decay": 1e8, "damping": 0.5}, [three.params(best)]
    exact = three.scores(tmp_path / "exact", {**spec, "solver": "exact"}, models)
    for solver in ("kfac", "ekfac"):
        for scale in ("eigenvalue", "model"):
            own = {**spec, "solver": solver, "scale": scale, "draws": 1}
            near(three.scores(tmp_path / f"{solver}-{scale}", own, models), exact, 1e-6)


def test_preconditioned_cg_has_the_same_answer_sooner(tmp_path: Path) -> None:
    pool, target = vector_pool(60), vector_pool(7, seed=3)
    task, _ = classifier(pool, tmp_path / "pool", hidden=(8,))
    prepared(task, target, tmp_path / "target")
    measurer = measured(tmp_path, task, pool, target)
    products, found = {}, {}
    for way in ("none", "ekfac"):
        spec = {**QUICK, "solver": "cg", "precondition": way, "tolerance": 1e-9, "damping": 1e-4, "weight_decay": 0.0}
        table = measurer.table(make(Scorer, {**spec, "draws": 16}))
        products[way] = table.meta["notes"]["influence: solve by cg"]["products"]
        found[way] = table.values[:, 0]
    near(found["ekfac"], found["none"], 1e-6)
    assert products["ekfac"] < 0.7 * products["none"], products


def test_damping_may_be_one_number_for_all_layers(tmp_path: Path) -> None:
    """The mean eigenvalue of the model, not of each layer: with much of it, scores go to dot products over it."""
    pool, target = vector_pool(30), vector_pool(4, seed=3)
    task, encoded = classifier(pool, tmp_path / "pool", hidden=(6,))
    asked = prepared(task, target, tmp_path / "target")
    measurer, params = measured(tmp_path, task, pool, target), wide(task)
    factors = fit(task, [params], encoded, pool.ids, Fisher(draws=2))
    grads, slopes = looped(task, params, encoded, np.arange(30)), looped(task, params, asked, np.arange(4))
    dots = sum((grads[n].flatten(1) @ slopes[n].flatten(1).mean(dim=0) for n in params), torch.zeros(30))
    assert factors.size == sum(p.numel() for p in params.values())
    squares = sum(float(f.corrected.sum()) for f in factors.blocks.values())
    for solver in ("kfac", "ekfac"):
        spec = {**QUICK, "solver": solver, "weight_decay": 0.0, "damping": 1e7, "precision": "float64"}
        found = measurer.table(make(Scorer, {**spec, "scale": "model"})).values[:, 0]
        near(found, dots / 30 / (1e7 * factors.trace(solver) / factors.size), 1e-6)  # type: ignore[arg-type]
        layered = measurer.table(make(Scorer, spec)).values[:, 0]
        assert np.corrcoef(layered, dots)[0, 1] < 0.999, "layers weigh differently in their own units"
    assert factors.trace("ekfac") == pytest.approx(squares)


def test_factors_are_of_fisher_information(three: World, best: Tensor, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="Fisher"):
        three.scores(tmp_path, {**QUICK, "solver": "ekfac", "curvature": "hessian"}, [three.params(best)])


def test_a_decoder_is_scored_target_by_target(tmp_path: Path) -> None:
    """Columns average to the score of the mean; against the factors applied by hand to looped gradients."""
    pool, target = text_pool(10), text_pool(3, seed=5)
    task, encoded = language(pool, tmp_path / "pool", layers=1)
    asked = prepared(task, target, tmp_path / "target")
    params, measurer = wide(task), measured(tmp_path, task, pool, target)
    spec = {"name": "influence", "solver": "ekfac", "damping": 0.1, "draws": 1, "block": 32}
    each, mean = (measurer.table(make(Scorer, {**spec, "targets": t})).values for t in ("each", "mean"))
    near(each.mean(axis=1), mean[:, 0], 1e-9)
    assert len(set(asked.sizes.tolist())) == 3, "batches go by length, columns do not"

    factors = fit(task, [params], encoded, pool.ids, Fisher(draws=1, block=32))
    slopes, own = looped(task, params, asked, np.arange(3)), looped(task, params, encoded, np.arange(10))
    along = factors.inverse(slopes, damping=0.1)
    near(each, sum((own[n].flatten(1) @ along[n].flatten(1).T for n in own), torch.zeros(10, 3)) / 10, 1e-8)


def test_targets_of_low_rank_are_exact_where_theirs_is_no_higher(tmp_path: Path) -> None:
    """T-d12: a vector's gradient at a linear layer is one outer product; the mean of six has more of them."""
    pool, target = vector_pool(20), vector_pool(6, seed=1)
    task, _ = classifier(pool, tmp_path / "pool", hidden=(4,))
    prepared(task, target, tmp_path / "target")
    made = measured(tmp_path, task, pool, target)

    def scores(targets: str, rank: int) -> np.ndarray:
        spec = {**QUICK, "solver": "ekfac", "damping": 0.2, "targets": targets, "query_rank": rank}
        return made.table(make(Scorer, spec)).values

    near(scores("each", 1), torch.from_numpy(scores("each", 0)), 1e-9)
    whole = scores("mean", 0)
    gaps = [float(np.abs(scores("mean", rank) - whole).max() / np.abs(whole).max()) for rank in (1, 2, 3, 4)]
    assert gaps[0] > 1e-3 and gaps[0] > gaps[2] and gaps[3] < 1e-9
