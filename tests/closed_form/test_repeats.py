"""Repeated lines and runs of words against a plain reading with dictionaries of strings."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from assay.numerics import repeats
from assay.numerics.characters import Texts

ORDERS = (2, 3, 4, 5, 6, 7, 8, 9, 10)


def looping(count: int = 120) -> list[str]:
    """Texts of few different words, so that runs repeat, overlap and touch."""
    rng = random.Random(1)
    made = ["", "a", "a a", "a a a a a a a a a a a a", "a b " * 9, "x y z\nx y z"]
    for _ in range(count):
        names = ["a", "bb", "ccc", "dddd", "e\u0301"][: rng.randrange(1, 6)]
        made.append(" ".join(rng.choices(names, k=rng.randrange(60))))
    return made


def plain_stepped(words: list[str], n: int) -> int:
    seen, characters, at = set(), 0, 0
    while at + n <= len(words):
        run = tuple(words[at : at + n])
        if run in seen:
            characters += sum(map(len, run))
            at += n
        else:
            seen.add(run)
            at += 1
    return characters


def plain_covered(words: list[str], n: int) -> int:
    runs = [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]
    counts = Counter(runs)
    inside = {k + j for k, run in enumerate(runs) if counts[run] > 1 for j in range(n)}
    return sum(len(words[k]) for k in inside)


def plain_top(words: list[str], n: int, longest: bool) -> int:
    counts = Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))
    if not counts or (longest and max(counts.values()) == 1):
        return 0
    most = max(counts.values())
    lengths = [sum(map(len, run)) + (0 if longest else n - 1) for run, count in counts.items() if count == most]
    return most * (max(lengths) if longest else lengths[0])


@pytest.mark.parametrize("n", ORDERS)
def test_runs_of_words(n):
    given = looping()
    texts = Texts(given)
    spans, words = texts.chunks, [t.split() for t in given]
    run = next(g for g in repeats.grams(spans, texts.hashes(spans), ORDERS) if g.n == n)
    assert repeats.stepped(spans, run).tolist() == [plain_stepped(w, n) for w in words]
    assert repeats.covered(spans, run).tolist() == [plain_covered(w, n) for w in words]
    for longest in (False, True):
        assert repeats.top(spans, run, longest=longest).tolist() == [plain_top(w, n, longest) for w in words]
    assert max(plain_stepped(w, n) for w in words) > 0


def test_copies():
    given = ["a\nbb\na\na", "a\nbb", "", "\n\n"]
    texts = Texts(given)
    hashes = texts.hashes(texts.lines)
    first = repeats.copies(texts.lines, hashes, every=False)
    every = repeats.copies(texts.lines, hashes, every=True)
    assert [x.tolist() for x in first] == [[2, 0, 0, 2], [2, 0, 0, 0]]
    assert [x.tolist() for x in every] == [[3, 0, 0, 3], [3, 0, 0, 0]]


def test_groups_are_exact():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 400, 1000).astype(np.uint64) << np.uint64(55)
    found, plain = repeats.groups(keys), Counter(keys.tolist())
    sizes = dict(zip(keys[found.first].tolist(), found.sizes.tolist(), strict=True))
    assert sizes == {k: c for k, c in plain.items() if c > 1}
    for start, size in zip(found.starts, found.sizes, strict=True):
        members = found.members[start : start + size]
        assert len(set(members.tolist())) == size and len(set(keys[members].tolist())) == 1
    assert found.first.tolist() == [keys.tolist().index(k) for k in keys[found.first].tolist()]
