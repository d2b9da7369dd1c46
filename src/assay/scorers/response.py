"""Influence by forward passes: how the losses respond when training goes on with a little of the target mixed in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from assay.core.errors import InputError
from assay.core.keys import digest, shuffled
from assay.core.method import Batch, Context, Cost, Count, NonNegative, Positive, Scorer
from assay.core.pool import Pool


class Response(Scorer):
    """Trains on with and without a little of the target, then reads the pool twice: influence with no Hessian.

    Formula: s_i = (loss_i(without) - loss_i(with)) / eps -> grad loss_i^T P^(1/2) F(P^(1/2) H P^(1/2)) P^(1/2) g,
        F(sigma) = (1 - (1 - lr sigma)^steps) / sigma, as eps -> 0 at an optimum; H = Hessian of L_train, g = gradient
        of f, the mean target loss; 'with' minimises L_train + eps f, 'without' L_train: `sides` = 'toward'; 'away'
        compares L_train with L_train - eps f, and 'both' L_train - eps f with L_train + eps f, over 2 eps
    Reference: Bae et al. 2024, arXiv:2405.12186 (the filter of a training segment); Koh & Liang 2017, arXiv:1703.04730
        (its limit)
    Note: one step is lr x GradDot; steps x lr plays 1 / damping; many steps tend to N x influence, N = training
        examples of equal size. Both runs see the same batches of the pool (contaminated rows left out) and of the
        target; `terms_per_step` = 0 is all of both at every step. P as in `directional`; averaged over scoring models
    """

    steps: Count = 40
    lr: Positive = 0.05
    eps: Positive = 0.1
    sides: Literal["both", "toward", "away"] = "both"
    terms_per_step: Annotated[int, pydantic.Field(ge=0)] = 1024
    metric: Literal["sgd", "adam"] = "sgd"
    weight_decay: NonNegative = 0.0
    seed: int = 0

    cost: ClassVar[Cost] = "forward"
    unit: ClassVar[str] = "nats per term and unit weight, times training examples"
    measures_utility: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        return 2.0

    def training_terms(self, pool: float, target: float) -> float:
        step = self.terms_per_step or math.inf
        return 2.0 * self.steps * (min(step, pool) + min(step, target))

    def init(self, context: Context) -> Any:
        from assay.numerics.probe import Pair, Probe

        # (share of eps without, with)
        ends = {"both": (-1.0, 1.0), "toward": (0.0, 1.0), "away": (-1.0, 0.0)}[self.sides]
        models = []
        for k in range(len(context.models)):
            before, after = self._continued(context, k, [e * self.eps for e in ends])
            models.append([[Pair(before, after, (ends[1] - ends[0]) * self.eps)]])
        return Probe.of(context.task, models)

    def _batches(self, context: Context) -> Iterator[tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]]:
        """For the pool and the target: rows of each step, and the number of terms that their sum is divided by."""
        kept = np.flatnonzero(~np.isin(context.pool.ids, context.barred))
        if not len(kept):
            raise InputError(
                "response: no row of the pool is left to train on", why="all of them contain target items",
                fix="hold the target out of the pool",
            )  # fmt: skip
        own = self._cut(context, context.pool, kept, "pool")
        return zip(own, self._cut(context, context.target, np.arange(len(context.target)), "target"), strict=True)

    def _cut(self, context: Context, pool: Pool, rows: np.ndarray, purpose: str) -> Iterator[tuple[np.ndarray, int]]:
        """All rows every time if they fit in a step, else as many as do, in a keyed order: only the ids matter."""
        from assay.core.selection import Selection
        from assay.train.loop import steps
        from assay.train.recipe import Recipe

        sizes = context.encoded(pool).sizes[rows]
        if self.terms_per_step == 0 or sizes.sum() <= self.terms_per_step:
            every = rows[shuffled(pool.ids[rows], "response")]
            yield from ((every, int(sizes.sum())) for _ in range(self.steps))
            return
        seed = int(digest(self.seed, "response", purpose)[:8], 16)
        recipe = Recipe(steps=self.steps, terms_per_step=self.terms_per_step, seed=seed)
        for at in steps(recipe, Selection.everything(pool.ids[rows]), sizes):
            yield rows[at], self.terms_per_step

    def _continued(self, context: Context, model: int, shares: list[float]) -> list[Any]:
        """Weights after the steps, for each share of the target's loss in the objective."""
        task, encoded = context.task, context.encoded(context.pool)
        metric, runs, losses = self._metric(context, model), [context.models[model] for _ in shares], []
        seen = 0.0
        for (own, terms), (asked, _) in self._batches(context):
            for r, share in enumerate(shares):
                grads, loss = self._gradient(context, runs[r], own, terms, asked, share)
                moves = [g if metric is None else metric[n] * g for n, g in zip(runs[r], grads, strict=True)]
                runs[r] = {n: p - self.lr * m for (n, p), m in zip(runs[r].items(), moves, strict=True)}
            seen += float(encoded.sizes[own].sum())
            losses.append(loss)
            if not np.isfinite(loss):
                break
        used = context.encoded(context.target).sizes.mean() * len(asked) * len(losses)
        context.spent(len(shares) * task.training_flops(encoded.sizes, seen + used))
        if not all(p.isfinite().all() for run in runs for p in run.values()):
            raise InputError(
                f"response: training on diverged within {len(losses)} steps",
                why=f"its rate of {self.lr:g} is too high",
                fix=f"lower lr (now {self.lr:g}), or eps (now {self.eps:g})",
            )  # fmt: skip
        return runs

    def _metric(self, context: Context, model: int) -> Any:
        """P by name, or None for 1. Both runs share it, and it stays as it is: the response is then linear in eps."""
        from assay.train.metric import preconditioner

        if self.metric == "sgd":
            return None
        params, target = context.models[model], context.encoded(context.target)
        every = np.arange(len(target))
        return preconditioner(context.optimisers[model], gradient=self._target_slope(context, params, target, every))

    def _target_slope(self, context: Context, params: Any, target: Any, rows: np.ndarray) -> Any:
        """Gradient of the mean loss of these target examples, by name."""
        from assay.train.loop import gradient

        grads, _ = gradient(context.task, params, target, rows, 1 / target.sizes[rows], len(rows))
        return dict(zip(params, grads, strict=True))

    def _gradient(
        self, context: Context, params: Any, own: np.ndarray, terms: int, asked: np.ndarray, share: float
    ) -> tuple[list[Any], float]:
        """Of L_train + decay + share x f on a batch of each; and L_train."""
        from assay.train.loop import gradient

        grads, loss = gradient(context.task, params, context.encoded(context.pool), own, np.ones(len(own)), terms)
        if self.weight_decay:
            grads = [g + self.weight_decay * p for g, p in zip(grads, params.values(), strict=True)]
        if share:
            slope = self._target_slope(context, params, context.encoded(context.target), asked)
            grads = [g + share * s for g, s in zip(grads, slope.values(), strict=True)]
        return grads, loss

    def score(self, state: Any, batch: Batch) -> Any:
        return state.read(batch.inputs)
