"""Utility read by forward passes alone: losses at a few sets of weights, and differences of them.

A *pair* is two sets of weights and a scale: utility_i = (loss_i(before) - loss_i(after)) / scale, where the model at
`after` has learned something of the target that the model at `before` has not. An infinitesimal pair gives a
derivative, a finite one an effect: what lies between is the length of the step, which is chosen here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.task import Inputs, Params, Task
from assay.numerics.stats import spearman

Precision = Literal["float32", "bfloat16"]
# Lengths of a step that are tried, relative to the norm of the weights: from where float32 rounds the difference away
# to where a network is no longer nearly linear.
LENGTHS = tuple(2.0**-k for k in (15, 13, 11, 10, 9, 8, 7, 6, 5, 4, 3))

# An error that changes no rank to speak of: below it a longer step is better, since it stands clear of rounding.
GOOD = 2e-3


@dataclass(frozen=True)
class Pair:
    """Weights without (`before`) and with (`after`) what is probed for."""

    before: Params
    after: Params
    scale: float = 1.0


@dataclass(frozen=True)
class Probe:
    """utility_ic = sum_w loss_i(weights_w) mix_wc, over sets of weights w, for columns c. Picklable.

    `mix` is `[w, c]`. With precision `bfloat16` the passes run under autocast: layers multiply in bfloat16, the loss is
    float32; `float32` is whatever the weights are.
    """

    task: Task
    weights: list[Params]
    mix: np.ndarray
    passes: float
    """Forward passes an example and scoring model."""
    precision: Precision = "float32"
    columns: tuple[str, ...] = field(default=("score",))

    @classmethod
    def of(
        cls,
        task: Task,
        models: Sequence[Sequence[Sequence[Pair]]],
        *,
        columns: tuple[str, ...] = ("score",),
        precision: Precision = "float32",
    ) -> Probe:
        """Of the pairs of each column of each scoring model.

        The utilities of one column's pairs add up, those of the models are averaged. The same weights (the same object)
        in several pairs are read once.
        """
        weights: list[Params] = []
        places: dict[int, int] = {}
        entries: list[tuple[int, int, float]] = []
        for columns_of_model in models:
            for c, pairs in enumerate(columns_of_model):
                for pair in pairs:
                    for params, sign in ((pair.before, 1.0), (pair.after, -1.0)):
                        if id(params) not in places:
                            places[id(params)] = len(weights)
                            weights.append(params)
                        entries.append((places[id(params)], c, sign / pair.scale / len(models)))
        mix = np.zeros((len(weights), len(columns)))
        for w, c, share in entries:
            mix[w, c] += share
        return cls(task, weights, mix, len(weights) / len(models), precision, columns)

    def read(self, inputs: Inputs) -> Tensor:
        """Utilities of a batch, `[b, c]` float64: differences of losses lose digits, so their sum is not rounded."""
        found = [losses(self.task, params, inputs, self.precision) for params in self.weights]
        return torch.stack(found, dim=1) @ torch.from_numpy(self.mix)


@torch.no_grad()
def losses(task: Task, params: Params, inputs: Inputs, precision: Precision) -> Tensor:
    """`task.loss` without gradients, `[b]` float64."""
    device = next(iter(params.values())).device.type
    half = torch.autocast(device, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with half:
        return task.loss(params, inputs).double().cpu()


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all entries together."""
    return float(torch.stack([t.double().square().sum().cpu() for t in tensors.values()]).sum().sqrt())


def moved(params: Params, direction: Params, length: float) -> dict[str, Tensor]:
    """params - length x direction: down the gradient that the direction comes from."""
    return {n: p - length * direction[n] for n, p in params.items()}


def central(params: Params, direction: Params, length: float) -> Pair:
    """Its utility is <direction, grad loss_i> + O(length^2)."""
    return Pair(moved(params, direction, -length), moved(params, direction, length), 2 * length)


def forward(params: Params, direction: Params, length: float) -> Pair:
    """Its utility is <direction, grad loss_i> + O(length); `before` is the model itself, which pairs can share."""
    return Pair(params, moved(params, direction, length), length)


DIFFERENCES = {"central": central, "forward": forward}


def derivatives(task: Task, params: Params, direction: Params, rows: Iterable[Inputs]) -> np.ndarray:
    """Exact <direction, grad loss_i> for examples given one by one: a backward pass each, whatever the model is."""
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    found = []
    for inputs in rows:
        with torch.enable_grad():
            loss = task.loss(leaves, inputs).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        parts = [
            (g.double() * direction[n].double()).sum() for n, g in zip(leaves, grads, strict=True) if g is not None
        ]
        found.append(float(torch.stack(parts).sum()))
    return np.array(found)


@dataclass(frozen=True)
class Step:
    """A length of step along a direction (relative to the norm of the weights) and how well it does on a sample."""

    relative: float
    length: float
    error: float
    """|difference - derivative| / |derivative|, norms over the sample; NaN when nothing could be compared."""
    spearman: float
    """Rank correlation of differences and derivatives; NaN when either is constant."""


def choose_step(
    task: Task,
    params: Params,
    direction: Params,
    rows: Sequence[Inputs],
    *,
    relative: float = 0.0,
    difference: Literal["central", "forward"] = "central",
    precision: Precision = "float32",
) -> Step:
    """The length whose differences agree best with the exact derivatives of a sample, given one by one; of those
    within `GOOD`, the longest.

    Too short a step is lost in rounding, too long a one leaves the line; where they balance depends on the model, the
    precision and the direction, so it is measured. `relative` > 0 is measured and kept. Raises `InputError` for a
    direction of length zero or with numbers that are not finite.
    """
    size, reach = norm(params) or 1.0, norm(direction)
    if not np.isfinite(reach) or reach == 0:
        raise InputError(
            f"the target's gradient has norm {reach}", why="there is no direction to take a step along",
            fix="give other target examples, or a scoring model that is trained for fewer or smaller steps",
        )  # fmt: skip
    exact = derivatives(task, params, direction, rows)
    found = []
    for ratio in (relative,) if relative else LENGTHS:
        length = ratio * size / reach
        pair = DIFFERENCES[difference](params, direction, length)
        probe = Probe.of(task, [[[pair]]], precision=precision)
        read = np.array([float(probe.read(inputs)[0, 0]) for inputs in rows])
        scale = float(np.linalg.norm(exact))
        error = float(np.linalg.norm(read - exact)) / scale if scale > 0 else np.nan
        found.append(Step(ratio, length, error, spearman(read, exact)))
    errors = [s.error if np.isfinite(s.error) else np.inf for s in found]
    return max((s for s, e in zip(found, errors, strict=True) if e <= max(min(errors), GOOD)), key=lambda s: s.length)
