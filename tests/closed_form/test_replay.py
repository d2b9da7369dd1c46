"""Metagradients: exact against autograd through the whole run and against finite differences, whatever the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.selection import Selection
from assay.numerics.curvature import slopes
from assay.numerics.tree import Tree, cuts, exact_costs
from assay.train import adjoint, loop, replay
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from assay.train.replay import Metagradient, Training, metagradient
from helpers import language, prepared, text_pool, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")

D = torch.float64
# Of (steps, branch): steps run to restore states, and most states kept, by steps h (1 - 1/k) and (k - 1) h + 1; the
# last one is no power.
GOLDEN = {
    (8, 2): (12, 4), (64, 2): (192, 7), (64, 4): (144, 10), (1024, 2): (5120, 11), (4096, 8): (14336, 29),
    (3125, 4): (13734, 19),
}  # fmt: skip
KINDS = {
    "sgd": {"optimiser": "sgd", "lr": 0.3},
    "momentum": {"optimiser": "momentum", "lr": 0.1},
    "adamw": {"optimiser": "adamw", "lr": 0.05, "eps_root": 1e-5},
}


def run(task: Any, encoded: Any, ids: np.ndarray, recipe: Recipe, weight: float = 0.7, **more: Any) -> Training:
    weights = weight * (1 + 0.2 * np.cos(np.arange(len(ids))))
    return Training(task, encoded, np.arange(len(ids)), Selection(ids, weights), recipe, dtype=D, **more)


def perceptron(path: Path, recipe: Recipe, n: int = 20, **options: Any) -> tuple[Training, Callable[[Any], Tensor]]:
    """A training run, and the losses of three other examples at given weights, `[3]`."""
    pool, other = vector_pool(n), vector_pool(3, seed=1)
    task = Classifier(inputs=5, hidden=(4,), classes=3, **options)
    inputs = prepared(task, other, path / "target").inputs(np.arange(3))
    made = run(task, prepared(task, pool, path / "pool"), pool.ids, recipe)
    return made, lambda params: task.loss(params, inputs)


def decoder(path: Path, recipe: Recipe) -> tuple[Training, Callable[[Any], Tensor]]:
    pool = text_pool(14)
    task, encoded = language(pool, path / "pool", width=8, vocab=270, context=12)
    inputs = prepared(task, text_pool(3, seed=5), path / "target").inputs(np.arange(3))
    return run(task, encoded, pool.ids, recipe), lambda params: task.loss(params, inputs)


def objective(training: Training, losses: Callable[[Any], Tensor]) -> replay.Objective:
    """Slopes of each of the losses, `[p, k]`."""

    def found(params: Any) -> Tensor:
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        values, own = losses(leaves), [leaves[n] for n in training.moved]
        rows = [torch.autograd.grad(v, own, retain_graph=True, materialize_grads=True) for v in values]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows], dim=1)

    return found


def unrolled(training: Training, losses: Callable[[Any], Tensor], since: int = 0) -> np.ndarray:
    """The same derivative by autograd through all steps at once: nothing is shared with the adjoints, `[n, k]`."""
    recipe, weights = training.recipe, torch.as_tensor(training.selection.weights).requires_grad_()
    state = training.initial()
    for step in range(since):
        state = training.advance(state, step)
    # The math form of attention is the one that autograd goes through twice.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        params, slots = [p.requires_grad_() for p in state.params], state.slots
        for step in range(since, recipe.steps):
            batch = training.batches[step]
            held = training.first | dict(zip(training.moved, params, strict=True))
            noise = training.noise(step, batch)
            inputs = training.encoded.inputs(training.rows[batch])
            inputs = inputs | ({} if noise is None else training.task.noise(noise))
            nll, mask = training.task.terms(held, inputs)
            loss = ((nll * mask).sum(dim=1) * weights[torch.from_numpy(batch)]).sum() / recipe.terms_per_step
            grads = list(torch.autograd.grad(loss, params, create_graph=True))
            params, slots = plain_step(recipe, grads, slots, params, step)
        values = losses(training.first | dict(zip(training.moved, params, strict=True)))
        return torch.stack([torch.autograd.grad(v, weights, retain_graph=True)[0] for v in values], dim=1).numpy()


def plain_step(
    recipe: Recipe, grads: list[Tensor], slots: dict[str, list[Tensor]], params: list[Tensor], step: int
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The optimisers once more, by operations that autograd follows."""
    norm = torch.cat([g.flatten() for g in grads]).norm()
    if recipe.clip and norm > recipe.clip:
        grads = [g * recipe.clip / (norm + 1e-12) for g in grads]
    lr, decay, (b1, b2) = recipe.rate(step), recipe.weight_decay, recipe.betas
    if recipe.optimiser == "adamw":
        mean = [b1 * m + (1 - b1) * g for m, g in zip(slots["mean"], grads, strict=True)]
        square = [b2 * v + (1 - b2) * g * g for v, g in zip(slots["square"], grads, strict=True)]
        moves = [
            (m / (1 - b1 ** (step + 1))) / ((v / (1 - b2 ** (step + 1)) + recipe.eps_root).sqrt() + recipe.eps)
            for m, v in zip(mean, square, strict=True)
        ]
        after = [(1 - lr * decay) * p - lr * x for p, x in zip(params, moves, strict=True)]
        return after, {"mean": mean, "square": square}
    grads = [g + decay * p for g, p in zip(grads, params, strict=True)]
    if recipe.optimiser == "sgd":
        return [p - lr * g for p, g in zip(params, grads, strict=True)], slots
    speed = [recipe.momentum * u + g for u, g in zip(slots["momentum"], grads, strict=True)]
    return [p - lr * u for p, u in zip(params, speed, strict=True)], {"momentum": speed}


def differences(training: Training, losses: Callable[[Any], Tensor], which: list[int], h: float = 1e-4) -> np.ndarray:
    """Central differences in single data weights, `[len(which), k]`."""

    def value(weights: np.ndarray) -> np.ndarray:
        return losses(training.named(training.run(training.initial(), 0, weights))).detach().numpy()

    rows = []
    for i in which:
        e = h * (np.arange(len(training.selection)) == i)
        rows.append((value(training.selection.weights + e) - value(training.selection.weights - e)) / (2 * h))
    return np.array(rows)


def close(got: np.ndarray, want: np.ndarray, bound: float) -> None:
    gap = np.abs(got - want).max() / np.abs(want).max()
    assert gap <= bound, f"{gap} is over {bound}"


# Exactness (T-g4).


@pytest.mark.parametrize(
    ("kind", "schedule", "clip", "decay"),
    [*product(KINDS, ["linear"], [0.0, 0.05], [0.01]), *product(KINDS, ["cosine", "constant"], [0.3], [0.0])],
)
def test_perceptron_equals_autograd_and_finite_differences(
    tmp_path: Path, kind: str, schedule: Any, clip: float, decay: float
) -> None:
    recipe = Recipe(
        steps=14, terms_per_step=6, warmup=0.2, schedule=schedule, clip=clip, weight_decay=decay, **KINDS[kind]
    )
    training, losses = perceptron(tmp_path, recipe)
    found = metagradient(training, objective(training, losses))
    close(found.weights, unrolled(training, losses), 1e-10)
    close(found.weights[:4], differences(training, losses, [0, 1, 2, 3]), 1e-5)
    norms = [_norm(training, step) for step in (0, 5, 13)]
    assert clip != 0.05 or max(norms) > clip, "clipping was never active"


def _norm(training: Training, step: int) -> float:
    state = training.initial()
    for s in range(step):
        state = training.advance(state, s)
    batch = training.batches[step]
    grads, _ = loop.gradient(
        training.task, training.named(state), training.encoded, training.rows[batch],
        training.selection.weights[batch], training.recipe.terms_per_step,
    )  # fmt: skip
    return float(torch.cat([g.flatten() for g in grads]).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_equals_autograd_and_finite_differences(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps cut into micro-batches of documents of like length."""
    monkeypatch.setattr(loop.blocks, "__defaults__", (20,))
    recipe = Recipe(steps=8, terms_per_step=40, warmup=0.2, clip=0.5, **KINDS[kind])
    training, losses = decoder(tmp_path, recipe)
    assert max(len(loop.blocks(training.encoded.lengths[b])) for b in training.batches) > 1
    found = metagradient(training, objective(training, losses))
    close(found.weights, unrolled(training, losses), 1e-10)
    close(found.weights[:2], differences(training, losses, [0, 1]), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_the_derivative_through_the_last_steps(tmp_path: Path, kind: str) -> None:
    training, losses = perceptron(tmp_path, Recipe(steps=12, terms_per_step=6, **KINDS[kind]))
    found = metagradient(training, objective(training, losses), since=10)
    close(found.weights, unrolled(training, losses, since=10), 1e-10)
    never = training.visits(since=10)[0] == 0
    assert (found.weights[never] == 0).all() and never.any()


def test_dropout_is_differentiated_as_the_steps_drew_it(tmp_path: Path) -> None:
    recipe = Recipe(steps=10, terms_per_step=6, **KINDS["momentum"])
    training, losses = perceptron(tmp_path, recipe, dropout=0.3)
    found = metagradient(training, objective(training, losses))
    close(found.weights, unrolled(training, losses), 1e-10)
    close(found.weights[:3], differences(training, losses, [0, 1, 2]), 1e-5)


@pytest.mark.parametrize("stretch", [1, 7, 40])
def test_adamw_is_handed_back_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    training, losses = perceptron(tmp_path, Recipe(steps=5, terms_per_step=6, **KINDS["adamw"]))
    whole = metagradient(training, objective(training, losses))
    monkeypatch.setattr(adjoint, "STRETCH", stretch)
    close(metagradient(training, objective(training, losses)).weights, whole.weights, 1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [1, 3])
def test_slopes_that_an_objective_keeps_stay_as_they_are(tmp_path: Path, kind: str, targets: int) -> None:
    """The adjoint changes in place, step by step: it is a copy of theirs."""
    training, losses = perceptron(tmp_path, Recipe(steps=5, terms_per_step=6, **KINDS[kind]))
    mine = objective(training, losses)(training.first)[:, :targets].contiguous()
    before = mine.clone()
    first = metagradient(training, lambda _: mine)
    assert torch.equal(mine, before)
    assert np.array_equal(metagradient(training, lambda _: mine).weights, first.weights)


def test_frozen_parameters_stay_and_have_no_say(tmp_path: Path) -> None:
    training, losses = perceptron(tmp_path, Recipe(steps=10, terms_per_step=6, **KINDS["adamw"]))
    training.task.module.layers[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    assert training.moved == ["layers.0.bias", "layers.1.weight", "layers.1.bias"]
    found = metagradient(training, objective(training, losses))
    assert torch.equal(found.final["layers.0.weight"], training.first["layers.0.weight"])
    close(found.weights, unrolled(training, losses), 1e-10)


def test_linear_regression_to_convergence_is_the_influence_function(tmp_path: Path) -> None:
    """T-g9: with full batches to the optimum, -d f / d w_i = grad f^T H^-1 grad loss_i / N, also with weight decay."""
    pool, other = vector_pool(12), vector_pool(3, seed=1)
    task = Classifier(inputs=5, classes=3)
    encoded = prepared(task, pool, tmp_path / "pool")
    inputs = prepared(task, other, tmp_path / "target").inputs(np.arange(3))
    recipe = Recipe(
        steps=1200, terms_per_step=12, optimiser="sgd", lr=1.0, schedule="constant", warmup=0, clip=0, weight_decay=0.1
    )
    training = Training(task, encoded, np.arange(12), Selection.everything(pool.ids), recipe, dtype=D)
    found = metagradient(training, objective(training, lambda p: task.loss(p, inputs)))
    names, whole = training.moved, encoded.inputs(np.arange(12))
    flat = torch.cat([found.final[n].flatten() for n in names])

    def total(x: Tensor) -> Tensor:
        parts = dict(zip(names, x.split([found.final[n].numel() for n in names]), strict=True))
        params = {n: v.view_as(found.final[n]) for n, v in parts.items()}
        return task.loss(params, whole).mean() + 0.05 * x.square().sum()

    hessian = torch.autograd.functional.hessian(total, flat)
    f = slopes(task, found.final, [inputs], task.loss, names, each=True)
    g = slopes(task, found.final, [whole], task.loss, names, each=True)
    close(-found.weights, (g.T @ torch.linalg.solve(hessian, f) / 12).numpy(), 1e-8)


def test_leaving_one_out_is_foretold_to_second_order(tmp_path: Path) -> None:
    """T-g10: the error of -w_i d f / d w_i is of second order in the weight taken away."""
    training, losses = perceptron(tmp_path, Recipe(steps=14, terms_per_step=6, **KINDS["sgd"]))
    found = metagradient(training, objective(training, losses))
    base = losses(found.final).detach().numpy()
    gaps = []
    for share in (0.1, 0.05):
        weights = training.selection.weights.copy()
        weights[2] *= 1 - share
        moved = losses(training.named(training.run(training.initial(), 0, weights))).detach().numpy()
        foretold = -share * training.selection.weights[2] * found.weights[2]
        gaps.append(np.abs(moved - base - foretold).max())
    assert 3.5 < gaps[0] / gaps[1] < 4.5


# What it does not depend on.


@pytest.mark.parametrize("branch", [2, 3, 16])
def test_the_tree_changes_no_bit(tmp_path: Path, branch: int) -> None:
    """T-g6: against keeping every state."""
    training, losses = perceptron(tmp_path, Recipe(steps=16, terms_per_step=6, **KINDS["adamw"]))
    whole = metagradient(training, objective(training, losses), branch=16)
    found = metagradient(training, objective(training, losses), branch=branch)
    assert np.array_equal(found.phases, whole.phases)
    total, peak = exact_costs(16, branch)
    assert (found.restored + 15, found.peak) == (total, peak)  # all but one of training's own steps are among them


@pytest.mark.parametrize(("steps", "branch"), GOLDEN)
def test_steps_and_states_of_the_tree_are_those_of_the_formula(steps: int, branch: int) -> None:
    visited: list[int] = []

    def visit(state: int, step: int) -> None:
        assert state == step
        visited.append(step)

    tree: Tree[int] = Tree(lambda state, step: state + 1, visit, branch, steps)
    tree.children(tree.sweep(0, cuts(0, steps, branch)[:-1]), steps)
    assert visited == list(range(steps))[::-1]
    assert (tree.steps, tree.peak) == GOLDEN[steps, branch] == exact_costs(steps, branch)


def test_targets_that_share_a_sweep_are_those_of_sweeps_of_their_own(tmp_path: Path) -> None:
    """Both ways of sharing: by vmap, and one product after another on one graph."""
    training, losses = perceptron(tmp_path, Recipe(steps=12, terms_per_step=6, **KINDS["adamw"]))
    both = metagradient(training, objective(training, losses))
    assert training.together
    other = replace(training)
    other.__dict__["together"] = False
    close(metagradient(other, objective(other, losses)).weights, both.weights, 1e-12)
    for k in range(3):
        one = metagradient(training, lambda p, k=k: objective(training, losses)(p)[:, k : k + 1])
        close(one.weights[:, 0], both.weights[:, k], 1e-12)


def test_phases_add_up_and_are_of_their_own_steps(tmp_path: Path) -> None:
    training, losses = perceptron(tmp_path, Recipe(steps=12, terms_per_step=6, **KINDS["momentum"]))
    whole = metagradient(training, objective(training, losses))
    parts = metagradient(training, objective(training, losses), phases=3)
    close(parts.weights, whole.weights, 1e-12)
    last = metagradient(training, objective(training, losses), since=8)
    close(parts.phases[2], last.weights, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_training_it_runs_is_that_of_the_trainer(tmp_path: Path, kind: str) -> None:
    training, losses = perceptron(tmp_path, Recipe(steps=12, terms_per_step=6, clip=0.1, **KINDS[kind]))
    found = metagradient(training, objective(training, losses), branch=3)
    trained = loop.train(
        training.task, training.encoded, training.rows, training.selection, training.recipe, start=training.first
    )
    assert all(torch.equal(found.final[n], p) for n, p in trained.params.items())


# Kills and refusals.


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 11, 17, 22, 29, 35])
def test_a_killed_sweep_goes_on_to_the_same_bytes(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training, losses = perceptron(tmp_path, Recipe(steps=16, terms_per_step=6, **KINDS["adamw"]))
    how: dict[str, Any] = {"phases": 2, "pushes": [9, 13], "branch": 4}
    whole = metagradient(training, objective(training, losses), **how)
    calls, real_step, real_back = [0], loop.advance, replay.reverse

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise Killed
            return real(*args)

        return call

    monkeypatch.setattr(loop, "advance", counted(real_step))
    monkeypatch.setattr(replay, "reverse", counted(real_back))
    with pytest.raises(Killed):
        metagradient(training, objective(training, losses), path=tmp_path / "kept", **how)
    before = calls[0]
    found = metagradient(training, objective(training, losses), path=tmp_path / "kept", **how)
    assert at < 4 or calls[0] - before < 44 - (at > 20) * 12, "it began anew"
    assert same(found, whole)


def test_a_sweep_of_other_targets_does_not_go_on_from_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, losses = perceptron(tmp_path, Recipe(steps=16, terms_per_step=6, **KINDS["sgd"]))
    first, calls, real = objective(training, losses), [0], replay.reverse

    def other(params: Any) -> Tensor:
        return first(params)[:, [2, 0, 1]].contiguous()

    def dying(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            raise Killed
        return real(*args)

    monkeypatch.setattr(replay, "reverse", dying)
    with pytest.raises(Killed):
        metagradient(training, first, path=tmp_path / "kept")
    found = metagradient(training, other, path=tmp_path / "kept")
    assert np.array_equal(found.phases, metagradient(training, other).phases)


def same(found: Metagradient, other: Metagradient) -> bool:
    ends = all(torch.equal(found.final[n], p) for n, p in other.final.items())
    pushes = found.pushes.keys() == other.pushes.keys() and all(
        torch.equal(a, b) for s in found.pushes for a, b in zip(found.pushes[s][1], other.pushes[s][1], strict=True)
    )
    return ends and pushes and np.array_equal(found.phases, other.phases)


def test_a_state_that_is_not_repeated_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, losses = perceptron(tmp_path, Recipe(steps=16, terms_per_step=6, **KINDS["sgd"]))
    real, calls = loop.advance, [0]

    def moody(*args: Any) -> Any:
        calls[0] += 1
        params, slots, loss = real(*args)
        return ([p + 1e-9 for p in params] if calls[0] == 18 else params), slots, loss

    monkeypatch.setattr(loop, "advance", moody)
    with pytest.raises(InputError, match="gave other weights after step"):
        metagradient(training, objective(training, losses), branch=4)


def test_what_has_no_derivative_is_refused(tmp_path: Path) -> None:
    training, _ = perceptron(tmp_path, Recipe(steps=4, terms_per_step=6, **KINDS["sgd"]))
    with pytest.raises(InputError, match="bfloat16"):
        replace(training, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="eps_root"):
        replace(training, recipe=Recipe(optimiser="adamw"))
    with pytest.raises(InputError, match="no derivative of steps"):
        metagradient(training, lambda p: torch.zeros(0), since=4)
