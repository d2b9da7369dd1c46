"""What occurs more than once in a text: lines, paragraphs and runs of n words, in the two published readings of Gopher.

`datatrove`: copies after the first count, as shares of all characters of the text; runs of n words are read from left
to right and what repeats an earlier one is stepped over as a whole, so no character counts twice. `dclm`: every copy
counts, as shares of the characters of the units themselves; for runs of five and more words, the words that lie in
any repeated run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay.numerics.characters import Spans, mix

STEP = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class Groups:
    """Members of groups of two and more equal keys, group after group."""

    members: np.ndarray
    starts: np.ndarray
    """Where in `members` each group begins."""

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts, append=len(self.members))

    @property
    def first(self) -> np.ndarray:
        """The first member of each group."""
        return np.minimum.reduceat(self.members, self.starts) if len(self.starts) else self.members


def groups(keys: np.ndarray) -> Groups:
    """Equal keys among 64-bit numbers."""
    bits = max(8, min(22, int(len(keys)).bit_length() + 2))
    bucket = (keys >> np.uint64(64 - bits)).astype(np.int64)
    shared = np.flatnonzero(np.bincount(bucket, minlength=1 << bits)[bucket] > 1)
    order = shared[np.argsort(keys[shared])]
    new = np.ones(len(order), dtype=bool)
    new[1:] = keys[order[1:]] != keys[order[:-1]]
    starts = np.flatnonzero(new)
    sizes = np.diff(starts, append=len(order))
    kept = np.repeat(sizes > 1, sizes)
    sizes = sizes[sizes > 1]
    return Groups(order[kept], np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)[: len(sizes)])


def keyed(hashes: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """The same hash in two texts is two keys."""
    if not len(owners):
        return hashes
    marks = mix(np.arange(1, int(owners[-1]) + 2, dtype=np.uint64))
    return mix(hashes ^ marks[owners])


def copies(spans: Spans, hashes: np.ndarray, *, every: bool) -> tuple[np.ndarray, np.ndarray]:
    """Spans of each text that are copies, and their characters: all but the first of each, or every one."""
    found = groups(keyed(hashes, spans.owners))
    flags = np.zeros(len(hashes), dtype=bool)
    flags[found.members] = True
    if not every:
        flags[found.first] = False
    return spans.total(flags), spans.total(np.where(flags, spans.sizes, 0))


@dataclass(frozen=True)
class Grams:
    """Runs of n words that occur more than once in their text: where they begin, and in what groups."""

    n: int
    places: np.ndarray
    groups: Groups


def grams(spans: Spans, hashes: np.ndarray, orders: Sequence[int]) -> list[Grams]:
    """The repeated runs for each n of a rising sequence from 2: those of n+1 words begin where those of n words do."""
    last = spans.offsets[1:]
    places = np.arange(len(hashes))
    rolling, found = hashes.copy(), []
    for n in range(2, max(orders) + 1):
        inside = places + n <= last[spans.owners[places]]
        places, rolling = places[inside], rolling[inside]
        rolling = rolling * STEP + hashes[places + n - 1]
        equal = groups(keyed(rolling, spans.owners[places]))
        if n in orders:
            found.append(Grams(n, places, equal))
        stay = np.sort(equal.members)
        places, rolling = places[stay], rolling[stay]
    return found


def top(spans: Spans, run: Grams, *, longest: bool) -> np.ndarray:
    """Characters in the copies of each text's most frequent run of n words.

    Of equally frequent runs the first one to begin counts, with blanks between words, even if it is never repeated; or
    the longest, without blanks, if it is repeated.
    """
    characters = np.zeros(len(spans.offsets) - 1, dtype=np.int64)
    if not longest:
        some = np.flatnonzero(spans.counts >= run.n)
        characters[some] = reach(spans, spans.offsets[some], run.n) + run.n - 1
    if not len(run.groups.starts):
        return characters
    first = run.places[run.groups.first]
    sizes, owners = run.groups.sizes, spans.owners[first]
    lengths = reach(spans, first, run.n)
    order = np.lexsort((-lengths if longest else first, -sizes, owners))
    best = order[np.concatenate([[True], owners[order][1:] != owners[order][:-1]])]
    blanks = 0 if longest else run.n - 1
    characters[owners[best]] = sizes[best] * (lengths[best] + blanks)
    return characters


def reach(spans: Spans, places: np.ndarray, n: int) -> np.ndarray:
    """Characters of the n words from each place on."""
    running = np.concatenate([[0], np.cumsum(spans.sizes)])
    return running[places + n] - running[places]


def stepped(spans: Spans, run: Grams) -> np.ndarray:
    """Characters of the runs of n words that repeat one seen before, when each is stepped over once it is found."""
    characters = np.zeros(len(spans.offsets) - 1, dtype=np.int64)
    order = np.argsort(run.groups.members)
    places = run.places[run.groups.members[order]]
    group = np.repeat(np.arange(len(run.groups.starts)), run.groups.sizes)[order]
    owners, lengths = spans.owners[places], reach(spans, places, run.n)
    seen, free = bytearray(len(run.groups.starts)), 0
    for at, (place, k) in enumerate(zip(places.tolist(), group.tolist(), strict=True)):
        if place < free:
            continue
        if seen[k]:
            characters[owners[at]] += lengths[at]
            free = place + run.n
        else:
            seen[k] = 1
    return characters


def covered(spans: Spans, run: Grams) -> np.ndarray:
    """Characters of the words that lie in any repeated run of n words."""
    edges = np.zeros(len(spans.starts) + 1, dtype=np.int64)
    places = run.places[run.groups.members]
    np.add.at(edges, places, 1)
    np.add.at(edges, places + run.n, -1)
    return spans.total(np.where(np.cumsum(edges)[:-1] > 0, spans.sizes, 0))
