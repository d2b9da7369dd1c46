"""Distance to the nearest prototype: the centroid of the example's cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from assay.core.keys import hash_ids
from assay.core.method import Batch, Context, Count, Featurizer, Scorer
from assay.core.table import sorted_units

Clusters = Annotated[int, pydantic.Field(ge=0)]


@dataclass(frozen=True)
class _State:
    centroids: np.ndarray
    apart: np.ndarray


class Prototypes(Scorer):
    """How far an example is from the nearest of the pool's prototypes, the centroids of its clusters.

    Formula: s_i = 1 - max over c of <x_i, mu_c> / |x_i| for keep = 'hard', minus that for 'easy'
    Reference: Sorscher et al. 2022, arXiv:2206.14486 (self-supervised prototypes)
    Note: centroids are those of spherical k-means, one for every 1000 examples unless `clusters` names a number. The
        hard ones are worth more the more data there is, and contain outliers and duplicates: dedup first. Columns
        `cluster`, `distance` (1 - cos to the centroid) and `spacing` (mean distance of the centroid to its 20 nearest)
        are what the selector `density` takes. Not a measure of utility
    """

    features: Featurizer = "embed"  # type: ignore[assignment]
    keep: Literal["hard", "easy"] = "hard"
    clusters: Clusters = 0
    iterations: Count = 20
    seed: int = 0

    unit: ClassVar[str] = "1 - cosine"

    def init(self, context: Context) -> _State:
        from assay.numerics.cluster import spacing, spherical_kmeans

        ids, x = sorted_units(context.table(self.features))
        count, keys = self.clusters or -(-len(ids) // 1000), hash_ids(ids, "cluster")
        made = spherical_kmeans(x, count, keys=keys, iterations=self.iterations, seed=self.seed)
        context.spent(2.0 * x.size * len(made.centroids) * (len(made.inertia) + 1))
        context.note(
            "prototypes", f"{len(made.centroids):,} clusters, mean distance to the centroid {made.inertia[-1]:.4f}",
            clusters=len(made.centroids), inertia=made.inertia[-1],
        )  # fmt: skip
        return _State(made.centroids, spacing(made.centroids))

    def columns(self, state: _State) -> tuple[str, ...]:
        return "score", "cluster", "distance", "spacing"

    def score(self, state: _State, batch: Batch) -> Any:
        from assay.core.table import unit_rows
        from assay.numerics.cluster import assign

        labels, cosines = assign(unit_rows(batch.table(self.features).astype(np.float32))[0], state.centroids)
        distance = 1 - cosines[:, 0].astype(np.float64)
        score = distance if self.keep == "hard" else -distance
        return np.stack([score, labels[:, 0], distance, state.apart[labels[:, 0]]], axis=1)
