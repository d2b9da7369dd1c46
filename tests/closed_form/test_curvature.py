"""Curvature as products against dense matrices by automatic differentiation, and against another implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.core.errors import InputError
from assay.core.keys import encode_ids, hash_ids
from assay.core.task import Inputs, Params
from assay.numerics.curvature import curvature, dots, exact_gradients, parameters, reading, slopes
from assay.numerics.operator import Curvature, flat, unflat
from assay.numerics.rows import Rows
from assay.train.models import Classifier
from assay.train.module import ModuleTask
from helpers import classifier, language, text_pool, vector_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")

D = torch.float64
N = 13
FORMS: dict[str, dict[str, Any]] = {"rows": {}, "products": {"cache": 0}}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    gap = float((got - want).norm() / want.norm())
    assert gap < tolerance, f"relative distance {gap:.2e}"


def per_example(f: Any, params: Params) -> Tensor:
    """Gradients of f(flat parameters) -> [n] by torch.func, `[n, p]`."""
    return torch.as_tensor(jacrev(f)(flat(params)))


def dense_truth(task: Any, params: dict[str, Tensor], inputs: Inputs, kind: str) -> Tensor:
    """(1/N) sum_i of the Hessian, of J^T (diag p - p p^T) J, or of g g^T, by torch.func on one flat vector."""
    outputs = lambda v: task.logits(unflat(v, params), inputs)  # noqa: E731
    count = len(inputs["y"])
    losses = lambda v: F.cross_entropy(outputs(v), inputs["y"], reduction="none")  # noqa: E731
    if kind == "hessian":
        return torch.as_tensor(jacrev(jacrev(lambda v: losses(v).mean()))(flat(params)))
    if kind == "empirical":
        g = per_example(losses, params)
        return g.T @ g / count
    j_ncp, p_nc = per_example(outputs, params), outputs(flat(params)).softmax(dim=1)
    b_ncc = torch.diag_embed(p_nc) - p_nc[:, :, None] * p_nc[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", j_ncp, b_ncc, j_ncp) / count


@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical"])
@pytest.mark.parametrize("form", ["rows", "products"])
@pytest.mark.parametrize("batches", [1, 4])
def test_curvature_equals_dense(tmp_path, hidden, kind, form, batches):
    task, encoded = classifier(vector_pool(N), tmp_path, hidden=hidden)
    params, parts = wide(task), np.array_split(np.arange(N), batches)
    source = lambda: (encoded.inputs(rows) for rows in parts)  # noqa: E731
    held = curvature(task, params, source, N, kind=kind, **FORMS[form])
    assert isinstance(held, Rows if form == "rows" and kind != "hessian" else Curvature)
    got, want = held.dense(), dense_truth(task, params, encoded.inputs(np.arange(N)), kind)
    assert float((got - want).abs().max()) < 1e-12, float((got - want).abs().max())
    v = torch.randn(held.size, 5, generator=torch.Generator().manual_seed(0), dtype=D)
    close(held.product(v), want @ v, 1e-11)
    close(held.product(v[:, 0]), want @ v[:, 0], 1e-11)
    held.decay = 0.25
    close(held.product(v), want @ v + 0.25 * v, 1e-11)
    trace = float(want.trace()) + 0.25 * held.size
    assert held.trace() == pytest.approx(trace, rel=1e-12 if isinstance(held, Rows) else 0.5)
    least = float(torch.linalg.eigvalsh(got)[0])
    assert kind == "hessian" or least > -1e-12, f"a sum of squares with eigenvalue {least:.1e}"
    if kind == "ggn" and not hidden:
        close(got, dense_truth(task, params, encoded.inputs(np.arange(N)), "hessian"), 1e-11)
    if kind == "hessian" and hidden:
        assert least < -1e-6, "this model's Hessian should be indefinite, or the test shows nothing"


@pytest.mark.parametrize("form", ["rows", "products"])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical"])
def test_some_layers_are_a_block_of_the_matrix(tmp_path, kind, form):
    task, encoded = classifier(vector_pool(N), tmp_path, hidden=(4,))
    params, inputs = wide(task), encoded.inputs(np.arange(N))
    only = ["layers.1.weight", "layers.1.bias"]
    held = curvature(task, params, lambda: [inputs], N, kind=kind, only=only, **FORMS[form])
    at = sum(p.numel() for n, p in params.items() if n not in only)
    close(held.dense(), dense_truth(task, params, inputs, kind)[at:, at:], 1e-11)


def decoder(tmp_path, n: int = 3) -> tuple[Any, dict[str, Tensor], Inputs]:
    task, encoded = language(text_pool(n, longest=2), tmp_path, width=2, heads=1, layers=1, context=5)
    return task, wide(task), encoded.inputs(np.arange(n))


def test_hessian_of_the_decoder_is_the_slope_of_its_gradient(tmp_path):
    task, params, inputs = decoder(tmp_path)
    held = curvature(task, params, lambda: [inputs], 3, kind="hessian")
    v = torch.randn(held.size, 3, generator=torch.Generator().manual_seed(0), dtype=D)

    def slope(t: float, j: int) -> Tensor:
        leaves = unflat((flat(params) + t * v[:, j]).requires_grad_(), params)
        grads = torch.autograd.grad(task.loss(leaves, inputs).mean(), list(leaves.values()))
        return torch.cat([g.reshape(-1) for g in grads])

    for j in range(3):
        close(held.product(v)[:, j], (slope(1e-6, j) - slope(-1e-6, j)) / 2e-6, 1e-5)


def test_gauss_newton_of_the_decoder_is_a_sum_over_tokens(tmp_path):
    """(1/N) sum_i (1/T_i) sum_t J_t^T (diag p - p p^T) J_t; padding has no part in it."""
    task, params, inputs = decoder(tmp_path)
    assert len(set(inputs["mask"].sum(dim=1).tolist())) > 1, "texts of one length: padding is not tested"
    held = curvature(task, params, lambda: [inputs], 3, kind="ggn")
    v = torch.randn(held.size, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    with sdpa_kernel(SDPBackend.MATH):
        j_btcp = torch.as_tensor(jacrev(lambda u: task.logits(unflat(u, params), inputs))(flat(params)))
    p, weight = task.logits(params, inputs).softmax(dim=2), inputs["mask"].double()
    weight = weight / weight.sum(dim=1, keepdim=True)
    along = torch.einsum("btcp,pk->btck", j_btcp, v)
    bent = p[..., None] * (along - (p[..., None] * along).sum(dim=2, keepdim=True)) * weight[..., None, None]
    want = torch.einsum("btcp,btck->pk", j_btcp, bent) / 3
    close(held.product(v), want, 1e-10)
    parts = [encoded_part(inputs, i) for i in range(3)]
    close(curvature(task, params, lambda: parts, 3, kind="ggn").product(v), want, 1e-10)


def encoded_part(inputs: Inputs, i: int) -> Inputs:
    """One text, cut to its own length."""
    stop = int(inputs["mask"][i].sum())
    return {n: x[i : i + 1, :stop] for n, x in inputs.items()}


def test_empirical_fisher_of_the_decoder_is_a_sum_of_outer_products(tmp_path):
    task, params, inputs = decoder(tmp_path)
    held = curvature(task, params, lambda: [inputs], 3, kind="empirical")
    v = torch.randn(held.size, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    g = exact_gradients(task, params, inputs)
    close(held.product(v), g.T @ (g @ v) / 3, 1e-10)


@pytest.mark.parametrize("form", ["rows", "products", "decoder"])
def test_the_mean_of_drawn_fishers_is_the_gauss_newton_matrix(tmp_path, form):
    """In a decoder too, where an example's T labels are drawn one by one: E T g g^T = (1/T) sum_t J_t^T B_t J_t."""
    if form == "decoder":
        task, params, inputs = decoder(tmp_path)
    else:
        task, encoded = classifier(vector_pool(N), tmp_path, hidden=(3,))
        params, inputs = wide(task), encoded.inputs(np.arange(N))
    count, options = len(next(iter(inputs.values()))), FORMS["products" if form == "products" else "rows"]
    keys = lambda: [hash_ids(encode_ids(str(i) for i in range(count)))]  # noqa: E731
    v = torch.randn(sum(p.numel() for p in params.values()), 2, generator=torch.Generator().manual_seed(0), dtype=D)
    want = curvature(task, params, lambda: [inputs], count, kind="ggn").product(v)

    def drawn(seed: int) -> Tensor:
        held = curvature(task, params, lambda: [inputs], count, kind="fisher", keys=keys, seed=seed, **options)
        return held.product(v)

    draws = torch.stack([drawn(seed) for seed in range(40 if form == "decoder" else 100)])
    error = draws.std(dim=0).norm() / len(draws) ** 0.5
    assert float((draws.mean(dim=0) - want).norm()) < 2 * float(error) and float(error) < 0.3 * float(want.norm())
    assert torch.equal(drawn(3), draws[3]) and not torch.equal(draws[3], draws[4])


@dataclass
class _Squares(ModuleTask):
    columns = {"x": ("float32", 2), "y": ("float32",)}

    def build(self) -> nn.Module:
        return nn.Linear(2, 1)

    def per_example(self, model: Any, batch: Inputs) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square()


def test_a_task_without_logits_has_no_gauss_newton_matrix():
    task, inputs = _Squares(), {"x": torch.ones(3, 2), "y": torch.zeros(3)}
    with pytest.raises(InputError, match="Gauss-Newton"):
        curvature(task, task.params(), lambda: [inputs], 3, kind="ggn")
    with pytest.raises(InputError, match="no margin"):
        reading(task, "margin")


def test_convolutions_and_embeddings_go_by_products(tmp_path):
    """Where an example passes a layer at several positions its gradient is no single outer product."""
    task, params, inputs = decoder(tmp_path)
    assert isinstance(curvature(task, params, lambda: [inputs], 3, kind="empirical"), Curvature)
    vectors, encoded = classifier(vector_pool(N), tmp_path / "v")
    small = wide(vectors)
    assert isinstance(
        curvature(vectors, small, lambda: [encoded.inputs(np.arange(N))], N, kind="ggn", cache=50), Curvature
    )


@pytest.mark.parametrize("measure", ["loss", "margin"])
def test_slopes_and_dots_are_gradients(tmp_path, measure):
    task, encoded = classifier(vector_pool(N), tmp_path, hidden=(4,))
    params, parts = wide(task), [encoded.inputs(rows) for rows in np.array_split(np.arange(N), 3)]
    whole = encoded.inputs(np.arange(N))
    f = reading(task, measure)
    sign = {
        "loss": lambda v: task.loss(unflat(v, params), whole),
        "margin": lambda v: -task.margin(unflat(v, params), whole),
    }
    want = per_example(sign[measure], params)
    names = parameters(task, params)
    assert names == list(params)
    close(slopes(task, params, parts, f, names, each=True), want.T, 1e-11)
    close(slopes(task, params, parts, f, names, each=False)[:, 0], want.mean(dim=0), 1e-11)
    x = torch.randn(want.shape[1], 20, generator=torch.Generator().manual_seed(0), dtype=D)
    own = per_example(lambda v: task.loss(unflat(v, params), whole), params)
    for k in (1, 20):
        close(dots(task, params, whole, x[:, :k], names), own @ x[:, :k], 1e-11)


def test_dots_of_a_large_model_form_no_gradient(tmp_path, monkeypatch):
    task, params, inputs = decoder(tmp_path)
    names = parameters(task, params, "linear")
    assert 0 < len(names) < len(params)
    x = torch.randn(sum(params[n].numel() for n in names), 20, generator=torch.Generator().manual_seed(0), dtype=D)
    want = dots(task, params, inputs, x, names)
    close(want, exact_gradients(task, params, inputs, only=names) @ x, 1e-12)
    monkeypatch.setattr("assay.numerics.curvature.FORMED", 0)
    monkeypatch.setattr("assay.numerics.curvature.exact_gradients", None)
    close(dots(task, params, inputs, x, names), want, 1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # its imports, not ours
def test_another_implementation_agrees(tmp_path):
    """curvlinops (Dangel et al.), in float64, on a perceptron and on batches."""
    curvlinops = pytest.importorskip("curvlinops")
    task, encoded = classifier(vector_pool(N), tmp_path, hidden=(4,))
    params, parts = wide(task), [encoded.inputs(rows) for rows in np.array_split(np.arange(N), 3)]
    model = Classifier(inputs=5, hidden=(4,), classes=3).module.double()
    model.load_state_dict(params)
    data = [(part["x"].double(), part["y"]) for part in parts]
    v = torch.randn(sum(p.numel() for p in params.values()), 4, generator=torch.Generator().manual_seed(0), dtype=D)
    for kind, name in (
        ("hessian", "HessianLinearOperator"),
        ("ggn", "GGNLinearOperator"),
        ("empirical", "EFLinearOperator"),
    ):
        other = getattr(curvlinops, name)(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
        want = other @ v
        for cache in (0, 1 << 20):
            held = curvature(task, params, lambda: parts, N, kind=kind, cache=cache)  # type: ignore[arg-type]
            close(held.product(v), torch.as_tensor(want), 1e-10)
