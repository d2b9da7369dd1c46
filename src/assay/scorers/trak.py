"""TRAK: the Newton step of a linearised model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Featurizer, NonNegative, Scorer


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
            phi = self._scale(context.table(member).values)
            weights = np.ones(len(phi))
            if losses:
                p = np.exp(context.table(losses[k % len(losses)]).values[:, 0])
                weights = p * (1 - p)
            gram = _gram(phi, weights)
            mean = self._scale(context.target_table(member).values).astype(np.float64).mean(axis=0)
            context.spent(2 * len(phi) * phi.shape[1] ** 2)
            damped = gram + self.damping * np.trace(gram) / len(gram) * np.eye(len(gram))
            state.append((member, _solve(damped, mean)))
        return state, losses

    def _scale(self, phi: np.ndarray) -> np.ndarray:
        if not self.unit_length or self.output == "margin":
            return phi
        # Summed in float64: squares of small gradients leave the range of float32.
        norms = np.sqrt(np.einsum("nd,nd->n", phi, phi, dtype=np.float64))
        return phi / np.where(norms > 0, norms, 1.0).astype(phi.dtype)[:, None]

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


def _gram(phi: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Phi^T R Phi in float32 blocks, summed in float64: sums of thousands of rows keep their digits."""
    total = np.zeros((phi.shape[1], phi.shape[1]))
    for start in range(0, len(phi), 1024):
        block = phi[start : start + 1024]
        total += (block * weights[start : start + 1024, None].astype(block.dtype)).T @ block
    return total
