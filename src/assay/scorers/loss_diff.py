"""A short training run on the target, then two forward passes (three with a control)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.keys import digest, hash_ids
from assay.core.method import Batch, Context, Cost, Count, NonNegative, Positive, Scorer
from assay.core.pool import Pool


class LossDiff(Scorer):
    """How much an example's loss falls when the model takes a short training run on the target: forward passes only.

    Formula: s_i = loss_i(params) - loss_i(params') + control (loss_i(params") - loss_i(params')), params' = after
        `steps` optimiser steps on the selecting half, params" = after the same steps on it with its words shuffled
    Reference: Brandfonbrener et al. 2024, arXiv:2406.10670 (CoLoR-Filter);
        Mindermann et al. 2022, arXiv:2206.07137 (RHO)
    Note: at control 0 and to first order, s_i = lr sum <P grad_i, grad_target>: utility in the optimiser's metric P.
        The control takes out what words alone explain: without it a small model rewards the target's vocabulary in any
        order; averaged over the scoring models
    """

    steps: Count = 40
    lr: Positive = 1e-3
    optimiser: Literal["adamw", "sgd"] = "adamw"
    terms_per_step: Count = 1024
    control: NonNegative = 0.0
    seed: int = 0

    cost: ClassVar[Cost] = "forward"
    unit: ClassVar[str] = "nats per term after the steps"
    measures_utility: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        return 3.0 if self.control else 2.0

    def training_terms(self, pool: float, target: float) -> float:
        return self.steps * self.terms_per_step * (2.0 if self.control else 1.0)

    def init(self, context: Context) -> Any:
        from assay.numerics.probe import Pair, Probe

        plain = context.target
        shuffled = shuffle_words(plain, self.seed) if self.control else None
        models = []
        for params in context.models:
            after = self._moved(context, plain, params)
            pairs = [Pair(params, after)]
            if shuffled is not None:
                pairs.append(Pair(self._moved(context, shuffled, params), after, 1 / self.control))
            models.append([pairs])
        return Probe.of(context.task, models)

    def _moved(self, context: Context, target: Pool, params: Any) -> Any:
        """Weights after the short run on `target`."""
        from assay.core.selection import Selection
        from assay.train.loop import train
        from assay.train.recipe import Recipe

        seed = int(digest(self.seed, "loss_diff")[:8], 16)
        recipe = Recipe(
            steps=self.steps, lr=self.lr, optimiser=self.optimiser, terms_per_step=self.terms_per_step,
            weight_decay=0.0, warmup=0.1, seed=seed,
        )  # fmt: skip
        encoded = context.encoded(target)
        context.spent(context.task.training_flops(encoded.sizes, recipe.steps * recipe.terms_per_step))
        rows = np.arange(len(encoded))
        return train(context.task, encoded, rows, Selection.everything(target.ids), recipe, start=params).params

    def score(self, state: Any, batch: Batch) -> Any:
        return state.read(batch.inputs)


def shuffle_words(pool: Pool, seed: int) -> Pool:
    """The pool's texts with the words of each in an order keyed by (seed, id); the same words, no syntax."""
    texts = []
    for identity, text in zip(pool.ids.tolist(), pool.column("text"), strict=True):
        words = text.split()
        keys = hash_ids([b"%d" % k for k in range(len(words))], "words", seed, identity.decode())
        texts.append(" ".join(words[k] for k in np.argsort(keys, kind="stable")))
    return Pool.from_columns({"id": [i.decode() for i in pool.ids.tolist()], "text": texts})
