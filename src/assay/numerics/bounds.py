"""Columns of statistics and the bounds that rules put on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, and 0 where there is nothing."""
    return np.asarray(part, dtype=np.float64) / np.maximum(whole, 1)


def broken(columns: Mapping[str, np.ndarray], bounds: Mapping[str, tuple[Any, Any]]) -> np.ndarray:
    """How many of the bounds each row breaks; a value at a bound keeps it."""
    count = np.zeros(len(next(iter(columns.values()))), dtype=np.int64)
    for name, (low, high) in bounds.items():
        x = columns[name]
        count += (x < (-np.inf if low is None else low)) | (x > (np.inf if high is None else high))
    return count


def scored(columns: Mapping[str, np.ndarray], bounds: Mapping[str, tuple[Any, Any]]) -> np.ndarray:
    """`[rows, 1 + columns]`: first minus the number of bounds that are broken, then the columns."""
    return np.column_stack([0.0 - broken(columns, bounds), *columns.values()])
