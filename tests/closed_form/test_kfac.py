"""Kronecker factors against dense Fisher matrices, by the properties they must have; and labels drawn from models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_families
import torch
from scipy import stats
from test_families import Made
from test_persample import cased, mixed
from torch import Tensor, nn
from torch.func import functional_call

from assay.core.errors import InputError
from assay.core.keys import encode_ids, hash_ids
from assay.core.task import Encoded, Inputs, Task
from assay.numerics.kfac import Factors, assembled, bases, damped, footprint
from assay.numerics.kfac_passes import Corrections, Moments, collect, survey
from assay.numerics.persample import covered, gradients, trainable
from assay.numerics.sampling import categorical, uniforms
from assay.train import factors as fitting
from assay.train.factors import Fisher, fit
from helpers import classifier, language, text_pool, vector_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")
EMPIRICAL, ONCE = Fisher(labels="true"), Fisher(draws=1)


def fitted(made: Made, size: int = 512) -> Factors:
    """Of the batch as it stands, its labels the data's own."""
    module, loss, params, inputs = made
    only = set(trainable(module))
    fallback = only - covered(module)
    blocks = survey(module, loss, params, inputs, only=only, fallback=fallback)
    examples = len(next(iter(inputs.values())))
    options: dict[str, Any] = {"fallback": fallback, "positions": lambda batch: batch.get("mask")}
    batches = [(inputs, float(examples))]
    moments = collect(Moments(blocks, size), module, loss, params, batches, **options)
    basis = bases(blocks, moments, size, torch.float64)
    squares = collect(Corrections(blocks, basis), module, loss, params, batches, **options)
    return assembled(blocks, basis, moments, squares)


def rows(made: Made) -> dict[str, Tensor]:
    """Per-example gradients, `[b, *shape]`."""
    module, loss, params, inputs = made
    found, _ = gradients(module, loss, params, inputs)
    return {n: g.view(-1, *params[n].shape) for n, g in found.items()}


def dense(factors: Factors, name: str, kind: Any) -> Tensor:
    """The block's curvature as a matrix over its entries, rows first."""
    factor = factors.blocks[name]
    size = factor.block.shape[0] * factor.block.shape[1]
    eye = torch.eye(size, dtype=torch.float64).view(size, *factor.block.shape)
    return factor.back(factor.turned(eye) * factor.values(kind)).flatten(1)


def fisher(factors: Factors, name: str, found: dict[str, Tensor]) -> Tensor:
    """E vec(G) vec(G)^T."""
    g = factors.blocks[name].joined(found).flatten(1)
    return g.T @ g / len(g)


class Line(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.map = nn.Linear(3, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def line(x: Tensor, noise: Tensor, bias: bool = False) -> Made:
    """Half the squared error of a linear map; `noise` is the gradient at its output."""
    module = Line(bias)
    rng = torch.Generator().manual_seed(1)
    params = {n: torch.randn(p.shape, generator=rng).double() for n, p in module.named_parameters()}

    def loss(values: Any, batch: Inputs) -> Tensor:
        gap = functional_call(module, dict(values), (batch["x"],)) - batch["y"]
        return gap.square().flatten(1).sum(dim=1) / 2

    with torch.no_grad():
        y = functional_call(module, params, (x,)) - noise
    return module, loss, params, {"x": x, "y": y}


def gaussian(sigma: float = 0.7) -> tuple[Tensor, Tensor]:
    """Inputs that each meet output noise of covariance sigma^2 I exactly: +-sigma sqrt(2) along either axis."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = sigma * 2**0.5 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    return x.repeat_interleave(4, dim=0), noise.repeat(5, 1)


@pytest.mark.parametrize("bias", [False, True])
def test_one_linear_layer_with_gaussian_labels_is_exact(bias: bool) -> None:
    x, noise = gaussian()
    made = line(x, noise, bias)
    factors, found = fitted(made), rows(made)
    assert list(factors.blocks) == ["map.weight"] and factors.blocks["map.weight"].block.shape == (2, 3 + bias)
    truth = fisher(factors, "map.weight", found)
    ones = torch.cat([x, torch.ones(len(x), int(bias), dtype=torch.float64)], dim=1)
    assert torch.allclose(truth, torch.kron(0.49 * torch.eye(2).double(), ones.T @ ones / len(x)), atol=1e-12)
    for kind in ("kfac", "ekfac"):
        assert torch.allclose(dense(factors, "map.weight", kind), truth, atol=1e-12), kind


def test_inverse_equals_the_dense_damped_inverse_where_the_basis_is_exact() -> None:
    x, noise = gaussian()
    made = line(x, noise, bias=True)
    factors, found = fitted(made), rows(made)
    matrix = fisher(factors, "map.weight", found)
    target = {n: g[:6] + 1.0 for n, g in found.items()}
    flat_targets = factors.blocks["map.weight"].joined(target).flatten(1)
    shift = 0.02 + 0.1 * (float(matrix.diagonal().mean()) + 0.02)  # relative damping is of the curvature with its decay
    want = torch.linalg.solve(matrix + shift * torch.eye(8).double(), flat_targets.T).T
    for kind in ("kfac", "ekfac"):
        got = factors.inverse(target, damping=0.1, decay=0.02, kind=kind)  # type: ignore[arg-type]
        assert torch.allclose(factors.blocks["map.weight"].joined(got).flatten(1), want, rtol=1e-10, atol=1e-12)


def test_length_one_with_independent_sides_gives_one_scale() -> None:
    x, noise = gaussian()
    factor = fitted(line(x, noise)).blocks["map.weight"]
    assert torch.allclose(factor.values("kfac"), factor.values("ekfac"), atol=1e-12)


def every_rule() -> Made:
    """An embedding tied to the readout, and a layer used twice."""
    module, params, tokens, y = mixed()
    return module, cased(module), params, {"tokens": tokens, "y": y}


FAMILIES: list[Callable[[], Made]] = [*test_families.FAMILIES, every_rule]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [512, 5])
def test_trace_is_preserved_whatever_the_layers(family: Callable[[], Made], size: int) -> None:
    """Sum of corrected eigenvalues = E |G|^2, of every block of every kind, and no side is larger than asked for."""
    made = family()
    factors, found = fitted(made, size), rows(made)
    assert set(factors.names) == set(found) and len(factors.names) == len(found), "each parameter once"
    for name, factor in factors.blocks.items():
        truth = float(factor.joined(found).square().sum()) / factors.examples
        assert float(factor.corrected.sum()) == pytest.approx(truth, rel=1e-9, abs=1e-15), name
        for side in (factor.rows, factor.columns):
            assert all(len(q) <= size for q in side.parts)
            for q in side.parts:
                assert torch.allclose(q.T @ q, torch.eye(len(q)).double(), atol=1e-9), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_corrected_is_no_further_from_the_fisher_than_uncorrected(family: Callable[[], Made]) -> None:
    made = family()
    factors, found = fitted(made), rows(made)
    ordered = 0
    for name, factor in factors.blocks.items():
        if factor.block.shape[0] * factor.block.shape[1] > 700:
            continue
        truth = fisher(factors, name, found)
        gaps = [float((dense(factors, name, kind) - truth).norm()) for kind in ("ekfac", "kfac")]
        assert gaps[0] <= gaps[1] * (1 + 1e-9) + 1e-15, (name, gaps)
        ordered += gaps[0] < 0.999 * gaps[1]
    assert ordered > 0, "the two were nowhere different"


def test_dependent_positions_put_the_uncorrected_scale_off() -> None:
    """Three positions with one and the same gradient: the Fisher is nine times a position's, K-FAC says three."""
    x, noise = gaussian()
    factors = fitted(line(x[:, None].expand(-1, 3, -1).clone(), noise[:, None].expand(-1, 3, -1).clone()))
    single = fitted(line(x, noise)).blocks["map.weight"]
    factor = factors.blocks["map.weight"]
    assert factor.repeats == 3.0
    assert torch.allclose(factor.values("ekfac"), 9 * single.values("ekfac"))
    assert torch.allclose(factor.values("kfac"), 3 * single.values("kfac"))


def test_vectors_have_their_own_block_whole() -> None:
    made = test_families.llama()
    factors, found = fitted(made), rows(made)
    vectors = [n for n in found if n.endswith("norm.weight")]
    assert len(vectors) >= 3
    for name in vectors:
        assert torch.allclose(dense(factors, name, "ekfac"), fisher(factors, name, found), atol=1e-12), name


def test_relative_damping_knows_no_scale() -> None:
    """Losses summed or averaged, times a constant: directions change by one factor, and no ranking does."""
    module, loss, params, inputs = test_families.llama()
    keep = inputs["mask"].sum(dim=1) == 9
    inputs = {n: v[keep] for n, v in inputs.items()}
    plain, scaled = (fitted((module, lambda p, b, c=c: c * loss(p, b), params, inputs)) for c in (1.0, 8.0))
    found = rows((module, loss, params, inputs))
    for kind in ("kfac", "ekfac"):
        own, other = (f.inverse(found, damping=0.1, kind=kind) for f in (plain, scaled))  # type: ignore[arg-type]
        for name in own:
            assert torch.allclose(own[name], 64 * other[name], rtol=1e-8, atol=1e-9 * float(own[name].abs().max()))


def test_a_block_without_curvature_is_left_where_it_is() -> None:
    values = damped(0.1)(torch.zeros(2, 2))
    assert (values == 0).all()
    assert float(damped(0.1, 0.5)(torch.zeros(1, 1))) == pytest.approx(1 / (1.1 * 0.5))


# Fitting on a pool.


def decoder(tmp_path: Path, n: int = 14) -> tuple[Task, dict[str, Tensor], Encoded, np.ndarray]:
    pool = text_pool(n)
    task, encoded = language(pool, tmp_path / "data", layers=1)
    return task, wide(task), encoded, pool.ids


def near(own: Factors, other: Factors, tolerance: float = 1e-9) -> None:
    """The same operator: bases may differ by signs, and by turns of equal eigenvalues."""
    assert set(own.blocks) == set(other.blocks)
    rng = torch.Generator().manual_seed(0)
    blocks = [f.block for f in own.blocks.values()]
    assert all(b.bias is None for b in blocks)
    shapes = {b.name: b.shape if b.shape[1] > 1 else b.shape[:1] for b in blocks}
    given = {n: torch.randn(2, *s, generator=rng, dtype=torch.float64) for n, s in shapes.items()}
    for kind in ("kfac", "ekfac"):
        first, second = (f.inverse(given, damping=0.1, kind=kind) for f in (own, other))  # type: ignore[arg-type]
        for name in given:
            gap = float((first[name] - second[name]).abs().max()) / float(first[name].abs().max())
            assert gap <= tolerance, (name, kind, gap)


@pytest.mark.parametrize("change", [{"BATCH": 1}, {"AREA": 60}, {"PART": 5}])
def test_batches_and_partitions_do_not_matter(
    tmp_path: Path, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding takes part in nothing: batches of one example have none."""
    task, params, encoded, ids = decoder(tmp_path)
    assert len(set(encoded.sizes.tolist())) > 3
    whole = fit(task, [params], encoded, ids, ONCE)
    for name, value in change.items():
        monkeypatch.setattr(fitting, name, value)
    near(fit(task, [params], encoded, ids, ONCE), whole)


class Mixed(Encoded):
    """Examples in another order."""

    def __init__(self, inner: Encoded, order: np.ndarray) -> None:
        self.inner, self.order, self.sizes = inner, order, inner.sizes[order]

    def inputs(self, rows: np.ndarray) -> Inputs:
        return self.inner.inputs(self.order[rows])


def test_order_of_examples_and_of_parameters_does_not_matter(tmp_path: Path) -> None:
    task, params, encoded, ids = decoder(tmp_path)
    whole = fit(task, [params], encoded, ids, ONCE)
    order = np.random.default_rng(1).permutation(len(ids))
    near(fit(task, [params], Mixed(encoded, order), ids[order], ONCE), whole)
    near(fit(task, [dict(reversed(params.items()))], encoded, ids, ONCE), whole)


def test_groups_of_blocks_do_not_matter(tmp_path: Path) -> None:
    task, params, encoded, ids = decoder(tmp_path)
    fisher = Fisher(draws=1, limit=60_000)
    blocks = [f.block for f in fit(task, [params], encoded, ids, ONCE).blocks.values()]
    groups = fitting.grouped(blocks, fisher)
    assert len(groups) > 2 and [b for g in groups for b in g] == blocks
    assert all(len(g) == 1 or footprint(g, 512)["sums"] <= 60_000 for g in groups)
    near(fit(task, [params], encoded, ids, fisher), fit(task, [params], encoded, ids, ONCE))


def test_a_fit_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bytes; what was done is not done again, what was damaged is."""
    task, params, encoded, ids = decoder(tmp_path)
    monkeypatch.setattr(fitting, "PART", 4)
    calls, true = [], fitting.collect

    def counted(*args: Any, limit: int = 10**9, **options: Any) -> Any:
        if len(calls) >= limit:
            raise KeyboardInterrupt
        calls.append(args)
        return true(*args, **options)

    monkeypatch.setattr(fitting, "collect", counted)
    whole = fit(task, [params], encoded, ids, ONCE, path=tmp_path / "whole")
    assert len(calls) == 8, "two passes over four parts"
    assert sorted(f.name for f in (tmp_path / "whole").iterdir()) == ["factors-0.json", "factors-0.safetensors"]

    calls.clear()
    monkeypatch.setattr(fitting, "collect", lambda *a, **o: counted(*a, limit=6, **o))
    with pytest.raises(KeyboardInterrupt):
        fit(task, [params], encoded, ids, ONCE, path=tmp_path / "killed")
    damaged = tmp_path / "killed" / "moments-0-0-1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(fitting, "collect", counted)
    calls.clear()
    fit(task, [params], encoded, ids, ONCE, path=tmp_path / "killed")
    assert len(calls) == 3, "the two parts that were left, and the damaged one"
    files = [(tmp_path / p / "factors-0.safetensors").read_bytes() for p in ("whole", "killed")]
    assert files[0] == files[1]

    calls.clear()
    near(fit(task, [params], encoded, ids, ONCE, path=tmp_path / "killed"), whole, 0.0)
    assert not calls, "found made"
    fit(task, [{n: p + 1e-3 for n, p in params.items()}], encoded, ids, ONCE, path=tmp_path / "killed")
    assert calls, "another model's factors are not these"


def test_the_part_of_the_gradient_that_is_left_out_is_measured(tmp_path: Path) -> None:
    task, params, encoded, ids = decoder(tmp_path)
    some = {n for n in params if not n.startswith(("token", "position"))}
    factors = fit(task, [params], encoded, ids, ONCE, only=some)
    assert set(factors.names) == some
    probe = np.argsort(hash_ids(ids, "factors", 0))[: fitting.PROBE]
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    squares = dict.fromkeys(params, 0.0)
    for row in probe:
        loss = task.summed(leaves, encoded.inputs(np.array([row]))).sum()
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            squares[name] += float(grad.square().sum())
    want = sum(squares[n] for n in some) / sum(squares.values())
    assert 0 < want < 0.99 and factors.share == pytest.approx(want, rel=1e-9)
    assert fit(task, [params], encoded, ids, ONCE).share == pytest.approx(1.0)


def test_footprint_counts_the_bytes_of_the_factors(tmp_path: Path) -> None:
    task, params, encoded, ids = decoder(tmp_path)
    fit(task, [{n: p.float() for n, p in params.items()}], encoded, ids, Fisher(draws=1, block=64), path=tmp_path / "f")
    blocks = [f.block for f in fit(task, [params], encoded, ids, ONCE).blocks.values()]
    told = footprint(blocks, 64)
    assert told["factors"] == pytest.approx((tmp_path / "f" / "factors-0.safetensors").stat().st_size, rel=0.05)
    assert told["sums"] > told["factors"] / 2


# Labels drawn from the model.


def test_sampled_labels_give_the_gauss_newton_matrix(tmp_path: Path) -> None:
    """Of logistic regression: sum over classes of p_c times that of class c, which draws approach as 1 / sqrt(n)."""
    pool = vector_pool(40)
    task, encoded = classifier(pool, tmp_path)
    params = {n: 0.5 * p for n, p in wide(task).items()}
    factors = fit(task, [params], encoded, pool.ids, Fisher(draws=400))
    inputs = encoded.inputs(np.arange(40))
    p = task.logits(params, inputs).softmax(dim=1)
    x = torch.cat([inputs["x"].double(), torch.ones(40, 1).double()], dim=1)
    bent = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    truth = torch.einsum("nab,ni,nj->aibj", bent, x, x).reshape(18, 18) / 40
    (name,) = factors.blocks
    factor = factors.blocks[name]
    turned = factor.turned(torch.eye(18).double().view(18, 3, 6)).flatten(1)
    want = ((turned.T @ truth) * turned.T).sum(dim=1)
    got = factor.corrected.flatten()
    assert float((got - want).norm() / want.norm()) < 0.03
    other = fit(task, [params], encoded, pool.ids, EMPIRICAL).blocks[name].corrected.flatten()
    assert float((other - got).norm() / want.norm()) > 0.2, "the empirical Fisher is another matrix"


def test_drawn_labels_have_the_models_probabilities() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 1.0])
    n = 20_000
    u = uniforms(hash_ids(encode_ids(f"{i}" for i in range(n)), "k"), 1, seed=3)[:, 0]
    drawn = categorical(logits.expand(n, 5), u)
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[3] == 0, "a class without probability is never drawn"
    keep = [0, 1, 2, 4]
    p = logits.softmax(dim=0).double()[keep] * n
    assert stats.chisquare(counts[keep].numpy(), p.numpy() * float(counts.sum() / p.sum())).pvalue > 1e-3
    edges = torch.tensor([1e-300, 1 - 2**-53], dtype=torch.float64)
    assert categorical(logits.expand(2, 5), edges).tolist() == [0, 4]


def test_draws_are_independent_over_examples_positions_and_seeds() -> None:
    keys = hash_ids(encode_ids(f"{i}" for i in range(4000)), "k")
    u, other = uniforms(keys, 3, seed=0), uniforms(keys, 3, seed=1)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    pairs = [(u[:, 0], u[:, 1]), (u[:, 0], other[:, 0]), (u[1:, 0], u[:-1, 0]), (u[:, 1], u[:, 2])]
    for a, b in pairs:
        assert abs(float(np.corrcoef(a.numpy(), b.numpy())[0, 1])) < 4 / 4000**0.5
    assert torch.equal(uniforms(keys[7:9], 2, seed=0), u[7:9, :2]), "of the example and the position alone"


def test_resampling_knows_neither_batch_nor_order(tmp_path: Path) -> None:
    task, params, encoded, ids = decoder(tmp_path)
    keys, order = hash_ids(ids, "labels"), np.random.default_rng(0).permutation(len(ids))
    whole = task.resample(params, encoded.inputs(np.arange(len(ids))), keys, 5)["targets"]
    mixed = task.resample(params, encoded.inputs(order), keys[order], 5)["targets"]
    assert torch.equal(mixed, whole[order])
    for row in range(len(ids)):
        alone = task.resample(params, encoded.inputs(np.array([row])), keys[row : row + 1], 5)
        size = encoded.sizes[row]
        assert torch.equal(alone["targets"][0, :size], whole[row, :size])
        assert torch.equal(alone["tokens"], encoded.inputs(np.array([row]))["tokens"]), "the context stays"
    assert not torch.equal(task.resample(params, encoded.inputs(order), keys[order], 6)["targets"], mixed)


def test_tokens_are_drawn_from_the_models_distribution(tmp_path: Path) -> None:
    """Many examples with one text: frequencies at the third position against the model's probabilities there."""
    task, params, encoded, ids = decoder(tmp_path)
    params = {n: 0.3 * p if n == "head.weight" else p for n, p in params.items()}
    inputs = {n: v.expand(600, *v.shape[1:]) for n, v in encoded.inputs(np.array([0])).items()}
    keys = hash_ids(encode_ids(f"{i}" for i in range(600)), "k")
    tokens = torch.cat([task.resample(params, inputs, keys, seed)["targets"][:, 2] for seed in range(10)])
    with torch.no_grad():
        logits = functional_call(task.module, params, (inputs["tokens"][:1],))[0, 2]
    want, counts = logits.softmax(dim=0), torch.bincount(tokens, minlength=280).double() / len(tokens)
    spread = (want * (1 - want) / len(tokens)).sqrt()
    assert float(((counts - want).abs() / spread)[want > 1e-3].max()) < 4.5
    assert float(counts[want < 1e-6].sum()) < 1e-3


def test_a_task_that_cannot_draw_says_so(tmp_path: Path) -> None:
    task, params, encoded, _ = decoder(tmp_path)
    with pytest.raises(InputError, match="cannot draw labels"):
        Task.resample(task, params, encoded.inputs(np.arange(2)), np.zeros(2, dtype=np.uint64), 0)
