"""Density-based pruning against its own formula in loops, and cases worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from assay.core.errors import InputError
from assay.core.keys import encode_ids
from assay.core.method import Selector, make
from assay.core.selection import Budget, Selection
from assay.core.table import Table
from assay.selectors.density import softmax


def pruned(
    counts: list[int], complexity: Any, budget: int, *, sizes: Any = None, extra: Any = None, unit: Any = "examples",
    barred: Any = None, **options: Any,
) -> tuple[list[int], Selection, Table]:  # fmt: skip
    """How many of each cluster are taken. Members of cluster c lie around distance 1/2, its spacing is 2 C_c."""
    labels = np.repeat(np.arange(len(counts)), counts)
    rng = np.random.default_rng(0)
    distance = np.concatenate([0.5 + np.linspace(-0.1, 0.1, n) * (n > 1) for n in counts])
    mixed = rng.permutation(len(labels))
    columns = {"score": rng.normal(size=len(labels)), "cluster": labels, "distance": distance,
               "spacing": 2 * np.asarray(complexity)[labels], **(extra or {})}  # fmt: skip
    values = np.stack([np.asarray(v, dtype=np.float64)[mixed] for v in columns.values()], axis=1)
    ids = encode_ids([f"row {i:04d}" for i in range(len(labels))])[mixed]
    table = Table(ids, tuple(columns), values)
    sizes = np.ones(len(labels), dtype=np.int64) if sizes is None else np.asarray(sizes)[mixed]
    selection = make(Selector, {"name": "density", **options}).select(
        table, sizes, Budget(budget, unit), barred=barred or {}
    )
    of = table.column("cluster")[np.isin(ids, selection.ids)].astype(int)
    return np.bincount(of, minlength=len(counts)).tolist(), selection, table


def test_golden_three_four_three() -> None:
    """P = (.5, .3, .2) of 10, n = (3, 9, 9) and l = floor(1/3 x 10 / 3) = 1: 3, 4, 3."""
    c = np.log([0.5, 0.3, 0.2]) + 2
    found, selection, _ = pruned([3, 9, 9], c, 10, temperature=1.0, balance=1 / 3)
    assert found == [3, 4, 3] and selection.meta["shares"] == [3, 4]
    assert {k: len(v) for k, v in selection.dropped.items()} == {"outside its cluster's share": 11}


def test_shares_are_the_projection_of_the_softmax_of_complexities() -> None:
    """Against the formula in loops, nu on a fine grid."""
    rng = np.random.default_rng(4)
    counts, complexity, n = rng.integers(2, 40, 8), rng.uniform(0.05, 0.5, 8), 60
    found, _, _ = pruned(counts.tolist(), complexity, n, temperature=0.1)
    weights = [np.exp(c / 0.1) for c in complexity]
    wanted = [n * w / sum(weights) for w in weights]
    low = [min(int(0.5 * n / 8), m - 1) for m in counts]
    grid = (np.array([min(max(w + nu, l), m) for w, l, m in zip(wanted, low, counts, strict=True)])
            for nu in np.arange(-n, n, 1e-3))  # fmt: skip
    truth = min(grid, key=lambda x: abs(x.sum() - n))
    assert sum(found) == n and (np.abs(np.array(found) - truth) < 1.01).all()


def test_the_farthest_of_each_cluster_stay() -> None:
    found, selection, table = pruned([10, 20], [0.2, 0.2], 9)
    distance, label = table.column("distance"), table.column("cluster")
    taken = np.isin(table.ids, selection.ids)
    for c in (0, 1):
        own = label == c
        assert set(distance[own & taken]) == set(np.sort(distance[own])[-found[c] :])
    best, _, table = pruned([10, 20], [0.2, 0.2], 9, column="score")
    assert sum(best) == 9


def test_t_c7_temperature() -> None:
    """T-c7: hot, equal shares before bounds; cold, all to the most complex up to its size. What is over then goes to
    the others in equal parts, not to the next most complex: projections move all free entries alike."""
    complexity = [0.1, 0.4, 0.2]
    assert pruned([40, 40, 40], complexity, 30, temperature=1e9)[0] == [10, 10, 10]
    assert pruned([4, 40, 40], complexity, 30, temperature=1e9)[0] == [4, 13, 13]
    assert pruned([40, 40, 40], complexity, 30, temperature=1e-4, balance=0)[0] == [0, 30, 0]
    assert pruned([40, 20, 40], complexity, 30, temperature=1e-4, balance=0)[0] == [5, 20, 5]
    assert pruned([40, 40, 40], complexity, 30, temperature=1e-4, balance=0.5)[0] == [5, 20, 5]


def test_t_c8_complexities_and_temperature_by_the_same_factor() -> None:
    rng = np.random.default_rng(1)
    counts, complexity = rng.integers(5, 40, 6).tolist(), rng.uniform(0.05, 0.4, 6)
    one = pruned(counts, complexity, 50, temperature=0.1)
    other = pruned(counts, 3 * complexity, 50, temperature=0.3)
    assert one[0] == other[0] and one[1].fingerprint == other[1].fingerprint


def test_t_c9_a_cluster_split_in_two_gets_two_shares() -> None:
    """T-c9: not invariant, as the docs say: three alike get a third each, the same with two of them merged a half."""
    assert pruned([30, 30, 30], [0.2] * 3, 30)[0] == [10, 10, 10]
    assert pruned([60, 30], [0.2] * 2, 30)[0] == [15, 15]


def test_budgets_over_the_pool_and_clusters_of_one() -> None:
    assert pruned([1, 1, 5], [0.3, 0.0, 0.2], 100)[0] == [1, 1, 5]
    found, _, _ = pruned([1, 1, 5], [0.3, 0.0, 0.2], 3)
    assert sum(found) == 3
    assert pruned([6], [0.2], 4)[0] == [4]


def test_bounds_come_first_and_complexity_is_of_what_they_leave() -> None:
    """Dedup first: what a bound drops counts neither as a member nor in the mean distance."""
    score = np.concatenate([[0.01] * 8, [1.0] * 2, [1.0] * 10])
    found, selection, _ = pruned([10, 10], [0.2, 0.2], 8, extra={"near": score}, bounds={"near": (0.05, None)})
    assert found == [2, 6], "two are left of the first cluster"
    assert {k: len(v) for k, v in selection.dropped.items()} == {
        "near outside [0.05, None]": 8, "outside its cluster's share": 4,
    }  # fmt: skip


def test_a_budget_in_tokens() -> None:
    """Shares are tokens; the budget is missed by less than the smallest example left."""
    rng = np.random.default_rng(2)
    counts = [30, 30, 30]
    sizes = rng.integers(5, 60, 90)
    _, selection, table = pruned(counts, [0.2, 0.2, 0.2], 900, sizes=sizes, unit="tokens")
    used = selection.meta["terms"]
    order = np.array([int(i.decode()[4:]) for i in table.ids])
    cost = dict(zip(table.ids.tolist(), sizes[order].tolist(), strict=True))
    left = [cost[i] for i in table.ids.tolist() if i not in set(selection.ids.tolist())]
    assert used == sum(cost[i] for i in selection.ids.tolist()) and 900 - min(left) < used <= 900


def test_scores_without_clusters_and_shares_that_cannot_be() -> None:
    ids = encode_ids(["a", "b"])
    with pytest.raises(InputError, match="density needs a column 'cluster'"):
        make(Selector, "density").select(
            Table(ids, ("score",), np.ones((2, 1))), np.ones(2, dtype=int), Budget(1, "examples"), barred={}
        )
    with pytest.raises(InputError, match="no shares add up"):
        pruned([50, 50], [0.2, 0.2], 10, balance=3)


def test_softmax() -> None:
    np.testing.assert_allclose(softmax(np.log([0.5, 0.3, 0.2])), [0.5, 0.3, 0.2])
