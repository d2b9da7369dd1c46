"""TracIn: first-order influence along the training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Faced, Featurizer, Scorer, Targets, target_columns


@dataclass(frozen=True)
class _State:
    columns: tuple[str, ...]
    faced: list[tuple[float, Faced]]
    """Each mark's share of the score, and its features of the pool, facing those of the target."""
    models: int

    @property
    def passes(self) -> float:
        return sum(f.passes for _, f in self.faced) / self.models


class TracIn(Scorer):
    """What visits to an example did to the target loss, read at marks of the training run (TracInCP).

    Formula: s_i = mean over scoring models of (1/S) sum_k rate_k <phi_qk, phi_ik>, mean over q; S = steps of the run,
        rate_k = sum of the learning rates of the steps between mark k-1 and mark k
    Reference: Pruthi et al. 2020, arXiv:2002.08484
    Note: the fall of the target loss at a visit, had the step been taken on the example alone, mean over the moments of
        the run: with an example's n_i of the T terms of a step and V visits, SGD owes it V n_i / T times as much. A
        model of unknown history counts as one step at rate 1: then it is graddot. Marks are proxy.checkpoints, at
        equal distances; `features` with metric = 'adam' follow AdamW's steps, up to their momentum. `queries`:
        features of the target where they are other than the pool's; targets = 'each' gives a column for each target
        example
    """

    features: Featurizer = "gradients"  # type: ignore[assignment]
    queries: Featurizer | None = None
    targets: Targets = "mean"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and visit"
    measures_utility: ClassVar[bool] = True
    every: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        shares = [
            mark.rate / sum(m.steps for m in run) / len(context.trajectories)
            for run in context.trajectories
            for mark in run
        ]
        members, asked = (context.members(f, every=True) for f in (self.features, self.queries or self.features))
        if not len(members) == len(asked) == len(shares):
            raise InputError(
                f"tracin: features are of {len(members)} models, queries of {len(asked)}",
                why=f"the training runs left {len(shares)} marks",
                fix="take features with the options `model` and `checkpoint`, as gradients have",
            )
        each = self.targets == "each"
        faced = [own.faced(context, other, each=each) for own, other in zip(members, asked, strict=True)]
        return _State(
            target_columns(context, self.targets), list(zip(shares, faced, strict=True)), len(context.trajectories)
        )

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        return sum(share * f.products(batch) for share, f in state.faced)
