"""TrackStar: cosine of gradients, whitened by what the target's and the pool's have in common."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic

from assay.core.method import Batch, Context, Cost, Count, Featurizer, NonNegative, Scorer, Targets, target_columns
from assay.core.table import unit_rows

Share = Annotated[float, pydantic.Field(ge=0, le=1)]


@dataclass(frozen=True)
class _State:
    columns: tuple[str, ...]
    models: list[tuple[Featurizer, np.ndarray, np.ndarray]]
    """Features of each model, the factor of its R, and the target's whitened unit rows `[c, d]`."""


class TrackStar(Scorer):
    """Mean cosine of gradients in units of the second moments of the optimiser, and of the gradients themselves.

    Formula: s_i = mean over q of cos(R^(-1/2) phi_q, R^(-1/2) phi_i), phi = P_o (grad / sqrt(v_hat)) P_i^T by layer,
        R = mix mean_q(phi phi^T) + (1 - mix) mean_i(phi phi^T) + damping tr(.)/p I
    Reference: Chang et al. 2024, arXiv:2410.17413
    Note: mix, unless given, is a / (a + b) with a and b the k-th largest eigenvalues of the pool's and of the target's
        second moments, so that the two are equal at the k-th; k = `crossing`, or half of the examples or features of
        either where they are fewer. R is one matrix over all layers. A scoring model without second moments takes
        features = "gradients". Embeddings and norms may drown the rest: `layers` = 'linear' of its features leaves
        them out, and foretold a small decoder's retraining better (docs/influence.md). `queries`: features of the
        target where they are other than the pool's; targets = 'each' gives a column for each target example; every =
        true averages over every mark of the training runs
    """

    features: Featurizer = dataclasses.field(  # type: ignore[assignment]
        default_factory=lambda: {"name": "gradients", "metric": "adafactor", "exponent": 0.5}
    )
    queries: Featurizer | None = None
    targets: Targets = "mean"
    mix: Share | None = None
    crossing: Count = 1000
    damping: NonNegative = 1.0
    every: bool = False

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "cosine"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        from assay.numerics.trak import damped, gram, whitened, whitener

        models, mixes = [], []
        members = context.members(self.features, self.every)
        for own, other in zip(members, context.members(self.queries or self.features, self.every), strict=True):
            table, asked = context.table(own), context.target_table(other).values
            size = len(table.columns)
            # In float64: the small directions, which R makes large, are differences of large ones.
            pool, target = (
                gram((block.astype(np.float64) for block in blocks), size) / count
                for blocks, count in ((table.shards(), len(table)), ([asked], len(asked)))
            )
            context.spent(2 * (len(table) + len(asked)) * size**2)
            mix = self._mix(pool, target, min(len(table), len(asked))) if self.mix is None else self.mix
            mixes.append(mix)
            factor = whitener(self.name, damped(mix * target + (1 - mix) * pool, self.damping))
            rows = unit_rows(whitened(factor, asked))[0]
            kept = rows if self.targets == "each" else rows.mean(axis=0, keepdims=True)
            models.append((own, factor, own.sense * other.sense * kept))
        shares = ", ".join(f"{m:.3f}" for m in mixes)
        context.note("share of the target in R", f"{shares} of the models", mix=mixes)
        return _State(target_columns(context, self.targets), models)

    def _mix(self, pool: np.ndarray, target: np.ndarray, fewest: int) -> float:
        k = max(1, min(self.crossing, len(pool) // 2, fewest // 2))
        own, asked = (float(np.linalg.eigvalsh(matrix)[-k]) for matrix in (pool, target))
        return max(own, 0.0) / (max(own, 0.0) + max(asked, 0.0) or 1.0)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        from assay.numerics.trak import whitened

        rows = ((unit_rows(whitened(factor, batch.table(m)))[0], kept) for m, factor, kept in state.models)
        return sum(unit @ kept.T for unit, kept in rows) / len(state.models)
