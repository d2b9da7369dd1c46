"""Products of examples' gradients with those of a target, batch by batch: no row of the pool is kept.

In a layer that an example passes once the gradient is an outer product, and <d a^T, e b^T> = <d, e> <a, b>: a product
with one of many targets costs o + i, not o i, and no gradient is formed. Elsewhere the target's gradients are
directions, as in `ghost`. Legend: b examples, q targets, c columns (q, or 1 for their mean), o outputs, i inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.numerics.ghost import Products
from assay.numerics.project import Exact, Sketch
from assay.numerics.rows import Factors

Read = Callable[[Sketch], Mapping[str, Tensor]]
"""Gradients of one batch through a sketch, by name."""
Sides = Mapping[str, tuple[Tensor, Tensor]]
"""Of each parameter the two factors of the examples' gradients, `[b, o]` and `[b, i]`."""


@dataclass(frozen=True)
class Queries:
    """The target's gradients, at unit length where cosines are wanted: as `sides` of each, or as directions `along`
    `[c, *shape]`. `single`: whether they came as single outer products, as those of the pool will then."""

    sides: Sides | None
    along: Mapping[str, Tensor]
    single: bool

    @property
    def directions(self) -> Mapping[str, Tensor]:
        """`[c, o, i]` by name, formed if they were not."""
        if self.sides is None:
            return self.along
        return {n: e[:, :, None] * b[:, None, :] for n, (e, b) in self.sides.items()}


def queries(
    reads: Callable[[], Iterable[Read]], shapes: Mapping[str, torch.Size], *, unit: bool, places: Tensor | None
) -> Queries:
    """Of all batches of a target, which `reads` gives anew each time; `places`: where each of its examples stands in
    their order, None for the mean."""
    held = _all_sides(reads())
    if held is None:
        parts = [_formed(read, places is not None, unit) for read in reads()]
        along = {n: torch.cat([rows[n] for rows, _ in parts]) for n in parts[0][0]}
        if places is None:
            count = sum(size for _, size in parts)
            along = {n: g.sum(dim=0, keepdim=True) / count for n, g in along.items()}
        else:
            along = {n: g[places] for n, g in along.items()}
        return Queries(None, {n: g.view(-1, *shapes[n]) for n, g in along.items()}, False)
    if unit:
        scale = _inverse(squares(held))
        held = {n: (e * scale[:, None], b) for n, (e, b) in held.items()}
    if places is None:
        return Queries(None, {n: (e.T @ b)[None] / len(e) for n, (e, b) in held.items()}, True)
    return Queries({n: (e[places], b[places]) for n, (e, b) in held.items()}, {}, True)


def met(read: Read, asked: Queries, *, unit: bool) -> Tensor:
    """`[b, c]` float64: products of a batch's gradients, at unit length if `unit`, with the target's."""
    own = sides(read) if asked.single else None
    if own is not None:
        found, lengths = _products(own, asked), squares(own) if unit else None
    elif unit:
        rows, along = read(Exact()), asked.directions
        found = sum(g @ along[n].flatten(1).T.to(g.dtype) for n, g in rows.items() if n in along)
        lengths = sum(g.double().square().sum(dim=1) for g in rows.values())
    else:
        found, lengths = sum(g.double() for g in read(Products(asked.directions)).values()), None
    assert isinstance(found, Tensor), "some parameter is read"
    return found.double() if lengths is None else found.double() * _inverse(lengths)[:, None]  # type: ignore[arg-type]


def sides(read: Read) -> Sides | None:
    """The factors of a batch's gradients, float64; None where they are no single outer products."""
    sketch = Factors()
    read(sketch)
    return {n: (d.double(), a.double()) for n, (d, a) in sketch.found.items()} if sketch.single else None


def squares(own: Sides) -> Tensor:
    """Squared lengths of the gradients, `[b]`."""
    return torch.stack([d.square().sum(dim=1) * a.square().sum(dim=1) for d, a in own.values()]).sum(dim=0)


def _all_sides(reads: Iterable[Read]) -> Sides | None:
    """Of all batches together; None at the first one that has none."""
    found: list[Sides] = []
    for read in reads:
        own = sides(read)
        if own is None:
            return None
        found.append(own)
    return {n: (torch.cat([f[n][0] for f in found]), torch.cat([f[n][1] for f in found])) for n in found[0]}


def _formed(read: Read, each: bool, unit: bool) -> tuple[dict[str, Tensor], int]:
    """A batch's gradients `[b, p]` by name, or their sum `[1, p]`; and how many they are."""
    rows = dict(read(Exact()))
    count = len(next(iter(rows.values())))
    if unit:
        lengths = torch.stack([g.double().square().sum(dim=1) for g in rows.values()]).sum(dim=0)
        rows = {n: g * _inverse(lengths)[:, None].to(g.dtype) for n, g in rows.items()}
    return (rows if each else {n: g.sum(dim=0, keepdim=True) for n, g in rows.items()}), count


def _inverse(lengths: Tensor) -> Tensor:
    """1 / sqrt, and 0 for 0."""
    return torch.where(lengths > 0, lengths.rsqrt(), 0.0)


def _products(own: Sides, asked: Queries) -> Tensor:
    """sum over parameters of <d, e> <a, b> for each pair, or of d^T V a for directions V."""
    total = torch.zeros(())
    if asked.sides is None:
        parts = [((d @ asked.along[n]) * a).sum(dim=2).T for n, (d, a) in own.items() if n in asked.along]
        return torch.stack(parts).sum(dim=0)
    last: tuple[Tensor, Tensor, Tensor] | None = None
    for n, (d, a) in own.items():
        if n not in asked.sides:  # nothing of the target depends on it
            continue
        e, b = asked.sides[n]
        # A bias has the output side of its weight.
        if last is None or not (torch.equal(last[0], d) and torch.equal(last[1], e)):
            last = d, e, d @ e.T
        total = total + last[2] * (a @ b.T)
    return total
