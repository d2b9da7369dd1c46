"""Sketches: against dense matrices made from their own tables, their moments, and themselves given another way."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from assay.core.errors import InputError
from assay.core.method import Featurizer, make
from assay.core.task import Encoded, Inputs, Params, Task
from assay.features.gradients import _State
from assay.numerics.persample import audit, flatten, gradients, layout
from assay.numerics.project import Dense, Exact, Factored, Masked, Sketch, Sparse, signs, sketch
from helpers import language, text_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")

SKETCHES: dict[str, Callable[[int], Sketch]] = {
    "exact": lambda seed: Exact(),
    "factored": lambda seed: Factored(3, seed),
    "sparse": lambda seed: Sparse(10, seed),
    "sparse of 2": lambda seed: Sparse(10, seed, nonzeros=2),
    "masked": lambda seed: Masked(10, seed, side=4),
    "dense": lambda seed: Dense(10, seed),
}
each = pytest.mark.parametrize("kind", SKETCHES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(made: Sketch, name: str, *shape: int) -> Tensor:
    """The sketch of a parameter of this shape as a matrix `[width, entries]`: each column is that of a unit entry."""
    entries = int(np.prod(shape))
    return made.full(name, torch.eye(entries, dtype=torch.float64).view(entries, *shape)).T


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == want.shape, (got.shape, want.shape)
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max())), (got, want)


@each
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 9), (2, 9), (7, 3), (1, 1)])
def test_factors_and_formed_gradients_give_the_same_numbers(kind, outputs, inputs):
    made = SKETCHES[kind](3)
    d, a = normal(5, 4, outputs), normal(5, 4, inputs, seed=1)
    grad = torch.einsum("bto,bti->boi", d, a)
    want = made.full("w", grad)
    assert want.shape == (5, made.width("w", (outputs, inputs)))
    close(made.outer("w", d, a), want)
    close(made.merge("w", made.out("w", d), made.into("w", a)), want)
    close(want, grad.flatten(1) @ matrix(made, "w", outputs, inputs).T)
    if inputs % 3 == 0:  # further axes count as inputs
        close(made.full("w", grad.unflatten(2, (3, -1))), want)


@each
def test_lookups_are_gradients_of_embeddings(kind):
    made, entries = SKETCHES[kind](3), 9
    ids, d = torch.tensor([[0, 8, 8, 1], [3, 3, 3, 3], [7, 6, 5, 4]]), normal(3, 4, 6)
    grad = torch.zeros(3, entries, 6, dtype=torch.float64).index_put_((torch.arange(3)[:, None], ids), d, True)
    close(made.lookup("w", ids, d, entries), made.full("w", grad))
    for row in range(3):
        assert float(made.full("w", grad)[row].abs().max()) > 0 or kind == "masked", row


@each
def test_sketches_are_linear(kind):
    made, x, y = SKETCHES[kind](3), normal(2, 7, 9), normal(2, 7, 9, seed=1)
    close(made.full("w", 2.5 * x - y), 2.5 * made.full("w", x) - made.full("w", y))


@each
def test_sketches_are_unbiased_over_seeds(kind):
    """T-e10, for matrices and vectors, in one space where the parameters share it."""
    x = {"w": normal(1, 7, 9), "g": normal(1, 8, seed=1)}
    y = {"w": x["w"] + normal(1, 7, 9, seed=2), "g": x["g"] + normal(1, 8, seed=3)}
    want = sum(float((x[n] * y[n]).sum()) for n in x)
    draws = []
    for seed in range(1200):
        made = SKETCHES[kind](seed)
        u, v = (flatten({n: made.full(n, g) for n, g in grads.items()}, made)[0] for grads in (x, y))
        draws.append(float(u @ v))
    spread = np.std(draws) / len(draws) ** 0.5
    assert abs(np.mean(draws) - want) < max(3.5 * spread, 1e-9), (np.mean(draws), want, spread)


def products(make: Callable[[int], Sketch], x: Tensor, y: Tensor, draws: int = 3000) -> np.ndarray:
    both = torch.stack([x, y])
    rows = (make(seed).full("w", both) for seed in range(draws))
    return np.array([float(r[0] @ r[1]) for r in rows])


def holds(found: np.ndarray, mean: float, variance: float) -> None:
    """Mean within 3.5 standard errors, variance within 4 of its own (from the fourth moment)."""
    deviations = (found - found.mean()) ** 2
    assert abs(found.mean() - mean) < 3.5 * (variance / len(found)) ** 0.5, (found.mean(), mean)
    error = float(deviations.std()) / len(found) ** 0.5
    assert error < 0.15 * variance, "too few draws to tell"
    assert abs(deviations.mean() - variance) < 4 * error, (deviations.mean(), variance, error)


def achlioptas(x: Tensor, y: Tensor, k: int) -> float:
    return float(((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x * x * y * y).sum()) / k)


def test_dense_has_the_variance_of_random_signs():
    x, y = normal(30), normal(30, seed=1) + 0.5
    holds(products(lambda seed: Dense(10, seed), x, y), float(x @ y), achlioptas(x, y, 10))


@pytest.mark.parametrize("nonzeros", [1, 2])
def test_sparse_has_its_variance_whatever_the_nonzeros(nonzeros):
    size, x, y = 24, normal(47), normal(47, seed=1) + 0.5
    row = torch.arange(47) // Sparse(size, 0, nonzeros).row
    pairs = (torch.outer(x, y) + torch.outer(y, x)) ** 2 * (row[:, None] != row)
    variance = float(pairs.triu(1).sum()) / size
    assert 0.7 * achlioptas(x, y, size) < variance <= achlioptas(x, y, size)
    holds(products(lambda seed: Sparse(size, seed, nonzeros), x, y), float(x @ y), variance)


def kernel(n: int, rank: int) -> Tensor:
    """E[A_ab A_cd] for A = P^T P, `[n, n, n, n]`; the identity where the side is kept."""
    eye = torch.eye(n, dtype=torch.float64)
    whole = torch.einsum("ab,cd->abcd", eye, eye)
    if n <= rank:
        return whole
    crossed = torch.einsum("ac,bd->abcd", eye, eye) + torch.einsum("ad,bc->abcd", eye, eye)
    return whole + (crossed - 2 * torch.einsum("ab,bc,cd->abcd", eye, eye, eye)) / rank


@pytest.mark.parametrize("shape", [(6, 5), (3, 7)])
def test_factored_has_its_variance(shape):
    g, h = normal(*shape), normal(*shape, seed=1) + 0.5
    second = torch.einsum(
        "abcd,jlmn,aj,bl,cm,dn->", kernel(shape[0], 4), kernel(shape[1], 4), g, h, g, h
    )  # fmt: skip
    mean = float((g * h).sum())
    holds(products(lambda seed: Factored(4, seed), g, h), mean, float(second) - mean**2)


def test_factored_has_the_stated_variance_for_one_outer_product():
    u, v, rank = normal(6), normal(5, seed=1), 4
    u, v = u / u.norm(), v / v.norm()
    variance = float((1 + 2 * (1 - (u**4).sum()) / rank) * (1 + 2 * (1 - (v**4).sum()) / rank)) - 1
    g = torch.outer(u, v)
    holds(products(lambda seed: Factored(rank, seed), g, g, 8000), 1.0, variance)


def masks(u: Tensor, v: Tensor, side: int) -> Tensor:
    """E[sum over kept of U, times that of V], scaled to be unbiased, for masks of `side` rows and `side` columns."""
    once, twice = [], []
    for n in u.shape:
        once.append(min(1.0, side / n))
        twice.append(1.0 if n <= side else side * (side - 1) / (n * (n - 1)))
    (p, q), (pp, qq) = once, twice
    rows, columns = (u.sum(1) * v.sum(1)).sum(), (u.sum(0) * v.sum(0)).sum()
    both = pp * qq * u.sum() * v.sum() + (p - pp) * qq * rows + pp * (q - qq) * columns
    return (both + (p - pp) * (q - qq) * (u * v).sum()) / (p * q) ** 2


@pytest.mark.parametrize("shape", [(6, 5), (3, 7)])
def test_masked_has_its_variance(shape):
    """With one number kept all entries stand in rows of their own, and the bound on what the sketch adds is met."""
    side, size = 4, 1
    g, h = normal(*shape), normal(*shape, seed=1) + 0.5
    u, mean = g * h, float((g * h).sum())
    chosen = float(masks(u, u, side)) - mean**2
    share = min(1.0, side / shape[0]) * min(1.0, side / shape[1])
    added = float(masks(g * g, h * h, side) + masks(u, u, side) - 2 * (u * u).sum() / share) / size
    assert chosen > 0 and added > 0
    holds(products(lambda seed: Masked(size, seed, side=side), g, h, 5000), mean, chosen + added)
    # Where the block is one row, nothing meets and the masks alone are left.
    holds(products(lambda seed: Masked(64, seed, side=side), g, h), mean, chosen)


@pytest.mark.parametrize("side", [5, 64])
def test_kept_sides_are_exact(side):
    """T-e9: what is no larger than the rank, or orthonormal and square, loses nothing."""
    g, h = normal(1, 5, 5), normal(1, 5, 5, seed=1)
    want = float((g * h).sum())
    for made in (Factored(side, 0), Exact()):
        assert abs(float(made.full("w", g)[0] @ made.full("w", h)[0]) - want) < 1e-12
    turned = Factored(2, 0)
    turned.side = lambda name, side, size, like: torch.linalg.qr(normal(5, 5, seed=len(side)))[0]
    assert abs(float(turned.full("w", g)[0] @ turned.full("w", h)[0]) - want) < 1e-12
    assert abs(float(turned.outer("w", g, h)[0] @ turned.outer("w", g, h)[0]) - float((g.mT @ h).square().sum())) < 1e-9
    # Nothing is masked, and one row meets nothing: no error either.
    masked = Masked(100, 0, side=side)
    assert abs(float(masked.full("w", g)[0] @ masked.full("w", h)[0]) - want) < 1e-12


def decoder(tmp_path) -> tuple[Task, Encoded, dict[str, Tensor]]:
    task, encoded = language(text_pool(6), tmp_path)
    return task, encoded, wide(task)


ENGINE = {k: v for k, v in SKETCHES.items() if k != "exact"} | {"sparse": lambda seed: Sparse(96, seed)}


@pytest.mark.parametrize("kind", ENGINE)
def test_engine_gives_sketches_of_the_exact_gradients_for_any_batch_and_order(kind, tmp_path):
    """T-e12: batches, their order and the order of examples change nothing; the whole is the sum over parameters."""
    task, encoded, params = decoder(tmp_path)
    made = ENGINE[kind](3)

    def rows_of(*rows: int, through: Sketch | None = None) -> dict[str, Tensor]:
        through = through or ENGINE[kind](3)  # another object: nothing is learnt from what was seen before
        return gradients(task.module, task.loss, params, encoded.inputs(np.array(rows)), through)[0]

    exact = rows_of(*range(6), through=Exact())
    parts = {n: made.full(n, g.view(6, *params[n].shape)) for n, g in exact.items()}
    got = rows_of(*range(6))
    for name in parts:
        close(got[name], parts[name], 1e-10)
    whole = flatten(got, made)
    assert whole.shape[1] == sum(w for _, w in layout(task.module, made))
    if made.together:
        close(whole, torch.stack(list(parts.values())).sum(0), 1e-10)
        assert layout(task.module, made) == [("all", made.width("", ()))]
    close(torch.cat([flatten(rows_of(5, 1, 3), made), flatten(rows_of(4), made)]), whole[[5, 1, 3, 4]], 1e-10)
    report = audit(task.module, task.loss, params, encoded.inputs(np.arange(3)), made)
    assert report.error < 1e-9 and report.fallback == ()


@each
def test_uses_of_a_shared_parameter_add_up(kind):
    """An embedding tied to the readout: a lookup and an outer product go into one sketch."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.token.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.token(tokens)))

    module, tokens = Tied().double(), torch.tensor([[0, 4, 4], [10, 1, 6]])
    params, made = {"token.weight": normal(11, 6)}, SKETCHES[kind](3)

    def loss(params: Params, batch: Inputs) -> Tensor:
        logits = functional_call(module, dict(params), (batch["x"],))
        return logits.logsumexp(dim=2).sum(dim=1) - logits[..., 2].sum(dim=1)

    exact, got = (gradients(module, loss, params, {"x": tokens}, s)[0]["token.weight"] for s in (Exact(), made))
    close(got, made.full("token.weight", exact.view(2, 11, 6)))


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"projection": "sparse", "size": 96}, Sparse(96, 5)),
        ({"projection": "masked", "size": 100}, Masked(100, 5, side=20)),
        ({"projection": "dense", "size": 64}, Dense(64, 5)),
        ({"projection": "factored", "rank": 3}, Factored(3, 5)),
        ({"projection": "exact"}, Exact()),
        ({}, Factored(16, 5)),
    ],
)
def test_the_featurizer_takes_the_sketch_that_its_options_name(options, want, tmp_path):
    task, encoded, params = decoder(tmp_path)
    feature = make(Featurizer, {"name": "gradients", "seed": 5, **options})
    state = _State(task, params, feature.sketch(), feature.names(task), frozenset(), {})  # type: ignore[attr-defined]
    batch = SimpleNamespace(inputs=encoded.inputs(np.arange(4)))
    rows = feature.featurize(state, batch)  # type: ignore[arg-type]
    close(rows, flatten(gradients(task.module, task.loss, params, batch.inputs, want)[0], want))
    names = feature.columns(state)
    assert len(names) == rows.shape[1] == len(set(names))


@pytest.mark.parametrize(
    "options",
    [{"projection": "sparse", "rank": 4}, {"projection": "factored", "size": 64}, {"projection": "exact", "size": 64}],
)
def test_an_option_of_another_sketch_is_refused(options):
    feature = make(Featurizer, {"name": "gradients", **options})
    with pytest.raises(InputError, match="has no effect"):
        feature.sketch()  # type: ignore[attr-defined]


def test_formed_gradients_are_made_a_few_at_a_time(monkeypatch):
    made, d, a = Sparse(10, 3), normal(5, 4, 7), normal(5, 4, 9, seed=1)
    want = made.outer("w", d, a)
    monkeypatch.setattr("assay.numerics.project.FORMED", 130)
    close(made.outer("w", d, a), want)
    close(Dense(10, 3).full("w", normal(2, 40)), normal(2, 40) @ matrix(Dense(10, 3), "w", 40).T)


def splitmix64(x: int) -> int:
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


GOLDEN = """
import torch
from assay.numerics.project import sketch
x = torch.arange(1, 41, dtype=torch.float64).view(1, 5, 8)
for kind, size in (("factored", 2), ("sparse", 8), ("masked", 4), ("dense", 6)):
    print(kind, [round(v, 6) for v in sketch(kind, size, 11).full("head.weight", x)[0].tolist()])
"""


def test_tables_are_hashes_and_the_same_in_every_process():
    import xxhash

    def key(label: str) -> int:
        return xxhash.xxh3_64_intdigest(label.encode())

    row = signs(np.arange(2, dtype=np.uint64), seed=11, label="w/sign/0").tolist()
    by_hand = [1 if splitmix64(key("11/w/sign/0") ^ (i // 64)) >> (i % 64) & 1 else -1 for i in range(128)]
    assert row == by_hand
    assert Sparse(8, 11).starts("w", 0, 13) == [splitmix64(key("11/w/start/0") ^ i) % 8 for i in range(7)]
    hashes = [splitmix64(key("11/w/mask/out") ^ i) for i in range(9)]
    kept = Masked(6, 11, side=4).kept("w", "out", 9, torch.zeros(1))
    assert kept is not None and kept.tolist() == sorted(sorted(range(9), key=lambda i: hashes[i])[:4])
    piece = Dense(70, 11).piece("w", 3, 5)
    cells = [[splitmix64(key("11/w/dense") ^ (c << 32 | r // 64)) >> (r % 64) & 1 for r in range(70)] for c in (3, 4)]
    assert ((piece + 1) // 2).tolist() == cells
    out = subprocess.run([sys.executable, "-c", GOLDEN], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == STORED, "stored features no longer match new ones"


STORED = [
    "factored [-5.0, 6.0, -11.0, 25.999999]",
    "sparse [-83.0, 88.0, 34.0, -11.0, 19.0, 38.0, -31.0, -6.0]",
    "masked [-42.690748, 23.717082, 9.486833, 107.51744]",
    "dense [-15.513435, -69.402209, 108.594045, 29.393877, -24.494897, -45.723809]",
]


def test_sketches_of_names_and_their_travel():
    assert isinstance(sketch("factored", 0, 0), Exact) and isinstance(sketch("exact", 5, 0), Exact)
    x = normal(2, 50, 60)
    for kind, cls in (("factored", Factored), ("sparse", Sparse), ("masked", Masked), ("dense", Dense)):
        made = sketch(kind, 16, 9)
        assert type(made) is cls
        before = made.full("w", x)
        data = pickle.dumps(made)
        assert len(data) < 400, f"{kind}: {len(data)} bytes"
        assert torch.equal(pickle.loads(data).full("w", x), before), kind
        for other in (sketch(kind, 16, 8).full("w", x), made.full("v", x)):
            assert not torch.equal(other, before), f"{kind}: the seed or the name does not matter"
    masked = sketch("masked", 4096, 0)
    assert isinstance(masked, Masked) and masked.side == 128
    with pytest.raises(AssertionError, match="equal parts"):
        Sparse(10, 0, nonzeros=3)
    # One table for each type, and float32 is float64 rounded: nothing random depends on the type.
    sparse = Sparse(16, 1)
    assert torch.allclose(sparse.full("w", x.float()).double(), sparse.full("w", x), atol=1e-4)
    assert len(sparse._held) == 3, "signs in two types, starts in whole numbers"
