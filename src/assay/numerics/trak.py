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
            weighted = part
            if weights is not None:
                weighted = part * weights[at : at + len(part), None].astype(part.dtype)
            total += weighted.T @ part
            at += len(part)
    return total


def damped(matrix: np.ndarray, damping: float) -> np.ndarray:
    """`matrix + damping tr(matrix)/p I`: the same damping for features of any scale and number."""
    return matrix + damping * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


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
