"""Texts to hashes of their words and word sequences, many texts at a time.

Words are those of the plain form of a text: lower case, diacritics gone (NFD without its marks), decimal digits 0
unless they are kept, everything that is neither letter, mark nor number a gap. In scripts without spaces (Han, kana,
Thai, Lao, Khmer, Burmese) each character is a word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Characters looked at together: a few arrays of 2 MB each.
CHARS = 1 << 18
GAP, MARK, ALONE = 1, 2, np.uint32(1 << 31)
WORDS, SEQUENCES = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)  # fmt: skip


def plain(character: str, *, digits: bool = False) -> str:
    """One character in plain form: itself, another one, a space, or nothing for a diacritic. `digits`: they are kept.

    >>> [plain(c) for c in "Aé7!́"], plain("7", digits=True)
    (['a', 'e', '0', ' ', ''], '7')
    """
    for part in unicodedata.normalize("NFD", character.lower()):
        kind = unicodedata.category(part)
        if kind in ("Mn", "Me"):
            continue
        if kind == "Nd":
            return str(unicodedata.decimal(part)) if digits else "0"
        return part if kind[0] in "LMN" else " "
    return ""


def written(value: Any) -> str:
    """A value of a column as text: what is missing is empty, bytes are read as UTF-8.

    >>> written(None), written(float("nan")), written(b"two"), written(3)
    ('', '', 'two', '3')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None or value != value else str(value)


def mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers whose every output bit depends on every input bit (the finaliser of splitmix64)."""
    z = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Powers:
    """Hashes of runs of numbers: sum_k x_{start+k} base^k modulo 2^64, for many runs of one array at once."""

    def __init__(self, base: int) -> None:
        self.base, self.inverse = base, pow(base, -1, 1 << 64)
        self._up = self._down = np.ones(1, dtype=np.uint64)

    def runs(self, values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """One hash for each run; 0 for an empty one. A run's hash does not depend on where it stands."""
        if len(self._up) < len(values) + 1:
            steps = np.ones(2 * len(values) + 1, dtype=np.uint64)
            steps[1:] = self.base
            self._up = np.multiply.accumulate(steps)
            steps[1:] = self.inverse
            self._down = np.multiply.accumulate(steps)
        sums = np.zeros(len(values) + 1, dtype=np.uint64)
        np.cumsum(values * self._up[: len(values)], out=sums[1:])
        return (sums[stops] - sums[starts]) * self._down[starts]


class Reader:
    """Texts to hashes of their words. What it learns of characters is kept from call to call."""

    def __init__(self, *, digits: bool = False) -> None:
        self.digits = digits
        self._plain = np.zeros(0x110000, dtype=np.uint32)  # pages that no text touches take no memory
        self._powers = Powers(WORDS)

    def words(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """A 64-bit hash for each word `[w]`, and where each text's words begin and end, `[n + 1]`."""
        found = [self._words(part) for part in _parts(texts)]
        hashes = np.concatenate([h for h, _ in found]) if found else np.zeros(0, dtype=np.uint64)
        counts = np.concatenate([c for _, c in found]) if found else np.zeros(0, dtype=np.int64)
        return hashes, offsets(counts)

    def _words(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # A line break after every text, and one before the first: no word reaches over an end.
        raw = "\n".join(["", *texts, ""]).encode("utf-32-le", "surrogatepass")
        codes = self._codes(np.frombuffer(raw, dtype=np.uint32))
        ends = np.cumsum([1, *(len(t) + 1 for t in texts)])
        marks = codes == MARK
        if marks.any():
            ends -= np.cumsum(marks)[ends - 1]
            codes = codes[~marks]
        inside, alone = codes != GAP, codes >= ALONE
        border = alone[1:] | alone[:-1]
        starts = np.flatnonzero(inside[1:] & (~inside[:-1] | border)) + 1
        stops = np.flatnonzero(inside[:-1] & (~inside[1:] | border)) + 1
        return mixed(self._powers.runs(codes.astype(np.uint64), starts, stops)), np.diff(np.searchsorted(starts, ends))

    def _codes(self, raw: np.ndarray) -> np.ndarray:
        codes = self._plain[raw]
        new = codes == 0
        if new.any():
            for code in np.unique(raw[new]).tolist():
                part = plain(chr(code), digits=self.digits)
                held = MARK if not part else GAP if part == " " else 3 + ord(part)
                if held > MARK and any(low <= ord(part) <= high for low, high in _UNSPACED):
                    held |= int(ALONE)
                self._plain[code] = held
            codes = self._plain[raw]
        return codes


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = held = 0
    for position, text in enumerate(texts):
        if held > CHARS:
            yield texts[start:position]
            start, held = position, 0
        held += len(text)
    if start < len(texts):
        yield texts[start:]


def offsets(counts: np.ndarray) -> np.ndarray:
    """Where runs of so many begin, and the end of the last."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])


def whole(words: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A hash of each text's words in order; 0 for a text without words."""
    hashed = mixed(Powers(SEQUENCES).runs(words, ends[:-1], ends[1:]))
    return np.where(np.diff(ends) > 0, hashed, np.uint64(0))


def sequences(words: np.ndarray, ends: np.ndarray, n: int, *, short: bool) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of each run of n words of each text `[g]`, and where each text's begin and end.

    short: a text of fewer words has one sequence, of all its words; otherwise none. A text without words has none.
    """
    counts = np.diff(ends)
    room = max(0, len(words) - n + 1)
    total, base = np.zeros(room, dtype=np.uint64), np.uint64(SEQUENCES)
    for k in range(n):
        total = total * base + words[k : k + room]
    total = total[np.arange(room) + n <= np.repeat(ends[1:], counts)[:room]]
    brief = (counts > 0) & (counts < n) & short
    bounds = offsets(np.where(brief, 1, np.maximum(counts - n + 1, 0)))
    out = np.empty(bounds[-1], dtype=np.uint64)
    alone = np.repeat(brief, np.diff(bounds))
    out[~alone] = mixed(total)
    if brief.any():
        out[alone] = whole(words, ends)[brief]
    return out, bounds
