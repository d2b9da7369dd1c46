"""TRAK: the Newton step of a linearised model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.method import Batch, Context, Cost, Featurizer, NonNegative, Scorer


class Trak(Scorer):
    """TRAK: dot product of gradients in the metric of the pool's own gradients, averaged over scoring models.

    Formula: s_i = mean over q of phi_q^T (Phi^T R Phi + damping tr(Phi^T R Phi)/p I)^-1 phi_i Q_i; output 'loss': R = Q = 1; 'margin': R = p(1-p), Q = 1-p
    Reference: Park et al. 2023, arXiv:2303.14186; without the per-model rescaling of the published code
    Note: unit = true scales every phi to length 1 first, which takes length and loss out of the score; unit and output = 'margin' exclude each other
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
        state = []
        for member in context.members(self.features):
            phi = self._scale(context.table(member).values)
            weights = np.ones(len(phi))
            if self.output == "margin":
                p = np.exp(context.table(self.losses).values[:, 0])
                weights = p * (1 - p)
            gram = _gram(phi, weights)
            mean = self._scale(context.target_table(member).values).astype(np.float64).mean(axis=0)
            context.spent(2 * len(phi) * phi.shape[1] ** 2)
            damped = gram + self.damping * np.trace(gram) / len(gram) * np.eye(len(gram))
            state.append((member, np.linalg.solve(damped, mean)))
        return state

    def _scale(self, phi: np.ndarray) -> np.ndarray:
        if not self.unit_length or self.output == "margin":
            return phi
        return phi / np.maximum(np.linalg.norm(phi.astype(np.float32), axis=1, keepdims=True), 1e-30)

    def score(self, state: Any, batch: Batch) -> Any:
        total = sum(self._scale(batch.table(m)).astype(np.float64) @ direction for m, direction in state) / len(state)
        if self.output == "margin":
            total = total * (1 - np.exp(batch.table(self.losses)[:, 0]))
        return total


def _gram(phi: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Phi^T R Phi in float32 blocks, summed in float64: sums of thousands of rows keep their digits."""
    total = np.zeros((phi.shape[1], phi.shape[1]))
    for start in range(0, len(phi), 1024):
        block = phi[start : start + 1024]
        total += (block * weights[start : start + 1024, None].astype(block.dtype)).T @ block
    return total
