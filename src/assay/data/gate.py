"""The contamination gate: which pool examples contain target items, by 13-word sequences."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from assay.core.pool import Pool
from assay.core.target import Target

NGRAM, SHORTEST = 13, 5
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Hits:
    """Pool ids that share a full-length word sequence with a target item."""

    ids: np.ndarray
    items: int
    by_half: dict[str, int]
    examples: list[dict[str, Any]] = field(default_factory=list)


def words(text: str) -> list[str]:
    """NFKC, lower case, punctuation and white space gone.

    >>> words("The  ﬁrst, \\n TIME!")
    ['the', 'first', 'time']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def sequences(tokens: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of each run of n words: sum_k token_{i+k} base^(n-1-k) modulo 2^64."""
    if len(tokens) < n:
        return np.zeros(0, dtype=np.uint64)
    total = np.zeros(len(tokens) - n + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for k in range(n):
            total = total * _BASE + tokens[k : k + len(total)]
    return total


class _Vocabulary:
    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def codes(self, text: str) -> np.ndarray:
        known, out = self.known, []
        for word in words(text):
            code = known.get(word)
            if code is None:
                code = known[word] = xxhash.xxh3_64_intdigest(word.encode())
            out.append(code)
        return np.array(out, dtype=np.uint64)


def contamination(pool: Pool, target: Target, *, n: int = NGRAM, examples: int = 8) -> Hits:
    """Pool examples with at least one run of n words of a target item (of either half).

    Items shorter than n words are looked for whole, if they have at least 5 words; shorter ones cannot be told from
    chance and are not looked for. Hashes are 64 bits: a false hit has probability under pairs / 2^64.
    Source: 13-grams as in Brown et al. 2020, arXiv:2005.14165, app. C.
    """
    vocabulary = _Vocabulary()
    wanted: dict[int, dict[int, tuple[str, int]]] = {}
    items = {"selecting": target.selecting, "judging": target.judging}
    for half, part in items.items():
        if "text" not in part.columns:
            return Hits(pool.ids[:0], 0, {"selecting": 0, "judging": 0})
        for row, text in enumerate(part.column("text")):
            codes = vocabulary.codes(text)
            size = min(n, len(codes))
            if size >= SHORTEST:
                table = wanted.setdefault(size, {})
                for value in sequences(codes, size).tolist():
                    table.setdefault(value, (half, row))
    keys = {size: np.array(sorted(table), dtype=np.uint64) for size, table in wanted.items()}
    found, by_half, shown = [], {"selecting": 0, "judging": 0}, []
    for shard in pool.shards(2048):
        for position, text in enumerate(shard.column("text")):
            match = _first(vocabulary.codes(text), keys, wanted)
            if match is not None:
                half, row = match
                found.append(shard.ids[position])
                by_half[half] += 1
                if len(shown) < examples:
                    target_id = items[half].ids.tolist()[row].decode()
                    pool_id = shard.ids.tolist()[position].decode()
                    shown.append({"pool_id": pool_id, "target_id": target_id, "text": text[:400]})
    ids = np.array(found, dtype=pool.ids.dtype) if found else pool.ids[:0]
    return Hits(ids, sum(len(p) for p in items.values()), by_half, shown)


def _first(codes: np.ndarray, keys: dict[int, np.ndarray], wanted: dict[int, dict[int, tuple[str, int]]]) -> Any:
    for size, known in keys.items():
        runs = sequences(codes, size)
        if len(runs):
            at = np.minimum(np.searchsorted(known, runs), len(known) - 1)
            same = np.flatnonzero(known[at] == runs)
            if len(same):
                return wanted[size][int(runs[same[0]])]
    return None
