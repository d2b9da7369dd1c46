"""The trainings that metasmoothness is measured by: the same run at data weights w, w + h v and w + 2 h v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from assay.core.errors import InputError
from assay.core.keys import digest, hash_ids
from assay.core.task import Params
from assay.numerics.smooth import Smoothness, smoothness
from assay.train import loop, optim
from assay.train.replay import State, Training

Read = Callable[[Params], np.ndarray]
"""What is read from trained weights, `[q]` float64: the losses of q targets."""


@dataclass(frozen=True)
class End:
    """What one of the trainings ends in."""

    params: np.ndarray
    """All trained weights end to end, `[p]`."""
    square: np.ndarray | None
    """AdamW's second moment, `[p]`; None for the others."""
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Probe:
    """A training run and the directions in which its data weights are moved: w_i (1 + k h v_i), v_i = +-1 by (seed,
    number of the direction, id). Up to h = 1/2 no weight is below 0. Steps before `since` are taken at w itself.
    """

    training: Training
    read: Read
    h: float = 0.1
    since: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.h <= 0.5:
            raise InputError(f"h = {self.h}", why="weights go down to 1 - 2 h", fix="give 0 < h <= 0.5, such as 0.1")
        if not 0 <= self.since < self.training.recipe.steps:
            raise InputError(
                f"no steps from {self.since} of {self.training.recipe.steps}", fix="since lies within the run"
            )

    def weights(self, direction: int, times: int) -> np.ndarray:
        ids, base = self.training.selection.ids, self.training.selection.weights
        signs = np.where(hash_ids(ids, "smooth", self.seed, direction) % np.uint64(2), 1.0, -1.0)
        return base * (1 + times * self.h * signs)

    def before(self) -> State:
        """The state before the first step whose weights are moved."""
        state = self.training.initial()
        for step in range(self.since):
            state = self.training.advance(state, step)
        return state

    def end(self, before: State, direction: int, times: int) -> End:
        """Of a training from there on; `times` 0, 1 or 2."""
        state = self.training.run(before, self.since, self.weights(direction, times))
        if not all(p.isfinite().all() for p in state.params):
            raise InputError(
                "weights are not finite after the last step", why="training diverged",
                fix=f"lower lr (now {self.training.recipe.lr})",
            )  # fmt: skip
        square = _flat(state.slots["square"]) if "square" in state.slots else None
        return End(_flat(state.params), square, self.read(self.training.named(state)))

    def figures(self, first: End, middle: End, last: End) -> Smoothness:
        """Raises `InputError` when no weight was moved by the data weights: that is no smooth training."""
        scale = None if first.square is None else np.sqrt(first.square)
        if np.array_equal(first.params, middle.params) and np.array_equal(first.params, last.params):
            raise InputError(
                "data weights do not reach the loss", why="training ended in the same weights whatever they were",
                fix="a task's `terms` must give the loss of each example by itself, and training must move something",
            )  # fmt: skip
        ends, values = (first.params, middle.params, last.params), (first.values, middle.values, last.values)
        return smoothness(ends, values, scale)


def measure(probe: Probe, directions: int = 2) -> list[Smoothness]:
    """One for each direction, by 1 + 2 x directions trainings, one after another."""
    before = probe.before()
    first = probe.end(before, 0, 0)
    return [probe.figures(first, probe.end(before, k, 1), probe.end(before, k, 2)) for k in range(directions)]


def _flat(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([t.reshape(-1) for t in tensors]).double().numpy()


# What is kept of a killed measurement.


def save_state(path: Path, training: Training, state: State, key: str) -> None:
    named = dict(zip(training.moved, state.params, strict=True))
    slots = {s: dict(zip(training.moved, v, strict=True)) for s, v in state.slots.items()}
    loop.save(path, loop.Trained(named, slots, []), digest(key))


def load_state(path: Path, training: Training, key: str) -> State | None:
    held = loop.load_if(path, digest(key))
    if held is None:
        return None
    slots: optim.State = {s: [v[n] for n in training.moved] for s, v in held.state.items()}
    return State([held.params[n] for n in training.moved], slots)


def save_end(path: Path, end: End, key: str) -> None:
    tensors = {"params": torch.from_numpy(end.params), "values": torch.from_numpy(end.values)}
    tensors |= {} if end.square is None else {"square": torch.from_numpy(end.square)}
    loop.save(path, loop.Trained(tensors, {}, []), digest(key))


def load_end(path: Path, key: str) -> End | None:
    held = loop.load_if(path, digest(key))
    if held is None:
        return None
    found = {name: tensor.numpy() for name, tensor in held.params.items()}
    return End(found["params"], found.get("square"), found["values"])
