"""How alike each vector is to those before it in its cluster: what semantic deduplication is made of.

Never more than `BLOCK` x `BLOCK` cosines at once, whatever the size of a cluster. Legend: n rows, d numbers of each, p
clusters that a row belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 512
# Cosines from here on are those of equal vectors: float32 knows no better.
COPY = 1 - 1e-6


def redundant(cosines: np.ndarray, eps: float) -> np.ndarray:
    """Which rows go: those whose largest cosine is over 1 - eps, and copies at any eps."""
    wide = cosines.astype(np.float64)
    return (1 - wide < eps) | (wide >= COPY)


def distances(cosines: np.ndarray) -> np.ndarray:
    """1 - cos in float64, so that rows under eps are those that are redundant at it; -1 for copies."""
    wide = cosines.astype(np.float64)
    return np.where(wide >= COPY, -1.0, 1 - wide)


class Earlier:
    """Largest cosine of each row with an earlier row that shares a cluster with it, -1 where there is none.

    `reference[j] = max over i before j of <x_i, x_j>` over all earlier rows, `greedy[j]` over those that were kept:
    rows whose own `greedy` is not redundant at `eps`. Rows go in the order of (first cluster, rank), so that of two
    rows that share any cluster, one is earlier everywhere. `likest` are the positions of the earlier rows that those
    cosines are with, of either rule; a row's own where there is none.
    """

    def __init__(self, x_nd: np.ndarray, labels_np: np.ndarray, rank_n: np.ndarray, eps: float) -> None:
        self.x, self.eps, self.limit, self.pairs = x_nd, eps, _limit(eps), 0
        self.reference = np.full(len(x_nd), -1.0, dtype=np.float32)
        self.greedy = self.reference.copy()
        self.likest = {"reference": np.arange(len(x_nd)), "greedy": np.arange(len(x_nd))}
        self.kept = np.ones(len(x_nd), dtype=bool)
        order = np.lexsort((rank_n, labels_np[:, 0]))
        borders = np.flatnonzero(np.diff(labels_np[order, 0])) + 1
        seen: dict[int, list[np.ndarray]] = {}
        for own in np.split(order, borders):
            shared = list(_shared(own, labels_np)) if labels_np.shape[1] > 1 else []
            for group, members in shared:
                if group in seen:
                    self._across(members, np.concatenate(seen[group]))
            self._within(own)
            for group, members in shared:
                seen.setdefault(group, []).append(members)
        np.minimum(self.reference, 1, out=self.reference)
        np.minimum(self.greedy, 1, out=self.greedy)

    def _across(self, rows: np.ndarray, past: np.ndarray) -> None:
        """All of `rows` with all of `past`, which are earlier."""
        for a in _blocks(rows):
            own = self.x[a]
            for b in _blocks(past):
                self._tile(a, own @ self.x[b].T, b)

    def _tile(self, a: np.ndarray, cosines: np.ndarray, b: np.ndarray) -> None:
        self.pairs += cosines.size
        self._raise("reference", a, cosines, b)
        kept = self.kept[b]
        if kept.any():
            some = cosines if kept.all() else cosines[:, kept]
            self._raise("greedy", a, some, b[kept])

    def _raise(self, rule: str, a: np.ndarray, cosines: np.ndarray, b: np.ndarray) -> None:
        """Take down the largest cosine of each of `a` with `b`, and with which, where it is the largest so far."""
        best = cosines.argmax(axis=1)
        value, largest = np.take_along_axis(cosines, best[:, None], axis=1)[:, 0], getattr(self, rule)
        more = value > largest[a]
        largest[a[more]], self.likest[rule][a[more]] = value[more], b[best[more]]

    def _within(self, rows: np.ndarray) -> None:
        """All pairs of `rows`, which are in order."""
        vectors = self.x[rows]
        for start in range(0, len(rows), BLOCK):
            a = rows[start : start + BLOCK]
            own = vectors[start : start + BLOCK]
            for before in range(0, start, BLOCK):
                past = slice(before, before + BLOCK)
                self._tile(a, own @ vectors[past].T, rows[past])
            self._diagonal(a, own @ own.T)

    def _diagonal(self, a: np.ndarray, cosines: np.ndarray) -> None:
        """One by one: whether a row is kept is known when those after it are asked."""
        self.pairs += cosines.size // 2
        earlier = np.tri(len(a), k=-1, dtype=bool)
        self._raise("reference", a, np.where(earlier, cosines, -1), a)
        near = earlier & (cosines >= self.limit)
        kept = self.greedy[a] < self.limit
        for j in np.flatnonzero(near.any(axis=1)).tolist():
            kept[j] = kept[j] and not (near[j] & kept).any()
        self.kept[a] = kept
        self._raise("greedy", a, np.where(earlier & kept, cosines, -1), a)

    def groups(self, rule: str) -> np.ndarray:
        """For each row the position of the first of its group, `[n]`: a redundant row belongs with the earlier row that
        it is most like, so that each group has just one row that stays."""
        gone = redundant(getattr(self, rule), self.eps)
        first = np.where(gone, self.likest[rule], np.arange(len(gone)))
        while (first != first[first]).any():
            first = first[first]
        return first


def _limit(eps: float) -> np.float32:
    """The smallest float32 that is redundant at `eps`, by bisection."""
    below, above = -4.0, 4.0
    for _ in range(110):
        middle = (below + above) / 2
        below, above = (below, middle) if redundant(np.array([middle]), eps)[0] else (middle, above)
    near = np.float32(above)
    return near if float(near) >= above else np.nextafter(near, np.float32(4))


def _shared(own: np.ndarray, labels_np: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Of the rows of one first cluster: every cluster that any of them belongs to, and those that do."""
    labels = labels_np[own]
    for group in np.unique(labels).tolist():
        yield group, own[(labels == group).any(axis=1)]


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
