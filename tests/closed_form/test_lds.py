"""The linear datamodeling score against planted truths."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from assay.core.errors import InputError
from assay.numerics import lds as measure

N, M, R, Q = 60, 80, 4, 12


def subsets(rng: np.random.Generator, count: int = M) -> np.ndarray:
    """Half-size subsets, all of one size."""
    return np.argsort(rng.random((count, N)), axis=1) < N // 2


def planted(seed: int = 0, noise: float = 1.0, count: int = M) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks, true scores, and losses linear in the mask; the seeds' sd is `noise` times that over subsets."""
    rng = np.random.default_rng(seed)
    masks, tau = subsets(rng, count), rng.normal(size=(N, Q))
    clean = -(masks @ tau)
    seeds = noise * clean.std(axis=0) * rng.normal(size=(R, count, Q)).transpose(1, 0, 2)
    return masks, tau, clean[:, None] + seeds


def test_documented() -> None:
    assert doctest.testmod(measure).failed == 0


def test_each_target_is_scipys_spearman_with_average_ranks() -> None:
    masks, tau, values = planted()
    tied = np.round(tau)  # sums with many ties
    rounded = np.round(values[:, 0])
    found = measure.lds(masks, tied, rounded)
    for q in range(Q):
        assert found[q] == pytest.approx(stats.spearmanr(masks @ tied[:, q], -rounded[:, q])[0], abs=1e-12)


def test_t_l1_true_scores_of_a_linear_truth_reach_the_ceiling() -> None:
    masks, tau, values = planted(count=400)
    theories: list[tuple[measure.Label, float]] = [
        ("lds_fixed", math.sqrt(1 / 2)),
        ("lds_avg", math.sqrt(R / (R + 1))),
    ]
    for label, theory in theories:
        found = measure.score(masks, tau, values, label=label, draws=400)
        top = measure.ceiling(values)
        limit = top.one if label == "lds_fixed" else top.average
        assert limit is not None
        assert limit == pytest.approx(theory, abs=0.03), label  # .707 and .894: METHODS' attenuation
        assert found.low < limit < found.high or abs(found.value - limit) < 0.015


def test_without_noise_the_truth_scores_one_and_its_opposite_minus_one() -> None:
    masks, tau, values = planted(noise=0.0)
    assert measure.lds(masks, tau, values[:, 0]) == pytest.approx(np.ones(Q))
    assert measure.lds(masks, -tau, values[:, 0]) == pytest.approx(-np.ones(Q))


def test_t_l2_random_scores_are_zero_within_their_interval() -> None:
    masks, _, values = planted(noise=0.3)
    found = [
        measure.score(masks, np.random.default_rng(s).normal(size=(N, Q)), values, label="lds_avg", draws=300)
        for s in range(20)
    ]
    assert abs(np.mean([f.value for f in found])) < 0.03
    assert sum(f.low <= 0 <= f.high for f in found) >= 17


@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (1.0, 7.0), (0.01, -500.0)])
def test_t_l3_scale_and_shift_of_scores_change_nothing(scale: float, shift: float) -> None:
    masks, tau, values = planted()
    assert measure.lds(masks, scale * tau + shift, values[:, 0]) == pytest.approx(
        measure.lds(masks, tau, values[:, 0]), abs=1e-12
    )


def test_subsets_of_several_sizes_are_refused_for_a_shift_would_count_there() -> None:
    rng = np.random.default_rng(0)
    masks, tau, values = rng.random((M, N)) < 0.5, *planted()[1:]
    with pytest.raises(InputError, match="one size"):
        measure.lds(masks, tau, values[:, 0])


def test_t_l4_scores_under_other_targets_names_break_it() -> None:
    masks, tau, values = planted(noise=0.2)
    right = measure.lds(masks, tau, values.mean(axis=1)).mean()
    wrong = measure.lds(masks, np.roll(tau, 1, axis=1), values.mean(axis=1)).mean()
    moved = measure.lds(masks, np.roll(tau, 1, axis=0), values.mean(axis=1)).mean()
    assert right > 0.9 and abs(wrong) < 0.15 and abs(moved) < 0.15


def crossed(rng: np.random.Generator, count: int, targets: int, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """Normal pairs with correlation r_q ~ N(.5, .15) of each target; all targets share what subsets have in common."""
    r = np.clip(rng.normal(0.5, 0.15, targets), -0.99, 0.99)
    own, other = (
        math.sqrt(shared) * rng.normal(size=(count, 1)) + math.sqrt(1 - shared) * rng.normal(size=(count, targets))
        for _ in range(2)
    )
    return own, r * own + np.sqrt(1 - r * r) * other


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_t_l5_the_interval_covers_in_95_of_100(shared: float) -> None:
    rng, runs, hits = np.random.default_rng(1), 400, 0
    drawn = np.clip(np.random.default_rng(2).normal(0.5, 0.15, 200_000), -0.99, 0.99)
    truth = float((6 / math.pi * np.arcsin(drawn / 2)).mean())  # Spearman's correlation of a normal pair
    eye = np.eye(30, dtype=bool)  # subsets of one example each: scores are then the sums themselves
    for run in range(runs):
        x, y = crossed(rng, 30, 8, shared)
        found = measure.score(eye, x, -y[:, None], label="lds_fixed", draws=200, seed=run)
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / runs <= 0.98, hits / runs


def test_drawing_targets_alone_is_too_narrow_when_they_share_subsets() -> None:
    x, y = crossed(np.random.default_rng(3), 40, 40, 0.9)
    found = measure.score(np.eye(40, dtype=bool), x, -y[:, None], label="lds_fixed", draws=400)
    assert found.draws[:, 2].std() < 0.5 * (found.high - found.low) / (2 * 1.96)


def test_the_bootstraps_ranks_are_those_of_the_drawn_sample() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 9, (20, 5)).astype(float), rng.normal(size=(20, 5))
    each = np.array([stats.spearmanr(x[:, q], y[:, q])[0] for q in range(5)])
    means = measure._bootstrap(x, y, each, 3, 7)
    rng = np.random.default_rng(7)
    drawn = rng.multinomial(20, np.full(20, 1 / 20), size=3)
    chosen = rng.multinomial(5, np.full(5, 1 / 5), size=3)
    for b in range(3):
        rows = np.repeat(np.arange(20), drawn[b])
        rho = np.array([stats.spearmanr(x[rows, q], y[rows, q])[0] for q in range(5)])
        assert means[b] == pytest.approx([chosen[b] @ rho / 5, rho.mean(), chosen[b] @ each / 5], abs=1e-5)


def test_numbers_that_have_no_order_are_errors_and_not_zero() -> None:
    masks, tau, values = planted()
    broken = tau.copy()
    broken[3, 2] = np.nan
    with pytest.raises(InputError, match="not finite"):
        measure.lds(masks, broken, values[:, 0])
    flat = tau.copy()
    flat[:, 5] = 0.25  # the same sum for every subset of one size
    with pytest.raises(InputError, match="target 5"):
        measure.lds(masks, flat, values[:, 0])
    still = values[:, 0].copy()
    still[:, 1] = 2.0
    with pytest.raises(InputError, match="losses of 1 of"):
        measure.lds(masks, tau, still)
    with pytest.raises(InputError, match="do not fit"):
        measure.lds(masks, tau[:-1], values[:, 0])


def test_too_few_subsets_or_targets_have_no_interval() -> None:
    masks, tau, values = planted()
    for few in ((masks[:9], tau, values[:9]), (masks, tau[:, :3], values[:, :, :3])):
        with pytest.raises(InputError, match="too few"):
            measure.score(*few, label="lds_avg")


def test_a_target_whose_loss_never_changes_is_left_out_of_the_ceiling() -> None:
    values = np.random.default_rng(1).normal(size=(30, 4, 5)) + np.arange(30.0)[:, None, None] / 10
    flat = values.copy()
    flat[:, 1, 2] = 0.7
    assert measure.ceiling(flat) == measure.ceiling(np.delete(values, 2, axis=2))
    assert measure.ceiling(np.ones((30, 4, 5))) == measure.Ceiling(None, None)


def test_one_seed_has_no_ceiling_and_pure_noise_has_a_ceiling_near_zero() -> None:
    _, _, values = planted()
    assert measure.ceiling(values[:, :1]) == measure.Ceiling(None, None)
    noise = np.random.default_rng(0).normal(size=(200, 4, 20))
    top = measure.ceiling(noise)
    assert top.one is not None and top.average is not None
    assert top.one < 0.2 and top.one <= top.average < 0.35


def test_figures_of_two_protocols_are_not_compared() -> None:
    masks, tau, values = planted()
    name = measure.fingerprint({"seeds": 4}, masks)
    assert name == measure.fingerprint({"seeds": 4}, masks.copy()) != measure.fingerprint({"seeds": 5}, masks)
    assert name != measure.fingerprint({"seeds": 4}, masks[::-1])
    scored = lambda s, label, name: measure.score(masks, s, values, label=label, draws=200, fingerprint=name)  # noqa: E731
    good, poor = scored(tau, "lds_avg", name), scored(np.roll(tau, 1, axis=0), "lds_avg", name)
    value, low, high = measure.difference(good, poor)
    assert value == pytest.approx(good.value - poor.value) and 0 < low < value < high
    for other in (scored(tau, "lds_avg", "another"), scored(tau, "lds_fixed", name)):
        with pytest.raises(InputError, match="cannot be compared"):
            measure.difference(good, other)
