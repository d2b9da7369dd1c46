"""Per-example gradients by hooks: one forward and one backward to the activations; no weight gradient is formed.

A layer's weight gradient for one example is an outer product summed over positions, G = sum_t d_t a_t^T, of its input
a and of d, the loss's gradient at its output. Legend: b examples, t positions, o outputs, i inputs, r rank.
Rules exist for Linear (weight, bias), Embedding, LayerNorm and RMSNorm. Parameters used by several layers get the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from assay.numerics.project import Factored

Names = Mapping[str, str]
"""A layer's own name of each of its parameters -> the module's name of it, under which it is projected."""
Captured = list[tuple[str, nn.Module, Tensor, Tensor]]


def covered(module: nn.Module) -> set[str]:
    """Names of the parameters for which a rule exists; shared ones under their first name."""
    names = {id(p): n for n, p in module.named_parameters()}
    return {names[id(p)] for m in module.modules() if _rule(m) for p in m.parameters(recurse=False)}


def _rule(layer: nn.Module) -> Callable[..., dict[str, Tensor]] | None:
    for kind, rule in RULES.items():
        if isinstance(layer, kind):
            return rule
    return None


@contextmanager
def _hooked(module: nn.Module) -> Iterator[list[tuple[str, nn.Module, Tensor, Tensor]]]:
    """Record (name, layer, input, output) of every layer with a rule, in order of execution."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def record(name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # The first layers see no tensor that requires grad, since parameters are held fixed here.
            out = out if out.requires_grad else out.requires_grad_()
            seen.append((name, layer, args[0].detach(), out))
            return out

        return hook

    handles = [m.register_forward_hook(record(n)) for n, m in module.named_modules() if _rule(m)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def capture(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
    """Run `loss() -> [b]` (which calls the module once) and return (name, layer, input a, output gradient d) of each
    layer, and the losses. Rows of a and d belong to the example of that row: layers must keep examples apart.
    """
    with _hooked(module) as seen, torch.enable_grad():
        losses = loss()
        grads = torch.autograd.grad(losses.sum(), [out for *_, out in seen], allow_unused=True)
    rows = [(n, m, a, torch.zeros_like(o) if d is None else d) for (n, m, a, o), d in zip(seen, grads, strict=True)]
    return rows, losses.detach()


def _positions(x: Tensor) -> Tensor:
    """`[b, ..., d]` as `[b, t, d]`."""
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None]


def _linear(layer: nn.Linear, a: Tensor, d: Tensor, names: Names, sketch: Factored) -> dict[str, Tensor]:
    a_bti, d_bto = _positions(a), _positions(d)
    left = sketch.side(names["weight"], "out", d_bto.shape[-1])
    right = sketch.side(names["weight"], "in", a_bti.shape[-1])
    d_btr = d_bto if left is None else d_bto @ left.T.to(d.dtype)
    a_btr = a_bti if right is None else a_bti @ right.T.to(a.dtype)
    grads = {"weight": torch.einsum("bto,bti->boi", d_btr, a_btr)}
    if layer.bias is not None:
        grads["bias"] = _vector(d_bto.sum(dim=1), names["bias"], sketch)
    return grads


def _embedding(layer: nn.Embedding, a: Tensor, d: Tensor, names: Names, sketch: Factored) -> dict[str, Tensor]:
    assert not layer.scale_grad_by_freq and layer.max_norm is None, "these make examples depend on each other"
    ids_bt, d_bto = _positions(a[..., None])[..., 0], _positions(d)
    if layer.padding_idx is not None:
        d_bto = d_bto * (ids_bt != layer.padding_idx)[..., None]
    # The weight is [entries, width]: entries are the output side of its gradient, the one-hot input picks a row.
    left = sketch.side(names["weight"], "out", layer.num_embeddings)
    right = sketch.side(names["weight"], "in", d.shape[-1])
    d_btr = d_bto if right is None else d_bto @ right.T.to(d.dtype)
    if left is not None:
        return {"weight": torch.einsum("btr,bts->brs", left.T.to(d.dtype)[ids_bt], d_btr)}
    grads = d.new_zeros(d.shape[0], layer.num_embeddings, d_btr.shape[-1])
    index = ids_bt[..., None].expand_as(d_btr)
    return {"weight": grads.scatter_add_(1, index, d_btr)}


def _norm(layer: nn.LayerNorm | nn.RMSNorm, a: Tensor, d: Tensor, names: Names, sketch: Factored) -> dict[str, Tensor]:
    assert len(layer.normalized_shape) == 1, "a rule exists for norms over the last axis only"
    if isinstance(layer, nn.LayerNorm):
        unit = (a - a.mean(-1, keepdim=True)) * (a.var(-1, keepdim=True, unbiased=False) + layer.eps).rsqrt()
    else:
        eps = torch.finfo(a.dtype).eps if layer.eps is None else layer.eps
        unit = a * (a.square().mean(-1, keepdim=True) + eps).rsqrt()
    grads = {}
    if layer.weight is not None:
        grads["weight"] = _vector(_positions(d * unit).sum(dim=1), names["weight"], sketch)
    if getattr(layer, "bias", None) is not None:
        grads["bias"] = _vector(_positions(d).sum(dim=1), names["bias"], sketch)
    return grads


def _vector(grad_bo: Tensor, name: str, sketch: Factored) -> Tensor:
    matrix = sketch.side(name, "out", grad_bo.shape[1])
    return grad_bo if matrix is None else grad_bo @ matrix.T.to(grad_bo.dtype)


RULES: dict[type[nn.Module], Callable[..., dict[str, Tensor]]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
}


def gradients(module: nn.Module, loss: Callable[[], Tensor], sketch: Factored) -> tuple[dict[str, Tensor], Tensor]:
    """Per-example gradients by parameter name, projected by `sketch`: `[b, ...]` each, and the losses `[b]`.

    `Factored(rank=0)` gives the exact ones. Parameters without a rule are missing from the result: see `covered`.
    """
    names = {id(p): n for n, p in module.named_parameters()}
    rows, losses = capture(module, loss)
    found: dict[str, Tensor] = {}
    for name, layer, a, d in rows:
        rule = _rule(layer)
        assert rule is not None
        # A shared parameter is projected under its first name, so that the sketches of its uses add up.
        owned = {local: names.get(id(p), f"{name}.{local}") for local, p in layer.named_parameters(recurse=False)}
        for local, grad in rule(layer, a, d, owned, sketch).items():
            full = owned[local]
            found[full] = found[full] + grad if full in found else grad
    return found, losses


def flatten(grads: Mapping[str, Tensor]) -> Tensor:
    """Concatenate by name into `[b, d]`, names sorted, rows of matrices first."""
    return torch.cat([grads[n].flatten(1) for n in sorted(grads)], dim=1)


def layout(module: nn.Module, sketch: Factored) -> list[tuple[str, int]]:
    """Name and width of each block of `flatten(gradients(...))`, without computing anything."""
    shapes = {n: p.shape for n, p in module.named_parameters()}
    blocks = []
    for name in sorted(covered(module)):
        width = 1
        for size in shapes[name]:
            width *= sketch.width(size)
        blocks.append((name, width))
    return blocks
