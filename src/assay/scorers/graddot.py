"""First-order influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from assay.core.method import Batch, Context, Cost, Faced, Featurizer, Scorer, Targets, target_columns


@dataclass(frozen=True)
class _State:
    columns: tuple[str, ...]
    faced: list[Faced]
    """For each scoring model its features of the pool, facing those of the target."""

    @property
    def passes(self) -> float:
        return sum(f.passes for f in self.faced) / len(self.faced)


class GradDot(Scorer):
    """Dot product of an example's gradient with the target's mean gradient: the effect of one infinitesimal SGD step.

    Formula: s_i = mean over q of <phi_q, phi_i>
    Reference: Pruthi et al. 2020, arXiv:2002.08484 (TracIn at one checkpoint)
    Note: averaged over the scoring models; grows with the size of the example's gradient; `queries`: features of the
        target where they are other than the pool's; targets = 'each' gives a column for each target example
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]
    queries: Featurizer | None = None
    targets: Targets = "mean"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit step"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        members = zip(context.members(self.features), context.members(self.queries or self.features), strict=True)
        faced = [own.faced(context, other, each=self.targets == "each") for own, other in members]
        return _State(target_columns(context, self.targets), faced)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        return sum(f.products(batch) for f in state.faced) / len(state.faced)
