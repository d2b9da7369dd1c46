"""Options of a scorer, chosen without retraining and without a look at what will be reported."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from assay.core.errors import InputError, nearest
from assay.core.keys import digest, shuffled
from assay.core.method import Batch, Context, Cost, Count, Method, Positive, Scorer, Targets
from assay.core.pool import Pool

Parts = Annotated[int, pydantic.Field(ge=2)]


@dataclass(frozen=True)
class _State:
    best: Scorer
    columns: tuple[str, ...]
    passes: float = 0.0


class Tuned(Scorer):
    """Another scorer, at the options whose scores foretell best what short training on parts of the pool does.

    Formula: argmax over the grid of mean over q of Spearman over g of (sum over i in g of s_iq, loss_q(params) -
        loss_q(params_g)), params_g = after `steps` optimiser steps from the scoring model on part g of the pool
    Reference: short fine-tuning as the truth of influence, as in Bae et al. 2022, arXiv:2209.05364; linear datamodeling
        score as in Park et al. 2023, arXiv:2303.14186
    Note: a keyed sample of the pool is cut at random into `parts`, again and again until there are `groups` of them;
        all train with the same examples in the same places, those outside the part at weight 0. Options are chosen on
        half of `count` target examples of the half that selects (never of those that a verification reports), and the
        report has their figures on the other half beside; nothing is retrained from scratch. Keys of `grid` are options
        of `inner`, "features.size" is one of its features (and `queries`, if it has them). More steps ask for less
        damping. Trained from the first scoring model. `targets` is handed to `inner`
    """

    inner: Scorer = "trak"  # type: ignore[assignment]
    grid: dict[str, list[Any]] = dataclasses.field(default_factory=lambda: {"damping": [0.01, 0.1, 1.0]})
    targets: Targets = "mean"
    groups: Count = 16
    parts: Parts = 2
    steps: Count = 100
    lr: Positive = 1e-3
    optimiser: Literal["adamw", "sgd"] = "adamw"
    terms_per_step: Count = 1024
    sample: Count = 2000
    count: Count = 64
    seed: int = 0

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "as the scorer within"
    measures_utility: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.points()

    def training_terms(self, pool: float, target: float) -> float:
        return float(self.groups * self.steps * self.terms_per_step)

    def points(self) -> list[tuple[dict[str, Any], Scorer]]:
        """Every combination of the grid's options, and the scorer that has them."""
        found = []
        for values in itertools.product(*self.grid.values()):
            options, made = dict(zip(self.grid, values, strict=True)), self.inner
            for key, value in options.items():
                made = _changed(made, key, value)
            found.append((options, made))
        if not found or not hasattr(self.inner, "targets"):
            raise InputError(
                f"tuned: nothing to choose of {self.inner.name}",
                why="the grid is empty" if not found else "it gives no scores for each target example",
                fix='inner with an option `targets`, and a grid such as {damping = [0.01, 0.1, 1.0]}',
            )  # fmt: skip
        return found

    def init(self, context: Context) -> _State:
        pool, asked, judged = self._parts(context)
        masks = self._masks(pool.ids)
        falls = self._falls(context, pool, asked, masks)
        inside, rows = context.asking(asked, pool), []
        for options, scorer in self.points():
            table = inside.table(dataclasses.replace(scorer, **{"targets": "each"}))
            found = _correlations(masks @ table.align(pool.ids).values, falls)
            held_out = float(found[judged].mean()) if judged.any() else None
            rows.append({"options": options, "tuning": float(found[~judged].mean()), "held_out": held_out})
        best = int(np.argmax([row["tuning"] for row in rows]))
        said = [
            ", ".join(f"{k} {v}" for k, v in row["options"].items()) + f": {row['tuning']:.3f}"
            + (f" / {row['held_out']:.3f}" if row["held_out"] is not None else "")
            + (" (chosen)" if k == best else "")
            for k, row in enumerate(rows)
        ]  # fmt: skip
        context.note(
            f"options of {self.inner.name} against {len(masks)} short trainings",
            f"mean Spearman on the targets that choose / on others: {'; '.join(said)}", table=rows,
        )  # fmt: skip
        chosen = dataclasses.replace(self.points()[best][1], **{"targets": self.targets})
        return _State(chosen, context.table(chosen).columns)

    def _parts(self, context: Context) -> tuple[Pool, Pool, np.ndarray]:
        """A keyed sample of the pool without barred rows, one of the target, and which of that does not choose."""
        free = np.flatnonzero(~np.isin(context.pool.ids, context.barred))
        rows = free[shuffled(context.pool.ids[free], "tuned", "pool", self.seed)[: self.sample]]
        may = np.flatnonzero(~np.isin(context.target.ids, context.withheld))
        order = may[shuffled(context.target.ids[may], "tuned", "target", self.seed)[: self.count]]
        if len(rows) < 2 * self.parts:
            raise InputError(
                f"tuned: {len(rows)} examples cannot be cut into {self.parts} parts", where="tuned",
                why="a part needs at least two", fix="lower `parts`, or give a larger pool",
            )  # fmt: skip
        if not len(order):
            raise InputError(
                "tuned: no target example may choose options", where="tuned", why="all are withheld for the report",
                fix="give the half of the target that selects some examples",
            )  # fmt: skip
        judged = np.arange(len(order)) >= -(-len(order) // 2)
        whole = len(rows) == len(context.pool)
        return context.pool if whole else context.pool.at(np.sort(rows)), context.target.at(order), judged

    def _masks(self, ids: np.ndarray) -> np.ndarray:
        """`[groups, n]`: the parts of one keyed cut after the other, all of one size."""
        masks, size = np.zeros((self.groups, len(ids)), dtype=bool), len(ids) // self.parts
        for g in range(self.groups):
            cut, part = divmod(g, self.parts)
            order = shuffled(ids, "tuned", "cut", self.seed, cut)
            masks[g, order[part * size : (part + 1) * size]] = True
        return masks

    def _falls(self, context: Context, pool: Pool, asked: Pool, masks: np.ndarray) -> np.ndarray:
        """How much the loss of each target example falls in training on each part, `[groups, q]`."""
        from assay.core.selection import Selection
        from assay.train.loop import evaluate, train
        from assay.train.recipe import Recipe

        recipe = Recipe(
            steps=self.steps, lr=self.lr, optimiser=self.optimiser, terms_per_step=self.terms_per_step,
            weight_decay=0.0, warmup=0.1, seed=int(digest(self.seed, "tuned")[:8], 16),
        )  # fmt: skip
        task, start, rows = context.task, context.models[0], np.arange(len(pool))
        encoded, questions = context.encoded(pool), context.encoded(asked)
        context.spent(task.training_flops(encoded.sizes, self.training_terms(0, 0)))
        before, falls = evaluate(task, start, questions)["loss"], []
        for mask in masks:
            chosen = Selection(pool.ids, mask.astype(np.float64))
            after = train(task, encoded, rows, chosen, recipe, start=start).params
            falls.append(before - evaluate(task, after, questions)["loss"])
        return np.stack(falls)

    def columns(self, state: _State) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State, batch: Batch) -> Any:
        return batch.table(state.best)


def _changed(method: Any, key: str, value: Any) -> Any:
    """The method with one option changed; "features.size" is an option of its features."""
    head, _, rest = key.partition(".")
    known = [f.name for f in dataclasses.fields(method)]
    if head not in known or (rest and not isinstance(getattr(method, head), Method)):
        raise InputError(f"tuned: {method.name!r} has no option {key!r}", where="grid", fix=nearest(head, known))
    heads = [head]
    if rest and rest != "measure" and head == "features" and isinstance(getattr(method, "queries", None), Method):
        heads.append("queries")  # both are vectors of one space
    return dataclasses.replace(
        method, **{h: _changed(getattr(method, h), rest, value) if rest else value for h in heads}
    )


def _correlations(predicted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Rank correlation of each column, `[q]`; 0 where one side says nothing."""
    from assay.numerics.stats import spearman

    return np.nan_to_num([spearman(a, b) for a, b in zip(predicted.T, found.T, strict=True)])
