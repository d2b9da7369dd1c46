"""Per-example gradients, projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from assay.core.method import Batch, Context, Cost, Count, Featurizer

if TYPE_CHECKING:
    from torch import Tensor

    from assay.core.task import Task
    from assay.numerics.project import Sketch

# Examples on which the engine is compared with plain backward passes, before anything is computed with it.
PROBE = 6


@dataclass(frozen=True)
class _State:
    task: Task
    params: dict[str, Tensor]
    sketch: Sketch
    only: frozenset[str]
    fallback: frozenset[str]


class Gradients(Featurizer):
    """Gradient of each example's loss (mean over its terms) in the weights, projected.

    Formula: phi_i = S (d loss_i / d theta), S a `[size, p]` matrix of random signs, one in each column for 'sparse';
        'factored': concat over layers of P_o (d loss_i / d W) P_i^T, entries of P +-1/sqrt(rank)
    Reference: Hu et al. 2025, arXiv:2505.18976 (sparse, masked); Choe et al. 2024, arXiv:2405.13954 (factored);
        Park et al. 2023, arXiv:2303.14186 (dense)
    Note: sparse has the error of dense at a small part of its cost; factored needs no gradient of the size of a weight
        and is cheaper, but for as many numbers its error is many times that; size is for 'sparse', 'masked' and
        'dense', rank for 'factored'; measure = 'margin' is for classifiers, f = log p - log(1 - p); layers = 'linear'
        leaves out embeddings, norms and convolutions; 'bfloat16' runs the model in it and sums in float32
    """

    projection: Literal["sparse", "factored", "masked", "dense", "exact"] = "sparse"
    size: Count = 4096
    rank: Count = 16
    seed: int = 0
    model: int = 0
    measure: Literal["loss", "margin"] = "loss"
    layers: Literal["all", "linear"] = "all"
    precision: Literal["float32", "bfloat16"] = "float32"

    cost: ClassVar[Cost] = "gradient"

    def init(self, context: Context) -> _State:
        task, params = context.task, context.models[self.model]
        state = _State(task, params, self.sketch(), self.names(task), frozenset())
        return self._audited(state, context)

    def sketch(self) -> Sketch:
        """The projection that the options name."""
        from assay.core.errors import InputError
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
        from dataclasses import replace

        from assay.numerics.persample import audit

        inputs, only = context.sample(PROBE).inputs, set(state.only)
        found = audit(state.task.module, self._measure(state), state.params, inputs, state.sketch, only=only)
        if found.fallback:
            context.warn(
                f"gradients: {len(found.fallback)} parameters have no rule and take the slow path "
                f"({', '.join(found.fallback[:3])}{', ...' if len(found.fallback) > 3 else ''})"
            )
        context.note(
            "gradients against plain backward passes",
            f"{PROBE} examples are off by {found.error:.1e} of their size; the layers hold {100 * found.share:.1f}% "
            "of the squared norm",
            share=found.share, error=found.error, fallback=list(found.fallback),
        )  # fmt: skip
        return replace(state, fallback=frozenset(found.fallback))

    def _measure(self, state: _State) -> Any:
        return state.task.loss if self.measure == "loss" else state.task.margin  # type: ignore[attr-defined]

    def columns(self, state: _State) -> tuple[str, ...]:
        from assay.numerics.persample import layout

        blocks = layout(state.task.module, state.sketch, set(state.only))
        return tuple(f"{name}:{i}" for name, width in blocks for i in range(width))

    def featurize(self, state: _State, batch: Batch) -> Any:
        import torch

        from assay.numerics.persample import flatten, gradients

        device = next(iter(state.params.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found, _ = gradients(
                state.task.module, self._measure(state), state.params, batch.inputs, state.sketch,
                only=set(state.only), fallback=set(state.fallback),
            )  # fmt: skip
        return flatten(found, state.sketch)
