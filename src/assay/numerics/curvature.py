"""The pieces that influence functions share: the Hessian of the training objective at a model, and per-example dots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.task import Inputs, Params, Task
from assay.numerics.operator import Curvature
from assay.numerics.persample import gradients


def curvature(
    task: Task, params: Params, batches: Callable[[], Iterable[Inputs]], count: int, *, kind: Literal["hessian", "ggn"]
) -> Curvature:
    """(1/N) sum_i of the Hessian (or Gauss-Newton matrix) of loss_i, without weight decay."""
    if kind == "ggn" and not hasattr(task, "logits"):
        raise InputError(
            "this task has no Gauss-Newton matrix", why="it needs the task's `logits`", fix="curvature = 'hessian'"
        )

    def closures() -> Iterable[Any]:
        for inputs in batches():

            def closure(leaves: Params, inputs: Inputs = inputs) -> tuple[Tensor, Tensor | None]:
                if kind == "hessian":
                    return task.loss(leaves, inputs), None
                outputs = task.logits(leaves, inputs)  # type: ignore[attr-defined]
                return torch.nn.functional.cross_entropy(outputs, inputs["y"], reduction="none"), outputs

            yield closure

    return Curvature(params, closures, count, kind=kind)


def exact_gradients(task: Task, params: Params, inputs: Inputs) -> Tensor:
    """Per-example gradients of the loss in the order of `params`, `[b, p]`."""
    found, _ = gradients(task.module, task.loss, params, inputs)
    return torch.cat([found[n] for n in params], dim=1)
