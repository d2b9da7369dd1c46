"""RefinedWeb's rules on lines against a plain reading."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

from assay.scorers.refinedweb import Refinedweb

LINES = [
    "A plain line of six words.", "SHOUTING IS BAD", "Half CAPS", "12345", "12 345", "3 likes", "12.5k Views!",
    "likes 3", "word", "-----", "", "  ", "A 3 likes", "\u2665 1,024 shares", "5 likes and more", "AB c", "7 upvotes 8",
    "3likes", "\u0663 \u0664",
]  # fmt: skip
COUNTER = (
    r"^\W*\d(?:,|\.|\d)*(?:k|m|b)?\s+(?:likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes"
    r"|downloads|views|followers)\W*$"
)


def table(texts: list[str]) -> dict[str, np.ndarray]:
    method = Refinedweb()
    values = method.score(None, SimpleNamespace(column=lambda _: texts))  # type: ignore[arg-type]
    return dict(zip(method.columns(None), values.T, strict=True))


def rules(line: str) -> list[bool]:
    size = len(line)
    return [
        size > 0 and sum(c.isupper() for c in line) / size > 0.5,
        size > 0 and sum(c.isdigit() for c in line) / size > 0.999999,
        re.search(COUNTER, line.lower()) is not None,
        size > 0 and len(line.split()) < 2,
    ]


def words(line: str) -> int:
    return sum(any(c.isalnum() for c in w) for w in line.split())


def test_against_a_plain_reading():
    rng = random.Random(0)
    texts = [*LINES, *("\n".join(rng.choices(LINES, k=rng.randrange(1, 30))) for _ in range(200))]
    found = table(texts)
    for k, text in enumerate(texts):
        lines = text.split("\n")
        total = sum(map(words, lines))
        removed = sum(words(x) for x in lines if any(rules(x)))
        assert found["removed_words"][k] == pytest.approx(removed / total if total else 1.0)
        assert found["score"][k] == (-1 if found["removed_words"][k] > 0.05 else 0)
        assert found["words"][k] == total
        filled = max(sum(len(x) > 0 for x in lines), 1)
        for j, name in enumerate(("capital_lines", "digit_lines", "counter_lines", "single_lines")):
            assert found[name][k] == sum(rules(x)[j] for x in lines) / filled, (name, text)


def test_each_rule_is_met():
    found = table(LINES)
    assert all(found[name].max() == 1 for name in ("capital_lines", "digit_lines", "counter_lines", "single_lines"))


def test_five_percent_stay():
    line = "one two three four five six seven eight nine ten"
    assert table(["\n".join([line, line[:44], "end"]), "\n".join([line, line, "end"])])["score"].tolist() == [0, 0]
    assert table(["\n".join([line, line[:-4], "x"])])["removed_words"].tolist() == [0.05]
    assert table(["\n".join([line, "x"])])["score"].tolist() == [-1]
