"""Per-example gradients, projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from assay.core.method import Batch, Context, Cost, Featurizer

if TYPE_CHECKING:
    from torch import Tensor

    from assay.core.task import Task
    from assay.numerics.project import Factored


@dataclass(frozen=True)
class _State:
    task: Task
    params: dict[str, Tensor]
    sketch: Factored


class Gradients(Featurizer):
    """Gradient of each example's loss (mean over its terms) in the weights, projected on both sides.

    Formula: phi_i = concat over layers of P_o (d loss_i / d W) P_i^T, entries of P +-1/sqrt(rank) by counter hash
    Reference: Choe et al. 2024, arXiv:2405.13954 (factored projection); METHODS: Park et al. 2023, arXiv:2303.14186
    Note: rank 0 keeps exact gradients; measure = 'margin' is for classifiers, f = log p - log(1 - p)
    """

    rank: int = 16
    seed: int = 0
    model: int = 0
    measure: Literal["loss", "margin"] = "loss"

    cost: ClassVar[Cost] = "gradient"

    def init(self, context: Context) -> _State:
        from assay.numerics.project import Factored

        return _State(context.task, context.models[self.model], Factored(self.rank, self.seed))

    def columns(self, state: _State) -> tuple[str, ...]:
        from assay.numerics.persample import layout

        return tuple(f"{name}:{i}" for name, width in layout(state.task.module, state.sketch) for i in range(width))

    def featurize(self, state: _State, batch: Batch) -> Any:
        from assay.numerics.persample import flatten, gradients

        measure = state.task.loss if self.measure == "loss" else state.task.margin  # type: ignore[attr-defined]
        params = {n: p.detach() for n, p in state.params.items()}
        found, _ = gradients(state.task.module, lambda: measure(params, batch.inputs), state.sketch)
        return flatten(found)
