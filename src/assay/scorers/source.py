"""Influence by approximate unrolling of the training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Count, NonNegative, Scorer, Targets, target_columns

if TYPE_CHECKING:
    from torch import Tensor

    Directions = dict[str, Tensor]


@dataclass(frozen=True)
class _State:
    task: Any
    columns: tuple[str, ...]
    marks: list[tuple[dict[str, Tensor], Directions]]
    """Each checkpoint and its directions `[c, *shape]` by name, 1/N and all shares of it included."""

    @property
    def passes(self) -> float:
        """For the ledger, which counts those of one model."""
        return 1.0


class Source(Scorer):
    """What an example's weight changed along the training run: by gradients of its checkpoints, carried to the end.

    Formula: s_i = (1/N) sum over segments l of v_l^T F_l(H_l) mean over its checkpoints of grad loss_i,
        F_l(x) = (1 - e^(-tau_l x)) / x, v_(l-1) = e^(-tau_l H_l) v_l, v_L = grad f; tau_l = sum of the segment's
        learning rates / (1 - momentum); H_l = weight_decay I + the Fisher information by EK-FAC
    Reference: Bae et al. 2024, arXiv:2405.12186
    Note: checkpoints are those of proxy.checkpoints, cut into `segments` of like number (fewer where there are fewer);
        a short run gives what TracIn gives, a long one influence functions without damping. metric = 'adafactor' is for
        runs by AdamW: all of it in the metric of the best rank-one second moments, segment by segment. measure =
        'margin' takes f = -margin, for classifiers; targets = 'each' gives a column for each target example; averaged
        over the scoring models
    """

    segments: Count = 6
    targets: Targets = "mean"
    measure: Literal["loss", "margin"] = "loss"
    layers: Literal["all", "linear"] = "all"
    metric: Literal["sgd", "adafactor"] = "sgd"
    labels: Literal["sampled", "true"] = "sampled"
    draws: int = 0
    block: Count = 512
    momentum: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    seed: int = 0

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit weight"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        if self.momentum >= 1:
            raise InputError(
                f"source: momentum = {self.momentum}",
                why="steps add up to rate / (1 - momentum)",
                fix="give less than 1",
            )
        marks = []
        for k, run in enumerate(context.trajectories):
            for params, directions in self._unrolled(context, k, run):
                share = 1 / (len(context.trajectories) * len(context.pool))
                marks.append((params, {n: share * d for n, d in directions.items()}))
        return _State(context.task, target_columns(context, self.targets), marks)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def _unrolled(self, context: Context, k: int, run: list[Any]) -> list[tuple[dict[str, Tensor], Directions]]:
        """Checkpoints of one run with their directions, from the last segment to the first."""
        from assay.numerics.kfac import faded, gathered, scaled
        from assay.train.factors import Fisher, fit, target_gradients

        fisher = Fisher(labels=self.labels, draws=self.draws, block=self.block, seed=self.seed)
        names, found = self._names(context), []
        v = target_gradients(context, run[-1].params, names, measure=self.measure, each=self.targets == "each")
        parts = np.array_split(np.arange(len(run)), min(self.segments, len(run)))
        for index in range(len(parts) - 1, -1, -1):
            segment = [run[i] for i in parts[index]]
            metric = self._metric(segment[-1].optimiser)
            factors = fit(
                context.task, [mark.params for mark in segment], context.encoded(context.pool), context.pool.ids,
                fisher, only=names, metric=metric, path=context.folder / f"factors-{k}-{index}",
            )  # fmt: skip
            context.spent(2 * len(segment) * 4 * context.task.forward_flops(context.encoded(context.pool).sizes))
            span = sum(mark.rate for mark in segment) / (1 - self.momentum)
            turned = scaled(v, metric)
            directions = scaled(factors.apply(gathered(span, self.weight_decay), turned), metric)
            found += [(mark.params, {n: d / len(segment) for n, d in directions.items()}) for mark in segment]
            v = scaled(factors.apply(faded(span, self.weight_decay), turned), metric, inverse=True)
        context.note(
            "source: what the factors hold", f"{100 * factors.share:.1f}% of the squared gradient norm",
            share=factors.share, segments=len(parts),
        )  # fmt: skip
        return found

    def _names(self, context: Context) -> set[str]:
        from assay.numerics.persample import linear, trainable

        module = context.task.module
        return linear(module) if self.layers == "linear" else set(trainable(module))

    def _metric(self, optimiser: dict[str, Any]) -> dict[str, Any]:
        if self.metric == "sgd":
            return {}
        from assay.train.metric import feature_metric

        return feature_metric(optimiser, self.metric)

    def score(self, state: _State, batch: Batch) -> Any:
        from assay.numerics.ghost import products

        inputs, module = batch.inputs, state.task.module
        found = [products(module, state.task.loss, params, inputs, along) for params, along in state.marks]
        return np.sum([f.double().numpy() for f in found], axis=0)
