"""Shares of a budget within bounds: the Euclidean projection on a box-simplex, and whole numbers from it."""

from __future__ import annotations

import numpy as np

from assay.core.errors import InputError


def box_simplex(wanted: np.ndarray, low: np.ndarray, high: np.ndarray, total: float) -> np.ndarray:
    """argmin_x |x - wanted|^2 with sum x = total and low <= x <= high: x = clip(wanted + nu, low, high), `[k]`.

    nu by bisection, then exactly from the entries that are inside their bounds. Raises `InputError` when there is none.

    >>> box_simplex(np.array([5.0, 3.0, 2.0]), np.ones(3), np.array([3.0, 9.0, 9.0]), 10.0).tolist()
    [3.0, 4.0, 3.0]
    """
    wanted, low, high = (np.asarray(v, dtype=np.float64) for v in (wanted, low, high))
    if (low > high).any() or low.sum() > total or high.sum() < total:
        raise InputError(
            f"no shares add up to {total:g} within their bounds",
            why=f"the lowest add up to {low.sum():g}, the highest to {high.sum():g}",
            fix="lower the lower bounds or change the budget",
        )
    below, above = float((low - wanted).min()) - 1, float((high - wanted).max()) + 1
    for _ in range(200):
        middle = (below + above) / 2
        if np.clip(wanted + middle, low, high).sum() < total:
            below = middle
        else:
            above = middle
    x = np.clip(wanted + above, low, high)
    inside = (x > low) & (x < high)
    if inside.any():
        nu = (total - x[~inside].sum() - wanted[inside].sum()) / inside.sum()
        x[inside] = np.clip(wanted[inside] + nu, low[inside], high[inside])
    return x


def whole(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers next to the shares that add up to `total`, `[k]`: the largest remainders are rounded up, of equals
    the first.

    >>> whole(np.array([1.5, 2.5, 6.0]), 10).tolist()
    [2, 2, 6]
    """
    nearest = np.round(shares)
    exact = np.where(np.abs(shares - nearest) < 1e-9 * max(1, total), nearest, shares)
    down = np.floor(exact).astype(np.int64)
    left = int(total - down.sum())
    assert 0 <= left <= len(down), "the shares add up to the total"
    down[np.argsort(-(exact - down), kind="stable")[:left]] += 1
    return down
