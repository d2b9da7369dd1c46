"""Spans, kinds and hashes of characters against Python's own methods of strings."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from assay.numerics.characters import (
    ALNUM,
    ALPHA,
    DIGIT,
    LOWER,
    SPACE,
    UPPER,
    Spans,
    Texts,
)  # fmt: skip

ALPHABET = "aB3 \n\n\t.é中\u00a0\u2028\r\x0b\x00\U0001d400\U0001f600\U00010000'"


def strange(count: int = 200, longest: int = 40) -> list[str]:
    rng = random.Random(0)
    return ["", "\n", " ", "\r\n", *("".join(rng.choices(ALPHABET, k=rng.randrange(longest))) for _ in range(count))]


def strings(texts: list[str], spans: Spans) -> list[list[str]]:
    """The spans of each text as strings, by slicing the joined text."""
    joined = "\0".join([*texts, ""])
    cut = [joined[a:b] for a, b in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True)]
    return [cut[a:b] for a, b in zip(spans.offsets[:-1].tolist(), spans.offsets[1:].tolist(), strict=True)]


@pytest.mark.parametrize("bit, method", [(ALPHA, "isalpha"), (DIGIT, "isdigit"), (SPACE, "isspace"), (UPPER, "isupper"),
                                         (LOWER, "islower"), (ALNUM, "isalnum")])  # fmt: skip
def test_kinds_are_those_of_python(bit, method):
    texts = strange()
    given = Texts(texts)
    flags = given.has(bit)
    for k, text in enumerate(texts):
        assert flags[given.starts[k] : given.ends[k]].tolist() == [getattr(c, method)() for c in text]


def test_chunks_lines_and_paragraphs_are_those_of_python():
    texts = strange()
    given = Texts(texts)
    assert strings(texts, given.chunks) == [t.split() for t in texts]
    assert strings(texts, given.lines) == [t.split("\n") for t in texts]
    plain = [[line.strip() for line in t.splitlines()] for t in texts]
    assert strings(texts, given.stripped(given.split_lines)) == plain
    assert strings(texts, given.paragraphs()) == [re.split("\n{2,}", t.strip()) for t in texts]


def test_stripped_and_numbers_of_kinds():
    texts = strange()
    given = Texts(texts)
    lines = given.lines
    cut = [x for t in texts for x in t.split("\n")]
    inner = given.stripped(lines)
    assert [x for part in strings(texts, inner) for x in part] == [x.strip() for x in cut]
    assert given.number(lines, UPPER).tolist() == [sum(c.isupper() for c in x) for x in cut]
    assert lines.total(given.number(lines, ALPHA) > 0).tolist() == [
        sum(any(c.isalpha() for c in x) for x in t.split("\n")) for t in texts
    ]


def test_equal_spans_have_equal_hashes_wherever_they_stand_and_others_do_not():
    texts = strange(400)
    given = Texts(texts)
    found: dict[str, set[int]] = {}
    for spans in (given.chunks, given.lines):
        flat = [x for part in strings(texts, spans) for x in part]
        for text, value in zip(flat, given.hashes(spans).tolist(), strict=True):
            found.setdefault(text, set()).add(value)
    assert all(len(values) == 1 for values in found.values())
    assert len({value for (value,) in found.values()}) == len(found) > 500


def test_no_texts_and_lone_surrogates():
    empty = Texts([])
    assert len(empty) == 0 and len(empty.chunks.starts) == len(empty.lines.starts) == 0
    odd = Texts(["a\ud800 b"])
    assert odd.chunks.sizes.tolist() == [2, 1]


def test_only_keeps_the_offsets_right():
    given = Texts(["a bb ccc", "", "dd e"])
    kept = given.chunks.only(given.chunks.sizes > 1)
    assert kept.counts.tolist() == [2, 0, 1] and kept.sizes.tolist() == [2, 3, 2]
    assert kept.owners.tolist() == [0, 0, 2] and kept.total(np.array([1, 10, 100])).tolist() == [11, 0, 100]


def test_united_kinds_and_the_span_that_holds_a_place():
    given = Texts(["a1 .. B", "", "\u00e9\n7"])
    kinds = given.united(given.chunks)
    assert [(k & ALPHA != 0, k & DIGIT != 0, k & UPPER != 0) for k in kinds.tolist()] == [
        (True, True, False), (False, False, False), (True, False, True), (True, False, False), (False, True, False),
    ]  # fmt: skip
    lines = given.lines
    assert lines.holding(np.array([0, 6, 8, 9, 11])).tolist() == [0, 0, 1, 2, 3]
    assert given.chunks.only(np.arange(5) > 0).holding(np.array([0, 2, 3])).tolist() == [-1, -1, 0]
