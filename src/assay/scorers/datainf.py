"""DataInf: influence in closed form, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, NonNegative, Scorer, Targets, batch_places, target_columns

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _State:
    task: Any
    columns: tuple[str, ...]
    names: tuple[str, ...]
    models: list[tuple[dict[str, Tensor], Tensor, set[str]]]
    """Parameters, the directions `[p, c]`, and the parameters that go without rules."""


class DataInf(Scorer):
    """Influence with the mean of inverses in place of the inverse of the mean: no solver, two passes over the pool.

    Formula: s_i = (1/N) sum over layers of v^T (1/N) sum_j (g_j g_j^T + lambda I)^-1 g_i, v = grad f, g = grad loss,
        = (1/N) sum over layers of (v^T g_i - (1/N) sum_j (v^T g_j) (g_j^T g_i) / (lambda + |g_j|^2)) / lambda,
        lambda = damping x the layer's mean eigenvalue, (1/N) sum_j |g_j|^2 / p
    Reference: Kwon et al. 2024, arXiv:2310.00902
    Note: an approximation twice over: layers are independent, and the inverse is swapped with the mean, which is
        right only where damping outweighs the gradients; H is the empirical Fisher matrix. As damping grows it becomes
        GradDot / (N lambda). A layer is a module with its weight and bias; averaged over the scoring models
    """

    targets: Targets = "mean"
    measure: Literal["loss", "margin"] = "loss"
    layers: Literal["all", "linear"] = "all"
    damping: NonNegative = 0.1
    precision: Literal["float64", "float32"] = "float64"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit weight"
    measures_utility: ClassVar[bool] = True

    def init(self, context: Context) -> _State:
        import torch

        from assay.numerics.curvature import parameters
        from assay.train.rules import audited

        if self.damping == 0:
            raise InputError(
                "datainf: damping is 0", why="the inverse of one example's matrix needs it", fix="damping = 0.1"
            )
        names = tuple(parameters(context.task, context.models[0], self.layers))
        models = []
        for params in context.models:
            held = {n: p.to(getattr(torch, self.precision)) for n, p in params.items()}
            slow = audited(context, self.name, held, names)
            models.append((held, self._directions(context, held, names, slow) / len(context.pool), slow))
        return _State(context.task, target_columns(context, self.targets), names, models)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def _directions(self, context: Context, params: Any, names: tuple[str, ...], slow: set[str]) -> Tensor:
        """sum over layers of (1/N) sum_j (g_j g_j^T + lambda)^-1 v, `[p, c]`."""
        import torch

        from assay.numerics.curvature import exact_gradients, reading, slopes

        f, inputs = reading(context.task, self.measure), (batch.inputs for batch in context.batches(context.target))
        v = slopes(context.task, params, inputs, f, names, each=self.targets == "each", fallback=slow)
        v = v[:, batch_places(context, context.target)] if self.targets == "each" else v
        spans, count = _spans(params, names), len(context.pool)

        def gradients() -> Iterator[Tensor]:
            for batch in context.batches(context.pool):
                yield exact_gradients(context.task, params, batch.inputs, only=names, fallback=slow)

        squares = sum(torch.stack([g[:, s].square().sum() for s in spans]) for g in gradients())
        assert not isinstance(squares, int)
        sizes = torch.tensor([s.stop - s.start for s in spans], dtype=v.dtype)
        lambdas = self.damping * squares / count / sizes
        total = torch.zeros_like(v)
        for g in gradients():
            for s, level in zip(spans, lambdas, strict=True):
                part = g[:, s]
                # A layer that nothing depends on has no gradients, and no level: it stays at zero.
                share = (part @ v[s]) / (level + part.square().sum(dim=1, keepdim=True)).clamp_min(_least(v))
                total[s] += part.T @ share
        forward = context.task.forward_flops(context.encoded(context.pool).sizes)
        context.spent(2 * 3 * forward + 4.0 * count * v.numel())
        least = float(lambdas.min())
        context.note(
            "datainf: damping", f"the layers' levels are from {least:.3g} to {float(lambdas.max()):.3g}",
            damping=[float(x) for x in lambdas],
        )  # fmt: skip
        found = (v - total / count) / torch.cat(
            [x.expand(s.stop - s.start) for s, x in zip(spans, lambdas, strict=True)]
        ).clamp_min(_least(v))[:, None]
        for s, level in zip(spans, lambdas, strict=True):
            found[s] *= float(level) > 0
        return found

    def score(self, state: _State, batch: Batch) -> Any:
        from assay.numerics.curvature import dots

        task, inputs, names = state.task, batch.inputs, state.names
        found = [dots(task, params, inputs, x, names, slow).numpy() for params, x, slow in state.models]
        return np.mean(found, axis=0, dtype=np.float64)


def _least(like: Tensor) -> float:
    import torch

    return torch.finfo(like.dtype).tiny


def _spans(params: Any, names: tuple[str, ...]) -> list[slice]:
    """Where each layer's entries stand: parameters of one module that follow one another."""
    spans: list[slice] = []
    owner, start = "", 0
    for name in names:
        stop, module = start + params[name].numel(), name.rpartition(".")[0]
        if spans and module == owner:
            spans[-1] = slice(spans[-1].start, stop)
        else:
            spans.append(slice(start, stop))
        owner, start = module, stop
    return spans
