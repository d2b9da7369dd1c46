"""One rule for each kind of layer: per-example gradients from its input a and the gradient d at its output.

For a linear map the gradient of one example is an outer product summed over positions, G = sum_t d_t a_t^T, so a rule
hands the two factors on and nothing of the size of a weight is formed unless the sketch asks for it. Biases get
sum_t d_t, norm gains sum_t d_t * x_t with x the normalised input. Legend: b examples, t positions, o outputs, i inputs.

A new kind of layer is one function and one line in `RULES`, or in `NAMED` for classes of other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.numerics.project import Sketch
from assay.numerics.readout import Readout

Metric = Mapping[str, "Tensor | tuple[Tensor, Tensor]"]
"""Factors of gradients by parameter name: one for each entry, or (rows `[o]`, columns `[i]`) of a rank-one matrix."""


@dataclass(frozen=True)
class Reader:
    """Takes the gradients that rules find, in the metric, through the sketch."""

    sketch: Sketch
    metric: Metric

    def outer(self, name: str, d_bto: Tensor, a_bti: Tensor, shape: torch.Size) -> Tensor:
        """Of sum_t d_t a_t^T for a parameter of this shape, whose rows are the outputs."""
        scale = self.metric.get(name)
        if isinstance(scale, Tensor):
            return self.full(
                name, (d_bto.transpose(1, 2).to(scale.dtype) @ a_bti.to(scale.dtype)).unflatten(2, shape[1:])
            )
        if scale is not None:
            d_bto, a_bti = d_bto * scale[0], a_bti * scale[1]
        # The long sums run over reduced sides, in single precision at least.
        return self.sketch.merge(name, _wide(self.sketch.out(name, d_bto)), _wide(self.sketch.into(name, a_bti)))

    def merge(self, name: str, kept_btr: Tensor, a_bti: Tensor) -> Tensor:
        """As `outer`, for an output side that went through `reduction` already."""
        scale = self.metric.get(name)
        a_bti = a_bti if scale is None else a_bti * scale[1]
        return self.sketch.merge(name, _wide(kept_btr), _wide(self.sketch.into(name, a_bti)))

    def reduction(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What may be done to d before it is known whole; None where the sketch needs it as it is."""
        scale = self.metric.get(name)
        if not self.sketch.factored or isinstance(scale, Tensor):
            return None
        return lambda d: self.sketch.out(name, d if scale is None else d * scale[0])

    def full(self, name: str, grad: Tensor) -> Tensor:
        """Of a gradient that was formed, `[b, *shape]`."""
        scale = self.metric.get(name)
        if isinstance(scale, Tensor):
            grad = grad * scale
        elif scale is not None:
            grad = grad * scale[0] if grad.dim() == 2 else (grad.flatten(2) * torch.outer(*scale)).view_as(grad)
        return self.sketch.full(name, _wide(grad))

    def lookup(self, name: str, ids_bt: Tensor, d_bti: Tensor, entries: int) -> Tensor:
        """Of an embedding's gradient: row ids_t receives d_t."""
        scale = self.metric.get(name)
        if isinstance(scale, Tensor):
            d_bti = d_bti * scale[ids_bt]
        elif scale is not None:
            d_bti = d_bti * scale[0][ids_bt][..., None] * scale[1]
        return self.sketch.lookup(name, ids_bt, _wide(d_bti), entries)


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input, the gradient at its output, and the modules' names of its parameters."""

    a: Tensor
    d: Tensor
    names: Mapping[str, str]
    """The layer's own name of each parameter that is asked for -> the name under which it is sketched."""
    kept: Tensor | None = None


Rule = Callable[[nn.Module, Call, Reader], dict[str, Tensor]]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _positions(x: Tensor) -> Tensor:
    """`[b, ..., d]` as `[b, t, d]`."""
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None]


def _affine(call: Call, reader: Reader, d_bto: Tensor, unit_bto: Tensor | None) -> dict[str, Tensor]:
    """Gradients of a gain (over its normalised input) and of a bias, summed over positions."""
    found = {}
    if "weight" in call.names and unit_bto is not None:
        found["weight"] = reader.full(call.names["weight"], _wide(d_bto * unit_bto).sum(dim=1))
    if "bias" in call.names:
        found["bias"] = reader.full(call.names["bias"], _wide(d_bto).sum(dim=1))
    return found


def _linear(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    d_bto, a_bti = _positions(call.d), _positions(call.a)
    found = _affine(call, reader, d_bto, None)
    if "weight" in call.names:
        found["weight"] = reader.outer(call.names["weight"], d_bto, a_bti, layer.weight.shape)  # type: ignore[arg-type]
    return found


def _transposed(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    """A linear map that keeps its weight as `[i, o]` (transformers' Conv1D)."""
    d_bto, a_bti = _positions(call.d), _positions(call.a)
    found = _affine(call, reader, d_bto, None)
    if "weight" in call.names:
        found["weight"] = reader.outer(call.names["weight"], a_bti, d_bto, layer.weight.shape)  # type: ignore[arg-type]
    return found


def _readout(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    """Logits and loss in one: `d` is the gradient at each token's loss, `kept` that loss's gradient at the logits."""
    if call.kept is None:
        return _linear(layer, call, reader)
    d_bto, a_bti = _positions(call.kept * call.d[..., None].to(call.kept.dtype)), _positions(call.a)
    if reader.reduction(call.names.get("weight", "")) is None or "bias" in call.names:
        return _linear(layer, Call(a_bti, d_bto, call.names), reader)
    return {"weight": reader.merge(call.names["weight"], d_bto, a_bti)}


def _embedding(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    assert isinstance(layer, nn.Embedding)
    assert not layer.scale_grad_by_freq and layer.max_norm is None, "these make examples depend on each other"
    ids_bt, d_bto = _positions(call.a[..., None])[..., 0], _positions(call.d)
    if layer.padding_idx is not None:
        d_bto = d_bto * (ids_bt != layer.padding_idx)[..., None]
    return {"weight": reader.lookup(call.names["weight"], ids_bt, d_bto, layer.num_embeddings)}


def _layer_norm(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    assert isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1, "norms over the last axis only"
    unit = F.layer_norm(call.a, layer.normalized_shape, eps=layer.eps)
    return _affine(call, reader, _positions(call.d), _positions(unit))


def _rms_norm(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    assert isinstance(layer, nn.RMSNorm) and len(layer.normalized_shape) == 1, "norms over the last axis only"
    unit = F.rms_norm(call.a, layer.normalized_shape, eps=layer.eps)
    return _affine(call, reader, _positions(call.d), _positions(unit))


def _gain(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    """Of a layer that is affine in its one gain, whatever it does to its input: x = f(1) - f(0), in its arithmetic."""
    own = layer._parameters["weight"]
    assert own is not None
    try:
        values = []
        for gain in (torch.ones_like(own), torch.zeros_like(own)):
            layer._parameters["weight"] = gain.to(call.d.dtype)  # type: ignore[assignment]
            values.append(layer.forward(call.a))  # not called: that would run the hooks again
    finally:
        layer._parameters["weight"] = own
    return _affine(call, reader, _positions(call.d), _positions(values[0] - values[1]))


def _channels_last(x: Tensor) -> Tensor:
    """`[b, c, ...]` as `[b, t, c]`."""
    return x[:, None] if x.dim() == 2 else x.flatten(2).transpose(1, 2)


def _group_norm(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    assert isinstance(layer, nn.GroupNorm)
    unit = F.group_norm(call.a, layer.num_groups, eps=layer.eps)
    return _affine(call, reader, _channels_last(call.d), _channels_last(unit))


def _batch_norm(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    """With running statistics it is an affine map of each example; with the batch's own, examples are coupled."""
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not layer.training and layer.running_mean is not None and layer.running_var is not None, (
        "batch statistics make examples depend on each other: put the module in eval mode"
    )
    mean, scale = layer.running_mean.to(call.a.dtype), (layer.running_var + layer.eps).rsqrt().to(call.a.dtype)
    return _affine(call, reader, _channels_last(call.d), (_channels_last(call.a) - mean) * scale)


def _convolution(layer: nn.Module, call: Call, reader: Reader) -> dict[str, Tensor]:
    """Patches are the inputs. Groups are formed whole: their weights are small, their positions many."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    d_bto = _channels_last(call.d)
    found = _affine(call, reader, d_bto, None)
    if "weight" not in call.names:
        return found
    patches_bit = _patches(layer, call.a)
    if layer.groups == 1:
        found["weight"] = reader.outer(call.names["weight"], d_bto, patches_bit.transpose(1, 2), layer.weight.shape)
        return found
    a_bgit, d_bgot = (_wide(x).unflatten(1, (layer.groups, -1)) for x in (patches_bit, call.d.flatten(2)))
    grad = torch.einsum("bgot,bgit->bgoi", d_bgot, a_bgit).reshape(len(d_bto), *layer.weight.shape)
    found["weight"] = reader.full(call.names["weight"], grad)
    return found


def _patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """`[b, c k, t]`: what each output position sees."""
    assert layer.padding_mode == "zeros", "a rule exists for convolutions padded with zeros only"
    two = isinstance(layer, nn.Conv2d)
    sizes = [tuple(v) if two else (1, *v) for v in (layer.kernel_size, layer.dilation, layer.stride)]
    kernel, dilation, stride = sizes
    if isinstance(layer.padding, str):
        total = [0 if layer.padding == "valid" else r * (k - 1) for k, r in zip(kernel, dilation, strict=True)]
        (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        top, left = bottom, right = tuple(layer.padding) if two else (0, *layer.padding)
    x = F.pad(x if two else x[:, :, None], (left, right, top, bottom))
    return F.unfold(x, kernel, dilation=dilation, stride=stride)


RULES: dict[type[nn.Module], Rule] = {
    Readout: _readout,
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.modules.batchnorm._BatchNorm: _batch_norm,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
}
NAMED: dict[str, Rule] = {"Conv1D": _transposed}
"""Classes of other libraries, by name; besides these, any class called ...RMSNorm with one gain."""


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule of a layer, or None. Subclasses of a known layer count, if they leave its forward alone."""
    for kind, rule in RULES.items():
        if isinstance(layer, kind):
            return rule if _same_forward(layer, kind) else None
    name, own = type(layer).__name__, dict(layer.named_parameters(recurse=False))
    if name.endswith("RMSNorm") and set(own) == {"weight"} and own["weight"].dim() == 1:
        return _gain
    return NAMED.get(name) if "weight" in own and own["weight"].dim() == 2 else None


def _same_forward(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Quantised or adapted subclasses compute something else: they have no rule."""
    own = type(layer)
    return own.forward is kind.forward or own.__module__.startswith(("torch.nn.", "assay."))


def outputs_axis(layer: nn.Module) -> int | None:
    """Which axis of a linear map's weight is its output: 0, or 1 for those kept as `[i, o]`; None for other layers."""
    rule = rule_of(layer)
    if rule in (_linear, _readout, _convolution):
        return 0
    return 1 if rule is _transposed else None
