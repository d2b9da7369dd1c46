"""Words: sentences that spaCy 3.8 (blank English pipeline) cuts like this, and Unicode's word boundaries by hand."""

from __future__ import annotations

import pytest

from assay.numerics.characters import Spans, Texts
from assay.numerics.tokens import sentences, tokens, words

SPACY = [
    "Mr. Smith does|n't know J. Doe|'s e|-|mail (|it|'s well|-|known|)|, does he|?",
    "(|Mrs. X|, e.g.|, 10|-|K or 610|+ in](https://a.org|/|b|) paid at 5 p.m.|!",
    "He paid $|3.50|... for 1,000 items|; see https://a.org/b-c/D or x|=|y+1|!",
    "U.S. trade rose 5|-|10|% and fell|--|say the U.K.|'s '|best|' men|.",
    "We|'re sure they said|: \"|No|!|\" I ca|n't|.",
    "print(x|) foo.bar|(|) a_b A.B.C. end|.|Next one|,|two -flag --opt ... .. wait|\u2026|ok",
]
UAX29 = [
    ("Don't pay 3.50, it's a.b_c! well-known", ["Don't", "pay", "3.50", "it's", "a.b_c", "well", "known"]),
    ("_x 1,000 end. . 'q' na\u00efve", ["1,000", "end", "q", "na\u00efve"]),
]


def cut(text: str, spans: Spans) -> list[str]:
    return [text[a:b] for a, b in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True)]


@pytest.mark.parametrize("marked", SPACY)
def test_tokens_are_those_of_spacy(marked):
    text = marked.replace("|", "")
    assert cut(text, tokens(Texts([text]))) == [t for chunk in marked.split() for t in chunk.split("|")]


@pytest.mark.parametrize("text, expected", UAX29)
def test_words_are_runs_of_letters_and_digits(text, expected):
    assert cut(text, words(Texts([text]))) == expected


def test_tokens_do_not_depend_on_neighbouring_texts():
    texts = [m.replace("|", "") for m in SPACY] + ["", "...", "'", "'s", "n't", ".", "a", "\n.", "-", "a-"]
    for cutter in (tokens, words):
        together = cutter(Texts(texts))
        assert together.counts.tolist() == [len(cutter(Texts([t])).starts) for t in texts]
        assert (together.sizes > 0).all()


def test_no_character_but_white_space_is_lost():
    texts = [m.replace("|", "") for m in SPACY]
    given = Texts(texts)
    found = tokens(given)
    assert found.total(found.sizes).tolist() == [len("".join(t.split())) for t in texts]
    assert (found.starts[1:] >= found.ends[:-1]).all()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three?", [3]), ("One (e. g. here).", [3]), ('"No!" he said. "Yes."', [3]), ("no mark", [1]),
        ("a. b\nc. d. e", [2, 3]), ("3.5 is one... still one", [1]), ("", [1]),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    given = Texts([text])
    assert sentences(given, tokens(given), given.lines).tolist() == expected
