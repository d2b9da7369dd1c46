"""C4's rules against a plain reading, line by line."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np

from assay.scorers.c4 import C4

ENDS = (".", "?", "!", '"', "'")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
LINES = [
    "A line with an end.", "No end here at all", "Too short.", "One. Two. Three is here.", "JavaScript is on.",
    "Lorem Ipsum dolor sit amet.", "It has { a bracket.", "See our Privacy Policy now.", "It trails off at last...",
    "A fact with a mark.[12]", "A fact with a blank. [12]", "Quite so, [citation needed]", "x" * 1001 + " is a word.",
    "He said: \"That was that!\"", "  \t", "", "{ javascript in one line.", "a" * 200, "b" * 199 + " c d.",
]  # fmt: skip


def table(texts: list[str]) -> dict[str, np.ndarray]:
    method = C4()
    values = method.score(None, SimpleNamespace(column=lambda _: texts))  # type: ignore[arg-type]
    return dict(zip(method.columns(None), values.T, strict=True))


def count(line: str) -> int:
    """Sentences of the lines above: what follows a mark and a blank, or a quote, is a new one."""
    return len([x for x in re.split(r"[.?!]+[\"']?\s+(?=\w)", line) if x])


def plain(text: str, any_end: bool) -> dict[str, int]:
    found = {"sentences": 0, "lorem_ipsum": 0, "curly_brackets": 0, "kept": 0}
    for line in (x.strip() for x in text.splitlines()):
        words = line.split()
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line)
        if len(words) < 3 or any(len(w) > 1000 for w in words):
            continue
        if not any_end and (not line.endswith(ENDS) or line.endswith("...")):
            continue
        low = line.lower()
        found["lorem_ipsum"] += "lorem ipsum" in low
        if "javascript" in low:
            continue
        found["curly_brackets"] += "{" in line
        if any(p in low for p in POLICIES):
            continue
        found["kept"] += 1
        found["sentences"] += count(line)
    return found


def test_against_a_plain_reading():
    rng = random.Random(0)
    texts = [*LINES, *("\n".join(rng.choices(LINES, k=rng.randrange(1, 12))) for _ in range(200))]
    found = table(texts)
    for k, text in enumerate(texts):
        for any_end in (False, True):
            expected, suffix = plain(text, any_end), "_any" if any_end else ""
            for name in ("sentences", "lorem_ipsum", "curly_brackets"):
                assert found[name + suffix][k] == expected[name], (name, text)
            if not any_end:
                assert found["kept_lines"][k] == expected["kept"] / max(len(text.splitlines()), 1)
        assert found["long_lines"][k] == sum(len(x) >= 200 for x in text.split("\n"))


def test_score_counts_broken_rules():
    good = "\n".join(["This line is good."] * 5)
    texts = [good, good[:40], good + "\nLorem ipsum is here.", good + "\nA { opens here.", "lorem ipsum { here."]
    assert table(texts)["score"].tolist() == [0, -1, -1, -1, -3]


def test_a_bracket_counts_only_in_a_line_that_the_rules_before_it_left():
    found = table(["a { b c", "a { b c.", "javascript { b."])
    assert found["curly_brackets"].tolist() == [0, 1, 0]
    assert found["curly_brackets_any"].tolist() == [1, 1, 0]
