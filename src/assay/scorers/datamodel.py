"""Datamodel: what a linear law says of retraining, fitted to retrained models."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.keys import digest
from assay.core.method import Batch, Context, Cost, Count, NonNegative, Positive, Scorer, Targets, target_columns
from assay.core.pool import among
from assay.train.recipe import Recipe, overlaid

# Seeds of the trainings, away from those of the scoring models and of verification.
SEEDS = 200_000
# Steps of the lasso's coordinate descent, and the gap in its objective at which it ends, relative to the numbers' own.
STEPS, GAP = 20_000, 1e-6


class Datamodel(Scorer):
    """Datamodel: regression of the target's loss after retraining on which examples were trained on.

    Formula: s = -theta of min over theta, b of (1/2M) sum_m (f(S_m) - b - sum_{i in S_m} theta_i)^2 + P(theta);
        ridge: P = penalty tr(X X^T)/(2 M^2) |theta|^2; lasso: P = penalty |X^T f|_max/M |theta|_1; X the centred
        memberships [M, n] of M random subsets of `share` of the pool, f(S) averaged over `seeds` trainings
    Reference: Ilyas et al. 2022, arXiv:2202.00622
    Note: unbiased in the limit of many subsets and no penalty, and the dearest of all: it trains subsets x seeds models
        and assumes nothing else. Its subsets are its own, never those that scores are verified on. `recipe` is that of
        the scoring models unless given; protocol 'weights' keeps every example's place in the order at weight 0,
        'subset' trains on the subset alone, as long for each example. A lasso needs far more subsets than it finds
        examples that matter
    """

    subsets: Count = 200
    share: Positive = 0.5
    seeds: Count = 1
    kind: Literal["ridge", "lasso"] = "ridge"
    penalty: NonNegative = 0.1
    measure: Literal["loss", "margin"] = "loss"
    protocol: Literal["weights", "subset"] = "weights"
    targets: Targets = "mean"
    recipe: dict[str, Any] | None = None

    cost: ClassVar[Cost] = "retrain"
    unit: ClassVar[str] = "fall of the target's loss when the example joins a random subset"
    measures_utility: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        return 0.0  # all of its work is in `init`, which counts it

    def training_terms(self, pool: float, target: float) -> float:
        models, whole = self.subsets * self.seeds, self._recipe(None)
        length = pool if whole is None else whole.steps * whole.terms_per_step
        return models * length * (self.share if self.protocol == "subset" else 1.0)

    def _recipe(self, known: Recipe | None) -> Recipe | None:
        """The recipe of this method's own trainings. Raises `InputError` when it says what no recipe has."""
        return known if self.recipe is None else overlaid(self.name, None, self.recipe)

    def init(self, context: Context) -> Any:
        from assay.train import bank

        recipe = self._recipe(context.recipe) or overlaid(self.name, None, self.recipe)
        # Rows that contain target items are not trained on; nothing is known of them.
        rows = np.flatnonzero(~np.isin(context.pool.ids, context.barred))
        pool = context.pool if len(rows) == len(context.pool) else context.pool.at(rows)
        ids, encoded = pool.ids, context.encoded(pool)
        masks = bank.subsets(ids, self.subsets, self.share, int(digest("datamodel", context.seed)[:8], 16))
        seeds = tuple(SEEDS + 1000 * context.seed + k for k in range(self.seeds))
        targets = {"target": context.encoded(context.target)}
        f_mrq = bank.retrain(
            context.task, encoded, ids, masks, recipe, seeds=seeds, targets=targets, measure=self.measure,
            protocol=self.protocol, path=context.folder, workers=context.workers, progress=context.progress,
        )["target"]  # fmt: skip
        context.spent(
            bank.flops(context.task, encoded, masks, recipe, seeds=seeds, targets=targets, protocol=self.protocol)
        )
        f_mq = f_mrq.mean(axis=1)
        theta_nq = fit(masks, f_mq if self.targets == "each" else f_mq.mean(axis=1, keepdims=True), self)
        order = np.argsort(ids, kind="stable")
        return target_columns(context, self.targets), ids[order], -theta_nq[order]

    def columns(self, state: Any) -> tuple[str, ...]:
        return state[0]

    def score(self, state: Any, batch: Batch) -> Any:
        _, ids, scores = state
        where, known = among(ids, batch.ids)
        return np.where(known[:, None], scores[where], 0.0)


def fit(masks: np.ndarray, f_mq: np.ndarray, options: Datamodel) -> np.ndarray:
    """theta `[n, q]` of the memberships `[M, n]` and outputs `[M, q]`; the intercept takes up their means."""
    x = masks - masks.mean(axis=0)
    f = f_mq - f_mq.mean(axis=0)
    count, n = x.shape
    if options.kind == "lasso":
        return _lasso(x, f, options.penalty)
    scale = options.penalty * float((x * x).sum()) / count
    if count <= n:  # the same solution, by the smaller of two matrices
        return x.T @ _solve(x @ x.T + scale * np.eye(count), f, scale)
    return _solve(x.T @ x + scale * np.eye(n), x.T @ f, scale)


def _solve(matrix: np.ndarray, right: np.ndarray, scale: float) -> np.ndarray:
    """Of a symmetric matrix; without a penalty the shortest solution, for fixed-size subsets are dependent."""
    if scale:
        return np.linalg.solve(matrix, right)
    return np.linalg.lstsq(matrix, right, rcond=1e-10)[0]


def _lasso(x: np.ndarray, f_mq: np.ndarray, penalty: float) -> np.ndarray:
    """By coordinate descent, each column at its own share of the least penalty at which all of theta is 0."""
    from sklearn.linear_model import Lasso

    found = np.zeros((x.shape[1], f_mq.shape[1]))
    for q, f in enumerate(f_mq.T):
        most = np.abs(x.T @ f).max() / len(f)
        if most > 0:
            model = Lasso(alpha=max(penalty, 1e-6) * most, fit_intercept=False, max_iter=STEPS, tol=GAP)
            found[:, q] = model.fit(x, f).coef_
    return found
