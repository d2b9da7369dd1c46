"""TRAK: the Newton step of a linearised model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Featurizer, NonNegative, Scorer
from assay.core.table import Table, unit_rows

# Rows of one product in float32.
BLOCK = 1024


class Trak(Scorer):
    """TRAK: dot product of gradients in the metric of the pool's own gradients, averaged over scoring models.

    Formula: s_i = mean over q of phi_q^T (Phi^T R Phi + damping tr(Phi^T R Phi)/p I)^-1 phi_i Q_i;
        output 'loss': R = Q = 1; 'margin': R = p(1-p), Q = 1-p; Q and the rest are averaged over models separately
    Reference: Park et al. 2023, arXiv:2303.14186; without the per-model rescaling of the published code
    Note: unit_length scales every phi to length 1 first, which takes length and loss out of the score; it is for
        output 'loss' only. Features for 'margin' are {name = "gradients", measure = "margin"}
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]
    damping: NonNegative = 0.1
    unit_length: bool = True
    output: Literal["loss", "margin"] = "loss"
    losses: Scorer = "loss"  # type: ignore[assignment]

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "arbitrary (Newton step of the linearised model)"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> Any:
        if self.output == "margin" and getattr(self.features, "measure", "margin") != "margin":
            raise InputError(
                "trak: output = 'margin' needs gradients of the margin",
                why=f"features are {self.features.spec()}",
                fix='features = {name = "gradients", measure = "margin"}',
            )
        members = context.members(self.features)
        losses = context.members(self.losses) if self.output == "margin" else []
        state = []
        for k, member in enumerate(members):
            table, weights = context.table(member), None
            if losses:
                p = np.exp(context.table(losses[k % len(losses)]).values[:, 0])
                weights = p * (1 - p)
            gram = self._gram(table, weights)
            mean = self._scale(context.target_table(member).values).astype(np.float64).mean(axis=0)
            context.spent(2 * len(table) * len(gram) ** 2)
            damped = gram + self.damping * np.trace(gram) / len(gram) * np.eye(len(gram))
            state.append((member, _solve(damped, mean)))
        return state, losses

    def _scale(self, phi: np.ndarray) -> np.ndarray:
        return unit_rows(phi)[0] if self.unit_length and self.output == "loss" else phi

    def _gram(self, table: Table, weights: np.ndarray | None) -> np.ndarray:
        """Phi^T R Phi, a shard at a time: in float32 blocks, summed in float64, so that long sums keep their digits."""
        total, at = np.zeros((len(table.columns), len(table.columns))), 0
        for shard in table.shards():
            for start in range(0, len(shard), BLOCK):
                block = self._scale(shard[start : start + BLOCK])
                weighted = block
                if weights is not None:
                    weighted = block * weights[at : at + len(block), None].astype(block.dtype)
                total += weighted.T @ block
                at += len(block)
        return total

    def score(self, state: Any, batch: Batch) -> Any:
        directions, losses = state
        total = sum(self._scale(batch.table(m)).astype(np.float64) @ v for m, v in directions) / len(directions)
        if losses:
            total = total * np.mean([1 - np.exp(batch.table(m)[:, 0]) for m in losses], axis=0)
        return total


def _solve(matrix: np.ndarray, v: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(matrix, v)
    except np.linalg.LinAlgError as error:
        raise InputError(
            "trak: the matrix of the pool's gradients is singular",
            why="there are fewer examples than features, or all gradients are zero",
            fix="set damping above 0; if it is, the model has learnt the pool by heart: train it less",
        ) from error
