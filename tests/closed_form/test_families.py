"""Per-example gradients of other people's models against one backward an example, in float64 and mixed lengths."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from assay.core.task import Inputs, Params
from assay.numerics.ghost import products
from assay.numerics.persample import audit, covered, gradients, trainable
from assay.numerics.project import Exact, Factored, Sketch
from helpers import language, text_pool, wide

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'assay-data[hf]'")
pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (9, 4, 7, 2, 9)
Made = tuple[nn.Module, Callable[[Params, Inputs], Tensor], dict[str, Tensor], dict[str, Tensor]]


def values(module: nn.Module) -> dict[str, Tensor]:
    """Parameters moved from their start, so that no gain is one, no bias zero, no pair of layers alike."""
    rng = torch.Generator().manual_seed(3)
    return {
        n: p.detach().double() + 0.1 * torch.randn(p.shape, generator=rng, dtype=torch.float64)
        for n, p in module.named_parameters()
    }


def causal(config: Any) -> Made:
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()

    def loss(params: Params, batch: Inputs) -> Tensor:
        options = {"input_ids": batch["tokens"], "attention_mask": batch["mask"].long(), "use_cache": False}
        logits = functional_call(module, dict(params), (), options).logits
        nll = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none").view_as(batch["mask"])
        return (nll * batch["mask"]).sum(1) / batch["mask"].sum(1)

    rng = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(0, 40, (len(LENGTHS), max(LENGTHS)), generator=rng) for _ in range(2))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).double()
    return module, loss, values(module), {"tokens": tokens, "targets": targets, "mask": mask}


def gpt2() -> Made:
    """Learned positions shared by all rows, Conv1D with fused qkv, LayerNorm with biases, tied readout."""
    return causal(transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=3))


def llama(**options: Any) -> Made:
    """Grouped queries, rotary positions, gated MLP, an RMSNorm of its own, untied readout."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return causal(transformers.LlamaConfig(**sizes, **heads, **options))


def tied_llama() -> Made:
    return llama(tie_word_embeddings=True, attention_bias=True)


def bert() -> Made:
    """Bidirectional attention under a mask, token types and positions of one row, a pooler."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.AutoModelForSequenceClassification.from_config(config).double().eval()

    def loss(params: Params, batch: Inputs) -> Tensor:
        options = {"input_ids": batch["tokens"], "attention_mask": batch["mask"].long()}
        logits = functional_call(module, dict(params), (), options).logits
        return F.cross_entropy(logits, batch["y"], reduction="none")

    made = gpt2()[3]
    return module, loss, values(module), {"tokens": made["tokens"], "mask": made["mask"], "y": torch.arange(5) % 3}


def images(module: nn.Module, size: int) -> Made:
    module = module.double().eval()

    def loss(params: Params, batch: Inputs) -> Tensor:
        out = functional_call(module, dict(params), (batch["x"],))
        return F.cross_entropy(getattr(out, "logits", out), batch["y"], reduction="none")

    rng = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, size, size, generator=rng, dtype=torch.float64)
    return module, loss, values(module), {"x": x, "y": torch.arange(4) % 3}


def vit() -> Made:
    """Patches by convolution; the class token and the positions are parameters outside of any layer."""
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return images(transformers.ViTForImageClassification(config), 8)


def resnet() -> Made:
    """Convolutions with strides, batch norm with running statistics, residual sums, average pooling."""
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[6, 8], depths=[1, 2], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    made = images(transformers.ResNetForImageClassification(config), 16)
    for m in made[0].modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return made


class Odd(nn.Module):
    """Grouped and dilated convolutions of both kinds, 'same' padding, group norm, in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 3, padding="same", dilation=2)
        self.groups = nn.Conv2d(6, 9, (3, 2), groups=3, stride=(2, 1), padding=(1, 0))
        self.norm, self.act = nn.GroupNorm(3, 9), nn.ReLU(inplace=True)
        self.line, self.deep = nn.Conv1d(9, 6, 3, padding=1, groups=3), nn.Conv1d(6, 6, 2, groups=6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.wide(x))
        x = torch.tanh(self.norm(self.groups(x))).flatten(2)
        x = self.line(x)
        x.mul_(0.5)
        return self.out(self.deep(x).mean(dim=2))


def odd() -> Made:
    torch.manual_seed(0)
    return images(Odd(), 8)


def lora() -> Made:
    """Adapters on a frozen model: only their factors count."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'assay-data[hf]'")
    module, *_ = llama()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between the two libraries
        module = peft.get_peft_model(module, config).double().eval()  # type: ignore[arg-type]
    _, _, _, inputs = llama()

    def loss(params: Params, batch: Inputs) -> Tensor:
        options = {"input_ids": batch["tokens"], "attention_mask": batch["mask"].long(), "use_cache": False}
        logits = functional_call(module, dict(params), (), options).logits
        nll = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none").view_as(batch["mask"])
        return (nll * batch["mask"]).sum(1) / batch["mask"].sum(1)

    return module, loss, values(module), inputs


FAMILIES = [gpt2, llama, tied_llama, bert, vit, resnet, odd, lora]


def one_by_one(made: Made) -> dict[str, Tensor]:
    module, loss, params, inputs = made
    names = list(trainable(module))
    rows = []
    for i in range(len(next(iter(inputs.values())))):
        leaves = {n: params[n].clone().requires_grad_() for n in names}
        one = loss({**params, **leaves}, {k: v[i : i + 1] for k, v in inputs.items()}).sum()
        rows.append(torch.autograd.grad(one, list(leaves.values()), materialize_grads=True))
    return {n: torch.stack(g) for n, g in zip(names, zip(*rows, strict=True), strict=True)}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want), set(got) ^ set(want)
    largest = max(float(g.abs().max()) for g in want.values())
    for name, truth in want.items():
        gap = float((got[name] - truth.flatten(1)).abs().max())
        assert gap <= 1e-10 * max(1.0, largest), f"{name}: off by {gap:.1e}"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_every_row_equals_its_own_backward(family: Callable[[], Made]) -> None:
    made = family()
    module, loss, params, inputs = made
    want = one_by_one(made)
    assert min(float(g.abs().amax()) for g in want.values()) > 0 or family in (bert, gpt2, vit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap's own, about what it cannot vectorise
        found = audit(module, loss, params, inputs, Exact())
        got, losses = gradients(module, loss, params, inputs, fallback=set(found.fallback))
        same(got, want)
        assert torch.allclose(losses, loss(params, inputs).detach(), rtol=0, atol=1e-12)
        sketch = Factored(3, 1)
        narrow, _ = gradients(module, loss, params, inputs, sketch, fallback=set(found.fallback))
        same(narrow, {n: sketch.full(n, g) for n, g in want.items()})
    assert found.share == pytest.approx(1.0) and found.error < 1e-9
    slow = {"vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}}.get(family.__name__, set())
    assert set(found.fallback) == slow, "rules should do for all others"


def test_padding_of_every_family_contributes_nothing() -> None:
    for family in (gpt2, llama, bert):
        module, loss, params, inputs = family()
        together, _ = gradients(module, loss, params, inputs)
        short = {k: v[3:4, : LENGTHS[3]] if v.dim() > 1 else v[3:4] for k, v in inputs.items()}
        alone, _ = gradients(module, loss, params, short)
        for name, rows in alone.items():
            gap = float((together[name][3:4] - rows).abs().max())
            assert gap < 1e-12, f"{family.__name__} {name}: {gap:.1e}"


class Outside(nn.Module):
    """A weight that is used by its layer and once more outside of it, and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.gate) @ self.inner.weight


def test_the_audit_finds_uses_that_no_hook_sees() -> None:
    module = Outside().double()
    inputs = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}

    def loss(params: Params, batch: Inputs) -> Tensor:
        return functional_call(module, dict(params), (batch["x"],)).square().sum(dim=1)

    made = module, loss, values(module), inputs
    assert covered(module) == {"inner.weight", "inner.bias"}, "by its layers alone it looks covered"
    found = audit(module, loss, made[2], inputs, Factored(2, 0))
    assert found.fallback == ("gate", "inner.weight")
    got, _ = gradients(module, loss, made[2], inputs, fallback=set(found.fallback))
    same(got, one_by_one(made))


def test_the_share_is_that_of_the_squared_norm() -> None:
    module, loss, params, inputs = gpt2()
    only = {n for n in trainable(module) if "mlp" in n}
    want = {n: float(g.square().sum()) for n, g in one_by_one((module, loss, params, inputs)).items()}
    found = audit(module, loss, params, inputs, Exact(), only=only)
    assert found.share == pytest.approx(sum(want[n] for n in only) / sum(want.values()), rel=1e-10)


def test_rows_that_are_not_examples_fall_back() -> None:
    """A layer that sees all tokens of the batch as one list has no row for each example."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)).flatten(0, 1)).view(*x.shape[:2], 2)

    module = Flat().double()
    inputs = {"x": torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}

    def loss(params: Params, batch: Inputs) -> Tensor:
        return functional_call(module, dict(params), (batch["x"],)).square().sum(dim=(1, 2))

    made = module, loss, values(module), inputs
    got, _ = gradients(module, loss, made[2], inputs)
    same(got, one_by_one(made))


def scaled(made: Made, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A metric of each form, and the gradients in it."""
    rng = torch.Generator().manual_seed(9)
    metric: dict[str, Any] = {}
    want = {}
    for name, grad in one_by_one(made).items():
        shape = grad.shape[1:]
        if kind == "full" or len(shape) < 2:
            metric[name] = torch.rand(shape, generator=rng, dtype=torch.float64) + 0.5
            want[name] = grad * metric[name]
        else:
            r, c = (torch.rand(s, generator=rng, dtype=torch.float64) + 0.5 for s in (shape[0], shape[1:].numel()))
            metric[name] = r, c
            want[name] = (grad.flatten(2) * torch.outer(r, c)).view_as(grad)
    return metric, want


@pytest.mark.parametrize("kind", ["full", "rank one"])
@pytest.mark.parametrize("family", [gpt2, llama, odd], ids=lambda f: f.__name__)
def test_metrics_multiply_gradients_entry_by_entry(family: Callable[[], Made], kind: str) -> None:
    made = family()
    module, loss, params, inputs = made
    metric, want = scaled(made, kind)
    sketches: list[Sketch] = [Exact(), Factored(3, 4)]
    for sketch in sketches:
        got, _ = gradients(module, loss, params, inputs, sketch, metric=metric)
        same(got, {n: sketch.full(n, g) for n, g in want.items()})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_ghost_products_equal_explicit_dots(family: Callable[[], Made]) -> None:
    """Against other examples' gradients, of other lengths, and a random direction."""
    made = family()
    module, loss, params, inputs = made
    rows = one_by_one(made)
    rng = torch.Generator().manual_seed(4)
    drawn = {n: torch.randn(g.shape[1:], generator=rng, dtype=torch.float64) for n, g in rows.items()}
    directions = [{n: g[1] for n, g in rows.items()}, {n: g[3] for n, g in rows.items()}, drawn]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = products(module, loss, params, inputs, directions)
    dots = [torch.stack([(g * d[n]).flatten(1).sum(1) for n, g in rows.items()]).sum(0) for d in directions]
    want = torch.stack(dots, dim=1)
    assert float((got - want).abs().max()) <= 1e-10 * float(want.abs().max())


def test_ghost_products_through_the_readout_that_holds_no_logits(tmp_path: Any) -> None:
    task, encoded = language(text_pool(6), tmp_path)
    params, inputs = wide(task), encoded.inputs(torch.arange(6).numpy())
    exact, _ = gradients(task.module, task.loss, params, inputs)
    direction = {n: exact[n][2].view(p.shape) for n, p in params.items()}
    got = products(task.module, task.loss, params, inputs, [direction])[:, 0]
    want = sum(exact[n] @ exact[n][2] for n in exact)
    assert torch.allclose(got, torch.as_tensor(want), rtol=1e-12, atol=0)
    half = products(task.module, task.loss, params, inputs, [{"head.weight": direction["head.weight"]}])[:, 0]
    assert torch.allclose(half, exact["head.weight"] @ exact["head.weight"][2], rtol=1e-12, atol=0)
