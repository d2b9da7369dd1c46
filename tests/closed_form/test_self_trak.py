"""The TRAK score of an example for itself, against dense algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_scorers import World, exact_features, gradients, margins, near, three, two, world  # noqa: F401 - fixtures
from torch import Tensor

from assay.core.errors import InputError
from assay.core.method import Scorer, make
from assay.numerics.trak import inverted
from helpers import prepared

pytestmark = pytest.mark.usefixtures("one_thread")


def theta(seed: int, size: int = 18) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spec(**options: Any) -> dict[str, Any]:
    margin = options.get("output") == "margin"
    return {"name": "self_trak", "features": exact_features("margin" if margin else "loss"), **options}


def leverage(phi: np.ndarray, damping: float) -> np.ndarray:
    """phi_i^T (Phi^T Phi + damping tr/p)^-1 phi_i, of the inverse itself."""
    gram = phi.T @ phi
    inverse = np.linalg.inv(gram + damping * np.trace(gram) / len(gram) * np.eye(len(gram)))
    return np.einsum("ip,pq,iq->i", phi, inverse, phi)


def test_both_factors_are_averaged_over_models_separately(three: World, tmp_path: Path) -> None:  # noqa: F811
    at = [theta(seed) for seed in range(3)]
    phi = [torch.func.jacrev(lambda t: margins(three, t, three.inputs))(t).numpy() for t in at]
    wrong = np.mean([1 - torch.exp(-three.losses(t)).numpy() for t in at], axis=0)
    truth = -np.mean([leverage(p, 0.2) for p in phi], axis=0) * wrong
    models = [three.params(t) for t in at]
    near(three.scores(tmp_path / "margin", spec(output="margin", damping=0.2), models), truth, 1e-5)
    losses = -np.mean([leverage(gradients(three, t).numpy(), 0.2) for t in at], axis=0)
    near(three.scores(tmp_path / "loss", spec(damping=0.2), models), losses, 1e-5)


def test_it_is_minus_the_diagonal_of_trak_on_the_pool_itself(three: World, tmp_path: Path) -> None:  # noqa: F811
    """With R = 1 on both sides: the pool asked about itself."""
    models, options = [three.params(theta(0))], {"output": "margin", "damping": 0.1}
    prepared(three.task, three.pool, tmp_path / "target")
    own = World(three.task, three.pool, three.pool, three.encoded, three.encoded, tmp_path)
    asked = {**spec(**options), "name": "trak", "weighted": False, "targets": "each"}
    square = own.measurer(tmp_path / "trak", models).table(make(Scorer, asked)).values
    near(own.scores(tmp_path / "self", spec(**options), models), -np.diag(square), 1e-5)


def test_barely_damped_leverages_sum_to_the_rank_of_the_features(three: World, tmp_path: Path) -> None:  # noqa: F811
    """The slopes of a cross-entropy sum to zero over classes: two of three are free, times five inputs and a bias."""
    found = three.scores(tmp_path, spec(damping=1e-6), [three.params(theta(0))])
    assert -found.sum() == pytest.approx(12, abs=5e-3)


def test_margins_need_gradients_of_margins(three: World, tmp_path: Path) -> None:  # noqa: F811
    wrong = {"name": "self_trak", "features": exact_features("loss"), "output": "margin"}
    with pytest.raises(InputError, match="self_trak: output = 'margin' needs gradients of the margin"):
        three.scores(tmp_path, wrong, [three.params(theta(0))])


@pytest.mark.parametrize(("n", "d"), [(30, 8), (8, 30), (8, 8)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_inverse_is_dense_algebra_for_few_rows_and_for_many(n: int, d: int, weighted: bool) -> None:
    """Of fewer rows than features the system is that of the rows' products: the same numbers, the same damping."""
    rng = np.random.default_rng(0)
    phi, x = rng.normal(size=(n, d)), rng.normal(size=(3, d))
    weights = rng.uniform(0, 1, n) if weighted else None
    moments = phi.T @ (phi if weights is None else phi * weights[:, None])
    for damping in (1e-3, 0.3, 10.0):
        truth = np.linalg.solve(moments + damping * np.trace(moments) / d * np.eye(d), x.T).T
        found, _ = inverted("trak", iter([phi[:5], phi[5:]]), (n, d), damping, x, weights)
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-9 * np.abs(truth).max())


def test_fewer_rows_than_features_need_damping() -> None:
    phi = np.random.default_rng(0).normal(size=(4, 9))
    with pytest.raises(InputError, match="fewer examples than features"):
        inverted("trak", iter([phi]), (4, 9), 0.0, phi)
    with pytest.raises(InputError, match="all gradients are zero"):
        inverted("trak", iter([0 * phi]), (4, 9), 0.1, phi)
