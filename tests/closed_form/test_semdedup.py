"""SemDeDup and prototypes against loops over pairs, and chains worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import special_ortho_group

from assay.core.keys import encode_ids
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.table import Table
from assay.measure import Measurer
from assay.numerics.redundancy import Earlier, _limit, distances, redundant

FEATURES = {"name": "column", "column": "x", "store": "float32"}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def measured(out: Path, method: dict[str, Any], x: np.ndarray, ids: list[str] | None = None, **options: Any) -> Table:
    """The Table of a scorer over vectors, in the order of their ids."""
    ids = ids or [f"{i:04d}" for i in range(len(x))]
    pool = Pool.from_columns({"id": ids, "x": x.tolist()})
    run = Run.open(out, {"name": "vectors"})
    run.close()
    table = Measurer(run, pool, pool.at([0]), **options).table(make(Scorer, {"features": FEATURES, **method}))
    return table.align(encode_ids(sorted(ids)))


def some(n: int = 120, d: int = 8, seed: int = 0) -> np.ndarray:
    """Vectors of which a third are near others, and some are copies."""
    rng = np.random.default_rng(seed)
    x = unit(rng.normal(size=(n, d)))
    near = n // 3
    x[:near] = unit(x[near : 2 * near] + (0.05 + rng.exponential(0.3, (near, 1))) * rng.normal(size=(near, d)) / d**0.5)
    x[-5:] = x[near : near + 5]
    return x[rng.permutation(n)]


def slowly(x: np.ndarray, labels: np.ndarray, order: np.ndarray, eps: float) -> tuple[np.ndarray, ...]:
    """Largest cosines with earlier rows that share a cluster, by both rules, and who stays: pair by pair."""
    n = len(x)
    reference, greedy, kept = np.full(n, -1.0), np.full(n, -1.0), np.ones(n, dtype=bool)
    for place, j in enumerate(order):
        for i in order[:place]:
            if set(labels[i]) & set(labels[j]):
                cosine = min(1.0, float(x[i] @ x[j]))
                reference[j] = max(reference[j], cosine)
                greedy[j] = max(greedy[j], cosine) if kept[i] else greedy[j]
        kept[j] = not (greedy[j] > 1 - eps or greedy[j] >= 1 - 1e-6)
    return reference, greedy, kept


@pytest.mark.parametrize("probes", [1, 2, 3])
@pytest.mark.parametrize("block", [1024, 7, 1])
def test_cosines_with_earlier_rows(probes: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.numerics.redundancy.BLOCK", block)
    x, rng = some(), np.random.default_rng(1)
    labels = np.stack([rng.permutation(5)[:probes] for _ in x])
    rank = rng.permutation(len(x))
    found = Earlier(x.astype(np.float32), labels, rank, 0.1)
    truth = slowly(x, labels, np.lexsort((rank, labels[:, 0])), 0.1)
    np.testing.assert_allclose(found.reference, truth[0], atol=1e-6)
    np.testing.assert_allclose(found.greedy, truth[1], atol=1e-6)
    assert (found.kept == truth[2]).all() and (found.kept == ~redundant(found.greedy, 0.1)).all()


def test_t_c1_no_eps_drops_copies_alone_and_the_largest_leaves_one_in_each_cluster(tmp_path: Path) -> None:
    x = some()
    table = measured(tmp_path, {"name": "semdedup", "clusters": 6}, x)
    stays, scores = table.column("score") >= 0, table.column("score")
    gram = x @ x.T
    copies = {frozenset(np.flatnonzero(row >= 1 - 1e-6).tolist()) for row in gram}
    assert sum(len(group) - 1 for group in copies) == 5
    for group in copies:
        assert stays[sorted(group)].sum() == 1, "one of each group of copies"
    for eps in (2, 3):
        left = scores >= min(eps, 2)
        assert sorted(table.column("cluster")[left].tolist()) == sorted(set(table.column("cluster").tolist()))


def test_t_c2_the_reference_rule_is_monotone_in_eps(tmp_path: Path) -> None:
    """Kept at a larger eps is kept at a smaller one; each cut of the one Table is what a run at that eps says."""
    x, before = some(seed=3), None
    table = measured(tmp_path / "one", {"name": "semdedup", "clusters": 3}, x)
    for eps in (0.0, 0.02, 0.1, 0.4, 1.0):
        left = set(np.flatnonzero(table.column("score") >= eps).tolist())
        other = measured(tmp_path / str(eps), {"name": "semdedup", "clusters": 3, "eps": eps}, x)
        assert left == set(np.flatnonzero(other.column("score") >= eps).tolist())
        assert before is None or left <= before
        before = left


def angles(*degrees: float) -> np.ndarray:
    t = np.radians(degrees)
    return np.stack([np.cos(t), np.sin(t)], axis=1).astype(np.float32)


def in_order(x: np.ndarray, eps: float) -> Earlier:
    return Earlier(x, np.zeros((len(x), 1), dtype=np.int64), np.arange(len(x)), eps)


def test_t_c2_the_greedy_rule_is_not_monotone() -> None:
    """At 0, 10 and 18 degrees: a bound of 9 degrees keeps 0 and 10, one of 12 degrees keeps 0 and 18."""
    x = angles(0, 10, 18)
    bound = lambda degrees: 1 - np.cos(np.radians(degrees))  # noqa: E731
    assert in_order(x, bound(9)).kept.tolist() == [True, True, False]
    assert in_order(x, bound(12)).kept.tolist() == [True, False, True]


def test_t_c3_rotations_do_not_matter(tmp_path: Path) -> None:
    x = some()
    turned = x @ special_ortho_group.rvs(8, random_state=0)
    for rule in ("reference", "greedy"):
        method = {"name": "semdedup", "clusters": 4, "rule": rule, "probes": 2, "eps": 0.1}
        one, other = (measured(tmp_path / f"{rule}{i}", method, y) for i, y in enumerate((x, turned)))
        np.testing.assert_allclose(other.values, one.values, atol=2e-6)


def test_t_c4_a_chain() -> None:
    """a ~ b, b ~ c, a and c unlike: the reference rule keeps a, the greedy rule a and c."""
    x = angles(0, 10, 20)
    found = in_order(x, 1 - np.cos(np.radians(12)))
    assert (~redundant(found.reference, found.eps)).tolist() == [True, False, False]
    assert found.kept.tolist() == [True, False, True]
    np.testing.assert_allclose(found.reference, [-1, np.cos(np.radians(10)), np.cos(np.radians(10))], atol=1e-6)
    np.testing.assert_allclose(found.greedy, [-1, np.cos(np.radians(10)), np.cos(np.radians(20))], atol=1e-6)


@pytest.mark.parametrize("rule", ["reference", "greedy"])
@pytest.mark.parametrize("keep", ["hard", "easy"])
def test_t_c5_one_cluster_is_brute_force(tmp_path: Path, rule: str, keep: str) -> None:
    x = some()
    method = {"name": "semdedup", "clusters": 1, "rule": rule, "keep": keep, "eps": 0.1}
    table = measured(tmp_path, method, x)
    centre = unit(x.sum(axis=0))
    distance = 1 - x @ centre
    np.testing.assert_allclose(table.column("distance"), distance, atol=1e-6)
    # Copies are as far as one another, so that either may come first: their scores are compared as a set.
    order = np.argsort(-table.column("distance") if keep == "hard" else table.column("distance"), kind="stable")
    reference, greedy, kept = slowly(x, np.zeros((len(x), 1), dtype=int), order, 0.1)
    truth = reference if rule == "reference" else greedy
    scores = np.where(truth >= 1 - 1e-6, -1, 1 - truth)
    np.testing.assert_allclose(np.sort(table.column("score")), np.sort(scores), atol=2e-6)
    if rule == "greedy":
        assert (table.column("score") >= 0.1).sum() == kept.sum()
    once = np.flatnonzero((x @ x.T >= 1 - 1e-6).sum(axis=1) == 1)
    np.testing.assert_allclose(table.column("score")[once], scores[once], atol=2e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-7, 1e-3, 0.05, 0.1, 1.0, 2.0, 3.0])
def test_the_limit_is_where_redundancy_begins(eps: float) -> None:
    limit = _limit(eps)
    assert redundant(np.array([limit]), eps)[0]
    assert not redundant(np.array([np.nextafter(limit, np.float32(-9))]), eps)[0]
    around = limit + np.linspace(-1e-6, 1e-6, 201).astype(np.float32)
    assert ((distances(around) < eps) == redundant(around, eps)).all()


def test_features_that_all_point_the_same_way_are_warned_of(tmp_path: Path) -> None:
    x = unit(some() + 12 * np.eye(8)[0])
    table = measured(tmp_path / "alike", {"name": "semdedup", "clusters": 3}, x)
    mean = np.mean([a @ b for a in x for b in x])
    assert f"have cosine {mean:.3f}, so eps = 0.05 drops most of them" in table.meta["warnings"][0]
    assert (table.column("score") < 0.05).mean() > 0.9
    assert not measured(tmp_path / "apart", {"name": "semdedup", "clusters": 3}, some()).meta["warnings"]


def test_both_counts_are_told(tmp_path: Path) -> None:
    x = some()
    method = {"name": "semdedup", "clusters": 3, "eps": 0.1}
    table = measured(tmp_path, method, x)
    note = table.meta["notes"]["semantic duplicates"]
    assert note["reference"] == (table.column("score") < 0.1).sum()
    assert note["greedy"] == (table.column("greedy") < 0.1).sum() <= note["reference"]
    made = make(Scorer, {"features": FEATURES, **method})
    assert made.presets == {"near": {"score": (0.1, None)}}


@pytest.mark.parametrize("rule", ["reference", "greedy"])
def test_of_each_group_one_stays(tmp_path: Path, rule: str) -> None:
    """Who goes is in a group with one that stays, whom a chain of likest earlier rows leads to."""
    x = some()
    table = measured(tmp_path, {"name": "semdedup", "clusters": 2, "rule": rule, "eps": 0.1}, x)
    group, stays = table.column("group").astype(int), table.column("score") >= 0.1
    assert (group >= 0)[~stays].all() and (group[stays] < 0).sum() > 0
    for number in set(group[group >= 0].tolist()):
        own = np.flatnonzero(group == number)
        assert len(own) > 1 and own[stays[own]].tolist() == [number]
        for j in own[~stays[own]]:
            nearest = max(float(x[i] @ x[j]) for i in own if i != j)
            assert nearest > 1 - 0.1
            if rule == "greedy":
                assert float(x[number] @ x[j]) > 1 - 0.1, "those that stay are near to all of their group"


def test_a_copy_stays_where_earlier_filters_dropped_its_twin(tmp_path: Path) -> None:
    from assay.filters import Filter

    x = np.concatenate([some(40, seed=7)[:30], np.eye(8)[:1], np.eye(8)[:1]])
    table = measured(tmp_path, {"name": "semdedup", "clusters": 1}, x)
    method = make(Scorer, {"features": FEATURES, "name": "semdedup", "clusters": 1})
    alone = Filter(method, "near", method.presets["near"])
    for gone in (30, 31):
        here = np.ones(32, dtype=bool)
        here[gone] = False
        dropped = np.any(list(alone.judge(table, here).values()), axis=0)
        assert not dropped[61 - gone], "the other one of the two is left"
    assert np.any(list(alone.judge(table, np.ones(32, dtype=bool)).values()), axis=0)[30:].sum() == 1


def test_a_second_assignment_finds_duplicates_across_a_border(tmp_path: Path) -> None:
    """Two clusters of many, and a pair whose halves lie on either side of the plane between them."""
    rng = np.random.default_rng(0)
    a, b = np.eye(4)[0], np.eye(4)[1]
    crowd = unit(np.concatenate([a + 0.05 * rng.normal(size=(40, 4)), b + 0.05 * rng.normal(size=(40, 4))]))
    pair = unit(np.array([[1.1, 1, 0.5, 0], [1, 1.1, 0.5, 0]]))
    x = np.concatenate([crowd, pair])
    found = {}
    for probes in (1, 2):
        table = measured(tmp_path / str(probes), {"name": "semdedup", "clusters": 2, "probes": probes}, x)
        assert table.column("cluster")[-2] != table.column("cluster")[-1], "the border is where it was meant to be"
        found[probes] = sorted(table.column("score")[-2:].tolist())
    assert found[1][0] > 0.05 > found[2][0]
    assert found[2][0] == pytest.approx(1 - float(pair[0] @ pair[1]), abs=1e-6)
    assert found[2][1] > 0.05, "one of the two stays"


@pytest.mark.parametrize("name", ["semdedup", "prototypes"])
def test_order_shards_and_workers_do_not_matter(tmp_path: Path, name: str) -> None:
    """To the bit, for features are given. 120 rows in shards of 5 are more than 20: workers are used."""
    x = some()
    ids = [f"{i:04d}" for i in range(len(x))]
    mixed = np.random.default_rng(5).permutation(len(x))
    method = {"name": name, "clusters": 5}
    one = measured(tmp_path / "one", method, x, ids)
    other = measured(tmp_path / "mixed", method, x[mixed], [ids[i] for i in mixed])
    split = measured(tmp_path / "split", method, x, ids, shard=5, workers=2)
    for found in (other, split):
        np.testing.assert_allclose(found.values, one.values, rtol=0, atol=1e-6 if name == "prototypes" else 0)


def test_prototypes_are_distances_to_the_nearest_centroid(tmp_path: Path) -> None:
    x = 3 * some()
    hard = measured(tmp_path / "hard", {"name": "prototypes", "clusters": 4}, x)
    easy = measured(tmp_path / "easy", {"name": "prototypes", "clusters": 4, "keep": "easy"}, x)
    rows, labels = unit(x), hard.column("cluster").astype(int)
    centres = np.stack([unit(rows[labels == c].sum(axis=0)) for c in range(4)])
    np.testing.assert_allclose(hard.column("score"), 1 - (rows @ centres.T).max(axis=1), atol=1e-5)
    np.testing.assert_allclose(easy.column("score"), -hard.column("score"))
    apart = [np.mean([1 - a @ b for j, b in enumerate(centres) if j != i]) for i, a in enumerate(centres)]
    np.testing.assert_allclose(hard.column("spacing"), np.array(apart)[labels], atol=1e-5)
