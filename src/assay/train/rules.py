"""The audit of a method that reads per-example gradients: which parameters go without rules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from assay.core.task import Inputs, Params
from assay.numerics.layers import Metric
from assay.numerics.persample import TOLERANCE, Loss, audit
from assay.numerics.project import Exact, Sketch

if TYPE_CHECKING:
    from assay.core.method import Context

# Examples on which the engine is compared with plain backward passes, before anything is computed with it.
PROBE = 6


def audited(
    context: Context, name: str, params: Params, only: Iterable[str], *, f: Loss | None = None,
    sketch: Sketch | None = None, metric: Metric | None = None, inputs: Inputs | None = None, task: Any = None,
) -> set[str]:  # fmt: skip
    """Parameters whose gradients the method `name` reads by the slow path, for a layer's rule does not give them.

    Gradients of the loss, or of f, of a few examples of the pool (or `inputs`) are compared with plain backward passes,
    by the context's task or another. What falls back is warned about, and what was found is noted.
    """
    probe = context.sample(PROBE).inputs if inputs is None else inputs
    task = task or context.task
    found = audit(task.module, f or task.loss, params, probe, sketch or Exact(), only=set(only), metric=metric)
    if found.fallback:
        context.warn(
            f"{name}: {len(found.fallback)} parameters have no rule and take the slow path "
            f"({', '.join(found.fallback[:3])}{', ...' if len(found.fallback) > 3 else ''})"
        )
    prefix = "" if name == "gradients" else f"{name}: "
    context.note(
        f"{prefix}gradients against plain backward passes",
        f"{PROBE} examples are off by {found.error:.1e} of their size; the layers hold {100 * found.share:.1f}% "
        "of the squared norm",
        ok=found.error <= TOLERANCE, share=found.share, error=found.error, fallback=list(found.fallback),
    )  # fmt: skip
    return set(found.fallback)
