"""Words of texts, in two readings, by the kinds of neighbouring characters alone.

`tokens` comes near spaCy's rules for English, which datatrove uses: chunks between white space, without the marks at
their ends, each of which is a token of its own, cut at marks between letters and before the endings n't and 's.
`words` comes near the word boundaries of Unicode (UAX 29), which DCLM uses, less what does not begin with a letter or
a digit.
"""

from __future__ import annotations

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

_ENDINGS = ("s", "S", "m", "d", "re", "ve", "ll")


def shifted(flags: np.ndarray, by: int) -> np.ndarray:
    """Flags of the character `by` places further on (negative: before); false past the ends."""
    moved = np.zeros_like(flags)
    if by > 0:
        moved[:-by] = flags[by:]
    else:
        moved[-by:] = flags[:by]
    return moved


def _inside(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """All places of these stretches, and the one after each."""
    sizes = ends - starts + 1
    base = np.repeat(starts - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) if len(sizes) else starts
    return base + np.arange(int(sizes.sum()))


def tokens(texts: Texts) -> Spans:
    """Words and marks, as spaCy's blank English pipeline cuts them in all but its lists of exceptions."""
    if not len(texts.codes):
        return texts.chunks
    space, dot = texts.has(SPACE), texts.has(DOT)
    double = dot & (shifted(dot, 1) | shifted(dot, -1))
    begins = np.zeros(len(texts.codes) + 1, dtype=bool)
    edges = _lead(texts, space, double), _trail(texts, space, double)
    for starts, ends in edges:
        begins[_inside(starts, ends)] = True
    free = ~space
    for starts, ends in edges:
        free[_inside(starts, ends - 1)] = False
    _infix(texts, free, double, begins)
    _contractions(texts, free, begins)
    begins = begins[:-1]
    # Two and more full stops are one token; a token never begins at white space.
    begins &= ~(double & shifted(dot, -1))
    begins |= ~space & shifted(space, -1)
    begins[0] |= not space[0]
    begins &= ~space
    starts = np.flatnonzero(begins)
    # A token ends where the next begins, or at white space.
    ends = np.flatnonzero((begins | space) & ~shifted(space, -1))
    ends = ends[ends > starts[0]] if len(starts) else ends[:0]
    return texts.spans(starts, ends)


def _lead(texts: Texts, space: np.ndarray, double: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marks with which a chunk begins."""
    starts, ends = texts.runs(texts.has(LEAD) | double)
    first = (starts == 0) | space[np.maximum(starts - 1, 0)]
    return starts[first], ends[first]


def _trail(texts: Texts, space: np.ndarray, double: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marks with which a chunk ends. A single full stop stays with a single capital: 'J.' and 'U.S.'."""
    starts, ends = texts.runs(texts.has(TRAIL))
    last = space[ends]  # there is always one more: END
    starts, ends = starts[last], ends[last]
    upper = texts.has(UPPER)
    before = np.maximum(starts - 1, 0)
    initial = (
        texts.has(DOT)[starts] & ~double[starts] & upper[before] & ~upper[np.maximum(starts - 2, 0)] & (starts > 0)
    )
    starts = starts + initial
    some = starts < ends
    return starts[some], ends[some]


def _infix(texts: Texts, free: np.ndarray, double: np.ndarray, begins: np.ndarray) -> None:
    """Marks between letters or digits inside a chunk are tokens of their own; addresses are left whole."""
    before = {bit: shifted(texts.has(bit), -1) for bit in (ALPHA, ALNUM, DIGIT, LOWER | QUOTE)}
    after = {bit: shifted(texts.has(bit), 1) for bit in (ALPHA, DIGIT, UPPER | QUOTE)}
    codes = texts.codes
    cut = texts.has(DOT) & before[LOWER | QUOTE] & after[UPPER | QUOTE]
    cut |= (codes == 44) & before[ALPHA] & after[ALPHA]
    cut |= texts.has(JOINER) & before[ALNUM] & after[ALPHA]
    minus = codes == 45
    cut |= (minus | (codes == 43) | (codes == 42) | (codes == 94)) & before[DIGIT] & (after[DIGIT] | shifted(minus, 1))
    cut |= double | (codes == ELLIPSIS)
    places = np.flatnonzero(cut & free)
    starts, ends = texts.runs(texts.has(HYPHEN) & free)
    alpha = texts.has(ALPHA)
    joined = (starts > 0) & alpha[np.maximum(starts - 1, 0)] & alpha[ends] & (ends - starts < 4)
    marks = [places, places + 1, starts[joined], ends[joined]]
    addresses = np.flatnonzero((codes == 47) & shifted(codes == 47, -1) & shifted(codes == 58, -2) & free)
    for mark in marks:
        if len(addresses):
            chunks = texts.chunks
            whole = np.unique(np.searchsorted(chunks.starts, addresses, side="right") - 1)
            mark = mark[~np.isin(np.searchsorted(chunks.starts, mark, side="right") - 1, whole)]
        begins[mark] = True


def _contractions(texts: Texts, free: np.ndarray, begins: np.ndarray) -> None:
    """Cuts do|n't, it|'s, we|'re: before the ending of a chunk's inner part."""
    codes, alpha = texts.codes, texts.has(ALPHA)
    places = np.flatnonzero(texts.has(APOSTROPHE) & free & ~shifted(texts.has(SPACE), -1))
    places = places[places + 3 < len(codes)]
    for ending in ("t", *_ENDINGS):
        stop = places + 1 + len(ending)
        here = ~free[stop] & free[places + 1]
        for k, character in enumerate(ending):
            here &= codes[places + 1 + k] == ord(character)
        if ending not in "sS":
            here &= alpha[places - 1]
        if ending == "t":
            here &= (codes[places - 1] == ord("n")) & alpha[places - 2]
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
    word = texts.any(marks, ALNUM)
    chosen = np.flatnonzero(stop | word)
    place = marks.starts[chosen]
    line = np.searchsorted(lines.starts, place, side="right") - 1
    new = stop[chosen][:-1] & word[chosen][1:] & (line[:-1] == line[1:])
    return 1 + np.bincount(line[1:][new], minlength=len(lines.starts))
