"""First-order influence by forward passes: a difference of losses across a small step along the target's gradient."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import shuffled
from assay.core.method import Batch, Context, Cost, Count, NonNegative, Scorer
from assay.core.pool import Pool

MOST = 64  # target groups: each takes weights of its own in memory, and a pass over the pool


class Directional(Scorer):
    """How fast an example's loss falls along the target's gradient: GradDot over all weights by two forward passes.

    Formula: s_i = <P g, grad loss_i> = (loss_i(params + h P g) - loss_i(params - h P g)) / 2h + O(h^2), g = gradient of
        the mean target loss, P = 1 ('sgd') or 1 / (sqrt(v_hat) + eps) ('adam'); per group q of the target
        (loss_i(params) - loss_i(params - h P g_q)) / h + O(h)
    Reference: Pruthi et al. 2020, arXiv:2002.08484 (TracIn), read as in Pearlmutter 1994 (finite differences)
    Note: `step` is h |P g| / |params|; 0 takes the one that agrees best with exact derivatives of `check` keyed
        examples. That rank correlation is kept with the scores, and below `bound` there are none. Under 'adam' v_hat
        takes the target's gradient in first; with `per` = 'group' the first column is the mean over target examples;
        averaged over the scoring models
    """

    metric: Literal["sgd", "adam"] = "sgd"
    step: NonNegative = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    per: Literal["mean", "group"] = "mean"
    group: str = "group"
    check: Count = 32
    bound: float = 0.9

    cost: ClassVar[Cost] = "forward"
    unit: ClassVar[str] = "nats per term and unit step"
    measures_utility: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        return 2.0

    def training_terms(self, pool: float, target: float) -> float:
        return target

    def init(self, context: Context) -> Any:
        from assay.numerics.probe import DIFFERENCES, Probe, Step

        groups = self._groups(context.target)
        encoded, target = context.encoded(context.pool), context.encoded(context.target)
        sample = shuffled(context.pool.ids, "directional", context.seed)[: self.check]
        rows = [encoded.inputs(np.array([row])) for row in sample.tolist()]
        difference = "forward" if len(groups) > 1 else "central"
        models, steps, forwards = [], list[Step](), 0.0
        for k, params in enumerate(context.models):
            pairs = []
            for members in groups.values():
                direction = self._direction(context, k, target, members)
                step, tried = self._step(context, params, direction, rows, difference)
                forwards += tried * context.task.forward_flops(encoded.sizes[sample])
                steps.append(step)
                pairs.append(DIFFERENCES[difference](params, direction, step.length))
            models.append(self._columns(pairs, [len(m) for m in groups.values()]))
        context.spent(3 * len(models) * context.task.forward_flops(target.sizes) + forwards)
        self._judge(context, steps, len(sample))
        names = ("score", *(f"group {name}" for name in groups)) if len(groups) > 1 else ("score",)
        return Probe.of(context.task, models, columns=names, precision=self.precision)

    def _groups(self, target: Pool) -> dict[str, np.ndarray]:
        """Rows of the target by group, in the order of their names; one group of all unless asked for more."""
        if self.per == "mean":
            return {"": np.arange(len(target))}
        if self.group not in target.columns:
            raise InputError(
                f"the target has no column {self.group!r}", where="directional: per = 'group'",
                why=f"it has {', '.join(target.columns)}", fix="per = 'mean', or name the column of groups in `group`",
            )  # fmt: skip
        names = np.array(["(none)" if g is None else str(g) for g in target.column(self.group)])
        groups = {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
        if len(groups) > MOST:
            raise InputError(
                f"the target has {len(groups)} groups in column {self.group!r}", where="directional: per = 'group'",
                why=f"each is a column, a pass over the pool and a set of weights in memory; at most {MOST}",
                fix="per = 'mean', or a column with fewer groups",
            )  # fmt: skip
        return groups

    def _direction(self, context: Context, model: int, target: Any, members: np.ndarray) -> Any:
        """P g of these target examples, by name; g is the gradient of the mean of their losses."""
        from assay.train.loop import gradient
        from assay.train.metric import preconditioner

        params = context.models[model]
        # `gradient` weighs an example by its terms; the mean over examples does not.
        grads, _ = gradient(context.task, params, target, members, 1 / target.sizes[members], len(members))
        slope = dict(zip(params, grads, strict=True))
        if self.metric == "sgd":
            return slope
        metric = preconditioner(context.optimisers[model], gradient=slope)
        return {n: (metric[n] * g).to(g.dtype) for n, g in slope.items()}

    def _step(self, context: Context, params: Any, direction: Any, rows: Any, difference: Any) -> tuple[Any, float]:
        """The step, and how many forward passes over the sample it took to find it."""
        from assay.numerics.probe import LENGTHS, choose_step

        step = choose_step(
            context.task, params, direction, rows, relative=self.step, difference=difference, precision=self.precision
        )
        return step, 3 + 2.0 * (1 if self.step else len(LENGTHS))

    def _columns(self, pairs: list[Any], counts: list[int]) -> list[list[Any]]:
        """The pairs of each column: the mean over target examples, then the groups'; the mean alone if it is all."""
        from dataclasses import replace

        if len(pairs) == 1:
            return [pairs]
        total = sum(counts)
        mean = [replace(p, scale=p.scale * total / n) for p, n in zip(pairs, counts, strict=True)]
        return [mean, *([p] for p in pairs)]

    def _judge(self, context: Context, steps: list[Any], sample: int) -> None:
        """Keep the rank correlation with exact derivatives, the least over models and groups; refuse a low one."""
        compared = [s for s in steps if np.isfinite(s.spearman)]
        if not compared:
            context.note("agreement with exact derivatives", f"not measured: {sample} examples tell nothing apart")
            return
        worst = min(compared, key=lambda s: s.spearman)
        if worst.spearman < self.bound:
            raise InputError(
                f"directional: the differences rank {sample} examples unlike their exact derivatives "
                f"(Spearman {worst.spearman:.3f}, the bound is {self.bound:g})",
                why=f"at a step of {worst.relative:.2g} of the weights in {self.precision} the losses are rounded, or "
                "the model is not nearly linear",
                fix="precision = 'float32', step = 0 (chosen by measuring), metric = 'sgd', or a lower `bound`",
            )  # fmt: skip
        context.note(
            "agreement with exact derivatives",
            f"Spearman {worst.spearman:.3f} on {sample} examples (from {self.bound:g} is well), step "
            f"{worst.relative:.2g} of the weights",
            ok=True, spearman=worst.spearman, sample=sample, error=worst.error, steps=[s.relative for s in steps],
        )  # fmt: skip

    def columns(self, state: Any) -> tuple[str, ...]:
        return state.columns

    def score(self, state: Any, batch: Batch) -> Any:
        return state.read(batch.inputs)
