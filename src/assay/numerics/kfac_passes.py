"""The two passes over examples that Kronecker factors are made of, as sketches of their gradients (`numerics.kfac`).

`Moments` sums the second moments of both sides of each block, `Corrections` the squares of each example's gradient in
their eigenbasis. Sums are float64, and those of two partitions of the data add up.

Legend: b examples, t positions, o outputs, i inputs, R rows and C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from assay.core.errors import InputError
from assay.core.task import Inputs, Params
from assay.numerics.kfac import Block, Side, Sums
from assay.numerics.layers import Metric, outputs_axis
from assay.numerics.persample import Loss, gradients, trainable
from assay.numerics.project import FORMED, Sketch

Positions = Callable[[Inputs], Tensor | None]
"""Which positions of a batch the model reads, `[b, t]`, or None where all count."""


class _Survey(Sketch):
    """Notes by which way each parameter's gradients come."""

    def __init__(self) -> None:
        self.routes: dict[str, list[str]] = {}

    def _note(self, name: str, route: str, like: Tensor) -> Tensor:
        self.routes.setdefault(name, []).append(route)
        return like.new_zeros(len(like), 0)

    def width(self, name: str, shape: Sequence[int]) -> int:
        return 0

    def full(self, name: str, grad: Tensor) -> Tensor:
        return self._note(name, "formed", grad)

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        return self._note(name, "outer", d_btr)

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        return self._note(name, "lookup", d_bti)


def survey(
    module: nn.Module, loss: Loss, params: Params, inputs: Inputs, *, only: set[str], fallback: set[str],
    metric: Metric | None = None,
) -> list[Block]:  # fmt: skip
    """The blocks of these parameters, from how the gradients of a few examples reach them.

    In a metric a bias stands by itself: its factors are no column of its weight's.
    """
    sketch = _Survey()
    gradients(module, loss, params, inputs, sketch, only=only, fallback=fallback, metric=metric)
    folded, blocks = _biases(module, set() if metric else only - fallback), []
    for name, shape in trainable(module).items():
        if name not in only:
            continue
        routes = sketch.routes.get(name, [])
        kind = "outer" if "outer" in routes else "lookup" if routes else "formed"
        kind = "formed" if "formed" in routes else kind
        bias, axis = folded.get(name, (None, 0)) if kind == "outer" else (None, 0)
        sides = [shape[0], shape[1:].numel()] if len(shape) > 1 else [shape.numel(), 1]
        if bias is not None:
            sides[1 - axis] += 1
        axis = 1 if kind == "lookup" else axis
        blocks.append(Block(name, (sides[0], sides[1]), kind, bias, axis, len(routes) > 1))
    taken = {b.bias for b in blocks}
    return [b for b in blocks if b.name not in taken]


def _biases(module: nn.Module, only: set[str]) -> dict[str, tuple[str | None, int]]:
    """Weight of each linear map -> the bias that is always used with it, or None, and the axis of its outputs."""
    names = {id(p): n for n, p in module.named_parameters()}
    owners: dict[str, list[tuple[str | None, int | None]]] = {}
    users: dict[str, int] = {}
    for layer in module.modules():
        own = {k: names[id(p)] for k, p in layer.named_parameters(recurse=False)}
        axis = outputs_axis(layer)
        for local, name in own.items():
            users[name] = users.get(name, 0) + 1
            if local == "weight":
                owners.setdefault(name, []).append((own.get("bias") if axis is not None else None, axis))
    found: dict[str, tuple[str | None, int]] = {}
    for name, pairs in owners.items():
        bias, axis = pairs[0]
        alone = len(pairs) == 1 and bias in only and users[bias] == 1  # type: ignore[index]
        axes = {a for _, a in pairs if a is not None}
        found[name] = (bias if alone else None, axes.pop() if len(axes) == 1 else 0)
    return found


class _Pass(Sketch):
    """One pass over the data. Gradients of blocks that come whole, or piece by piece, are handed back to `finish`."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = {b.name: b for b in blocks}
        self.biases = {b.bias for b in blocks if b.bias is not None}
        self.sums: Sums = {}
        self.mask: Tensor | None = None

    def add(self, key: str, value: Tensor) -> None:
        wide = value.double()
        self.sums[key] = self.sums[key] + wide if key in self.sums else wide

    def full(self, name: str, grad: Tensor) -> Tensor:
        if name in self.biases:  # it is in the weight's block, as a column of ones
            return grad.new_zeros(len(grad), 0)
        if self.blocks[name].kind != "formed":
            raise InputError(
                f"{name} is used in two ways", why="its layer sees examples as rows in some batches and not in others",
                fix="layers = 'linear', or leave this parameter out",
            )  # fmt: skip
        return grad.flatten(1)

    def width(self, name: str, shape: Sequence[int]) -> int:
        return 0 if name in self.biases or not self.whole(self.blocks[name]) else shape.numel()  # type: ignore[attr-defined]

    def whole(self, block: Block) -> bool:
        return block.kind == "formed"

    def counted(self, d_bto: Tensor) -> Tensor:
        """1 for positions that count, `[b, t]`: the batch's own mask where the layer has its positions; else those
        that the loss depends on, which no padding does."""
        b, t = d_bto.shape[:2]
        if self.mask is None or t == 1:
            return d_bto.new_ones(b, t)
        if self.mask.shape == (b, t):
            return self.mask.to(d_bto.dtype)
        return (d_bto != 0).any(dim=2).to(d_bto.dtype)

    def sides(self, block: Block, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both sides of the block `[b, t, R]`, `[b, t, C]`, with the bias's ones; and which positions count."""
        pair = [left, right]
        out = block.axis
        counted = self.counted(pair[out])
        if block.bias is not None:
            pair[1 - out] = torch.cat([pair[1 - out], torch.ones_like(pair[1 - out][..., :1])], dim=2)
        if self.mask is not None:
            pair[1 - out] = pair[1 - out] * counted[..., None]
        return pair[0], pair[1], counted

    def finish(self, found: Mapping[str, Tensor], examples: int, terms: float) -> None:
        self.add("examples", torch.tensor(float(examples)))
        self.add("terms", torch.tensor(terms))


class Moments(_Pass):
    """Second moments of both sides of each block, in pieces of at most `size`, and the number of positions M."""

    def __init__(self, blocks: Sequence[Block], size: int) -> None:
        super().__init__(blocks)
        self.size = size

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        block = self.blocks[name]
        if block.kind == "formed":
            return super().merge(name, d_btr, a_bts)
        rows, columns, counted = self.sides(block, d_btr, a_bts)
        for side, x in enumerate((rows, columns)):
            self._square(block, side, x.flatten(0, 1))
        self.add(f"{name}|count", counted.double().sum())
        return d_btr.new_zeros(len(d_btr), 0)

    def _square(self, block: Block, side: int, x_nr: Tensor) -> None:
        for i, part in enumerate(block.parts(side, self.size)):
            piece = x_nr[:, part]
            self.add(f"{block.name}|{side}|{i}", piece.T @ piece)

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        block = self.blocks[name]
        if block.kind == "formed":
            return super().lookup(name, ids_bt, d_bti, entries)
        counted = self.counted(d_bti)
        # The input is one of the rows, as a vector of zeros and a one: its second moment is a diagonal of counts.
        met = torch.bincount(ids_bt.flatten(), weights=counted.flatten().double(), minlength=entries)
        for i, part in enumerate(block.parts(0, self.size)):
            self.add(f"{name}|0|{i}", met[part].diag())
        if block.kind == "lookup":
            self.add(f"{name}|0", met)
        d_nc = d_bti.flatten(0, 1)
        self._square(block, 1, nn.functional.pad(d_nc, (0, block.shape[1] - d_nc.shape[1])))
        self.add(f"{name}|count", counted.double().sum())
        return d_bti.new_zeros(len(d_bti), 0)

    def finish(self, found: Mapping[str, Tensor], examples: int, terms: float) -> None:
        for name, block in self.blocks.items():
            if block.kind == "formed" and block.shape[1] == 1:
                self._square(block, 0, found[name])
                self.add(f"{name}|count", torch.tensor(float(examples)))
        super().finish(found, examples, terms)


class Corrections(_Pass):
    """Sums of squares of each block's gradient in its basis, `[R, C]`, one example at a time."""

    def __init__(self, blocks: Sequence[Block], bases: Mapping[str, tuple[Side, Side]]) -> None:
        super().__init__(blocks)
        self.bases = bases

    def whole(self, block: Block) -> bool:
        return block.kind == "formed" or block.shared

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        block, (left, right) = self.blocks[name], self.bases[name]
        rows, columns, _ = self.sides(block, d_btr, a_bts)
        rows, columns = left.into(rows), right.into(columns)
        if self.whole(block):
            return (rows.transpose(1, 2) @ columns).flatten(1)
        if rows.shape[1] == 1:  # one position: the square of a product is the product of squares
            self.add(name, rows[:, 0].square().T @ columns[:, 0].square())
            return rows.new_zeros(len(rows), 0)
        step = max(1, FORMED // (rows.shape[2] * columns.shape[2]))
        for some in (slice(i, i + step) for i in range(0, len(rows), step)):
            self.add(name, (rows[some].transpose(1, 2) @ columns[some]).square_().sum(dim=0))
        return rows.new_zeros(len(rows), 0)

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        block, (left, right) = self.blocks[name], self.bases[name]
        if self.whole(block):
            grad = d_bti.new_zeros(len(d_bti), entries, block.shape[1])
            wide = nn.functional.pad(d_bti, (0, block.shape[1] - d_bti.shape[2]))
            grad.scatter_add_(1, ids_bt[..., None].expand_as(wide), wide)
            return left.into(right.into(grad).transpose(1, 2)).transpose(1, 2).flatten(1)
        # Positions of one example with one id add up before they are squared; the others are single.
        keys = ids_bt + entries * torch.arange(len(ids_bt), device=ids_bt.device)[:, None]
        pairs, place = torch.unique(keys.flatten(), return_inverse=True)
        turned = right.into(d_bti.flatten(0, 1))
        rows = turned.new_zeros(len(pairs), turned.shape[1]).index_add_(0, place, turned)
        squares = torch.zeros(entries, turned.shape[1], dtype=torch.float64)
        self.add(name, squares.index_add_(0, pairs % entries, rows.double().square_()))
        return d_bti.new_zeros(len(d_bti), 0)

    def finish(self, found: Mapping[str, Tensor], examples: int, terms: float) -> None:
        for name, block in self.blocks.items():
            if not self.whole(block):
                continue
            grad, (left, _) = found[name].view(-1, *block.shape), self.bases[name]
            if block.kind == "formed":
                grad = left.into(grad.transpose(1, 2)).transpose(1, 2)
            self.add(name, grad.square().sum(dim=0))
        super().finish(found, examples, terms)


def collect(
    sketch: _Pass, module: nn.Module, loss: Loss, params: Params, batches: Iterable[tuple[Inputs, float]], *,
    fallback: set[str], positions: Positions, metric: Metric | None = None,
) -> Sums:  # fmt: skip
    """One pass over batches, each with its number of loss terms; `loss` is each example's, summed over its terms.

    Returns the sums, in float64.
    """
    only = set(sketch.blocks) | sketch.biases
    for inputs, terms in batches:
        sketch.mask = positions(inputs)
        found, losses = gradients(module, loss, params, inputs, sketch, only=only, fallback=fallback, metric=metric)
        sketch.finish(found, len(losses), terms)
    return sketch.sums


def added(partitions: Iterable[Sums]) -> Sums:
    """Sums of several partitions of the data as one, in the order given."""
    total: Sums = {}
    for sums in partitions:
        for key, value in sums.items():
            total[key] = total[key] + value if key in total else value
    return total
