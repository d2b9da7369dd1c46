"""Per-example gradients: one forward, and one backward to the activations; no weight gradient is formed.

Layers with a rule (`numerics.layers`) are read by hooks while the backward pass runs, each as soon as the gradient at
its output is known. Parameters used by several layers get the sum. Parameters without a rule fall back to
`vmap(grad)` in chunks, and to one backward an example where vmap cannot go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.core.task import Inputs, Params
from assay.numerics.layers import Call, Metric, Reader, rule_of
from assay.numerics.project import Exact, Sketch
from assay.numerics.readout import Readout

Loss = Callable[[Params, Inputs], Tensor]

# Examples that the fallback takes at once: their weight gradients are whole in memory.
CHUNK = 8
# How far a parameter's rows may be from a plain backward pass, of their size, before its rule is not believed.
TOLERANCE = 1e-3


def trainable(module: nn.Module) -> dict[str, torch.Size]:
    """Name and shape of each parameter whose gradient counts; shared ones under their first name."""
    return {n: p.shape for n, p in module.named_parameters() if p.requires_grad}


def covered(module: nn.Module) -> set[str]:
    """Names of the trainable parameters that only layers with a rule own."""
    names = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
    owners = [(m, names[id(p)]) for m in module.modules() for p in m.parameters(recurse=False) if id(p) in names]
    return {n for _, n in owners} - {n for m, n in owners if rule_of(m) is None}


def linear(module: nn.Module) -> set[str]:
    """Names of the trainable parameters of linear layers, readouts included."""
    names = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    return {names[id(p)] for m in layers for p in m.parameters(recurse=False) if id(p) in names}


@dataclass
class _Tape:
    """Collects what the rules find while the backward pass runs."""

    reader: Reader
    examples: int
    found: dict[str, Tensor] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    """Parameters of calls whose rows are not the examples (routed tokens, flattened batches)."""

    def enter(self, layer: nn.Module, names: Mapping[str, str], a: Tensor, out: Tensor, kept: Tensor | None) -> Tensor:
        """Watch one call; returns the output that the model goes on with."""
        if out.shape[0] == 1 < self.examples and not out.requires_grad:
            # One row for all examples, such as position embeddings: give each its own, to tell their gradients apart.
            a, out = (x.expand(self.examples, *x.shape[1:]) for x in (a, out))
        if out.shape[0] != self.examples or a.shape[0] != self.examples:
            self.lost.update(names.values())
            return out
        rule = rule_of(layer)
        assert rule is not None
        leaf = not out.requires_grad
        out = out.detach().requires_grad_() if leaf else out

        def arrived(d: Tensor) -> None:
            # The model may run in half precision; sums over positions and what the sketch does to them may not.
            with torch.autocast(d.device.type, enabled=False):
                rows = rule(layer, Call(a.detach(), d.detach(), names, kept), self.reader)
            for local, sketched in rows.items():
                full = names[local]
                self.found[full] = self.found[full] + sketched if full in self.found else sketched

        out.register_hook(arrived)
        if leaf:
            # Cloned, for the model may write into what it gets, and must not write into a leaf.
            self.leaves.append(out)
            return out.clone()
        return out


@contextmanager
def _hooked(module: nn.Module, only: set[str], tape: _Tape) -> Iterator[None]:
    names = {id(p): n for n, p in module.named_parameters()}
    handles = []
    for layer in module.modules():
        owned = {k: names[id(p)] for k, p in layer.named_parameters(recurse=False) if names[id(p)] in only}
        if owned and rule_of(layer):
            handles += _attach(layer, owned, tape)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(layer: nn.Module, names: dict[str, str], tape: _Tape) -> list[Any]:
    def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        a = args[0] if args else next(iter(kwargs.values()))
        losses, kept = out if isinstance(out, tuple) else (out, None)
        return tape.enter(layer, names, a, losses, kept)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) + len(kwargs) < 2:
            return None
        plain = "bias" in names or "weight" not in names
        keep = None if plain else tape.reader.reduction(names["weight"])
        return args, {**kwargs, "keep": keep or (lambda d: d.clone())}

    handles = [layer.register_forward_hook(after, with_kwargs=True)]
    if isinstance(layer, Readout):
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    return handles


def gradients(
    module: nn.Module, loss: Loss, params: Params, inputs: Inputs, sketch: Sketch | None = None, *,
    metric: Metric | None = None, only: set[str] | None = None, fallback: set[str] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Per-example gradients of `loss(params, inputs) -> [b]`, in a metric and through a sketch, by parameter name.

    Returns `{name: [b, width]}` and the losses `[b]`. `only` names the parameters asked for (all trainable ones);
    `fallback` those among them that go without rules (by default those that `covered` does not name). The metric
    multiplies each gradient entry by entry before the sketch. Raises `RuntimeError` where examples are coupled.
    """
    shapes = trainable(module)
    only = set(shapes) if only is None else only
    slow = only - covered(module) if fallback is None else only & fallback
    held = {n: p.detach() for n, p in params.items()}
    reader = Reader(sketch or Exact(), metric or {})
    tape = _Tape(reader, _examples(inputs))
    with _hooked(module, only - slow, tape), torch.enable_grad():
        losses = loss(held, inputs)
        if tape.leaves:
            torch.autograd.grad(losses.sum(), tape.leaves, allow_unused=True)
    tape.leaves.clear()  # their hooks know the tape: a circle that would keep every batch until Python looks for such
    slow = slow | tape.lost
    found = {n: g for n, g in tape.found.items() if n not in slow}
    found |= _fallen(loss, held, inputs, slow, reader)
    for name in only - set(found):  # used in no call: nothing depends on it
        found[name] = losses.new_zeros(len(losses), reader.sketch.width(name, shapes[name])).detach()
    return found, losses.detach()


def _examples(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def _fallen(loss: Loss, params: Params, inputs: Inputs, names: set[str], reader: Reader) -> dict[str, Tensor]:
    """Gradients without rules, for these names only."""
    if not names:
        return {}
    wanted, rest = ({n: p for n, p in params.items() if (n in names) == side} for side in (True, False))
    parts: dict[str, list[Tensor]] = {n: [] for n in wanted}

    def alone(own: Params, example: Inputs) -> Tensor:
        return loss({**rest, **own}, {k: v[None] for k, v in example.items()})[0]

    for start in range(0, _examples(inputs), CHUNK):
        some = {k: v[start : start + CHUNK] for k, v in inputs.items()}
        for name, part in _formed(alone, loss, wanted, rest, some).items():
            parts[name].append(reader.full(name, part.detach()))
    return {n: torch.cat(p) for n, p in parts.items()}


def _formed(alone: Any, loss: Loss, wanted: Params, rest: Params, inputs: Inputs) -> dict[str, Tensor]:
    """`{name: [b, *shape]}` by vmap, or one by one where the model's operations cannot be vectorised."""
    # The fused attention kernels have no vmap rule.
    with sdpa_kernel(SDPBackend.MATH):
        try:
            return vmap(grad(alone), in_dims=(None, 0), randomness="error")(dict(wanted), inputs)
        except RuntimeError:
            rows = []
            for i in range(_examples(inputs)):
                leaves = {n: p.detach().requires_grad_() for n, p in wanted.items()}
                one = loss({**rest, **leaves}, {k: v[i : i + 1] for k, v in inputs.items()}).sum()
                rows.append(torch.autograd.grad(one, list(leaves.values()), materialize_grads=True))
            return {n: torch.stack(g) for n, g in zip(wanted, zip(*rows, strict=True), strict=True)}


def flatten(grads: Mapping[str, Tensor], sketch: Sketch | None = None) -> Tensor:
    """Concatenate by name into `[b, d]`, names sorted; or add up in that order, where the sketch says so."""
    blocks = [grads[n] for n in sorted(grads)]
    if sketch is None or not sketch.together:
        return torch.cat(blocks, dim=1)
    total = blocks[0].clone()
    for block in blocks[1:]:
        total += block
    return total


def layout(module: nn.Module, sketch: Sketch, only: set[str] | None = None) -> list[tuple[str, int]]:
    """Name and width of each block of `flatten(gradients(...), sketch)`, without computing anything."""
    blocks = [(n, sketch.width(n, s)) for n, s in sorted(trainable(module).items()) if only is None or n in only]
    return [("all", blocks[0][1])] if sketch.together and blocks else blocks


@dataclass(frozen=True)
class Audit:
    """What a probe batch says about the rules: who may be trusted, and how much of the gradient is read."""

    fallback: tuple[str, ...]
    """Parameters without a rule, or whose rule does not add up to the batch's gradient."""
    share: float
    """Part of the squared gradient norm that lies in the parameters asked for, over the probe's examples."""
    error: float
    """Largest relative difference between the sum of the rows and the batch's gradient, both sketched, after the
    fallback has taken its part."""


def audit(
    module: nn.Module, loss: Loss, params: Params, inputs: Inputs, sketch: Sketch, *, only: set[str] | None = None,
    tolerance: float = TOLERANCE, metric: Metric | None = None,
) -> Audit:  # fmt: skip
    """Compare the engine with ordinary backward passes on a few examples; nothing about the rules is assumed.

    A parameter whose rows do not add up (used outside of its layer, or by a layer that does more than its kind) goes
    to the fallback. Costs one backward an example.
    """
    only = set(trainable(module)) if only is None else only
    squares, total = _ordinary(loss, params, inputs, trainable(module))
    want = {n: Reader(sketch, metric or {}).full(n, g[None])[0] for n, g in total.items() if n in only}
    fallback = only - covered(module)
    for _ in range(2):
        rows, _losses = gradients(module, loss, params, inputs, sketch, metric=metric, only=only, fallback=fallback)
        scale = {n: float(g.double().norm(dim=1).sum()) for n, g in rows.items()}
        # Some gradients are zero but for rounding (attention's key biases): those are held to the others' size.
        least = 1e-3 * max(scale.values(), default=0.0) or 1.0
        errors = {n: float((rows[n].double().sum(0) - want[n]).norm()) / max(scale[n], least) for n in only}
        wrong = {n for n, e in errors.items() if not e <= tolerance}
        if not wrong - fallback:
            break
        fallback = fallback | wrong
    share = sum(s for n, s in squares.items() if n in only) / (sum(squares.values()) or 1.0)
    return Audit(tuple(sorted(fallback)), share, max(errors.values(), key=lambda e: (e != e, e), default=0.0))


def _ordinary(loss: Loss, params: Params, inputs: Inputs, names: Sequence[str] | Mapping[str, Any]) -> tuple[Any, Any]:
    """Sums over examples of the squared norm of each parameter's gradient, and of the gradient, by plain backward."""
    squares, total = dict.fromkeys(names, 0.0), {n: torch.zeros_like(params[n]) for n in names}
    for i in range(_examples(inputs)):
        leaves = {n: params[n].detach().requires_grad_() for n in names}
        one = loss({**params, **leaves}, {k: v[i : i + 1] for k, v in inputs.items()}).sum()
        for n, g in zip(leaves, torch.autograd.grad(one, list(leaves.values()), materialize_grads=True), strict=True):
            squares[n] += float(g.double().square().sum())
            total[n] += g
    return squares, total
