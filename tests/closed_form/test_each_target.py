"""Scores for each target example: their mean is the score for the mean, and the margin's sign is taken care of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_scorers import World, exact_features, near, three  # noqa: F401 - a fixture

from assay.core.method import Scorer, make

EXACT = exact_features()
MARGIN = {**exact_features(), "measure": "margin"}


def both(world: World, out: Path, spec: dict[str, object]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    models = [
        world.params(torch.randn(18, generator=torch.Generator().manual_seed(s), dtype=torch.float64)) for s in range(2)
    ]
    tables = [world.measurer(out / t, models).table(make(Scorer, {**spec, "targets": t})) for t in ("mean", "each")]
    return tables[0].values[:, 0], tables[1].values, tables[1].columns


@pytest.mark.parametrize("queries", [None, MARGIN], ids=["loss", "margin"])
@pytest.mark.parametrize("name", ["graddot", "gradcos"])
def test_the_mean_of_the_columns_is_the_score(three: World, tmp_path: Path, name: str, queries: object) -> None:  # noqa: F811
    mean, each, columns = both(three, tmp_path, {"name": name, "features": EXACT, "queries": queries})
    assert columns == tuple(i.decode() for i in three.target.ids) and each.std(axis=1).min() > 0
    near(each.mean(axis=1), mean, 1e-12)


def test_a_column_is_the_gain_in_its_own_margin(three: World, tmp_path: Path) -> None:  # noqa: F811
    """One small step on an example: each target's margin rises by step x its column."""
    theta = torch.randn(18, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    spec = {"name": "graddot", "features": EXACT, "queries": MARGIN, "targets": "each"}
    found = three.measurer(tmp_path, [three.params(theta)]).table(make(Scorer, spec)).values
    for i in (0, 4):
        own = theta.clone().requires_grad_()
        slope = torch.autograd.grad(three.losses(own)[i], own)[0]
        margins = [three.task.margin(three.params(theta - s * slope), three.questions) for s in (1e-5, -1e-5)]
        near(((margins[0] - margins[1]) / 2e-5).numpy(), found[i], 1e-6)
