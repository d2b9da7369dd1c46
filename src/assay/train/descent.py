"""Training on a multiset, such that changing how often one example is in it moves the visits of no other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from assay.core.keys import digest, uniform
from assay.train.replay import Training


def places(
    ids: np.ndarray, counts: np.ndarray, steps: int, passes: float, seed: int, share: float = 1.0
) -> list[np.ndarray]:
    """Positions in `ids` that each of `steps` steps visits, in `passes` passes through the multiset of `counts`.

    Copy r of an example has in pass e a moment of its own, e + u(id, r, e) with u uniform, and the step in which it
    falls is its: what the other counts are has no say. A step holds as many copies as happen to fall in it; of a last
    pass that is broken off, each copy is seen or not. Of all visits a `share` is made, by a number of each one's own: a
    smaller share makes a part of what a larger one makes.
    """
    moments, rows, copies = [], [], []
    for copy in range(int(counts.max(initial=0))):
        held = np.flatnonzero(counts > copy)
        for turn in range(math.ceil(passes)):
            made = held if share >= 1 else held[uniform(ids[held], "made", seed, turn, copy) < share]
            moments.append((turn + uniform(ids[made], "place", seed, turn, copy)) / passes)
            rows.append(made)
            copies.append(np.full(len(made), copy))
    if not rows:
        return [np.zeros(0, dtype=np.int64) for _ in range(steps)]
    when, row, copy = (np.concatenate(parts) for parts in (moments, rows, copies))
    step = np.floor(when * steps).astype(np.int64)
    order = np.lexsort((copy, ids[row], when))
    order = order[step[order] < steps]
    ends = np.searchsorted(step[order], np.arange(1, steps))
    return np.split(row[order], ends)


@dataclass(frozen=True, eq=False, kw_only=True)
class Multiset(Training):
    """Training on `counts[k]` copies of the k-th id of the selection, each once in each of `passes` passes; or on a
    `share` of these visits."""

    counts: np.ndarray
    passes: float
    share: float = 1.0

    @cached_property
    def batches(self) -> list[np.ndarray]:
        return places(self.selection.ids, self.counts, self.recipe.steps, self.passes, self.recipe.seed, self.share)

    def key(self) -> str:
        return digest("multiset", super().key(), self.counts.tolist(), self.passes, self.share)
