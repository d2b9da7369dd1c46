"""Many texts side by side as one array of characters: spans of them, what they hold and their hashes, without a loop.

Hash of a span: h = mix(sum_k c_k P^k mod 2^64), c_k its code points, P odd, so that prefix sums give the hash of any
span wherever it stands; equal spans have equal hashes, and others differ but for a chance of about 2^-64 a pair.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

END = 0x10000
"""Stands after each text; real characters above it are known by what they are, not by their number."""
ALPHA, DIGIT, SPACE, UPPER, LOWER, BREAK, STOP, ALNUM = (1 << k for k in range(8))
LEAD, TRAIL, DOT, HYPHEN, JOINER, APOSTROPHE, BULLET, NEWLINE = (1 << k for k in range(8, 16))
ELLIPSIS = 0x2026
HASH, OPEN, QUOTE = (1 << k for k in range(16, 19))

BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
QUOTES = "\"'`\u2018\u2019\u201a\u201c\u201d\u201e\u00b4\u00ab\u00bb"
STRIPPED = (
    ",:;!?()[]{}<>_#*&%\u2026\u00bf\u00a1\u00a7\u2013\u2014\u00b7\u3002\uff1f\uff01\uff0c\u3001\uff1b\uff1a\uff5e\u060c\u061b\u061f\u066a\u06d4\u0964"
    + QUOTES
)  # noqa: E501
MONEY = "$\u00a3\u20ac\u00a5\u20b9"
# Unicode's property Sentence_Terminal, as ranges of code points in hexadecimal; those past ffff are left out.
STOPS = (
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17da "
    "1803 1809 1944-1945 1aa8-1aab 1b4e-1b4f 1b5a-1b5b 1b5e-1b5f 1b7d-1b7f 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 "
    "2cf9-2cfb 2e2e 2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f "
    "aaf0-aaf1 abeb fe52 fe56-fe57 ff01 ff0e ff1f ff61"
)
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 1 << 64)


def _named() -> dict[int, str]:
    """Characters by the bit that says so, where Python's own methods do not."""
    return {
        BREAK: BREAKS, LEAD: STRIPPED + MONEY + "=+", TRAIL: STRIPPED + ".", DOT: ".", HYPHEN: "-\u2013\u2014~",
        JOINER: ":<>=/", APOSTROPHE: "'\u2019", BULLET: "\u2022-", NEWLINE: "\n", HASH: "#", OPEN: "{", QUOTE: QUOTES,
    }  # fmt: skip


def _kind(character: str) -> int:
    kind = ALPHA * character.isalpha() | DIGIT * character.isdigit() | SPACE * character.isspace()
    return kind | UPPER * character.isupper() | LOWER * character.islower() | ALNUM * character.isalnum()


@functools.cache
def _table() -> np.ndarray:
    """Kinds of the code points below `END`, and of `END` itself, which is white space and ends a line."""
    table = np.fromiter((_kind(chr(c)) for c in range(END)), dtype=np.uint32, count=END)
    for bit, characters in _named().items():
        table[[ord(c) for c in characters]] |= bit
    for part in STOPS.split():
        first, _, last = part.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] |= STOP
    return np.append(table, np.uint32(SPACE | BREAK | NEWLINE))


@functools.lru_cache(maxsize=2)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """P^k and P^-k modulo 2^64, for k from 0 up to `size`."""
    power, inverse = (np.full(size + 1, base, dtype=np.uint64) for base in (BASE, INVERSE))
    power[0] = inverse[0] = 1
    return np.cumprod(power, out=power), np.cumprod(inverse, out=inverse)


@dataclass(frozen=True)
class Spans:
    """Pieces `starts[k]:ends[k]` of all characters, in order; those of text t are `offsets[t]:offsets[t+1]`."""

    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return self.ends - self.starts

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """The text of each span."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    @property
    def counts(self) -> np.ndarray:
        """Spans of each text."""
        return np.diff(self.offsets)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum over each text's spans of a whole number or a flag."""
        running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(running[self.offsets])

    def holding(self, places: np.ndarray) -> np.ndarray:
        """The last span that begins at or before each of these places, which are in order; -1 before the first."""
        bounds = np.concatenate([[0], np.searchsorted(places, self.starts), [len(places)]])
        return np.repeat(np.arange(-1, len(self.starts)), np.diff(bounds))

    def only(self, chosen: np.ndarray) -> Spans:
        """The spans whose flag is set."""
        offsets = np.concatenate([[0], np.cumsum(self.total(chosen))])
        return Spans(self.starts[chosen], self.ends[chosen], offsets)


class Texts:
    """Texts one after another, each followed by `END`. `codes` and `kinds` are by character, bits as named above."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.lengths = np.fromiter((len(t) for t in texts), dtype=np.int64, count=len(texts))
        self.ends = np.cumsum(self.lengths + 1) - 1
        self.starts = self.ends - self.lengths
        joined = "\0".join([*texts, ""]).encode("utf-32-le", "surrogatepass")
        self.codes = np.frombuffer(joined, dtype="<u4").copy()
        self.codes[self.ends] = END
        self.kinds = self._kinds()

    def _kinds(self) -> np.ndarray:
        kinds = _table().take(self.codes, mode="clip")
        high = np.flatnonzero(self.codes >= END)
        high = high[~np.isin(high, self.ends)]
        if len(high):
            found, back = np.unique(self.codes[high], return_inverse=True)
            kinds[high] = np.array([_kind(chr(c)) for c in found.tolist()], dtype=np.uint32)[back]
        return kinds

    def __len__(self) -> int:
        return len(self.lengths)

    def has(self, bits: int) -> np.ndarray:
        """Flags: the character is of one of these kinds."""
        return (self.kinds & np.uint32(bits)) != 0

    def count(self, places: np.ndarray) -> np.ndarray:
        """How many of these places, which are in order, lie in each text."""
        return np.diff(np.searchsorted(places, np.append(self.starts, len(self.codes))))

    def spans(self, starts: np.ndarray, ends: np.ndarray) -> Spans:
        offsets = np.searchsorted(starts, np.append(self.starts, len(self.codes)))
        return Spans(starts, ends, offsets)

    def runs(self, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the longest stretches of characters whose flag is set."""
        edges = np.diff(flags.view(np.int8), prepend=np.int8(0), append=np.int8(0))
        return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)

    @functools.cached_property
    def chunks(self) -> Spans:
        """What white space separates, as `str.split` has it."""
        return self.spans(*self.runs(~self.has(SPACE)))

    @functools.cached_property
    def lines(self) -> Spans:
        """What `text.split("\\n")` gives, so an empty text has one line."""
        return self._split(np.flatnonzero(self.has(NEWLINE)))

    @functools.cached_property
    def split_lines(self) -> Spans:
        """What `str.splitlines` gives, but that a line before CR LF keeps the CR, which is white space."""
        breaks = self.has(BREAK)
        breaks[:-1] &= (self.codes[:-1] != 13) | (self.codes[1:] != 10)
        lines = self._split(np.flatnonzero(breaks))
        last = lines.offsets[1:] - 1
        keep = np.ones(len(lines.starts), dtype=bool)
        keep[last[lines.starts[last] == lines.ends[last]]] = False
        return lines.only(keep)

    def _split(self, breaks: np.ndarray) -> Spans:
        starts = np.empty_like(breaks)
        starts[:1], starts[1:] = 0, breaks[:-1] + 1
        return self.spans(starts, breaks)

    @functools.cached_property
    def _solid(self) -> np.ndarray:
        """Places of what is not white space."""
        return np.flatnonzero(~self.has(SPACE))

    def stripped(self, spans: Spans) -> Spans:
        """Without white space at their ends; a blank one is empty, at its start."""
        places = np.append(self._solid, len(self.codes))
        first = np.searchsorted(self._solid, spans.starts)
        last = np.searchsorted(self._solid, spans.ends)
        some = last > first
        starts = np.where(some, places[first], spans.starts)
        ends = np.where(some, places[np.maximum(last - 1, 0)] + 1, spans.starts)
        return Spans(starts, ends, spans.offsets)

    def paragraphs(self) -> Spans:
        """The stripped text cut at two and more newlines; a blank text is one empty paragraph."""
        whole = self.stripped(Spans(self.starts, self.ends, np.arange(len(self) + 1)))
        starts, ends = self.runs(self.codes == 10)
        wide = ends - starts > 1
        starts, ends = starts[wide], ends[wide]
        owner = np.searchsorted(self.ends, starts)
        inside = (starts > whole.starts[owner]) & (ends < whole.ends[owner])
        return self.spans(
            np.sort(np.concatenate([whole.starts, ends[inside]])), np.sort(np.concatenate([whole.ends, starts[inside]]))
        )

    def united(self, spans: Spans) -> np.ndarray:
        """Kinds of all characters of each span, which must not be empty, and of the gap before the next."""
        return np.bitwise_or.reduceat(self.kinds, spans.starts) if len(spans.starts) else self.kinds[:0]

    def number(self, spans: Spans, bits: int) -> np.ndarray:
        """How many characters of one of these kinds each span has."""
        running = np.zeros(len(self.codes) + 1, dtype=np.int32)
        np.cumsum(self.has(bits), out=running[1:])
        return running[spans.ends] - running[spans.starts]

    @functools.cached_property
    def _prefix(self) -> tuple[np.ndarray, np.ndarray]:
        """Running sums of c_k P^k, from 0, and P^-k."""
        size = len(self.codes)
        power, inverse = _powers(1 << size.bit_length())
        sums = np.zeros(size + 1, dtype=np.uint64)
        np.cumsum((self.codes + np.uint64(1)) * power[:size], out=sums[1:])
        return sums, inverse

    def hashes(self, spans: Spans) -> np.ndarray:
        """A 64-bit number for each span: that of its characters, wherever it stands."""
        sums, inverse = self._prefix
        return mix((sums[spans.ends] - sums[spans.starts]) * inverse[spans.starts])


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
