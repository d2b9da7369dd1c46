"""LESS: similarity of Adam's step on an example to the gradients of a target, along a warm-up of LoRA adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import digest, hash_ids
from assay.core.method import Batch, Context, Cost, Count, Positive, Scorer, Targets
from assay.core.pool import Pool, positions
from assay.core.table import unit_rows

if TYPE_CHECKING:
    from torch import Tensor

    from assay.numerics.project import Sketch
    from assay.train.lora import Adapted, Checkpoint

# Examples of whose steps a common part is told.
SAMPLE = 64
# Entries of gradients that are formed at a time: 64 MB of them in float32.
FORMED = 1 << 24


@dataclass(frozen=True)
class _Run:
    """One warm-up: the frozen weights, and the checkpoints with their shares of the learning rate."""

    frozen: dict[str, Tensor]
    marks: list[Checkpoint]
    weights: list[float]
    slopes: list[np.ndarray]
    """For each checkpoint the target's directions `[c, d]`: unit rows, or their means over subtasks."""


@dataclass(frozen=True)
class _State:
    task: Adapted
    sketch: Sketch
    fallback: frozenset[str]
    runs: list[_Run]
    columns: tuple[str, ...]
    passes: float


@dataclass(frozen=True)
class _Reduced:
    """Scores that need the whole pool's: what is done to the columns of another Table."""

    inner: Less
    mean: np.ndarray
    spread: np.ndarray
    ids: np.ndarray
    places: np.ndarray
    """The example's place when subtasks take turns, by row of `ids`."""
    columns: tuple[str, ...] = ("score",)
    passes: float = 0.0


class Less(Scorer):
    """Cosine of Adam's step on an example with the target's gradients, in LoRA's weights, summed over a warm-up.

    Formula: s_i = max over subtasks j of mean over q in j of sum_e (eta_e / sum eta) cos(S Gamma_e(i), S grad loss_q);
        Gamma = m' / sqrt(v' + eps), m' = b1 m + (1 - b1) g_i, v' = b2 v + (1 - b2) g_i^2, at the weights, moments and
        mean learning rate of epoch e
    Reference: Xia et al. 2024, arXiv:2402.04333 (LESS); z-scores of subtasks: Dai et al. 2025, arXiv:2501.12147 (BIDS)
    Needs: peft, and for causal models transformers: pip install 'assay-data[hf]'
    Note: a keyed random `share` of the pool trains the adapters for `epochs`, without dropout, by Adam with linear
        decay. They begin at the weights that the task stores, else at each scoring model (base = 'models': always).
        `subtask` names the target's column of subtasks; without one all are one. Equal examples of a subtask count
        once. reduction: 'max' and 'mean' of subtasks, 'zscore' the max after each is standardised over the pool,
        'round_robin' minus the place when subtasks take turns in taking their best, 'none' a column each. Momentum is
        common to all examples and turns every step towards one direction: the share of that is noted in the report,
        and drop_momentum = true has g_i for m'. targets = 'each' gives a column for each target example, unreduced.
        The paper has rank 128, scale 4, lr 2e-5 for 7B parameters, size 8192; layers () are q, k, v and o
    """

    share: Positive = 0.05
    epochs: Count = 4
    rank: Count = 8
    scale: Positive = 4.0
    layers: tuple[str, ...] = ()
    lr: Positive = 1e-3
    terms_per_step: Count = 1024
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Positive = 1e-8
    drop_momentum: bool = False
    base: Literal["stored", "models"] = "stored"
    projection: Literal["sparse", "dense", "factored", "masked", "exact"] = "sparse"
    size: Count = 8192
    subtask: str = ""
    reduction: Literal["max", "mean", "zscore", "round_robin", "none"] = "max"
    targets: Targets = "mean"
    measure: Literal["loss", "margin"] = "loss"
    seed: int = 0

    cost: ClassVar[Cost] = "gradient"
    unit: ClassVar[str] = "cosine"
    measures_utility: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        return float(self.epochs)

    def training_terms(self, pool: float, target: float) -> float:
        return self.share * pool * self.epochs

    def init(self, context: Context) -> _State | _Reduced:
        if self.targets == "mean" and self.reduction in ("zscore", "round_robin"):
            return self._reduced(context)
        from assay.numerics.project import sketch
        from assay.train.lora import Adapted

        task = Adapted(inner=context.task, rank=self.rank, scale=self.scale, layers=self.layers)
        size = 0 if self.projection == "exact" else self.size
        stored = context.task.stored() if self.base == "stored" else None
        bases = list(context.models) if stored is None else [stored]
        state = _State(task, sketch(self.projection, size, self.seed), frozenset(), [], (), 0.0)
        columns, groups = self._groups(context.target)
        runs = []
        for number, base in enumerate(bases):
            marks = self._warm_up(context, task, base, number)
            total = sum(mark.rate for mark in marks)
            run = _Run(task.base(base), marks, [mark.rate / total for mark in marks], [])
            if not runs:
                state = dataclasses.replace(state, fallback=self._audited(context, state, run))
            self._tell(context, state, run)
            runs.append(dataclasses.replace(run, slopes=self._slopes(context, state, run, groups)))
        # The ledger counts passes for each scoring model; warm-ups may be fewer.
        passes = self.epochs * len(bases) / len(context.models)
        return dataclasses.replace(state, runs=runs, columns=columns, passes=passes)

    def _groups(self, target: Pool) -> tuple[tuple[str, ...], np.ndarray]:
        """Names of the columns, and the matrix `[c, q]` that makes them of the target's examples."""
        if self.targets == "each":
            return tuple(i.decode() for i in target.ids.tolist()), np.eye(len(target))
        names = ["score"] * len(target)
        if self.subtask:
            if self.subtask not in target.columns:
                raise InputError(
                    f"less: the target has no column {self.subtask!r}", where="subtask",
                    why=f"it has: {', '.join(target.columns)}", fix=f"target.keep = [{self.subtask!r}]",
                )  # fmt: skip
            names = ["" if value is None else str(value) for value in target.column(self.subtask)]
        subtasks, row = np.unique(np.array(names), return_inverse=True)
        content = np.unique(target.contents, return_inverse=True)[1]
        _, first = np.unique(np.stack([row, content]), axis=1, return_index=True)
        groups = np.zeros((len(subtasks), len(target)))
        groups[row[first], first] = 1.0
        groups /= groups.sum(axis=1, keepdims=True)
        if self.reduction == "none":
            return tuple(str(s) or "(none)" for s in subtasks), groups
        return ("score",), groups

    def _warm_up(self, context: Context, task: Adapted, base: dict[str, Tensor], number: int) -> list[Checkpoint]:
        """The checkpoints of the adapters' training; kept, and found again whatever the target is."""
        from assay.train import loop, lora
        from assay.train.recipe import Recipe

        if self.share > 1:
            raise InputError(f"less: share = {self.share}", why="it is a part of the pool", fix="at most 1")
        pool = context.pool
        eligible = np.flatnonzero(~np.isin(pool.ids, context.barred))
        if not len(eligible):
            raise InputError("less: nothing to train the adapters on", why="every example contains a target item")
        count = max(1, round(self.share * len(eligible)))
        keys = hash_ids(pool.ids[eligible], "less", self.seed, number)
        rows = np.sort(eligible[np.lexsort((pool.ids[eligible], keys))[:count]])
        recipe = Recipe(
            terms_per_step=self.terms_per_step, optimiser="adamw", lr=self.lr, betas=self.betas, eps=self.eps,
            weight_decay=0.0, schedule="linear", warmup=0.03, final=0.0,
            seed=int(digest(self.seed, "less", number)[:7], 16),
        )  # fmt: skip
        encoded = context.encoded(pool)
        options: dict[str, Any] = {"ids": pool.ids[rows], "recipe": recipe, "epochs": self.epochs}
        key = {
            "task": task.describe(), "base": loop.fingerprint(base), "recipe": recipe.spec(), "epochs": self.epochs,
            "examples": digest([i.decode() for i in np.sort(pool.ids[rows]).tolist()]),
        }  # fmt: skip
        terms = self.epochs * float(encoded.sizes[rows].sum())

        def build(part: Path) -> None:
            lora.warm_up(task, base, encoded, rows=rows, path=part, **options)

        path = context.kept("warm-up", key, build, flops=context.task.training_flops(encoded.sizes[rows], terms))
        return lora.read(path, encoded.sizes[rows], **options)

    def _loss(self, task: Adapted, measure: str) -> Any:
        if measure == "loss":
            return task.loss
        return lambda params, batch: -task.margin(params, batch)

    def _audited(self, context: Context, state: _State, run: _Run) -> frozenset[str]:
        """Names of the adapters' parameters that the layers' rules do not reproduce; they go without."""
        from assay.numerics.persample import trainable
        from assay.train.rules import audited

        params, only = run.frozen | run.marks[-1].params, trainable(state.task.module)
        return frozenset(audited(context, self.name, params, only, sketch=state.sketch, task=state.task))

    def _rows(self, state: _State, run: _Run, mark: Checkpoint, inputs: Any, measure: str = "") -> np.ndarray:
        """Unit rows `[b, d]` for a batch: of Adam's steps, or with a `measure`, of its plain gradients."""
        return unit_rows(self._projected(state, run, mark, inputs, measure))[0]

    def _projected(self, state: _State, run: _Run, mark: Checkpoint, inputs: Any, measure: str = "") -> np.ndarray:
        from assay.numerics.persample import flatten, gradients

        params, found = run.frozen | mark.params, []
        for some in _chunks(inputs, sum(p.numel() for p in mark.params.values())):
            grads, _ = gradients(
                state.task.module, self._loss(state.task, measure or "loss"), params, some,
                fallback=set(state.fallback),
            )  # fmt: skip
            rows = {}
            for name, g in grads.items():
                g = g.view(len(g), *mark.params[name].shape)
                step = g if measure else self._step(g, mark.mean[name], mark.square[name])
                rows[name] = state.sketch.full(name, step)
            found.append(flatten(rows, state.sketch).double().numpy())
        return np.concatenate(found)

    def _step(self, g: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        """Gamma: the direction in which Adam, with these moments, would go on one example."""
        b1, b2 = self.betas
        new = g if self.drop_momentum else b1 * mean + (1 - b1) * g
        return new / (b2 * square + (1 - b2) * g * g + self.eps).sqrt()

    def _tell(self, context: Context, state: _State, run: _Run) -> None:
        """How much of the steps is one direction, common to all examples: |mean Gamma|^2 / mean |Gamma|^2."""
        inputs, shares = context.sample(SAMPLE).inputs, []
        for mark in run.marks:
            steps = self._projected(state, run, mark, inputs)
            shares.append(float(np.square(steps.mean(axis=0)).sum() / max(np.square(steps).sum(axis=1).mean(), 1e-300)))
        losses = ", ".join(f"{mark.loss:.3f}" for mark in run.marks)
        context.note(
            "less: common part of Adam's steps",
            f"{100 * np.mean(shares):.0f}% of the squared steps of {min(SAMPLE, len(context.pool))} examples is one "
            f"direction, the momentum; the warm-up's losses by epoch: {losses}",
            shares=shares, losses=[mark.loss for mark in run.marks], rates=[mark.rate for mark in run.marks],
        )  # fmt: skip

    def _slopes(self, context: Context, state: _State, run: _Run, groups: np.ndarray) -> list[np.ndarray]:
        """The target's unit gradients at each checkpoint, as `groups` joins them, `[c, d]`."""
        found: list[Any] = [0.0] * len(run.marks)
        for batch in context.batches(context.target):
            share = groups[:, positions(context.target.ids, batch.ids)]
            for k, mark in enumerate(run.marks):
                found[k] = found[k] + share @ self._rows(state, run, mark, batch.inputs, self.measure)
        context.spent(3 * len(run.marks) * context.task.forward_flops(context.encoded(context.target).sizes))
        return found

    def columns(self, state: _State | _Reduced) -> tuple[str, ...]:
        return state.columns

    def score(self, state: _State | _Reduced, batch: Batch) -> Any:
        if isinstance(state, _Reduced):
            if self.reduction == "round_robin":
                return -state.places[positions(state.ids, batch.ids)]
            return ((batch.table(state.inner) - state.mean) / state.spread).max(axis=1)
        total: Any = 0.0
        for run in state.runs:
            for mark, weight, slopes in zip(run.marks, run.weights, run.slopes, strict=True):
                total = total + weight / len(state.runs) * self._rows(state, run, mark, batch.inputs) @ slopes.T
        if self.targets == "each" or self.reduction == "none":
            return total
        return total.max(axis=1) if self.reduction == "max" else total.mean(axis=1)

    def _reduced(self, context: Context) -> _Reduced:
        inner = dataclasses.replace(self, reduction="none")
        table = context.table(inner)
        spread = table.values.std(axis=0)
        places = round_robin(table.values, table.ids) if self.reduction == "round_robin" else np.zeros(0)
        return _Reduced(inner, table.values.mean(axis=0), np.where(spread > 0, spread, 1.0), table.ids, places)


def _chunks(inputs: Any, width: int) -> Iterator[Any]:
    """A batch in parts whose gradients of `width` numbers can be formed at once."""
    rows, step = len(next(iter(inputs.values()))), max(1, FORMED // width)
    for start in range(0, rows, step):
        yield {name: x[start : start + step] for name, x in inputs.items()}


def round_robin(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The place `[n]` that each row gets when columns take turns, each its best row that is left; 0 comes first.

    >>> round_robin(np.array([[9.0, 9.0], [8.0, 1.0], [0.0, 2.0]]), np.array([b"a", b"b", b"c"]))
    array([0., 2., 1.])
    """
    ties = hash_ids(ids, "tie")
    queues = [iter(np.lexsort((ids, ties, -column)).tolist()) for column in values.T]
    places, left, turn = np.full(len(values), -1.0), len(values), 0
    while left:
        row = next(r for r in queues[turn % len(queues)] if places[r] < 0)
        places[row] = len(values) - left
        left, turn = left - 1, turn + 1
    return places
