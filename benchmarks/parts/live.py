"""The memory of a sweep: bytes of tensors that are alive at once, and those that its formula says.

Alive are what torch's allocator has given and not taken back, by its own events; what a C library keeps of freed memory
is not among them, and differs from one to the next.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from assay.numerics.tree import cuts, exact_costs
from assay.train.adjoint import Adjoint
from assay.train.replay import State, Training
from assay.train.reverse import reverse


def most(work: Callable[[], Any]) -> int:
    """The most bytes that `work` holds at any moment beyond those that were there before it began."""
    gc.collect()  # what others left to be collected is not given back while `work` is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        held = work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    now = top = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  # not in its stub
            top = max(top, now)
    del held
    return top


def foretold(training: Training, branch: int, targets: int, on_disk: bool = False) -> float:
    """N S + k S + P + W of `replay.metagradient`; the first of the states in memory has the training's own weights."""
    state, steps = training.initial(), training.recipe.steps
    after = Adjoint.of(training.recipe, [torch.ones(targets, *p.shape) for p in state.params])
    one = most(lambda: reverse(training, state, 1, after))
    ends = cuts(0, steps, branch)
    span = max(b - a for a, b in zip(ends, ends[1:], strict=False)) if on_disk else steps
    weights = 0 if on_disk else size(state.params)
    return (exact_costs(span, branch)[1] + targets) * whole(state) - weights + size(state.params) + one


def made_once(training: Training) -> None:
    """What the training holds for itself: batches, first weights, the module."""
    assert len(training.batches) == training.recipe.steps and training.first and training.task.module is not None
    assert training.together in (True, False)


def whole(state: State) -> int:
    """Bytes of a state."""
    return size([*state.params, *(s for slot in state.slots.values() for s in slot)])


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
