"""The contamination gate: a planted copy is found however it is dressed, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest

from assay.core.pool import Pool
from assay.core.target import Target
from assay.data.gate import Hits, contamination, sequences, words

WORDS = (
    "river stone window garden letter music winter bridge market silver paper forest engine island candle teacher "
    "shadow copper violin harbour meadow lantern orchard pepper saddle thunder velvet walnut zephyr anchor basket"
).split()


def sentence(rng: np.random.Generator, n: int) -> str:
    return " ".join(rng.choice(WORDS, n).tolist())


def target(texts: list[str]) -> Target:
    pool = Pool.from_columns({"id": [f"t{i}" for i in range(len(texts))], "text": texts})
    half = len(texts) // 2
    return Target("target", pool.at(slice(0, half)), pool.at(slice(half, None)))


def found(texts: list[str], items: list[str]) -> list[int]:
    """Positions of the pool's texts that hit."""
    pool = Pool.from_columns({"id": [f"{i:03}" for i in range(len(texts))], "text": texts})
    return [int(i) for i in contamination(pool, target(items)).ids.tolist()]


@pytest.fixture
def items() -> list[str]:
    rng = np.random.default_rng(0)
    return [sentence(rng, 25) for _ in range(8)]


@pytest.fixture
def clean() -> list[str]:
    rng = np.random.default_rng(1)
    return [sentence(rng, int(rng.integers(3, 80))) for _ in range(300)]


DRESSED = {
    "verbatim": lambda t: t,
    "upper case": str.upper,
    "title case": str.title,
    "punctuation": lambda t: "“" + ", ".join(t.split()) + "!”",
    "white space": lambda t: "\n\n".join(t.split(" ")) + "\t",
    "markup": lambda t: "**" + t.replace(" ", "** / **") + "**",
    "wide letters": lambda t: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in t),
    "inside a longer text": lambda t: "something before it " * 9 + t + " and after it" * 7,
    "the first 13 words": lambda t: " ".join(t.split()[:13]),
    "13 words from the middle": lambda t: "but " + " ".join(t.split()[6:19]) + " however",
}


@pytest.mark.parametrize("dress", DRESSED.values(), ids=DRESSED)
def test_a_planted_item_is_always_found(items: list[str], clean: list[str], dress) -> None:  # noqa: ANN001
    texts = [*clean, *(dress(item) for item in items)]
    assert found(texts, items) == list(range(len(clean), len(texts)))


def test_no_false_hits(items: list[str], clean: list[str]) -> None:
    assert found(clean, items) == []


def test_twelve_words_or_a_paraphrase_are_not_found(items: list[str]) -> None:
    rng = np.random.default_rng(2)
    paraphrases = []
    for item in items:
        split = item.split()
        for i in range(int(rng.integers(0, 12)), len(split), 12):
            split[i] = "otherwise"
        paraphrases.append(" ".join(split))
    swapped = [" ".join(w for pair in zip(i.split()[1::2], i.split()[::2], strict=False) for w in pair) for i in items]
    assert found([*paraphrases, *swapped, *(" ".join(i.split()[3:15]) for i in items)], items) == []


def test_short_items_are_looked_for_whole() -> None:
    items = ["What is the boiling point of lead?", "Who wrote it down?", "one two three four five", "too short to tell"]
    texts = [
        "Quiz: WHAT IS THE BOILING POINT OF LEAD - and of tin?",
        "what is the boiling point of tin",
        "one two three four, five",
        "five four three two one",
        "this is too short to tell from chance; who wrote it down?",
    ]
    assert found(texts, items) == [0, 2]


def test_a_pool_text_shorter_than_the_item_is_no_hit() -> None:
    assert found(["the first five words here", ""], ["the first five words here and then some more", "a b c d e"]) == []


def test_halves_items_and_examples_are_reported() -> None:
    rng = np.random.default_rng(3)
    items = [sentence(rng, 20) for _ in range(6)]
    pool = Pool.from_columns({"id": list("abcd"), "text": [items[0], "nothing", items[4] + " more", items[5]]})
    hits = contamination(pool, target(items), examples=2)
    assert hits.ids.tolist() == [b"a", b"c", b"d"] and hits.items == 6
    assert hits.by_half == {"selecting": 1, "judging": 2}
    assert [(e["pool_id"], e["target_id"]) for e in hits.examples] == [("a", "t0"), ("c", "t4")]


def test_no_text_no_hits() -> None:
    pool = Pool.from_columns({"pixels": [[0.0], [1.0]], "label": [0, 1]})
    hits = contamination(pool, Target("t", pool, pool))
    assert isinstance(hits, Hits) and len(hits.ids) == 0


def test_an_empty_pool_has_no_hits(items: list[str]) -> None:
    assert found([], items) == []


def test_the_longer_run_may_be_chosen(items: list[str]) -> None:
    pool = Pool.from_columns({"text": [" ".join(items[0].split()[:8])]})
    assert len(contamination(pool, target(items), n=8).ids) == 1
    assert len(contamination(pool, target(items), n=9).ids) == 0


def test_words_and_their_hashes() -> None:
    assert words("It's THE ﬁrst—x_1, 2½ times") == ["it", "s", "the", "first", "x_1", "21", "2", "times"]
    tokens = np.arange(1, 9, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert len(sequences(tokens, 3)) == 6 and len(sequences(tokens, 9)) == 0
    base, modulus = 0x9E3779B97F4A7C15, 2**64
    truth = [sum(int(t) * base ** (2 - k) for k, t in enumerate(tokens[i : i + 3])) % modulus for i in range(6)]
    assert sequences(tokens, 3).tolist() == truth
