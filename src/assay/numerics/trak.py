"""What projected-gradient methods share: second moments of features, summed in blocks, and systems in them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import linalg

from assay.core.errors import InputError

# Rows of one product in float32.
BLOCK = 1024


def gram(blocks: Iterable[np.ndarray], size: int, weights: np.ndarray | None = None) -> np.ndarray:
    """`sum_i w_i x_i x_i^T` over the rows of all blocks, `[size, size]`: products in float32, a few rows at a time, and
    sums in float64, so that long ones keep their digits."""
    total, at = np.zeros((size, size)), 0
    for rows in blocks:
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            rooted = part if weights is None else _rooted(part, weights[at : at + len(part)])
            total += rooted.T @ rooted  # of one matrix with itself half the products are made
            at += len(part)
    return total


def _rooted(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return rows * np.sqrt(weights)[:, None].astype(rows.dtype)


def damped(matrix: np.ndarray, damping: float, size: int | None = None) -> np.ndarray:
    """`matrix + damping tr(matrix)/p I`: the same damping for features of any scale and number p."""
    found = matrix.copy()
    found[np.diag_indices(len(found))] += damping * np.trace(matrix) / (size or len(matrix))
    return found


def inverted(
    method: str, blocks: Iterable[np.ndarray], shape: tuple[int, int], damping: float, x_cd: np.ndarray,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Rows `(M + damping tr(M)/d I)^-1 x` with M = `gram(blocks, d, weights)` of n rows, `[c, d]` float64; and the
    operations that took.

    Of fewer rows than features by the products of the rows: with P the rows times sqrt(w) and l the damping,
    (P^T P + l I)^-1 = (I - P^T (P P^T + l I)^-1 P) / l. Raises `InputError` when the matrix is singular.
    """
    n, d = shape
    x_cd = x_cd.astype(np.float64)
    if n >= d or not damping:
        matrix = damped(gram(blocks, d, weights), damping)
        return solved(whitener(method, matrix), x_cd), n * d**2 + d**3 / 3 + 2 * len(x_cd) * d**2
    # In float64: what is left of x is a small difference where P is large.
    p_nd = np.concatenate(list(blocks)).astype(np.float64)
    p_nd = p_nd if weights is None else _rooted(p_nd, weights)
    kernel = p_nd @ p_nd.T
    factor = whitener(method, damped(kernel, damping, d))
    found = x_cd - solved(factor, x_cd @ p_nd.T) @ p_nd
    found /= damping * np.trace(kernel) / d
    return found, n**2 * d + n**3 / 3 + len(x_cd) * (2 * n**2 + 4 * n * d)


def whitener(method: str, matrix: np.ndarray) -> np.ndarray:
    """L of `matrix = L L^T`, lower triangular: rows `L^-1 x` have the products and angles of `matrix^(-1/2) x`.

    Raises `InputError` when the matrix is singular.
    """
    try:
        factor = linalg.cholesky(matrix, lower=True)
        pivots = np.diag(factor)
        if pivots.min() ** 2 < pivots.max() ** 2 * len(matrix) * np.finfo(np.float64).eps:
            raise linalg.LinAlgError("no digits are left")
        return factor
    except (linalg.LinAlgError, ValueError) as error:
        raise InputError(
            f"{method}: the matrix of the pool's gradients is singular",
            why="there are fewer examples than features, or all gradients are zero",
            fix="set damping above 0; if it is, the model has learnt the pool by heart: train it less",
        ) from error


def whitened(factor: np.ndarray, x_nd: np.ndarray) -> np.ndarray:
    """Rows `L^-1 x`, `[n, d]` float64."""
    return linalg.solve_triangular(factor, x_nd.T.astype(np.float64), lower=True).T


def solved(factor: np.ndarray, x_nd: np.ndarray) -> np.ndarray:
    """Rows `(L L^T)^-1 x`, `[n, d]` float64."""
    return linalg.cho_solve((factor, True), x_nd.T.astype(np.float64)).T
