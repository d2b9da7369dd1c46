"""Ranks, areas, intervals, and intervals that hold together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

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
    axes = range(values.ndim)
    margins = [values.mean(axis=tuple(b for b in axes if b != a))[:, None] for a in axes if values.shape[a] > 1]
    extra = [1.0 if a in single else 0.0 for a in axes if values.shape[a] > 1]
    mean = float(values.mean())
    if not margins:
        return mean, -math.inf, math.inf
    error, df = _crossed_error(margins, extra)
    half = float(_quantile(0.5 + level / 2, error, df)[0])
    return mean, mean - half, mean + half


def _crossed_error(margins: Sequence[np.ndarray], extra: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and Satterthwaite's degrees of freedom of means over crossed factors, `[k]` each.

    `margins` has for each factor the means along it, `[n, k]` or `[..., n, k]`; `extra` how many further levels of it
    what is compared with the mean has, a number or `[k]`.
    """
    parts, sizes = [], [m.shape[-2] for m in margins]
    for margin, size, more in zip(margins, sizes, extra, strict=True):
        parts.append(margin.var(axis=-2, ddof=1) * (1 / size + more))
    total = np.sum(parts, axis=0)
    below = np.sum([v**2 / (n - 1) for v, n in zip(parts, sizes, strict=True)], axis=0)
    df = np.divide(total**2, below, out=np.ones_like(total), where=below > 0)
    return np.sqrt(total), df


def _quantile(share: float, error: np.ndarray, df: np.ndarray) -> np.ndarray:
    """So many standard errors as Student's t has at this share; zero where the error is."""
    return np.where(error > 0, stats.t.ppf(share, df) * error, 0.0)


def family_intervals(
    margins: Sequence[np.ndarray], *, level: float = 0.95, single: np.ndarray | None = None, draws: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:  # fmt: skip
    """Intervals of k means that hold together: with probability `level` all of them contain their truth.

    `margins` has for each crossed factor the means along it, `[n, k]`, a column for each of the k contestants: column
    means are the same in all. Each interval is mean +- t(1 - a/2; df_k) se_k with the standard error and degrees of
    freedom of `crossed_interval`, at one level 1 - a for all; a is the quantile 1 - level of the least p-value of k
    true nulls (single-step minP, the max-t method for unequal degrees of freedom). Its distribution is simulated:
    levels of each factor are drawn normal with the covariance that the contestants show along it, so what they share
    (the baseline's draws, hard items) is not paid for k times. a is at most 1 - level. Contestants that `single` `[k]`
    marks are themselves one more level of the first factor, see `crossed_interval`; all of them the same one. Returns
    (means, low, high, a).

    Source: Westfall & Young 1993, ch. 2; Dudoit & van der Laan 2008, ch. 3.

    >>> m, low, high, a = family_intervals([np.array([[1.0], [2.0], [3.0]])])
    >>> bool(abs(low[0] + 0.484) < 0.2), round(a, 9) <= 0.05
    (True, True)
    """
    means = margins[0].mean(axis=0)
    centred = [m - m.mean(axis=0) for m in margins]
    lot = np.zeros(len(means)) if single is None else np.asarray(single, dtype=float)
    extra = [lot, *[0.0] * (len(margins) - 1)]
    error, df = _crossed_error(margins, extra)
    rng, least = np.random.Generator(np.random.Philox(key=seed)), []
    block = max(1, 4_000_000 // max(m.shape[0] * max(m.shape) for m in margins))
    for start in range(0, draws, block):
        count = min(block, draws - start)
        drawn = [rng.standard_normal((count, len(c), len(c))) @ (c / math.sqrt(len(c) - 1)) for c in centred]
        own, freedom = _crossed_error(drawn, extra)
        first = centred[0] / math.sqrt(len(centred[0]) - 1)
        luck = lot * (rng.standard_normal((count, len(first))) @ first)
        moved = np.abs(luck + np.sum([d.mean(axis=1) for d in drawn], axis=0))
        t = np.divide(moved, own, out=np.zeros_like(own), where=own > 0)
        least.append(2 * stats.t.sf(t, freedom).min(axis=1))
    a = min(1 - level, float(np.quantile(np.concatenate(least), 1 - level)))
    half = _quantile(1 - a / 2, error, df)
    return means, means - half, means + half, a


def verdict(low: float, high: float) -> Verdict:
    """`better` when the whole interval of the gain is above zero, `worse` when below, otherwise `unresolved`."""
    return "better" if low > 0 else "worse" if high < 0 else "unresolved"
