"""Metagradient descent: train, ask the derivative which examples to add and which to drop, and train again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from assay.core.errors import InputError
from assay.core.keys import digest_ids, hash_ids, shuffled, uniform
from assay.core.method import Batch, Context, Cost, Count, NonNegative, Positive, Scorer
from assay.core.pool import among
from assay.train import finite
from assay.train.recipe import Recipe, overlaid

if TYPE_CHECKING:
    from torch import Tensor

    from assay.core.task import Inputs
    from assay.train.descent import Multiset

# The window that is differentiated unless told otherwise: this part of the steps. What is added too late for training
# to answer is judged by the error of the moment, and descent goes in circles: with a tenth of the steps 38% of the
# wrong labels of digits were left after ten metasteps, with a half 7% (LOG.md).
TAIL = 0.5
# Seeds of trainings that differ by metastep, away from those of scoring models, of verification and of banks.
SEEDS = 400_000


@dataclass(frozen=True)
class _Seen:
    """What one metastep measured of its multiset."""

    select: float
    hold: float
    utility: np.ndarray
    """-d f / d zeta of one more copy of each example of the pool, in the order of sorted ids."""


@dataclass(frozen=True)
class _State:
    ids: np.ndarray
    """Of the pool, sorted."""
    scores: np.ndarray


class Mgd(Scorer):
    """Metagradient descent on how often each example is trained on: train, differentiate, add and drop, again.

    Formula: c_i <- clip(c_i + sign(u_i/n_i - tau) b_i, 0, most), b_i ~ Bernoulli(rate), u_i = -d f / d zeta_i at 0 of
        training on the multiset c with zeta_i n_i loss_i / T added to one step; s_i = c_i + (1 + v_i / (|v_i| + mean
        |v|)) / 2, v = u / n, of the metastep with the least f on targets held out
    Reference: Engstrom et al. 2025, arXiv:2503.13751 (MGD)
    Note: a metastep trains on the multiset, for steps x terms_per_step terms whatever the counts are, goes back
        through the last `window` steps (0: half of them), and scores the whole pool, counts of 0 included, as additions
        to `insert` steps of it, the first where the window begins. `share` is the multiset's part of the pool's terms:
        give the budget of the cut, which then takes what descent ended with. start ranks the first multiset; without
        it, it is drawn. The size is fixed, so one copy in is another one out, and tau is the utility per term at which
        both balance; tau = 'free' is 0, as published: whatever helps comes in, whatever harms goes. Training is no
        longer for that: of a multiset larger than the budget a keyed part of all visits is made, as many terms as the
        budget has, and of a smaller one the loss is scaled up. most = 1 because a cut takes an example once; 0 lifts
        it. What has utility 0 stays. Every copy has moments of its own in training, keyed by its id: a count that
        changes moves no other example. A share `hold` of the target, keyed by id, only watches, and a larger one leaves
        descent more to fit by chance: after `patience` metasteps without a better loss on it descent ends, and the best
        counts are kept. The mean of the target alone. What a model has learnt by heart has little left to give, so one
        more copy of it is worth less than one of a stranger, however good both are: with folds = k > 1, k models train
        on the multiset without a k-th of the ids each, and score that k-th, in or out of it alike; losses are means
        over them. memory = m < 1 moves by the running mean m u_before + (1 - m) u; vary = true gives each metastep
        first weights and an order of its own, so that with memory the mean is one over them too; losses on what is held
        out are then of several seeds, whose luck may decide which counts are the best. What was trained from first
        weights on a small multiset alone answers to whatever it has not learnt by heart, and hardly tells examples
        apart; begin = 'model' goes on from the first scoring model, by few steps of a small rate: give both in
        `recipe`. That model has seen the pool already: folds say nothing then. `check` finite differences of the first
        metastep, along random directions over all additions that one model scores, are noted beside its derivative
    """

    start: Scorer | None = None
    share: Positive = 0.1
    metasteps: Count = 12
    rate: Positive = 0.2
    memory: NonNegative = 0.0
    vary: bool = False
    begin: Literal["scratch", "model"] = "scratch"
    tau: Literal["budget", "free"] = "budget"
    most: Annotated[int, pydantic.Field(ge=0)] = 1
    window: Annotated[int, pydantic.Field(ge=0)] = 0
    insert: Count = 1
    hold: Positive = 0.2
    patience: Count = 4
    folds: Count = 1
    check: Annotated[int, pydantic.Field(ge=0)] = 1
    measure: Literal["loss", "margin"] = "loss"
    recipe: dict[str, Any] | None = None
    branch: Annotated[int, pydantic.Field(ge=0)] = 0
    precision: Literal["float32", "float64"] = "float32"

    cost: ClassVar[Cost] = "retrain"
    unit: ClassVar[str] = "copies, and the rank of one more below the point"
    measures_utility: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        return 0.0  # all of its work is in `init`, which counts it

    def training_terms(self, pool: float, target: float) -> float:
        # A reversed step with its replay is three training steps' worth; a gradient of an example is one.
        length = overlaid(self.name, None, self.recipe) if self.recipe and "steps" in self.recipe else None
        terms = pool if length is None else length.steps * length.terms_per_step
        window = self.window / length.steps if self.window and length else TAIL
        window = min(1.0, window)
        one = max(1, self.folds - 1) * terms * (1 + 3 * window) + self.insert * pool
        return (self.metasteps + 1) * one + self.check * 2 * (window * terms + self.insert * pool)

    def span(self, recipe: Recipe) -> int:
        """Steps at the end of training that are differentiated."""
        return self.window or max(self.insert, round(TAIL * recipe.steps), 1)

    def init(self, context: Context) -> _State:
        descent = _Descent.of(self, context)
        ids, rows, best = descent.ids, [], None
        counts, changed = descent.first(), 0
        utility = np.zeros(len(ids))
        slow = descent.audited(counts)
        for metastep in range(self.metasteps + 1):
            seen = descent.at(metastep).seen(counts, slow)
            if not metastep and self.check:
                descent.at(0).checked(counts, seen.utility)
            terms = int(counts @ descent.sizes)
            rows.append({"metastep": metastep, "select": seen.select, "hold": seen.hold, "changed": changed,
                         "terms": terms})  # fmt: skip
            if best is None or seen.hold < best[1].hold:
                best = counts, seen, metastep
            if metastep - best[2] >= self.patience or metastep == self.metasteps:
                break
            utility = self.memory * utility + (1 - self.memory) * seen.utility if metastep else seen.utility
            after = descent.moved(counts, utility, metastep)
            if not after.any():
                context.warn(
                    "mgd: by their metagradients all examples harm the target: descent ends before none is left"
                )
                break
            counts, changed = after, int((after != counts).sum())
        assert best is not None
        self._noted(context, rows, best[2])
        return _State(ids, best[0] + _share(best[1].utility / descent.sizes))

    def _noted(self, context: Context, rows: list[dict[str, Any]], best: int) -> None:
        first, last = rows[0], rows[best]
        curve = {
            "title": "Loss of the target along metagradient descent", "x": "metastep", "y": "loss", "best": best,
            "at": [r["metastep"] for r in rows],
            "lines": {"selects": [r["select"] for r in rows], "held out": [r["hold"] for r in rows]},
            "columns": {"counts changed": [r["changed"] for r in rows], "terms": [r["terms"] for r in rows]},
        }  # fmt: skip
        context.note(
            "descent",
            f"best at metastep {best} of {len(rows) - 1}: on targets held out {first['hold']:.4f} before, "
            f"{last['hold']:.4f} there",
            trajectory=rows, best=best, curve=curve,
        )  # fmt: skip

    def score(self, state: _State, batch: Batch) -> Any:
        where, known = among(state.ids, batch.ids)
        if not known.all():
            raise InputError("mgd: there are examples that it did not see", fix="score the pool itself")
        return state.scores[where]


def _share(value: np.ndarray) -> np.ndarray:
    """Numbers strictly between 0 and 1 in the order of `value`, one half at 0; ranks would jump with rounding."""
    typical = np.abs(value).mean()  # at least max / n
    if not typical:
        return np.full(len(value), 0.5)
    return 0.5 * (1 + value / (np.abs(value) + typical))


def balance(value: np.ndarray, up: np.ndarray, down: np.ndarray, room: float) -> float:
    """The lowest tau at which what is added, `up` of those with value > tau, is within `room` and what goes, `down` of
    those below tau. Infinite where everything may come, or must go.

    >>> one = np.ones(3)
    >>> balance(np.array([3.0, 1.0, 2.0]), np.array([1.0, 0, 0]), np.array([0, 1.0, 1]), 0.0)
    1.5
    >>> balance(np.array([3.0, 1.0, 2.0]), one, 0 * one, 1.0), balance(np.array([3.0]), np.ones(1), np.ones(1), 9.0)
    (2.0, -inf)
    """
    if not len(value):
        return np.inf
    levels, place = np.unique(value, return_inverse=True)
    rise, fall = (np.bincount(place, part, len(levels)) for part in (up, down))
    above = np.concatenate([np.cumsum(rise[::-1])[::-1], [0.0]])  # of levels[k] and higher
    below = np.concatenate([[0.0], np.cumsum(fall)])  # lower than levels[k]
    # At a level, those that have it stay; between two levels, everyone moves.
    between = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    taus = np.concatenate([between, levels])
    change = np.concatenate([above - below, above[1:] - below[:-1]])
    order = np.argsort(taus, kind="stable")
    fits = np.flatnonzero(change[order] <= room)
    return float(taus[order[fits[0]]]) if len(fits) else np.inf


@dataclass(frozen=True)
class _Descent:
    """The pool in the order of sorted ids, and the two halves of the target."""

    method: Mgd
    context: Context
    recipe: Recipe
    ids: np.ndarray
    rows: np.ndarray
    """Where they stand in the pool."""
    sizes: np.ndarray
    free: np.ndarray
    """May be trained on."""
    budget: float
    """Terms of the multiset."""
    selects: np.ndarray
    holds: np.ndarray
    """Ids of the target."""
    start: dict[str, Tensor] | None = None
    """In place of first weights."""

    @classmethod
    def of(cls, method: Mgd, context: Context) -> _Descent:
        from assay.train.root import rooted

        rows = np.argsort(context.pool.ids, kind="stable")
        ids, sizes = context.pool.ids[rows], context.encoded(context.pool).sizes[rows]
        free = ~np.isin(ids, context.barred)
        for option in ("share", "rate", "hold", "memory"):
            if getattr(method, option) > 1:
                raise InputError(
                    f"mgd: {option} = {getattr(method, option):g}", why="it is a part of a whole", fix="at most 1"
                )
        may = np.sort(context.target.ids[~np.isin(context.target.ids, context.withheld)])
        order = may[shuffled(may, "mgd", "hold", context.seed)]
        held = max(1, round(method.hold * len(order)))
        if held >= len(order):
            raise InputError(
                f"mgd: {len(order)} target examples cannot both choose and watch",
                why=f"{method.hold:.0%} of them are held out, to say when to stop", fix="give more target examples",
            )  # fmt: skip
        recipe = overlaid("mgd", context.recipe, method.recipe)
        if method.span(recipe) > recipe.steps or method.insert > method.span(recipe):
            raise InputError(
                f"mgd: no window of {method.span(recipe)} steps with additions to {method.insert} of them",
                why=f"training has {recipe.steps} steps", fix="lower insert or window",
            )  # fmt: skip
        if method.begin == "model" and not context.models:
            raise InputError(
                "mgd: begin = 'model', and there is no scoring model", why="descent was to go on from the first one",
                fix="train one (proxy.models = 1), or begin = 'scratch'",
            )  # fmt: skip
        budget = method.share * float(sizes[free].sum())
        start = context.models[0] if method.begin == "model" else None
        recipe = rooted(context, "mgd", recipe, rows[free], start) if free.any() else recipe
        return cls(method, context, recipe, ids, rows, sizes, free, budget, order[held:], order[:held], start)

    def at(self, metastep: int) -> _Descent:
        """With the training of a metastep."""
        if not self.method.vary:
            return self
        return replace(self, recipe=self.recipe.with_seed(SEEDS + 1000 * self.recipe.seed + metastep))

    def first(self) -> np.ndarray:
        """Counts of the start: the best by its scores, or the first of a keyed draw, while they fit in the budget."""
        free = np.flatnonzero(self.free)
        keys = hash_ids(self.ids[free], "mgd", "start", self.context.seed)
        values = np.zeros(len(free))
        if self.method.start is not None:
            # By the half that selects alone: what watches must not have chosen the start.
            target = self.context.target
            inside = self.context.asking(target.at(np.flatnonzero(np.isin(target.ids, self.selects))))
            table = inside.table(self.method.start)
            values = table.align(self.ids).column(table.columns[0])[free]
        order = free[np.lexsort((self.ids[free], keys, -values))]
        counts = np.zeros(len(self.ids), dtype=np.int64)
        left = self.budget + 1e-6
        for row in order.tolist():
            if self.sizes[row] <= left:
                counts[row], left = 1, left - self.sizes[row]
        if not counts.any():
            raise InputError(
                "mgd: nothing to begin with", why=f"a share of {self.method.share:g} holds no example",
                fix="raise share",
            )  # fmt: skip
        return counts

    def moved(self, counts: np.ndarray, utility: np.ndarray, metastep: int) -> np.ndarray:
        """The counts after an update."""
        method, sizes = self.method, self.sizes.astype(np.float64)
        drawn = uniform(self.ids, "mgd", "move", self.context.seed, metastep) < method.rate
        asked = np.flatnonzero(drawn & self.free & (utility != 0))
        value = utility[asked] / sizes[asked]
        up = np.where((counts[asked] < method.most) | (method.most == 0), sizes[asked], 0.0)
        down = np.where(counts[asked] > 0, sizes[asked], 0.0)
        tau = 0.0 if method.tau == "free" else balance(value, up, down, self.budget + 1e-6 - float(counts @ sizes))
        after = counts.copy()
        after[asked[(value > tau) & (up > 0)]] += 1
        after[asked[(value < tau) & (down > 0)]] -= 1
        return after

    @cached_property
    def folds(self) -> np.ndarray:
        """Which model scores an example: the one that never trains on it."""
        return (hash_ids(self.ids, "mgd", "fold", self.context.seed) % np.uint64(self.method.folds)).astype(np.int64)

    def training(self, counts: np.ndarray, fold: int) -> Multiset:
        """On the multiset without the fold, whose share of the loss the others take up."""
        import torch

        from assay.core.selection import Selection
        from assay.train.descent import Multiset

        method, folds = self.method, self.method.folds
        inside = np.flatnonzero((counts > 0) & ((folds == 1) | (self.folds != fold)))
        inside = inside if len(inside) else np.flatnonzero(counts)
        scale, made = folds / max(1, folds - 1), 1.0
        if method.tau == "free":
            part = self.budget / float(counts[inside] @ self.sizes[inside])
            scale, made = max(1.0, part), min(1.0, part)
        return Multiset(
            self.context.task, self.context.encoded(self.context.pool), self.rows[inside],
            Selection(self.ids[inside], np.full(len(inside), scale)), self.recipe, start=self.start,
            dtype=getattr(torch, method.precision), counts=counts[inside],
            passes=self.recipe.steps * self.recipe.terms_per_step / self.budget, share=made,
        )  # fmt: skip

    def audited(self, counts: np.ndarray) -> set[str]:
        """Parameters whose gradients have no rule."""
        from assay.train.rules import audited

        training = self.training(counts, 0)
        return audited(self.context, self.method.name, training.first, training.moved)

    def seen(self, counts: np.ndarray, slow: set[str]) -> _Seen:
        """Train on the multiset without each fold, differentiate, score the fold. Kept, and found made."""
        from assay.train.loop import load

        found = []
        for fold in range(self.method.folds):
            held = load(self._kept(self.training(counts, fold), slow, fold) / "found.safetensors")
            found.append((*held.losses, held.params["utility"].numpy()))
        select, hold = (float(np.mean([f[k] for f in found])) for k in range(2))
        return _Seen(select, hold, np.sum([f[2] for f in found], axis=0))

    def window(self) -> tuple[int, list[int]]:
        """The first step that is differentiated, and those that examples are added to."""
        count = self.method.span(self.recipe)
        since = self.recipe.steps - count
        return since, [since + j * count // self.method.insert for j in range(self.method.insert)]

    def checked(self, counts: np.ndarray, utility: np.ndarray) -> None:
        """Finite differences beside the derivative of the first fold, along random signs over what it scores."""
        context, (since, steps) = self.context, self.window()
        training, own = self.training(counts, 0), np.flatnonzero(self.folds == 0)
        before, apart = training.initial(), []
        for step in range(since):
            before = training.advance(before, step)

        def value(zeta: np.ndarray) -> float:
            state = before
            for step in range(since, self.recipe.steps):
                more = step in steps
                state = training.added(state, step, self.rows[own], zeta) if more else training.advance(state, step)
            return self._loss(training.named(state), self.selects)

        for index in range(self.method.check):
            signs = finite.signs(self.ids[own], index)
            ends = [value(s * finite.STEP * signs) for s in (1, -1)]
            said = -len(steps) * float(signs @ utility[own])
            apart.append(finite.gap(np.array([ends[0] - ends[1]]) / (2 * finite.STEP), np.array([said])))
        one = context.task.training_flops(self.sizes, self.recipe.terms_per_step)
        added = 3 * len(steps) * context.task.forward_flops(self.sizes[own])
        context.spent(one * since + 2 * len(apart) * (one * (self.recipe.steps - since) + added))
        finite.tell(context, "mgd", apart, "a little of each example is added or taken away, a share of")

    def _loss(self, params: Any, ids: np.ndarray) -> float:
        """The mean of f over some of the target's examples."""
        import torch

        from assay.numerics.curvature import reading

        f = reading(self.context.task, self.method.measure)
        with torch.no_grad():
            return float(np.concatenate([f(params, part).double().numpy() for part in self._asked(ids)]).mean())

    def _kept(self, training: Multiset, slow: set[str], fold: int) -> Path:
        context, method, recipe = self.context, self.method, training.recipe
        since, steps = self.window()

        def build(path: Path) -> None:
            import torch

            from assay.train import loop

            losses, utility = self._measured(training, slow, fold, since, steps, path / "states")
            loop.save(path / "found.safetensors", loop.Trained({"utility": torch.from_numpy(utility)}, {}, losses), "")
            shutil.rmtree(path / "states")

        encoded = context.encoded(context.pool)
        key = (
            training.key(), context.pool.fingerprint, digest_ids(self.selects), digest_ids(self.holds),
            context.target.fingerprint, method.measure, method.branch, since, steps, fold, method.folds,
        )  # fmt: skip
        one = context.task.training_flops(encoded.sizes[training.rows], recipe.terms_per_step)
        spent = one * (recipe.steps + 3 * (recipe.steps - since))
        return context.kept(
            "step",
            key,
            build,
            flops=spent + 3 * method.insert / method.folds * context.task.forward_flops(encoded.sizes),
        )

    def _measured(
        self, training: Multiset, slow: set[str], fold: int, since: int, steps: list[int], path: Path
    ) -> tuple[list[float], np.ndarray]:  # fmt: skip
        """The losses of both halves of the target, and the utilities of the fold, averaged over the steps; else 0."""
        import torch

        from assay.numerics.curvature import reading, slopes
        from assay.train.additions import Additions
        from assay.train.replay import metagradient

        context, names = self.context, tuple(training.moved)
        f = reading(context.task, self.method.measure)

        def objective(params: Any) -> Tensor:
            return slopes(context.task, params, self._asked(self.selects), f, names, each=False)

        made = metagradient(
            training, objective, branch=self.method.branch, since=since, pushes=steps, path=path,
            progress=context.progress,
        )  # fmt: skip
        losses = [self._loss(made.final, ids) for ids in (self.selects, self.holds)]
        pushes = [(p, torch.cat([a.flatten(1) for a in push], dim=1).T) for p, push in made.pushes.values()]
        added = Additions(context.task, names, slow, pushes, training.recipe.terms_per_step)
        utility = np.zeros(len(self.ids))
        for batch in context.batches(context.pool):
            where, _ = among(self.ids, batch.ids)
            own = np.flatnonzero(self.folds[where] == fold)
            if len(own):
                inputs = {name: x[own] for name, x in batch.inputs.items()}
                utility[where[own]] = added.utilities(inputs, self.sizes[where[own]]).mean(axis=0)[:, 0]
        return losses, utility

    def _asked(self, ids: np.ndarray) -> Iterator[Inputs]:
        """Inputs of some of the target's examples."""
        for batch in self.context.batches(self.context.target):
            inside = np.flatnonzero(np.isin(batch.ids, ids))
            if len(inside):
                yield {name: x[inside] for name, x in batch.inputs.items()}
