"""Ranks, areas and intervals."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["better", "worse", "unresolved"]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation with average ranks for ties; NaN when either side is constant.

    >>> spearman(np.array([1, 2, 3]), np.array([10, 20, 15]))
    0.5
    """
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    a, b = stats.rankdata(x), stats.rankdata(y)
    return float(np.corrcoef(a, b)[0, 1])


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties counting one half; NaN when a class is empty.

    >>> auc(np.array([3.0, 1.0, 2.0]), np.array([True, False, False]))
    1.0
    """
    positive = np.asarray(positive, dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    ranks = stats.rankdata(scores)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def auc_interval(scores: np.ndarray, positive: np.ndarray, *, level: float = 0.95) -> tuple[float, float, float]:
    """AUC and its interval: both classes are samples, and the variance is that of their mean placements.

    With V_i the share of negatives below positive i and W_j the share of positives above negative j (ties one half),
    var AUC = var(V) / n + var(W) / m; normal quantiles, cut to 0..1. NaN when a class has fewer than two.
    Source: DeLong, DeLong & Clarke-Pearson 1988.

    >>> value, low, high = auc_interval(np.array([3.0, 2.5, 1.0, 2.0]), np.array([True, True, False, False]))
    >>> value, low, high
    (1.0, 1.0, 1.0)
    """
    positive = np.asarray(positive, dtype=bool)
    a, b = scores[positive], scores[~positive]
    if min(len(a), len(b)) < 2:
        return math.nan, math.nan, math.nan
    n, m = len(a), len(b)
    ranks = stats.rankdata(np.concatenate([a, b]))
    above = (ranks[:n] - stats.rankdata(a)) / m
    below = 1 - (ranks[n:] - stats.rankdata(b)) / n
    value = float(above.mean())
    half = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt(above.var(ddof=1) / n + below.var(ddof=1) / m)
    return value, max(0.0, value - half), min(1.0, value + half)


def crossed_interval(
    values: np.ndarray, *, level: float = 0.95, single: tuple[int, ...] = ()
) -> tuple[float, float, float]:
    """Mean and confidence interval of an array whose axes are crossed random factors (draw, seed, target item).

    The variance of the mean is the sum over axes k with n_k > 1 of var(means along k) / n_k, where the means are taken
    over all other axes; interactions are then counted once for each of their axes, so the interval errs on the wide
    side. The quantile is Student's t at Satterthwaite's degrees of freedom, (sum V_k)^2 / sum(V_k^2 / (n_k - 1)).
    For an axis in `single`, what is compared with the mean is itself one more level of that factor, so its variance is
    var(means) (1 + 1 / n_k). Returns (mean, low, high); the bounds are infinite when no axis has two levels.

    Source: Owen 2007 (the pigeonhole bootstrap) for the crossed variance; Satterthwaite 1946.

    >>> m, low, high = crossed_interval(np.array([1.0, 2.0, 3.0]))
    >>> round(m, 3), round(low, 3), round(high, 3)
    (2.0, -0.484, 4.484)
    """
    parts = []
    for axis, size in enumerate(values.shape):
        if size > 1:
            others = tuple(a for a in range(values.ndim) if a != axis)
            share = 1 / size + (1.0 if axis in single else 0.0)
            parts.append((float(values.mean(axis=others).var(ddof=1)) * share, size - 1))
    mean = float(values.mean())
    total = sum(v for v, _ in parts)
    if not parts:
        return mean, -math.inf, math.inf
    if total == 0:
        return mean, mean, mean
    df = total**2 / sum(v**2 / d for v, d in parts)
    half = float(stats.t.ppf(0.5 + level / 2, df)) * math.sqrt(total)
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> Verdict:
    """`better` when the whole interval of the gain is above zero, `worse` when below, otherwise `unresolved`."""
    return "better" if low > 0 else "worse" if high < 0 else "unresolved"
