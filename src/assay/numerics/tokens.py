"""Words of texts, in two readings, by the kinds of neighbouring characters alone.

`tokens` comes near spaCy's rules for English, which datatrove uses: chunks between white space, without the marks at
their ends, each of which is a token of its own, cut at marks between letters and before the endings n't and 's.
`words` comes near the word boundaries of Unicode (UAX 29), which DCLM uses, less what does not begin with a letter or
a digit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from assay.numerics.characters import (
    ALNUM,
    ALPHA,
    APOSTROPHE,
    DIGIT,
    DOT,
    ELLIPSIS,
    HYPHEN,
    JOINER,
    LEAD,
    LOWER,
    QUOTE,
    SPACE,
    STOP,
    TRAIL,
    UPPER,
    Spans,
    Texts,
)  # fmt: skip

# What spaCy keeps a full stop with.
ABBREVIATIONS = (
    "Mr Mrs Ms Dr Prof St Jr Inc Corp Co co Ltd Gen Gov Rep Rev Sen vs e.g E.g i.e I.e a.m p.m Ph.D D.C Bros Messrs Mo "
    "Md Mont Adm Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Ala Ariz Ark Calif Colo Conn Del Fla Ga Ia Id Ill "
    "Ind Kan Kans Ky La Mass Mich Minn Miss N.C N.D N.H N.J N.M N.Y Neb Nebr Nev Okla Ore Pa S.C Tenn Va Wash Wis"
)
_ENDINGS = ("s", "S", "m", "d", "re", "ve", "ll")


def shifted(flags: np.ndarray, by: int) -> np.ndarray:
    """Flags of the character `by` places further on (negative: before); false past the ends."""
    moved = np.zeros_like(flags)
    if by > 0:
        moved[:-by] = flags[by:]
    else:
        moved[-by:] = flags[:by]
    return moved


@dataclass
class _Marks:
    """What is neither a letter nor a digit nor white space: places, and the kinds there, before and after."""

    places: np.ndarray
    here: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @classmethod
    def of(cls, texts: Texts) -> _Marks:
        places = np.flatnonzero(~texts.has(SPACE | ALNUM))
        # Before the first character is the last one, END, which is white space as it should be.
        return cls(places, texts.kinds[places], texts.kinds[places - 1], texts.kinds[places + 1])

    def only(self, chosen: np.ndarray) -> _Marks:
        return _Marks(self.places[chosen], self.here[chosen], self.before[chosen], self.after[chosen])

    @property
    def double(self) -> np.ndarray:
        """Flags: one of two and more full stops."""
        return (self.here & (self.before | self.after) & DOT) != 0

    def runs(self, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First and last marks of stretches of neighbours with the flag, and the stretch of each mark."""
        joined = np.zeros(len(flags), dtype=bool)
        joined[1:] = flags[1:] & flags[:-1] & (np.diff(self.places) == 1)
        first = np.flatnonzero(flags & ~joined)
        last = np.flatnonzero(flags & ~np.append(joined[1:], False))
        return first, last, np.cumsum(flags & ~joined) - 1


def tokens(texts: Texts) -> Spans:
    """Words and marks, as spaCy's blank English pipeline cuts them in all but its lists of exceptions."""
    if not len(texts.codes):
        return texts.chunks
    marks, space = _Marks.of(texts), texts.has(SPACE)
    begins = np.zeros(len(texts.codes) + 1, dtype=bool)
    lead = _lead(marks)
    edge = lead | _trail(texts, marks, marks.places[lead])
    places = marks.places[edge]
    begins[places] = begins[places + 1] = True
    begins[_infix(texts, marks.only(~edge))] = True
    over = space.copy()
    over[places] = True
    _contractions(texts, marks.only(~edge), over, begins)
    # Two and more full stops are one token; a token never begins at white space.
    begins[marks.places[marks.double & ((marks.before & DOT) != 0)]] = False
    begins = begins[:-1]
    edges = shifted(space, -1)
    edges[0] = True
    begins |= edges
    begins &= ~space
    # A token ends where the next begins, or at white space.
    return texts.spans(np.flatnonzero(begins), np.flatnonzero((begins | space) & ~edges))


def _lead(marks: _Marks) -> np.ndarray:
    """Flags of the marks with which a chunk begins."""
    flags = ((marks.here & LEAD) != 0) | marks.double
    first, _, run = marks.runs(flags)
    chosen = (marks.before[first] & SPACE) != 0
    return flags & chosen[run] if len(chosen) else flags


def _trail(texts: Texts, marks: _Marks, lead: np.ndarray) -> np.ndarray:
    """Flags of the marks with which a chunk ends; `lead`: places of those with which one begins.

    A single full stop stays with a single capital ('J.', 'U.S.') and with an abbreviation.
    """
    plus = (texts.codes[marks.places] == ord("+")) & (marks.before & DIGIT != 0)
    flags = (marks.here & TRAIL != 0) | plus
    first, last, run = marks.runs(flags)
    if not len(first):
        return flags
    chosen = (marks.after[last] & SPACE) != 0
    found = flags & chosen[run]
    first = first[chosen & (marks.here[first] & DOT != 0) & ~marks.double[first]]
    stops = marks.places[first]
    initial = (marks.before[first] & UPPER != 0) & (texts.kinds[stops - 2] & UPPER == 0)
    starts = texts.chunks.starts[texts.chunks.holding(stops)]
    starts = starts + np.searchsorted(lead, stops) - np.searchsorted(lead, starts)
    found[first[initial | np.isin(_packed(texts.codes, starts, stops), _abbreviations())]] = False
    return found


def _packed(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Spans of at most eight characters as numbers, 0 for longer ones and for such as have one above 255."""
    packed, fits = np.zeros(len(starts), dtype=np.uint64), ends - starts <= 8
    for k in range(8):
        code = np.where(starts + k < ends, codes[np.minimum(starts + k, ends)], 0)
        packed |= code.astype(np.uint64) << np.uint64(8 * k)
        fits &= code < 256
    return np.where(fits, packed, np.uint64(0))


@functools.cache
def _abbreviations() -> np.ndarray:
    words = ABBREVIATIONS.split()
    return np.array([int.from_bytes(w.encode("latin-1"), "little") for w in words], dtype=np.uint64)


def _infix(texts: Texts, marks: _Marks) -> np.ndarray:
    """Where tokens begin at and after marks between letters or digits; addresses are left whole."""

    def between(before: int, after: int) -> np.ndarray:
        return (marks.before & before != 0) & (marks.after & after != 0)

    code, places = texts.codes[marks.places], marks.places
    cut = (marks.here & DOT != 0) & between(LOWER | QUOTE, UPPER | QUOTE)
    cut |= (code == ord(",")) & between(ALPHA, ALPHA)
    cut |= (marks.here & JOINER != 0) & between(ALNUM, ALPHA)
    minus = texts.codes[places + 1] == ord("-")
    cut |= np.isin(code, [ord(c) for c in "+-*^"]) & (marks.before & DIGIT != 0) & ((marks.after & DIGIT != 0) | minus)
    cut |= marks.double | (code == ELLIPSIS)
    # Up to three hyphens between letters are one token.
    first, last, _ = marks.runs(marks.here & HYPHEN != 0)
    joined = (marks.before[first] & ALNUM != 0) & (marks.after[last] & ALPHA != 0) & (last - first < 3)
    slashes = places[(code == ord("/")) & (texts.codes[places - 1] == ord("/")) & (texts.codes[places - 2] == ord(":"))]
    # An address is a chunk that has no mark before its ://
    within = texts.chunks.holding(slashes)
    fresh = np.searchsorted(places, texts.chunks.starts[within]) == np.searchsorted(places, slashes - 2)
    whole = np.unique(within[fresh])
    outside = ~np.isin(texts.chunks.holding(places), whole) if len(whole) else np.ones(len(places), dtype=bool)
    first, last, cut = first[joined & outside[first]], last[joined & outside[first]], places[cut & outside]
    return np.concatenate([cut, cut + 1, places[first], places[last] + 1])


def _contractions(texts: Texts, marks: _Marks, edge: np.ndarray, begins: np.ndarray) -> None:
    """Cuts do|n't, it|'s, we|'re: before the ending of a chunk's inner part. `edge`: a chunk's inner part is over."""
    codes, kinds = texts.codes, texts.kinds
    inner = (marks.here & APOSTROPHE != 0) & (marks.before & SPACE == 0) & (marks.places + 3 < len(codes))
    places = marks.places[inner]
    for ending in ("t", *_ENDINGS):
        here = edge[places + 1 + len(ending)]
        for k, character in enumerate(ending):
            here &= codes[places + 1 + k] == ord(character)
        if ending not in "sS":
            here &= kinds[places - 1] & ALPHA != 0
        if ending == "t":
            here &= (codes[places - 1] == ord("n")) & (kinds[places - 2] & ALPHA != 0)
            begins[places[here] - 1] = True
        else:
            begins[places[here]] = True


def words(texts: Texts) -> Spans:
    """Runs of letters, digits and underscores, which marks inside them join: 'don't', '3.5', 'a.b'."""
    if not len(texts.codes):
        return texts.chunks
    codes, alpha, digit = texts.codes, texts.has(ALPHA), texts.has(DIGIT)
    solid = texts.has(ALNUM) | (codes == 95)
    middle = texts.has(APOSTROPHE) | (codes == 46) | (codes == 58)
    both = (codes == 46) | (codes == 44) | (codes == 59) | (codes == 39)
    joins = (middle & shifted(alpha, -1) & shifted(alpha, 1)) | (both & shifted(digit, -1) & shifted(digit, 1))
    found = texts.spans(*texts.runs(solid | joins))
    return found.only(texts.has(ALNUM)[found.starts])


def sentences(texts: Texts, marks: Spans, lines: Spans) -> np.ndarray:
    """Sentences in each line by its tokens: one, and one more wherever a word follows a token that ends a sentence."""
    stop = (marks.sizes == 1) & texts.has(STOP)[marks.starts] if len(marks.starts) else np.zeros(0, dtype=bool)
    word = texts.united(marks) & ALNUM != 0
    chosen = np.flatnonzero(stop | word)
    place = marks.starts[chosen]
    line = lines.holding(place)
    new = stop[chosen][:-1] & word[chosen][1:] & (line[:-1] == line[1:])
    return 1 + np.bincount(line[1:][new], minlength=len(lines.starts))
