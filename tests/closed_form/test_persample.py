"""Per-example gradients against a looped backward, and projections against dense matrices and their moments."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.func import functional_call

from assay.core.task import Encoded, Inputs, Params, Task
from assay.numerics.persample import Loss, covered, flatten, gradients, layout
from assay.numerics.project import Exact, Factored, Sketch, rademacher
from assay.train.models import init_params
from helpers import classifier, language, looped, text_pool, vector_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = Exact()


class Mixed(nn.Module):
    """Every rule at once: an embedding tied to the readout, LayerNorm and RMSNorm, biases, a layer used twice."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 6, padding_idx=3)
        self.norm, self.plain, self.root = nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False), nn.RMSNorm(6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.token(tokens))
        x = self.root(x + torch.tanh(self.mix(x)))
        x = self.plain(x + torch.tanh(self.mix(x)))
        return self.head(x.mean(dim=1) + x[:, 0])


def mixed(tied: bool = True) -> tuple[Mixed, dict[str, Tensor], Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    module = Mixed(tied)
    params = {n: torch.randn(p.shape, generator=rng, dtype=torch.float64) for n, p in module.named_parameters()}
    tokens = torch.randint(0, 11, (7, 4), generator=rng)
    tokens[0, 1] = 3
    return module, params, tokens, torch.randint(0, 11, (7,), generator=rng)


def cased(module: nn.Module) -> Loss:
    return lambda params, batch: mixed_loss(module, dict(params), batch["tokens"], batch["y"])


def mixed_loss(module: nn.Module, params: dict[str, Tensor], tokens: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(module, params, (tokens,)), y, reduction="none")


def found(task: Task, params: dict[str, Tensor], encoded: Encoded, rows: np.ndarray, sketch: Sketch = EXACT):
    return gradients(task.module, task.loss, params, encoded.inputs(rows), sketch)


def agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert sorted(got) == sorted(want), set(got) ^ set(want)
    want = {name: truth.flatten(1) for name, truth in want.items()}
    for name in want:
        assert got[name].shape == want[name].shape, (name, got[name].shape, want[name].shape)
        gap = float((got[name] - want[name]).abs().max())
        assert gap <= tolerance * max(1.0, float(want[name].abs().max())), f"{name}: off by {gap:.2e}"


@pytest.mark.parametrize("hidden", [(), (7,), (6, 4)])
def test_perceptron_equals_looped_backward(tmp_path, hidden):
    task, encoded = classifier(vector_pool(9), tmp_path, hidden=hidden)
    params, rows = wide(task), np.arange(9)
    got, losses = found(task, params, encoded, rows)
    agree(got, looped(task, params, encoded, rows))
    assert torch.allclose(losses, task.loss(params, encoded.inputs(rows)), rtol=0, atol=1e-14)


def test_decoder_equals_looped_backward_with_mixed_lengths(tmp_path):
    task, encoded = language(text_pool(8), tmp_path)
    assert len(set(encoded.sizes.tolist())) > 3, encoded.sizes
    params, rows = wide(task), np.arange(8)
    got, losses = found(task, params, encoded, rows)
    agree(got, looped(task, params, encoded, rows))
    assert covered(task.module) == set(params), "some parameters have no rule"
    assert losses.dtype == torch.float64
    assert sum(g[0].numel() for g in got.values()) == sum(p.numel() for p in params.values())


def test_padding_contributes_nothing(tmp_path):
    task, encoded = language(text_pool(8), tmp_path)
    params, short = wide(task), int(encoded.sizes.argmin())
    rows = np.array([int(encoded.sizes.argmax()), short])
    assert encoded.sizes[rows[0]] > encoded.sizes[short] + 3
    alone, loss_alone = found(task, params, encoded, rows[1:])
    padded, loss_padded = found(task, params, encoded, rows)
    agree({n: g[1:] for n, g in padded.items()}, alone, 1e-12)
    assert abs(float(loss_alone[0] - loss_padded[1])) < 1e-12
    unused = padded["position.weight"][1].view(-1, 16)[encoded.sizes[short] :]
    assert (unused == 0).all(), f"positions of padding got a gradient of {float(unused.abs().max()):.1e}"


@pytest.mark.parametrize("tied", [True, False])
def test_every_rule_and_shared_parameters(tied):
    module, params, tokens, y = mixed(tied)
    got, _ = gradients(module, cased(module), params, {"tokens": tokens, "y": y}, EXACT)
    want: dict[str, list[Tensor]] = {n: [] for n in params}
    for i in range(len(y)):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        loss = mixed_loss(module, leaves, tokens[i : i + 1], y[i : i + 1]).sum()
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            want[name].append(grad)
    agree(got, {n: torch.stack(g) for n, g in want.items()})
    assert ("head.weight" in got) != tied
    if not tied:
        assert (got["token.weight"][0].view(11, 6)[3] == 0).all(), "padding_idx takes no gradient"


def test_sum_over_examples_is_the_batch_gradient(tmp_path):
    task, encoded = language(text_pool(6), tmp_path)
    params, rows = wide(task), np.arange(6)
    got, _ = found(task, params, encoded, rows)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    grads = torch.autograd.grad(task.loss(leaves, encoded.inputs(rows)).sum(), list(leaves.values()))
    agree({n: g.sum(dim=0)[None] for n, g in got.items()}, {n: g[None] for n, g in zip(leaves, grads, strict=True)})


def dense_projection(grad: Tensor, name: str, sketch: Factored) -> Tensor:
    """P_o G P_i^T from the matrices themselves, `[b, ...]`."""
    left = sketch.side(name, "out", grad.shape[1], grad)
    left = torch.eye(grad.shape[1]).double() if left is None else left.double()
    if grad.dim() == 2:
        return grad @ left.T
    right = sketch.side(name, "in", grad.shape[2], grad)
    right = torch.eye(grad.shape[2]).double() if right is None else right.double()
    return torch.stack([left @ g @ right.T for g in grad])


@pytest.mark.parametrize("rank", [1, 4, 8, 64])
def test_projected_decoder_equals_dense_projection(tmp_path, rank):
    task, encoded = language(text_pool(5), tmp_path)
    params, rows, sketch = wide(task), np.arange(5), Factored(rank, 3)
    full, _ = found(task, params, encoded, rows)
    got, _ = found(task, params, encoded, rows, sketch)
    agree(got, {n: dense_projection(g.view(5, *params[n].shape), n, sketch) for n, g in full.items()})
    blocks = layout(task.module, sketch)
    assert blocks == [(n, got[n][0].numel()) for n in sorted(got)]
    assert flatten(got).shape == (5, sum(width for _, width in blocks))
    assert torch.equal(flatten(got)[:, : blocks[0][1]], got[blocks[0][0]].flatten(1))


@pytest.mark.parametrize("tied", [True, False])
def test_projected_shared_parameters_add_up(tied):
    module, params, tokens, y = mixed(tied)
    sketch = Factored(3, 1)
    full, _ = gradients(module, cased(module), params, {"tokens": tokens, "y": y}, EXACT)
    got, _ = gradients(module, cased(module), params, {"tokens": tokens, "y": y}, sketch)
    agree(got, {n: dense_projection(g.view(7, *params[n].shape), n, sketch) for n, g in full.items()})
    assert layout(module, sketch) == [(n, got[n][0].numel()) for n in sorted(got)]


def test_shared_bias_is_projected_once():
    module = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9)).double()
    module[2].bias = module[0].bias
    x, sketch = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64), Factored(2, 0)
    params = {n: p.detach() for n, p in module.named_parameters()}

    def loss(params: Params, batch: Inputs) -> Tensor:
        return functional_call(module, dict(params), (batch["x"],)).square().sum(dim=1)

    full, _ = gradients(module, loss, params, {"x": x})
    got, _ = gradients(module, loss, params, {"x": x}, sketch)
    agree(got, {n: dense_projection(g.view(4, *params[n].shape), n, sketch) for n, g in full.items()})


def test_matrix_products_are_unbiased_with_the_stated_variance():
    rng = np.random.default_rng(0)
    n, rows, draws = 12, 4, 4000
    x, y = rng.normal(size=n), rng.normal(size=n) + 0.5
    products = np.empty(draws)
    for seed in range(draws):
        p = rademacher(rows, n, seed=seed, label="w").double().numpy()
        products[seed] = (p @ x) @ (p @ y)
    variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()) / rows
    error = (products.mean() - x @ y) / np.sqrt(variance / draws)
    assert abs(error) < 3.5, f"the mean is {error:.1f} standard errors off <x, y>"
    assert 0.9 < products.var() / variance < 1.1, (products.var(), variance)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_projected_gradients_are_unbiased_and_linear(kind):
    rng = torch.Generator().manual_seed(2)
    tokens = torch.tensor([[0, 4, 4], [4, 1, 6]])
    x = torch.randn(2, 3, 7, generator=rng, dtype=torch.float64)
    weights = torch.randn(2, 3, 5, generator=rng, dtype=torch.float64)
    layer = (nn.Linear(7, 5, bias=False) if kind == "linear" else nn.Embedding(7, 5)).double()

    def loss(params: Params, batch: Inputs) -> Tensor:
        return (functional_call(layer, dict(params), (batch["x"],)) * batch["w"]).sum(dim=(1, 2))

    def grads(sketch: Sketch, scale: Tensor | None = None) -> Tensor:
        w = weights if scale is None else weights * scale[:, None, None]
        inputs = {"x": x if kind == "linear" else tokens, "w": w}
        return flatten(gradients(layer, loss, {"weight": layer.weight.detach()}, inputs, sketch)[0])

    full = grads(EXACT)
    want = float(full[0] @ full[1])
    projected = [grads(Factored(2, seed)) for seed in range(1500)]
    dots = torch.stack([g[0] @ g[1] for g in projected])
    error = (float(dots.mean()) - want) / (float(dots.std()) / len(dots) ** 0.5)
    assert abs(error) < 3.5, f"E<Pg, Ph> is {error:.1f} standard errors off {want:.3f}"
    scale = torch.tensor([2.5, -1.0], dtype=torch.float64)
    assert torch.allclose(grads(Factored(2, 7), scale), scale[:, None] * projected[7], rtol=0, atol=1e-12)
    # A scatter over entries: one example's projection is the sum over its positions of P_o e_id (P_i d)^T.
    if kind == "embedding":
        sketch = Factored(2, 7)
        left, right = (sketch.side("weight", s, n, weights) for s, n in (("out", 7), ("in", 5)))
        assert left is not None and right is not None
        by_hand = sum(torch.outer(left[:, t], right @ w) for t, w in zip(tokens[1], weights[1], strict=True))
        assert torch.allclose(projected[7][1].view(2, 2), torch.as_tensor(by_hand), rtol=0, atol=1e-12)


GOLDEN = """
from assay.numerics.project import rademacher
m = rademacher(4, 9, seed=11, label='head.weight/in')
print((m * 2).int().tolist())
"""


def splitmix64(x: int) -> int:
    """In whole numbers, from Steele, Lea & Flood 2014."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_entries_are_the_same_in_every_process():
    m = rademacher(4, 9, seed=11, label="head.weight/in")
    assert torch.equal(m, rademacher(4, 9, seed=11, label="head.weight/in"))
    part = rademacher(2, 5, seed=11, label="head.weight/in")
    assert torch.equal(m[:2, :5].sign(), part.sign()), "an entry depends on the matrix's size"
    assert torch.allclose(part.abs(), torch.full((2, 5), 2**-0.5)), "entries are not 1/sqrt(rows)"
    signs = (m * 2).int().tolist()
    other = subprocess.run([sys.executable, "-c", GOLDEN], capture_output=True, text=True, check=True).stdout.strip()
    assert other == str(signs)
    key = xxhash.xxh3_64_intdigest(b"11/head.weight/in")
    by_hand = [[1 if splitmix64(key ^ (row << 32 | column)) >> 63 else -1 for column in range(9)] for row in range(4)]
    assert signs == by_hand
    assert signs[1] == [1, 1, 1, -1, 1, 1, 1, -1, 1], "stored features no longer match new ones"
    for seed, label in ((12, "head.weight/in"), (11, "head.weight/out")):
        assert not torch.equal(m, rademacher(4, 9, seed=seed, label=label)), (seed, label)


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in module.modules())


def test_hooks_are_removed_also_after_an_exception(tmp_path):
    task, encoded = language(text_pool(3), tmp_path)
    params = wide(task)
    found(task, params, encoded, np.arange(3))
    assert hooks(task.module) == 0

    def broken(params: Params, batch: Inputs) -> Tensor:
        task.loss(params, batch)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        gradients(task.module, broken, params, encoded.inputs(np.arange(3)))
    assert hooks(task.module) == 0, "hooks stay after an exception"


def test_sketches_travel_without_their_matrices():
    sketch, like = Factored(3, 9), torch.zeros(1, dtype=torch.float64)
    before = sketch.side("w", "out", 50, like)
    assert before is not None and before.shape == (3, 50) and before.dtype == like.dtype
    assert sketch.side("w", "out", 3, like) is None
    assert sketch.width("w", (50, 2, 7)) == 9 and sketch.width("w", (50,)) == 3 and sketch.width("w", (2, 2)) == 4
    assert Exact().width("w", (50, 2, 7)) == 700
    data = pickle.dumps(sketch)
    assert len(data) < 400, f"{len(data)} bytes"
    after = pickle.loads(data).side("w", "out", 50, like)
    assert torch.equal(after, before)


def test_bfloat16_sums_in_single_precision_and_keeps_the_direction(tmp_path):
    task, encoded = language(text_pool(9), tmp_path, width=64)
    params, inputs = init_params(task.module, 0), encoded.inputs(np.arange(9))
    sketch = Factored(16, 1)
    exact = flatten(gradients(task.module, task.loss, params, inputs, sketch)[0])
    with torch.autocast("cpu", torch.bfloat16):
        half = flatten(gradients(task.module, task.loss, params, inputs, sketch)[0])
    assert half.dtype == torch.float32
    cosine = torch.cosine_similarity(exact, half)
    assert float(cosine.min()) > 0.98, cosine
