"""Influence by approximate unrolling of the training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Count, NonNegative, Scorer, Targets, target_columns

if TYPE_CHECKING:
    from torch import Tensor

    _Mark = tuple[dict[str, Tensor], dict[str, Tensor], frozenset[str]]


@dataclass(frozen=True)
class _State:
    task: Any
    columns: tuple[str, ...]
    marks: list[_Mark]
    """Each checkpoint, its directions `[c, *shape]` by name, 1/N and all shares of it included, and the parameters
    that go without rules."""

    @property
    def passes(self) -> float:
        """For the ledger, which counts those of one model."""
        return 1.0


class Source(Scorer):
    """What an example's weight changed along the training run: by gradients of its checkpoints, carried to the end.

    Formula: s_i = (1/N) sum over segments l of v_l^T F_l(H_l) mean over its checkpoints of grad loss_i,
        F_l(x) = (1 - e^(-tau_l x)) / x, v_(l-1) = e^(-tau_l H_l) v_l, v_L = grad f; tau_l = sum of the segment's
        learning rates / (1 - momentum); H_l = weight_decay I + w x the Fisher information by EK-FAC, w the data
        weight that the scoring model was trained at, + damping x the mean eigenvalue of each layer
    Reference: Bae et al. 2024, arXiv:2405.12186
    Note: checkpoints are those of proxy.checkpoints, cut into `segments` of like number (fewer where there are fewer);
        momentum and weight_decay are the run's own unless told; a short run gives what TracIn gives, a long one
        influence functions without damping. metric = 'adafactor' is for runs by AdamW: all of it in the metric of the
        best rank-one second moments, segment by segment. Sides of layers are cut into pieces of at most `block`, with
        `draws` labels for each term (0: 10,000 in all). measure = 'margin' takes f = -margin, for classifiers; targets
        = 'each' gives a column for each target example; averaged over the scoring models
    """

    segments: Count = 6
    targets: Targets = "mean"
    measure: Literal["loss", "margin"] = "loss"
    layers: Literal["all", "linear"] = "all"
    metric: Literal["sgd", "adafactor"] = "sgd"
    labels: Literal["sampled", "true"] = "sampled"
    draws: int = 0
    block: Count = 512
    damping: NonNegative = 0.0
    momentum: NonNegative | None = None
    weight_decay: NonNegative | None = None
    seed: int = 0

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit weight"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        if self.momentum is not None and self.momentum >= 1:
            raise InputError(
                f"source: momentum = {self.momentum}",
                why="steps add up to rate / (1 - momentum)",
                fix="give less than 1",
            )
        marks = []
        for k, run in enumerate(context.trajectories):
            for params, directions, fallback in self._unrolled(context, k, run):
                share = 1 / (len(context.trajectories) * len(context.pool))
                marks.append((params, {n: share * d for n, d in directions.items()}, fallback))
        return _State(context.task, target_columns(context, self.targets), marks)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def _unrolled(self, context: Context, k: int, run: list[Any]) -> list[_Mark]:
        """Checkpoints of one run with their directions, from the last segment to the first."""
        from assay.numerics.kfac import faded, gathered, scaled
        from assay.train.factors import Fisher, fit, passes, target_gradients
        from assay.train.rules import audited

        fisher = Fisher(labels=self.labels, draws=self.draws, block=self.block, seed=self.seed)
        names, found, encoded = self._names(context), [], context.encoded(context.pool)
        slow = audited(context, self.name, run[-1].params, names)
        each = self.targets == "each"
        v = target_gradients(context, run[-1].params, names, measure=self.measure, each=each, fallback=slow)
        parts = np.array_split(np.arange(len(run)), min(self.segments, len(run)))
        for index in range(len(parts) - 1, -1, -1):
            segment = [run[i] for i in parts[index]]
            metric = self._metric(segment[-1].optimiser)
            path = context.folder / f"factors-{k}-{index}"
            factors = fit(
                context.task, [mark.params for mark in segment], encoded, context.pool.ids, fisher, only=names,
                metric=metric, path=path,
            )  # fmt: skip
            context.spent(passes(fisher, encoded) * len(segment) * context.task.forward_flops(encoded.sizes))
            way, turned = self._way(segment), scaled(v, metric)
            directions = scaled(factors.apply(gathered(*way), turned), metric)
            fallback = frozenset(factors.fallback)
            found += [(m.params, {n: d / len(segment) for n, d in directions.items()}, fallback) for m in segment]
            v = scaled(factors.apply(faded(*way), turned), metric, inverse=True)
        context.note(
            "source: what the factors hold", f"{100 * factors.share:.1f}% of the squared gradient norm",
            share=factors.share, segments=len(parts),
        )  # fmt: skip
        return found

    def _way(self, segment: list[Any]) -> tuple[float, float, float, float]:
        """Length of a segment, the decay of weights in it, the data weight that its losses had, and damping."""
        about = segment[-1].optimiser
        momentum = about.get("inertia", 0.0) if self.momentum is None else self.momentum
        decay = about.get("decay", 0.0) if self.weight_decay is None else self.weight_decay
        return sum(mark.rate for mark in segment) / (1 - momentum), decay, about.get("weight", 1.0), self.damping

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
        found = [
            products(module, state.task.loss, params, inputs, along, fallback=set(slow))
            for params, along, slow in state.marks
        ]
        return np.sum([f.double().numpy() for f in found], axis=0)
