"""Length: characters and words by hand."""

from __future__ import annotations

from types import SimpleNamespace

from assay.scorers.length import Length


def test_characters_and_words():
    texts = ["one, two -- 3 !", "", "\n", "\u4e2d\u6587 \U0001f600 na\u00efve"]
    found = Length().score(None, SimpleNamespace(column=lambda _: texts))  # type: ignore[arg-type]
    assert found.tolist() == [[15, 3], [0, 0], [1, 0], [10, 2]]
    assert Length().columns(None) == ("score", "words")
