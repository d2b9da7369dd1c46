"""The memory of a sweep is what its formula says: states of the tree, an adjoint, the weights, one reversed step."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.core.selection import Selection
from assay.train.adjoint import Adjoint
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from assay.train.replay import Training, metagradient
from assay.train.reverse import reverse
from helpers import prepared, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 16
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The measure and the formula, as the benchmark of the cost takes them."""
    if not BENCHMARKS.exists():
        pytest.skip("the package is installed without its benchmarks")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("parts.live")


def training(path: Path, kind: Any) -> Training:
    """A perceptron whose states are large beside what a step of six examples takes; every step is clipped."""
    pool, task = vector_pool(24), Classifier(inputs=5, hidden=(200, 200), classes=3)
    root = 1e-8 if kind == "adamw" else 0.0
    recipe = Recipe(steps=STEPS, terms_per_step=6, lr=1e-3, optimiser=kind, eps_root=root, clip=1e-3)
    return Training(task, prepared(task, pool, path), np.arange(24), Selection.everything(pool.ids), recipe)


def ones(made: Training, targets: int) -> Any:
    """Slopes of linear targets: they take no memory but their own."""

    def found(params: Any) -> torch.Tensor:
        return torch.ones(sum(params[n].numel() for n in made.moved), targets) / 1000

    return found


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("targets", [1, 4])
@pytest.mark.parametrize("branch", [2, 4, 16])
def test_of_states_in_memory(live: Any, tmp_path: Path, kind: str, targets: int, branch: int) -> None:
    made = training(tmp_path, kind)
    live.made_once(made)
    seen = live.most(lambda: metagradient(made, ones(made, targets), branch=branch))
    said = live.foretold(made, branch, targets)
    assert abs(seen / said - 1) < 0.02, f"{seen} bytes, where the formula says {said}"


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("together", [False, True])
def test_a_reversed_step_takes_the_adjoint_of_a_gradient_for_each_target(
    live: Any, tmp_path: Path, kind: str, together: bool
) -> None:
    """Of weights and moments there is one adjoint, which changes in place; products that go together are there as well,
    and what they are sums of."""
    made = training(tmp_path, kind)
    live.made_once(made)
    made.__dict__["together"] = together
    state, took = made.initial(), []
    for targets in (4, 12):
        given = Adjoint.of(made.recipe, [torch.ones(targets, *p.shape) for p in state.params])
        took.append(live.most(lambda given=given: reverse(made, state, 1, given)))
    each = (took[1] - took[0]) / 8 / live.size(state.params)
    assert each < (4.1 if together else 1.1), f"{each:.2f} times the weights for each target"


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("branch", [2, 4, 16])
def test_of_states_on_disk(live: Any, tmp_path: Path, kind: str, branch: int) -> None:
    """Of the first level none is in memory but the one whose child is at work."""
    made = training(tmp_path / "pool", kind)
    live.made_once(made)
    seen = live.most(lambda: metagradient(made, ones(made, 1), branch=branch, path=tmp_path / "kept"))
    said = live.foretold(made, branch, 1, on_disk=True)
    assert abs(seen / said - 1) < 0.02, f"{seen} bytes, where the formula says {said}"
    assert len(list((tmp_path / "kept").glob("state-*.safetensors"))) == branch + 1


def test_states_on_disk_change_no_bit(tmp_path: Path) -> None:
    made = training(tmp_path / "pool", "adamw")
    here, there = (metagradient(made, ones(made, 2), branch=4, path=p) for p in (None, tmp_path / "kept"))
    assert np.array_equal(here.phases, there.phases) and (here.restored, here.peak) == (there.restored, there.peak)
