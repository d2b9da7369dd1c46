"""Metagradients: what training on each example did to the target, differentiated exactly."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from assay.core.errors import InputError
from assay.core.keys import digest
from assay.core.method import (
    Batch,
    Context,
    Cost,
    Count,
    Positive,
    Scorer,
    Targets,
    batch_places,
    target_columns,
)
from assay.core.pool import among
from assay.train import finite
from assay.train.recipe import overlaid

if TYPE_CHECKING:
    from torch import Tensor

    from assay.train.additions import Additions
    from assay.train.replay import Training

# Numbers in the adjoints of all targets that share a sweep: half a gigabyte in float32.
HELD = 1 << 27
# Steps at which examples are added, where not all were visited.
INSERTIONS = 4
# Targets whose slopes are made at a time.
SLOPES = 32


@dataclass(frozen=True)
class _State:
    columns: tuple[str, ...]
    ids: np.ndarray
    """Of the pool, sorted."""
    sizes: np.ndarray
    scores: np.ndarray
    """Of their visits, `[n, columns]`; of no row where examples are scored as additions."""
    pushes: list[Additions]


class Metagrad(Scorer):
    """Metagradient: the exact derivative of the target's loss after training to each example's data weight.

    Formula: s_i = -d f(theta_T) / d w_i at w = center, theta_T by the steps theta <- update((1/T) sum_{i in batch} w_i
        n_i grad loss_i), f = mean target loss; `insert` = m: -(1/m) sum over m steps of d f / d zeta_i, where such a
        step has zeta_i n_i loss_i / T added for every example of the pool
    Reference: Engstrom et al. 2025, arXiv:2503.13751 (metagradients, REPLAY); Ilyas & Engstrom 2025, arXiv:2504.16430
        (MAGIC); Maclaurin et al. 2015, arXiv:1502.03492
    Note: trains models of its own, by the scoring models' recipe and seeds with the keys of `recipe` laid over it, and
        runs back through their steps: about as dear as five trainings for one target, and two more for each further one
        that shares the sweep (up to `together`). center is the data weight of all examples at which training is made
        linear: subsets of a share alpha weigh alpha on average, so the share that will be kept is a good one. masks = m
        averages over m trainings around it: of random subsets of the share center where spread = 1, and between center
        and such a subset by the share `spread`; of center >= 1, at weights of center (1 + spread) for a random half of
        the examples and center (1 - spread) for the others. Every second one is the mirror image of the one before, if
        no weight is negative there. Two of spread .5 foretold random halves better than the center alone in the worlds
        where they were compared (LOG.md). Examples that training never visits have no weight to differentiate: where
        there are any, or insert > 0, all are scored as additions to a few steps (4 unless `insert` says more). For the
        mean target the score is divided by n_i, as what fills a budget of terms should be; rows that contain target
        items are not trained on and score 0 for their visits. window = m runs back through the last m steps alone.
        phases = P adds a column for each of P equal spans of time: the utility of one visit there, n_i and all (mean
        target only). AdamW gets an eps_root where it has none, the mean square of a first gradient's entries (far
        below, its first steps are signs, whose derivative foretells little); dropout stays as the step drew it. `check`
        finite differences, along random directions over all weights, are noted beside the derivatives: where they
        differ, training is not smooth at that scale and scores foretell little
    """

    center: Positive = 1.0
    masks: Annotated[int, pydantic.Field(ge=0)] = 0
    spread: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    insert: Annotated[int, pydantic.Field(ge=0)] = 0
    window: Annotated[int, pydantic.Field(ge=0)] = 0
    phases: Count = 1
    targets: Targets = "mean"
    measure: Literal["loss", "margin"] = "loss"
    models: Count = 1
    recipe: dict[str, Any] | None = None
    branch: Annotated[int, pydantic.Field(ge=0)] = 0
    together: Count = 256
    check: Annotated[int, pydantic.Field(ge=0)] = 1
    precision: Literal["float32", "float64"] = "float32"

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "nats per term and unit weight"
    measures_utility: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        return float(self.insert)

    def training_terms(self, pool: float, target: float) -> float:
        # A training is three forward passes' worth a term, as are the replay and the finite differences; two thirds of
        # a reversed step are as dear as a training step each.
        length = overlaid(self.name, None, self.recipe) if self.recipe and "steps" in self.recipe else None
        terms = pool if length is None else length.steps * length.terms_per_step
        back = 3 * min(1, self.window / length.steps) if self.window and length else 3
        return terms * max(1, self.masks) * self.models * (2 + back + 2 * self.check)

    def init(self, context: Context) -> Any:
        columns = target_columns(context, self.targets)
        if self.phases > 1:
            if self.targets == "each":
                raise InputError(
                    "metagrad: phases are of the mean target", why="targets is 'each'",
                    fix="targets = 'mean', or phases = 1",
                )  # fmt: skip
            columns = (*columns, *(f"phase {p + 1}" for p in range(self.phases)))
        rows = np.flatnonzero(~np.isin(context.pool.ids, context.barred))
        trainings = self._trainings(context, rows)
        visits = [t.visits(self._since(t.recipe.steps), self.phases) for t in trainings]
        insert = self._insertions(context, trainings[0].recipe.steps, np.min(visits, axis=0))
        sizes, n = context.encoded(context.pool).sizes, len(context.pool)
        scores, pushes = np.zeros((0 if insert else n, len(columns))), []
        for index, (training, seen) in enumerate(zip(trainings, visits, strict=True)):
            phases, made = _Sweeps(self, context, training, insert).found(first=index == 0)
            if insert:
                pushes.append(made)
                continue
            each = [-p / v[:, None] for p, v in zip(phases, seen, strict=True) if self.phases > 1]
            scores[rows] += np.hstack([-phases.sum(axis=0), *each]) / len(trainings)
        if not insert and self.targets == "mean":
            scores[:, 0] /= sizes
        order = np.argsort(context.pool.ids, kind="stable")
        return _State(columns, context.pool.ids[order], sizes[order], scores[order] if len(scores) else scores, pushes)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        where, known = among(state.ids, batch.ids)
        if not known.all():
            raise InputError("metagrad: there are examples that were not trained on", fix="score the pool itself")
        if not state.pushes:
            return state.scores[where]
        found = [own.utilities(batch.inputs, state.sizes[where]) for own in state.pushes]
        steps = np.mean(found, axis=0)  # [steps, b, c]
        whole = steps.mean(axis=0) / (state.sizes[where][:, None] if self.targets == "mean" else 1)
        return np.hstack([whole, *(steps if self.phases > 1 else [])])

    def _trainings(self, context: Context, rows: np.ndarray) -> list[Training]:
        """One for each model and mask."""
        import torch

        from assay.core.selection import Selection
        from assay.train.bank import subsets
        from assay.train.replay import Training
        from assay.train.root import rooted

        ids, encoded = context.pool.ids[rows], context.encoded(context.pool)
        weights = [np.full(len(ids), self.center)]
        if self.spread < 1 and not self.masks:
            raise InputError(
                f"metagrad: spread = {self.spread:g} without masks", why="it says how far masks lie from the center",
                fix="masks = 2, say",
            )  # fmt: skip
        if self.masks:
            share = self.center if self.center < 1 else 0.5
            drawn = subsets(ids, self.masks, share, int(digest("metagrad", context.seed)[:8], 16))
            weights = list(around(drawn, self.center, self.spread))
        dtype = getattr(torch, self.precision)
        recipe = rooted(context, "metagrad", overlaid("metagrad", context.recipe, self.recipe), rows)
        return [
            Training(
                context.task,
                encoded,
                rows,
                Selection(ids, w),
                recipe.with_seed(recipe.seed + k),
                dtype=dtype,
                data=context.pool.fingerprint,
            )
            for k in range(self.models)
            for w in weights
        ]

    def _since(self, steps: int) -> int:
        return max(0, steps - self.window) if self.window else 0

    def _insertions(self, context: Context, steps: int, least: np.ndarray) -> list[int]:
        """Steps at which examples are added; none where each has visits of its own in every phase of every training.
        `least` [P, n]: the fewest visits of any."""
        since, count = self._since(steps), self.insert
        missed = int((least == 0).any(axis=0).sum())
        if (count or missed) and self.phases > 1:
            count = self.phases
        elif missed and not count:
            count = INSERTIONS
        count = min(count, steps - since)
        if missed and not self.insert:
            context.note(
                "metagrad: additions", f"training does not visit {missed} of {least.shape[1]} examples "
                f"{'in every phase' if self.phases > 1 else 'at all'}: all are scored as additions to {count} of its "
                "steps", steps=count,
            )  # fmt: skip
        return [since + int((j + 0.5) * (steps - since) / count) for j in range(count)]


def around(masks: np.ndarray, center: float, spread: float) -> np.ndarray:
    """Data weights `[m, n]` between `center` and each mask, or center (1 +- spread) from 1 on; odd ones mirror the one
    before, unless that is negative.

    >>> around(np.array([[True, False], [True, False]]), 0.5, 0.5).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    >>> around(np.array([[True, False], [True, False]]), 1.0, 0.5).tolist()
    [[1.5, 0.5], [0.5, 1.5]]
    """
    apart = spread * (masks - center if center < 1 else center * (2 * masks - 1.0))
    if center >= 1 or spread * (1 - center) <= center:
        apart[1::2] = -apart[: 2 * (len(apart) // 2) : 2]
    return center + apart


@dataclass(frozen=True)
class _Sweeps:
    """The sweeps of one training: as many targets at once as fit."""

    method: Metagrad
    context: Context
    training: Training
    insert: list[int]

    def found(self, first: bool) -> tuple[np.ndarray, Additions]:
        """d f / d w by phase `[P, n, c]`, and what additions are scored by."""
        import torch

        from assay.train.additions import Additions
        from assay.train.loop import load

        training, method = self.training, self.method
        names = tuple(training.moved)
        slow = self._audited(names) if self.insert or method.targets == "each" else set()
        count = len(self.context.target) if method.targets == "each" else 1
        numbers = sum(training.first[n].numel() for n in names) * (1 + len(training.initial().slots))
        most = max(1, min(method.together, HELD // numbers))
        parts = [range(at, min(at + most, count)) for at in range(0, count, most)]
        held = [load(self._kept(part, names, slow) / "found.safetensors").params for part in parts]
        if first and method.check and not (self.insert and method.masks):
            self._checked(held[0], parts[0], names, slow)
        phases = np.concatenate([h["phases"].numpy() for h in held], axis=2)
        steps = []
        for step in self.insert:
            params = {n: held[0][f"weights.{step}.{n}"] for n in training.first}
            steps.append((params, torch.cat([h[f"push.{step}"] for h in held], dim=1)))
        return phases, Additions(training.task, names, slow, steps, training.recipe.terms_per_step)

    def _audited(self, names: tuple[str, ...]) -> set[str]:
        from assay.train.rules import audited

        return audited(self.context, self.method.name, self.training.first, names)

    def _slopes(self, params: Any, part: range, names: tuple[str, ...], slow: set[str]) -> Tensor:
        from assay.numerics.curvature import reading, slopes

        context, method = self.context, self.method
        f = reading(context.task, method.measure)
        if method.targets == "mean":
            inputs = (b.inputs for b in context.batches(context.target))
            return slopes(context.task, params, inputs, f, names, each=False)
        # Of this part alone: slopes of all targets of a large model would not fit.
        encoded, rows = context.encoded(context.target), np.array(part)
        some = (encoded.inputs(rows[at : at + SLOPES]) for at in range(0, len(rows), SLOPES))
        return slopes(context.task, params, some, f, names, each=True, fallback=slow)

    def _values(self, params: Any, part: range) -> np.ndarray:
        """f of the targets of this part, `[c]`."""
        import torch

        from assay.numerics.curvature import reading

        context, f = self.context, reading(self.context.task, self.method.measure)
        with torch.no_grad():
            found = np.concatenate([f(params, b.inputs).double().numpy() for b in context.batches(context.target)])
        found = found[batch_places(context, context.target)]
        return found[list(part)] if self.method.targets == "each" else found.mean(keepdims=True)

    def _kept(self, part: range, names: tuple[str, ...], slow: set[str]) -> Path:
        """The folder of a finished sweep."""
        from assay.train import loop
        from assay.train.replay import metagradient

        context, method, training = self.context, self.method, self.training
        steps = training.recipe.steps
        since = method._since(steps)

        def build(path: Path) -> None:
            made = metagradient(
                training, lambda params: self._slopes(params, part, names, slow), branch=method.branch, since=since,
                phases=method.phases, pushes=self.insert, path=path / "states", progress=context.progress,
            )  # fmt: skip
            import torch

            tensors = {"phases": torch.from_numpy(made.phases)}
            for step, (params, push) in made.pushes.items():
                tensors[f"push.{step}"] = torch.cat([a.flatten(1) for a in push], dim=1).T.contiguous()
                tensors |= {f"weights.{step}.{n}": p for n, p in params.items()}
            tensors |= {f"final.{n}": p for n, p in made.final.items()}
            loop.save(path / "found.safetensors", loop.Trained(tensors, {}, []), "")
            shutil.rmtree(path / "states")

        key = (
            training.key(), context.target.fingerprint, method.measure, method.targets, [part.start, part.stop],
            method.branch, since, method.phases, self.insert,
        )  # fmt: skip
        one = context.task.training_flops(training.encoded.sizes[training.rows], training.recipe.terms_per_step)
        spent = one * (2 * steps + (steps - since) * (1 + 2 * len(part)))
        return context.kept("sweep", key, build, flops=spent)

    def _checked(self, held: dict[str, Tensor], part: range, names: tuple[str, ...], slow: set[str]) -> None:
        """Finite differences beside the derivatives, along random signs over all weights that were differentiated."""
        training, context = self.training, self.context
        since, steps = self.method._since(training.recipe.steps), training.recipe.steps
        before = training.initial()
        for step in range(since):
            before = training.advance(before, step)
        base, apart = training.selection.weights, []
        for index in range(self.method.check):
            signs, h = finite.signs(training.selection.ids, index), finite.STEP * float(base.mean())
            ends = [
                self._values(training.named(training.run(before, since, base + s * h * signs)), part) for s in (1, -1)
            ]
            said = np.einsum("n,pnc->c", signs, held["phases"].numpy())
            apart.append(finite.gap((ends[0] - ends[1]) / (2 * h), said))
        one = context.task.training_flops(training.encoded.sizes[training.rows], training.recipe.terms_per_step)
        context.spent(one * (since + 2 * len(apart) * (steps - since)))
        finite.tell(context, "metagrad", apart, "all data weights move by")
