"""The pieces that influence functions share: curvature of the training loss at a model, slopes of a target, dots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.task import Inputs, Params, Task
from assay.numerics.ghost import products
from assay.numerics.operator import Closure, Curvature, Operator, flat, unflat
from assay.numerics.persample import Loss, gradients, linear, trainable
from assay.numerics.rows import Rows, block, factors

Kind = Literal["hessian", "ggn", "fisher", "empirical"]
Source = Callable[[], Iterable[Inputs]]

# Numbers of factored rows that are kept: half a gigabyte in float64.
CACHE = 1 << 26
# Numbers of a pool's inputs that are kept between products, and of one batch that is put together from small ones.
INPUTS, JOINED = 1 << 24, 1 << 17
# Entries of a batch's gradients that are formed to take their products with many directions; directions at a time
# where they are not.
FORMED, TOGETHER = 1 << 26, 16


def parameters(task: Task, params: Params, layers: Literal["all", "linear"] = "all") -> list[str]:
    """Names of the parameters that influence is read in, in the order of `params`."""
    chosen = linear(task.module) if layers == "linear" else set(trainable(task.module))
    return [n for n in params if n in chosen]


def reading(task: Task, measure: Literal["loss", "margin"]) -> Loss:
    """f of each example, lower is better: the loss, or minus the margin."""
    if measure == "loss":
        return task.loss
    if not hasattr(task, "margin"):
        raise InputError("this task has no margin", why="margins are of classifiers", fix="measure = 'loss'")
    return lambda params, inputs: -task.margin(params, inputs)  # type: ignore[attr-defined]


def curvature(
    task: Task, params: Params, batches: Source, count: int, *, kind: Kind, only: Sequence[str] | None = None,
    keys: Callable[[], Iterable[Any]] | None = None, seed: int = 0, cache: int = CACHE,
    fallback: Collection[str] = (),
) -> Operator:  # fmt: skip
    """(1/N) sum_i H_i over the parameters of `only`, without weight decay.

    hessian: of loss_i.  ggn: its Gauss-Newton part, through the task's logits.  fisher: n_i g_i g_i^T at labels drawn
    from the model, keyed by `keys` and `seed`, n_i the terms of an example: its mean over draws is the ggn.
    empirical: g_i g_i^T at the labels given.

    Where the rows of a small model fit into `cache` numbers, they are kept as factors (`Rows`); else every product goes
    over the batches anew (`Curvature`). Factors come from the layers' rules: with parameters in `fallback`, which have
    none that holds, there are no rows.
    """
    if kind == "ggn" and not hasattr(task, "logits"):
        raise InputError(
            "this task has no Gauss-Newton matrix", why="it needs the task's `logits`", fix="curvature = 'hessian'"
        )
    own = {n: params[n] for n in (params if only is None else only)}
    rest = {n: p for n, p in params.items() if n not in own}
    if kind == "fisher":
        batches = partial(_drawn, task, params, batches, keys, seed)
    source = _kept(batches)
    if kind != "hessian" and cache and not fallback:
        held = _rows(task, params, own, source, count, kind, cache)
        if held is not None:
            return held

    def closures() -> Iterator[Closure]:
        for inputs in source():
            yield partial(_outputs, task, rest, inputs, kind)

    return Curvature(own, closures, count, kind="hessian" if kind == "hessian" else "ggn")


def _drawn(task: Any, params: Params, batches: Source, keys: Any, seed: int) -> Iterator[Inputs]:
    assert keys is not None, "drawn labels are keyed by example"
    for inputs, own in zip(batches(), keys(), strict=True):
        with torch.no_grad():
            yield task.resample(params, inputs, own, seed)


def _kept(batches: Source) -> Source:
    """Small pools are read once, and their batches joined where they have one shape: the sum is the same."""
    held: list[Inputs] = []
    numbers = 0
    for inputs in batches():
        size = sum(x.numel() for x in inputs.values())
        numbers += size
        if numbers > INPUTS:
            return batches
        last = held[-1] if held else {}
        fits = sum(x.numel() for x in last.values()) + size <= JOINED
        if last and fits and all(x.shape[1:] == last[n].shape[1:] for n, x in inputs.items()):
            held[-1] = {n: torch.cat([last[n], x]) for n, x in inputs.items()}
        else:
            held.append(inputs)
    return lambda: held


def _outputs(
    task: Any, rest: Params, inputs: Inputs, kind: Kind, leaves: Params
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Losses and the outputs whose curvature is kept. Cross-entropy bends in its logits as their log-partition does,
    whatever the label; and half a square bends by one, which makes an outer product a Gauss-Newton matrix."""
    params = {**rest, **leaves}
    if kind == "hessian":
        return task.loss(params, inputs), None
    if kind == "ggn":
        z = task.logits(params, inputs)
        if z.dim() == 2:
            return z.logsumexp(dim=1), z
        mask = inputs["mask"].to(z.dtype)
        return (z.logsumexp(dim=2) * mask).sum(dim=1) / mask.sum(dim=1), z
    outputs = _rooted(task, params, inputs) if kind == "fisher" else task.loss(params, inputs)
    return outputs.square() / 2, outputs


def _rooted(task: Any, params: Params, inputs: Inputs) -> Tensor:
    """sqrt(n_i) loss_i: labels of an example's terms are drawn one by one, so a mean of n varies n times less."""
    terms, mask = task.terms(params, inputs)
    return (terms * mask).sum(dim=1) / mask.sum(dim=1).sqrt()


def _spread(task: Any, c: int, params: Params, inputs: Inputs) -> Tensor:
    """sqrt(p_c) (z_c - sum_d p_d z_d), p held: over c, the squares of its slopes sum to J^T (diag p - p p^T) J."""
    z = task.logits(params, inputs)
    p = z.softmax(dim=1).detach()
    return p[:, c].sqrt() * (z[:, c] - (p * z).sum(dim=1))


def _rows(
    task: Any, params: Params, own: Params, source: Source, count: int, kind: Kind, cache: int
) -> Rows | None:  # fmt: skip
    """The operator of factored rows; None where they are no outer products, or too many numbers."""
    readings: list[Loss] = []
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    for inputs in source():
        if not readings:
            if kind == "ggn":
                with torch.no_grad():
                    z = task.logits(params, {n: x[:1] for n, x in inputs.items()})
                if z.dim() != 2:
                    return None
                readings = [partial(_spread, task, c) for c in range(z.shape[1])]
            else:
                readings = [partial(_rooted, task) if kind == "fisher" else task.loss]
            if count * len(readings) * sum(p.shape[0] for p in own.values()) > cache:
                return None
        made = factors(task.module, readings, params, inputs, set(own))
        if made is None or count / len(next(iter(inputs.values()))) * _numbers(made) > cache:
            return None
        found.append(made)
    blocks, start = [], 0
    for name, p in own.items():
        if name in found[0]:  # else nothing depends on it
            blocks.append(block(start, *(torch.cat([f[name][side] for f in found]) for side in (0, 1))))
        start += p.numel()
    return Rows(own, blocks, count) if blocks else None


def _numbers(made: dict[str, tuple[Tensor, Tensor]]) -> int:
    return sum(d.numel() + a.numel() for d, a in made.values())


def exact_gradients(
    task: Task, params: Params, inputs: Inputs, *, f: Loss | None = None, only: Sequence[str] | None = None,
    fallback: set[str] | None = None,
) -> Tensor:  # fmt: skip
    """Per-example gradients of the loss, or of f, in the order of `only` or of `params`, `[b, p]`; those of
    `fallback` without rules (by default those that have none)."""
    names = list(params) if only is None else list(only)
    found, _ = gradients(task.module, f or task.loss, params, inputs, only=set(names), fallback=fallback)
    return torch.cat([found[n] for n in names], dim=1)


def slopes(
    task: Task, params: Params, batches: Iterable[Inputs], f: Loss, only: Sequence[str], *, each: bool,
    fallback: set[str] | None = None,
) -> Tensor:  # fmt: skip
    """Gradients of f of each example, `[p, q]`, or of its mean, `[p, 1]`."""
    if each:
        found = [exact_gradients(task, params, inputs, f=f, only=only, fallback=fallback) for inputs in batches]
        return torch.cat(found).T.contiguous()
    total, count = torch.zeros(sum(params[n].numel() for n in only), dtype=params[only[0]].dtype), 0
    for inputs in batches:
        leaves = {n: params[n].detach().requires_grad_() for n in only}
        with torch.enable_grad():
            values = f({**params, **leaves}, inputs)
            parts = torch.autograd.grad(values.sum(), list(leaves.values()), materialize_grads=True)
        total, count = total + torch.cat([g.reshape(-1) for g in parts]), count + len(values)
    return total[:, None] / count


def dots(
    task: Task, params: Params, inputs: Inputs, x_pk: Tensor, only: Sequence[str], fallback: set[str] | None = None
) -> Tensor:  # fmt: skip
    """<gradient of loss_i, x_k>, `[b, k]`.

    For many directions the gradients of the batch are formed and multiplied, which costs (t + k) o i an example in a
    layer that it passes t times; for one direction, or a large model, they are not, which costs t k o i.
    """
    b, k = len(next(iter(inputs.values()))), x_pk.shape[1]
    if k > 1 and b * len(x_pk) <= FORMED:
        return exact_gradients(task, params, inputs, only=only, fallback=fallback) @ x_pk
    own = {n: params[n] for n in only}
    parts = []
    for start in range(0, k, TOGETHER):
        directions = [unflat(x_pk[:, j].contiguous(), own) for j in range(start, min(k, start + TOGETHER))]
        parts.append(products(task.module, task.loss, params, inputs, directions, fallback=fallback))
    return torch.cat(parts, dim=1)


def size(params: Params, only: Sequence[str]) -> int:
    """Entries of the parameters of these names."""
    return len(flat({n: params[n] for n in only}))
