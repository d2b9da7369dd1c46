"""Dot products of per-example gradients with given directions; neither the gradients nor features of them are kept.

For a linear map <G, V> = sum_t d_t^T V a_t, so a direction costs about as much as the layer's forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from assay.core.task import Inputs, Params
from assay.numerics.persample import Loss, gradients
from assay.numerics.project import Sketch


class Products(Sketch):
    """The linear map that takes a parameter's gradient to its products with K directions, `[b, K]`."""

    factored = True

    def __init__(self, directions: Sequence[Mapping[str, Tensor]]) -> None:
        self.count = len(directions)
        self._along = {n: torch.stack([d[n] for d in directions]) for n in directions[0]}
        # Legend: K directions, o outputs, i inputs. One product takes d to all of them: [o, K i].
        self._flat = {n: v.flatten(2).transpose(0, 1).flatten(1) for n, v in self._along.items() if v.dim() > 2}

    def width(self, name: str, shape: Sequence[int]) -> int:
        return self.count

    def out(self, name: str, d_bto: Tensor) -> Tensor:
        return d_bto @ self._flat[name].to(d_bto.dtype)

    def merge(self, name: str, d_btr: Tensor, a_bts: Tensor) -> Tensor:
        return (d_btr.unflatten(-1, (self.count, -1)) * a_bts[..., None, :]).sum(dim=(1, 3))

    def full(self, name: str, grad: Tensor) -> Tensor:
        return grad.flatten(1) @ self._along[name].flatten(1).T.to(grad.dtype)

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        rows = [(v[ids_bt] * d_bti).sum(dim=(1, 2)) for v in self._along[name].to(d_bti.dtype)]
        return torch.stack(rows, dim=1)


def products(
    module: nn.Module, loss: Loss, params: Params, inputs: Inputs, directions: Sequence[Mapping[str, Tensor]], *,
    fallback: set[str] | None = None,
) -> Tensor:  # fmt: skip
    """`[b, K]`: <gradient of loss_i, direction_k> over the parameters that the directions name.

    Exact; a metric goes into the directions. Raises `KeyError` for a direction that lacks a name of the first.
    """
    only = set(directions[0])
    found, _ = gradients(module, loss, params, inputs, Products(directions), only=only, fallback=fallback)
    return torch.stack(list(found.values())).sum(dim=0)
