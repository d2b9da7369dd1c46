"""A short step on the target, then two forward passes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from assay.core.keys import digest
from assay.core.method import Batch, Context, Cost, Count, Positive, Scorer


class LossDiff(Scorer):
    """How much an example's loss falls when the model takes a short training run on the target: forward passes only.

    Formula: s_i = loss_i(params) - loss_i(params'), params' = after `steps` AdamW steps on the selecting half
    Reference: Brandfonbrener et al. 2024, arXiv:2406.10670 (CoLoR-Filter);
        Mindermann et al. 2022, arXiv:2206.07137 (RHO)
    Note: to first order in the step, s_i = lr sum <P grad_i, grad_target>: utility in the optimiser's metric P
    """

    steps: Count = 30
    lr: Positive = 5e-4
    terms_per_step: Count = 2048
    seed: int = 0

    cost: ClassVar[Cost] = "forward"
    unit: ClassVar[str] = "nats per term after the step"
    measures_utility: ClassVar[bool] = True
    passes: ClassVar[float] = 2.0

    def init(self, context: Context) -> Any:
        from assay.core.selection import Selection
        from assay.train.loop import train
        from assay.train.recipe import Recipe

        seed = int(digest(self.seed, "loss_diff")[:8], 16)
        recipe = Recipe(
            steps=self.steps, lr=self.lr, terms_per_step=self.terms_per_step, weight_decay=0.0, warmup=0.1, seed=seed
        )
        encoded = context.encoded(context.target)
        pairs = []
        for params in context.models:
            everything = Selection.everything(context.target.ids)
            moved = train(context.task, encoded, np.arange(len(encoded)), everything, recipe, start=params).params
            context.spent(
                3
                * context.task.forward_flops(encoded.sizes)
                / encoded.sizes.sum()
                * recipe.steps
                * recipe.terms_per_step
            )
            pairs.append((params, moved))
        return context.task, pairs

    def score(self, state: Any, batch: Batch) -> Any:
        import torch

        task, pairs = state
        with torch.no_grad():
            falls = [task.loss(before, batch.inputs) - task.loss(after, batch.inputs) for before, after in pairs]
        return sum(falls) / len(falls)
