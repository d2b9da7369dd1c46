"""Kronecker-factored curvature (K-FAC) with corrected eigenvalues (EK-FAC), layer by layer.

The gradient of one example in a layer's weight is a matrix G = sum_t d_t a_t^T `[o, i]`. The Fisher information of the
layer, E vec(G) vec(G)^T, is taken to be diagonal in the basis of S x A, with S and A the second moments of d and a over
positions: in that basis K-FAC's eigenvalues are products of theirs (Martens & Grosse 2015, arXiv:1503.05671), EK-FAC's
are the second moments of the rotated gradients themselves (George et al. 2018, arXiv:1806.03884; for influence
functions Grosse et al. 2023, arXiv:2308.03296).

Two passes over examples whose loss is *summed* over its terms (`numerics.kfac_passes`) give the moments, then, in their
eigenbasis, the corrections. They read gradients as a `Sketch` does, so that every layer with a rule is covered. What is
not an outer product keeps a block of its own: of an embedding the rows stay apart, a vector (a norm's gain, a bias that
is no layer's own) has its dense block, anything else its diagonal.

Legend: b examples, t positions, o outputs, i inputs, R rows and C columns of a block, M positions counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from assay.numerics.layers import Metric

Kind = Literal["kfac", "ekfac"]
Sums = dict[str, Tensor]
"""Sums over examples by name, float64; those of two partitions of the data add up entry by entry."""


@dataclass(frozen=True)
class Block:
    """A parameter whose curvature is kept: a weight, with the bias of its layer, or one by itself."""

    name: str
    shape: tuple[int, int]
    """Rows and columns of its gradient as a matrix, the bias included; a vector is one column."""
    kind: Literal["outer", "lookup", "formed"]
    """How its gradient comes: as factors, as rows of an embedding, or whole."""
    bias: str | None = None
    axis: int = 0
    """Which axis is the layer's output."""
    shared: bool = False
    """Used several times in one forward pass: the uses are added before they are squared."""

    def parts(self, side: int, size: int) -> list[slice]:
        """Pieces of a side, each with a basis of its own; none where the side keeps the coordinates it has."""
        count = self.shape[side]
        plain = self.kind == "formed" and (self.shape[1] > 1 or side == 1) or self.kind == "lookup" and side == 0
        return [] if plain else [slice(i, min(i + size, count)) for i in range(0, count, size)]


@dataclass(frozen=True)
class Side:
    """Basis of one side of a block, piece by piece (none: the coordinates as they are), and eigenvalues `[n]`."""

    parts: tuple[Tensor, ...]
    values: Tensor

    def into(self, x: Tensor) -> Tensor:
        """x Q over the last axis."""
        return self._turned(x, lambda q: q)

    def back(self, x: Tensor) -> Tensor:
        """x Q^T over the last axis."""
        return self._turned(x, lambda q: q.T)

    def _turned(self, x: Tensor, way: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.parts:
            return x
        pieces = x.split([len(q) for q in self.parts], dim=-1)
        turned = [p @ way(q).to(p.dtype) for p, q in zip(pieces, self.parts, strict=True)]
        return turned[0] if len(turned) == 1 else torch.cat(turned, dim=-1)


def bases(blocks: Sequence[Block], sums: Sums, size: int, dtype: torch.dtype) -> dict[str, tuple[Side, Side]]:
    """Eigenvectors and eigenvalues of each side's second moment over positions, by `Moments`' sums."""
    return {b.name: (_side(b, 0, sums, size, dtype), _side(b, 1, sums, size, dtype)) for b in blocks}


def _side(block: Block, side: int, sums: Sums, size: int, dtype: torch.dtype) -> Side:
    count = max(float(sums.get(f"{block.name}|count", torch.ones(()))), 1.0)
    parts, values = [], []
    for i, part in enumerate(block.parts(side, size)):
        n = part.stop - part.start
        total = sums.get(f"{block.name}|{side}|{i}", torch.zeros(n, n, dtype=torch.float64))
        found, vectors = torch.linalg.eigh((total + total.T) / (2 * count))
        parts.append(vectors.to(dtype).contiguous())
        values.append(found.clamp_min(0.0))
    if parts:
        return Side(tuple(parts), torch.cat(values).to(dtype))
    plain = sums.get(f"{block.name}|{side}", torch.full((block.shape[side],), count, dtype=torch.float64))
    return Side((), (plain / count).to(dtype))


@dataclass(frozen=True)
class Factor:
    """The curvature of one block: E over examples of vec(G) vec(G)^T, G the gradient of the summed loss."""

    block: Block
    rows: Side
    columns: Side
    corrected: Tensor
    """E (Q_S^T G Q_A)^2, `[R, C]`."""
    repeats: float = 1.0
    """Positions an example, M / N: K-FAC takes them to be independent."""

    def values(self, kind: Kind) -> Tensor:
        """Eigenvalues `[R, C]`. A block without outer products has but one kind."""
        if kind == "ekfac" or self.block.kind == "formed":
            return self.corrected
        return self.repeats * torch.outer(self.rows.values, self.columns.values)

    def joined(self, given: Mapping[str, Tensor]) -> Tensor:
        """Directions `[k, *shape]` of its parameters as matrices `[k, R, C]`."""
        own, block = given[self.block.name], self.block
        if block.bias is None:
            return own.reshape(len(own), *block.shape)
        bias, matrix = given[block.bias], own.flatten(2)
        return torch.cat([matrix, bias.unsqueeze(2 if block.axis == 0 else 1)], dim=2 - block.axis)

    def split(self, matrices: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `joined`."""
        block = self.block
        if block.bias is None:
            return {block.name: matrices.reshape_as(like[block.name])}
        weight, bias = matrices.split([matrices.shape[2 - block.axis] - 1, 1], dim=2 - block.axis)
        return {
            block.name: weight.reshape_as(like[block.name]),
            block.bias: bias.reshape_as(like[block.bias]),
        }

    def turned(self, matrices: Tensor) -> Tensor:
        """Q_S^T G Q_A."""
        return self.rows.into(self.columns.into(matrices).transpose(1, 2)).transpose(1, 2)

    def back(self, matrices: Tensor) -> Tensor:
        """Q_S R Q_A^T."""
        return self.rows.back(self.columns.back(matrices).transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Factors:
    """Factors of all blocks of a model, from `examples` examples with `terms` loss terms in all."""

    blocks: dict[str, Factor]
    examples: float
    terms: float
    share: float = 1.0
    """Part of the squared gradient norm that lies in the blocks, measured on a few examples."""
    fallback: tuple[str, ...] = ()
    """Parameters whose gradients go without rules."""

    @property
    def names(self) -> list[str]:
        """The parameters covered."""
        return [n for f in self.blocks.values() for n in (f.block.name, f.block.bias) if n is not None]

    @property
    def size(self) -> int:
        """Entries of all blocks."""
        return sum(f.corrected.numel() for f in self.blocks.values())

    def trace(self, kind: Kind = "ekfac", decay: float = 0.0) -> float:
        """Sum of all eigenvalues of F + decay, per loss term."""
        total = sum(float(f.values(kind).double().sum()) for f in self.blocks.values())
        return total * self.examples / self.terms + decay * self.size

    def apply(
        self, function: Callable[[Tensor], Tensor], given: Mapping[str, Tensor], kind: Kind = "ekfac"
    ) -> dict[str, Tensor]:
        """f(F) g for directions g `[k, *shape]` by name; `function` maps the eigenvalues of a block, per loss term.

        F is the Fisher information of the mean loss per term, (1/T) sum over examples of that of the summed loss.
        """
        found: dict[str, Tensor] = {}
        for factor in self.blocks.values():
            scale = function(factor.values(kind).to(given[factor.block.name].dtype) * (self.examples / self.terms))
            found |= factor.split(factor.back(factor.turned(factor.joined(given)) * scale), given)
        return found

    def inverse(
        self, given: Mapping[str, Tensor], *, damping: float, decay: float = 0.0, kind: Kind = "ekfac"
    ) -> dict[str, Tensor]:
        """(H + damping x mean eigenvalue of H in the block)^-1 g, H = F + decay; 0 where H is 0 and is not damped."""
        return self.apply(damped(damping, decay), given, kind)


def damped(damping: float, decay: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Eigenvalues of a block to those of its damped inverse: 1 / (y + damping x mean of y), y = x + decay."""

    def function(values: Tensor) -> Tensor:
        own = values + decay
        shifted = own + damping * own.mean()
        return torch.where(shifted > 0, 1 / shifted, torch.zeros_like(shifted))

    return function


def shifted(shift: float) -> Callable[[Tensor], Tensor]:
    """Eigenvalues to 1 / (x + shift), all of them positive: for a preconditioner, which must not lose a direction."""

    def function(values: Tensor) -> Tensor:
        least = torch.finfo(values.dtype).eps * float(values.max())
        return 1 / (values + shift).clamp_min(least or 1.0)

    return function


def parted(v: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns `[p, k]` over parameters end to end as directions `[k, *shape]` by name."""
    parts = v.T.split([p.numel() for p in like.values()], dim=1)
    return {n: part.reshape(-1, *p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}


def joined(given: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `parted`."""
    return torch.cat([given[n].flatten(1) for n in like], dim=1).T.contiguous()


def gathered(span: float, decay: float = 0.0, weight: float = 1.0, damping: float = 0.0) -> Callable[[Tensor], Tensor]:
    """x -> (1 - e^(-span y)) / y: what a constant push adds up to in a gradient flow so long.

    y = weight x + decay + damping x mean of weight x.
    """

    def function(values: Tensor) -> Tensor:
        y = weight * (values + damping * values.mean()) + decay
        # For small arguments the quotient is 0 / 0, and two terms of its series are exact.
        small = span * y < 1e-6
        return torch.where(small, span * (1 - span * y / 2), -torch.expm1(-span * y) / y.masked_fill(small, 1.0))

    return function


def faded(span: float, decay: float = 0.0, weight: float = 1.0, damping: float = 0.0) -> Callable[[Tensor], Tensor]:
    """x -> e^(-span y): what is left of a change after a gradient flow so long; y as in `gathered`."""
    return lambda values: torch.exp(-span * (weight * (values + damping * values.mean()) + decay))


def scaled(given: Mapping[str, Tensor], metric: Metric, *, inverse: bool = False) -> dict[str, Tensor]:
    """Directions `[k, *shape]` times a metric's factors, or divided by them; what it does not name stays."""
    found = dict(given)
    for name, held in metric.items():
        if name not in found:
            continue
        own = held if isinstance(held, Tensor) else torch.outer(*held).view(found[name].shape[1:])
        found[name] = found[name] / own if inverse else found[name] * own
    return found


def assembled(
    blocks: Sequence[Block], bases: Mapping[str, tuple[Side, Side]], moments: Sums, corrections: Sums
) -> Factors:
    """Factors from the sums of both passes."""
    examples = float(corrections["examples"])
    found = {}
    for block in blocks:
        rows, columns = bases[block.name]
        squares = corrections.get(block.name, torch.zeros(block.shape, dtype=torch.float64))
        count = float(moments.get(f"{block.name}|count", torch.ones(())))
        mean = (squares / examples).to(rows.values.dtype)
        found[block.name] = Factor(block, rows, columns, mean, count / float(moments["examples"]))
    return Factors(found, examples, float(corrections["terms"]))


def united(groups: Sequence[Factors], share: float, fallback: tuple[str, ...]) -> Factors:
    """Factors of groups of blocks, fitted on the same examples, as one."""
    blocks = {n: f for group in groups for n, f in group.blocks.items()}
    return Factors(blocks, groups[0].examples, groups[0].terms, share, fallback)


def footprint(blocks: Sequence[Block], size: int, itemsize: int = 4) -> dict[str, int]:
    """Bytes: `sums` of the larger pass in float64, `factors` that are kept (bases and eigenvalues)."""
    squares = sum((p.stop - p.start) ** 2 for b in blocks for side in (0, 1) for p in b.parts(side, size))
    entries, sides = sum(b.shape[0] * b.shape[1] for b in blocks), sum(sum(b.shape) for b in blocks)
    return {"sums": 8 * max(squares, entries), "factors": itemsize * (squares + entries + sides)}
