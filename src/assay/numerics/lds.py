"""The linear datamodeling score: do scores predict what retraining on subsets does?

For subsets S_1..S_M of one size, and the loss y_m(q) of target example q after training on S_m, scores s_i(q) predict
sum_{i in S_m} s_i(q). The score of a target is Spearman's correlation over m of that sum with -y_m(q); LDS is the mean
over targets.
Source: Ilyas et al. 2022, arXiv:2202.00622; Park et al. 2023, arXiv:2303.14186.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from assay.core.errors import InputError

FEWEST_SUBSETS, FEWEST_TARGETS = 10, 4
SPLITS = 64
Label = Literal["lds_fixed", "lds_avg"]


@dataclass(frozen=True)
class Lds:
    """An LDS with its interval. `lds_fixed`: against one seed and order; `lds_avg`: against the mean over seeds.

    `draws` are the bootstrap's means `[draws, 3]`: with subsets and targets drawn, with subsets alone, targets alone.
    """

    label: Label
    value: float
    low: float
    high: float
    level: float
    by_target: np.ndarray
    draws: np.ndarray
    subsets: int
    fingerprint: str


@dataclass(frozen=True)
class Ceiling:
    """The LDS of scores that are perfect but cannot know the seed: against one seed, and against the mean over seeds.

    None where one seed was trained: nothing then tells signal from noise. None, too, where no loss differs.
    """

    one: float | None
    average: float | None


def fingerprint(facts: Mapping[str, Any], *arrays: np.ndarray) -> str:
    """Hash of a protocol: what was trained on which subsets and measured how. Figures of two are not comparable."""
    hasher = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for array in arrays:
        hasher.update(f"{array.dtype.str}{array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()[:16]


def lds(masks: np.ndarray, scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each target, `[q]`.

    `masks` [M, n] bool, `scores` [n, q] (positive = adding the example lowers the loss) or `[n]` for all targets alike,
    `values` [M, q] losses after training on each subset. Ties take average ranks.

    Raises `InputError` for numbers that are not finite, for sums or losses of a target that are all the same, and for
    subsets of several sizes: there a constant added to all scores would count.

    >>> masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=bool)
    >>> lds(masks, np.array([3.0, 2.0, 1.0]), np.array([[0.1], [0.2], [0.3]]))
    array([1.])
    """
    predicted, measured = _pair(masks, scores, values)
    return _correlation(_ranks(predicted), _ranks(measured))


def score(
    masks: np.ndarray, scores: np.ndarray, values: np.ndarray, *, label: Label, fingerprint: str = "",
    level: float = 0.95, draws: int = 2000, seed: int = 0,
) -> Lds:  # fmt: skip
    """LDS against retraining at several seeds, `values` [M, R, q], with a two-way bootstrap interval.

    `lds_fixed` reads the first seed, `lds_avg` the mean of all. Subsets and targets are drawn together, for targets
    share subsets. Drawing both counts what belongs to a single pair three times (Owen 2007, doi:10.1214/07-AOAS122),
    so the draws are shrunk to the variance V_subsets + V_targets - V_pairs, with V_pairs = V_both - V_subsets -
    V_targets, and widened as Student's t is against the normal law. The interval is the estimate with the quantiles of
    the draws about their mean.
    """
    at = values[:, 0] if label == "lds_fixed" else values.mean(axis=1)
    predicted, measured = _pair(masks, scores, at)
    if len(predicted) < FEWEST_SUBSETS or predicted.shape[1] < FEWEST_TARGETS:
        raise InputError(
            f"{len(predicted)} subsets and {predicted.shape[1]} targets are too few for an interval",
            why=f"it takes {FEWEST_SUBSETS} subsets and {FEWEST_TARGETS} targets", fix="give more of them",
        )  # fmt: skip
    each = _correlation(_ranks(predicted), _ranks(measured))
    means = _bootstrap(predicted, measured, each, draws, seed)
    low, high = _interval(float(each.mean()), means, predicted.shape, level)
    return Lds(
        label, float(each.mean()), max(low, -1.0), min(high, 1.0), level, each, means, len(predicted), fingerprint
    )


def difference(one: Lds, other: Lds) -> tuple[float, float, float]:
    """LDS of one minus that of another with its interval, over the same draws of subsets and targets.

    Raises `InputError` when the two were measured by different protocols: such figures cannot be compared.
    """
    if (one.fingerprint, one.label, one.level, len(one.by_target), len(one.draws)) != (
        other.fingerprint, other.label, other.level, len(other.by_target), len(other.draws),
    ):  # fmt: skip
        raise InputError(
            "these LDS figures cannot be compared",
            why=f"one is {one.label} of protocol {one.fingerprint or '?'}, the other {other.label} of "
            f"{other.fingerprint or '?'}: other subsets, targets or training give other figures for the same scores",
            fix="measure both on one bank",
        )
    value = one.value - other.value
    low, high = _interval(value, one.draws - other.draws, (one.subsets, len(one.by_target)), one.level)
    return value, low, high


def ceiling(values: np.ndarray) -> Ceiling:
    """What noise of seeds allows, from `values` [M, R, q] by split halves.

    Seeds are split into two halves of h, as often as it differs up to 64 times; r_h is the mean Spearman correlation
    of their mean losses over subsets. By Spearman and Brown one seed has the reliability r = r_h / (h - (h - 1) r_h),
    the mean of R has R r / (1 + (R - 1) r), and scores that are right correlate at most with its square root. Targets
    whose losses at some seed are the same for every subset have no order and are left out; None if no other is left.
    Source: Spearman 1910; Brown 1910.
    """
    values = values[:, :, ~_flat(values).any(axis=0)]
    _, seeds, targets = values.shape
    if seeds < 2 or not targets:
        return Ceiling(None, None)
    half = seeds // 2
    found = []
    for left, right in _splits(seeds, half):
        a, b = values[:, left].mean(axis=1), values[:, right].mean(axis=1)
        found.append(_correlation(_ranks(a), _ranks(b)).mean())
    both = float(np.mean(found))
    single = max(0.0, both / (half - (half - 1) * both))
    return Ceiling(math.sqrt(single), math.sqrt(seeds * single / (1 + (seeds - 1) * single)))


def _splits(seeds: int, half: int) -> list[tuple[list[int], list[int]]]:
    rng, known = np.random.default_rng(0), {}
    for _ in range(SPLITS):
        order = rng.permutation(seeds)
        left, right = sorted(order[:half].tolist()), sorted(order[half : 2 * half].tolist())
        known[tuple(sorted((tuple(left), tuple(right))))] = left, right
    return list(known.values())


def _pair(masks: np.ndarray, scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured good, `[M, q]` each, both higher = better; checked."""
    masks, scores = np.asarray(masks, dtype=bool), np.asarray(scores, dtype=np.float64)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.shape[1] == 1:
        scores = np.broadcast_to(scores, (len(scores), values.shape[1]))
    if masks.shape != (len(values), len(scores)) or scores.shape[1] != values.shape[1]:
        raise InputError(
            f"masks {masks.shape}, scores {scores.shape} and losses {values.shape} do not fit",
            why="they are subsets x examples, examples x targets, subsets x targets",
        )
    sizes = masks.sum(axis=1)
    if len(np.unique(sizes)) > 1:
        raise InputError(
            f"the subsets have from {sizes.min()} to {sizes.max()} examples",
            why="with subsets of several sizes, a constant added to all scores changes the figure",
            fix="draw subsets of one size",
        )
    for what, numbers in (("scores", scores), ("losses", values)):
        if not np.isfinite(numbers).all():
            count = int((~np.isfinite(numbers)).sum())
            raise InputError(f"{count} of the {what} are not finite", why="a rank of nothing is nothing")
    predicted = masks.astype(np.float64) @ scores
    for what, numbers in (("predictions", predicted), ("losses", values)):
        flat = np.flatnonzero(_flat(numbers))
        if len(flat):
            raise InputError(
                f"the {what} of {len(flat)} of {values.shape[1]} targets are the same for every subset",
                where=f"target {flat[0]}", why="equal numbers have no order, so there is nothing to correlate",
                fix="drop the method or those targets",
            )  # fmt: skip
    return predicted, -np.asarray(values, dtype=np.float64)


def _flat(values: np.ndarray) -> np.ndarray:
    """Where the numbers along the first axis are all the same, but for rounding."""
    return np.ptp(values, axis=0) <= 1e-12 * np.abs(values).max(axis=0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks along the first axis."""
    return stats.rankdata(values, axis=0)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the first axis, `[q]`."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))


def _bootstrap(predicted: np.ndarray, measured: np.ndarray, each: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Means `[draws, 3]` with both, subsets alone, and targets alone drawn; the same draws for every method.

    With counts c of drawn subsets, the centred average rank of subset m among the drawn is (1/2) sum_k c_k sign(x_m -
    x_k): ranks of every draw are one product of matrices.
    """
    (subsets, targets), rng = predicted.shape, np.random.default_rng(seed)
    drawn = rng.multinomial(subsets, np.full(subsets, 1 / subsets), size=draws).astype(np.float32)
    chosen = rng.multinomial(targets, np.full(targets, 1 / targets), size=draws) / targets
    rho = np.empty((draws, targets))
    for q in range(targets):
        x, y = (drawn @ np.sign(v[None, :, q] - v[:, None, q]).astype(np.float32) for v in (predicted, measured))
        cross, own, other = ((drawn * a * b).sum(axis=1) for a, b in ((x, y), (x, x), (y, y)))
        with np.errstate(invalid="ignore", divide="ignore"):
            rho[:, q] = cross / np.sqrt(own.astype(np.float64) * other)
    rho = np.where(np.isfinite(rho), rho, each)  # a draw of equal numbers alone says nothing of this target
    return np.stack([(rho * chosen).sum(axis=1), rho.mean(axis=1), chosen @ each], axis=1)


def _interval(value: float, means: np.ndarray, shape: tuple[int, ...], level: float) -> tuple[float, float]:
    both, subsets, targets = means.var(axis=0)
    if both == 0:
        return value, value
    pairs = max(0.0, both - subsets - targets)
    small = [n / (n - 1) for n in shape]  # a bootstrap's variance is that of n - 1
    parts = [subsets * small[0], targets * small[1]]
    variance = max(sum(parts) - pairs, subsets, targets)
    # Satterthwaite's degrees of freedom: the variance itself is an estimate from few subsets and targets.
    df = sum(parts) ** 2 / sum(v * v / (n - 1) for v, n in zip(parts, shape, strict=True))
    wide = float(stats.t.ppf(0.5 + level / 2, df) / stats.norm.ppf(0.5 + level / 2))
    scale = wide * math.sqrt(min(variance / both, 1.5))
    low, high = np.quantile(means[:, 0] - means[:, 0].mean(), [(1 - level) / 2, (1 + level) / 2])
    return value + scale * float(low), value + scale * float(high)
