"""SOURCE against the run that it approximates, and at its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_kfac import fitted, gaussian, line
from test_kfac import rows as gradients_of
from test_scorers import N, World, gradients, near, three  # noqa: F401 - a fixture
from torch import Tensor

from assay.core.errors import InputError
from assay.core.method import Mark, Scorer, make
from assay.numerics.kfac import faded, gathered
from assay.train.factors import Fisher, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def scores(w: World, out: Path, run: list[Mark], **options: Any) -> np.ndarray:
    measurer = w.measurer(out, [run[-1].params], trajectories=[run])
    return measurer.table(make(Scorer, {"name": "source", "draws": 1, **options})).values


def path(w: World, *rates: float, still: bool = False) -> list[Mark]:
    rng = torch.Generator().manual_seed(4)
    steps = [0.5 * torch.randn(18, generator=rng, dtype=torch.float64) for _ in rates]
    thetas = [steps[0]] * len(rates) if still else list(torch.stack(steps).cumsum(dim=0))
    return [Mark(w.params(t), {}, 10, r) for t, r in zip(thetas, rates, strict=True)]


def slopes(w: World, point: Mark) -> tuple[Tensor, Tensor]:
    """Gradients of the pool `[n, p]` and of the target's mean loss `[p]`."""
    theta = torch.cat([p.flatten() for p in point.params.values()])
    return gradients(w, theta), torch.func.grad(w.asked_loss)(theta)


def test_equals_gradient_descent_where_the_factors_are_exact() -> None:
    """Squared loss with unit noise: the Fisher is the Hessian, and every step the same linear map. The discrete run
    approaches the flow with its rate: half the rate, half the error."""
    made = line(*gaussian(1.0))
    factors, found = fitted(made), gradients_of(made)["map.weight"]
    x = made[3]["x"]
    hessian = torch.kron(torch.eye(2).double(), x.T @ x / len(x))
    target = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    errors = []
    for rate in (0.02, 0.01):
        moved = torch.zeros(len(found), 6, dtype=torch.float64)
        for _ in range(round(3 / rate)):
            moved = moved - rate * (moved @ hessian + found.flatten(1) / len(x))
        want = -moved @ target.flatten()
        along = factors.apply(gathered(3.0), {"map.weight": target})["map.weight"]
        got = found.flatten(1) @ along.flatten() / len(x)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[1] < 0.01 and errors[1] == pytest.approx(errors[0] / 2, rel=0.1), errors
    kept = factors.apply(faded(3.0), {"map.weight": target})["map.weight"].flatten()
    assert torch.allclose(kept, torch.linalg.matrix_exp(-3 * hessian) @ target.flatten(), atol=1e-12)


def test_small_curvature_has_no_cancellation() -> None:
    values = torch.tensor([0.0, 1e-12, 1e-7, 1e-3, 1.0, 1e3])
    exact = [2.0, *(-np.expm1(-2 * x) / x for x in values[1:].double().tolist())]
    np.testing.assert_allclose(gathered(2.0)(values).numpy(), exact, rtol=1e-6)
    assert torch.isfinite(gathered(1e9, 0.1)(values)).all()


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_segments_of_one_curvature_are_one_segment(three: World, tmp_path: Path, decay: float) -> None:  # noqa: F811
    run = path(three, 3.0, 1.0, 2.0, 4.0, still=True)
    found = [scores(three, tmp_path / f"{n}", run, segments=n, weight_decay=decay) for n in (1, 2, 4)]
    near(found[1], found[0], 1e-9)
    near(found[2], found[0], 1e-9)


def test_a_short_run_gives_the_sum_of_dot_products(three: World, tmp_path: Path) -> None:  # noqa: F811
    run = path(three, 1e-7, 2e-7, 4e-7)
    got = scores(three, tmp_path, run)[:, 0]
    _, slope = slopes(three, run[-1])
    near(got, sum((p.rate * slopes(three, p)[0] @ slope for p in run), torch.zeros(N)) / N, 1e-5)


def test_momentum_decay_and_weight_are_the_runs_own(three: World, tmp_path: Path) -> None:  # noqa: F811
    """A run with momentum .9 goes ten times as far; at half the data weight curvature is half, and decay is not."""
    plain = scores(three, tmp_path / "plain", path(three, 5.0, 10.0), weight_decay=0.02)
    heavy = path(three, 0.5, 1.0)
    near(scores(three, tmp_path / "told", heavy, momentum=0.9, weight_decay=0.02), plain, 1e-9)
    for mark in heavy:
        mark.optimiser.update(inertia=0.9, decay=0.02)
    near(scores(three, tmp_path / "known", heavy), plain, 1e-9)
    # The flow of (x / 2 + d) for a time is half of that of (x + 2 d) for half of it, twice over.
    light = path(three, 10.0, 20.0)
    for mark in light:
        mark.optimiser.update(decay=0.01, weight=0.5)
    near(scores(three, tmp_path / "light", light), 2 * plain, 1e-9)
    with pytest.raises(InputError, match="momentum"):
        scores(three, tmp_path / "wrong", heavy, momentum=1.0)


def test_a_long_run_gives_the_influence_function(three: World, tmp_path: Path) -> None:  # noqa: F811
    """Of the last segment's model: all before it is forgotten."""
    run = path(three, 1e5, 1e5)
    grads, slope = slopes(three, run[-1])
    factors = fit(three.task, [run[-1].params], three.encoded, three.pool.ids, Fisher(draws=1))
    for damping in (0.0, 0.3):
        got = scores(three, tmp_path / f"{damping}", run, weight_decay=0.05, segments=2, damping=damping)[:, 0]
        own = {n: p[None] for n, p in three.params(slope).items()}
        along = factors.apply(lambda x, d=damping: 1 / (x + d * x.mean() + 0.05), own)
        near(got, grads @ torch.cat([p.flatten() for p in along.values()]) / N, 1e-9)


def test_a_segments_gradients_are_means_over_its_models(three: World, tmp_path: Path) -> None:  # noqa: F811
    """Two models in one short segment count half each, whatever their own rates."""
    run = path(three, 1e-7, 3e-7)
    got = scores(three, tmp_path, run, segments=1)[:, 0]
    _, slope = slopes(three, run[-1])
    near(got, sum((2e-7 * slopes(three, p)[0] @ slope for p in run), torch.zeros(N)) / N, 1e-5)


def test_each_target_has_a_column(three: World, tmp_path: Path) -> None:  # noqa: F811
    run = path(three, 1.0, 2.0)
    each = scores(three, tmp_path / "each", run, targets="each")
    assert each.shape == (N, len(three.target))
    near(each.mean(axis=1), scores(three, tmp_path / "mean", run)[:, 0], 1e-9)


def test_adams_metric_short_run(three: World, tmp_path: Path) -> None:  # noqa: F811
    """A short run by AdamW: dot products in the metric of the segment's rank-one second moments."""
    run = path(three, 1e-7, 2e-7)
    rng = torch.Generator().manual_seed(8)
    for point in run:
        square = {n: torch.rand(p.shape, generator=rng, dtype=torch.float64) + 0.1 for n, p in point.params.items()}
        point.optimiser["square"] = square
    got = scores(three, tmp_path, run, metric="adafactor")[:, 0]
    _, slope = slopes(three, run[-1])
    want = np.zeros(N)
    for point in run:
        weight, bias = point.optimiser["square"].values()
        rank_one = torch.outer(weight.mean(dim=1), weight.mean(dim=0)) / weight.mean()
        metric = torch.cat([rank_one.flatten() ** -0.5, bias**-0.5])
        want += (point.rate * slopes(three, point)[0] @ (metric * slope)).numpy() / N
    near(got, want, 1e-5)
