"""Languages against py3langid's own answer; T-a8 (strictness at the boundary, newline-invariance)."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from assay.core.errors import InputError
from assay.core.keys import encode_ids
from assay.core.method import Selector, make
from assay.core.selection import Budget
from assay.core.table import Table
from assay.scorers import language
from assay.scorers.language import Language, sample

pytest.importorskip("py3langid")
NOBODY: Any = None

TEXTS = [
    "The committee met on Monday to talk about the budget of the town, and it was clear that people have worries.",
    "Der Ausschuss kam am Montag zusammen, um \u00fcber den Haushalt der Stadt zu sprechen, und alle waren besorgt.",
    "\u041a\u043e\u043c\u0438\u0442\u0435\u0442 \u0441\u043e\u0431\u0440\u0430\u043b\u0441\u044f \u0432 "
    "\u043f\u043e\u043d\u0435\u0434\u0435\u043b\u044c\u043d\u0438\u043a, \u0447\u0442\u043e\u0431\u044b "
    "\u043e\u0431\u0441\u0443\u0434\u0438\u0442\u044c \u0431\u044e\u0434\u0436\u0435\u0442.",
    "THE COMMITTEE MET ON MONDAY", "caf\u0065\u0301 au lait", "x", "", "42 17 3.5", "def f(x):\n    return x + 1",
]  # fmt: skip


def scores(texts: list[str], **options: Any) -> np.ndarray:
    return Language(**options).score(None, SimpleNamespace(column=lambda _: texts))  # type: ignore[arg-type]


def test_probabilities_are_those_of_py3langid():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    oracle = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    found = {name: scores(TEXTS, languages=(name,))[:, 0] for name in ("en", "de", "ru", "sr", "uz")}
    for k, text in enumerate(TEXTS):
        ranked = dict(oracle.rank(sample(text, 240).decode()))
        for name, values in found.items():
            assert values[k] == pytest.approx(ranked[name], abs=1e-5)
    assert found["en"][0] > 0.9 and found["de"][1] > 0.9 and found["ru"][2] > 0.9


def test_several_wanted_languages_add_up_and_best_is_the_most_probable():
    both, english, german = (scores(TEXTS, languages=x) for x in (("en", "de"), ("en",), ("de",)))
    np.testing.assert_allclose(both[:, 0], english[:, 0] + german[:, 0], rtol=1e-12)
    assert both[:3, 1].tolist() == [1, 1, 0] and english[:3, 1].tolist() == [1, 0, 0]


def test_t_a8_newlines_are_blanks():
    plain = scores(TEXTS * 2 + ["word " * 100])
    broken = scores([t.replace(" ", "\n") for t in TEXTS] + TEXTS + ["word\n" * 100])
    np.testing.assert_array_equal(plain, broken)


def test_t_a8_the_bound_itself_is_dropped():
    method, ids = Language(), encode_ids(["at", "above", "below"])
    values = np.array([[0.65, 1.0], [np.nextafter(0.65, 1), 1.0], [np.nextafter(0.65, 0), 1.0]])
    cut = make(Selector, {"name": "cut", "bounds": method.presets["fineweb"]})
    table, sizes = Table(ids, method.columns(None), values), np.ones(3, dtype=np.int64)
    kept = cut.select(table, sizes, Budget(3, "examples"), barred={})
    assert kept.ids.tolist() == [b"above"] and "score outside" in next(iter(kept.dropped))


def test_a_text_alone_and_among_others_has_the_same_bytes():
    together = scores(TEXTS)
    assert all((scores([t]) == together[k]).all() for k, t in enumerate(TEXTS))


def test_beginning_middle_and_end_of_a_long_text_are_read_and_nothing_else():
    english, german = (TEXTS[0] + " ") * 40, (TEXTS[1] + " ") * 40
    size = len(english)
    for start in (0, size // 2 - 100, size - 200):
        mixed = english[:start] + german[:200] + english[start + 200 :]
        assert scores([mixed])[0, 0] < scores([english])[0, 0] - 1e-4
    unread = english[:200] + german[:300] + english[500:]
    assert (scores([unread]) == scores([english])).all()
    assert len(sample(english, 240)) <= 242 and len(sample(english, 1)) <= 5


def test_an_unknown_language_is_refused_with_what_is_known():
    with pytest.raises(InputError, match="'eng' is not known"):
        Language(languages=("eng",)).init(NOBODY)
    with pytest.raises(InputError, match="no language is wanted"):
        Language(languages=()).init(NOBODY)


def test_without_py3langid_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language._model.cache_clear()
    with pytest.raises(InputError, match=r"assay-data\[text\]"):
        Language().init(NOBODY)
    language._model.cache_clear()
