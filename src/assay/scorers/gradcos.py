"""Cosine of gradients."""

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


class GradCos(Scorer):
    """Mean cosine of an example's gradient with the target's gradients: direction without size.

    Formula: s_i = mean over q of <phi_q, phi_i> / (|phi_q| |phi_i|); 0 where a gradient is zero
    Reference: Xia et al. 2024, arXiv:2402.04333 (cosine of gradients in LESS)
    Note: averaged over the scoring models; `queries`: features of the target where they are other than the pool's;
        targets = 'each' gives a column for each target example
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]
    queries: Featurizer | None = None
    targets: Targets = "mean"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "cosine"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        members = zip(context.members(self.features), context.members(self.queries or self.features), strict=True)
        faced = [own.faced(context, other, each=self.targets == "each", unit=True) for own, other in members]
        return _State(target_columns(context, self.targets), faced)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        return sum(f.products(batch) for f in state.faced) / len(state.faced)
