"""Mean hidden state of the model."""

from __future__ import annotations

from typing import Any, ClassVar

from assay.core.method import Batch, Context, Cost, Featurizer


class Embed(Featurizer):
    """Mean of the final hidden states over an example's tokens, scaled to unit length.

    Formula: e_i = h_i / |h_i|, h_i = (1/n_i) sum_t h_it; the zero vector stays zero
    Reference: mean pooling as in Reimers & Gurevych 2019, arXiv:1908.10084
    """

    model: int = 0

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
        mask = batch.inputs["mask"][..., None]
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12)
