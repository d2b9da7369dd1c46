"""Pools that come with their target and with the truth about planted faults: `pool.builtin` of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from assay.data import builtin, images, toys

Kind = Literal["python", "digits", "images"]
SIZE = 12_000


def supplied(
    kind: Kind, *, target: str | None = None, size: int | None = None, count: int | None = None,
    take: images.Take = "random", flip: float = 0.1, path: Path | None = None, seed: int = 0,
) -> tuple[pa.Table, pa.Table, pa.Table, dict[str, Any]]:  # fmt: skip
    """Pool, target, truth, and what was done to make them."""
    if kind == "digits":
        return *toys.digits(flip=flip, seed=seed, train=size or toys.TRAIN, test=count), {}
    if kind == "images":
        assert path is not None, "the study was checked"
        return images.labelled_images(path, size=size, count=count, take=take, flip=flip, seed=seed)
    made = builtin.python_text(target=target or "docs", size=size or SIZE, seed=seed)
    return made.pool, made.target, made.truth, {}
