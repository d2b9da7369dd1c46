"""Perplexity: what the model already predicts well is kept."""

from __future__ import annotations

from typing import Any, ClassVar

from assay.core.method import Batch, Context, Cost, Scorer, mark_of


class Loss(Scorer):
    """Perplexity filter: examples with a low loss under the scoring model are kept.

    Formula: s_i = -loss_i(params), mean over the example's terms
    Reference: Wenzek et al. 2020, arXiv:1911.00359 (CCNet)
    Note: not a measure of utility
    """

    model: int = 0
    checkpoint: int = -1

    cost: ClassVar[Cost] = "forward"
    unit: ClassVar[str] = "minus nats per term"

    def init(self, context: Context) -> Any:
        return context.task, mark_of(context, self).params

    def score(self, state: Any, batch: Batch) -> Any:
        import torch

        task, params = state
        with torch.no_grad():
            return -task.loss(params, batch.inputs)
