"""Dot products of per-example gradients with given directions; neither the gradients nor features of them are kept.

For a linear map <G, V> = sum_t d_t^T V a_t, so a direction costs about as much as the layer's forward pass. With many
directions it is cheaper to form G, a few examples at a time, and let each direction meet it once, not at each position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from assay.core.task import Inputs, Params
from assay.numerics.persample import Loss, gradients
from assay.numerics.project import Sketch

# Directions up to which a position's product with each is cheaper than forming the gradient: one product of G costs as
# much as one direction does.
FEW = 2


class Products(Sketch):
    """The linear map that takes a parameter's gradient to its products with K directions, `[b, K]`.

    `along` holds them as `[K, *shape]` by name.
    """

    def __init__(self, along: Mapping[str, Tensor]) -> None:
        self._along = along
        self.count = len(next(iter(along.values())))
        self.factored = self.count <= FEW  # type: ignore[misc] - here it depends on how many there are
        # Legend: K directions, o outputs, i inputs. One product takes d to all of them: [o, K i].
        wide = {n: v for n, v in along.items() if v.dim() > 2} if self.factored else {}
        self._flat = {n: v.flatten(2).transpose(0, 1).flatten(1) for n, v in wide.items()}

    def width(self, name: str, shape: Sequence[int]) -> int:
        return self.count

    def out(self, name: str, d_bto: Tensor) -> Tensor:
        return d_bto @ self._flat[name].to(d_bto.dtype) if self.factored else d_bto

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        if not self.factored:
            return super().merge(name, d_btr, a_bts)
        return (d_btr.unflatten(-1, (self.count, -1)) * a_bts[..., None, :]).sum(dim=(1, 3))

    def full(self, name: str, grad: Tensor) -> Tensor:
        return grad.flatten(1) @ self._along[name].flatten(1).T.to(grad.dtype)

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        rows = [(v[ids_bt] * d_bti).sum(dim=(1, 2)) for v in self._along[name].to(d_bti.dtype)]
        return torch.stack(rows, dim=1)


def products(
    module: nn.Module, loss: Loss, params: Params, inputs: Inputs,
    directions: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor], *, fallback: set[str] | None = None,
) -> Tensor:  # fmt: skip
    """`[b, K]`: <gradient of loss_i, direction_k> over the parameters that the directions name; K of them one by one,
    or stacked by name, `[K, *shape]`.

    Exact; a metric goes into the directions. Raises `KeyError` for a direction that lacks a name of the first.
    """
    one = isinstance(directions, Mapping)
    along = directions if one else {n: torch.stack([d[n] for d in directions]) for n in directions[0]}
    found, _ = gradients(module, loss, params, inputs, Products(along), only=set(along), fallback=fallback)
    return torch.stack(list(found.values())).sum(dim=0)
