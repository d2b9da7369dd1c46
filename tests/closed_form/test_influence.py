"""Influence by every solver, curvature and option against dense algebra; RelatIF and DataInf against their formulas."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scorers import DECAY, N, World, best, gradients, hessian, near, three  # noqa: F401 - fixtures
from torch import Tensor, nn

from assay.core.errors import InputError
from assay.core.method import Mark, Scorer, make
from assay.numerics.solve import training_time
from assay.train.models import Classifier
from helpers import language, prepared, text_pool, vector_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS: dict[str, dict[str, Any]] = {
    "exact": {}, "cg": {"tolerance": 1e-9}, "lissa": {"tolerance": 1e-9, "limit": 20_000}, "arnoldi": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A network with a hidden layer: its Hessian is not its Gauss-Newton matrix."""
    folder = tmp_path_factory.mktemp("deep")
    task = Classifier(inputs=5, hidden=(4,), classes=3)
    pool, target = vector_pool(N), vector_pool(9, seed=1)
    return World(
        task, pool, target, prepared(task, pool, folder / "pool"), prepared(task, target, folder / "target"), folder
    )


def somewhere(w: World) -> Tensor:
    return torch.cat([p.reshape(-1) for p in wide(w.task).values()])


def squared(w: World, theta: Tensor, kind: str) -> Tensor:
    """The curvature of the mean loss, `[p, p]`."""
    if kind == "hessian":
        return hessian(lambda t: w.losses(t).mean())(theta)
    if kind == "empirical":
        g = gradients(w, theta)
        return g.T @ g / N
    z = lambda t: w.task.logits(w.params(t), w.inputs)  # noqa: E731
    j, p = torch.as_tensor(torch.func.jacrev(z)(theta)), z(theta).softmax(dim=1)
    return torch.einsum("ncp,ncd,ndq->pq", j, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], j) / N


def asked(w: World, theta: Tensor, measure: str) -> Tensor:
    """Gradients of f of each target example, `[q, p]`."""
    f = w.task.loss if measure == "loss" else lambda *a: -w.task.margin(*a)
    return torch.as_tensor(torch.func.jacrev(lambda t: f(w.params(t), w.questions))(theta))


def damped(h: Tensor, damping: float) -> Tensor:
    return h + damping * h.trace() / len(h) * torch.eye(len(h), dtype=h.dtype)


def explicit(w: World, theta: Tensor, kind: str, damping: float, measure: str) -> Tensor:
    """(1/N) G H^-1 V^T, `[n, q]`."""
    h = damped(squared(w, theta, kind), damping)
    return gradients(w, theta) @ torch.linalg.inv(h) @ asked(w, theta, measure).T / N


@pytest.mark.parametrize("batch", [64, 8])
@pytest.mark.parametrize("kind", ["ggn", "empirical"])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_solver_is_the_explicit_inverse(deep: World, tmp_path: Path, solver: str, kind: str, batch: int) -> None:
    """For each target's margin, for one and for four batches of the loader; the mean over targets is their mean."""
    theta = somewhere(deep)
    spec = {"name": "influence", "solver": solver, "curvature": kind, "damping": 0.5, "measure": "margin"}
    measurer = deep.measurer(tmp_path, [deep.params(theta)], batch=batch)
    table = measurer.table(make(Scorer, {**spec, **SOLVERS[solver], "targets": "each"}))
    assert table.columns == tuple(i.decode() for i in deep.target.ids)
    truth = explicit(deep, theta, kind, 0.5, "margin")
    near(table.values, truth, 1e-6)
    assert not measurer.warnings
    noted = table.meta["notes"][f"influence: solve by {solver}"]
    mean_eigenvalue = float(squared(deep, theta, kind).trace()) / len(theta)
    assert noted["damping"] == pytest.approx(0.5 * mean_eigenvalue) and 0 <= noted["residual"] < 1e-7 and noted["ok"]
    if batch == 8:
        near(measurer.table(make(Scorer, {**spec, **SOLVERS[solver]})).values[:, 0], truth.mean(dim=1), 1e-6)


def test_the_hessian_of_a_network_is_solved_or_refused(deep: World, tmp_path: Path) -> None:
    theta = somewhere(deep)
    h = squared(deep, theta, "hessian")
    least = float(torch.linalg.eigvalsh(h)[0])
    assert least < 0
    spec = {"name": "influence", "curvature": "hessian", "targets": "each", "tolerance": 1e-10}
    for solver, says in (("exact", "not positive definite"), ("cg", "negative curvature"), ("lissa", "LiSSA diverges")):
        with pytest.raises(InputError, match=says) as caught:
            deep.scores(tmp_path / solver, {**spec, "solver": solver, "damping": 0.0}, [deep.params(theta)])
        assert "damping" in caught.value.fix
    enough = -2 * least / float(h.trace()) * len(h)
    found = deep.measurer(tmp_path / "a", [deep.params(theta)]).table(
        make(Scorer, {**spec, "solver": "exact", "damping": enough})
    )
    near(found.values, explicit(deep, theta, "hessian", enough, "loss"), 1e-8)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_linear_layers_only(deep: World, tmp_path: Path, solver: str) -> None:
    """All weights of a perceptron are in linear layers: nothing changes. (In a decoder, see below.)"""
    theta = somewhere(deep)
    spec = {"name": "influence", "solver": solver, "damping": 0.5, "tolerance": 1e-10}
    near(
        deep.scores(tmp_path / "l", {**spec, "layers": "linear"}, [deep.params(theta)]),
        deep.scores(tmp_path / "a", spec, [deep.params(theta)]), 1e-12,
    )  # fmt: skip


def text_world(folder: Path) -> tuple[World, dict[str, Tensor]]:
    pool, target = text_pool(6), text_pool(4, seed=1)
    task, encoded = language(pool, folder / "pool", width=2, heads=1, layers=1, context=6)
    return World(task, pool, target, encoded, prepared(task, target, folder / "target"), folder), wide(task)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", ["all", "linear"])
def test_a_decoder_by_products_alone(tmp_path: Path, layers: str) -> None:
    """Per-token logits, no factored rows; against the dense solution in the parameters that are read."""
    from assay.numerics.curvature import curvature, exact_gradients, parameters
    from assay.numerics.project import rademacher

    w, params = text_world(tmp_path)
    names = parameters(w.task, params, layers)  # type: ignore[arg-type]
    h = curvature(w.task, params, lambda: [w.inputs], 6, kind="ggn", only=names).dense()
    z = rademacher(16, len(h), seed=0, label="trace").double() * 4
    trace = torch.einsum("kp,pq,kq->", z, h, z) / 16
    solver = torch.linalg.inv(h + 0.3 * trace / len(h) * torch.eye(len(h), dtype=h.dtype))
    g, v = (exact_gradients(w.task, params, i, only=names) for i in (w.inputs, w.questions))
    spec = {"name": "influence", "damping": 0.3, "targets": "each", "layers": layers, "tolerance": 1e-9}
    near(w.measurer(tmp_path / "r", [params], batch=2).table(make(Scorer, spec)).values, g @ solver @ v.T / 6, 1e-6)
    with pytest.raises(InputError, match="no margin"):
        w.scores(tmp_path / "m", {**spec, "measure": "margin"}, [params])


def test_float32_is_float64_to_its_digits(deep: World, tmp_path: Path) -> None:
    models = [deep.params(somewhere(deep))]
    for solver in ("exact", "cg"):
        spec = {"name": "influence", "solver": solver, "damping": 0.5}
        wide_scores = deep.scores(tmp_path / f"{solver}64", spec, models)
        narrow = deep.scores(tmp_path / f"{solver}32", {**spec, "precision": "float32"}, models)
        near(narrow, wide_scores, 1e-4)
        assert not np.array_equal(narrow, wide_scores)


def test_lissa_of_minibatches_nears_the_same_scores(deep: World, tmp_path: Path) -> None:
    """And does not see the pool's order: minibatches are keyed by ids."""
    theta = somewhere(deep)
    truth = explicit(deep, theta, "ggn", 1.0, "loss").mean(dim=1).numpy()
    spec = {"name": "influence", "solver": "lissa", "damping": 1.0, "minibatch": 10, "limit": 150, "tolerance": 1e-4}
    measurer = deep.measurer(tmp_path / "a", [deep.params(theta)])
    table = measurer.table(make(Scorer, spec))
    found, noted = table.values[:, 0], table.meta["notes"]["influence: solve by lissa"]
    assert np.corrcoef(found, truth)[0, 1] > 0.99
    assert 1e-3 < noted["residual"] < 0.1 and noted["ok"] and not measurer.warnings
    short = measurer.table(make(Scorer, {**spec, "limit": 3})).meta["notes"]["influence: solve by lissa"]
    assert short["residual"] > 0.1 and short["ok"] is False
    assert any("LiSSA stopped at residual" in w for w in measurer.warnings)
    order = np.random.default_rng(0).permutation(N)
    mixed = deep.pool.at(order)
    other = World(
        deep.task, mixed, deep.target, prepared(deep.task, mixed, tmp_path / "w/pool"), deep.asked, tmp_path / "w"
    )
    (tmp_path / "w/target").symlink_to(deep.folder / "target")
    near(other.scores(tmp_path / "b", spec, [deep.params(theta)]), found[order], 1e-9)
    with pytest.raises(InputError, match="minibatch = 10 has no effect"):
        deep.scores(tmp_path / "c", {**spec, "solver": "cg"}, [deep.params(theta)])


def test_damping_in_units_of_the_run(deep: World, tmp_path: Path) -> None:
    """1 / (data weight x sum of learning rates / (1 - momentum)), whatever the curvature; in RelatIF's divisor too."""
    theta = somewhere(deep)
    models = [deep.params(theta)]
    about = {"weight": 0.5, "inertia": 0.75, "decay": 0.0}
    marks = [Mark(deep.params(theta * 0.9), about, 10, 3.0), Mark(models[0], about, 10, 2.0)]
    t = 0.5 * 5.0 / 0.25
    h = squared(deep, theta, "ggn") + 2 / t * torch.eye(len(theta), dtype=theta.dtype)
    g, v = gradients(deep, theta), asked(deep, theta, "loss").mean(dim=0)
    moved = torch.linalg.solve(h, g.T)
    spec = {"name": "influence", "damping": 2.0, "scale": "run"}
    for solver in ("exact", "cg"):
        found = deep.scores(tmp_path / solver, {**spec, "solver": solver}, models, trajectories=[marks])
        near(found, v @ moved / N, 1e-6)
    ratio = deep.scores(tmp_path / "r", {"name": "relatif", "influence": spec}, models, trajectories=[marks])
    near(ratio, v @ moved / (g.T * moved).sum(dim=0).sqrt(), 1e-6)
    with pytest.raises(InputError, match="not known how"):
        deep.scores(tmp_path / "u", spec, models)
    adam = [Mark(models[0], {**about, "square": models[0]}, 10, 3.0)]
    with pytest.raises(InputError, match="AdamW"):
        deep.scores(tmp_path / "a", spec, models, trajectories=[adam])


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("steps", [30, 3000])
def test_training_answers_much_as_damping_of_one_over_its_time_does(lr: float, steps: int) -> None:
    """Of a quadratic loss, in each eigendirection: gradient descent from 0, with momentum, over the damped solution."""
    values = torch.logspace(-3, 1, 9, dtype=torch.float64)
    for inertia in (0.0, 0.5):
        mark = Mark({}, {"weight": 1.0, "inertia": inertia}, steps, lr * steps)
        damped_ones = 1 / (values + 1 / training_time([mark]))
        x, u = torch.zeros_like(values), torch.zeros_like(values)
        for _ in range(steps):
            u = inertia * u + 1 - values * x
            x = x + lr * u
        ratio = x / damped_ones
        assert 0.93 < float(ratio.min()) and float(ratio.max()) < 1.36, ratio


def test_a_small_subspace_is_warned_about(deep: World, tmp_path: Path) -> None:
    measurer = deep.measurer(tmp_path, [deep.params(somewhere(deep))])
    table = measurer.table(make(Scorer, {"name": "influence", "solver": "arnoldi", "damping": 0.0, "rank": 3}))
    assert any("arnoldi stopped at residual" in w for w in measurer.warnings)
    noted = table.meta["notes"]["influence: solve by arnoldi"]
    assert 0.1 < noted["residual"] <= 1 and noted["ok"] is False


def test_large_models_are_not_factorised(three: World, best: Tensor, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    for name in ("influence", "self_influence"):
        monkeypatch.setattr(f"assay.scorers.{name}.LARGEST", 17)
        spec = {"name": name, **({"solver": "exact"} if name == "influence" else {})}
        with pytest.raises(InputError, match="18 weights is too large to factorise"):
            three.scores(tmp_path / name, spec, [three.params(best)])


def test_self_influence_of_the_weights_is_their_squared_move(deep: World, tmp_path: Path) -> None:
    theta = somewhere(deep)
    h = damped(squared(deep, theta, "ggn") + DECAY * torch.eye(len(theta), dtype=theta.dtype), 0.3)
    moves = torch.linalg.solve(h, gradients(deep, theta).T) / N
    spec = {"name": "self_influence", "of": "weights", "damping": 0.3, "weight_decay": DECAY}
    near(deep.scores(tmp_path, spec, [deep.params(theta)]), -moves.square().sum(dim=0), 1e-9)


def test_removing_an_example_moves_the_weights_as_self_influence_says(
    three: World,  # noqa: F811
    best: Tensor,  # noqa: F811
    tmp_path: Path,
) -> None:
    """To first order, retrained without it: |theta' - theta|^2 / -s is near (1 / (1 - h_ii))^2, and never below 1."""
    spec = {"name": "self_influence", "of": "weights", "damping": 0.0, "weight_decay": DECAY}
    found, ratios = -three.scores(tmp_path, spec, [three.params(best)]), []
    for i in range(0, N, 5):
        weights = torch.ones(N, dtype=torch.float64)
        weights[i] = 0
        ratios.append(float((three.fit(weights, start=best) - best).square().sum()) / found[i])
    assert 0.9 < min(ratios) and max(ratios) < 2.5, ratios


@pytest.mark.parametrize("version", ["loss", "weights"])
def test_relatif_is_its_formula(deep: World, tmp_path: Path, version: str) -> None:
    theta = somewhere(deep)
    h = damped(squared(deep, theta, "ggn"), 0.3)
    g, v = gradients(deep, theta), asked(deep, theta, "margin")
    moved = torch.linalg.solve(h, g.T)
    below = (g.T * moved).sum(dim=0).sqrt() if version == "loss" else moved.norm(dim=0)
    inner = {"name": "influence", "solver": "exact", "damping": 0.3, "targets": "each", "measure": "margin"}
    table = deep.measurer(tmp_path, [deep.params(theta)]).table(
        make(Scorer, {"name": "relatif", "version": version, "influence": inner})
    )
    near(table.values, (v @ moved / below).T, 1e-8)
    assert table.columns == tuple(i.decode() for i in deep.target.ids)
    if version == "loss":  # Cauchy-Schwarz in the metric of H^-1
        size = (v * torch.linalg.solve(h, v.T).T).sum(dim=1).sqrt().numpy()
        cosine = np.abs(table.values / size)
        assert cosine.max() <= 1 + 1e-9 and cosine.max() > 0.5


def test_relatif_of_a_target_that_is_the_example_is_the_whole_of_it(deep: World, tmp_path: Path) -> None:
    """Cauchy-Schwarz with equality: asked about itself, an example is at cosine 1, and none is above it."""
    theta = somewhere(deep)
    for name in ("pool", "target"):
        prepared(deep.task, deep.pool, tmp_path / "w" / name)
    same = World(deep.task, deep.pool, deep.pool, deep.encoded, deep.encoded, tmp_path / "w")
    inner = {"name": "influence", "solver": "exact", "damping": 0.3, "targets": "each"}
    spec = {"name": "relatif", "influence": inner}
    found = same.measurer(tmp_path / "r", [deep.params(theta)]).table(make(Scorer, spec)).values
    own = np.diag(found)
    cosines = found / own
    np.testing.assert_allclose(np.diag(cosines), 1)
    assert np.abs(cosines).max() <= 1 + 1e-9


def test_relatif_takes_influence_only(deep: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'loss' is not the scorer 'influence'"):
        deep.scores(tmp_path, {"name": "relatif", "influence": "loss"}, [deep.params(somewhere(deep))])


def layers_of(w: World) -> list[slice]:
    """Weight and bias of one layer together."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in w.task.module.layers]  # type: ignore[union-attr]
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("damping", [0.1, 3.0])
@pytest.mark.parametrize("batch", [64, 8])
def test_datainf_is_its_formula(deep: World, tmp_path: Path, damping: float, batch: int) -> None:
    """(1/N) sum_l v^T (1/N) sum_j (g_j g_j^T + lambda_l I)^-1 g_i with each of the N inverses made."""
    theta = somewhere(deep)
    g, v = gradients(deep, theta), asked(deep, theta, "margin")
    truth = torch.zeros(N, len(v), dtype=g.dtype)
    for s in layers_of(deep):
        own, size = g[:, s], s.stop - s.start
        level = damping * float(own.square().sum()) / N / size
        inverses = torch.linalg.inv(own[:, :, None] * own[:, None, :] + level * torch.eye(size, dtype=g.dtype))
        truth += own @ inverses.mean(dim=0) @ v[:, s].T / N
    spec = {"name": "datainf", "damping": damping, "measure": "margin", "targets": "each"}
    table = deep.measurer(tmp_path, [deep.params(theta)], batch=batch).table(make(Scorer, spec))
    near(table.values, truth, 1e-9)


def test_datainf_is_not_the_inverse_of_the_mean_but_nears_it_with_damping(deep: World, tmp_path: Path) -> None:
    theta = somewhere(deep)
    g, v = gradients(deep, theta), asked(deep, theta, "loss").mean(dim=0)
    gaps = []
    for k, damping in enumerate((1.0, 100.0)):
        truth = torch.zeros(N, dtype=g.dtype)
        for s in layers_of(deep):
            truth += g[:, s] @ torch.linalg.solve(damped(g[:, s].T @ g[:, s] / N, damping), v[s]) / N
        found = deep.scores(tmp_path / str(k), {"name": "datainf", "damping": damping}, [deep.params(theta)])
        gaps.append(float(np.abs(found - truth.numpy()).max() / truth.abs().max()))
    assert gaps[0] > 0.05 > gaps[1], gaps


def test_datainf_needs_damping_and_reads_text(tmp_path: Path) -> None:
    w, params = text_world(tmp_path)
    with pytest.raises(InputError, match="damping is 0"):
        w.scores(tmp_path / "a", {"name": "datainf", "damping": 0.0}, [params])
    one = w.scores(tmp_path / "b", {"name": "datainf", "layers": "linear"}, [params])
    near(w.scores(tmp_path / "c", {"name": "datainf", "layers": "linear"}, [params], batch=1), one, 1e-9)


class Borrower(nn.Module):
    """Uses a weight once more, outside of its layer, where no rule of a layer sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), self.first.weight)))


class Borrowing(Classifier):
    @cached_property
    def module(self) -> nn.Module:
        return Borrower()


@pytest.fixture(scope="module")
def borrowing(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("borrowing")
    task, pool, target = Borrowing(inputs=5, hidden=(), classes=3), vector_pool(N), vector_pool(9, seed=1)
    return World(
        task, pool, target, prepared(task, pool, folder / "pool"), prepared(task, target, folder / "target"), folder
    )


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
@pytest.mark.parametrize("targets", ["each", "mean"])
def test_a_weight_used_outside_of_its_layer_counts(borrowing: World, tmp_path: Path, kind: str, targets: str) -> None:
    """The audit finds it, says so, and sends it the slow way: rows, slopes of each target, and dots."""
    w, theta = borrowing, somewhere(borrowing)
    measurer = w.measurer(tmp_path, [w.params(theta)])
    spec = {"name": "influence", "solver": "exact", "curvature": kind, "damping": 0.5, "targets": targets}
    table = measurer.table(make(Scorer, spec))
    truth = explicit(w, theta, kind, 0.5, "loss")
    near(table.values, truth if targets == "each" else truth.mean(dim=1, keepdim=True), 1e-6)
    assert "first.weight" in table.meta["notes"]["influence: gradients against plain backward passes"]["fallback"]
    assert any("influence: 1 parameters have no rule" in str(said) for said in measurer.warnings)


def test_other_scorers_count_it_too(borrowing: World, tmp_path: Path) -> None:
    w, theta = borrowing, somewhere(borrowing)
    measurer = w.measurer(tmp_path, [w.params(theta)])
    g, v = gradients(w, theta), asked(w, theta, "loss")
    moved = torch.linalg.solve(damped(squared(w, theta, "ggn"), 0.1), g.T)
    own = (g.T * moved).sum(dim=0)
    near(measurer.table(make(Scorer, "self_influence")).values[:, 0], -own / N, 1e-8)
    inner = {"name": "influence", "solver": "exact", "targets": "each"}
    near(measurer.table(make(Scorer, {"name": "relatif", "influence": inner})).values, (v @ moved / own.sqrt()).T, 1e-8)
    want = torch.zeros(N, len(v), dtype=torch.float64)
    for s in (slice(0, 30), slice(30, 48)):  # weight and bias of either layer
        part = g[:, s]
        level = 0.1 * float(part.square().sum()) / N / part.shape[1]
        inverse = sum(torch.linalg.inv(torch.outer(x, x) + level * torch.eye(len(x)).double()) for x in part) / N
        want += part @ inverse @ v[:, s].T / N
    near(measurer.table(make(Scorer, {"name": "datainf", "targets": "each"})).values, want, 1e-8)


def test_relatif_has_one_mean_eigenvalue_and_no_factored_divisor(deep: World, tmp_path: Path) -> None:
    models = [deep.params(somewhere(deep))]
    found = [
        deep.scores(tmp_path / scale, {"name": "relatif", "influence": {"name": "influence", "scale": scale}}, models)
        for scale in ("eigenvalue", "model")
    ]
    near(found[1], found[0], 1e-12)
    for solver in ("kfac", "ekfac"):
        inner = {"name": "influence", "solver": solver}
        with pytest.raises(InputError, match=f"relatif: solver = '{solver}'"):
            deep.scores(tmp_path / solver, {"name": "relatif", "influence": inner}, models)
