"""Gauss-Newton and Fisher matrices of small models from the rows that they are sums of, kept as factors.

H = (1/N) sum_i sum_c s_ic s_ic^T. In a layer that an example passes once, the row is an outer product d_ic a_i^T with
one a for all c, so n (C o + i) numbers stand for n C o i of them, products are a few large matrix products, and the
matrix itself is sum_i (sum_c d_ic d_ic'^T) x (a_i a_i'^T): for symmetric blocks a quarter of a plain product's work,
and n times less of it. Legend: n examples, c rows of one, o outputs, i inputs, p parameters, k vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from assay.core.task import Inputs, Params
from assay.numerics.operator import Operator
from assay.numerics.persample import Loss, gradients
from assay.numerics.project import Sketch

# Numbers of one intermediate of a product: what a core's caches hold, more or less.
CACHED = 1 << 20


@dataclass(frozen=True)
class Block:
    """A layer's part of all rows: `d` `[n, c, o]` and `a` `[n, i]`. Columns of `a` belong to its parameters (a weight
    and a bias, whose input is 1) in turn: `parts` are where each one's entries start, and how many inputs it has."""

    d: Tensor
    a: Tensor
    parts: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.d.shape[2], self.a.shape[1]

    @property
    def places(self) -> Iterator[tuple[slice, slice]]:
        """Of each parameter: its entries among all, and its columns of `a`."""
        at = 0
        for start, width in self.parts:
            yield slice(start, start + self.shape[0] * width), slice(at, at + width)
            at += width

    def take(self, v_pk: Tensor) -> Tensor:
        """The layer's entries as `[o, i, k]`."""
        o, k = self.shape[0], v_pk.shape[1]
        return torch.cat([v_pk[own].view(o, -1, k) for own, _ in self.places], dim=1)

    def put(self, found_pk: Tensor, x_oik: Tensor) -> None:
        for own, columns in self.places:
            found_pk[own] = x_oik[:, columns].reshape(-1, x_oik.shape[2])


def block(start: int, d: Tensor, a: Tensor) -> Block:
    return Block(d, a, ((start, a.shape[1]),))


def merged(blocks: Sequence[Block]) -> list[Block]:
    """Those with the same output side as one: a bias goes with its weight."""
    found: list[Block] = []
    for b in blocks:
        last = found[-1] if found else None
        if last is not None and last.d.shape == b.d.shape and torch.equal(last.d, b.d):
            found[-1] = Block(last.d, torch.cat([last.a, b.a], dim=1), last.parts + b.parts)
        else:
            found.append(b)
    return found


class Rows(Operator):
    """(1/N) sum of s s^T over rows that are held as factors."""

    def __init__(self, params: Params, blocks: Sequence[Block], count: int, *, decay: float = 0.0) -> None:
        super().__init__(params, count, decay)
        self.blocks = merged(blocks)
        self._made = 0.0

    def flops(self, forward: float) -> float:
        """Of the rows (a forward and C backward passes), of the products, and of the matrix if it was asked for."""
        n, c, _ = self.blocks[0].d.shape
        outputs = sum(b.shape[0] for b in self.blocks)
        return (1 + 2 * c) * forward + self.products * 4.0 * n * (self.size + c * outputs) + self._made

    def total(self, v_pk: Tensor) -> Tensor:
        n, _, _ = self.blocks[0].d.shape
        widest = max(b.shape[0] for b in self.blocks)
        parts = v_pk.split(max(1, CACHED // (n * widest)), dim=1)
        return torch.cat([self._product(part) for part in parts], dim=1)

    def _product(self, v_pk: Tensor) -> Tensor:
        k = v_pk.shape[1]
        along = torch.zeros(*self.blocks[0].d.shape[:2], k, dtype=v_pk.dtype)
        for b in self.blocks:
            o, i = b.shape
            moved = b.a @ b.take(v_pk).transpose(0, 1).reshape(i, o * k)
            along.baddbmm_(b.d, moved.view(-1, o, k))
        found = torch.zeros_like(v_pk)
        for b in self.blocks:
            o, i = b.shape
            back = torch.bmm(b.d.transpose(1, 2), along).view(-1, o * k)
            b.put(found, (b.a.T @ back).view(i, o, k).transpose(0, 1))
        return found

    def trace(self) -> float:
        """Exact: sum of |d_ic|^2 |a_i|^2."""
        parts = [b.d.square().sum(dim=(1, 2)) @ b.a.square().sum(dim=1) for b in self.blocks]
        return float(sum(parts)) / self.count + self.decay * self.size

    def dense(self) -> Tensor:
        """The matrix, block by block, each from the products of output sides and of input sides."""
        matrix = torch.zeros(self.size, self.size, dtype=self.blocks[0].d.dtype)
        for at, left in enumerate(self.blocks):
            for right in self.blocks[: at + 1]:
                made = self._block(left, right)
                for (x, i), (y, j) in product(left.places, right.places):
                    part = made[:, i, :, j].reshape(x.stop - x.start, y.stop - y.start)
                    matrix[x, y] = part
                    if left is not right:
                        matrix[y, x] = part.T
        matrix /= self.count
        matrix.diagonal().add_(self.decay)
        return matrix

    def _block(self, left: Block, right: Block) -> Tensor:
        """sum_i (sum_c d d'^T)_i x (a a'^T)_i as `[o, i, o', i']`. Of symmetric pairs one is made."""
        (o, i), (o2, i2) = left.shape, right.shape
        out, into = _pairs(o, o2, left is right), _pairs(i, i2, left is right)
        sides = (left.d.transpose(1, 2) @ right.d)[:, out[0], out[1]]
        found = sides.new_zeros(len(out[0]), len(into[0]))
        step = max(1, CACHED // len(sides))
        for start in range(0, len(into[0]), step):
            x, y = into[0][start : start + step], into[1][start : start + step]
            found[:, start : start + step] = sides.T @ (left.a[:, x] * right.a[:, y])
        self._made += 2.0 * len(sides) * found.numel()
        if left is right:
            found = found[_places(o)][:, _places(i)].view(o, o, i, i)
        return found.view(o, o2, i, i2).transpose(1, 2)


def _pairs(m: int, n: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Indices of all pairs, or of those on and below the diagonal."""
    if symmetric:
        low = torch.tril_indices(m, m)
        return low[0], low[1]
    return torch.arange(m).repeat_interleave(n), torch.arange(n).repeat(m)


def _places(m: int) -> Tensor:
    """Where each pair of m stands among those on and below the diagonal, `[m * m]`."""
    x, y = torch.meshgrid(torch.arange(m), torch.arange(m), indexing="ij")
    high, low = torch.maximum(x, y), torch.minimum(x, y)
    return (high * (high + 1) // 2 + low).flatten()


class Factors(Sketch):
    """Takes down the two factors of each parameter's gradient; `single` as long as there is just one pair."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.single = True

    def width(self, name: str, shape: Sequence[int]) -> int:
        return 1

    def _keep(self, name: str, d_bo: Tensor, a_bi: Tensor) -> Tensor:
        self.single = self.single and name not in self.found
        self.found[name] = d_bo, a_bi
        return d_bo.new_zeros(len(d_bo), 1)

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        self.single = self.single and d_btr.shape[1] == 1
        return self._keep(name, d_btr[:, 0], a_bts[:, 0])

    def full(self, name: str, grad: Tensor) -> Tensor:
        return self._keep(name, grad.flatten(1), grad.new_ones(len(grad), 1))

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        self.single = False
        return d_bti.new_zeros(len(d_bti), 1)


def factors(
    module: nn.Module, readings: Sequence[Loss], params: Params, inputs: Inputs, only: set[str]
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """`{name: (d [b, c, o], a [b, i])}` of the gradients of C functions of each example, None if they are no single
    outer products."""
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    for reading in readings:
        sketch = Factors()
        gradients(module, reading, params, inputs, sketch, only=only)
        if not sketch.single:
            return None
        found.append(sketch.found)
    return {n: (torch.stack([f[n][0] for f in found], dim=1), a) for n, (_, a) in found[0].items()}
