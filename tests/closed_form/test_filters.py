"""Filters by hand: bounds, order, reasons, shares, copies whose survivor is gone, and what is said of domains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from assay import filters
from assay.core.errors import InputError
from assay.core.keys import encode_ids
from assay.core.method import Bounds, Count, Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.table import Table
from assay.measure import Measurer


class Rules(Scorer):
    """A rule scorer with two presets.

    Formula: none
    Reference: none
    """

    least: Count = 3
    preset: str = "an option of its own"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"usual": {"words": (float(self.least), 10.0), "hashes": (None, 0.1)}, "long": {"words": (8.0, None)}}


class Copies(Scorer):
    """A scorer of copies with groups.

    Formula: none
    Reference: none
    """

    group: ClassVar[str] = "cluster"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"first": {"score": (0.0, None)}}


def ids(n: int) -> np.ndarray:
    return encode_ids([f"row {i:02d}" for i in range(n)])


def table(**columns: list[float]) -> Table:
    values = np.array(list(columns.values()), dtype=float).T
    return Table(ids(len(values)), tuple(columns), values)


def sifted(specs: list[Any], tables: list[Table], **more: Any) -> filters.Sieve:
    n = len(tables[0])
    domains = np.array(more.get("domains", ["all"] * n))
    barred = np.isin(np.arange(n), more.get("barred", []))
    return filters.sift([filters.parse(s) for s in specs], tables, np.arange(1, n + 1), domains, barred)


def rows(sieve: filters.Sieve) -> dict[str, list[int]]:
    return {reason: [int(i.split()[1]) for i in found.tolist()] for reason, found in sieve.dropped.items()}


RULES = table(words=[2, 3, 10, 11, 5, 1], hashes=[0, 0, 0.1, 0.2, 0.11, 0.9])


def test_every_drop_has_the_first_reason_in_the_order_of_the_filters() -> None:
    lengths = table(score=[5, 1, 5, 5, 5, 5])
    found = sifted([{"name": "length", "bounds": {"score": [2, np.inf]}}, {"method": Rules()}], [lengths, RULES])
    assert rows(found) == {
        "length: score below 2": [1], "test_filters: words outside [3, 10]": [0, 3, 5],
        "test_filters: hashes above 0.1": [4],
    }  # fmt: skip
    assert np.flatnonzero(found.left).tolist() == [2]
    # The other way round row 1 passes the rules and falls to the length: each stage sees what the former left.
    other = sifted([{"method": Rules()}, {"name": "length", "bounds": {"score": [2, np.inf]}}], [RULES, lengths])
    assert [s["in"]["rows"] for s in other.stages] == [6, 6, 2] and [s["out"]["rows"] for s in other.stages] == [
        6,
        2,
        1,
    ]
    assert (other.left == found.left).all(), "bounds judge each row by itself: their order does not matter"


def test_rows_that_hold_a_target_item_leave_first_and_are_no_filter_s_drop() -> None:
    found = sifted([{"method": Rules()}], [RULES], barred=[0, 2])
    gate, rules = found.stages
    assert gate["reasons"] == {filters.GATE: 2} and rules["in"] == {"rows": 4, "tokens": 2 + 4 + 5 + 6}
    assert rules["out"] == {"rows": 1, "tokens": 2} and 0 not in sum(rows(found).values(), [])


def test_presets_and_bounds() -> None:
    assert filters.parse({"method": Rules()}).bounds == {"words": (3, 10), "hashes": (None, 0.1)}
    assert filters.parse({"method": Rules(least=5)}).bounds["words"] == (5, 10)
    longer = filters.parse({"method": Rules(), "preset": "long"})
    assert longer.bounds == {"words": (8, None)} and longer.label == "test_filters long"
    # Bounds alone are all there is; beside a preset they take the place of its own, and both ends open lift a rule.
    assert filters.parse({"method": Rules(), "bounds": {"hashes": [0, 1]}}).bounds == {"hashes": (0, 1)}
    mixed = {"method": Rules(), "preset": "usual", "bounds": {"words": [1, 4], "hashes": [-np.inf, np.inf]}}
    assert filters.parse(mixed).bounds == {"words": (1, 4)}
    assert filters.parse("exact_dup").bounds == {"score": (0, None)} and filters.parse("exact_dup").label == "exact_dup"


@pytest.mark.parametrize(
    "spec",
    [
        "exact_dup", {"name": "exact_dup", "column": "text"}, {"name": "length", "bounds": {"score": [2, np.inf]}},
        {"name": "length", "keep": "30%"}, {"name": "bm25", "keep": 0.5, "column": "score"},
    ],
)  # fmt: skip
def test_what_is_stored_means_the_same(spec: Any) -> None:
    if isinstance(spec, dict) and spec["name"] == "exact_dup":
        spec = {"method": spec}  # its option is called as one of the filter
    made = filters.parse(spec)
    stored = json.loads(json.dumps(made.spec(), allow_nan=False))
    assert filters.parse(stored) == made and filters.parse(stored).spec() == made.spec()


def test_a_share_is_of_what_reaches_the_filter() -> None:
    scores = table(score=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    half = {"name": "length", "bounds": {"score": [-np.inf, 7]}}
    found = sifted([half, {"name": "length", "keep": 0.5}], [scores, scores])
    assert np.flatnonzero(found.left).tolist() == [2, 3, 4, 5]
    assert rows(found) == {"length: score above 7": [0, 1], "length (2): not among the best 50%": [6, 7, 8, 9]}
    other = sifted([{"name": "length", "keep": "30%", "column": "score"}], [scores])
    assert np.flatnonzero(other.left).tolist() == [0, 1, 2]
    ties = sifted([{"name": "length", "keep": 0.5}], [table(score=[1] * 10)])
    mixed = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    again = filters.sift(
        [filters.parse({"name": "length", "keep": 0.5})], [Table(ids(10)[mixed], ("score",), np.ones((10, 1)))],
        np.ones(10), np.array(["all"] * 10), np.zeros(10, dtype=bool),
    )  # fmt: skip
    assert ties.left.sum() == 5 and sorted(mixed[again.left].tolist()) == np.flatnonzero(ties.left).tolist()


def test_a_copy_stays_when_an_earlier_filter_dropped_its_survivor() -> None:
    """Rows 0, 1, 2 are copies, and 3, 4; rows 0, 3 and 4 fail the rules. Row 5 is no copy of anything."""
    copies = table(score=[0, -1, -2, 0, -1, 0], cluster=[0, 0, 0, 3, 3, -1])
    rules = table(words=[1, 5, 5, 1, 1, 5], hashes=[0] * 6)
    first = sifted([{"method": Copies()}, {"method": Rules()}], [copies, rules])
    assert np.flatnonzero(first.left).tolist() == [5], "the survivors of dedup fell to the rules"
    later = sifted([{"method": Rules()}, {"method": Copies()}], [rules, copies])
    assert np.flatnonzero(later.left).tolist() == [1, 5], "of each group the best that is left stays"
    assert rows(later)["test_filters (2): score below 0"] == [2]
    gated = sifted([{"method": Copies()}], [copies], barred=[0])
    assert np.flatnonzero(gated.left).tolist() == [1, 3, 5]


@pytest.mark.parametrize("name", ["exact_dup", "minhash"])
def test_the_scorers_of_copies_name_their_groups(tmp_path: Path, name: str) -> None:
    """b is the survivor of b, c, e and falls to an earlier filter: c stays in its place. a and d are no copies."""
    if name == "minhash":
        pytest.importorskip("rensa")
    long = "one sentence of some ten words that stands here three times over"
    pool = Pool.from_columns({"id": ["c", "a", "e", "b", "d"], "text": [long, "a text", long, long, "another one"]})
    run = Run.open(tmp_path / "run", {"name": "filters"})
    try:
        found = Measurer(run, pool, pool).table(make(Scorer, name))
        mixed = pool.at([4, 3, 0, 2, 1])
        again = Measurer(run, mixed, mixed).table(make(Scorer, name))
    finally:
        run.close()
    assert found.column("score").tolist() == [-1, 0, -2, 0, 0]
    clusters = found.column("cluster")
    assert clusters[1] == clusters[4] == -1 and clusters[0] == clusters[2] == clusters[3] >= 0
    assert again.align(pool.ids).column("cluster").tolist() == clusters.tolist()
    lengths = Table(pool.ids, ("score",), np.array([[1.0], [1.0], [1.0], [0.0], [1.0]]))
    specs = [filters.parse(s) for s in ({"name": "length", "bounds": {"score": [1, np.inf]}}, name)]
    sieve = filters.sift(specs, [lengths, found], np.ones(5), np.array(["all"] * 5), np.zeros(5, dtype=bool))
    assert sieve.left.tolist() == [True, True, False, False, True]
    alone = filters.sift(specs[1:], [found], np.ones(5), np.array(["all"] * 5), np.zeros(5, dtype=bool))
    assert alone.left.tolist() == [False, True, False, True, True], "with nothing dropped, the survivor alone stays"


def test_in_and_out_by_domain_and_a_starved_domain_is_told() -> None:
    """Of 40 rows of code 4 stay, of 60 of prose 54: 10% against 90%."""
    words = [5.0] * 4 + [1.0] * 36 + [5.0] * 54 + [1.0] * 6
    made = table(words=words, hashes=[0.0] * 100)
    domains = ["code"] * 40 + ["prose"] * 60
    found = sifted([{"method": Rules()}], [made], domains=domains)
    stage = found.stages[1]
    assert stage["domains"] == {"code": {"in": 40, "out": 4}, "prose": {"in": 60, "out": 54}}
    assert stage["starved"] == [{"domain": "code", "kept": 0.1, "others": 0.9}]
    said = filters.findings(found.stages)
    assert len(said) == 1 and "'test_filters' keeps 10.0% of domain 'code' and 90.0% of the others" in said[0]
    assert not filters.starved({"a": (100, 46), "b": (100, 90)}), "more than half of what the others keep"
    assert not filters.starved({"a": (19, 0), "b": (100, 90)}), "too few rows to speak of a share"
    assert not filters.starved({"a": (100, 0)}), "a single domain is no mixture"


def test_stages_that_starve_a_domain_together_are_told() -> None:
    """Each of two filters keeps 60% of code: .36 after both, where prose keeps all."""
    one = table(score=([1.0] * 60 + [0.0] * 40) + [1.0] * 100)
    two = table(score=([1.0] * 36 + [0.0] * 24 + [1.0] * 40) + [1.0] * 100)
    spec = {"name": "length", "bounds": {"score": [1, np.inf]}}
    found = sifted([spec, spec], [one, two], domains=["code"] * 100 + ["prose"] * 100)
    assert [s["domains"]["code"]["out"] for s in found.stages] == [100, 60, 36]
    assert not any(s["starved"] for s in found.stages)
    assert filters.findings(found.stages) == [
        "the filters together keep 36.0% of domain 'code' and 100.0% of the others: that changes the mixture of domains"
    ]


def test_what_the_fix_says_can_be_parsed() -> None:
    inner = {"name": "minhash", "column": "title"}
    made = filters.parse({"method": inner, "keep": 0.5, "column": "size"})
    assert made.method == make(Scorer, inner) and (made.keep, made.column) == (0.5, "size")
    easy = filters.parse({"method": {"name": "semdedup", "keep": "easy"}})
    assert easy.method == make(Scorer, {"name": "semdedup", "keep": "easy"}) and easy.keep is None


def test_a_column_that_is_not_there_is_told_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(tmp_path, {})
    run.close()
    pool, scored = Pool.from_columns({"id": list("ab"), "text": ["one two", "three"]}), []
    kind = type(make(Scorer, "length"))
    real = kind.score
    monkeypatch.setattr(kind, "score", lambda self, state, batch: (scored.append(1), real(self, state, batch))[1])
    for more in ({"bounds": {"wrods": [1, 2]}}, {"keep": 0.5, "column": "wrods"}):
        made, measurer = filters.parse({"name": "length", **more}), Measurer(run, pool, pool, workers=1)
        measurer.check = filters.checking([made])
        with pytest.raises(InputError, match=r"(?s)no column 'wrods'.*did you mean 'words'"):
            measurer.path(made.method, pool)
    assert not scored
    Measurer(run, pool, pool, workers=1).path(make(Scorer, "length"), pool)
    assert scored == [1]
    measurer = Measurer(run, pool, pool, workers=1)
    measurer.check = filters.checking([filters.parse({"name": "length", "bounds": {"wrods": [1, 2]}})])
    with pytest.raises(InputError, match="no column 'wrods'"):  # a Table that is found is asked as well
        measurer.path(make(Scorer, "length"), pool)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("length", "has no presets"), ("exact_dupp", "did you mean 'exact_dup'"), (3, "not a filter"),
        ({"name": "exact_dup", "preset": "frist"}, "did you mean 'first'"),
        ({"name": "length", "preset": "usual"}, "this scorer has none"),
        ({"name": "length", "bounds": {"score": [5, 2]}}, "give the lower end first"),
        ({"name": "length", "bounds": {"score": [np.inf, np.inf]}}, "no score lies in"),
        ({"name": "length", "bounds": {"score": [1]}}, "unreadable bounds of score"),
        ({"name": "length", "bounds": {"score": ["a", 2]}}, "unreadable bounds of score"),
        ({"name": "length", "bounds": {"score": [float("nan"), 2]}}, "unreadable bounds of score"),
        ({"name": "length", "bounds": [1, 2]}, "unreadable bounds"),
        ({"name": "length", "bounds": {"score": [-np.inf, np.inf]}}, "bounds nothing"),
        ({"name": "length", "keep": 1.5}, "cannot keep 1.5"), ({"name": "length", "keep": "many"}, "cannot keep 'man"),
        ({"name": "length", "keep": "x%"}, "cannot keep 'x%'"), ({"name": "length", "keep": True}, "cannot keep True"),
        ({"name": "exact_dup", "keep": 0.5, "preset": "first"}, "both `keep` and bounds"),
        ({"name": "length", "column": "score"}, "`column` goes with `keep`"),
        (
            {"name": "verdict", "path": "v.jsonl", "column": "language_score", "bounds": {"score": [0.5, np.inf]}},
            "write method = {name = 'verdict', column = 'language_score'}",
        ),
        ({"name": "exact_dup", "column": "title"}, "write method = {name = 'exact_dup', column = 'title'}"),
        ({"name": "minhash", "column": "title", "keep": 0.5}, "write method = {name = 'minhash', column = 'title'}"),
        ({"name": "semdedup", "keep": "easy"}, "write method = {name = 'semdedup', keep = 'easy'}"),
        ({"method": "exact_dup", "seed": 1}, "no key 'seed' beside `method`"),
        ({"name": "exact_dup", "colum": "text"}, "has no option 'colum'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(spec: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        filters.parse(spec)
    assert said in str(caught.value)
