"""The solvers of influence functions against ridge and logistic regression in closed form."""

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
from assay.numerics.solve import Solution, arnoldi, cg, exact, lanczos, lissa, power, relative_damping, subspace
from assay.train.models import Classifier
from helpers import classifier, vector_pool, wide

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
SOLVERS = ["exact", "cg", "lissa", "arnoldi"]


def solved(name: str, held: Curvature, v: Tensor, damping: float = 0.0, tolerance: float = 1e-12) -> Solution:
    if name == "exact":
        return exact(held.dense(), v, damping=damping)
    if name == "arnoldi":
        return arnoldi(held.product, v, damping=damping)
    return {"cg": cg, "lissa": lissa}[name](held.product, v, damping=damping, tolerance=tolerance)


@pytest.fixture(params=SOLVERS)
def solve(request) -> Solver:
    held = operator()
    return lambda v: solved(request.param, held, v).x


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
    responses = -solve(grads.T.contiguous()).sum(dim=1)
    close(responses, DECAY * solve(theta))


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_all_solvers_are_the_explicit_inverse(name, damping, batches):
    """To the damping that they report, for one vector or several, and for one or four batches of the loader."""
    v = torch.randn(P, 3, generator=torch.Generator().manual_seed(3), dtype=D)
    damped = operator().dense() + damping * torch.eye(P, dtype=D)
    found = solved(name, operator(batches=batches), v, damping, 1e-9)
    close(found.x, torch.linalg.inv(damped) @ v, 1e-7)
    assert found.damping == damping and found.residual < 1e-8
    single = solved(name, operator(batches=batches), v[:, 1], damping, 1e-9)
    assert single.x.shape == (P,)
    close(single.x, found.x[:, 1], 1e-7)
    assert name != "cg" or found.iterations <= P + 1


def test_lissa_is_damped_by_what_it_says():
    """The fixed point of x <- v + (1 - d) x - H x / s, x / s in the end, is (H + d s I)^-1 v, not (H + d I)^-1 v."""
    v = torch.randn(P, generator=torch.Generator().manual_seed(3), dtype=D)
    matrix, eye = operator().dense(), torch.eye(P, dtype=D)
    d, s = 0.25, 3.0 * float(torch.linalg.eigvalsh(matrix)[-1])
    x = torch.zeros_like(v)
    for _ in range(2000):
        x = v + (1 - d) * x - matrix @ x / s
    close(x / s, torch.linalg.solve(matrix + d * s * eye, v))
    close(lissa(operator().product, v, damping=d * s, tolerance=1e-13).x, x / s)
    assert float((torch.linalg.solve(matrix + d * eye, v) - x / s).norm() / (x / s).norm()) > 0.5


def test_lissa_of_minibatches_settles_on_the_same_point():
    x, y, _, theta = ridge()
    v = torch.randn(P, 2, generator=torch.Generator().manual_seed(3), dtype=D)
    want = exact(operator(count=N).dense(), v, damping=0.5).x

    def sampled(step: int, u: Tensor) -> Tensor:
        rows = torch.randint(N, (10,), generator=torch.Generator().manual_seed(step))
        return x[rows].T @ (x[rows] @ u) / 10 + DECAY * u

    errors = []
    for limit in (200, 3200):
        found = lissa(operator(count=N).product, v, damping=0.5, limit=limit, sampled=sampled)
        assert found.iterations == limit
        errors.append(float((found.x - want).norm() / want.norm()))
    assert errors[1] < 0.02 and errors[1] < errors[0] / 2, f"the mean of the iterates does not converge: {errors}"


def test_power_iteration_finds_the_largest_eigenvalue():
    top = float(torch.linalg.eigvalsh(operator().dense())[-1])
    assert 0.97 * top < power(operator().product, P) <= top * (1 + 1e-12)


def test_arnoldi_of_few_eigenvalues():
    """damping = 0: the pseudo-inverse of the top of the spectrum. damping > 0: H is taken for zero on the rest."""
    matrix, rank = operator().dense(), 3
    v = torch.randn(P, 2, generator=torch.Generator().manual_seed(3), dtype=D)
    values, vectors = torch.linalg.eigh(matrix)
    top, u = values[-rank:], vectors[:, -rank:]
    found = arnoldi(operator().product, v, rank=rank)
    close(found.x, u @ torch.diag(1 / top) @ u.T @ v)
    outside = (v - u @ u.T @ v).norm(dim=0) / v.norm(dim=0)
    assert found.residual == pytest.approx(float(outside.max()), rel=1e-9)
    kept = u @ torch.diag(top) @ u.T + 0.4 * torch.eye(P, dtype=D)
    close(arnoldi(operator().product, v, rank=rank, damping=0.4).x, torch.linalg.solve(kept, v))


def test_arnoldi_of_few_products_is_the_projected_problem():
    matrix = operator().dense()
    v = torch.randn(P, generator=torch.Generator().manual_seed(3), dtype=D)
    q, t = lanczos(operator().product, P, 4)
    close(q.T @ q, torch.eye(4, dtype=D))
    close(t, q.T @ matrix @ q, 1e-11)
    want = q @ torch.linalg.solve(t + 0.4 * torch.eye(4, dtype=D), q.T @ v) + (v - q @ q.T @ v) / 0.4
    close(arnoldi(operator().product, v, damping=0.4, limit=4).x, want)


def test_arnoldi_finds_eigenvalues_that_repeat():
    """A start vector sees one direction of each eigenspace; the others come when the space closes."""
    q = torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(2), dtype=D))[0]
    matrix = q @ torch.diag(torch.tensor([2.0, 2, 2, 5, 5, 7], dtype=D)) @ q.T
    v = torch.randn(P, generator=torch.Generator().manual_seed(3), dtype=D)
    close(arnoldi(lambda d: matrix @ d, v).x, torch.linalg.solve(matrix, v))


def test_preconditioning_changes_the_path_and_not_the_answer():
    """With the inverse itself one product is enough; with the diagonal of a badly scaled matrix, few are."""
    rng = torch.Generator().manual_seed(5)
    size = 60
    a = torch.randn(size, size, generator=rng, dtype=D) / size
    scales = torch.logspace(-2, 2, size, dtype=D)
    matrix = scales[:, None] * (torch.eye(size, dtype=D) + a @ a.T) * scales
    v = torch.randn(size, 4, generator=rng, dtype=D)
    want = torch.linalg.solve(matrix, v)
    plain = cg(lambda d: matrix @ d, v, tolerance=1e-10, limit=2000)
    scaled = cg(lambda d: matrix @ d, v, tolerance=1e-10, precondition=lambda r: r / matrix.diagonal()[:, None])
    whole = cg(lambda d: matrix @ d, v, tolerance=1e-10, precondition=lambda r: torch.linalg.solve(matrix, r))
    close(scaled.x, want, 1e-6)
    close(whole.x, want, 1e-6)
    assert whole.iterations <= 2 and scaled.iterations < 30 < plain.iterations


def test_a_subspace_takes_the_top_of_the_spectrum_out():
    """A random block of as many columns as there are large eigenvalues, and a few: CG then sees the others only."""
    size, large = 80, 20
    q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=D))[0]
    values = torch.cat([torch.logspace(2, 5, large, dtype=D), torch.linspace(0, 1, size - large, dtype=D)])
    matrix = q @ torch.diag(values) @ q.T
    v = torch.randn(size, 3, generator=torch.Generator().manual_seed(6), dtype=D)
    want = torch.linalg.solve(matrix + 0.5 * torch.eye(size, dtype=D), v)
    counts = []
    for rank in (0, large + 5, size):
        ease = subspace(lambda d: matrix @ d, size, rank, 0.5) if rank else None
        found = cg(lambda d: matrix @ d, v, damping=0.5, tolerance=1e-10, precondition=ease)
        close(found.x, want, 1e-7)
        counts.append(found.iterations)
    assert counts[2] <= 2 and counts[1] < 25 < 50 < counts[0], counts
    with pytest.raises(InputError, match="negative curvature"):
        subspace(lambda d: -matrix @ d, size, 5, 0.5)


def test_columns_of_cg_stop_each_for_itself():
    """Solved together or alone, the same numbers; products are only made of columns that still need them."""
    seen: list[int] = []
    matrix = operator().dense()
    top = torch.linalg.eigh(matrix)[1][:, -1]
    v = torch.stack([top, torch.randn(P, generator=torch.Generator().manual_seed(3), dtype=D), 0 * top], dim=1)

    def product(d: Tensor) -> Tensor:
        seen.append(d.shape[1])
        return matrix @ d

    found = cg(product, v, tolerance=1e-9)
    assert seen[0] == 2 and seen[1] == 1 and seen[-1] == 3, f"columns of the products: {seen}"
    assert found.x[:, 2].abs().max() == 0
    for j in (0, 1):
        close(found.x[:, j], cg(product, v[:, j], tolerance=1e-9).x, 1e-12)


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


@pytest.mark.parametrize("solver", SOLVERS)
def test_large_damping_gives_graddot(solver):
    rng = torch.Generator().manual_seed(4)
    u, v = torch.randn(2, P, generator=rng, dtype=D)
    for damping, tolerance in ((1e6, 1e-3), (1e9, 1e-6)):
        got = solved(solver, operator(), v, damping).x
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
        with pytest.raises(InputError, match="LiSSA diverges"):
            lissa(lambda d: matrix @ d, torch.ones(P, dtype=D))
        with pytest.raises(InputError, match="eigenvalue -0.5 in the Krylov space"):
            arnoldi(lambda d: matrix @ d, torch.ones(P, dtype=D))
    assert exact(matrix, torch.ones(P, dtype=D), damping=1.0).residual < 1e-12
    assert cg(lambda d: matrix @ d, torch.ones(P, dtype=D), damping=1.0, tolerance=1e-9).residual < 1e-8


def test_solves_of_numbers_that_are_not_finite_are_refused():
    broken, ones = torch.full((P, P), float("nan"), dtype=D), torch.ones(P, dtype=D)
    with pytest.raises(InputError, match="finite"):
        exact(broken, ones)
    for solver in (cg, lissa, arnoldi):
        with pytest.raises(InputError, match="finite"):
            solver(lambda d: broken @ d, ones)
        with pytest.raises(InputError, match="finite"):
            solver(lambda d: d, ones * float("inf"))


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
