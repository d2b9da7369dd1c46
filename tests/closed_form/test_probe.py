"""Utility by forward passes against derivatives, dense algebra and its own limits."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Selection
from assay.core.table import Table
from assay.core.task import Task
from assay.measure import Measurer
from assay.numerics.probe import LENGTHS, Pair, Probe, choose_step, derivatives, losses
from assay.numerics.stats import spearman
from assay.train import optim
from assay.train.loop import train
from assay.train.metric import preconditioner
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from helpers import language, prepared, text_pool, vector_pool, wide

EXACT = {"name": "gradients", "projection": "exact", "store": "float32"}
pytestmark = pytest.mark.usefixtures("one_thread")

N, DECAY = 30, 0.05


@dataclass
class World:
    task: Task
    pool: Pool
    target: Pool
    folder: Path

    def measurer(self, out: Path, models: list[dict[str, Tensor]], *, pool: Pool | None = None, **options: Any) -> Any:
        """Over the pool, or over another order or part of it."""
        pool, encodings = self.pool if pool is None else pool, {}
        for part in (pool, self.target):
            encodings[part.fingerprint] = self.folder / part.fingerprint
            if not encodings[part.fingerprint].exists():
                prepared(self.task, part, encodings[part.fingerprint])
        run = Run.open(out, {})
        run.close()
        return Measurer(run, pool, self.target, task=self.task, models=models, encodings=encodings, key="k", **options)

    def table(self, out: Path, spec: Any, models: list[dict[str, Tensor]], **options: Any) -> Table:
        return self.measurer(out, models, **options).table(make(Scorer, spec))

    def scores(self, out: Path, spec: Any, models: list[dict[str, Tensor]], **options: Any) -> np.ndarray:
        return self.table(out, spec, models, **options).values[:, 0]

    def inputs(self, pool: Pool) -> dict[str, Tensor]:
        return prepared(self.task, pool, self.folder / pool.fingerprint).inputs(np.arange(len(pool)))

    def names(self) -> list[str]:
        return [n for n, _ in self.task.module.named_parameters()]

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        shapes = {n: p.shape for n, p in self.task.module.named_parameters()}
        parts = theta.split([s.numel() for s in shapes.values()])
        return {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}

    def losses(self, theta: Tensor) -> Tensor:
        return self.task.loss(self.split(theta), self.inputs(self.pool))

    def asked(self, theta: Tensor) -> Tensor:
        return self.task.loss(self.split(theta), self.inputs(self.target))

    def slopes(self, theta: Tensor) -> Tensor:
        """Gradients of the pool's losses, `[n, p]`."""
        return torch.func.jacrev(self.losses)(theta)

    def slope(self, theta: Tensor) -> Tensor:
        """Gradient of the mean target loss, `[p]`."""
        return torch.func.grad(lambda t: self.asked(t).mean())(theta)

    def hessian(self, theta: Tensor, weights: Tensor) -> Tensor:
        """Of sum_i w_i loss_i + decay/2 |theta|^2; reverse over reverse."""
        plain = torch.func.jacrev(torch.func.grad(lambda t: weights @ self.losses(t)))(theta)
        return plain + DECAY * torch.eye(len(theta), dtype=theta.dtype)

    def best(self, weights: Tensor) -> Tensor:
        """Its argmin, by Newton's method to the last digit."""
        theta = torch.zeros(18, dtype=torch.float64)
        for _ in range(20):
            slope = torch.func.grad(lambda t: weights @ self.losses(t))(theta) + DECAY * theta
            theta = theta - torch.linalg.solve(self.hessian(theta, weights), slope)
        return theta


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Logistic regression of three classes: 18 weights; the target has three groups of unequal size."""
    target = vector_pool(9, seed=1)
    columns = {name: target.column(name) for name in ("pixels", "label")}
    grouped = Pool.from_columns({**columns, "group": ["b", "a", "b", None, "b", "a", "b", "b", None]})
    return World(Classifier(inputs=5, classes=3), vector_pool(N), grouped, tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def even(linear: World) -> Tensor:
    return torch.full((N,), 1 / N, dtype=torch.float64)


@pytest.fixture(scope="module")
def best(linear: World, even: Tensor) -> Tensor:
    return linear.best(even)


def drawn(seed: int) -> Tensor:
    return torch.randn(18, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(values: np.ndarray, truth: np.ndarray | Tensor, tolerance: float) -> None:
    truth = np.asarray(truth)
    np.testing.assert_allclose(values, truth, rtol=0, atol=tolerance * np.abs(truth).max())


def distance(values: np.ndarray, truth: np.ndarray | Tensor) -> float:
    return float(np.abs(values - np.asarray(truth)).max())


# The probe.


def test_a_probe_adds_pairs_averages_models_and_reads_shared_weights_once(linear: World) -> None:
    a, b, c, d = (linear.split(drawn(s)) for s in range(4))
    inputs = linear.inputs(linear.pool)
    models = [[[Pair(a, b, 0.5)], [Pair(a, b), Pair(a, c, 2.0)]], [[Pair(d, c)], [Pair(d, d)]]]
    probe = Probe.of(linear.task, models, columns=("x", "y"))
    la, lb, lc, ld = (losses(linear.task, p, inputs, "float32") for p in (a, b, c, d))
    truth = torch.stack([((la - lb) / 0.5 + ld - lc) / 2, (la - lb + (la - lc) / 2) / 2], dim=1)
    for copy in (probe, pickle.loads(pickle.dumps(probe))):
        near(copy.read(inputs).numpy(), truth, 1e-14)
    # a, b, c and d once each, though a and c stand in several pairs: four readings for two models.
    assert len(probe.weights) == 4 and probe.passes == 2.0


@pytest.mark.parametrize(("spec", "passes"), [
    ("loss_diff", 2), ("directional", 2), ("response", 2), ({"name": "directional", "per": "group"}, 4),
])  # fmt: skip
def test_the_ledger_counts_the_passes_over_the_pool(linear: World, tmp_path: Path, spec: Any, passes: int) -> None:
    method, models = make(Scorer, spec), [linear.split(drawn(s)) for s in range(2)]
    measurer = linear.measurer(tmp_path, models)
    state: Any = None
    original = measurer._passes

    def watched(method: Any, found: Any) -> float:
        nonlocal state
        state = found
        return original(method, found)

    measurer._passes = watched
    measurer.table(method)
    assert original(method, state) == 2 * passes == 2 * state.passes


# Directional.


def test_directional_is_the_dot_with_the_targets_gradient(linear: World, tmp_path: Path) -> None:
    theta = drawn(5)
    truth = linear.slopes(theta) @ linear.slope(theta)
    rows = [prepared(linear.task, linear.pool, linear.folder / "x").inputs(np.array([i])) for i in range(N)]
    near(derivatives(linear.task, linear.split(theta), linear.split(linear.slope(theta)), rows), truth, 1e-12)
    errors = []
    for step in (4e-3, 2e-3):
        found = linear.scores(tmp_path / str(step), {"name": "directional", "step": step}, [linear.split(theta)])
        errors.append(distance(found, truth))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05), "central differences are of second order"
    near(linear.scores(tmp_path / "s", {"name": "directional", "step": 1e-5}, [linear.split(theta)]), truth, 1e-8)
    near(linear.scores(tmp_path / "auto", "directional", [linear.split(theta)]), truth, 1e-2)


def test_directional_averages_models_and_has_graddots_numbers(linear: World, tmp_path: Path) -> None:
    models = [linear.split(drawn(s)) for s in range(2)]
    dots = linear.scores(tmp_path / "g", {"name": "graddot", "features": EXACT}, models)
    near(linear.scores(tmp_path / "d", {"name": "directional", "step": 1e-5}, models), dots, 1e-6)


def test_directional_by_group_shares_the_base_loss(linear: World, tmp_path: Path) -> None:
    theta = drawn(5)
    g, asked = linear.slopes(theta), torch.func.jacrev(linear.asked)(theta)
    groups = np.array([x or "(none)" for x in linear.target.column("group")])
    spec, errors = {"name": "directional", "per": "group"}, []
    for step in (2e-5, 1e-5):
        table = linear.table(tmp_path / str(step), {**spec, "step": step}, [linear.split(theta)])
        assert table.columns == ("score", "group (none)", "group a", "group b")
        truth = torch.stack(
            [g @ asked.mean(dim=0), *(g @ asked[groups == n].mean(dim=0) for n in ("(none)", "a", "b"))]
        )
        errors.append(distance(table.values.T, truth))
        near(table.values.T, truth, 1e-3)
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05), "forward differences are of first order"


def test_directional_by_group_says_when_it_cannot(linear: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'subtask'"):
        linear.scores(tmp_path, {"name": "directional", "per": "group", "group": "subtask"}, [linear.split(drawn(5))])


def moments(linear: World, seed: int) -> dict[str, Any]:
    square = linear.split(drawn(seed).square())
    return {"square": square, "mean": linear.split(drawn(seed + 1)), "steps": 7, "betas": (0.9, 0.9), "eps": 1e-3}


def test_the_metric_of_adam_is_the_step_that_the_optimiser_takes(linear: World) -> None:
    """With b1 = 0 an AdamW step is -lr P g, its second moment taking g in first."""
    state, g, start = moments(linear, 8), linear.split(drawn(3)), linear.split(drawn(4))
    recipe = Recipe(lr=0.1, betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0, schedule="constant", warmup=0.0)
    held = {slot: list(state[slot].values()) for slot in ("mean", "square")}
    after, _ = optim.update(recipe, list(g.values()), held, list(start.values()), 7)
    for metric, name, end in zip(preconditioner(state, gradient=g).values(), g, after, strict=True):
        torch.testing.assert_close(start[name] - 0.1 * metric * g[name], end, rtol=1e-12, atol=1e-12)
    plain = preconditioner(state)
    for name, v in state["square"].items():
        torch.testing.assert_close(plain[name], 1 / ((v / (1 - 0.9**7)).sqrt() + 1e-3), rtol=1e-12, atol=0)
    unknown = preconditioner({"square": state["square"]})
    for name, v in state["square"].items():
        torch.testing.assert_close(unknown[name], 1 / (v.sqrt() + 1e-8), rtol=1e-12, atol=0)


def test_directional_in_adams_metric(linear: World, tmp_path: Path) -> None:
    theta, state = drawn(5), moments(linear, 8)
    g = linear.slope(theta)
    metric = torch.cat([p.flatten() for p in preconditioner(state, gradient=linear.split(g)).values()])
    spec = {"name": "directional", "metric": "adam", "step": 1e-5}
    found = linear.scores(tmp_path / "a", spec, [linear.split(theta)], optimisers=[state])
    near(found, linear.slopes(theta) @ (metric * g), 1e-7)
    with pytest.raises(InputError, match="second moments"):
        linear.scores(tmp_path / "b", spec, [linear.split(theta)])


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_loss_diff_of_one_small_step_is_directional(linear: World, tmp_path: Path, optimiser: str) -> None:
    """s_i / lr tends to <P g, grad loss_i>, for AdamW in the metric of its first step, at moments of zero."""
    theta = drawn(5) / 4
    assert linear.slope(theta).norm() < 1, "the recipe clips gradients at norm 1"
    models, zeros = [linear.split(theta)], {"square": linear.split(torch.zeros(18, dtype=torch.float64)), "steps": 0}
    metric = {"sgd": "sgd", "adamw": "adam"}[optimiser]
    slopes = linear.scores(
        tmp_path / "d", {"name": "directional", "metric": metric, "step": 1e-5}, models, optimisers=[zeros]
    )
    errors = []
    for lr in (2e-3, 1e-3):
        spec = {"name": "loss_diff", "steps": 1, "lr": lr, "optimiser": optimiser, "terms_per_step": 9}
        errors.append(distance(linear.scores(tmp_path / str(lr), spec, models) / lr, slopes))
    assert errors[1] < 0.02 * np.abs(slopes).max() and errors[0] / errors[1] == pytest.approx(2, rel=0.05)


@pytest.fixture(scope="module")
def small_decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, dict[str, Tensor], np.ndarray]:
    """A decoder that learned a little, and the exact derivatives of every example."""
    folder = tmp_path_factory.mktemp("decoder")
    pool, target = text_pool(96, longest=20), text_pool(12, seed=1, longest=20)
    task, encoded = language(pool, folder / "pool", width=32, context=48)
    recipe = Recipe(steps=60, terms_per_step=512, lr=3e-3)
    params = train(task, encoded, np.arange(96), Selection.everything(pool.ids), recipe).params
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    loss = task.loss(leaves, prepared(task, target, folder / "target").inputs(np.arange(12))).mean()
    slope = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    exact = derivatives(task, params, slope, [encoded.inputs(np.array([i])) for i in range(96)])
    return World(task, pool, target, folder), params, exact


@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.999), ("bfloat16", 0.95)])
def test_directional_ranks_a_decoders_examples_as_exact_derivatives_do(
    small_decoder: tuple[World, dict[str, Tensor], np.ndarray], tmp_path: Path, precision: str, bound: float
) -> None:
    world, params, exact = small_decoder
    table = world.table(tmp_path, {"name": "directional", "precision": precision}, [params])
    assert spearman(table.values[:, 0], exact) > bound
    note = table.meta["notes"]["agreement with exact derivatives"]
    assert note["spearman"] > bound and note["sample"] == 32 and note["steps"][0] in LENGTHS
    assert f"{note['spearman']:.3f}" in note["detail"] and json.dumps(note)


def test_directional_refuses_what_is_lost_in_rounding(
    small_decoder: tuple[World, dict[str, Tensor], np.ndarray], tmp_path: Path
) -> None:
    world, params, _ = small_decoder
    with pytest.raises(InputError, match="bfloat16 the losses are rounded") as caught:
        world.scores(tmp_path, {"name": "directional", "precision": "bfloat16", "step": 1e-6}, [params])
    assert "step = 0" in str(caught.value) and "Spearman" in str(caught.value)


def test_directional_does_not_see_batches_shards_or_order(
    small_decoder: tuple[World, dict[str, Tensor], np.ndarray], tmp_path: Path
) -> None:
    """The step is the same, bit for bit; the readings differ by rounding, and their ranks hardly at all."""
    world, params, _ = small_decoder
    tables = [world.table(tmp_path / "0", "directional", [params])]
    for k, options in enumerate([{"batch": 1}, {"batch": 7, "shard": 10}]):
        tables.append(world.table(tmp_path / f"a{k}", "directional", [params], **options))
    mixed = world.pool.at(np.random.default_rng(0).permutation(len(world.pool)))
    tables.append(world.table(tmp_path / "b", "directional", [params], pool=mixed))
    whole = tables[0].values[:, 0]
    for table in tables[1:]:
        assert table.meta["notes"] == tables[0].meta["notes"]
        found = table.align(world.pool.ids).values[:, 0]
        near(found, whole, 5e-4)
        assert spearman(found, whole) > 0.9999


def test_the_step_is_chosen_where_it_agrees_best(linear: World) -> None:
    """In float64 a short one; a long one only where it is as good."""
    theta = drawn(5)
    inputs = prepared(linear.task, linear.pool, linear.folder / "y")
    rows = [inputs.inputs(np.array([i])) for i in range(N)]
    direction, params = linear.split(linear.slope(theta)), linear.split(theta)
    tried = [choose_step(linear.task, params, direction, rows, relative=r) for r in LENGTHS]
    chosen = choose_step(linear.task, params, direction, rows)
    assert chosen.error < 2e-3 and chosen == max((s for s in tried if s.error < 2e-3), key=lambda s: s.length)
    with pytest.raises(InputError, match="norm 0"):
        choose_step(linear.task, params, linear.split(torch.zeros(18, dtype=torch.float64)), rows)


# Response.


def full(**options: Any) -> dict[str, Any]:
    """Every row at every step, as the dense formula has it."""
    return {"name": "response", "terms_per_step": 0, "weight_decay": DECAY, **options}


def filtered(h: Tensor, lr: float, steps: int) -> Tensor:
    """F(H) = (1 - (1 - lr H)^steps) / H."""
    values, vectors = torch.linalg.eigh(h)
    return vectors @ torch.diag((1 - (1 - lr * values) ** steps) / values) @ vectors.T


@pytest.mark.parametrize(("sides", "order"), [("toward", 2), ("away", 2), ("both", 4)])
@pytest.mark.parametrize("steps", [1, 12, 200])
def test_response_tends_to_the_filtered_inverse(
    linear: World, best: Tensor, even: Tensor, tmp_path: Path, steps: int, sides: str, order: int
) -> None:
    lr, errors = 0.3, []
    h = linear.hessian(best, even)
    truth = linear.slopes(best) @ filtered(h, lr, steps) @ linear.slope(best)
    for eps in (2e-2, 1e-2):
        spec = full(steps=steps, lr=lr, eps=eps, sides=sides)
        errors.append(distance(linear.scores(tmp_path / str(eps), spec, [linear.split(best)]), truth))
    assert errors[0] / errors[1] == pytest.approx(order, rel=0.1)
    small = linear.scores(tmp_path / "s", full(steps=steps, lr=lr, eps=1e-4), [linear.split(best)])
    near(small, truth, 1e-6)


def test_response_of_one_step_is_graddot(linear: World, tmp_path: Path) -> None:
    """Away from the optimum too; whatever the training loss is, both sides take the same step on it."""
    models = [linear.split(drawn(s)) for s in range(2)]
    stay = full(steps=1, lr=1e-4, eps=1e-3)
    dots = linear.scores(tmp_path / "g", {"name": "graddot", "features": EXACT}, models)
    near(linear.scores(tmp_path / "r", stay, models) / 1e-4, dots, 1e-4)


def test_response_of_many_steps_is_influence(linear: World, best: Tensor, tmp_path: Path) -> None:
    exact = {"name": "influence", "solver": "exact", "damping": 0.0, "weight_decay": DECAY}
    influence = linear.scores(tmp_path / "i", exact, [linear.split(best)])
    spec = full(steps=600, lr=0.5, eps=1e-4)
    near(linear.scores(tmp_path / "r", spec, [linear.split(best)]) / N, influence, 1e-5)


def test_response_in_adams_metric(linear: World, best: Tensor, even: Tensor, tmp_path: Path) -> None:
    state, lr, steps = moments(linear, 8), 0.05, 20
    g = linear.slope(best)
    root = torch.cat([p.flatten() for p in preconditioner(state, gradient=linear.split(g)).values()]).sqrt()
    inner = filtered(root[:, None] * linear.hessian(best, even) * root, lr, steps)
    truth = linear.slopes(best) @ (root * (inner @ (root * g)))
    spec = full(steps=steps, lr=lr, eps=1e-4, metric="adam")
    near(linear.scores(tmp_path, spec, [linear.split(best)], optimisers=[state]), truth, 1e-5)


def test_response_trains_on_no_barred_row(linear: World, tmp_path: Path) -> None:
    kept = torch.arange(N) % 3 > 0
    weights = kept.double() / kept.sum()
    theta = linear.best(weights)
    truth = linear.slopes(theta) @ filtered(linear.hessian(theta, weights), 0.3, 50) @ linear.slope(theta)
    barred = linear.pool.ids[~kept.numpy()]
    spec = full(steps=50, lr=0.3, eps=1e-4)
    near(linear.scores(tmp_path / "a", spec, [linear.split(theta)], barred=barred), truth, 1e-6)
    with pytest.raises(InputError, match="no row of the pool is left"):
        linear.scores(tmp_path / "b", spec, [linear.split(theta)], barred=linear.pool.ids)


def test_response_on_batches_does_not_see_order(linear: World, tmp_path: Path) -> None:
    theta = linear.split(drawn(6))
    spec = {"name": "response", "terms_per_step": 4, "steps": 15, "lr": 0.1}
    whole = linear.scores(tmp_path / "0", spec, [theta])
    for k, options in enumerate([{"batch": 1}, {"batch": 7, "shard": 10}]):
        near(linear.scores(tmp_path / f"a{k}", spec, [theta], **options), whole, 1e-10)
    mixed = linear.pool.at(np.random.default_rng(0).permutation(N))
    table = linear.table(tmp_path / "b", spec, [theta], pool=mixed)
    near(table.align(linear.pool.ids).values[:, 0], whole, 1e-10)
    other = linear.scores(tmp_path / "c", {**spec, "seed": 1}, [theta])
    assert distance(other, whole) > 1e-3 * np.abs(whole).max(), "the seed draws other batches"


def test_response_says_when_it_diverges(linear: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lower lr"):
        linear.scores(tmp_path, full(steps=200, lr=1e6), [linear.split(drawn(1))])


def test_the_sides_of_a_response_meet_in_the_limit(tmp_path: Path) -> None:
    """A perceptron, off its optimum, on batches: to first order in eps all sides are the same, 'both' is their mean."""
    pool, target = vector_pool(40), vector_pool(8, seed=1)
    task = Classifier(inputs=5, hidden=(6,), classes=3)
    world = World(task, pool, target, tmp_path / "data")
    params = wide(task)
    spec = {"name": "response", "steps": 10, "lr": 0.1, "eps": 1e-4, "terms_per_step": 16}
    found = [world.scores(tmp_path / s, {**spec, "sides": s}, [params]) for s in ("both", "toward", "away")]
    near(found[1], found[0], 1e-3)
    near((found[1] + found[2]) / 2, found[0], 1e-5)
    assert distance(found[1], found[2]) > 0
