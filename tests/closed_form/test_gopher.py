"""Gopher's rules in both readings: golden strings by hand, T-a9, T-a10."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from assay.scorers.gopher import Gopher

STYLES = ("datatrove", "dclm")


def table(texts: list[str], style: Any) -> dict[str, np.ndarray]:
    method = Gopher(style=style)
    values = method.score(None, SimpleNamespace(column=lambda _: texts))  # type: ignore[arg-type]
    return dict(zip(method.columns(None), values.T, strict=True))


def row(text: str, style: Any) -> dict[str, float]:
    return {name: float(x[0]) for name, x in table([text], style).items()}


def test_t_a9_two_equal_lines():
    assert row("x\nx", "datatrove")["dup_lines"] == 0.5
    assert row("x\nx", "dclm")["dup_lines"] == 1.0


@pytest.mark.parametrize("style", STYLES)
def test_t_a10_a_copied_line_never_lowers_the_statistic(style):
    rng = random.Random(0)
    for _ in range(50):
        lines = rng.choices(["one", "two words", "three more words", "four", ""], k=rng.randrange(1, 9))
        lines.append("last")
        grown = "\n".join([*lines, rng.choice([x for x in lines if x])])
        before, after = (x for x in table(["\n".join(lines), grown], style)["dup_lines"])
        assert after >= before


GOLDEN = "# The cat sat... and the cat ran!\n- don't stop 42 times\n\nof that, \u2026"


def test_golden_string_as_datatrove_reads_it():
    """Tokens: # The cat sat ... and the cat ran ! | - do n't stop 42 times | of that , ...: 20, 14 of them words."""
    found = row(GOLDEN, "datatrove")
    assert found["words"] == 14
    lengths = [3, 3, 3, 3, 3, 3, 3, 2, 3, 4, 2, 5, 2, 4]
    assert found["word_length"] == pytest.approx(sum(lengths) / 14)
    assert found["hashes"] == 1 / 20 and found["ellipses"] == 2 / 20
    assert found["bullet_lines"] == 1 / 4 and found["ellipsis_lines"] == 1 / 4
    assert found["alpha_words"] == 13 / 20  # all words but 42
    assert found["stop_words"] == 4  # and, the, of, that; not The
    assert found["dup_lines"] == found["dup_paragraphs"] == 0
    # No pair is repeated, so the first one counts once, with its blank: '# The'.
    assert found["top_2"] == len("# The") / len(GOLDEN)
    assert found["score"] == -3, "too few words, too few of them with letters, and the second mark of the first line"


def test_golden_string_as_dclm_reads_it():
    """Chunks: # The cat sat... and the cat ran! - don't stop 42 times of that, ...: 16; words: 13."""
    found = row(GOLDEN, "dclm")
    assert found["words"] == 13
    assert found["word_length"] == pytest.approx((1 + 3 + 3 + 6 + 3 + 3 + 3 + 4 + 1 + 5 + 4 + 2 + 5 + 2 + 5 + 1) / 16)
    assert found["symbols"] == 3 / 16
    assert found["bullet_lines"] == 1 / 3 and found["ellipsis_lines"] == 1 / 3
    assert found["alpha_words"] == 12 / 16  # not #, -, 42 and the ellipsis
    assert found["stop_words"] == 4  # The, and, the, of; 'that,' has a comma
    assert found["top_2"] == 0, "nothing is repeated"


def test_golden_repetition_in_both_readings():
    """Two lines of five words: datatrove steps over one copy of 20 of 48 characters; DCLM counts both, 40 of 40."""
    text = "red blue green dark cyan\nred blue green dark cyan"[:49]
    letters = len("redbluegreendarkcyan")
    ours, theirs = row(text, "datatrove"), row(text, "dclm")
    assert ours["dup_5"] == letters / len(text) and theirs["dup_5"] == 1.0
    assert ours["top_2"] == 2 * len("red blue") / len(text)  # the first pair of those that occur twice
    assert theirs["top_2"] == 2 * len("bluegreen") / (2 * letters)  # the longest
    assert ours["dup_lines"] == 0.5 and theirs["dup_lines"] == 1.0
    assert ours["dup_line_chars"] == 24 / len(text) and theirs["dup_line_chars"] == 1.0


def test_what_each_style_calls_bullets_ellipses_and_stop_words():
    text = "* one\n\u2022 two\n- three\n\u25cf four\nfive . . .\nThe THE"
    ours, theirs = row(text, "datatrove"), row(text, "dclm")
    assert ours["bullet_lines"] == 2 / 6 and theirs["bullet_lines"] == 4 / 6
    assert ours["ellipsis_lines"] == 0 and theirs["ellipsis_lines"] == 1 / 6
    assert ours["stop_words"] == 0 and theirs["stop_words"] == 2


GOOD = (
    "The committee met on Monday to talk about the budget of the town, and it was clear that people have worries. "
    "Some members wanted to be careful with money; others asked for new roads. After two hours they agreed on a plan "
    "that leaves most services as they are. A second meeting in May will look at schools, parks and the old library."
)


@pytest.mark.parametrize("style", STYLES)
def test_prose_passes_and_every_rule_has_a_text_that_breaks_it(style):
    assert row(GOOD, style)["score"] == 0
    words = GOOD.split()
    symbol = "hashes" if style == "datatrove" else "symbols"
    faults = {
        "words": " ".join(words[:20]), "word_length": GOOD.replace(" ", ""), symbol: GOOD.replace(" ", " # "),
        "bullet_lines": "- " + "\n- ".join(words), "ellipsis_lines": "...\n".join(words),
        "alpha_words": GOOD + " 1" * 40, "stop_words": GOOD.translate(str.maketrans("teon", "zyam")),
        "dup_lines": GOOD + "\na\nb\na\nb\na", "dup_paragraphs": GOOD + "\n\na" * 4, "top_2": GOOD + " dear me" * 30,
        "dup_5": GOOD + " " + GOOD, "dup_10": GOOD + " " + GOOD, "dup_line_chars": GOOD + "\n" + GOOD,
        "dup_paragraph_chars": GOOD + "\n\n" + GOOD,
    }  # fmt: skip
    bounds = Gopher(style=style).presets["gopher"]
    found = table(list(faults.values()), style)
    for k, name in enumerate(faults):
        low, high = bounds[name]
        value = found[name][k]
        assert (low is not None and value < low) or (high is not None and value > high), (name, value)
        assert found["score"][k] < 0


@pytest.mark.parametrize("style", STYLES)
def test_score_counts_the_bounds_that_are_broken_and_a_bound_itself_is_kept(style):
    texts = [GOOD, "", " \n ", "x", GOOD + "\n" + GOOD, " ".join(["word"] * 50)]
    found, bounds = table(texts, style), Gopher(style=style).presets["gopher"]
    for k in range(len(texts)):
        broken = sum(
            (low is not None and found[name][k] < low) or (high is not None and found[name][k] > high)
            for name, (low, high) in bounds.items()
        )
        assert found["score"][k] == -broken
    assert all(np.isfinite(x).all() for x in found.values()) and found["score"][1] < 0
    assert found["words"][5] == 50


@pytest.mark.parametrize("style", STYLES)
def test_a_text_alone_and_among_others_has_the_same_bytes(style):
    texts = [GOOD, "", "x\nx", GOLDEN, "\n\nfirst", GOOD[:90]]
    together = table(texts, style)
    for k, text in enumerate(texts):
        alone = table([text], style)
        assert all(together[name][k] == alone[name][0] for name in together)
