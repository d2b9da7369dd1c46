"""Mean hidden state of the model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from assay.core.method import Batch, Context, Cost, Featurizer


class Embed(Featurizer):
    """Mean of the final hidden states over an example's tokens, scaled to unit length.

    Formula: e_i = h_i / |h_i|, h_i = sum_t a_t h_it / sum_t a_t, a_t = 1, or t for pooling = 'position'; the zero
        vector stays zero
    Reference: mean pooling as in Reimers & Gurevych 2019, arXiv:1908.10084; by position: Ivison et al. 2025,
        arXiv:2503.01807 (RDS+), after Muennighoff 2022, arXiv:2202.08904
    Note: t counts the example's own tokens from 1, so that of a decoder later states, which have seen more, weigh more
    """

    model: int = 0
    pooling: Literal["mean", "position"] = "mean"

    cost: ClassVar[Cost] = "forward"

    def init(self, context: Context) -> Any:
        return context.task, context.models[self.model]

    def columns(self, state: Any) -> tuple[str, ...]:
        return tuple(f"hidden:{i}" for i in range(state[0].width))

    def featurize(self, state: Any, batch: Batch) -> Any:
        import torch

        task, params = state
        with torch.no_grad():
            hidden = task.hidden(params, batch.inputs)
        mask = batch.inputs["mask"]
        weights = (mask.cumsum(dim=1) * mask if self.pooling == "position" else mask)[..., None]
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12)
