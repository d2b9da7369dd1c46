"""Going back through a sequence of states with little memory: the lazy k-ary tree of REPLAY.

Reference: Engstrom et al. 2025, arXiv:2503.13751, section 3; checkpoint schedules go back to Griewank & Walther 2000.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")


def cuts(low: int, high: int, branch: int) -> list[int]:
    """Ends of the children of steps low..high: at most `branch` of them, of even length.

    >>> cuts(0, 10, 4)
    [0, 2, 5, 7, 10]
    """
    parts = min(branch, high - low)
    return [low + (high - low) * j // parts for j in range(parts + 1)]


def spine(low: int, high: int, branch: int) -> list[int]:
    """Starts of what a first sweep leaves behind: of all children, and within the last one of its own, down to a step.
    The tree visits those first, and would otherwise run their steps again.

    >>> spine(0, 27, 3)
    [0, 9, 18, 21, 24, 25, 26]
    """
    found = [low]
    while high - low > 1:
        ends = cuts(low, high, branch)
        found += ends[1:-1]
        low = ends[-2]
    return found


def exact_costs(steps: int, branch: int) -> tuple[int, int]:
    """Steps run to restore states, and states kept at once, of a tree over `steps` steps.

    For steps = branch^h they are steps h (1 - 1/branch) and (branch - 1) h + 1. Training itself is among the steps: all
    but one of its own, if it leaves the states of `spine` behind, no more than are kept later.

    >>> [exact_costs(t, k) for t, k in [(8, 2), (64, 4), (1024, 2), (4096, 8), (3125, 4)]]
    [(12, 4), (144, 10), (5120, 11), (14336, 29), (13734, 19)]
    """
    known: dict[int, tuple[int, int]] = {1: (0, 1)}

    def cost(length: int) -> tuple[int, int]:
        if length not in known:
            ends = cuts(0, length, branch)
            below = [cost(b - a) for a, b in zip(ends, ends[1:], strict=False)]
            total = ends[-2] + sum(run for run, _ in below)
            known[length] = total, max(index + most for index, (_, most) in enumerate(below))
        return known[length]

    return cost(steps)


@dataclass
class Tree(Generic[S]):
    """Visits the steps of a range from the last to the first, each with the state before it.

    A range is cut into `branch` children; one sweep from its start keeps the state before each child; children are
    visited from the right, and a state is let go with its child. `advance(state, t)` takes the state before step t to
    the one after it, `visit(state, t)` does the work. Steps from `until` on are left out.
    """

    advance: Callable[[S, int], S]
    visit: Callable[[S, int], None]
    branch: int
    until: int
    steps: int = 0
    """Calls of `advance`."""
    peak: int = 0
    """Most states that were kept at once."""

    def children(self, starts: list[tuple[int, S]], high: int, above: int = 0) -> None:
        """Visit, from the right, ranges that start at `starts` and end where the next starts, the last one at `high`.
        `starts` is emptied; `above` states are kept elsewhere."""
        while starts:
            low, state = starts.pop()
            self.span(low, high, state, above + len(starts))
            high = low

    def span(self, low: int, high: int, state: S, above: int = 0) -> None:
        """Visit, from the right, the steps low..high from the state before the first of them."""
        high = min(high, self.until)
        if high <= low:
            return
        if high - low == 1:
            self.peak = max(self.peak, above + 1)
            self.visit(state, low)
            return
        self.children(self.sweep(state, cuts(low, high, self.branch)[:-1]), high, above)

    def sweep(self, state: S, stops: list[int]) -> list[tuple[int, S]]:
        """States before the steps `stops`, from the state before the first of them."""
        found = [(stops[0], state)]
        for before, after in zip(stops, stops[1:], strict=False):
            for step in range(before, after):
                state = self.advance(state, step)
                self.steps += 1
            found.append((after, state))
        return found
