"""RDS+: the target's examples take turns, each taking what is most like it."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from assay.core.keys import shuffled
from assay.core.method import Batch, Context, Featurizer, Scorer
from assay.core.table import sorted_units

# Cosines that are held at once, rows of the pool in one product, places looked at in one go.
CELLS, BLOCK, WINDOW = 1 << 24, 4096, 64
# What cosines are rounded to: smaller differences are ties.
DECIMALS = 6


@dataclass(frozen=True)
class _State:
    ids: np.ndarray
    """In their own order."""
    found: np.ndarray
    """Score and cosine of each, `[n, 2]`."""


class Rds(Scorer):
    """Place in the order in which the target's examples, taking turns, each take the example that is most like them.

    Formula: s_i = 1 - r_i / n, r_i = 0, 1, ... the turn in which i was taken: in turn r, target example q = r mod m
        takes argmax over those left of cos(x_q, x_i), averaged over the scoring models
    Reference: Ivison et al. 2025, arXiv:2503.01807 (RDS+)
    Note: the highest k scores are what k turns of the round robin take, so every target example has its equal share of
        any budget in examples; features are means of hidden states weighted by position, of the scoring model or, with
        features = {name = "encoder", path = ..., pooling = "position"}, of another. The order of turns is a hash of
        the target's ids; cosines that are equal to six decimals are ties, which fall by a hash of the pool's ids.
        Column `cosine`: with the target example that took it. Not a measure of utility
    """

    features: Featurizer = dataclasses.field(  # type: ignore[assignment]
        default_factory=lambda: {"name": "embed", "pooling": "position"}
    )

    unit: ClassVar[str] = "share of the pool that comes later"

    def init(self, context: Context) -> _State:
        ids, members = context.pool.ids, context.members(self.features)
        ties = shuffled(ids, "tie")
        rows = [sorted_units(context.table(member), ties)[1] for member in members]
        asked = []
        for member in members:
            table = context.target_table(member)
            asked.append(sorted_units(table, shuffled(table.ids, "turn"))[1])
        context.spent(2.0 * sum(x.size * len(y) for x, y in zip(rows, asked, strict=True)))
        shape = len(asked[0]), len(ids)
        with tempfile.TemporaryFile(dir=context.folder) as file:
            order: np.ndarray = np.memmap(file, np.int32, "w+", shape=shape)
            step = max(1, CELLS // shape[1])
            for start in range(0, shape[0], step):
                some = [y[start : start + step] for y in asked]
                order[start : start + step] = np.argsort(-_cosines(some, rows), axis=1, kind="stable")
            taken = round_robin(order)
        found = np.empty((len(ids), 2))
        found[taken, 0] = 1 - np.arange(len(ids)) / len(ids)
        found[taken, 1] = _of_turns(asked, rows, taken)
        back = np.argsort(ids[ties], kind="stable")
        return _State(ids[ties][back], found[back])

    def columns(self, state: _State) -> tuple[str, ...]:
        return "score", "cosine"

    def score(self, state: _State, batch: Batch) -> Any:
        return state.found[np.searchsorted(state.ids, batch.ids)]


def _cosines(asked: list[np.ndarray], rows: list[np.ndarray]) -> np.ndarray:
    """Of target examples with the pool's, averaged over models and rounded, `[m, n]`. In float64, so that equal rows
    have equal cosines wherever they stand."""
    total = np.zeros((len(asked[0]), len(rows[0])))
    for y, x in zip(asked, rows, strict=True):
        wide = y.astype(np.float64)
        for start in range(0, len(x), BLOCK):
            total[:, start : start + BLOCK] += wide @ x[start : start + BLOCK].T.astype(np.float64)
    return np.round(total / len(rows), DECIMALS)


def _of_turns(asked: list[np.ndarray], rows: list[np.ndarray], taken: np.ndarray) -> np.ndarray:
    """Cosine of what was taken in each turn with the target example whose turn it was, `[n]`."""
    found, by = np.zeros(len(taken)), np.arange(len(taken)) % len(asked[0])
    for y, x in zip(asked, rows, strict=True):
        for start in range(0, len(taken), BLOCK):
            turns = slice(start, start + BLOCK)
            found[turns] += np.einsum("nd,nd->n", x[taken[turns]], y[by[turns]], dtype=np.float64)
    return found / len(rows)


def round_robin(order: np.ndarray) -> np.ndarray:
    """What is taken in each turn, `[n]`: in turn r row r mod m of `order` `[m, n]` takes its first that is left.

    >>> round_robin(np.array([[0, 1, 2], [0, 2, 1]])).tolist()
    [0, 2, 1]
    """
    m, n = order.shape
    gone, at = np.zeros(n, dtype=bool), np.zeros(m, dtype=np.int64)
    taken = np.empty(n, dtype=np.int64)
    for turn in range(n):
        asking = turn % m
        while True:
            window = order[asking, at[asking] : at[asking] + WINDOW]
            left = np.flatnonzero(~gone[window])
            if len(left):
                break
            at[asking] += len(window)
        taken[turn] = window[left[0]]
        gone[taken[turn]] = True
        at[asking] += left[0] + 1
    return taken
