"""Finite differences beside a derivative to the weights of all examples, along random signs."""

from __future__ import annotations

import numpy as np

from assay.core.keys import hash_ids
from assay.core.method import Context

# What all weights change by, and how far from the derivative the differences may be before it is worth a warning.
STEP, APART = 0.02, 0.1


def signs(ids: np.ndarray, index: int) -> np.ndarray:
    """A direction: 1 or -1 for each id, `[n]`."""
    return np.where(hash_ids(ids, "signs", index) % np.uint64(2), 1.0, -1.0)


def gap(seen: np.ndarray, said: np.ndarray) -> float:
    """|seen - said| / |seen|: how far what was seen is from what the derivative says, over targets."""
    return float(np.linalg.norm(seen - said) / max(float(np.linalg.norm(seen)), 1e-30))


def tell(context: Context, name: str, apart: list[float], moved: str) -> None:
    """Note the gaps of all directions, and warn where one is wide. `moved` says what was changed."""
    worst = float(np.max(apart))  # NaN where any is: training at moved weights has diverged
    context.note(
        f"{name}: derivative against finite differences",
        f"off by {worst:.1%} (to {APART:.0%} is well) when {moved} {STEP:.0%} at random",
        ok=worst <= APART, apart=worst,
    )  # fmt: skip
    if not worst <= APART:
        context.warn(
            f"{name}: the derivative is {worst:.0%} off a finite difference, when {moved} {STEP:.0%}: this training is "
            "not smooth, and its metagradients foretell little (assay verify --metasmooth)"
        )
