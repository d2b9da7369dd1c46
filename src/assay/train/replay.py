"""REPLAY: reverse differentiation through a training run, by the trainer's own arithmetic.

Reference: Engstrom et al. 2025, arXiv:2503.13751 (metagradients and REPLAY); Ilyas & Engstrom 2025, arXiv:2504.16430
(the derivative to data weights as attribution).
Legend: n examples, k targets, T steps, p parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.keys import digest
from assay.core.progress import Progress
from assay.core.selection import Selection
from assay.core.task import Encoded, Params, Task
from assay.numerics.tree import Tree, cuts, spine
from assay.train import loop, optim
from assay.train.adjoint import Adjoint
from assay.train.models import first_weights
from assay.train.recipe import Recipe
from assay.train.reverse import reverse

Objective = Callable[[Params], Tensor]
"""Slopes of k targets at given weights, `[p, k]`, over the trained parameters end to end."""

# A step of fewer operations than this is differentiated for all targets at once, by vmap: its kernels are small.
TOGETHER = 2e8
# Times that a sweep keeps what it has found on its way, on disk.
KEPT = 16


class State(NamedTuple):
    """Values of the trained parameters and the optimiser's slots, before a step."""

    params: list[Tensor]
    slots: optim.State


@dataclass(frozen=True, eq=False)
class Training:
    """A training run that can be run again from any of its states: what `loop.train` does, step by step.

    The k-th id of the selection stands in row `rows[k]` of `encoded`. Raises `InputError` for what has no derivative:
    weights that are neither float32 nor float64, or AdamW without `eps_root`.
    """

    task: Task
    encoded: Encoded
    rows: np.ndarray
    selection: Selection
    recipe: Recipe
    start: Params | None = None
    dtype: torch.dtype = torch.float32
    data: str = ""
    """What `encoded` holds, such as its pool's fingerprint: kept states are keyed by it."""

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"no metagradients in {self.dtype}", why="their rounding errors grow from step to step",
                fix="use float32 or float64",
            )  # fmt: skip
        if self.recipe.optimiser == "adamw" and not self.recipe.eps_root:
            raise InputError(
                "AdamW without eps_root has no derivative",
                why="its root bends without bound where gradients are near 0",
                fix="recipe.eps_root = the mean square of a first gradient's entries, such as 1e-6",
            )  # fmt: skip

    @cached_property
    def first(self) -> dict[str, Tensor]:
        values = self.start if self.start is not None else first_weights(self.task, self.recipe.seed, self.dtype)
        return {n: p.to(self.dtype) if p.is_floating_point() else p for n, p in values.items()}

    @cached_property
    def moved(self) -> list[str]:
        """Names of the trained parameters."""
        return loop.trainable(self.task, self.first)

    @cached_property
    def batches(self) -> list[np.ndarray]:
        """Positions in the selection, step by step."""
        found = loop.steps(self.recipe, self.selection, self.encoded.sizes[self.rows])
        return list(islice(found, self.recipe.steps))

    @cached_property
    def together(self) -> bool:
        terms = min(self.recipe.terms_per_step, int(self.encoded.sizes[self.rows].sum()))
        return self.task.training_flops(np.asarray(self.encoded.sizes[self.rows]), terms) < TOGETHER

    def visits(self, since: int = 0, phases: int = 1) -> np.ndarray:
        """How often each example is visited in each of `phases` equal spans of the steps from `since` on, `[P, n]`."""
        found = np.zeros((phases, len(self.selection)), dtype=np.int64)
        for step in range(since, self.recipe.steps):
            np.add.at(found[self.phase(step, since, phases)], self.batches[step], 1)
        return found

    def phase(self, step: int, since: int, phases: int) -> int:
        """Which of `phases` equal spans of the steps from `since` on a step is in."""
        return (step - since) * phases // (self.recipe.steps - since)

    def key(self) -> str:
        start = loop.fingerprint(self.start) if self.start is not None else ""
        return digest(
            self.recipe.spec(),
            self.task.describe(),
            self.selection.fingerprint,
            start,
            str(self.dtype),
            self.data,
            self.rows.tolist(),
        )

    def initial(self) -> State:
        params = [self.first[n] for n in self.moved]
        return State(params, optim.init(self.recipe, params))

    def named(self, state: State) -> dict[str, Tensor]:
        return self.first | dict(zip(self.moved, state.params, strict=True))

    def noise(self, step: int, batch: np.ndarray) -> np.ndarray | None:
        return loop.noise_keys(self.task, self.selection.ids[batch], self.recipe.seed, step)

    def advance(self, state: State, step: int, weights: np.ndarray | None = None) -> State:
        """The state after a step; `weights` in place of the selection's, for a run that differs in them alone."""
        batch = self.batches[step]
        own = (self.selection.weights if weights is None else weights)[batch]
        params, slots, _ = loop.advance(
            self.task, self.named(state), self.moved, state.slots, self.encoded, self.rows[batch], own, self.recipe,
            step, self.noise(step, batch),
        )  # fmt: skip
        return State(params, slots)

    def added(self, state: State, step: int, rows: np.ndarray, zeta: np.ndarray) -> State:
        """As `advance`, with zeta_i n_i loss_i / T of further rows of `encoded` added to the loss of the step: what is
        added is read without noise."""
        batch, params, terms = self.batches[step], self.named(state), self.recipe.terms_per_step
        own, _ = loop.gradient(
            self.task, params, self.encoded, self.rows[batch], self.selection.weights[batch], terms,
            self.noise(step, batch),
        )  # fmt: skip
        more, _ = loop.gradient(self.task, params, self.encoded, rows, zeta, terms)
        both = [a + b for a, b in zip(own, more, strict=True)]
        slopes = loop.clipped(params, both, self.moved, self.recipe)
        return State(*optim.update(self.recipe, slopes, state.slots, state.params, step))

    def run(self, state: State, since: int, weights: np.ndarray | None = None) -> State:
        """The state at the end, from the one before the step `since`."""
        for step in range(since, self.recipe.steps):
            state = self.advance(state, step, weights)
        return state


@dataclass
class Metagradient:
    """d f_k / d w_i of a training run, f after its last step, and what finding it took.

    Raises nothing itself; see `metagradient`.
    """

    phases: np.ndarray
    """`[P, n, k]` float64: by visits in each of P equal spans of the differentiated steps; rows as the selection."""
    pushes: dict[int, tuple[dict[str, Tensor], list[Tensor]]]
    """Of the steps asked for: weights before the step, and `reverse.Back.push`."""
    final: dict[str, Tensor]
    """The trained weights."""
    restored: int = 0
    """Steps that were run again to restore states: `exact_costs(T, branch)[0]` less T - 1, unless a run was killed."""
    peak: int = 0
    """Most states kept at once, in memory or on disk."""

    @property
    def weights(self) -> np.ndarray:
        """d f_k / d w_i, `[n, k]`: positive where more of the example raises f."""
        return self.phases.sum(axis=0)


def metagradient(
    training: Training, objective: Objective, *, branch: int = 0, since: int = 0, phases: int = 1,
    pushes: Collection[int] = (), path: Path | None = None, progress: Progress | None = None,
) -> Metagradient:  # fmt: skip
    """Train, then differentiate the objectives at the final weights back to every example's data weight.

    The derivative is exact: that of the very run, order, batches, noise and all. `branch` is the k of the REPLAY tree
    (0: the square root of the number of steps, two levels); `since` > 0 differentiates through a suffix of training
    only, its earlier steps taken as given. With a `path` the states of the tree's first level are kept there, a killed
    run goes on from what there is to the same bytes, and `path` is the caller's to remove. A kill costs at most the
    steps of one child of the tree (or those before `since`) in training; on the way back, a sixteenth of its steps, and
    the replay of the children that those and the next one are in.

    Memory, with P the bytes of the trained weights, S = P (1 + slots) those of a state and k targets: N S + k S + P + W
    at the most, for N = `exact_costs(T, branch)[1]` states (with a `path` those of one child alone: the tree's first
    level is on disk), the adjoint, the trained weights, and one reversed step: W is k P, the adjoint of a gradient, and
    the graphs of all its micro-batches; where steps are small and targets go together (`Training.together`), three
    times k P more. The first state, where it is in memory, has the training's own weights: P less. The objective finds
    its slopes while N states are there, and may take k S + W for it.
    Raises `InputError` when training diverges, or when a state that is restored is not the one that was trained.
    """
    sweep = _Sweep(training, objective, branch or _root(training.recipe.steps - since), since, phases, sorted(pushes),
                   path, progress or Progress())  # fmt: skip
    return sweep.run()


def _root(steps: int) -> int:
    return max(2, math.ceil(math.sqrt(steps)))


@dataclass
class _Sweep:
    training: Training
    objective: Objective
    branch: int
    since: int
    phases: int
    wanted: list[int]
    path: Path | None
    progress: Progress
    prints: dict[int, str] = field(default_factory=dict)
    """Hashes of the weights before each step, of the first run."""
    adjoint: Adjoint = field(init=False)
    """After the step that is reversed next, which changes it in place."""
    asked: str = ""
    """The key of what is kept on the way back: of the run and of the slopes that it began from."""

    def __post_init__(self) -> None:
        steps = self.training.recipe.steps
        if not 0 <= self.since < steps or self.phases < 1 or self.branch < 2:
            raise InputError(
                f"no derivative of steps {self.since} to {steps} in {self.phases} phases by a tree of {self.branch}",
                fix="since lies within the run, there is a phase, and a tree has two branches or more",
            )  # fmt: skip
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            for half in self.path.glob(".*.tmp"):  # what a kill left of a file that was being written
                half.unlink()

    @property
    def key(self) -> str:
        return digest(self.training.key(), self.branch, self.since, self.phases, self.wanted)

    def run(self) -> Metagradient:
        steps, n = self.training.recipe.steps, len(self.training.selection)
        self.progress.begin("metagradient", 2 * steps - self.since, "train and differentiate")
        starts, last = self._forward()
        final = self.training.named(last)
        del last  # its slots have no say any more, and a sweep is long
        slopes = self.objective(final)
        self.asked = digest(self.key, "adjoint", loop.fingerprint({"slopes": slopes}))
        found = Metagradient(np.zeros((self.phases, n, slopes.shape[1])), {}, final)
        like = [final[n] for n in self.training.moved]
        parts = slopes.split([p.numel() for p in like])
        given = [s.T.reshape(-1, *p.shape) for s, p in zip(parts, like, strict=True)]
        self.adjoint = Adjoint.of(self.training.recipe, given)
        del slopes, parts, given
        self._backward(found, starts)
        self.progress.end()
        return found

    # Forward.

    def _forward(self) -> tuple[list[tuple[int, State | None]], State]:
        """States before the tree's children, and before those of the last one; None for those that are on disk, of the
        first level alone; and the last one."""
        training, steps = self.training, self.training.recipe.steps
        stops = cuts(self.since, steps, self.branch)[:-1]
        below = set(spine(self.since, steps, self.branch)) - set(stops)
        starts: list[tuple[int, State | None]] = []
        state = training.initial()
        for stop in [*stops, steps] if self.path else []:
            kept = self._load(f"state-{stop}", stop)
            if kept is None:
                break
            state = kept
            starts.append((stop, None))
        first = starts[-1][0] if starts else 0
        self.progress.skip(first)
        for step in range(first, steps):
            if step in stops and (not starts or starts[-1][0] != step):
                self._keep(f"state-{step}", step, state)
                starts.append((step, None if self.path else state))
            elif step in below:
                starts.append((step, state))
            if step >= self.since:
                self.prints[step] = self._print(state)
            state = training.advance(state, step)
            self.progress.advance()
        if starts and starts[-1][0] == steps:
            starts.pop()
        else:
            self._keep(f"state-{steps}", steps, state)
        if not all(p.isfinite().all() for p in state.params):
            raise InputError(
                "weights are not finite after the last step", why="training diverged",
                fix=f"lower lr (now {training.recipe.lr})",
            )  # fmt: skip
        return starts, state

    def _print(self, state: State) -> str:
        return loop.fingerprint(dict(zip(self.training.moved, state.params, strict=True)))

    def _keep(self, name: str, step: int, state: State) -> None:
        if self.path is None:
            return
        moved = self.training.moved
        slots = {s: dict(zip(moved, v, strict=True)) for s, v in state.slots.items()}
        held = loop.Trained(dict(zip(moved, state.params, strict=True)), slots, [])
        loop.save(self.path / f"{name}.safetensors", held, digest(self.key, step, sorted(self.prints.items())))
        _write_prints(self.path / f"{name}.json", self.prints)

    def _load(self, name: str, step: int) -> State | None:
        """A kept state of this very run, with the hashes of the steps before it; None when there is none."""
        assert self.path is not None
        prints = _read_prints(self.path / f"{name}.json")
        key = digest(self.key, step, sorted(prints.items()))
        held = loop.load_if(self.path / f"{name}.safetensors", key)
        if held is None:
            return None
        self.prints |= prints
        moved = self.training.moved
        return State([held.params[n] for n in moved], {s: [v[n] for n in moved] for s, v in held.state.items()})

    # Backward.

    def _backward(self, found: Metagradient, starts: list[tuple[int, State | None]]) -> None:
        high = steps = self.training.recipe.steps
        until = self._resumed(found)
        self.progress.skip(steps - until)
        tree = Tree(self._again, partial(self._visit, found), self.branch, until)
        while starts:
            low, state = starts.pop()
            if low < until:
                tree.span(low, high, self._restored(low) if state is None else state, len(starts))
            high = low
        found.restored, found.peak = tree.steps, tree.peak

    def _restored(self, step: int) -> State:
        state = self._load(f"state-{step}", step)
        if state is None:
            raise InputError(
                f"the state that was kept before step {step} cannot be read", where=self.path,
                why="it was written not long ago: the disk is at fault, or something else changed it",
                fix="run the same again: what is whole is kept, and the rest is made anew",
            )  # fmt: skip
        return state

    def _again(self, state: State, step: int) -> State:
        after = self.training.advance(state, step)
        known = self.prints.get(step + 1)
        if known is not None and self._print(after) != known:
            raise InputError(
                f"training again from a kept state gave other weights after step {step}",
                why="this machine does not repeat its own arithmetic, or memory is at fault",
                fix="use one device of one kind, the same number of threads, and no other program's kernels",
            )  # fmt: skip
        return after

    def _visit(self, found: Metagradient, state: State, step: int) -> None:
        steps = self.training.recipe.steps
        back = reverse(self.training, state, step, self.adjoint)
        phase = self.training.phase(step, self.since, self.phases)
        np.add.at(found.phases[phase], self.training.batches[step], back.weights)
        if step in self.wanted:
            found.pushes[step] = self.training.named(state), back.push
        every = max(1, (steps - self.since) // KEPT)
        if (step - self.since) % every == 0 and step > self.since and self.path is not None:
            self._keep_adjoint(found, step)
        self.progress.advance()

    def _keep_adjoint(self, found: Metagradient, step: int) -> None:
        assert self.path is not None
        tensors = {"phases": torch.from_numpy(found.phases)}
        lists = {"params": self.adjoint.params, **self.adjoint.slots}
        for s, (params, push) in found.pushes.items():
            lists |= {f"push.{s}": push, f"weights.{s}": [params[n] for n in self.training.moved]}
        for name, values in lists.items():
            tensors |= {f"{name}.{j}": v for j, v in enumerate(values)}
        held = loop.Trained(tensors, {}, [float(step)])
        loop.save(self.path / "adjoint.safetensors", held, self.asked)

    def _resumed(self, found: Metagradient) -> int:
        """Take up what a killed sweep left: the adjoint before a step, and that step. Otherwise the end of training."""
        steps = self.training.recipe.steps
        file = self.path / "adjoint.safetensors" if self.path else None
        held = loop.load_if(file, self.asked) if file else None
        if held is None or held.params["phases"].shape != found.phases.shape:
            return steps
        count, tensors = len(self.training.moved), held.params

        def read(name: str) -> list[Tensor]:
            return [tensors[f"{name}.{j}"] for j in range(count)]

        found.phases[:] = tensors["phases"].numpy()
        until = int(held.losses[0])
        for s in [s for s in self.wanted if s >= until]:
            named = self.training.named(State(read(f"weights.{s}"), {}))
            found.pushes[s] = named, read(f"push.{s}")
        self.adjoint = replace(self.adjoint, params=read("params"), slots={s: read(s) for s in self.adjoint.slots})
        return until


def _write_prints(path: Path, prints: dict[int, str]) -> None:
    from assay.core.keys import write_json

    write_json(path, {str(step): value for step, value in sorted(prints.items())})


def _read_prints(path: Path) -> dict[int, str]:
    import json

    try:
        return {int(step): str(value) for step, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}
