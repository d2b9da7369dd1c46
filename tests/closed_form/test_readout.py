"""The readout that never holds its logits, against logits and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.numerics import readout, twice
from assay.numerics.readout import Readout

pytestmark = pytest.mark.usefixtures("one_thread")
D = torch.float64


def made(bias: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Readout, Tensor, Tensor, Tensor]:
    monkeypatch.setattr(readout, "CHUNK", 4)  # so that rows go over several chunks, the last of them short
    torch.manual_seed(0)
    layer = Readout.adopt(nn.Linear(5, 9, bias=bias).double())
    hidden, weights = torch.randn(2, 7, 5, dtype=D, requires_grad=True), torch.rand(2, 7, dtype=D)
    return layer, hidden, torch.randint(0, 9, (2, 7)), weights


def plain(layer: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(hidden, layer.weight, layer.bias)
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape), z


@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_slopes_in_chunks_equal_those_of_logits(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hidden, targets, weights = made(bias, monkeypatch)
    want, z = plain(layer, hidden, targets)
    slope, at_logits = torch.autograd.grad((want * weights).sum(), [hidden, z])
    layer.requires_grad_(False)
    got, kept = layer(hidden, targets, keep=lambda d: d[:, :4] * 2)
    (slope_got,) = torch.autograd.grad((got * weights).sum(), hidden)
    assert torch.allclose(got, want, rtol=0, atol=1e-14) and torch.allclose(slope_got, slope, rtol=0, atol=1e-14)
    assert torch.allclose(kept * weights[..., None], at_logits[..., :4] * 2, rtol=0, atol=1e-14)


def test_training_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hidden, targets, weights = made(True, monkeypatch)
    want = torch.autograd.grad((plain(layer, hidden, targets)[0] * weights).sum(), list(layer.parameters()))
    got = torch.autograd.grad((layer(hidden, targets) * weights).sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_transforms_go_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hidden, targets, _ = made(False, monkeypatch)
    layer.requires_grad_(False)
    rows = torch.func.vmap(torch.func.grad(lambda h, t: layer(h[None], t[None]).sum()))(hidden, targets)
    (want,) = torch.autograd.grad(plain(layer, hidden, targets)[0].sum(), hidden)
    assert torch.allclose(rows, want, rtol=0, atol=1e-14)


def test_adopting_shares_the_weights() -> None:
    linear = nn.Linear(3, 4)
    layer = Readout.adopt(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), linear(x))


def test_half_precision_sums_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the losses are those of float32 sums over logits of half precision."""
    layer, hidden, targets, _ = made(False, monkeypatch)
    layer, hidden = layer.float().requires_grad_(False), hidden.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(hidden, targets)
    z = (hidden.bfloat16() @ layer.weight.bfloat16().T).float()
    want = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view_as(got)
    assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=0, atol=1e-5)


def test_second_derivatives_are_refused_where_they_would_be_wrong() -> None:
    layer = Readout(3, 5).requires_grad_(False)
    hidden, targets = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.arange(4)
    with pytest.raises(AssertionError, match="no second derivatives"):
        torch.autograd.grad(layer(hidden, targets).sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("bias", "asked"),
    [(False, (0, 1)), (True, (0, 1, 2)), *((True, k) for k in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])],
)
def test_second_derivatives_are_those_of_plain_operations(bias: bool, asked: tuple[int, ...]) -> None:
    """Of one direction, and of several at once by vmap; with weights of the losses among what is differentiated, and
    where some slopes are not asked for, as with a frozen readout or one that alone is trained."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (5, 4), (5,), (6,))
    hidden, weight, offset, scale = (
        torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes
    )
    targets, own = torch.tensor([0, 4, 2, 2, 1, 3]), offset if bias else None
    inputs = [hidden, weight, *([offset] if bias else []), scale]
    rows = [torch.randn((3, *inputs[k].shape), generator=rng, dtype=torch.float64) for k in asked]
    found = []
    for loss in (
        twice.cross_entropy(hidden, weight, own, targets),
        F.cross_entropy(F.linear(hidden, weight, own), targets, reduction="none"),
    ):
        slopes = torch.autograd.grad(loss.exp().mul(scale).sum(), [inputs[k] for k in asked], create_graph=True)
        one = torch.autograd.grad(slopes, inputs, [r[0] for r in rows], retain_graph=True)
        several = torch.autograd.grad(slopes, inputs, rows, is_grads_batched=True)
        assert all(torch.allclose(a, b[0], rtol=1e-12, atol=1e-12) for a, b in zip(one, several, strict=True))
        found.append((loss, *slopes, *several))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*found, strict=True))
