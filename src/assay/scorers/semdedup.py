"""Semantic deduplication: too like an earlier example of its cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from assay.core.keys import hash_ids
from assay.core.method import Batch, Bounds, Context, Count, Featurizer, NonNegative, Scorer
from assay.core.table import sorted_units

Clusters = Annotated[int, pydantic.Field(ge=0)]


@dataclass(frozen=True)
class _State:
    ids: np.ndarray
    """In their own order."""
    found: np.ndarray
    """The columns of each, `[n, c]`."""


class SemDedup(Scorer):
    """Distance to the most similar earlier example of the same cluster: near 0 for what says the same again.

    Formula: s_j = 1 - M_j, M_j = max over i before j in the same cluster of cos(x_i, x_j); -1 where M_j >= 1 - 1e-6
        (a copy), 2 where nothing stands before j; j is dropped iff s_j < eps
    Reference: Abbas et al. 2023, arXiv:2303.09540
    Note: clusters are those of spherical k-means, one for every 1000 examples unless `clusters` names a number; keep =
        'hard' goes from the farthest from the centroid to the nearest, 'easy' the other way, 'random' by a hash of the
        id. rule = 'reference' compares with all earlier examples, as the paper's code does: of a chain a ~ b ~ c it
        drops b and c, even if a and c are unlike; its scores may be cut anew at any eps, and a larger one drops more.
        rule = 'greedy' compares with those kept at the option `eps`, so cut its scores there alone; it keeps more, but
        not always fewer at a larger eps. The other rule's score is a column, and counts of both are among the checks.
        Mean hidden states of a small decoder all point the same way: an eps that suits an encoder drops nearly all,
        and a warning says so; take `encoder`, `minilm` or a `column` of embeddings.
        Duplicates on two sides of a border between clusters are not compared unless probes = 2 (each example also
        belongs to its second nearest cluster). Columns for the selector `density`: `cluster`; `distance`, 1 - cos to
        the centroid; `spacing`, mean distance of the centroid to its 20 nearest. Column `group` numbers the groups at
        the option `eps`, of which one example stays each, -1 without any: as a filter after others, the best that
        those left stays, also where the others are like the lost one alone. Not a measure of utility
    """

    features: Featurizer = "embed"  # type: ignore[assignment]
    eps: NonNegative = 0.05
    rule: Literal["reference", "greedy"] = "reference"
    keep: Literal["hard", "easy", "random"] = "hard"
    clusters: Clusters = 0
    probes: Count = 1
    iterations: Count = 20
    seed: int = 0

    unit: ClassVar[str] = "1 - cosine"
    group: ClassVar[str] = "group"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"near": {"score": (self.eps, None)}}

    @property
    def _rules(self) -> tuple[str, str]:
        return ("reference", "greedy") if self.rule == "reference" else ("greedy", "reference")

    def init(self, context: Context) -> _State:
        from assay.numerics.cluster import assign, spacing, spherical_kmeans
        from assay.numerics.redundancy import Earlier, distances, redundant

        ids, x = sorted_units(context.table(self.features))
        mean = x.mean(axis=0, dtype=np.float64)
        if mean @ mean > 1 - self.eps:
            context.warn(
                f"semdedup: two examples at random have cosine {mean @ mean:.3f}, so eps = {self.eps:g} drops most of "
                "them; take features that tell examples apart, such as encoder or minilm"
            )
        keys = hash_ids(ids, "cluster")
        count = self.clusters or -(-len(ids) // 1000)
        made = spherical_kmeans(x, count, keys=keys, iterations=self.iterations, seed=self.seed)
        labels, cosines = assign(x, made.centroids, self.probes)
        before = {"hard": cosines[:, 0], "easy": -cosines[:, 0], "random": np.zeros(len(ids))}[self.keep]
        rank = np.empty(len(ids), dtype=np.int64)
        rank[np.lexsort((hash_ids(ids, "tie", self.seed), before))] = np.arange(len(ids))
        pairs = Earlier(x, labels, rank, self.eps)
        products = len(ids) * len(made.centroids) * (len(made.inertia) + 1) + pairs.pairs
        context.spent(2.0 * products * x.shape[1])
        self._tell(context, pairs, labels[:, 0], redundant)

        scores = [distances(getattr(pairs, rule)) for rule in self._rules]
        first = pairs.groups(self.rule)
        group = np.where(np.bincount(first, minlength=len(ids))[first] > 1, first, -1)
        apart, distance = spacing(made.centroids)[labels[:, 0]], 1 - cosines[:, 0].astype(np.float64)
        return _State(ids, np.stack([*scores, labels[:, 0], distance, apart, group], axis=1))

    def _tell(self, context: Context, pairs: Any, labels: np.ndarray, redundant: Any) -> None:
        gone: dict[str, Any] = {n: int(redundant(getattr(pairs, n), self.eps).sum()) for n in ("reference", "greedy")}
        sizes = np.bincount(labels)
        context.note(
            "semantic duplicates",
            f"at eps = {self.eps:g} the rule 'reference' drops {gone['reference']:,} of {len(labels):,} examples, "
            f"'greedy' {gone['greedy']:,}; {np.count_nonzero(sizes):,} clusters, the largest of {sizes.max():,}",
            eps=self.eps, **gone, clusters=int(np.count_nonzero(sizes)), largest=int(sizes.max()),
        )  # fmt: skip

    def columns(self, state: _State) -> tuple[str, ...]:
        return "score", self._rules[1], "cluster", "distance", "spacing", "group"

    def score(self, state: _State, batch: Batch) -> Any:
        return state.found[np.searchsorted(state.ids, batch.ids)]
