"""Spherical k-means and what is shared out by it, against plain loops, scikit-learn and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from assay.core.errors import InputError
from assay.numerics.allocate import box_simplex, whole
from assay.numerics.cluster import assign, spacing, spherical_kmeans


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def blobs(n: int, k: int, d: int = 16, spread: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres, of = unit(rng.normal(size=(k, d))), rng.integers(0, k, n)
    return unit(centres[of] + spread * rng.normal(size=(n, d)) / d**0.5), of


def keys(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, n).astype(np.uint64)


def test_clusters_that_are_apart_are_found() -> None:
    x, of = blobs(600, 7)
    found = spherical_kmeans(x, 7, keys=keys(600))
    labels = assign(x, found.centroids)[0][:, 0]
    assert len({(a, b) for a, b in zip(of.tolist(), labels.tolist(), strict=True)}) == 7
    truth = unit(np.stack([x[of == c].sum(axis=0) for c in of[[np.flatnonzero(labels == k)[0] for k in range(7)]]]))
    np.testing.assert_allclose(found.centroids, truth, atol=1e-6)


def test_every_step_is_lloyds_and_none_makes_it_worse() -> None:
    """Against a loop of its own: from the same first centroids, the same ones after each number of iterations."""
    x, _ = blobs(400, 12, spread=1.5)
    first = spherical_kmeans(x, 9, keys=keys(400), iterations=0)
    centroids, inertia = first.centroids.copy(), []
    for steps in range(6):
        labels = np.array([int(np.argmax([c @ row for c in centroids])) for row in x])
        inertia.append(float(np.mean([1 - centroids[k] @ row for k, row in zip(labels, x, strict=True)])))
        found = spherical_kmeans(x, 9, keys=keys(400), iterations=steps)
        np.testing.assert_allclose(found.centroids, centroids, atol=2e-6)
        np.testing.assert_allclose(found.inertia[-1], inertia[-1], atol=1e-6)
        centroids = unit(np.stack([x[labels == k].astype(np.float64).sum(axis=0) for k in range(9)]))
    assert (np.diff(inertia) < 0).all()


def test_as_good_as_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x, _ = blobs(1500, 40, spread=1.5)
    own = spherical_kmeans(x, 30, keys=keys(1500), iterations=20).inertia[-1]
    peer = cluster.KMeans(30, n_init=1, max_iter=20, random_state=0).fit(x)
    theirs = 1 - assign(x, unit(peer.cluster_centers_))[1].mean()
    assert own < 1.03 * theirs


def test_a_centroid_without_rows_moves_to_the_farthest_row() -> None:
    """Two of three first centroids are equal rows, so that one has nothing; the row far from all becomes it."""
    from assay.numerics.cluster import _moved

    x = unit(np.array([[1, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [0, 0, 1.0]]))
    centroids = np.stack([x[0], x[0], x[1]])
    labels, cosines = assign(x, centroids)
    assert set(labels[:, 0].tolist()) == {0, 2}
    moved = _moved(x, centroids, labels[:, 0], cosines[:, 0], keys(4))
    np.testing.assert_allclose(moved[1], [0, 0, 1])


def test_fewer_distinct_rows_than_centroids() -> None:
    x = unit(np.repeat(np.eye(3), 5, axis=0))
    found = spherical_kmeans(x, 8, keys=keys(15))
    assert sorted(found.centroids.argmax(axis=1).tolist()) == [0, 1, 2] and found.inertia[-1] == 0
    assert len(spherical_kmeans(x[:1], 8, keys=keys(1)).centroids) == 1


def test_the_seed_and_the_keys_alone_choose_the_first_centroids() -> None:
    x, _ = blobs(500, 20, spread=2.0)
    one = spherical_kmeans(x, 10, keys=keys(500), iterations=0)
    again = spherical_kmeans(x.copy(), 10, keys=keys(500), iterations=0)
    other = spherical_kmeans(x, 10, keys=keys(500), iterations=0, seed=1)
    assert one.centroids.tobytes() == again.centroids.tobytes() != other.centroids.tobytes()


def test_probes_are_the_nearest_centroids_in_order() -> None:
    x, _ = blobs(50, 6, spread=2.0)
    centroids = spherical_kmeans(x, 6, keys=keys(50)).centroids
    labels, cosines = assign(x, centroids, probes=3)
    full = x @ centroids.T
    assert (labels == np.argsort(-full, axis=1)[:, :3]).all()
    np.testing.assert_allclose(cosines, -np.sort(-full, axis=1)[:, :3], atol=1e-6)


def test_spacing_is_the_mean_distance_to_the_nearest_others() -> None:
    c = unit(np.random.default_rng(0).normal(size=(9, 5)))
    truth = [np.mean(sorted(1 - float(a @ b) for j, b in enumerate(c) if j != i)[:4]) for i, a in enumerate(c)]
    np.testing.assert_allclose(spacing(c, 4), truth, atol=1e-6)
    assert spacing(c[:1]).tolist() == [1.0] and spacing(c[:2], 20).shape == (2,)


# Shares of a budget.


def test_golden_shares() -> None:
    """P = (.5, .3, .2), N = 10, at least 1, at most (3, 9, 9): 3, 4, 3."""
    found = box_simplex(10 * np.array([0.5, 0.3, 0.2]), np.ones(3), np.array([3, 9, 9]), 10)
    assert found.tolist() == [3, 4, 3] and whole(found, 10).tolist() == [3, 4, 3]


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 12))
    low = rng.integers(0, 5, k).astype(float)
    high = low + rng.integers(0, 20, k)
    total = float(np.round(low.sum() + rng.uniform() * (high.sum() - low.sum())))
    return total * rng.dirichlet(np.ones(k)), low, high, total


@pytest.mark.parametrize("seed", range(40))
def test_t_c6_the_projection_is_optimal(seed: int) -> None:
    """T-c6, the conditions of Karush, Kuhn and Tucker: x - NP is nu inside, above nu at l, below nu at n."""
    wanted, low, high, total = problem(seed)
    x = box_simplex(wanted, low, high, total)
    assert abs(x.sum() - total) < 1e-9 * max(1, total) and (x >= low).all() and (x <= high).all()
    gap = x - wanted
    inside = (x > low + 1e-9) & (x < high - 1e-9)
    at_low, at_high = (x <= low + 1e-9) & ~(low == high), (x >= high - 1e-9) & ~(low == high)
    nu = gap[inside].mean() if inside.any() else (gap[at_high].max(initial=-1e9) + gap[at_low].min(initial=1e9)) / 2
    np.testing.assert_allclose(gap[inside], nu, atol=1e-8)
    assert (gap[at_low] >= nu - 1e-8).all() and (gap[at_high] <= nu + 1e-8).all()
    counts = whole(x, int(total))
    assert counts.sum() == int(total) and (counts >= low).all() and (counts <= high).all()
    assert (np.abs(counts - x) < 1).all()


def test_no_feasible_moves_are_better() -> None:
    """Brute force over whole numbers: none is nearer to NP than the rounded projection by more than rounding costs."""
    wanted, low, high, total = np.array([4.2, 1.1, 6.7]), np.array([1, 2, 0.0]), np.array([3, 9, 5.0]), 12
    x = box_simplex(wanted, low, high, total)
    every = [(a, b, total - a - b) for a in range(1, 4) for b in range(2, 10) if 0 <= total - a - b <= 5]
    best = min(((np.array(e) - wanted) ** 2).sum() for e in every)
    assert ((x - wanted) ** 2).sum() <= best <= ((whole(x, total) - wanted) ** 2).sum() + 1e-9


def test_shares_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="no shares add up to 10"):
        box_simplex(np.ones(2), np.zeros(2), np.array([3, 4]), 10)
    with pytest.raises(InputError, match="the lowest add up to 12"):
        box_simplex(np.ones(2), np.array([6, 6]), np.array([9, 9]), 10)


def test_remainders() -> None:
    assert whole(np.array([0.4, 0.4, 0.2]), 1).tolist() == [1, 0, 0]
    assert whole(np.array([10 / 3] * 3), 10).tolist() == [4, 3, 3]
    assert whole(np.array([2.9999999999, 4.0, 3.0]), 10).tolist() == [3, 4, 3]
