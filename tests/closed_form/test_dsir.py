"""DSIR's weights by hand and by a slow loop, and the law of what is drawn by them."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.core.keys import encode_ids
from assay.core.method import Scorer, Selector, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Budget
from assay.core.table import Table
from assay.measure import Measurer
from assay.numerics.stats import spearman
from assay.scorers.dsir import _Ratios

WORDS = [f"w{k}" for k in range(40)]


def measured(out: Path, pool: list[str], target: list[str], **fields: Any) -> Table:
    run = Run.open(out, {"name": "dsir"})
    run.close()
    at = Measurer(run, Pool.from_columns({"text": pool}), Pool.from_columns({"text": target}))
    return at.table(make(Scorer, {"name": "dsir", **fields}))


def test_weights_by_hand(tmp_path: Path) -> None:
    """Unigrams in so many buckets that none collide: target a a b, pool a b | b b c; smoothing 1 over 1e6 buckets."""
    found = measured(tmp_path, ["a b", "b b c"], ["A, a b"], ngrams=1, buckets=1_000_003)
    d = math.log(5 + 1_000_003) - math.log(4 + 1_000_003)  # the pool has five words, the target four
    a, b, c = math.log(3 / 2) + d, math.log(2 / 4) + d, math.log(1 / 2) + d
    np.testing.assert_allclose(found.column("score"), [a + b, 2 * b + c], rtol=1e-9)
    np.testing.assert_allclose(found.column("mean"), [(a + b) / 2, (2 * b + c) / 3], rtol=1e-9)


def test_a_slow_loop_counts_the_same(tmp_path: Path) -> None:
    """Every n-gram of one to three words within its text, into few buckets; texts without a word weigh nothing."""
    rng = np.random.default_rng(0)
    make_text = lambda: " ".join(rng.choice([*WORDS, "!?", "Don't"], rng.integers(1, 12)))  # noqa: E731
    pool, target = [make_text() for _ in range(40)] + ["   ", "w1"], [make_text() for _ in range(7)]
    one = _Ratios(3, np.zeros(50))

    def bucket(gram: tuple[str, ...]) -> int:
        """The last n-gram of a text that is this n-gram alone."""
        return int(list(one.read([" ".join(gram)]))[len(gram) - 1][0][0])

    def grams(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        return [tuple(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)]

    def share(texts: list[str]) -> np.ndarray:
        counts = Counter(bucket(g) for t in texts for g in grams(t))
        full = np.array([counts[j] + 0.5 for j in range(50)])
        return full / full.sum()

    ratio = np.log(share(target)) - np.log(share(pool))
    found = measured(tmp_path, pool, target, ngrams=3, buckets=50, smoothing=0.5)
    truth = np.array([sum(ratio[bucket(g)] for g in grams(t)) for t in pool])
    np.testing.assert_allclose(found.column("score"), truth, atol=1e-9)
    assert found.column("score")[40] == 0 == found.column("mean")[40]


def test_batch_and_order_change_no_bit() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(50)]
    scorer, state = make(Scorer, "dsir"), _Ratios(2, rng.normal(size=10_000))

    class Some:
        def __init__(self, rows: list[int]) -> None:
            self.ids, self.rows = np.array(rows), rows

        def column(self, name: str) -> list[str]:
            return [texts[r] for r in self.rows]

    whole = scorer.score(state, Some(list(range(50))))  # type: ignore[arg-type]
    for rows in ([7], [49, 3, 20], list(range(49, -1, -1))):
        assert (scorer.score(state, Some(rows)) == whole[rows]).all()  # type: ignore[arg-type]


def test_weights_are_the_likelihood_ratio_of_two_unigram_models(tmp_path: Path) -> None:
    """With many texts the log weight tends to log p(x) - log q(x) of the models that drew target and pool."""
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.full(40, 2.0)), rng.dirichlet(np.full(40, 2.0))
    draw = lambda n, shares: [rng.choice(40, 25, p=shares) for _ in range(n)]  # noqa: E731
    text = lambda rows: [" ".join(WORDS[k] for k in r) for r in rows]  # noqa: E731
    pool, target = draw(1500, q), draw(1500, p)
    found = measured(tmp_path, text(pool), text(target), ngrams=1, buckets=100_003, smoothing=0.01).column("score")
    truth = np.array([np.log(p[r]).sum() - np.log(q[r]).sum() for r in pool])
    assert spearman(found, truth) > 0.995
    assert np.abs(found - truth).mean() < 0.05 * truth.std()


def draws(weights: np.ndarray, k: int, times: int, **fields: Any) -> list[tuple[int, ...]]:
    """Which examples `cut` takes, in order, by seed."""
    table = Table(encode_ids([f"{i:02}" for i in range(len(weights))]), ("score",), weights[:, None])
    ones, found = np.ones(len(weights), dtype=np.int64), []
    for seed in range(times):
        cut = make(Selector, {"name": "cut", "temperature": 1.0, "standardise": False, "seed": seed, **fields})
        found.append(tuple(int(i) for i in cut.select(table, ones, Budget(k, "examples"), barred={}).ids.tolist()))
    return found


def test_t_h1_inclusion_and_order_are_those_of_weights_drawn_without_replacement() -> None:
    """T-h1: log weights (2, 0, -2), k = 2: inclusion .9960, .8827, .1213 within 3 sd, without any standardisation; and
    each ordered pair has its Plackett-Luce probability (chi-square at 1 in a thousand)."""
    scores, times = np.array([2.0, 0.0, -2.0]), 3000
    found = draws(scores, 2, times)
    shares = np.array([sum(i in f for f in found) for i in range(3)]) / times
    truth = np.array([0.9960, 0.8827, 0.1213])
    assert (np.abs(shares - truth) < 3 * np.sqrt(truth * (1 - truth) / times)).all()
    w = np.exp(scores)
    expected = {(i, j): w[i] / w.sum() * w[j] / (w.sum() - w[i]) for i, j in itertools.permutations(range(3), 2)}
    counts = Counter(found)
    chi = sum((counts[pair] - times * p) ** 2 / (times * p) for pair, p in expected.items())
    assert chi < 20.5  # 5 degrees of freedom


def test_t_h1_first_pick_has_the_weights_that_dsir_gave(tmp_path: Path) -> None:
    """DSIR's sampling law: P(first = i) = exp(score_i) / sum_j exp(score_j), whatever constant is added."""
    pool, target = ["a a b", "a b b", "b c", "c c c", "a"], ["a a", "a b"]
    weights = measured(tmp_path, pool, target, ngrams=1).column("score")
    p, times = np.exp(weights) / np.exp(weights).sum(), 3000
    for shift in (0.0, -700.0):
        first = np.bincount([f[0] for f in draws(weights + shift, 1, times)], minlength=5) / times
        assert (np.abs(first - p) < 3.5 * np.sqrt(p * (1 - p) / times)).all()


@pytest.mark.parametrize(("temperature", "kind"), [(1e-9, "top"), (1e9, "uniform")])
def test_t_h1_cold_is_top_k_and_hot_is_uniform(temperature: float, kind: str) -> None:
    weights = np.random.default_rng(0).normal(size=10) * 30
    found = draws(weights, 3, 600, temperature=temperature)
    if kind == "top":
        assert set(found) == {tuple(np.argsort(-weights)[:3].tolist())}
    else:
        counts = np.bincount([i for f in found for i in f], minlength=10) / 600
        assert (np.abs(counts - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 600)).all()
