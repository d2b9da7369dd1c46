"""Random projections whose entries are counters hashed: no table is stored, and device, shard and order cannot matter.

Entry (row, column) of the matrix named `label` under `seed` is the top bit of splitmix64(key ^ (row << 32 | column)),
read as a sign (Rademacher). Legend: b examples, t positions, o outputs, i inputs, r rank.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from torch import Tensor


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea & Flood 2014 on uint64, elementwise, modulo 2^64."""
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def rademacher(rows: int, columns: int, *, seed: int, label: str) -> Tensor:
    """`[rows, columns]` float32 of +-1/sqrt(rows), so that E<Px, Py> = <x, y>.

    Var<Px, Py> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / rows (Achlioptas 2003).
    """
    key = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}/{label}".encode()))
    counters = (np.arange(rows, dtype=np.uint64)[:, None] << np.uint64(32)) | np.arange(columns, dtype=np.uint64)
    signs = (splitmix64(counters ^ key) >> np.uint64(63)).astype(np.float32) * 2 - 1
    return torch.from_numpy(signs / np.float32(np.sqrt(rows)))


class Factored:
    """Two-sided projection of matrix gradients, G `[o, i]` -> P_o G P_i^T `[r, r]` (LoGra, Choe et al. 2024).

    Unbiased for inner products. Vectors (norm gains, biases) get a dense projection to r numbers. A side that is no
    larger than r is kept as it is. With `rank = 0` nothing is projected: gradients are exact.
    """

    def __init__(self, rank: int, seed: int) -> None:
        self.rank, self.seed = rank, seed
        self._held: dict[tuple[str, str, int], Tensor] = {}

    def side(self, label: str, side: str, size: int) -> Tensor | None:
        """`[r, size]`, or None where this side is kept."""
        if not self.rank or size <= self.rank:
            return None
        key = label, side, size
        if key not in self._held:
            self._held[key] = rademacher(self.rank, size, seed=self.seed, label=f"{label}/{side}")
        return self._held[key]

    def width(self, size: int) -> int:
        """How many numbers a side of this size becomes."""
        return size if not self.rank else min(self.rank, size)

    def __getstate__(self) -> dict[str, object]:
        return {"rank": self.rank, "seed": self.seed, "_held": {}}
