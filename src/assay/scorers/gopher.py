"""Rules of Gopher: quality and repetition."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.method import Batch, Bounds, Scorer
from assay.numerics import repeats
from assay.numerics.bounds import ratio, scored
from assay.numerics.characters import ALNUM, ALPHA, BULLET, DOT, ELLIPSIS, HASH, Spans, Texts
from assay.numerics.tokens import tokens, words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = [0x25CF, 0x2022, 0x2A, 0x2D]
TOP, COPIED = (2, 3, 4), (5, 6, 7, 8, 9, 10)
REPETITION: Bounds = {
    "dup_lines": (None, 0.3), "dup_paragraphs": (None, 0.3), "dup_line_chars": (None, 0.2),
    "dup_paragraph_chars": (None, 0.2), "top_2": (None, 0.2), "top_3": (None, 0.18), "top_4": (None, 0.16),
    "dup_5": (None, 0.15), "dup_6": (None, 0.14), "dup_7": (None, 0.13), "dup_8": (None, 0.12), "dup_9": (None, 0.11),
    "dup_10": (None, 0.1),
}  # fmt: skip
SYMBOLS: Mapping[str, Bounds] = {
    "datatrove": {"hashes": (None, 0.1), "ellipses": (None, 0.1)},
    "dclm": {"symbols": (None, 0.1)},
}


class Gopher(Scorer):
    """Gopher's rules of quality and repetition: minus the number broken, and each statistic as a column.

    Formula: score = -#{columns outside their bounds}; words, word_length = their mean characters, hashes, ellipses
        (dclm: symbols, their sum) = marks / words, bullet_lines, ellipsis_lines, alpha_words = shares, stop_words;
        dup_lines, dup_paragraphs = share that are copies, dup_line_chars, dup_paragraph_chars = share of characters
        in them; top_n = characters in the copies of the most frequent run of n words, dup_n = in repeated runs of n
        words, as shares
    Reference: Rae et al. 2021, arXiv:2112.11446, app. A; styles as datatrove (Penedo et al. 2024, arXiv:2406.17557) and
        DCLM (Li et al. 2024, arXiv:2406.11794) read it
    Note: style = 'datatrove': words as spaCy cuts them, marks included in shares; copies after the first count, over
        all characters; distinct stop words in lower case. style = 'dclm': quality on what white space separates,
        repetition on words of letters and digits; every copy counts, over the characters of the units; all stop words
        in any case. Presets quality and repetition are the halves
    """

    style: Literal["datatrove", "dclm"] = "datatrove"

    unit: ClassVar[str] = "minus rules broken"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        quality: Bounds = {
            "words": (50, 100_000), "word_length": (3, 10), **SYMBOLS[self.style], "bullet_lines": (None, 0.9),
            "ellipsis_lines": (None, 0.3), "alpha_words": (0.8, None), "stop_words": (2, None),
        }  # fmt: skip
        return {"gopher": {**quality, **REPETITION}, "quality": quality, "repetition": REPETITION}

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("score", *self.presets["gopher"])

    def score(self, state: Any, batch: Batch) -> Any:
        given = batch.column("text")
        texts = Texts(given)
        found = _datatrove(texts) if self.style == "datatrove" else _dclm(texts, given)
        return scored({name: found[name] for name in self.presets["gopher"]}, self.presets["gopher"])


def ellipses(texts: Texts) -> np.ndarray:
    """Ellipses in each text: the character, and three full stops in a row, as `str.count` counts them."""
    starts, ends = texts.runs(texts.has(DOT))
    dots = texts.spans(starts, ends)
    return dots.total((ends - starts) // 3) + texts.count(np.flatnonzero(texts.codes == ELLIPSIS))


def trailing(texts: Texts, lines: Spans) -> np.ndarray:
    """Flags: a stripped line ends with an ellipsis."""
    dot, last = texts.has(DOT), np.maximum(lines.ends - 1, 0)
    three = dot[last] & dot[np.maximum(last - 1, 0)] & dot[np.maximum(last - 2, 0)] & (lines.sizes >= 3)
    return three | ((texts.codes[last] == ELLIPSIS) & (lines.sizes > 0))


@functools.cache
def _wanted() -> np.ndarray:
    texts = Texts(STOP_WORDS)
    return texts.hashes(texts.chunks)


def stop_words(units: Spans, hashes: np.ndarray, *, distinct: bool) -> np.ndarray:
    """How many stop words each text has, or how many different ones."""
    counts = np.zeros(len(units.counts), dtype=np.int64)
    for word in _wanted():
        here = units.total(hashes == word)
        counts += np.minimum(here, 1) if distinct else here
    return counts


def repetition(
    units: Spans, hashes: np.ndarray, whole: np.ndarray, style: Literal["datatrove", "dclm"]
) -> dict[str, np.ndarray]:
    """top_n and dup_n, of the characters `whole`."""
    longest, found = style == "dclm", {}
    for run in repeats.grams(units, hashes, (*TOP, *COPIED)):
        if run.n in TOP:
            found[f"top_{run.n}"] = ratio(repeats.top(units, run, longest=longest), whole)
        else:
            count = repeats.covered if style == "dclm" else repeats.stepped
            found[f"dup_{run.n}"] = ratio(count(units, run), whole)
    return found


def _datatrove(texts: Texts) -> dict[str, np.ndarray]:
    units = tokens(texts)
    number = units.counts
    hashes, kinds = texts.hashes(units), texts.united(units)
    named = kinds & ALNUM != 0
    lines = texts.split_lines
    inner = texts.stripped(lines)
    bullet = texts.has(BULLET)[inner.starts] & (inner.sizes > 0)
    filled = texts.lines.only(texts.lines.sizes > 0)
    line_copies, line_characters = repeats.copies(filled, texts.hashes(filled), every=False)
    # Cutting at newlines leaves an empty line before a first and after a last newline, and two of them are copies.
    before = (texts.codes[texts.starts] == 10) & (texts.lengths > 0)
    after = (texts.codes[np.maximum(texts.ends - 1, 0)] == 10) & (texts.lengths > 0)
    paragraphs = texts.paragraphs()
    copies, characters = repeats.copies(paragraphs, texts.hashes(paragraphs), every=False)
    count = units.total(named)
    return {
        "words": count.astype(np.float64),
        "word_length": ratio(units.total(np.where(named, units.sizes, 0)), count),
        "hashes": ratio(texts.count(np.flatnonzero(texts.has(HASH))), number),
        "ellipses": ratio(ellipses(texts), number),
        "bullet_lines": ratio(lines.total(bullet), lines.counts),
        "ellipsis_lines": ratio(lines.total(trailing(texts, inner)), lines.counts),
        "alpha_words": ratio(units.total(kinds & ALPHA != 0), number),
        "stop_words": stop_words(units, hashes, distinct=True).astype(np.float64),
        "dup_lines": ratio(line_copies + (before & after), filled.counts + before + after),
        "dup_paragraphs": ratio(copies, paragraphs.counts),
        "dup_line_chars": ratio(line_characters, texts.lengths),
        "dup_paragraph_chars": ratio(characters, texts.lengths),
        **repetition(units, hashes, texts.lengths, "datatrove"),
    }


def _dclm(texts: Texts, given: list[str]) -> dict[str, np.ndarray]:
    units, chunks = words(texts), texts.chunks
    spaced = np.array([t.count(". . .") for t in given], dtype=np.int64)
    symbols = texts.count(np.flatnonzero(texts.has(HASH))) + ellipses(texts) + spaced
    lines = _filled(texts, texts.lines)
    last = texts.codes[np.maximum(lines.ends[:, None] - np.arange(1, 6), 0)]
    apart = (last == np.array([46, 32, 46, 32, 46])).all(axis=1) & (lines.sizes >= 5)
    folded = Texts([t.lower() for t in given])
    paragraphs = _filled(texts, texts.paragraphs())
    found = {
        "words": units.counts.astype(np.float64),
        "word_length": ratio(chunks.total(chunks.sizes), chunks.counts),
        "symbols": ratio(symbols, chunks.counts),
        "bullet_lines": ratio(lines.total(np.isin(texts.codes[lines.starts], BULLETS)), lines.counts),
        "ellipsis_lines": ratio(lines.total(trailing(texts, lines) | apart), lines.counts),
        "alpha_words": ratio(chunks.total(texts.united(chunks) & ALPHA != 0), chunks.counts),
        "stop_words": stop_words(folded.chunks, folded.hashes(folded.chunks), distinct=False).astype(np.float64),
        **repetition(units, texts.hashes(units), units.total(units.sizes), "dclm"),
    }
    for name, spans in (("line", lines), ("paragraph", paragraphs)):
        copies, characters = repeats.copies(spans, texts.hashes(spans), every=True)
        found[f"dup_{name}s"] = ratio(copies, spans.counts)
        found[f"dup_{name}_chars"] = ratio(characters, spans.total(spans.sizes))
    return found


def _filled(texts: Texts, spans: Spans) -> Spans:
    """Stripped, without the blank ones."""
    inner = texts.stripped(spans)
    return inner.only(inner.sizes > 0)
