"""Head, middle and tail of the pool by another score, as CCNet cuts by perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic

from assay.core.method import Batch, Bounds, Context, Cost, Scorer

Place = Annotated[float, pydantic.Field(ge=0, le=1)]


class Perplexity(Scorer):
    """Closeness of a text's perplexity to a place in the pool's distribution: the head is what the model finds easiest.

    Formula: score_i = -|quantile_i - centre|; loss_i = -of_i, nats per term (exp of it is the perplexity);
        quantile_i = share of the pool with a lower loss
    Reference: Wenzek et al. 2020, arXiv:1911.00359 (CCNet)
    Note: not a measure of utility. centre = 0 keeps the head first, in the order of `loss`; 0.5 the middle; 1 the tail,
        the hardest. The presets are thirds of the pool, and bounds on `loss` are thresholds that other pools can share.
        The model is the scoring model that `of` names: any causal model, if the study's task is one. As a filter of
        faults the tail has broken spelling and what is foreign to the model; loops, logs, hex, tables of numbers and
        texts spliced together are easy for a model, and pass
    """

    of: Scorer = "loss"  # type: ignore[assignment]
    centre: Place = 0.0

    cost: ClassVar[Cost] = "forward"
    unit: ClassVar[str] = "minus distance in quantiles"

    @property
    def uses_models(self) -> bool:
        """If `of` does."""
        return False

    @property
    def passes(self) -> float:
        """What `of` reads is entered with it."""
        return 0.0

    @property
    def presets(self) -> Mapping[str, Bounds]:
        third = 1 / 3
        return {
            "head": {"quantile": (None, third)},
            "middle": {"quantile": (third, 2 * third)},
            "tail": {"quantile": (2 * third, None)},
        }

    def columns(self, state: Any) -> tuple[str, ...]:
        return "score", "loss", "quantile"

    def init(self, context: Context) -> np.ndarray:
        losses = np.sort(-context.table(self.of).values[:, 0])
        marks = losses[np.minimum(np.arange(101) * len(losses) // 100, len(losses) - 1)]
        # What the presets cut at: a third of the pool is lower than what follows the first, two thirds than the tail.
        head, middle = (float(losses[i]) for i in (len(losses) // 3, -(-2 * len(losses) // 3) - 1))
        context.note(
            "thirds of the pool by loss",
            f"head up to {head:.4f}, tail above {middle:.4f} {self.of.unit.removeprefix('minus ')}",
            head=head, tail=middle, percentiles=marks.tolist(),
        )  # fmt: skip
        return losses

    def score(self, state: np.ndarray, batch: Batch) -> Any:
        losses = -batch.table(self.of)[:, 0]
        quantiles = np.searchsorted(state, losses, side="left") / len(state)
        return np.stack([-np.abs(quantiles - self.centre), losses, quantiles], axis=1)
