"""The benchmark of rules: bounds at 1% false drops, and its rows on a few made documents."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

GOOD = (
    "The committee met on Monday to talk about the budget of the town, and it was clear that people have worries. "
    "Some members wanted to be careful with money; others asked for new roads. After two hours they agreed on plan {} "
    "that leaves most services as they are. A second meeting in May will look at schools, parks and the old library. "
    "It was a long evening. Nobody was happy with it."
)


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module("benchmarks.parts.rules")


def test_ties_at_the_bound_are_drawn_so_that_the_rate_is_exact(rules):
    for clean in (np.repeat([-2.0, -1, 0], [3, 40, 957]), np.arange(1000.0), np.zeros(50)):
        assert rules.drawn(clean, clean).mean() == pytest.approx(rules.RATE)
    clean = np.repeat([-2.0, -1, 0], [3, 40, 957])
    assert rules.drawn(np.array([-3.0, -2, -1, 0]), clean).tolist() == pytest.approx([1, 1, 7 / 40, 0])


def test_tails_are_shares_of_clean_text_as_far_out(rules):
    values = np.column_stack([np.zeros(10), np.arange(10.0), np.arange(10.0)[::-1]])
    scored = rules.Scored(("score", "a", "b"), {}, values, values, 0.0)
    rows = np.array([[0, 0.0, 5], [0, 4.0, 9], [0, 9.0, 9.5], [0, -1.0, 5]])
    assert rules.tails(scored, values, rows, {"a": (1, None)}).tolist() == [0.1, 0.5, 1.0, 0.0]
    assert rules.tails(scored, values, rows, {"b": (None, 1)}).tolist() == pytest.approx([0.5, 0.1, 0.0, 0.5])
    assert rules.tails(scored, values, rows, {"a": (1, 1), "b": (None, 1)})[1] == pytest.approx(0.1)


def test_wilson_interval(rules):
    assert rules.wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-3)
    assert rules.wilson(10, 10)[1] == pytest.approx(1) and rules.wilson(0, 10)[0] == pytest.approx(0)


def test_rows_on_made_documents(rules, tmp_path, monkeypatch, capsys):
    pytest.importorskip("py3langid")
    german = (
        "Der Ausschuss kam am Montag zusammen, um den Haushalt der Stadt zu besprechen, und alle waren besorgt. " * 3
    )
    kinds = {"loop": ("garbled", GOOD * 3), "hex": ("noise", "9DE2229FD726" * 30), "other": ("foreign", german)}
    pq.write_table(pa.table({"text": [GOOD.format(k) for k in range(200)]}), tmp_path / "domains.parquet")
    faulty = [{"text": t, "defect": d, "kind": k, "lang": "de"} for k, (d, t) in kinds.items() for _ in range(4)]
    pq.write_table(pa.Table.from_pylist(faulty), tmp_path / "defects.parquet")
    monkeypatch.setattr(rules, "ours", lambda *_: (2.0, 1.0))
    found = rules.rows(tmp_path, True, tmp_path / "python", 1)
    assert "datatrove is left out" in capsys.readouterr().err

    recall = {(r["case"], r["kind"], r["method"], r["at"]): r for r in found if r["metric"] == "recall"}
    assert recall["garbled", "loop", "gopher", "published"]["value"] == 1
    assert recall["noise", "hex", "gopher", "published"]["value"] == 1
    assert recall["foreign", "de", "language", "published"]["value"] == 1
    assert recall["noise", "all", "together", "published"]["documents"] == 1
    assert all(r["false_drops"] == 0 for key, r in recall.items() if key[2:] == ("gopher", "published"))
    assert {r["case"] for r in found} == {"clean", "foreign", "garbled", "noise", "speed"}
    assert [r["value"] for r in found if r["case"] == "clean"] == [0.0] * 10
    speed = {r["method"]: r for r in found if r["metric"] == "docs_per_second"}
    assert set(speed) == {*rules.TIMED, "rules"} and speed["c4"]["value"] == 100 and speed["c4"]["cpu"] == 200
    keys = {"bench", "case", "tool", "method", "metric", "value", "ci", "seconds"}
    assert all(keys <= set(r) for r in found)
    assert any("clean text (false drops)" in line for line in rules.table(found))
