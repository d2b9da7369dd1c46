"""The root of AdamW where it is differentiated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from assay.core.errors import InputError
from assay.core.method import Context
from assay.core.selection import Selection
from assay.core.task import Params
from assay.train import loop
from assay.train.models import first_weights

if TYPE_CHECKING:
    from assay.core.task import Encoded, Task
    from assay.train.recipe import Recipe

# Where no entry of a gradient is other than 0.
LEAST = 1e-8


def mean_square(
    task: Task, encoded: Encoded, ids: np.ndarray, rows: np.ndarray, recipe: Recipe, start: Params | None = None
) -> float:
    """Of the entries of a first gradient, but for those that are 0, to two digits: of data weight 1, and clipped as the
    recipe says. 0 where all are, NaN or infinite where the gradient is.

    The first moments of AdamW are of one step alone: its steps m / sqrt(v + eps_root) are signs where eps_root is far
    below those squares, and the derivative of a sign says nothing about what a finite change does. A small decoder with
    eps_root = 1e-8, a hundredth of them, was foretold better by a training with their mean than by its own (LOG.md).
    `ids` stand in `rows` of what is encoded; `start` in place of first weights.
    """
    params = start if start is not None else first_weights(task, recipe.seed)
    batch = next(loop.steps(recipe, Selection.everything(ids), encoded.sizes[rows]))
    noise = loop.noise_keys(task, ids[batch], recipe.seed, 0)
    grads, _ = loop.gradient(task, params, encoded, rows[batch], np.ones(len(batch)), recipe.terms_per_step, noise)
    flat = torch.cat(
        [g.reshape(-1) for g in loop.clipped(params, grads, loop.trainable(task, params), recipe)]
    ).double()
    flat = flat[flat != 0]
    return float(f"{float((flat * flat).mean()):.1e}") if len(flat) else 0.0


def rooted(context: Context, name: str, recipe: Recipe, rows: np.ndarray, start: Params | None = None) -> Recipe:
    """The recipe, with `mean_square` for an `eps_root` where AdamW has none, and a note that says so.

    `rows` of the pool are trained on. Raises `InputError` when that gradient is not finite.
    """
    if recipe.optimiser != "adamw" or recipe.eps_root:
        return recipe
    task, encoded = context.task, context.encoded(context.pool)
    root = mean_square(task, encoded, context.pool.ids[rows], rows, recipe, start)
    if not np.isfinite(root):
        raise InputError(
            f"{name}: the first gradient is not finite", why="an example's loss or its slope is not",
            fix="mend the data or the first weights",
        )  # fmt: skip
    context.spent(task.training_flops(encoded.sizes[rows], recipe.terms_per_step))
    said = "the mean square of" if root else "there being no"
    root = root or LEAST
    context.note(
        f"{name}: eps_root",
        f"{root:g}, {said} entries of a first gradient: what is differentiated is training with it",
        eps_root=root,
    )
    return recipe.model_copy(update={"eps_root": root})
