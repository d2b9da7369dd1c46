"""FineWeb's rules by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from assay.scorers.fineweb import Fineweb

TEXT = "A line that ends with a mark.\nshort\n\nshort\nA line that is longer than thirty characters \u3002\n"


def table(texts: list[str]) -> dict[str, list[float]]:
    method = Fineweb()
    values = method.score(None, SimpleNamespace(column=lambda _: texts))  # type: ignore[arg-type]
    return dict(zip(method.columns(None), values.T.tolist(), strict=True))


def test_statistics_by_hand():
    found = {name: x[0] for name, x in table([TEXT]).items()}
    assert found["ended_lines"] == 2 / 4
    assert found["short_lines"] == 3 / 4, "the first line has 29 characters"
    assert found["dup_line_chars"] == len("short") / len(TEXT.replace("\n", ""))
    assert found["newlines"] == 5 / (8 + 1 + 1 + 9), "tokens: seven words and a mark, two, eight and a mark"
    assert found["score"] == -2


def test_white_space_at_the_end_of_a_line_hides_its_mark_and_counts_in_its_length():
    found = table(["It ends. \nIt ends.", "x" * 30 + "\n" + "x" * 30 + " "])
    assert found["ended_lines"][0] == 0.5 and found["short_lines"][1] == 0.5


@pytest.mark.parametrize("text", ["", "\n", " \n "])
def test_blank_texts_have_numbers(text):
    found = table([text])
    assert found["ended_lines"] == [0.0] and found["score"][0] <= -1


def test_thresholds():
    lines = ["One line ends here and it is long enough."] + ["And this one has no end but is long enough"] * 0
    many = lines + [f"This is line {k} and it has no mark at its end" for k in range(7)]
    fewer = lines + [f"This is line {k} and it has no mark at its end" for k in range(8)]
    found = table(["\n".join(many), "\n".join(fewer)])
    assert found["ended_lines"] == [1 / 8, 1 / 9] and found["score"] == [0, -1]
