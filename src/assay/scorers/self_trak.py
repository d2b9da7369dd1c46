"""Self-influence by TRAK: for models of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Featurizer, NonNegative, Scorer


@dataclass(frozen=True)
class _State:
    factors: list[tuple[Featurizer, np.ndarray]]
    """Features of each scoring model, and the factor of the pool's second moments."""
    losses: list[Scorer]


class SelfTrak(Scorer):
    """Minus the TRAK score of an example for itself: wrongly labelled and odd examples come last.

    Formula: s_i = -phi_i^T (Phi^T Phi + damping tr(Phi^T Phi)/p I)^-1 phi_i Q_i; output 'loss': Q = 1; 'margin': Q =
        1-p; Q and the rest are averaged over models separately
    Reference: Park et al. 2023, arXiv:2303.14186; self-influence as in Koh & Liang 2017, arXiv:1703.04730, sec. 5.4
    Note: a diagnostic, not a utility; `self_influence` factorises the curvature of all weights, this one that of
        projected gradients: for wrong labels take output = 'margin' with features = {name = "gradients", measure =
        "margin"}, and several scoring models. It is minus what `trak` gives the example as a target only where that has
        unit_length = false and weighted = false, which are not its defaults
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]
    damping: NonNegative = 0.1
    output: Literal["loss", "margin"] = "loss"
    losses: Scorer = "loss"  # type: ignore[assignment]

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "arbitrary (minus the leverage of the linearised model)"
    measures_utility: ClassVar[bool] = False

    def init(self, context: Context) -> _State:
        from assay.numerics.trak import damped, gram, whitener

        if self.output == "margin" and getattr(self.features, "measure", "margin") != "margin":
            raise InputError(
                "self_trak: output = 'margin' needs gradients of the margin",
                why=f"features are {self.features.spec()}",
                fix='features = {name = "gradients", measure = "margin"}',
            )
        factors, losses = [], context.members(self.losses) if self.output == "margin" else []
        for member in context.members(self.features):
            table = context.table(member)
            matrix = gram(table.shards(), len(table.columns))
            context.spent(2 * len(table) * len(matrix) ** 2)
            factors.append((member, whitener(self.name, damped(matrix, self.damping))))
        for member in losses:
            context.table(member)
        return _State(factors, losses)

    def score(self, state: _State, batch: Batch) -> Any:
        from assay.numerics.trak import whitened

        parts = (np.square(whitened(factor, batch.table(m))).sum(axis=1) for m, factor in state.factors)
        total = sum(parts) / len(state.factors)
        if state.losses:
            total = total * np.mean([1 - np.exp(batch.table(m)[:, 0]) for m in state.losses], axis=0)
        return -total
