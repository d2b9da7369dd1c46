"""A Bloom filter of 64-bit hashes."""

from __future__ import annotations

import math

import numpy as np

from assay.numerics.shingles import mixed


def shape(items: int, rate: float) -> tuple[int, int]:
    """Bits m = -N ln p / (ln 2)^2 and hash functions k = (m / N) ln 2 for N items at a false-positive rate p.

    Source: Bloom 1970, doi:10.1145/362686.362692.

    >>> shape(1000, 0.01)
    (9586, 7)
    """
    bits = max(64, math.ceil(-items * math.log(rate) / math.log(2) ** 2))
    return bits, max(1, round(bits / max(1, items) * math.log(2)))


class Bloom:
    """Remembers hashes in m bits: what was added is always found, and what was not with probability fill^k."""

    def __init__(self, items: int, rate: float) -> None:
        self.size, self.functions = shape(items, rate)
        self.bits = np.zeros(-(-self.size // 8), dtype=np.uint8)

    def _places(self, hashes: np.ndarray, function: int) -> tuple[np.ndarray, np.ndarray]:
        # Kirsch and Mitzenmacher 2006: h1 + i h2 serves as the i-th hash.
        at = (hashes + np.uint64(function) * (mixed(hashes) | np.uint64(1))) % np.uint64(self.size)
        return (at >> np.uint64(3)).astype(np.int64), np.uint8(1) << (at & np.uint64(7)).astype(np.uint8)

    def add(self, hashes: np.ndarray) -> None:
        for function in range(self.functions):
            place, bit = self._places(hashes, function)
            np.bitwise_or.at(self.bits, place, bit)

    def among(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these were added, or look so, `[n]` bool."""
        left = np.arange(len(hashes))
        for function in range(self.functions):
            place, bit = self._places(hashes[left], function)
            left = left[(self.bits[place] & bit) != 0]
        found = np.zeros(len(hashes), dtype=bool)
        found[left] = True
        return found

    @property
    def fill(self) -> float:
        """Share of bits that are set."""
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64)) / self.size
