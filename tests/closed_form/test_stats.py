"""Ranks and areas against scipy and brute force; intervals against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from assay.numerics.stats import auc, auc_interval, crossed_interval, spearman, verdict


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_equals_scipy(seed, levels):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, 50)
    y = x + rng.integers(0, levels, 50)
    assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y)[0], abs=1e-12)
    assert spearman(x, y) == pytest.approx(spearman(x**3, np.exp(y / levels)), abs=1e-12), "ranks only"
    assert spearman(x, -y) == pytest.approx(-spearman(x, y), abs=1e-12)


def test_spearman_of_constants_is_nan():
    assert math.isnan(spearman(np.ones(5), np.arange(5)))
    assert math.isnan(spearman(np.arange(5), np.zeros(5)))
    assert math.isnan(spearman(np.array([1.0]), np.array([2.0])))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_auc_equals_brute_force(seed, levels):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, levels, 40).astype(float), rng.random(40) < 0.3
    a, b = scores[positive][:, None], scores[~positive][None, :]
    want = ((a > b) + 0.5 * (a == b)).mean()
    assert auc(scores, positive) == pytest.approx(want, abs=1e-12)
    assert auc(scores, positive.astype(int)) == pytest.approx(want, abs=1e-12), "labels as 0 and 1"
    assert auc(scores, ~positive) == pytest.approx(1 - want, abs=1e-12)


def test_auc_of_one_class_is_nan():
    assert math.isnan(auc(np.arange(4.0), np.ones(4, dtype=bool)))
    assert math.isnan(auc(np.arange(4.0), np.zeros(4, dtype=bool)))


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 1, 1)])
def test_one_way_is_students_interval(shape, level):
    x = np.random.default_rng(1).normal(size=7)
    low, high = scipy_stats.t.interval(level, 6, loc=x.mean(), scale=x.std(ddof=1) / np.sqrt(7))
    assert crossed_interval(x.reshape(shape), level=level) == pytest.approx((x.mean(), low, high), rel=1e-12)


def test_interval_at_its_edges():
    assert crossed_interval(np.array([2.0])) == (2.0, -math.inf, math.inf)
    assert crossed_interval(np.full((3, 4), 2.0)) == (2.0, 2.0, 2.0)
    m, low, high = crossed_interval(np.array([[1.0, 2.0], [3.0, 4.5]]))
    assert m == 2.625 and low < m < high and high - m == pytest.approx(m - low)


def simulate(shape: tuple[int, ...], parts: dict[tuple[int, ...], float], draws: int = 1500) -> tuple[float, float]:
    """Coverage of 0 and the mean half-width relative to an oracle's 1.96 sd, for crossed effects of these sds.

    `parts` maps the axes that an effect varies over to its standard deviation: (0,) is a main effect,
    (0, 1) an interaction.
    """
    rng = np.random.default_rng(7)
    covered, widths = 0, []
    for _ in range(draws):
        values = np.zeros(shape)
        for axes, sd in parts.items():
            values = values + sd * rng.normal(size=[n if a in axes else 1 for a, n in enumerate(shape)])
        _, low, high = crossed_interval(values)
        covered += low <= 0 <= high
        widths.append((high - low) / 2)
    sd = math.sqrt(sum(s**2 / math.prod(shape[a] for a in axes) for axes, s in parts.items()))
    return covered / draws, float(np.median(widths)) / (1.96 * sd)


MIXES = {
    "draws": {(0,): 1.0, (0, 1, 2): 1.0},
    "seeds": {(1,): 1.0, (0, 1, 2): 1.0},
    "items": {(2,): 1.0, (0, 1, 2): 1.0},
    "draws and seeds": {(0,): 1.0, (1,): 1.0, (0, 1, 2): 1.0},
    "draws and items": {(0,): 0.3, (2,): 1.0, (0, 1, 2): 1.0},
    "all": {(0,): 0.5, (1,): 0.5, (2,): 1.0, (0, 1, 2): 2.0},
    "all, little": {(0,): 0.1, (1,): 0.1, (2,): 0.5, (0, 1, 2): 1.0},
    "interactions": {(0, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0},
    "draw x seed": {(0, 1): 1.0, (0, 1, 2): 0.1},
    "noise": {(0, 1, 2): 1.0},
}


@pytest.mark.parametrize("mix", MIXES)
def test_three_way_interval_covers(mix):
    coverage, width = simulate((3, 4, 60), MIXES[mix])
    print(f"{mix}: coverage {coverage:.3f}, half-width {width:.2f} of the oracle's")
    assert coverage >= 0.92, f"{mix}: covers {coverage:.3f}"
    assert width < 4.5, f"{mix}: {width:.1f} times as wide as with known variances"


@pytest.mark.parametrize("shape", [(3, 60), (4, 4), (2, 5)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 3.0])
def test_two_way_interval_covers(shape, ratio):
    coverage, width = simulate(shape, {(0,): ratio, (1,): 1.0, (0, 1): 1.0})
    print(f"{shape} {ratio}: coverage {coverage:.3f}, half-width {width:.2f} of the oracle's")
    # Satterthwaite's degrees of freedom are optimistic where a factor of two levels dominates: about 0.90.
    least = 0.88 if shape[0] == 2 else 0.92
    assert coverage >= least, f"{shape}, {ratio}: covers {coverage:.3f}"


def test_verdicts():
    assert [verdict(0.1, 1), verdict(-1, -0.1), verdict(-1, 1), verdict(0, 1), verdict(-1, 0)] == [
        "better", "worse", "unresolved", "unresolved", "unresolved",
    ]  # fmt: skip


def test_auc_interval_is_the_auc_and_covers() -> None:
    rng, hits, truth = np.random.default_rng(0), 0, float(scipy_stats.norm.cdf(1 / np.sqrt(2)))
    wrong = np.arange(120) < 30
    for _ in range(400):
        scores = rng.normal(size=120) + wrong
        value, low, high = auc_interval(scores, wrong)
        assert value == pytest.approx(auc(scores, wrong))
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98
    tied = np.round(rng.normal(size=120) + wrong)
    assert auc_interval(tied, wrong)[0] == pytest.approx(auc(tied, wrong))
    assert np.isnan(auc_interval(tied, wrong & False)[0])
