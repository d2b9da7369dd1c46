"""Ranks and areas against scipy and brute force; intervals against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from assay.numerics.stats import auc, auc_interval, crossed_interval, family_intervals, spearman, verdict


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


# Intervals that hold together.


def columns(values: np.ndarray) -> list[np.ndarray]:
    """Means of `[k, draws, seeds, items]` along each crossed factor, a column for each of the k."""
    return [values.mean(axis=tuple(b for b in (1, 2, 3) if b != a)).T for a in (1, 2, 3)]


def test_one_contestant_has_the_plain_interval() -> None:
    """With one factor Student's t is exact: a is the level, up to the simulation's error."""
    x = np.random.default_rng(2).normal(size=(8, 1))
    m, low, high, a = family_intervals([x], draws=20_000)
    want = crossed_interval(x[:, 0])
    assert m[0] == pytest.approx(want[0]) and a == pytest.approx(0.05, abs=0.006)
    assert low[0] == pytest.approx(want[1], rel=0.05) and high[0] == pytest.approx(want[2], rel=0.05)
    assert a <= 0.05 + 1e-12 and low[0] <= want[1] + 1e-9 and high[0] >= want[2] - 1e-9, "never narrower than alone"


def test_a_contestant_that_is_one_more_level_has_the_wider_interval() -> None:
    """As `crossed_interval` with `single`: alone, and beside one that is none."""
    x = np.random.default_rng(6).normal(size=(8, 1))
    want = crossed_interval(x[:, 0], single=(0,))
    _, low, high, a = family_intervals([x], single=np.array([True]), draws=20_000)
    assert a == pytest.approx(0.05, abs=0.006) and high[0] - low[0] == pytest.approx(want[2] - want[1], rel=0.05)
    _, low, high, a = family_intervals([np.repeat(x, 2, axis=1)], single=np.array([True, False]), draws=4000)
    assert (high - low)[0] == pytest.approx(3 * (high - low)[1]), "sqrt(1 + 1/8) over sqrt(1/8)"


def test_equal_contestants_pay_once_and_independent_ones_pay_sidak() -> None:
    """k equal ones are one; of k independent ones with many levels each, 1 - a = (1 - level)^(1/k)."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 1))
    assert family_intervals([np.repeat(x, 12, axis=1)], draws=20_000)[3] == family_intervals([x], draws=20_000)[3]
    # Columns that are orthogonal in the sample are independent in the simulation.
    q = np.linalg.qr(rng.normal(size=(60, 13)) - 0)[0]
    apart = np.linalg.qr(np.column_stack([np.ones(60), q]))[0][:, 1:13]
    a = family_intervals([apart], draws=40_000)[3]
    assert a == pytest.approx(1 - 0.95 ** (1 / 12), rel=0.12)


def test_order_and_scale_do_not_matter_and_the_seed_is_its_own() -> None:
    x = np.random.default_rng(4).normal(size=(9, 4)) * [1, 2, 30, 400]
    m, low, high, a = family_intervals([x])
    turned = family_intervals([x[:, ::-1]])
    assert turned[3] == pytest.approx(a, rel=1e-9) and turned[1] == pytest.approx(low[::-1]) and (m == x.mean(0)).all()
    assert family_intervals([x * 7])[3] == pytest.approx(a, rel=1e-9)
    assert family_intervals([x])[3] == a != family_intervals([x], seed=1)[3]
    nothing = family_intervals([np.full((5, 2), 3.0)])
    assert nothing[1].tolist() == nothing[2].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("shared", [0.0, 1.0], ids=["apart", "with a common baseline"])
def test_all_intervals_hold_together(shared: float) -> None:
    """Twelve contestants against five random draws that they share: all truths inside in about 95 of 100 trials, where
    plain intervals lose one in many more."""
    rng, trials, together, alone = np.random.default_rng(5), 200, 0, 0
    for _ in range(trials):
        base = shared * (rng.normal(size=(1, 5, 1, 1)) + 0.5 * rng.normal(size=(1, 5, 5, 30)))
        own = rng.normal(size=(12, 1, 5, 1)) + 0.5 * rng.normal(size=(12, 1, 1, 30)) + rng.normal(size=(12, 1, 5, 30))
        found = columns(np.broadcast_to(base - own, (12, 5, 5, 30)))
        _, low, high, _ = family_intervals(found, draws=400)
        together += bool(((low <= 0) & (high >= 0)).all())
        plain = [crossed_interval((base - own)[k]) for k in range(12)]
        alone += all(a <= 0 <= b for _, a, b in plain)
    print(f"together {together / trials:.3f}, alone {alone / trials:.3f}")
    assert together / trials >= 0.91 and alone / trials < together / trials - 0.1
