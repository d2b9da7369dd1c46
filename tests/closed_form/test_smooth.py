"""Metasmoothness: exact where the response is known, its invariances by name, and no figure where nothing moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.selection import Selection
from assay.numerics.smooth import linearity, smoothness
from assay.train import smooth
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from assay.train.replay import Training
from assay.train.smooth import Probe, measure
from helpers import prepared, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")

NONE = (np.zeros(1), np.zeros(1), np.zeros(1))


class Affine(Classifier):
    """A loss linear in the weights: with decay, training is linear-quadratic, and affine in its data weights."""

    def terms(self, params: Any, batch: Any) -> tuple[Tensor, Tensor]:
        own = -self.logits(params, batch).gather(1, batch["y"][:, None])
        return own, torch.ones_like(own)


@dataclass(frozen=True)
class Deaf(Classifier):
    """A loss that no weight of an example reaches."""

    def terms(self, params: Any, batch: Any) -> tuple[Tensor, Tensor]:
        loss, mask = super().terms(params, batch)
        return 0 * loss, mask


def probe(path: Path, task: Classifier, h: float = 0.1, since: int = 0, **recipe: Any) -> Probe:
    """Of 20 steps in float64; read are the losses of four other examples."""
    pool, other = vector_pool(24), vector_pool(4, seed=1)
    options: dict[str, Any] = {"optimiser": "sgd", "lr": 0.3, "clip": 0.0, "terms_per_step": 8, "steps": 20}
    made = Training(
        task, prepared(task, pool, path / "pool"), np.arange(24), Selection.everything(pool.ids),
        Recipe(**{**options, "weight_decay": 0.05, **recipe}), dtype=torch.float64,
    )  # fmt: skip
    inputs = prepared(task, other, path / "target").inputs(np.arange(4))
    return Probe(made, lambda params: task.loss(params, inputs).detach().numpy(), h, since)


def test_s_is_known_by_hand_and_its_mend_sees_what_turns_back() -> None:
    """Moves (1, 2), (2, -1), (-1, 1): the third comes back and weighs nothing in S, and 2 of 8 in S'."""
    a, b = np.array([1.0, 2.0, -1.0]), np.array([2.0, -1.0, 1.0])
    found = smoothness((0 * a, a, a + b), NONE)
    assert found.agreement == pytest.approx((3 - 1 + 0) / 4)
    assert found.mended == pytest.approx((3 - 3 - 2) / 8)
    assert found.curvature == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a + b))
    assert math.isnan(found.metric) and math.isnan(found.linearity)


@pytest.mark.parametrize("h", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
def test_an_affine_response_has_s_1_and_curvature_0_for_any_h(tmp_path: Path, h: float, optimiser: str) -> None:
    """T-g1."""
    for found in measure(probe(tmp_path, Affine(inputs=5, classes=3), h, optimiser=optimiser), 3):
        assert found.agreement == pytest.approx(1.0) and found.mended == pytest.approx(1.0)
        assert found.curvature < 1e-12 and found.linearity == pytest.approx(1.0)


def test_a_training_that_bends_says_so_and_less_at_a_smaller_h(tmp_path: Path) -> None:
    task = Classifier(inputs=5, hidden=(6,), classes=3)
    small, large = (measure(probe(tmp_path, task, h, lr=1.0), 2) for h in (0.005, 0.5))
    for one, other in zip(small, large, strict=True):
        assert 0.9 < one.agreement <= 1 and one.curvature < 0.1 < other.curvature
        assert other.linearity < one.linearity < 1 and other.mended < one.mended
    # Curvature is of first order in h where the response has a second derivative.
    tiny = measure(probe(tmp_path, task, 0.0025, lr=1.0), 2)
    for one, other in zip(tiny, small, strict=True):
        assert one.curvature == pytest.approx(other.curvature / 2, rel=0.2)


def test_s_is_invariant_to_one_scale_and_to_signs_and_not_to_a_scale_for_each_coordinate() -> None:
    """T-g2."""
    rng = np.random.default_rng(0)
    ends, values = rng.normal(size=(3, 40)), rng.normal(size=(3, 5))

    def figures(m: np.ndarray, scale: np.ndarray | None = None) -> tuple[float, ...]:
        found = smoothness((m[0], m[1], m[2]), (values[0], values[1], values[2]), scale)
        return found.agreement, found.mended, found.curvature, found.metric

    plain = figures(ends)
    signs = np.where(rng.random(40) < 0.5, -1.0, 1.0)
    assert figures(-7.3 * ends)[:3] == pytest.approx(plain[:3])
    assert figures(ends * signs)[:3] == pytest.approx(plain[:3])
    own = np.exp(2 * rng.normal(size=40))
    assert abs(figures(ends * own)[0] - plain[0]) > 0.05
    # S in the optimiser's metric is that very change of units, and blind to the units that weights came in.
    assert figures(ends, own)[3] == pytest.approx(figures(ends * own)[0])
    assert figures(ends / 3 / own, 3 * own)[3] == pytest.approx(plain[0])


def test_every_figure_stays_in_its_range() -> None:
    """T-g3."""
    rng = np.random.default_rng(1)
    for size in (1, 2, 50):
        for spread in (1e-8, 1.0, 1e8):
            start = rng.normal(size=(3, size))
            ends = start * np.exp(spread * rng.normal(size=(3, size)).clip(-1, 1) / spread)
            found = smoothness((ends[0], ends[1], ends[2]), (ends[0], ends[1], ends[2]), np.abs(start[0]))
            for value in (found.agreement, found.mended, found.metric, found.linearity):
                assert -1 - 1e-12 <= value <= 1 + 1e-12
            assert found.curvature >= 0
    a = rng.normal(size=9)
    assert linearity(a, a) == 1 and linearity(a, -a) == pytest.approx(-1 / 3)


def test_linearity_is_the_share_of_a_line_under_the_noise_of_single_trainings() -> None:
    """A line of length 1 a move, and noise of variance s in each end: 2 / (2 + 4 s) in the mean, 0 without a line;
    S is then 0 as well, and S' -1/2."""
    rng = np.random.default_rng(2)
    for line in (0.0, 1.0):
        for spread in (0.3, 1.0):
            ends = line * np.arange(3.0)[:, None] + spread * rng.normal(size=(3, 200_000))
            found = smoothness((ends[0], ends[1], ends[2]), (ends[0], ends[1], ends[2]))
            assert found.linearity == pytest.approx(2 * line / (2 * line + 4 * spread**2), abs=0.01)
            if not line:
                assert (found.agreement, found.mended) == pytest.approx((0.0, -0.5), abs=0.01)


def test_nothing_that_moves_has_no_figure_and_is_an_error(tmp_path: Path) -> None:
    still = np.ones(6)
    found = smoothness((still, still, still), (still, still, still), still)
    assert all(math.isnan(v) for v in vars(found).values())
    with pytest.raises(InputError, match="data weights do not reach the loss"):
        measure(probe(tmp_path, Deaf(inputs=5, classes=3)), 1)
    with pytest.raises(InputError, match="h = 0.6"):
        probe(tmp_path, Classifier(inputs=5, classes=3), 0.6)


def test_adamw_has_a_metric_of_its_own_and_it_is_its_second_moment(tmp_path: Path) -> None:
    made = probe(tmp_path, Classifier(inputs=5, hidden=(6,), classes=3), optimiser="adamw", lr=0.05, eps_root=1e-8)
    before = made.before()
    ends = [made.end(before, 1, times) for times in (0, 1, 2)]
    state = made.training.run(made.training.initial(), 0)
    square = ends[0].square
    assert square is not None
    assert np.allclose(square, torch.cat([v.flatten() for v in state.slots["square"]]).numpy(), rtol=1e-12)
    scale = np.sqrt(square)
    rescaled = [replace(e, params=e.params * scale) for e in ends]
    own, plain = made.figures(*ends), made.figures(*rescaled)
    assert own.metric == pytest.approx(plain.agreement) and abs(own.metric - own.agreement) > 1e-4
    sgd = probe(tmp_path, Classifier(inputs=5, hidden=(6,), classes=3))
    assert math.isnan(measure(sgd, 1)[0].metric)


def test_directions_are_keyed_by_id_and_a_window_moves_its_own_steps_alone(tmp_path: Path) -> None:
    made = probe(tmp_path, Classifier(inputs=5, hidden=(6,), classes=3), since=15)
    weights = made.weights(2, 2)
    assert sorted(set(weights.round(12))) == [0.8, 1.2]
    turned = replace(made.training, selection=Selection.everything(made.training.selection.ids[::-1]))
    assert np.array_equal(replace(made, training=turned).weights(2, 2)[::-1], weights)
    assert not np.array_equal(made.weights(1, 2), weights) and np.array_equal(made.weights(1, 0), np.ones(24))
    # By hand: fifteen steps at w, five at the moved weights.
    state = made.training.initial()
    for step in range(20):
        state = made.training.advance(state, step, weights if step >= 15 else None)
    want = torch.cat([p.flatten() for p in state.params]).numpy()
    assert np.array_equal(made.end(made.before(), 2, 2).params, want)


def test_what_is_kept_comes_back_and_only_to_its_own_key(tmp_path: Path) -> None:
    made = probe(tmp_path, Classifier(inputs=5, hidden=(6,), classes=3), since=4, optimiser="momentum")
    before, path = made.before(), tmp_path / "kept"
    smooth.save_state(path / "before", made.training, before, "key")
    held = smooth.load_state(path / "before", made.training, "key")
    assert held is not None and smooth.load_state(path / "before", made.training, "other") is None
    end = made.end(held, 0, 1)
    smooth.save_end(path / "end", end, "key")
    again = smooth.load_end(path / "end", "key")
    assert again is not None and smooth.load_end(path / "end", "other") is None
    assert np.array_equal(again.params, made.end(before, 0, 1).params) and np.array_equal(again.values, end.values)
    (path / "end").write_bytes((path / "end").read_bytes()[:-3])
    assert smooth.load_end(path / "end", "key") is None
