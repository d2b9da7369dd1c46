"""RelatIF: influence, for as much as an example moves the model at all."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Method, Scorer, make


class RelatIF(Scorer):
    """Influence relative to what the example does to the model: atypical, high-loss examples no longer come first.

    Formula: version = 'loss': s_i = grad f^T H^-1 grad loss_i / sqrt(grad loss_i^T H^-1 grad loss_i);
        'weights': s_i = grad f^T H^-1 grad loss_i / |H^-1 grad loss_i|, H damped as by `influence`
    Reference: Barshan, Brunet & Dziugaite 2020, arXiv:2003.11630
    Note: the version 'loss', divided by sqrt(grad f^T H^-1 grad f), is a cosine. Curvature, damping, weight decay and
        layers are those of `influence`, by any solver but kfac and ekfac; the divisor is `self_influence` with the
        same, for up to 20,000 weights. With several scoring models both are averaged first. 0 where an example moves
        nothing
    """

    influence: Scorer = "influence"  # type: ignore[assignment]
    version: Literal["loss", "weights"] = "loss"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and root of a nat, or unit of the weights"
    measures_utility: ClassVar[bool] = True

    @property
    def own(self) -> Scorer:
        """The scorer of the divisor."""
        given = self.influence.spec()
        if given["name"] != "influence":
            raise InputError(
                f"relatif: {given['name']!r} is not the scorer 'influence'", why="its curvature is needed again",
                fix="influence = 'influence', or a table with that name and options",
            )  # fmt: skip
        if given["solver"] in ("kfac", "ekfac"):
            raise InputError(
                f"relatif: solver = {given['solver']!r} of its influence has no divisor",
                why="the divisor factorises the whole curvature, which Kronecker factors only approximate",
                fix="influence = {name = 'influence', solver = 'cg'}, or 'exact'",
            )
        same = {name: given[name] for name in ("curvature", "layers", "damping", "scale", "weight_decay", "seed")}
        if same["scale"] == "model":  # one matrix of all weights has but one mean eigenvalue
            same["scale"] = "eigenvalue"
        return make(Scorer, {"name": "self_influence", "of": self.version, **same})

    def children(self) -> list[Method]:
        return [self.influence, self.own]

    def init(self, context: Context) -> Any:
        context.table(self.own)
        return context.table(self.influence).columns, len(context.pool)

    def columns(self, state: Any) -> tuple[str, ...]:
        return state[0]

    def score(self, state: Any, batch: Batch) -> Any:
        _, count = state
        influence, own = batch.table(self.influence), -batch.table(self.own)[:, :1]
        # Both carry 1/N, or its square, which cancels but for a root.
        own = np.sqrt(own / count if self.version == "loss" else own)
        return np.divide(influence, own, out=np.zeros_like(influence), where=own > 0)
