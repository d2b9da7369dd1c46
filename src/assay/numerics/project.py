"""Random projections whose entries are counters hashed: no table is stored, and device, shard and order cannot matter.

Entry (row, column) of the matrix named `label` under `seed` is the top bit of splitmix64(key ^ (row << 32 | column)),
read as a sign (Rademacher). Legend: b examples, t positions, o outputs, i inputs, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import ClassVar

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


class Sketch(ABC):
    """A linear map of one parameter's per-example gradients to few numbers, given as factors or in full.

    A gradient `[o, i]` comes as its factors, sum_t d_t a_t^T, which go through `out` and `into` one by one and then
    through `merge`; or it comes formed, to `full`. Both ways give the same numbers, so that uses of a shared parameter
    add up whatever layers they are in. Maps are keyed by the parameter's name; the same for every batch and device.
    """

    factored: ClassVar[bool] = False
    """Whether `out` and `into` shrink their sides, so that neither d nor the gradient need ever be whole."""

    @abstractmethod
    def width(self, name: str, shape: Sequence[int]) -> int:
        """How many numbers the gradient of a parameter of this shape becomes."""

    @abstractmethod
    def full(self, name: str, grad: Tensor) -> Tensor:
        """`[b, *shape]` -> `[b, width]`."""

    def out(self, name: str, d_bto: Tensor) -> Tensor:
        """The output side, `[..., o]` -> `[..., r]`."""
        return d_bto

    def into(self, name: str, a_bti: Tensor) -> Tensor:
        """The input side, `[..., i]` -> `[..., s]`."""
        return a_bti

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        """Sum over positions of the product of the two sides, `[b, width]`."""
        return self.full(name, d_btr.transpose(1, 2) @ a_bts)

    def outer(self, name: str, d_bto: Tensor, a_bti: Tensor) -> Tensor:
        """Sketch of sum_t d_t a_t^T, `[b, width]`."""
        return self.merge(name, self.out(name, d_bto), self.into(name, a_bti))

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        """Sketch of the gradient of an embedding `[entries, i]`: row ids_t receives d_t. `[b, width]`."""
        grad = d_bti.new_zeros(d_bti.shape[0], entries, d_bti.shape[-1])
        return self.full(name, grad.scatter_add_(1, ids_bt[..., None].expand_as(d_bti), d_bti))


class Exact(Sketch):
    """No compression: the gradient itself, rows of matrices first."""

    def width(self, name: str, shape: Sequence[int]) -> int:
        return prod(shape)

    def full(self, name: str, grad: Tensor) -> Tensor:
        return grad.flatten(1)


class Factored(Sketch):
    """Two-sided projection of matrix gradients, G `[o, i]` -> P_o G P_i^T `[r, r]` (LoGra, Choe et al. 2024).

    Unbiased for inner products. Vectors (norm gains, biases) get a dense projection to r numbers; further axes of a
    weight (convolutions) count as inputs. A side that is no larger than r is kept as it is.
    """

    factored: ClassVar[bool] = True

    def __init__(self, rank: int, seed: int) -> None:
        assert rank > 0, "rank 0 is `Exact`"
        self.rank, self.seed = rank, seed
        self._held: dict[tuple[str, str, int, torch.device, torch.dtype], Tensor] = {}

    def side(self, name: str, side: str, size: int, like: Tensor) -> Tensor | None:
        """`[r, size]` in the type and on the device of `like`, or None where this side is kept."""
        if size <= self.rank:
            return None
        key = name, side, size, like.device, like.dtype
        if key not in self._held:
            # Made by the CPU's integers wherever it is used, so that devices agree to the last bit.
            made = rademacher(self.rank, size, seed=self.seed, label=f"{name}/{side}")
            self._held[key] = made.to(like.device, like.dtype)
        return self._held[key]

    def _apply(self, name: str, side: str, x: Tensor) -> Tensor:
        matrix = self.side(name, side, x.shape[-1], x)
        return x if matrix is None else x @ matrix.T

    def out(self, name: str, d_bto: Tensor) -> Tensor:
        return self._apply(name, "out", d_bto)

    def into(self, name: str, a_bti: Tensor) -> Tensor:
        return self._apply(name, "in", a_bti)

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        return (d_btr.transpose(1, 2) @ a_bts).flatten(1)

    def full(self, name: str, grad: Tensor) -> Tensor:
        if grad.dim() == 2:
            return self._apply(name, "out", grad)
        g_boi = grad.flatten(2)
        return self._apply(name, "out", self._apply(name, "in", g_boi).transpose(1, 2)).transpose(1, 2).flatten(1)

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        left = self.side(name, "out", entries, d_bti)
        if left is None:
            return super().lookup(name, ids_bt, d_bti, entries)
        return self.merge(name, left.T[ids_bt], self.into(name, d_bti))

    def width(self, name: str, shape: Sequence[int]) -> int:
        sides = (shape[0], prod(shape[1:])) if len(shape) > 1 else (shape[0],) if shape else (1,)
        return prod(min(self.rank, side) for side in sides)

    def __getstate__(self) -> dict[str, object]:
        return {"rank": self.rank, "seed": self.seed, "_held": {}}


def sketch(kind: str, rank: int, seed: int) -> Sketch:
    """The sketch of a name; `rank` 0 is `Exact` whatever the kind."""
    if not rank:
        return Exact()
    return {"factored": Factored}[kind](rank, seed)
