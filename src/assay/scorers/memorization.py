"""Memorisation: how much of what a model knows of an example it knows by having been trained on it, by retraining."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import shuffled
from assay.core.method import Batch, Context, Cost, Count, Scorer
from assay.core.pool import among
from assay.train.recipe import Recipe, overlaid

# Seeds of the trainings, away from those of scoring models, of verification and of other banks.
SEEDS = 300_000


class Memorization(Scorer):
    """Minus the self-influence that retraining measures: wrongly labelled and odd examples come last.

    Formula: s_i = mean of f_i(S) over trained S with i in S - mean of f_i(S) over those without it; f_i(S) the loss of
        the example itself after training on S; `repeats` times the pool is dealt into `folds` parts, and each part left
        out in turn: of folds x repeats models, `repeats` have not seen i. Column unseen: minus the second mean
    Reference: Feldman 2020, arXiv:1906.05271; Feldman and Zhang 2020, arXiv:2008.03703 (memorisation)
    Note: a diagnostic, not a utility. What `self_influence` and `self_trak` estimate from one trained model, this one
        measures by training: folds as many as there are examples is leaving each one out. Dealing instead of drawing
        subsets leaves no example that all models have seen. `recipe` is that of the scoring models unless given;
        protocol 'weights' keeps every example's place in the order at weight 0, 'subset' trains on the subset alone, as
        long for each example. Rows that contain target items are not trained on, and score the median; f of
        all models is held at once, 8 bytes an example and model
    """

    folds: Count = 2
    repeats: Count = 5
    seeds: Count = 1
    measure: Literal["loss", "margin"] = "loss"
    protocol: Literal["weights", "subset"] = "weights"
    recipe: dict[str, Any] | None = None

    cost: ClassVar[Cost] = "retrain"
    unit: ClassVar[str] = "nats per term, or logits of margin (minus how much training on the example helps itself)"
    measures_utility: ClassVar[bool] = False

    @property
    def passes(self) -> float:
        return 0.0  # all of its work is in `init`, which counts it

    def training_terms(self, pool: float, target: float) -> float:
        whole = self._recipe(None)
        length = pool if whole is None else whole.steps * whole.terms_per_step
        share = 1 - 1 / self.folds if self.protocol == "subset" else 1.0
        # Each model then reads the whole pool, which is a third of training on it.
        return self.folds * self.repeats * self.seeds * (length * share + pool / 3)

    def _recipe(self, known: Recipe | None) -> Recipe | None:
        return known if self.recipe is None else overlaid(self.name, None, self.recipe)

    def columns(self, state: Any) -> tuple[str, ...]:
        return "score", "unseen"

    def init(self, context: Context) -> Any:
        from assay.train import bank

        recipe = self._recipe(context.recipe) or overlaid(self.name, None, self.recipe)
        rows = np.flatnonzero(~np.isin(context.pool.ids, context.barred))
        pool = context.pool if len(rows) == len(context.pool) else context.pool.at(rows)
        masks_mn = dealt(pool.ids, self.folds, self.repeats, context.seed)
        encoded = context.encoded(pool)
        seeds = tuple(SEEDS + 1000 * context.seed + k for k in range(self.seeds))
        f_mn = bank.retrain(
            context.task, encoded, pool.ids, masks_mn, recipe, seeds=seeds, targets={"own": encoded},
            measure=self.measure, protocol=self.protocol, path=context.folder, workers=context.workers,
            progress=context.progress,
        )["own"].mean(axis=1)  # fmt: skip
        context.spent(
            bank.flops(
                context.task, encoded, masks_mn, recipe, seeds=seeds, targets={"own": encoded}, protocol=self.protocol
            )
        )
        seen = (f_mn * masks_mn).sum(axis=0) / masks_mn.sum(axis=0)
        unseen = (f_mn * ~masks_mn).sum(axis=0) / (~masks_mn).sum(axis=0)
        order = np.argsort(pool.ids, kind="stable")
        return pool.ids[order], np.stack([seen - unseen, -unseen], axis=1)[order]

    def score(self, state: Any, batch: Batch) -> Any:
        ids, scores = state
        where, known = among(ids, batch.ids)
        return np.where(known[:, None], scores[where], np.median(scores, axis=0))


def dealt(ids: np.ndarray, folds: int, repeats: int, seed: int) -> np.ndarray:
    """`[folds x repeats, n]`: of each repeat, row k marks the ids outside its k-th part; parts are as equal as can be.

    Raises `InputError` where a part would be empty, or everything.
    """
    if not 2 <= folds <= len(ids):
        raise InputError(
            f"memorization: {len(ids)} examples cannot be dealt into {folds} parts",
            why="each model leaves out one part, and trains on the others", fix=f"folds from 2 to {len(ids)}",
        )  # fmt: skip
    masks = np.ones((repeats, folds, len(ids)), dtype=bool)
    for k in range(repeats):
        order = shuffled(ids, "memorization", seed, k)
        for part in range(folds):
            masks[k, part, order[part::folds]] = False
    return masks.reshape(repeats * folds, len(ids))
