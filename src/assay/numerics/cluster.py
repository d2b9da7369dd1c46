"""Spherical k-means: unit vectors to the centroids that they point along. One thread, numpy, seeds by counter.

Results depend on the rows, their order, their keys and the seed, and on nothing else. Callers give rows in the order of
their ids, so that the order of a pool does not matter. Legend: n rows, d numbers of each, k centroids, p probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from assay.numerics.project import splitmix64

# Rows of one product with all centroids, and rows for each centroid among which first centroids are looked for.
BLOCK, CANDIDATES = 4096, 16


@dataclass(frozen=True)
class Clusters:
    """`centroids` `[k, d]` of length 1, fewer than were asked for where rows are fewer or alike; `inertia`: mean over
    the rows of 1 - cos to their centroid, before each move of the centroids, and last."""

    centroids: np.ndarray
    inertia: tuple[float, ...]


def uniforms(seed: int, step: int, count: int) -> np.ndarray:
    """Numbers in (0, 1): of the seed and the step, and of nothing else."""
    salt = splitmix64(splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)) ^ np.uint64(step))
    drawn = splitmix64(salt ^ splitmix64(np.arange(count, dtype=np.uint64)))
    return ((drawn >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def spherical_kmeans(
    x_nd: np.ndarray, count: int, *, keys: np.ndarray, iterations: int = 20, seed: int = 0
) -> Clusters:
    """Centroids that maximise sum_i <x_i, c(i)>, by Lloyd's algorithm from k-means++ (Hornik et al. 2012).

    `x_nd` are unit rows (zero rows belong anywhere), `keys` `[n]` uint64 hashes of their ids. The first centroids are
    chosen among a keyed sample of 16 rows for each. A centroid that loses its last row moves to the row that is
    farthest from its own. Stops when no row changes its centroid.
    """
    centroids = _first(x_nd, count, keys, seed)
    labels, cosines = assign(x_nd, centroids)
    inertia = [float(1 - cosines.mean(dtype=np.float64))]
    for _ in range(iterations):
        centroids = _moved(x_nd, centroids, labels[:, 0], cosines[:, 0], keys)
        before = labels
        labels, cosines = assign(x_nd, centroids)
        inertia.append(float(1 - cosines.mean(dtype=np.float64)))
        if (labels == before).all():
            break
    return Clusters(centroids, tuple(inertia))


def _first(x_nd: np.ndarray, count: int, keys: np.ndarray, seed: int) -> np.ndarray:
    """k-means++: each next centroid is a row drawn with probability proportional to 1 - cos to the nearest so far; of
    a few such draws, the one that leaves the smallest sum of them."""
    salted = splitmix64(keys ^ splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)))
    sample = x_nd[np.sort(np.lexsort((keys, salted))[: CANDIDATES * count])]
    trials, chosen = 2 + int(np.log(count)), []
    distance = np.full(len(sample), 2.0)
    for step in range(min(count, len(sample))):
        mass = np.cumsum(distance)
        if not mass[-1] > 1e-6:  # all rows of the sample are centroids already
            break
        at = np.searchsorted(mass, uniforms(seed, step, trials) * mass[-1], side="right")
        drawn = sample[np.minimum(at, len(sample) - 1)]
        left = np.minimum(distance[:, None], np.clip(1 - sample @ drawn.T, 0, 2))
        best = int(left.sum(axis=0, dtype=np.float64).argmin())
        distance = np.where(left[:, best] < 1e-6, 0.0, left[:, best])
        chosen.append(drawn[best])
    return np.array(chosen)


def _moved(
    x_nd: np.ndarray, centroids: np.ndarray, labels: np.ndarray, cosines: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """The directions of the sums of the centroids' rows; a sum of zero leaves its centroid where it was."""
    from scipy.sparse import csr_array

    n, k = len(x_nd), len(centroids)
    members = csr_array((np.ones(n, dtype=x_nd.dtype), (labels, np.arange(n))), shape=(k, n))
    sums = members @ x_nd
    norms = np.sqrt(np.einsum("kd,kd->k", sums, sums, dtype=np.float64))
    fine = norms > 1e-12
    moved = np.where(fine[:, None], sums / np.where(fine, norms, 1.0).astype(sums.dtype)[:, None], centroids)
    empty = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
    if len(empty):
        moved[empty] = x_nd[np.lexsort((keys, cosines))[: len(empty)]]
    return moved.astype(x_nd.dtype)


def assign(x_nd: np.ndarray, centroids: np.ndarray, probes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and cosines of each row's nearest centroids, `[n, p]` twice, the nearest first; of equals the lower."""
    n, probes = len(x_nd), min(probes, len(centroids))
    labels, cosines = np.zeros((n, probes), dtype=np.int64), np.zeros((n, probes), dtype=x_nd.dtype)
    for start in range(0, n, BLOCK):
        found = x_nd[start : start + BLOCK] @ centroids.T
        if probes == 1:
            best = found.argmax(axis=1)[:, None]
        else:
            best = np.argsort(-found, axis=1, kind="stable")[:, :probes]
        labels[start : start + BLOCK] = best
        cosines[start : start + BLOCK] = np.take_along_axis(found, best, axis=1)
    return labels, np.clip(cosines, -1, 1)


def spacing(centroids: np.ndarray, nearest: int = 20) -> np.ndarray:
    """Mean of 1 - cos from each centroid to the `nearest` others, `[k]`; 1 for one that is alone."""
    k = len(centroids)
    found, others = np.ones(k), min(nearest, k - 1)
    for start in range(0, k if others else 0, BLOCK):
        cosines = centroids[start : start + BLOCK] @ centroids.T
        cosines[np.arange(len(cosines)), start + np.arange(len(cosines))] = -np.inf
        close = -np.partition(-cosines, others - 1, axis=1)[:, :others]
        found[start : start + BLOCK] = 1 - np.clip(close, -1, 1).mean(axis=1, dtype=np.float64)
    return found
