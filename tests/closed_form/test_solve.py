"""Influence and its solvers against ridge and logistic regression in closed form, and curvature against dense truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jacrev

from assay.core.errors import InputError
from assay.numerics.curvature import curvature, exact_gradients
from assay.numerics.operator import Curvature, flat, unflat
from assay.numerics.solve import cg, exact, relative_damping
from assay.train.models import Classifier
from helpers import classifier, language, text_pool, vector_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")

N, P, DECAY = 40, 6, 0.7
D = torch.float64


def ridge(rows: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, y of these rows, H = X^T X + decay I and the optimum of |y - X theta|^2 / 2 + decay |theta|^2 / 2."""
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, P, generator=rng, dtype=D), torch.randn(N, generator=rng, dtype=D)
    index = torch.arange(N) if rows is None else torch.as_tensor(rows)
    h = x[index].T @ x[index] + DECAY * torch.eye(P, dtype=D)
    return x, y, h, torch.linalg.solve(h, x[index].T @ y[index])


def operator(count: int = 1, batches: int = 1, decay: float = DECAY) -> Curvature:
    """The sum (count = 1) or mean of squared errors / 2 as a matrix-free operator."""
    x, y, _, theta = ridge()

    def closures():
        for part in torch.arange(N).tensor_split(batches):

            def closure(params, part=part):
                outputs = x[part] @ params["theta"]
                return (outputs - y[part]).square() / 2, outputs

            yield closure

    return Curvature({"theta": theta}, closures, count, decay=decay)


Solver = Callable[[Tensor], Tensor]


@pytest.fixture(params=["exact", "cg"])
def solve(request) -> Solver:
    held = operator()
    if request.param == "exact":
        return lambda v: exact(held.dense(), v).x
    return lambda v: cg(held.product, v, tolerance=1e-12).x


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    gap = float((got - want).norm() / want.norm())
    assert gap < tolerance, f"relative distance {gap:.2e}"


def test_leave_one_out_of_ridge(solve):
    x, y, h, theta = ridge()
    residual = y - x @ theta
    for i in (0, 7, 39):
        without = ridge(np.delete(np.arange(N), i))[3]
        step = solve(x[i])
        leverage = float(x[i] @ step)
        close(without - theta, -step * residual[i] / (1 - leverage))
        # The gradient of example i is -x_i r_i: losing it moves theta by + H^-1 g to first order.
        first = solve(-x[i] * residual[i])
        ratio = first / (without - theta)
        assert torch.allclose(ratio, torch.full_like(ratio, 1 - leverage), rtol=1e-8), f"IF / LOO is {ratio} for {i}"


def test_groups_of_ridge(solve):
    x, y, _, theta = ridge()
    group = np.array([3, 8, 21, 30])
    rest = np.setdiff1d(np.arange(N), group)
    eye = torch.eye(len(group), dtype=D)

    def response(at: Tensor, apply: Solver, sign: float) -> Tensor:
        columns = torch.stack([apply(row) for row in x[group]], dim=1)
        h = x[group] @ columns
        return sign * columns @ torch.linalg.solve(eye + sign * h, y[group] - x[group] @ at)

    smaller = ridge(rest)[3]
    close(smaller - theta, response(theta, solve, -1.0))
    h_rest = ridge(rest)[2]
    close(theta - smaller, response(smaller, lambda v: exact(h_rest, v).x, +1.0))


def test_sum_rule_of_ridge(solve):
    x, y, _, theta = ridge()
    grads = -(y - x @ theta)[:, None] * x
    close(grads.sum(dim=0), -DECAY * theta)
    responses = torch.stack([-solve(g) for g in grads]).sum(dim=0)
    close(responses, DECAY * solve(theta))


def test_cg_equals_exact():
    v = torch.randn(P, generator=torch.Generator().manual_seed(3), dtype=D)
    matrix = operator().dense()
    for damping in (0.0, 0.1, 10.0):
        a, b = exact(matrix, v, damping=damping), cg(operator().product, v, damping=damping, tolerance=1e-8)
        close(b.x, a.x, 1e-6)
        close(a.x, torch.linalg.solve(matrix + damping * torch.eye(P, dtype=D), v))
        assert a.damping == b.damping == damping and b.iterations <= P + 1


def test_batches_do_not_matter():
    v = torch.randn(P, generator=torch.Generator().manual_seed(3), dtype=D)
    whole = operator(count=N).product(v)
    close(whole, ridge()[0].T @ ridge()[0] @ v / N + DECAY * v)
    for batches in (2, 3, 7):
        held = operator(count=N, batches=batches)
        close(held.product(v), whole, 1e-13)
        close(cg(held.product, v, tolerance=1e-10).x, cg(operator(count=N).product, v, tolerance=1e-10).x, 1e-9)


def test_linear_and_symmetric(solve):
    rng = torch.Generator().manual_seed(4)
    u, v = torch.randn(2, P, generator=rng, dtype=D)
    close(solve(2.5 * u - 3 * v), 2.5 * solve(u) - 3 * solve(v))
    assert abs(float(u @ solve(v) - solve(u) @ v)) < 1e-10


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_large_damping_gives_graddot(solver):
    rng = torch.Generator().manual_seed(4)
    u, v = torch.randn(2, P, generator=rng, dtype=D)
    for damping, tolerance in ((1e6, 1e-3), (1e9, 1e-6)):
        got = exact(operator().dense(), v, damping=damping).x if solver == "exact" else None
        got = cg(operator().product, v, damping=damping, tolerance=1e-12).x if got is None else got
        assert float(damping * u @ got) == pytest.approx(float(u @ v), rel=tolerance)


def test_reparametrisation():
    """theta = A phi: gradients become A^T g and H becomes A^T H A; scores stay, unless damped."""
    rng = torch.Generator().manual_seed(6)
    h = ridge()[2]
    a = torch.randn(P, P, generator=rng, dtype=D) + 3 * torch.eye(P, dtype=D)
    u, v = torch.randn(2, P, generator=rng, dtype=D)
    score = lambda damping: float(u @ exact(h, v, damping=damping).x)  # noqa: E731
    moved = lambda damping: float(a.T @ u @ exact(a.T @ h @ a, a.T @ v, damping=damping).x)  # noqa: E731
    assert moved(0.0) == pytest.approx(score(0.0), rel=1e-9)
    assert abs(moved(50.0) / score(50.0) - 1) > 0.05, "damping is not invariant, by nature"


def test_reported_residuals_are_true():
    matrix, damping = operator().dense(), 0.3
    v = torch.randn(P, 3, generator=torch.Generator().manual_seed(3), dtype=D)
    damped = matrix + damping * torch.eye(P, dtype=D)
    solution = exact(matrix, v, damping=damping)
    assert solution.residual < 1e-13 and solution.x.shape == (P, 3)
    close(solution.x, torch.linalg.solve(damped, v))
    for limit in (1, 2, 3):
        early = cg(operator().product, v[:, 0], damping=damping, tolerance=1e-12, limit=limit)
        truth = float((damped @ early.x - v[:, 0]).norm() / v[:, 0].norm())
        assert early.iterations == limit
        assert early.residual == pytest.approx(truth, rel=1e-9) and truth > 1e-6, (limit, truth, early.residual)
    assert cg(operator().product, torch.zeros(P, dtype=D)).x.abs().max() == 0
    loose = cg(operator().product, v[:, 0], tolerance=1e-2)
    assert loose.residual <= 1e-2 and loose.iterations < P


def test_relative_damping():
    matrix = operator().dense()
    assert relative_damping(0.1, float(matrix.trace()), P) == pytest.approx(
        0.1 * float(torch.linalg.eigvalsh(matrix).mean())
    )
    assert relative_damping(0.1, -5.0, P) == 0.0


@pytest.mark.parametrize("least", [-0.5, 0.0])
def test_indefinite_matrices_are_refused(least):
    q = torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(2), dtype=D))[0]
    matrix = q @ torch.diag(torch.tensor([least - 1e-12, 1, 2, 3, 4, 5], dtype=D)) @ q.T
    with pytest.raises(InputError, match="not positive definite") as caught:
        exact(matrix, torch.ones(P, dtype=D))
    assert "damping" in caught.value.fix
    if least < 0:
        with pytest.raises(InputError, match="negative curvature"):
            cg(lambda d: matrix @ d, torch.ones(P, dtype=D))
    assert exact(matrix, torch.ones(P, dtype=D), damping=1.0).residual < 1e-12
    assert cg(lambda d: matrix @ d, torch.ones(P, dtype=D), damping=1.0, tolerance=1e-9).residual < 1e-8


def test_solves_of_numbers_that_are_not_finite_are_refused():
    broken = torch.full((P, P), float("nan"), dtype=D)
    with pytest.raises(InputError, match="finite"):
        exact(broken, torch.ones(P, dtype=D))
    with pytest.raises(InputError, match="finite"):
        cg(lambda d: broken @ d, torch.ones(P, dtype=D))


def dense_truth(task: Classifier, params: dict[str, Tensor], inputs, kind: str) -> Tensor:
    """(1/N) sum_i of the Hessian, or of J^T (diag p - p p^T) J, by torch.func on one flat vector."""
    outputs = lambda v: task.logits(unflat(v, params), inputs)  # noqa: E731
    count = len(inputs["y"])
    if kind == "hessian":
        loss = lambda v: F.cross_entropy(outputs(v), inputs["y"], reduction="sum") / count  # noqa: E731
        return torch.as_tensor(jacrev(jacrev(loss))(flat(params)))
    j_ncp, p_nc = torch.as_tensor(jacrev(outputs)(flat(params))), outputs(flat(params)).softmax(dim=1)
    b_ncc = torch.diag_embed(p_nc) - p_nc[:, :, None] * p_nc[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", j_ncp, b_ncc, j_ncp) / count


@pytest.mark.parametrize("hidden", [(), (4,)])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("batches", [1, 3])
def test_curvature_equals_dense(tmp_path, hidden, kind, batches):
    task, encoded = classifier(vector_pool(13), tmp_path, hidden=hidden)
    params, parts = wide(task), np.array_split(np.arange(13), batches)
    held = curvature(task, params, lambda: (encoded.inputs(rows) for rows in parts), 13, kind=kind)
    got, want = held.dense(), dense_truth(task, params, encoded.inputs(np.arange(13)), kind)
    assert float((got - want).abs().max()) < 1e-12, float((got - want).abs().max())
    v = torch.randn(held.size, generator=torch.Generator().manual_seed(0), dtype=D)
    close(held.product(v), want @ v, 1e-11)
    held.decay = 0.25
    close(held.product(v), want @ v + 0.25 * v, 1e-11)
    least = float(torch.linalg.eigvalsh(got)[0])
    assert kind == "hessian" or least > -1e-12, f"a Gauss-Newton matrix with eigenvalue {least:.1e}"
    if kind == "ggn" and not hidden:
        close(got, dense_truth(task, params, encoded.inputs(np.arange(13)), "hessian"), 1e-11)
    if kind == "hessian" and hidden:
        assert least < -1e-6, "this model's Hessian should be indefinite, or the test shows nothing"


def test_hessian_of_the_decoder_equals_dense(tmp_path):
    pool = text_pool(3)
    task, encoded = language(pool, tmp_path, width=2, heads=1, layers=1, context=6)
    params, inputs = wide(task), encoded.inputs(np.arange(3))
    held = curvature(task, params, lambda: [inputs], 3, kind="hessian")
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(held.size, generator=rng, dtype=D)
    value = lambda t: torch.autograd.grad(  # noqa: E731
        task.loss((p := unflat((flat(params) + t * v).requires_grad_(), params)), inputs).mean(), list(p.values())
    )
    slope = lambda t: torch.cat([g.reshape(-1) for g in value(t)])  # noqa: E731
    close(held.product(v), (slope(1e-6) - slope(-1e-6)) / 2e-6, 1e-6)
    with pytest.raises(InputError, match="Gauss-Newton"):
        curvature(task, params, lambda: [inputs], 3, kind="ggn")


def newton(task: Classifier, params: dict[str, Tensor], inputs, weights: Tensor, decay: float) -> dict[str, Tensor]:
    """The optimum of (1/N) sum_i w_i loss_i + decay |theta|^2 / 2."""
    count = len(weights)
    objective = lambda v: (  # noqa: E731
        weights @ F.cross_entropy(
            functional_call(task.module, unflat(v, params), (inputs["x"].double(),)), inputs["y"], reduction="none"
        ) / count + decay * v @ v / 2
    )  # fmt: skip
    v = flat(params)
    for _ in range(30):
        leaf = v.clone().requires_grad_()
        grad = torch.autograd.grad(objective(leaf), leaf)[0]
        if float(grad.norm()) < 1e-15:
            break
        v = v - torch.linalg.solve(torch.as_tensor(jacrev(jacrev(objective))(v)), grad)
    return unflat(v, params)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_influence_is_the_derivative_of_the_optimum(tmp_path, solver):
    """Finite differences of one example's weight, retrained to convergence: d theta / d w = -(1/N) H^-1 g."""
    task, encoded = classifier(vector_pool(30), tmp_path)
    inputs, decay, ones = encoded.inputs(np.arange(30)), 0.05, torch.ones(30, dtype=D)
    best = newton(task, wide(task), inputs, ones, decay)
    held = curvature(task, best, lambda: [inputs], 30, kind="ggn")
    held.decay = decay
    grads = exact_gradients(task, best, inputs)
    close(grads.mean(dim=0), -decay * flat(best), 1e-10)
    target = grads[:5].mean(dim=0)
    for i in (0, 11):
        solved = exact(held.dense(), grads[i]) if solver == "exact" else cg(held.product, grads[i], tolerance=1e-11)
        eps = 1e-4
        ends = []
        for sign in (1, -1):
            weights = ones.clone()
            weights[i] += sign * eps
            ends.append(flat(newton(task, best, inputs, weights, decay)))
        slope = (ends[0] - ends[1]) / (2 * eps)
        close(-solved.x / 30, slope, 1e-6)
        # utility = -d f / d w = (1/N) grad f^T H^-1 g: positive for an example that lowers the target loss.
        assert float(target @ solved.x / 30) == pytest.approx(-float(target @ slope), rel=1e-6)
    utilities = grads @ exact(held.dense(), target).x / 30
    rule = -decay * float(target @ exact(held.dense(), flat(best)).x)
    assert float(utilities.sum()) == pytest.approx(rule, rel=1e-8), "the sum rule"
