"""Word overlap with the target."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, NonNegative, Scorer, Targets, target_columns

_WORD = re.compile(r"\w+")


class BM25(Scorer):
    """BM25 of each pool example, as a document, for the target's examples as queries.

    Formula: s_i = mean or max over q of sum_{t in q} idf_t tf_ti (k1+1) / (tf_ti + k1 (1 - b + b len_i / mean len)),
        idf_t = ln(1 + (N - df_t + .5) / (df_t + .5))
    Reference: Robertson & Zaragoza 2009, doi:10.1561/1500000019; idf as in Lucene
    Note: words are runs of letters, digits and underscores in lower case; statistics are those of the whole pool;
        targets = 'each' gives a column for each target example
    """

    k1: NonNegative = 1.5
    b: float = 0.75
    reduce: Literal["mean", "max"] = "mean"
    targets: Targets = "mean"

    unit: ClassVar[str] = "BM25 score"

    def init(self, context: Context) -> Any:
        if self.targets == "each" and self.reduce != "mean":
            raise InputError(
                f"bm25: reduce = {self.reduce!r} has no effect", why="targets = 'each' keeps every target example",
                fix="leave it out",
            )  # fmt: skip
        queries = [Counter(_WORD.findall(t.lower())) for t in context.target.column("text")]
        words = sorted({w for q in queries for w in q})
        index = {w: i for i, w in enumerate(words)}
        weights = np.zeros((len(words), len(queries)))
        for column, query in enumerate(queries):
            for word, count in query.items():
                weights[index[word], column] = count
        seen, total = np.zeros(len(words)), 0
        for shard in context.pool.shards(4096):
            for text in shard.column("text"):
                found = _WORD.findall(text.lower())
                total += len(found)
                seen[[index[w] for w in set(found) if w in index]] += 1
        count = len(context.pool)
        idf = np.log1p((count - seen + 0.5) / (seen + 0.5))
        matrix = idf[:, None] * weights
        if self.reduce == "mean" and self.targets == "mean":
            matrix = matrix.mean(axis=1, keepdims=True)
        return index, matrix, total / count or math.nan, target_columns(context, self.targets)

    def columns(self, state: Any) -> tuple[str, ...]:
        return state[3]

    def score(self, state: Any, batch: Batch) -> Any:
        index, matrix, mean_length, columns = state
        scores = np.zeros((len(batch.ids), len(columns)))
        for row, text in enumerate(batch.column("text")):
            words = _WORD.findall(text.lower())
            counts = Counter(index[w] for w in words if w in index)
            tf = np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
            norm = self.k1 * (1 - self.b + self.b * len(words) / mean_length)
            # (k1 + 1) is dropped by Lucene and kept here, as in the paper; it scales all scores alike.
            terms = tf * (self.k1 + 1) / (tf + norm)
            if len(counts):
                found = terms @ matrix[np.fromiter(counts, dtype=np.int64, count=len(counts))]
                scores[row] = found.max() if self.targets == "mean" else found
        return scores
