"""Scorers and the cut against what they are defined to be: dense algebra, retraining, other implementations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.keys import encode_ids
from assay.core.method import Batch, Cost, Featurizer, Scorer, Selector, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Budget, Selection
from assay.core.table import Table
from assay.core.task import Encoded, Inputs
from assay.measure import Measurer
from assay.numerics.project import rademacher
from assay.train.models import Classifier, init_params
from helpers import looped, prepared, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")

N, INPUTS, DECAY = 30, 5, 0.05


def hessian(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Reverse over reverse: torch's own `hessian` goes through forward mode, which warns of a deprecation."""
    return torch.func.jacrev(torch.func.grad(f))


@dataclass
class World:
    task: Classifier
    pool: Pool
    target: Pool
    encoded: Encoded
    asked: Encoded
    folder: Path

    @property
    def inputs(self) -> Inputs:
        return self.encoded.inputs(np.arange(len(self.pool)))

    @property
    def questions(self) -> Inputs:
        return self.asked.inputs(np.arange(len(self.target)))

    def measurer(self, out: Path, models: list[dict[str, Tensor]], **options: Any) -> Measurer:
        run = Run.open(out, {"name": "closed form"})
        run.close()
        encodings = {self.pool.fingerprint: self.folder / "pool", self.target.fingerprint: self.folder / "target"}
        return Measurer(
            run, self.pool, self.target, task=self.task, models=models, encodings=encodings, key="k", **options
        )

    def scores(self, out: Path, spec: Any, models: list[dict[str, Tensor]], **options: Any) -> np.ndarray:
        return self.measurer(out, models, **options).table(make(Scorer, spec)).values[:, 0]

    def params(self, theta: Tensor) -> dict[str, Tensor]:
        shapes = {n: p.shape for n, p in self.task.module.named_parameters()}
        parts = theta.split([s.numel() for s in shapes.values()])
        return {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}

    def losses(self, theta: Tensor) -> Tensor:
        return self.task.loss(self.params(theta), self.inputs)

    def asked_loss(self, theta: Tensor) -> Tensor:
        return self.task.loss(self.params(theta), self.questions).mean()

    def fit(self, weights: Tensor | None = None, decay: float = DECAY, start: Tensor | None = None) -> Tensor:
        """argmin (1/N) sum_i w_i loss_i + decay/2 |theta|^2, by Newton's method to the last digit."""
        w = torch.ones(len(self.pool), dtype=torch.float64) if weights is None else weights

        def objective(theta: Tensor) -> Tensor:
            return w @ self.losses(theta) / len(self.pool) + decay / 2 * theta @ theta

        size = sum(p.numel() for p in self.task.module.parameters())
        theta = torch.zeros(size, dtype=torch.float64) if start is None else start
        for _ in range(30):
            step = torch.linalg.solve(hessian(objective)(theta), torch.func.grad(objective)(theta))
            theta = theta - step
            if step.norm() < 1e-12:
                break
        assert torch.func.grad(objective)(theta).norm() < 1e-12
        return theta


def world(folder: Path, classes: int, rows: int = N) -> World:
    task = Classifier(inputs=INPUTS, hidden=(), classes=classes)
    pool, target = (
        vector_pool(rows, inputs=INPUTS, classes=classes),
        vector_pool(9, inputs=INPUTS, classes=classes, seed=1),
    )
    return World(
        task, pool, target, prepared(task, pool, folder / "pool"), prepared(task, target, folder / "target"), folder
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def best(three: World) -> Tensor:
    return three.fit()


def near(values: np.ndarray, truth: np.ndarray | Tensor, tolerance: float) -> None:
    truth = np.asarray(truth)
    np.testing.assert_allclose(values, truth, rtol=0, atol=tolerance * np.abs(truth).max())


def gradients(w: World, theta: Tensor) -> Tensor:
    return torch.func.jacrev(w.losses)(theta)


# Influence.


def dense(w: World, theta: Tensor, *, damping: float, estimated: bool = False) -> Tensor:
    h = hessian(lambda t: w.losses(t).mean())(theta) + DECAY * torch.eye(len(theta), dtype=torch.float64)
    trace = h.trace()
    if estimated:
        z = rademacher(16, len(theta), seed=0, label="trace").double() * 4
        trace = torch.einsum("kp,pq,kq->", z, h, z) / 16
        assert abs(float(trace / h.trace()) - 1) < 0.3
    damped = h + damping * trace / len(theta) * torch.eye(len(theta), dtype=torch.float64)
    return gradients(w, theta) @ torch.linalg.solve(damped, torch.func.grad(w.asked_loss)(theta)) / N


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_influence_is_the_dense_formula(
    three: World, best: Tensor, tmp_path: Path, solver: str, curvature: str, damping: float
) -> None:
    """For logistic regression the Gauss-Newton matrix is the Hessian."""
    spec = {"name": "influence", "solver": solver, "curvature": curvature, "damping": damping, "weight_decay": DECAY}
    found = three.scores(tmp_path, {**spec, "tolerance": 1e-10}, [three.params(best)])
    near(found, dense(three, best, damping=damping, estimated=(solver, curvature) == ("cg", "hessian")), 1e-7)


EXACT = {"name": "influence", "solver": "exact", "damping": 0.0, "weight_decay": DECAY}


def test_influence_is_minus_the_slope_of_the_target_loss_in_the_weight(
    three: World, best: Tensor, tmp_path: Path
) -> None:
    """Retrained at weights 1 + e and 1 - e: positive utility = more weight lowers the target loss; 1/N included."""
    found, e = three.scores(tmp_path, EXACT, [three.params(best)]), 1e-4
    for i in range(0, N, 6):
        shift = e * torch.nn.functional.one_hot(torch.tensor(i), N).double()
        up, down = (float(three.asked_loss(three.fit(1 + s * shift, start=best))) for s in (1, -1))
        assert found[i] == pytest.approx(-(up - down) / (2 * e), rel=1e-5, abs=1e-9)


def test_influence_predicts_leaving_one_out(three: World, best: Tensor, tmp_path: Path) -> None:
    """Removing i raises the target loss by s_i to first order, which leaves out a factor of about 1 / (1 - h_ii)."""
    found, before, gaps = three.scores(tmp_path, EXACT, [three.params(best)]), float(three.asked_loss(best)), []
    for i in range(0, N, 3):
        weights = torch.ones(N, dtype=torch.float64)
        weights[i] = 0
        gaps.append(float(three.asked_loss(three.fit(weights, start=best))) - before)
    found = found[::3]
    assert np.corrcoef(found, gaps)[0, 1] > 0.95
    assert 1.0 < float(found @ np.array(gaps) / (found @ found)) < 1.5


def test_influence_sum_rule(three: World, best: Tensor, tmp_path: Path) -> None:
    """At the optimum sum_i grad loss_i / N = -decay theta, so sum_i s_i = -decay grad f^T H^-1 theta."""
    h = hessian(lambda t: three.losses(t).mean())(best) + DECAY * torch.eye(len(best), dtype=torch.float64)
    truth = -DECAY * torch.func.grad(three.asked_loss)(best) @ torch.linalg.solve(h, best)
    assert three.scores(tmp_path, EXACT, [three.params(best)]).sum() == pytest.approx(float(truth), rel=1e-9)


def test_influence_does_not_see_batches(three: World, best: Tensor, tmp_path: Path) -> None:
    models = [three.params(best)]
    for solver in ("exact", "cg"):
        whole = three.scores(tmp_path / solver, {**EXACT, "solver": solver}, models)
        for batch, shard in ((1, 1024), (7, 10)):
            out = tmp_path / f"{solver}{batch}"
            near(three.scores(out, {**EXACT, "solver": solver}, models, batch=batch, shard=shard), whole, 1e-10)


def test_influence_averages_models(three: World, best: Tensor, tmp_path: Path) -> None:
    models = [three.params(best), three.params(best * 0.5)]
    single = [three.scores(tmp_path / str(k), EXACT, [m]) for k, m in enumerate(models)]
    near(three.scores(tmp_path / "both", EXACT, models), (single[0] + single[1]) / 2, 1e-12)


def test_heavily_damped_influence_is_graddot(three: World, best: Tensor, tmp_path: Path) -> None:
    models = [three.params(best)]
    found = three.scores(tmp_path / "a", {**EXACT, "damping": 1e7}, models)
    exact = {"name": "gradients", "projection": "exact", "store": "float32"}
    dots = three.scores(tmp_path / "b", {"name": "graddot", "features": exact}, models)
    h = hessian(lambda t: three.losses(t).mean())(best)
    scale = 1e7 * (float(h.trace()) / len(best) + DECAY) * N
    near(found * scale, dots, 1e-5)


def test_influence_says_when_it_cannot(three: World, best: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not positive definite"):
        three.scores(tmp_path / "a", {"name": "influence", "solver": "exact", "damping": 0.0}, [three.params(best)])
    measurer = three.measurer(tmp_path / "b", [three.params(best)])
    measurer.table(make(Scorer, {**EXACT, "solver": "cg", "limit": 2, "precondition": "none"}))
    assert any("CG stopped at residual" in w for w in measurer.warnings)


def test_self_influence_is_the_dense_diagonal(three: World, best: Tensor, tmp_path: Path) -> None:
    g, h = gradients(three, best), hessian(lambda t: three.losses(t).mean())(best)
    damped = h + 0.2 * h.trace() / len(best) * torch.eye(len(best), dtype=torch.float64)
    truth = -torch.einsum("np,pq,nq->n", g, torch.linalg.inv(damped), g) / N
    for kind in ("ggn", "hessian"):
        spec = {"name": "self_influence", "damping": 0.2, "curvature": kind}
        found = three.scores(tmp_path / kind, spec, [three.params(best)])
        near(found, truth, 1e-9)
        assert (found < 0).all()


# Gradient dots.


def exact_features(measure: str = "loss") -> dict[str, Any]:
    return {"name": "gradients", "projection": "exact", "measure": measure, "store": "float32"}


def looped_flat(w: World, theta: Tensor, encoded: Encoded) -> np.ndarray:
    grads = looped(w.task, w.params(theta), encoded, np.arange(len(encoded)))
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1).numpy()


def test_graddot_and_gradcos_are_autograd(three: World, tmp_path: Path) -> None:
    thetas = [torch.randn(18, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(2)]
    models = [three.params(t) for t in thetas]
    rows, questions = ([looped_flat(three, t, e) for t in thetas] for e in (three.encoded, three.asked))
    dots = [q.mean(axis=0) @ g.T for g, q in zip(rows, questions, strict=True)]
    near(
        three.scores(tmp_path / "d", {"name": "graddot", "features": exact_features()}, models),
        np.mean(dots, axis=0),
        1e-6,
    )

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    cosines = [(unit(q) @ unit(g).T).mean(axis=0) for g, q in zip(rows, questions, strict=True)]
    found = three.scores(tmp_path / "c", {"name": "gradcos", "features": exact_features()}, models)
    near(found, np.mean(cosines, axis=0), 1e-6)
    assert np.abs(found).max() <= 1


def test_one_small_step_on_an_example_lowers_the_target_loss_by_its_graddot(three: World, tmp_path: Path) -> None:
    theta = torch.randn(18, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dots = three.scores(tmp_path, {"name": "graddot", "features": exact_features()}, [three.params(theta)])
    g, before = gradients(three, theta), float(three.asked_loss(theta))
    errors = []
    for lr in (2e-3, 1e-3):
        falls = np.array([before - float(three.asked_loss(theta - lr * row)) for row in g])
        errors.append(np.abs(falls - lr * dots).max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


# TRAK.


def margins(w: World, theta: Tensor, inputs: Inputs) -> Tensor:
    return w.task.margin(w.params(theta), inputs)


def trak_margin(damping: float) -> dict[str, Any]:
    return {"name": "trak", "features": exact_features("margin"), "output": "margin", "damping": damping}


def test_trak_is_the_newton_step_of_two_class_logistic_regression(two: World, tmp_path: Path) -> None:
    """With two classes the margin is linear in the weights, sum_i d2 loss_i = Phi^T R Phi and grad loss_i = -Q_i phi_i:
    then the score is, exactly, the change of the target's mean margin in one Newton step that adds example i.
    """
    theta = two.fit(decay=0.02)
    h = hessian(lambda t: two.losses(t).sum())(theta)
    slope = torch.func.grad(lambda t: margins(two, t, two.questions).mean())(theta)
    damped = h + 0.1 * h.trace() / len(theta) * torch.eye(len(theta), dtype=torch.float64)
    truth = -gradients(two, theta) @ torch.linalg.solve(damped, slope)
    near(two.scores(tmp_path, trak_margin(0.1), [two.params(theta)]), truth, 1e-5)


def test_trak_leaves_out_the_margins_own_curvature_for_more_classes(three: World, best: Tensor, tmp_path: Path) -> None:
    """Then sum_i d2 loss_i = Phi^T R Phi - sum_i Q_i d2 margin_i; TRAK is the step in the first part alone."""
    phi = torch.func.jacrev(lambda t: margins(three, t, three.inputs))(best)
    p = torch.exp(-three.losses(best))
    gram = phi.T @ ((p * (1 - p))[:, None] * phi)
    bent = hessian(lambda t: ((1 - p) * margins(three, t, three.inputs)).sum())(best)
    h = hessian(lambda t: three.losses(t).sum())(best)
    near((gram - bent).numpy(), h.numpy(), 1e-10)
    slope = torch.func.grad(lambda t: margins(three, t, three.questions).mean())(best)
    damped = gram + 0.1 * gram.trace() / len(best) * torch.eye(len(best), dtype=torch.float64)
    truth = (1 - p) * (phi @ torch.linalg.solve(damped, slope))
    near(three.scores(tmp_path, trak_margin(0.1), [three.params(best)]), truth, 1e-5)
    assert float((h - gram).norm() / h.norm()) > 0.1


@pytest.mark.parametrize("spec", [{"name": "trak", "projections": "shared"}, trak_margin(0.1)], ids=["loss", "margin"])
def test_trak_of_identical_models_is_that_of_one(three: World, best: Tensor, tmp_path: Path, spec: Any) -> None:
    one = three.scores(tmp_path / "1", spec, [three.params(best)])
    near(three.scores(tmp_path / "3", spec, [three.params(best)] * 3), one, 1e-12)


def test_trak_reads_each_models_own_probabilities(three: World, best: Tensor, tmp_path: Path) -> None:
    """The weights R and Q of the second model are not those of the first: the order of models does not matter."""
    models = [three.params(best), three.params(-best)]
    found = three.scores(tmp_path / "a", trak_margin(0.1), models)
    near(three.scores(tmp_path / "b", trak_margin(0.1), models[::-1]), found, 1e-10)


class Given(Featurizer):
    """Features that stand in the pool. Formula: x scale. Reference: none."""

    scale: float = 1.0

    cost: ClassVar[Cost] = "text"

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("0", "1", "2")

    def featurize(self, state: Any, batch: Batch) -> Any:
        return self.scale * np.array(batch.column("phi"))


class LogP(Scorer):
    """Probabilities that stand in the pool. Formula: log p. Reference: none."""

    def score(self, state: Any, batch: Batch) -> Any:
        return np.log(np.array(batch.column("p")))


def given(out: Path, shrink: float = 1.0, **fields: Any) -> np.ndarray:
    """TRAK over features that are known; every other row is made smaller by `shrink`, and four are fit perfectly."""
    from assay.scorers.trak import Trak

    rng, parts = np.random.default_rng(0), []
    for n, seed in ((20, 0), (5, 1)):
        plain, phi, p = vector_pool(n, seed=seed), rng.normal(size=(n, 3)), rng.uniform(0.1, 0.9, n)
        p[:4] = 1.0
        phi *= np.where(np.arange(n) % 2, shrink, 1.0)[:, None]
        columns = {name: plain.column(name) for name in ("pixels", "label")}
        parts.append(Pool.from_columns({**columns, "phi": phi.tolist(), "p": p.tolist()}))
    task = Classifier(inputs=INPUTS, hidden=(), classes=3)
    pool, target = parts
    for part, name in ((pool, "pool"), (target, "target")):
        prepared(task, part, out / name)
    w = World(task, pool, target, task.encoded(out / "pool"), task.encoded(out / "target"), out)
    return w.measurer(out / "run", [init_params(task.module, 0)], batch=7).table(Trak(**fields)).values[:, 0]


def test_trak_does_not_depend_on_the_scale_of_the_features(tmp_path: Path) -> None:
    for output in ("loss", "margin"):
        plain: dict[str, Any] = {"output": output, "damping": 0.0, "unit_length": False, "losses": LogP()}
        one = given(tmp_path / f"{output}1", features=Given(), **plain)
        near(given(tmp_path / f"{output}2", features=Given(scale=1000.0), **plain), one, 1e-5)
        damped = plain | {"damping": 0.3}
        one = given(tmp_path / f"{output}3", features=Given(), **damped)
        near(given(tmp_path / f"{output}4", features=Given(scale=8.0), **damped) * 1.0, one, 1e-5)


def test_trak_unit_length_takes_out_the_size_of_any_gradient(tmp_path: Path) -> None:
    """Also of one whose square is below the range of float32."""
    one = given(tmp_path / "1", features=Given())
    near(given(tmp_path / "2", shrink=1e-25, features=Given()), one, 1e-5)


def test_trak_gives_nothing_to_what_is_fit_perfectly(tmp_path: Path) -> None:
    found = given(tmp_path, output="margin", features=Given(), losses=LogP())
    assert (found[:4] == 0).all() and (found[4:] != 0).all()


def test_trak_says_when_it_cannot(tmp_path: Path, three: World, best: Tensor) -> None:
    with pytest.raises(InputError, match="singular"):
        given(tmp_path / "1", features=Given(scale=1e-30), damping=0.0, unit_length=False)
    with pytest.raises(InputError, match="needs gradients of the margin"):
        three.scores(tmp_path / "2", {"name": "trak", "output": "margin"}, [three.params(best)])


# Loss difference.


def test_loss_diff_is_to_first_order_the_dot_in_the_metric_of_adamws_first_step(three: World, tmp_path: Path) -> None:
    """AdamW's first step is lr g / (|g| + eps), nearly lr sign(g): s_i = lr <g / (|g| + eps), grad_i> + O(lr^2)."""
    theta = torch.randn(18, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    g = torch.func.grad(three.asked_loss)(theta)
    g = g * min(1.0, 1 / float(g.norm()))  # the recipe clips gradients at norm 1
    slope, errors = (gradients(three, theta) @ (g / (g.abs() + 1e-8))).numpy(), []
    for lr in (4e-3, 2e-3):
        spec = {"name": "loss_diff", "steps": 1, "lr": lr, "terms_per_step": len(three.target)}
        errors.append(np.abs(three.scores(tmp_path / str(lr), spec, [three.params(theta)]) - lr * slope).max())
    assert errors[1] < 0.02 * 2e-3 * np.abs(slope).max()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


# Text.

TEXTS = [
    "The cat sat on the mat.", "the dog; the dog, the DOG", "", "A cat and a dog met a third cat",
    "nothing in common here", "mat mat mat mat", "on", "x_1 = y + 42 # the end",
]  # fmt: skip
QUERIES = ["the cat on a mat", "dog dog 42", "zebra", "x_1"]


def text_scores(out: Path, spec: Any, pool: Pool, target: Pool | None = None, shard: int = 3) -> np.ndarray:
    run = Run.open(out, {})
    run.close()
    asked = target or Pool.from_columns({"text": QUERIES})
    return Measurer(run, pool, asked, shard=shard).table(make(Scorer, spec)).values[:, 0]


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_bm25_is_bm25s(tmp_path: Path, reduce: str) -> None:
    """Its 'lucene' leaves out the factor (k1 + 1), which scales every score alike."""
    bm25s = pytest.importorskip("bm25s")
    k1, b = 1.2, 0.6
    # Lower-cased runs of word characters, found another way.
    words = [["".join(c if c.isalnum() or c == "_" else " " for c in t.lower()).split() for t in part]
             for part in (TEXTS, QUERIES)]  # fmt: skip
    index = bm25s.BM25(method="lucene", k1=k1, b=b)
    index.index(words[0], show_progress=False)
    known = {w for text in words[0] for w in text}
    truth = [index.get_scores([w for w in q if w in known]) if set(q) & known else np.zeros(8) for q in words[1]]
    truth = getattr(np, reduce)(truth, axis=0) * (k1 + 1)
    spec = {"name": "bm25", "k1": k1, "b": b, "reduce": reduce}
    near(text_scores(tmp_path, spec, Pool.from_columns({"text": TEXTS})), truth, 1e-6)


def test_bm25_of_one_term_by_hand(tmp_path: Path) -> None:
    pool = Pool.from_columns({"text": ["cat cat dog", "dog"]})
    found = text_scores(tmp_path, "bm25", pool, Pool.from_columns({"text": ["cat"]}))
    assert found.tolist() == [
        pytest.approx(math.log(1 + 1.5 / 1.5) * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 3 / 2)), rel=1e-12), 0.0,
    ]  # fmt: skip


def test_exact_dup_keeps_the_lowest_id_in_any_order(tmp_path: Path) -> None:
    rows = {
        "id": ["c", "a", "b", "d", "e", "f", "g"],
        "text": ["Same  text", "same text ", "SAME\ttext", "other", "", " \n", "same text."],
    }
    truth = {"a": 0, "b": -1, "c": -2, "d": 0, "e": 0, "f": 0, "g": 0}
    pool = Pool.from_columns(rows)
    for k, order in enumerate(itertools.islice(itertools.permutations(range(7)), 0, 5040, 997)):
        part = pool.at(list(order))
        found = text_scores(tmp_path / str(k), "exact_dup", part)
        assert {i.decode(): v for i, v in zip(part.ids.tolist(), found, strict=True)} == truth


def test_random_is_uniform_and_keyed_by_id(tmp_path: Path) -> None:
    pool = Pool.from_columns({"text": [f"text {i}" for i in range(4000)]})
    found = text_scores(tmp_path / "0", "random", pool, shard=999)
    assert np.abs(np.sort(found) - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / math.sqrt(4000), "Kolmogorov, 1 %"
    part = pool.at(np.arange(3999, 0, -2))
    near(text_scores(tmp_path / "1", "random", part, shard=999), found[3999:0:-2], 0)
    other = text_scores(tmp_path / "2", {"name": "random", "seed": 1}, pool, shard=999)
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.05


# The cut.


def cut(
    values: Any, budget: Budget, *, sizes: Any = None, barred: dict[str, np.ndarray] | None = None, ids: Any = None,
    **fields: Any,
) -> Selection:  # fmt: skip
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    names = encode_ids(ids or [f"{i:04}" for i in range(len(values))])
    table = Table(names, tuple("stu"[: values.shape[1]]), values)
    sizes = np.ones(len(values), dtype=np.int64) if sizes is None else np.asarray(sizes)
    return make(Selector, {"name": "cut", **fields}).select(table, sizes, budget, barred=barred or {})


def chosen(selection: Selection) -> list[int]:
    return [int(i) for i in selection.ids.tolist()]


@pytest.mark.parametrize("k", [1, 7, 20, 30])
def test_exactly_k_under_ties_and_the_draw_is_fair(k: int) -> None:
    found = cut([1.0] * 10 + [0.0] * 20, Budget(k, "examples"))
    assert len(found) == k == len(set(chosen(found)))
    assert sum(i < 10 for i in chosen(found)) == min(k, 10), "the best first"
    if k == 20:
        # Not the first ten of the tied rows: file order says nothing.
        assert sorted(chosen(found))[10:] != list(range(10, 20))


def test_token_budget_is_filled_and_never_exceeded() -> None:
    rng = np.random.default_rng(0)
    for trial in range(200):
        n = int(rng.integers(1, 40))
        values, sizes = rng.integers(0, 5, n).astype(float), rng.integers(1, 20, n)
        budget = int(rng.integers(1, sizes.sum() + 5))
        taken = np.array(chosen(cut(values, Budget(budget, "tokens"), sizes=sizes)), dtype=int)
        left = budget - sizes[taken].sum()
        assert left >= 0
        others = np.setdiff1d(np.arange(n), taken)
        assert (sizes[others] > left).all(), f"trial {trial}: something that still fits is left out"
        # An example is passed over only for lack of room behind better ones.
        for other in others:
            better = taken[values[taken] >= values[other]]
            assert sizes[better].sum() + sizes[other] > budget


def inclusion(weights: np.ndarray, k: int) -> np.ndarray:
    """Plackett-Luce: probability that each item is among the first k drawn without replacement."""
    total = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, weights.sum()
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        total[list(order)] += probability
    return total


def gumbel_counts(draws: int, temperature: float) -> np.ndarray:
    counts = np.zeros(3)
    for seed in range(draws):
        counts[chosen(cut([2.0, 0.0, -2.0], Budget(2, "examples"), temperature=temperature, seed=seed))] += 1
    return counts


def test_gumbel_top_k_has_the_probabilities_of_plackett_luce() -> None:
    """Scores are standardised first: (2, 0, -2) at temperature 1 / sd is the draw with logits (2, 0, -2)."""
    sd, draws = math.sqrt(8 / 3), 1000
    truth = inclusion(np.exp([2.0, 0.0, -2.0]), 2)
    np.testing.assert_allclose(truth, [0.9960, 0.8827, 0.1213], atol=5e-5)
    for temperature, expected in ((1 / sd, truth), (1.0, inclusion(np.exp(np.array([2.0, 0.0, -2.0]) / sd), 2))):
        shares = gumbel_counts(draws, temperature) / draws
        assert (np.abs(shares - expected) < 3 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_gumbel_does_not_depend_on_the_unit_of_the_scores() -> None:
    values = np.random.default_rng(0).normal(size=50)
    one = cut(values, Budget(10, "examples"), temperature=1.0)
    assert chosen(cut(1000 * values + 5, Budget(10, "examples"), temperature=1.0)) == chosen(one)


def test_cold_gumbel_is_top_k_and_hot_is_a_fair_draw() -> None:
    values = np.random.default_rng(0).permutation(50).astype(float)
    top = chosen(cut(values, Budget(10, "examples")))
    assert chosen(cut(values, Budget(10, "examples"), temperature=1e-6)) == top == np.argsort(-values)[:10].tolist()
    counts = np.zeros(50)
    for seed in range(300):
        counts[chosen(cut(values, Budget(10, "examples"), temperature=1e6, seed=seed))] += 1
    assert abs(np.corrcoef(counts, values)[0, 1]) < 0.45 and (counts > 0).all()
    constant: Callable[[int], list[int]] = lambda seed: chosen(  # noqa: E731
        cut(np.ones(50), Budget(10, "examples"), temperature=1.0, seed=seed)
    )
    assert constant(0) == constant(0) != constant(1)


def test_bounds_and_barred_ids_give_their_reason() -> None:
    values = np.stack([np.arange(10.0), np.arange(10.0)[::-1]], axis=1)
    barred = {"contaminated": encode_ids(["0009", "0000"])}
    found = cut(values, Budget(3, "examples"), bounds={"t": (2, None), "s": (None, 6)}, barred=barred)
    assert chosen(found) == [6, 5, 4]
    reasons = {why: [int(i) for i in ids.tolist()] for why, ids in found.dropped.items()}
    assert reasons == {
        "contaminated": [0, 9], "t outside [2.0, None]": [8], "s outside [None, 6.0]": [7], "below the cut": [1, 2, 3],
    }  # fmt: skip
    with pytest.raises(InputError, match="no column 'u'"):
        cut(values, Budget(3, "examples"), bounds={"u": (0, 1)})
    with pytest.raises(InputError, match="no column"):
        cut(values, Budget(3, "examples"), column="nothing")
    assert chosen(cut(values, Budget(3, "examples"), column="t")) == [0, 1, 2]


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="'0001'"):
        cut([1.0, math.nan, 2.0], Budget(1, "examples"))


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_features_in_adams_metric_have_its_products(three: World, best: Tensor, tmp_path: Path, kind: str) -> None:
    """<phi_i, phi_q> = <g_i, P g_q> with P = 1/sqrt(v_hat), for 'adafactor' with the rank-one v_hat."""
    params = three.params(best)
    rng = torch.Generator().manual_seed(0)
    square = {n: torch.rand(p.shape, generator=rng, dtype=torch.float64) + 0.1 for n, p in params.items()}
    state = {"square": square, "steps": 3, "betas": (0.9, 0.95), "eps": 1e-8}
    spec = {"name": "graddot", "features": {**exact_features(), "metric": kind}}
    found = three.scores(tmp_path / "m", spec, [params], optimisers=[state])
    metric = []
    for v in square.values():
        v = v / (1 - 0.95**3)
        if kind == "adafactor" and v.dim() == 2:
            v = torch.outer(v.mean(1), v.mean(0)) / v.mean()
        metric.append(v.rsqrt().flatten())
    asked = torch.func.grad(three.asked_loss)(best)
    near(found, gradients(three, best) @ (torch.cat(metric) * asked), 1e-5)
