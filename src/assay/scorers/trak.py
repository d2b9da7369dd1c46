"""TRAK: the Newton step of a linearised model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Featurizer, NonNegative, Scorer, Targets, target_columns
from assay.core.table import unit_rows


@dataclass(frozen=True)
class _State:
    columns: tuple[str, ...]
    slopes: list[tuple[Featurizer, np.ndarray]]
    """Features of each model, and the target's `[c, d]` times the inverse of the pool's second moments."""
    losses: list[Scorer]


class Trak(Scorer):
    """TRAK: dot product of gradients in the metric of the pool's own gradients, averaged over scoring models.

    Formula: s_i = mean over q of phi_q^T (Phi^T R Phi + damping tr(Phi^T R Phi)/p I)^-1 phi_i Q_i;
        output 'loss': R = Q = 1; 'margin': R = p(1-p), Q = 1-p; Q and the rest are averaged over models separately
    Reference: Park et al. 2023, arXiv:2303.14186; without the per-model rescaling of the published code
    Note: unit_length scales every phi to length 1 first, which takes length and loss out of the score; it is for
        output 'loss' only. Features for 'margin' are {name = "gradients", measure = "margin"}; weighted = false takes
        R = 1, as the published code does. every = true averages over every mark of the scoring models' training too,
        which costs as many features. With projections = 'own' each model's features are projected by signs of their own
        (seed + 1, seed + 2, ...), so that the errors of projection average out as well; 'shared' reads what other
        methods read. `queries`: features of the target where they are other than the pool's; targets =
        'each' gives a column for each target example
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]
    queries: Featurizer | None = None
    targets: Targets = "mean"
    damping: NonNegative = 0.1
    unit_length: bool = True
    output: Literal["loss", "margin"] = "loss"
    weighted: bool = True
    every: bool = False
    projections: Literal["own", "shared"] = "own"
    losses: Scorer = "loss"  # type: ignore[assignment]

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "arbitrary (Newton step of the linearised model)"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        from assay.numerics.trak import inverted

        if self.output == "margin" and getattr(self.features, "measure", "margin") != "margin":
            raise InputError(
                "trak: output = 'margin' needs gradients of the margin",
                why=f"features are {self.features.spec()}",
                fix='features = {name = "gradients", measure = "margin"}',
            )
        members, asked = (
            self._projected(context.members(f, self.every)) for f in (self.features, self.queries or self.features)
        )
        losses = context.members(self.losses, self.every) if self.output == "margin" else []
        slopes = []
        for k, (own, other) in enumerate(zip(members, asked, strict=True)):
            table, weights = context.table(own), None
            if losses and self.weighted:
                p = np.exp(context.table(losses[k % len(losses)]).values[:, 0])
                weights = p * (1 - p)
            rows = self._scale(context.target_table(other).values).astype(np.float64)
            kept = rows if self.targets == "each" else rows.mean(axis=0, keepdims=True)
            shape, blocks = (len(table), len(table.columns)), map(self._scale, table.shards())
            found, flops = inverted(self.name, blocks, shape, self.damping, kept, weights)
            context.spent(flops)
            slopes.append((own, own.sense * other.sense * found))
        for member in losses:
            context.table(member)
        return _State(target_columns(context, self.targets), slopes, losses)

    def _projected(self, members: list[Featurizer]) -> list[Featurizer]:
        # Exact gradients know no seed, and stay those that others read.
        alike = self.projections == "shared" or getattr(members[0], "projection", "exact") == "exact"
        return members if alike else [replace(m, **{"seed": m.seed + k}) for k, m in enumerate(members)]  # type: ignore[attr-defined]

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def _scale(self, phi: np.ndarray) -> np.ndarray:
        return unit_rows(phi)[0] if self.unit_length and self.output == "loss" else phi

    def score(self, state: _State, batch: Batch) -> Any:
        parts = (self._scale(batch.table(m)).astype(np.float64) @ v.T for m, v in state.slopes)
        total = sum(parts) / len(state.slopes)
        if state.losses:
            total = total * np.mean([1 - np.exp(batch.table(m)[:, :1]) for m in state.losses], axis=0)
        return total
