"""Per-example gradients, projected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Count, Faced, Featurizer, Positive, batch_places, mark_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from assay.core.task import Task
    from assay.numerics.pairs import Queries
    from assay.numerics.project import Sketch


@dataclass(frozen=True)
class _State:
    task: Task
    params: dict[str, Tensor]
    sketch: Sketch
    only: frozenset[str]
    fallback: frozenset[str]
    metric: dict[str, Any]

    def on(self, device: str) -> _State:
        """The same with its tensors on a device."""

        def moved(x: Any) -> Any:
            return tuple(map(moved, x)) if isinstance(x, tuple) else x.to(device)

        params, metric = ({n: moved(v) for n, v in held.items()} for held in (self.params, self.metric))
        return replace(self, params=params, metric=metric)


@dataclass(frozen=True)
class _Met:
    """`Faced` without a Table."""

    features: Gradients
    state: _State
    queries: Queries
    sense: float
    unit: bool
    passes: float = 1.0

    def products(self, batch: Batch) -> np.ndarray:
        from assay.numerics.pairs import met

        read = partial(self.features.read, self.state, batch)
        return self.sense * met(read, self.queries, unit=self.unit).cpu().numpy()


class Gradients(Featurizer):
    """Gradient of each example's loss (mean over its terms) in the weights, projected.

    Formula: phi_i = S (d loss_i / d theta), S a `[size, p]` matrix of random signs, one in each column for 'sparse';
        'factored': concat over layers of P_o (d loss_i / d W) P_i^T, entries of P +-1/sqrt(rank)
    Reference: Hu et al. 2025, arXiv:2505.18976 (sparse, masked); Choe et al. 2024, arXiv:2405.13954 (factored);
        Park et al. 2023, arXiv:2303.14186 (dense)
    Note: factored forms no gradient of the size of a weight and costs less than training on the example; sparse
        costs half as much again and, for as many numbers, ranks about twice as close to exact gradients; size is for
        'sparse', 'masked' and 'dense', rank for 'factored'; measure = 'margin' is for classifiers, f = log p - log(1
        - p); layers = 'linear' leaves out embeddings, norms and convolutions; metric multiplies gradients by
        v_hat^-exponent of the scoring model's optimiser: at 1/4 products are those of Adam's metric, at 1/2 gradients
        are in units of their own size ('adam' forms each gradient whole, 'adafactor' takes the best rank-one v_hat and
        costs nothing; momentum only scales, so 'sgd' is its metric too); graddot, gradcos and tracin keep no Table of
        'exact' gradients; 'bfloat16' runs the model in it and sums in float32; checkpoint: which mark of the scoring
        model's training run is read, from 0, -1 for the last
    """

    projection: Literal["sparse", "factored", "masked", "dense", "exact"] = "factored"
    size: Count = 4096
    rank: Count = 16
    seed: int = 0
    model: int = 0
    checkpoint: int = -1
    measure: Literal["loss", "margin"] = "loss"
    layers: Literal["all", "linear"] = "all"
    metric: Literal["sgd", "adam", "adafactor"] = "sgd"
    exponent: Positive = 0.25
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    cost: ClassVar[Cost] = "gradient"

    @property
    def sense(self) -> float:
        return -1.0 if self.measure == "margin" else 1.0

    def init(self, context: Context) -> _State:
        mark = mark_of(context, self)
        task, params = context.task, mark.params
        metric: dict[str, Any] = {}
        if self.metric != "sgd":
            from assay.train.metric import feature_metric

            metric = feature_metric(mark.optimiser, self.metric, self.exponent)
        elif self.exponent != Gradients.exponent:
            raise InputError(
                f"gradients: exponent = {self.exponent} has no effect", why="metric is 'sgd'", fix="metric = 'adam'"
            )
        if self.device == "cuda":
            self._cuda()
        state = _State(task, params, self.sketch(), self.names(task), frozenset(), metric).on(self.device)
        return self._audited(state, context)

    def _cuda(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                "gradients: there is no CUDA device", why="torch sees none",
                fix="device = 'cpu', or install a CUDA build of torch",
            )  # fmt: skip

    def sketch(self) -> Sketch:
        """The projection that the options name."""
        from assay.numerics.project import sketch

        size = {"factored": "rank", "exact": ""}.get(self.projection, "size")
        for other in {"rank", "size"} - {size}:
            if getattr(self, other) != getattr(Gradients, other):
                raise InputError(
                    f"gradients: {other} = {getattr(self, other)} has no effect",
                    why=f"projection is {self.projection!r}",
                    fix=f"{size} = ..." if size else "leave it out",
                )
        return sketch(self.projection, getattr(self, size) if size else 0, self.seed)

    def names(self, task: Task) -> frozenset[str]:
        """The parameters that are read."""
        from assay.numerics.persample import linear, trainable

        return frozenset(linear(task.module) if self.layers == "linear" else trainable(task.module))

    def _audited(self, state: _State, context: Context) -> _State:
        """The rules are compared with plain backward passes on a few examples; what does not add up goes without."""
        from assay.train.rules import PROBE, audited

        inputs = {k: v.to(self.device) for k, v in context.sample(PROBE).inputs.items()}
        found = audited(
            context, "gradients", state.params, state.only, f=self._measure(state), sketch=state.sketch,
            metric=state.metric, inputs=inputs,
        )  # fmt: skip
        return replace(state, fallback=frozenset(found))

    def _measure(self, state: _State) -> Any:
        return state.task.loss if self.measure == "loss" else state.task.margin  # type: ignore[attr-defined]

    def columns(self, state: _State) -> tuple[str, ...]:
        from assay.numerics.persample import layout

        blocks = layout(state.task.module, state.sketch, set(state.only))
        return tuple(f"{name}:{i}" for name, width in blocks for i in range(width))

    def featurize(self, state: _State, batch: Batch) -> Any:
        from assay.numerics.persample import flatten

        return flatten(self.read(state, batch, state.sketch), state.sketch)

    def read(self, state: _State, batch: Batch, sketch: Sketch) -> dict[str, Tensor]:
        """Gradients of a batch through a sketch, by name."""
        import torch

        from assay.numerics.persample import gradients

        inputs = batch.inputs
        if self.device == "cuda":
            inputs = {k: v.pin_memory().to("cuda", non_blocking=True) for k, v in inputs.items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found, _ = gradients(
                state.task.module, self._measure(state), state.params, inputs, sketch,
                only=set(state.only), fallback=set(state.fallback), metric=state.metric,
            )  # fmt: skip
        return found

    @property
    def met(self) -> bool:
        return self.projection == "exact"

    def faced(self, context: Context, queries: Featurizer, *, each: bool, unit: bool = False) -> Faced:
        """Exact gradients are met as they are computed: a row is as long as the model, and dear to keep."""
        readable = context.pool.columns  # else all there is of the pool is a Table
        if not (isinstance(queries, Gradients) and readable and self.met and queries.met) or (
            queries.layers != self.layers
        ):
            return super().faced(context, queries, each=each, unit=unit)
        import torch

        from assay.numerics import pairs
        from assay.numerics.persample import trainable

        asked = queries.init(context)
        own = asked if queries == self else self.init(context)

        def reads() -> Iterator[pairs.Read]:
            for batch in context.batches(context.target):
                yield partial(queries.read, asked, batch)

        places = torch.from_numpy(batch_places(context, context.target)) if each else None
        held = pairs.queries(reads, trainable(context.task.module), unit=unit, places=places)
        return _Met(self, own, held, self.sense * queries.sense, unit)
