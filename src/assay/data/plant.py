"""Copies planted into a clean pool, with the truth about each: duplicates, near duplicates, garbled text, leaks.

Nothing here draws from a generator. Every choice is a hash of (seed, purpose, item), so neither the order of
iteration nor the process can change a result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import pyarrow as pa
import xxhash

EXACT, NEAR, GARBLED, LEAKS = 0.04, 0.04, 0.04, 40  # shares of the pool's size; leaks are a count
COPIES = (1, 1, 1, 2, 3, 1, 1, 5)  # how often each original in turn is copied
NOISE = 0.25  # share of the letters that `char_noise` replaces


class Row(NamedTuple):
    id: str
    text: str
    domain: str


class Truth(NamedTuple):
    id: str
    kind: str
    of: str
    detail: str


@dataclass(frozen=True)
class Planted:
    """A pool, a target and what is known about the pool.

    `pool` has id, text, domain; `target` has id, text, group (halves are split by group); `truth` has one row
    for each planted row of the pool: id, kind, of (the id of its original) and detail.
    """

    pool: pa.Table
    target: pa.Table
    truth: pa.Table


def key(seed: int, purpose: str, *parts: object) -> int:
    """A 64-bit hash of the seed, what it is used for, and the item."""
    return xxhash.xxh3_64_intdigest("\x1f".join([str(seed), purpose, *map(str, parts)]).encode())


def opaque(seed: int, *parts: object) -> str:
    """An id of 16 hex digits that says nothing about its row."""
    return f"{key(seed, 'id', *parts):016x}"


def chance(seed: int, purpose: str, *parts: object) -> float:
    """A number in [0, 1)."""
    return (key(seed, purpose, *parts) >> 11) / 2**53


def permuted(n: int, seed: int, purpose: str, *parts: object) -> list[int]:
    """The numbers 0..n-1 in the order of their hashes."""
    return sorted(range(n), key=lambda i: key(seed, purpose, *parts, i))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"\w+", text.lower())


def grams(text: str, n: int) -> set[int]:
    """Hashes of the word n-grams; a shorter text is one gram."""
    w = words(text)
    return {xxhash.xxh3_64_intdigest(" ".join(w[i : i + n]).encode()) for i in range(max(1, len(w) - n + 1))}


def tabulate(rows: Iterable[Sequence[str]], names: Sequence[str]) -> pa.Table:
    """A table of strings, also when there are no rows."""
    rows = list(rows)
    return pa.table({name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(names)})


def assemble(rows: list[Row], targets: list[tuple[str, str, str]], truth: list[Truth], seed: int) -> Planted:
    """The three tables: pool and truth in the order of a hash of their ids."""
    assert len({row.id for row in rows} | {item[0] for item in targets}) == len(rows) + len(targets)
    rows = sorted(rows, key=lambda row: key(seed, "order", row.id))
    truth = sorted(truth, key=lambda row: key(seed, "order", row.id))
    return Planted(
        pool=tabulate(rows, Row._fields),
        target=tabulate(targets, ("id", "text", "group")),
        truth=tabulate(truth, Truth._fields),
    )


def quota(size: int, leaks: int) -> dict[str, int]:
    """How many rows of each kind go into a pool of `size`, without the shuffled copies."""
    shares = {"exact_dup": EXACT, "near_dup": NEAR, "garbled": GARBLED}
    return {kind: round(share * size) for kind, share in shares.items()} | {"leak": leaks}


def plant(
    clean: list[Row], targets: list[tuple[str, str, str]], domain: str, size: int, seed: int
) -> tuple[list[Row], list[Truth]]:
    """The planted rows and their truth; `domain` is the target's.

    Originals of exact duplicates, near duplicates and garbles are distinct rows, spread evenly over the domains.
    Every clean row of `domain` also gets one word-shuffled copy.
    """
    leaked = permuted(len(targets), seed, "leak")[:LEAKS]
    counts = quota(size, len(leaked))
    rows: list[Row] = []
    truth: list[Truth] = []

    def add(kind: str, detail: str, of: str, text: str, label: str) -> None:
        fresh = opaque(seed, "planted", kind, detail, of, len(rows))
        rows.append(Row(fresh, text, label))
        truth.append(Truth(fresh, kind, of, detail))

    originals = iter(_spread(clean, seed))
    for row, copies in _copies(originals, counts["exact_dup"]):
        for _ in range(copies):
            add("exact_dup", "copy", row.id, row.text, row.domain)
    for row in _take(originals, counts["near_dup"]):
        donor = clean[key(seed, "donor", row.id) % len(clean)]
        text, detail = near(row.text, donor.text, seed)
        add("near_dup", detail, row.id, text, row.domain)
    garbles = {"char_noise": char_noise, "letter_shuffle": letter_shuffle, "no_spaces": no_spaces, "loop": loop}
    for row, (detail, garble) in zip(_take(originals, counts["garbled"]), cycle(garbles.items()), strict=False):
        add("garbled", detail, row.id, garble(row.text, seed), row.domain)
    for row in clean:
        if row.domain == domain:
            add("garbled", "word_shuffle", row.id, word_shuffle(row.text, seed), domain)
    for i in leaked:
        add("leak", "verbatim", targets[i][0], targets[i][1], domain)
    return rows, truth


def _spread(clean: list[Row], seed: int) -> list[Row]:
    """All rows, one of each domain in turn."""
    domains: dict[str, int] = {}
    placed: list[tuple[int, int, Row]] = []
    for row in sorted(clean, key=lambda row: key(seed, "spread", row.id)):
        domains[row.domain] = domains.get(row.domain, -1) + 1
        placed.append((domains[row.domain], key(seed, "domain", row.domain), row))
    return [row for _, _, row in sorted(placed)]


def _take(rows: Iterator[Row], n: int) -> Iterator[Row]:
    # Not islice over zip: a row must not be consumed and then lost at the border between two kinds.
    for _ in range(n):
        row = next(rows, None)
        if row is None:
            return
        yield row


def _copies(rows: Iterator[Row], total: int) -> Iterator[tuple[Row, int]]:
    for copies in cycle(COPIES):
        row = next(rows, None) if total > 0 else None
        if row is None:
            return
        yield row, min(copies, total)
        total -= copies


def near(text: str, donor: str, seed: int) -> tuple[str, str]:
    """One word in twenty dropped, replaced by a word of `donor`, or swapped with the next; and what was done."""
    parts = re.split(r"(\s+)", text)  # words at even places, the white space between them at odd ones
    places = [i for i in range(2, len(parts), 2) if any(map(str.isalnum, parts[i]))]
    spare = [word for word in re.findall(r"[A-Za-z]+", donor) if len(word) > 2] or ["other"]
    wanted = max(1, round(len(places) / 20))
    done: list[str] = []
    for at in permuted(len(places), seed, "near", text)[:wanted]:
        i = places[at]
        edit = ("drop", "replace", "swap")[key(seed, "edit", text, at) % 3]
        before, here = words(parts[i - 2]), words(parts[i])
        if edit == "swap" and before and before != here:
            parts[i - 2], parts[i] = parts[i], parts[i - 2]
        elif edit == "replace":
            choices = [word for word in spare if word.lower() not in parts[i].lower()] or ["other"]
            parts[i] = choices[key(seed, "spare", text, at) % len(choices)]
        else:
            edit, parts[i - 1], parts[i] = "drop", "", ""
        done.append(edit)
    return "".join(parts), "+".join(sorted(set(done)))


def word_shuffle(text: str, seed: int) -> str:
    """The same words in another order; the white space stays where it was."""
    parts = re.split(r"(\s+)", text)
    old = parts[::2]
    parts[::2] = [old[i] for i in permuted(len(old), seed, "word_shuffle", text)]
    if parts[::2] == old:
        parts[::2] = old[1:] + old[:1]
    return "".join(parts)


def char_noise(text: str, seed: int) -> str:
    """A quarter of the letters replaced by random ones."""
    out = list(text)
    for i, char in enumerate(text):
        if char.isalpha() and chance(seed, "char_noise", text, i) < NOISE:
            out[i] = "abcdefghijklmnopqrstuvwxyz"[key(seed, "char", text, i) % 26]
    return "".join(out)


def letter_shuffle(text: str, seed: int) -> str:
    """The letters of each word in another order."""

    def shuffled(match: re.Match[str]) -> str:
        word = match.group()
        return "".join(word[i] for i in permuted(len(word), seed, "letters", text, match.start()))

    return re.sub(r"[^\W\d_]{3,}", shuffled, text)


def no_spaces(text: str, seed: int) -> str:
    """All white space removed."""
    return re.sub(r"\s+", "", text)


def loop(text: str, seed: int) -> str:
    """One phrase of four words, again and again, to the same length."""
    w = text.split()
    start = key(seed, "loop", text) % max(1, len(w) - 3)
    phrase = " ".join(w[start : start + 4])
    return " ".join([phrase] * max(3, len(text) // (len(phrase) + 1)))
