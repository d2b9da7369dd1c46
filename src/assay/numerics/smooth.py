"""Metasmoothness: whether a training run answers to its data weights in a straight line.

Three trainings, of data weights w, w + h v and w + 2 h v, and what they end in: the two moves between them are alike
where training is smooth at that scale. Reference: Engstrom et al. 2025, arXiv:2503.13751, definition 2 (S); the two
figures beside it are ours, and mend its weakness for coordinates that turn back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Smoothness:
    """Of one direction v; every figure is NaN where there is nothing to judge by."""

    agreement: float
    """S: over coordinates j, the mean of sign(a_j) sign(b_j) weighted by |a_j + b_j|; a, b the two moves. In -1..1."""
    mended: float
    """S': weighted by |a_j| + |b_j|. S gives no weight to a coordinate that comes back to where it was, S' does: of
    trainings that have nothing to do with one another S is 0, and S' -1/2."""
    curvature: float
    """|b - a| / |a + b|: 0 for an affine response."""
    metric: float
    """S with coordinates in units of 1 / their scale (Adam's: the root of its second moment); NaN without scales."""
    linearity: float
    """Of the values that are read from the weights: see `linearity`."""


def smoothness(
    ends: tuple[np.ndarray, np.ndarray, np.ndarray], values: tuple[np.ndarray, np.ndarray, np.ndarray],
    scale: np.ndarray | None = None,
) -> Smoothness:  # fmt: skip
    """From the weights `[p]` that three trainings end in, and the values `[q]` that are read from each.

    `scale` [p]: a coordinate's moves are multiplied by it for `metric`: S does not change when all weights are scaled
    or when signs are turned, and does when each has a scale of its own.

    >>> a = np.array([1.0, -2.0])
    >>> smoothness((0 * a, a, 2 * a), (0 * a, a, 2 * a)).agreement
    1.0
    """
    first, middle, last = (np.asarray(e, dtype=np.float64) for e in ends)
    a, b = middle - first, last - middle
    own = math.nan if scale is None else _signs(a, b, np.asarray(scale, dtype=np.float64) * np.abs(last - first))
    far = float(np.linalg.norm(last - first))
    bend = float(np.linalg.norm(b - a)) / far if far else math.nan
    start, half, whole = (np.asarray(v, dtype=np.float64) for v in values)
    return Smoothness(
        _signs(a, b, np.abs(last - first)), _signs(a, b, np.abs(a) + np.abs(b)), bend, own,
        linearity(half - start, whole - half),
    )  # fmt: skip


def _signs(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    total = float(weight.sum())
    if not total or not math.isfinite(total):
        return math.nan
    return float((weight * np.sign(a) * np.sign(b)).sum() / total)


def linearity(a: np.ndarray, b: np.ndarray) -> float:
    """1 - (2/3) |b - a|^2 / (|a|^2 + |b|^2) of two moves of equal length along one direction.

    The share of the moves' squares that is a straight line: where each of the three trainings adds noise of its own to
    a line, |a|^2 + |b|^2 is that of the line and 4 parts of noise, and |b - a|^2 is 6 parts. 1 for an affine response;
    0 in the mean for three trainings that have nothing to do with one another; -1/3 where the second move takes the
    first one back. NaN when nothing moves.

    >>> linearity(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    1.0
    """
    total = float(a @ a + b @ b)
    if not total or not math.isfinite(total):
        return math.nan
    return 1 - 2 / 3 * float((b - a) @ (b - a)) / total
