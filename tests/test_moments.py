"""Moments reach the weights they belong to, whoever wrote them and in whatever order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from assay.core.errors import InputError
from assay.core.selection import Selection
from assay.train import loop
from assay.train.models import init_params
from assay.train.moments import agreement, estimate_moments, load_moments
from assay.train.recipe import Recipe
from helpers import classifier, language, text_pool, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")
Named = dict[str, dict[str, Tensor]]


class Small(nn.Module):
    """A tied readout, norms, biases, and two layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.a, self.b, self.final_norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.RMSNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.final_norm(self.b(F.gelu(self.a(self.norm(self.token(ids)))))))


def stepped(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 3) -> Named:
    """Train a little; the optimiser's own state of each parameter, by the model's names: the truth."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(0, 7, (16,), generator=rng)
        out = model(ids)
        out = out if isinstance(out, Tensor) else out.logits
        optimiser.zero_grad()
        F.cross_entropy(out.flatten(0, -2), ids.flatten().flip(0)).backward()
        optimiser.step()
    return {n: dict(optimiser.state.get(p, {})) for n, p in model.named_parameters() if p.requires_grad}


def same(found: Any, truth: Named, slots: dict[str, str]) -> None:
    assert set(found.state) == set(slots)
    for slot, theirs in slots.items():
        assert list(found.state[slot]) == list(truth), "names, in the model's order"
        assert len({float(t.double().sum()) for t in found.state[slot].values()}) == len(truth), "the test tells apart"
        for name, entry in truth.items():
            assert torch.equal(found.state[slot][name], entry[theirs]), name


ADAM = {"mean": "exp_avg", "square": "exp_avg_sq"}


def trainer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decayed first, as a Trainer has it."""
    norms = [n for n, _ in model.named_parameters() if "norm" in n or "bias" in n]
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if n not in norms], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n in norms], "weight_decay": 0.0},
    ]


def grouped(model: nn.Module, how: str) -> Any:
    if how == "plain":
        return model.parameters()
    if how == "named":  # in an order that only the names tell
        return list(model.named_parameters())[::-1]
    groups = trainer_groups(model)
    if how == "vectors first":
        return groups[::-1]
    return groups


@pytest.mark.parametrize("how", ["plain", "named", "trainer", "vectors first"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_torch(how: str, kind: Any, tmp_path: Path) -> None:
    model = Small()
    optimiser = kind(grouped(model, how), lr=1e-2)
    truth = stepped(model, optimiser)
    torch.save(optimiser.state_dict(), tmp_path / "optimizer.pt")
    for path in (tmp_path, tmp_path / "optimizer.pt"):
        found = load_moments(path, Small())
        same(found, truth, ADAM)
        assert found.steps == 3


def test_momentum(tmp_path: Path) -> None:
    model = Small()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    truth = stepped(model, optimiser)
    torch.save({"optimizer": optimiser.state_dict()}, tmp_path / "x.pt")
    same(load_moments(tmp_path / "x.pt", Small()), truth, {"momentum": "momentum_buffer"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trainer_of_transformers(family: str, tmp_path: Path) -> None:
    """The optimiser that its own Trainer makes, with its own groups."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'assay-data[hf]'")
    sizes = {"vocab_size": 7, "bos_token_id": 0, "eos_token_id": 0}
    if family == "llama":
        config = transformers.LlamaConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, **sizes
        )
    else:
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, weight_decay=0.1)
    trainer = transformers.Trainer(model=model, args=arguments)
    optimiser = trainer.create_optimizer()
    assert len(optimiser.param_groups) == 2
    wrapped = _Rows(model)
    truth = {n.removeprefix("inner."): entry for n, entry in stepped(wrapped, optimiser).items()}
    torch.save(optimiser.state_dict(), tmp_path / "optimizer.pt")
    same(load_moments(tmp_path, transformers.AutoModelForCausalLM.from_config(config)), truth, ADAM)


class _Rows(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(input_ids=ids[None]).logits[0]


def test_frozen_parameters_have_no_moments(tmp_path: Path) -> None:
    """An adapter's optimiser holds the adapter's parameters only, or all with the frozen ones left empty."""
    for pick in (lambda m: [p for p in m.parameters() if p.requires_grad], lambda m: list(m.parameters())):
        model = Small()
        model.b.requires_grad_(False)
        model.token.requires_grad_(False)
        optimiser = torch.optim.AdamW(pick(model), lr=1e-2)
        truth = stepped(model, optimiser)
        torch.save(optimiser.state_dict(), tmp_path / "o.pt")
        found = load_moments(tmp_path / "o.pt", model)
        same(found, truth, ADAM)
        assert "b.weight" not in found.state["mean"] and "a.weight" in found.state["mean"]


def test_a_parameter_without_gradient_has_zeros(tmp_path: Path) -> None:
    class Unused(Small):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 2)

    model = Unused()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stepped(model, optimiser)
    torch.save(optimiser.state_dict(), tmp_path / "o.pt")
    found = load_moments(tmp_path / "o.pt", model)
    assert not found.state["square"]["spare.weight"].any() and found.state["square"]["a.weight"].all()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_states_by_name(prefix: str, tmp_path: Path) -> None:
    """As FSDP gathers them, and as flat tensors."""
    model = Small()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    truth = stepped(model, optimiser)
    shuffled = {prefix + n: truth[n] for n in sorted(truth, reverse=True)}
    if prefix == "_fsdp_wrapped_module.":  # wraps layers too, and knows the readout by its other name
        shuffled["_fsdp_wrapped_module.a._fsdp_wrapped_module.weight"] = shuffled.pop(prefix + "a.weight")
        shuffled["_fsdp_wrapped_module.head.weight"] = shuffled.pop(prefix + "token.weight")
    groups = [{"params": list(shuffled), "lr": 0.1}]
    torch.save({"state": shuffled, "param_groups": groups}, tmp_path / "full.pt")
    found = load_moments(tmp_path / "full.pt", Small())
    same(found, truth, ADAM)
    assert found.steps == 3
    for style in ("{slot}.{name}", "{name}.{slot}", "optim.{slot}.{name}"):
        flat = {
            style.format(slot=slot, name=name): value.contiguous()
            for name, entry in shuffled.items() for slot, value in entry.items()
        }  # fmt: skip
        save_file({k: v.clone() for k, v in flat.items()}, tmp_path / "flat.safetensors")
        found = load_moments(tmp_path / "flat.safetensors", Small())
        same(found, truth, ADAM)
        assert found.steps == 3


def test_our_own_checkpoints(tmp_path: Path) -> None:
    pool = text_pool(20)
    task, encoded = language(pool, tmp_path / "e")
    selection = Selection(pool.ids, np.ones(20))
    for optimiser, slots in (("adamw", {"mean", "square"}), ("momentum", {"momentum"})):
        recipe = Recipe(steps=4, terms_per_step=100, optimiser=optimiser, lr=1e-3)  # type: ignore[arg-type]
        trained = loop.train(task, encoded, np.arange(20), selection, recipe, tmp_path / optimiser)
        found = load_moments(tmp_path / optimiser, task.module)
        assert found.steps == 4 and set(found.state) == slots
        for slot, named in trained.state.items():
            assert all(torch.equal(found.state[slot][n], t) for n, t in named.items()), slot
    trained = loop.train(task, encoded, np.arange(20), selection, Recipe(steps=2, optimiser="sgd"), tmp_path / "sgd")
    with pytest.raises(InputError, match="no moments"):
        load_moments(tmp_path / "sgd", task.module)


# What is refused.


def saved(tmp_path: Path, model: nn.Module, groups: Any) -> Path:
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    stepped(model, optimiser)
    torch.save(optimiser.state_dict(), tmp_path / "o.pt")
    return tmp_path / "o.pt"


def test_positions_that_do_not_fit(tmp_path: Path) -> None:
    model = Small()
    parameters = list(model.parameters())
    with pytest.raises(InputError, match=r"(?s)keyed by position, in groups of 8,.*no order.*named_parameters"):
        load_moments(saved(tmp_path, model, parameters[::-1]), Small())
    with pytest.raises(InputError, match="in groups of 3, and no order"):
        load_moments(saved(tmp_path, model, parameters[:3]), Small())
    with pytest.raises(InputError, match=r"in groups of 3 \+ 5, and no order"):
        load_moments(saved(tmp_path, model, [{"params": parameters[:3]}, {"params": parameters[3:]}]), Small())


def test_positions_that_fit_in_two_ways(tmp_path: Path) -> None:
    """A matrix and a vector without state, neither decayed: either may come first."""
    model = nn.Linear(3, 3)
    both = {"state": {}, "param_groups": [{"params": [0], "weight_decay": 0.0}, {"params": [1], "weight_decay": 0.0}]}
    torch.save(both, tmp_path / "q.pt")
    with pytest.raises(InputError, match="2 order"):
        load_moments(tmp_path / "q.pt", model)


def test_bad_files(tmp_path: Path) -> None:
    model = Small()
    file = saved(tmp_path, model, list(model.named_parameters()))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="unreadable optimiser state"):
        load_moments(file, model)
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    file.write_bytes(pickle.dumps({"state": Evil()}))
    with pytest.raises(InputError, match="unreadable optimiser state"):
        load_moments(file, model)
    assert not (tmp_path / "ran").exists()
    for content in ({}, [1], {"state": 3}, {"model": {}}):
        torch.save(content, file)
        with pytest.raises(InputError, match="no optimiser state in this file"):
            load_moments(file, model)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="unreadable"):
        load_moments(tmp_path / "x.safetensors", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no optimiser state in this folder"):
        load_moments(tmp_path / "empty", model)
    (tmp_path / "empty" / "__0_0.distcp").touch()
    with pytest.raises(InputError, match=r"(?s)sharded.*dcp_to_torch"):
        load_moments(tmp_path / "empty", model)
    with pytest.raises(InputError, match="no such"):
        load_moments(tmp_path / "none", model)


def test_bad_names_and_shapes(tmp_path: Path) -> None:
    model = Small()
    truth = stepped(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def load(state: dict[str, Any]) -> None:
        torch.save({"state": state}, tmp_path / "o.pt")
        load_moments(tmp_path / "o.pt", model)

    load(truth)
    with pytest.raises(InputError, match=r"(?s)no moments of parameter 'a.weight'.*did you mean 'b.weight'"):
        load({n: e for n, e in truth.items() if n != "a.weight"})
    with pytest.raises(InputError, match=r"(?s)no parameter 'a.weights'.*did you mean 'a.weight'"):
        load({**truth, "a.weights": truth["a.weight"]})
    with pytest.raises(InputError, match=r"(?s)of 'a.bias' has shape \(5,\).*has \(4,\)"):
        load({**truth, "a.bias": {k: torch.zeros(5) for k in ("exp_avg", "exp_avg_sq")}})
    with pytest.raises(InputError, match="'a.bias' has no 'square'"):
        load({**truth, "a.bias": {"exp_avg": torch.zeros(4)}})
    for wrong in (float("nan"), -1.0):
        with pytest.raises(InputError, match="numbers that cannot be"):
            load({**truth, "a.bias": {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.full((4,), wrong)}})
    with pytest.raises(InputError, match=r"(?s)no moments that are known.*state1"):
        load({n: {"state1": torch.zeros(4, dtype=torch.uint8)} for n in truth})
    save_file({"gibberish": torch.zeros(1)}, tmp_path / "o.safetensors")
    with pytest.raises(InputError, match="what is tensor 'gibberish'"):
        load_moments(tmp_path / "o.safetensors", model)


# Estimates.


def test_estimates_are_averages_of_gradients(tmp_path: Path) -> None:
    pool = vector_pool(12)
    task, encoded = classifier(pool, tmp_path, hidden=(4,))
    params, rows = init_params(task.module, 0, torch.float64), np.arange(12)
    found = estimate_moments(task, params, encoded, rows, pool.ids, terms_per_step=4, steps=6)
    recipe = Recipe(steps=6, terms_per_step=4, seed=0)
    grads = [
        loop.gradient(task, params, encoded, batch, np.ones(len(batch)), 4)[0]
        for batch in loop.steps(recipe, Selection(pool.ids, np.ones(12)), encoded.sizes)
    ]
    assert len(grads) == 6 and found.steps is None
    for index, name in enumerate(params):
        g = torch.stack([grad[index] for grad in grads])
        assert torch.allclose(found.state["square"][name], g.square().mean(dim=0), rtol=1e-12, atol=0)
        assert torch.allclose(found.state["mean"][name], g.mean(dim=0), rtol=1e-9, atol=1e-15)
    again = estimate_moments(task, params, encoded, rows[::-1], pool.ids[::-1], terms_per_step=4, steps=6)
    other = estimate_moments(task, params, encoded, rows, pool.ids, terms_per_step=4, steps=6, seed=1)
    for name in params:
        assert torch.allclose(again.state["square"][name], found.state["square"][name], rtol=1e-9), "order of rows"
        assert not torch.equal(other.state["square"][name], found.state["square"][name])


def test_agreement_tells_names_that_were_swapped(tmp_path: Path) -> None:
    pool = text_pool(40)
    task, encoded = language(pool, tmp_path / "e")
    selection, rows = Selection(pool.ids, np.ones(40)), np.arange(40)
    recipe = Recipe(steps=30, terms_per_step=150, lr=1e-4)
    trained = loop.train(task, encoded, rows, selection, recipe, tmp_path / "run")
    loaded = load_moments(tmp_path / "run", task.module)
    estimated = estimate_moments(task, trained.params, encoded, rows, pool.ids, terms_per_step=150, steps=20)
    good = agreement(loaded, estimated)
    a, b = "blocks.0.qkv.weight", "blocks.1.qkv.weight"
    square = loaded.state["square"]
    square[a], square[b] = square[b], square[a]
    bad = agreement(loaded, estimated)
    assert min(good[a], good[b]) > 0.7 and max(bad[a], bad[b]) < min(good[a], good[b]) - 0.2
