"""Importance of a text: how much more often its words stand in the target than in the pool."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import xxhash

from assay.core.method import Batch, Context, Count, Positive, Scorer

_WORD = re.compile(r"\w+|[^\w\s]+")
# Words whose hashes are kept at hand while texts are read: beyond these, all are hashed anew.
KNOWN = 500_000
_STEP = np.uint64(0x9E3779B97F4A7C15)


class DSIR(Scorer):
    """Importance weight of a text: its probability under the target's bag of hashed n-grams over that under the pool's.

    Formula: score_i = sum over n-grams g of x_i of log p_target(h(g)) - log p_pool(h(g)), h into `buckets`;
        p(j) = (n_j + smoothing) / (sum_k n_k + buckets smoothing); mean_i = score_i / n-grams of x_i
    Reference: Xie et al. 2023, arXiv:2302.03169
    Note: a log weight, so the paper's resampling is select = {name = "cut", temperature = 1, standardise = false}:
        drawn without replacement in proportion to the weights. It is a sum: long texts have the largest weights of
        either sign, which is the paper's law; column `mean` does without. Words are runs of letters and digits, and
        runs of punctuation, in lower case; n-grams are those of 1 to `ngrams` words; the pool's counts are of a keyed
        sample
    """

    ngrams: Count = 2
    buckets: Count = 10_000
    smoothing: Positive = 1.0
    sample: Count = 200_000
    seed: int = 0

    unit: ClassVar[str] = "nats"

    def columns(self, state: Any) -> tuple[str, ...]:
        return "score", "mean"

    def init(self, context: Context) -> _Ratios:
        from assay.core.keys import shuffled

        rows = np.sort(shuffled(context.pool.ids, "dsir", self.seed)[: self.sample])
        sides = []
        for pool in (context.target, context.pool.at(rows)):
            counts, reader = np.zeros(self.buckets), _Ratios(self.ngrams, np.zeros(self.buckets))
            for shard in pool.shards(4096):
                for buckets, _ in reader.read(shard.column("text")):
                    counts += np.bincount(buckets, minlength=self.buckets)
            sides.append(np.log(counts + self.smoothing) - np.log(counts.sum() + self.buckets * self.smoothing))
        return _Ratios(self.ngrams, sides[0] - sides[1])

    def score(self, state: _Ratios, batch: Batch) -> Any:
        texts = batch.column("text")
        totals, counts = np.zeros(len(texts)), np.zeros(len(texts))
        for buckets, rows in state.read(texts):
            totals += np.bincount(rows, state.log_ratio[buckets], minlength=len(texts))
            counts += np.bincount(rows, minlength=len(texts))
        return np.stack([totals, totals / np.maximum(counts, 1)], axis=1)


@dataclass(frozen=True)
class _Ratios:
    """log p_target - log p_pool of each bucket; and how texts are read."""

    ngrams: int
    log_ratio: np.ndarray
    _known: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"ngrams": self.ngrams, "log_ratio": self.log_ratio, "_known": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def read(self, texts: list[str]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """For n-grams of 1, 2, ... words: the bucket of each, and the text that it stands in."""
        from assay.numerics.project import splitmix64

        words = [_WORD.findall(t.lower()) for t in texts]
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        hashes = self._hashes(words, int(lengths.sum()))
        rows = np.repeat(np.arange(len(texts)), lengths)
        key = hashes
        for n in range(1, self.ngrams + 1):
            if n > 1:
                # An n-gram is a hash of the one before it and of the next word, where both are of one text.
                with np.errstate(over="ignore"):
                    key = splitmix64(key[:-1] * _STEP + hashes[n - 1 :])
            here = rows[: len(key)] == rows[n - 1 :]
            yield (key[here] % np.uint64(len(self.log_ratio))).astype(np.int64), rows[: len(key)][here]

    def _hashes(self, words: list[list[str]], count: int) -> np.ndarray:
        """A 64-bit hash of each word, end to end."""
        known, flat = self._known, chain.from_iterable
        if len(known) > KNOWN:
            known.clear()
        for word in set(flat(words)).difference(known):
            known[word] = xxhash.xxh3_64_intdigest(word.encode())
        return np.fromiter(map(known.__getitem__, flat(words)), dtype=np.uint64, count=count)
