"""The trainer: its arithmetic against torch, its determinism, its restarts, its accounting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from assay.core.errors import InputError
from assay.core.keys import decode_ids, encode_ids
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.train import loop, optim
from assay.train.models import Classifier, LanguageModel, init_params, train_tokenizer
from assay.train.recipe import Recipe
from helpers import classifier, language, text_pool, vector_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")

D = torch.float64


def everything(pool: Pool) -> tuple[np.ndarray, Selection]:
    return np.arange(len(pool)), Selection.everything(pool.ids)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_update_equals_torch(name, decay):
    recipe = Recipe(steps=20, optimiser=name, lr=0.05, weight_decay=decay, warmup=0.2, schedule="cosine")
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=rng, dtype=D) for s in ((3, 4), (5,))]
    theirs = [nn.Parameter(p.clone()) for p in start]
    optimiser: torch.optim.Optimizer
    if name == "adamw":
        optimiser = torch.optim.AdamW(theirs, lr=1.0, betas=recipe.betas, eps=recipe.eps, weight_decay=decay)
    else:
        optimiser = torch.optim.SGD(theirs, lr=1.0, momentum=0.9 if name == "momentum" else 0.0, weight_decay=decay)
    ours, state = [p.clone() for p in start], optim.init(recipe, start)
    for step in range(20):
        grads = [torch.randn(p.shape, generator=rng, dtype=D) for p in start]
        before = [p.clone() for p in ours]
        given = ours
        ours, state = optim.update(recipe, grads, state, ours, step)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "parameters changed in place"
        optimiser.param_groups[0]["lr"] = recipe.rate(step)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimiser.step()
        gap = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
        assert gap < 1e-12, f"step {step}: off by {gap:.1e}"


@pytest.mark.parametrize("limit", [0.5, 3.0, 100.0])
def test_clip_equals_torch(limit):
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=rng, dtype=D) for s in ((3, 4), (5,))]
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    got = optim.clip(grads, limit)
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(params, limit)
    for ours, g, p in zip(got, grads, params, strict=True):
        assert p.grad is not None
        assert torch.allclose(ours, p.grad, rtol=2e-6), "torch adds 1e-6 to the norm"
        assert torch.allclose(ours, g * min(1.0, limit / norm), rtol=1e-12)
    assert optim.clip(grads, 0.0) is grads
    assert all(torch.equal(g, torch.zeros(3)) for g in optim.clip([torch.zeros(3)], 1.0)), "zero gradients stay zero"


def test_learning_rates():
    linear = Recipe(steps=10, lr=2.0, warmup=0.2, final=0.1, schedule="linear")
    want = [1.0, 2.0] + [2.0 * (0.1 + 0.9 * (1 - k / 8)) for k in range(8)]
    assert [linear.rate(s) for s in range(10)] == pytest.approx(want)
    cosine = Recipe(steps=10, lr=2.0, warmup=0.2, final=0.1, schedule="cosine")
    want = [1.0, 2.0] + [2.0 * (0.1 + 0.9 * (1 + np.cos(np.pi * k / 8)) / 2) for k in range(8)]
    assert [cosine.rate(s) for s in range(10)] == pytest.approx(want)
    constant = Recipe(steps=4, lr=2.0, warmup=0.0, schedule="constant")
    assert [constant.rate(s) for s in range(4)] == [2.0] * 4
    assert [Recipe(steps=4, lr=1.0, warmup=1.0).rate(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert Recipe(steps=100, lr=1.0, warmup=0.07).rate(6) == 1.0, "7% of 100 steps are 7"
    assert Recipe(steps=1, lr=1.0, warmup=0.1).rate(0) == 1.0


RECIPE = Recipe(steps=9, terms_per_step=40, lr=1e-2, seed=3)


def small(path: Path) -> tuple[LanguageModel, loop.Encoded, Pool]:
    pool = text_pool(12)
    task, encoded = language(pool, path)
    return task, encoded, pool


def run(path: Path, out: Path, **options) -> bytes:
    task, encoded, pool = small(path)
    rows, selection = everything(pool)
    loop.train(task, encoded, rows, selection, RECIPE, out, **options)
    return (out / "checkpoint.safetensors").read_bytes()


OTHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_train
test_train.run(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_same_recipe_same_bytes_here_and_in_another_process(tmp_path):
    first = run(tmp_path / "a", tmp_path / "1")
    for i in range(4):
        assert run(tmp_path / f"b{i}", tmp_path / f"2{i}") == first, "the same run gave other bytes"
    arguments = [str(Path(__file__).parent), str(tmp_path / "c"), str(tmp_path / "3")]
    subprocess.run([sys.executable, "-c", OTHER, *arguments], check=True)
    assert (tmp_path / "3" / "checkpoint.safetensors").read_bytes() == first
    held = loop.load(tmp_path / "1" / "checkpoint.safetensors")
    assert len(held.losses) == 9 and set(held.state) == {"mean", "square"}
    assert all(set(slot) == set(held.params) for slot in held.state.values())
    assert not (tmp_path / "1" / "state.safetensors").exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = optim.update

    def update(recipe, grads, state, params, at):
        if at == step:
            raise KeyboardInterrupt
        return whole(recipe, grads, state, params, at)

    monkeypatch.setattr(optim, "update", update)


@pytest.mark.parametrize("stop", [2, 3, 8])
def test_killed_and_restarted_gives_the_same_bytes(tmp_path, monkeypatch, stop):
    want = run(tmp_path / "a", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b", tmp_path / "cut", save_every=2)
    state = tmp_path / "cut" / "state.safetensors"
    assert len(loop.load(state).losses) == stop // 2 * 2
    with monkeypatch.context() as patch:
        seen: list[int] = []
        whole = optim.update
        patch.setattr(optim, "update", lambda *given: (seen.append(given[-1]), whole(*given))[1])
        assert run(tmp_path / "c", tmp_path / "cut", save_every=2) == want
    assert seen == list(range(stop // 2 * 2, 9)), "kept steps were computed anew, or some were skipped"
    assert not state.exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other run"])
def test_damaged_states_are_ignored(tmp_path, monkeypatch, damage):
    want = run(tmp_path / "a", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b", tmp_path / "cut", save_every=2)
    state = tmp_path / "cut" / "state.safetensors"
    data = bytearray(state.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "other run":
        held = loop.load(state)
        params = {n: p + 1 for n, p in held.params.items()}
        loop.save(state, loop.Trained(params, held.state, held.losses), "another key")
        data = bytearray(state.read_bytes())
    state.write_bytes(bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))]))
    assert run(tmp_path / "c", tmp_path / "cut", save_every=2) == want


def test_states_of_other_runs_are_ignored(tmp_path, monkeypatch):
    """Another selection, weights, recipe, model or start: nothing of the kept state is used."""
    task, encoded, pool = small(tmp_path / "a")
    rows, selection = everything(pool)
    wider, _ = language(pool, tmp_path / "b", width=24)
    start = init_params(task.module, 77)
    runs = {
        "selection": (task, rows[:9], Selection.everything(pool.ids[:9]), RECIPE, None),
        "weights": (task, rows, Selection(pool.ids, np.full(12, 0.5)), RECIPE, None),
        "recipe": (task, rows, selection, RECIPE.model_copy(update={"lr": 0.02}), None),
        "task": (wider, rows, selection, RECIPE, None),
        "start": (task, rows, selection, RECIPE, start),
    }
    for name, (model, at, chosen, recipe, begin) in runs.items():
        out = tmp_path / name
        with monkeypatch.context() as patch:
            stop_at(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                loop.train(task, encoded, rows, selection, RECIPE, out, save_every=2)
        want = loop.train(model, encoded, at, chosen, recipe, start=begin)
        got = loop.train(model, encoded, at, chosen, recipe, out, start=begin)
        assert got.losses == want.losses, f"the state of a run with another {name} was used"
        assert all(torch.equal(got.params[n], want.params[n]) for n in want.params), name


def test_unreadable_checkpoint(tmp_path):
    run(tmp_path / "a", tmp_path / "whole")
    flipped = bytearray((tmp_path / "whole" / "checkpoint.safetensors").read_bytes())
    flipped[-40] ^= 1
    for name, data in (("missing", None), ("half", b"\x10\x00\x00"), ("flipped", bytes(flipped))):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="unreadable checkpoint") as caught:
            loop.load(tmp_path / name)
        assert name in caught.value.where


def test_zero_weight_keeps_everyones_place(tmp_path, monkeypatch):
    task, encoded, pool = small(tmp_path)
    rows, selection = everything(pool)
    weights = np.ones(12)
    weights[4] = 0.0
    seen: dict[str, list[list[int]]] = {"one": [], "zero": []}
    results = {}
    whole = loop.gradient
    for name, w in (("one", np.ones(12)), ("zero", weights)):

        def gradient(task, params, encoded, rows, weights, terms, noise=None, name=name):
            seen[name].append(rows.tolist())
            return whole(task, params, encoded, rows, weights, terms)

        monkeypatch.setattr(loop, "gradient", gradient)
        results[name] = loop.train(task, encoded, rows, Selection(pool.ids, w), RECIPE)
    assert seen["one"] == seen["zero"], "a weight changed the batches"
    first = next(i for i, batch in enumerate(seen["one"]) if 4 in batch)
    losses = {name: result.losses for name, result in results.items()}
    assert losses["one"][:first] == losses["zero"][:first] and losses["one"][first] > losses["zero"][first]

    # The denominator is the constant T: what is missing is exactly this example's share.
    params = init_params(task.module, 3)
    batch = np.array(seen["one"][first])
    full, value = whole(task, params, encoded, batch, np.ones(len(batch)), 40)
    part, less = whole(task, params, encoded, batch, weights[batch], 40)
    own, share = whole(task, params, encoded, np.array([4]), np.ones(1), 40)
    assert value - less == pytest.approx(share, abs=1e-6)
    for f, p, o in zip(full, part, own, strict=True):
        assert torch.allclose(f - p, o, atol=1e-6)


@pytest.mark.parametrize("area", [1, 30, 90, 10**6])
def test_gradient_is_the_formula_for_any_area(tmp_path, monkeypatch, area):
    task, encoded, _ = small(tmp_path)
    params, rows = wide(task), np.array([3, 0, 7, 7, 11])
    weights = np.array([1.0, 0.5, 2.0, 0.0, 0.25])
    monkeypatch.setattr(loop.blocks, "__defaults__", (area,))
    got, value = loop.gradient(task, params, encoded, rows, weights, 77)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    total = torch.zeros((), dtype=D)
    for row, w in zip(rows, weights, strict=True):
        loss = task.loss(leaves, encoded.inputs(np.array([row])))[0]
        total = total + w * float(encoded.sizes[row]) * loss / 77
    want = torch.autograd.grad(total, list(leaves.values()))
    assert value == pytest.approx(float(total.detach()), abs=1e-12)
    for name, g, w in zip(params, got, want, strict=True):
        assert float((g - w).abs().max()) < 1e-12, (name, float((g - w).abs().max()))


@pytest.mark.parametrize("area", [1, 7, 20, 1000])
def test_blocks(area):
    sizes = np.random.default_rng(0).integers(1, 12, 50)
    parts = loop.blocks(sizes, area)
    assert sorted(np.concatenate(parts).tolist()) == list(range(50))
    for part in parts:
        assert len(part) == 1 or len(part) * sizes[part].max() <= area, (part, sizes[part])
    assert loop.blocks(np.zeros(0, dtype=np.int64), area) == []


def epochs(selection: Selection, sizes: np.ndarray, recipe: Recipe) -> list[str]:
    """The ids in the order in which they are trained on."""
    names = decode_ids(selection.ids)
    return [names[i] for batch in loop.steps(recipe, selection, sizes) for i in batch]


def test_steps_fill_the_budget_and_visit_everyone():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 30, 40)
    sizes[5] = 90
    selection = Selection.everything(encode_ids(f"id{i}" for i in range(40)))
    recipe = Recipe(steps=50, terms_per_step=60, seed=1)
    batches = list(loop.steps(recipe, selection, sizes))
    assert len(batches) == 50
    flat = np.concatenate(batches)
    for batch, after in zip(batches, batches[1:], strict=False):
        total = sizes[batch].sum()
        assert total <= 60 or len(batch) == 1, f"{total} terms in {len(batch)} examples"
        assert total + sizes[after[0]] > 60, "there was room for one more"
    visits = [flat[k : k + 40] for k in range(0, len(flat) - 40, 40)]
    assert len(visits) >= 2
    for epoch in visits:
        assert sorted(epoch.tolist()) == list(range(40)), "an epoch misses someone"
    assert visits[0].tolist() != visits[1].tolist(), "epochs have the same order"
    other = np.concatenate(list(loop.steps(recipe.with_seed(2), selection, sizes)))
    assert flat[:40].tolist() != other[:40].tolist(), "seeds have the same order"


def test_order_of_common_ids_ignores_the_others():
    names = [f"id{i}" for i in range(30)]
    recipe = Recipe(steps=30, terms_per_step=10, seed=1)
    full = epochs(Selection.everything(encode_ids(names)), np.ones(30, int), recipe)[:30]
    kept = names[::-3]
    part = epochs(Selection.everything(encode_ids(kept)), np.ones(10, int), recipe)[:10]
    assert part == [n for n in full if n in set(kept)]
    assert full != names


def test_ordered_selections_and_repeats():
    ids = encode_ids(["c", "a", "b"])
    ordered = Selection(ids, np.ones(3), ordered=True)
    recipe = Recipe(steps=4, terms_per_step=2)
    assert epochs(ordered, np.ones(3, int), recipe) == ["c", "a", "b", "c", "a", "b", "c", "a"]
    twice = Selection(encode_ids(["a", "b", "a"]), np.ones(3))
    assert sorted(epochs(twice, np.ones(3, int), Recipe(steps=1, terms_per_step=3))) == ["a", "a", "b"]
    with pytest.raises(InputError, match="nothing is selected"):
        list(loop.steps(recipe, Selection.everything(ids[:0]), np.zeros(0, int)))


def test_rows_join_the_selection_to_the_encoded_pool(tmp_path):
    """The k-th id stands in row rows[k]: a permuted selection trains the same model."""
    task, encoded, pool = small(tmp_path)
    rows, selection = everything(pool)
    order = np.random.default_rng(0).permutation(12)
    a = loop.train(task, encoded, rows, selection, RECIPE)
    b = loop.train(task, encoded, order, Selection.everything(pool.ids[order]), RECIPE)
    assert a.losses == b.losses and all(torch.equal(a.params[n], b.params[n]) for n in a.params)
    assert a.losses[-1] < a.losses[0] - 0.1, a.losses


def test_start_is_where_training_begins(tmp_path):
    task, encoded = classifier(vector_pool(10), tmp_path)
    start = init_params(task.module, 8)
    before = {n: p.clone() for n, p in start.items()}
    recipe = Recipe(steps=1, terms_per_step=10, lr=0.1, optimiser="sgd", clip=0, warmup=0, weight_decay=0)
    rows, selection = everything(vector_pool(10))
    got = loop.train(task, encoded, rows, selection, recipe, start=start)
    grads, value = loop.gradient(task, start, encoded, rows, np.ones(10), 10)
    assert got.losses == [pytest.approx(value)]
    for (name, p), g in zip(start.items(), grads, strict=True):
        assert torch.equal(p, before[name]), "the start changed"
        assert torch.allclose(got.params[name], p - 0.1 * g, atol=1e-7)


@pytest.mark.parametrize("kind", ["text", "vectors"])
def test_forward_flops(tmp_path, kind):
    """Against torch's counter. It counts attention in full; causal attention needs half, which is what we count."""
    attention = 0.0
    if kind == "text":
        pool = text_pool(6, longest=150)
        task, encoded = language(pool, tmp_path, context=128)
        assert isinstance(task, LanguageModel)
        sizes = encoded.sizes.astype(float)
        attention = float((2 * task.layers * task.width * sizes**2).sum())
    else:
        task, encoded = classifier(vector_pool(6), tmp_path, hidden=(16, 8))
    params, total = init_params(task.module, 0), 0
    for row in range(6):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            task.loss(params, encoded.inputs(np.array([row])))
        total += counter.get_total_flops()
    ours = task.forward_flops(encoded.sizes) + attention
    assert 0.95 < ours / total < 1.05, (ours, total)
    assert kind == "vectors" or attention > 0.15 * total, "attention is too small here for the test to see it"


def test_evaluate_is_a_plain_loop(tmp_path):
    for task, encoded in (language(text_pool(9), tmp_path / "t"), classifier(vector_pool(9), tmp_path / "v")):
        params = wide(task)
        for area in (1, 20, 10**6):
            found = loop.evaluate(task, params, encoded, area=area)
            for row in range(9):
                batch = encoded.inputs(np.array([row]))
                assert found["loss"][row] == pytest.approx(float(task.measure(params, batch)[0]), abs=1e-12)
                for name, values in task.metrics(params, batch).items():
                    assert found[name][row] == float(values[0]), name
        assert set(found) == ({"loss"} if isinstance(task, LanguageModel) else {"loss", "accuracy"})
        assert all(v.dtype == np.float64 for v in found.values())


def test_language_model_loss_by_hand(tmp_path):
    """-log p of each token given the ones before it, the end mark first and last; mean over tokens."""
    pool = text_pool(5)
    task, encoded = language(pool, tmp_path, context=10)
    params, rows = wide(task), np.arange(5)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(task.tokenizer)
    losses = task.loss(params, encoded.inputs(rows))
    for row, text in enumerate(pool.column("text")):
        ids = [*tokenizer.encode(text).ids, 0][:10]
        assert encoded.sizes[row] == len(ids)
        total = 0.0
        for t, token in enumerate(ids):
            inputs = torch.tensor([[0, *ids[:t]]])
            logits = torch.func.functional_call(task.module, params, (inputs,))[0, -1]
            total -= float(logits.log_softmax(0)[token])
        assert float(losses[row]) == pytest.approx(total / len(ids), abs=1e-11)


@pytest.mark.parametrize("steps", [1, 6])
def test_diverged_training_is_refused(tmp_path, steps):
    task, encoded = classifier(vector_pool(10), tmp_path, hidden=(8,))
    rows, selection = everything(vector_pool(10))
    recipe = Recipe(steps=steps, terms_per_step=10, lr=3e38, optimiser="sgd", clip=0, warmup=0, weight_decay=100)
    with pytest.raises(InputError, match="finite|loss is") as caught:
        loop.train(task, encoded, rows, selection, recipe, tmp_path / "out")
    assert "lower lr" in caught.value.fix
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_tokenizer_ignores_the_pools_order():
    pool = text_pool(30)
    order = np.random.default_rng(0).permutation(30)
    first = train_tokenizer(pool, vocab=290)
    assert train_tokenizer(pool.at(order), vocab=290) == first
    assert train_tokenizer(pool.at(order), vocab=290, sample=10) == train_tokenizer(pool, vocab=290, sample=10) != first
    assert train_tokenizer(pool, vocab=290, sample=10, seed=1) != train_tokenizer(pool, vocab=290, sample=10)


def test_init_is_keyed_by_name():
    a = init_params(Classifier(inputs=5, hidden=(4,), classes=3).module, 0)
    b = init_params(Classifier(inputs=5, hidden=(4, 4), classes=3).module, 0)
    assert torch.equal(a["layers.0.weight"], b["layers.0.weight"]), "a parameter depends on another's draw"
    assert not torch.equal(
        a["layers.0.weight"], init_params(Classifier(inputs=5, hidden=(4,)).module, 1)["layers.0.weight"]
    )
    assert (a["layers.0.bias"] == 0).all()
    wide = Classifier(inputs=100, hidden=(400,), classes=3, first="uniform")
    drawn = init_params(wide.module, 0)
    for name, fan in (("layers.0.weight", 100), ("layers.0.bias", 100), ("layers.1.weight", 400)):
        scaled = drawn[name].double() * fan**0.5
        assert scaled.abs().max() < 1 and abs(float(scaled.square().mean()) - 1 / 3) < 0.05, name
    assert init_params(wide.module, 1)["layers.0.weight"][0, 0] != drawn["layers.0.weight"][0, 0]
    assert wide.describe()["first"] == "uniform" and "first" not in Classifier(inputs=5).describe()

    norms = init_params(nn.ModuleDict({"norm": nn.LayerNorm(4)}), 0)
    assert norms["norm.weight"].tolist() == [1.0] * 4 and norms["norm.bias"].tolist() == [0.0] * 4


def test_init_scales_of_the_decoder():
    task = LanguageModel(tokenizer="", vocab=500, width=128, layers=2, heads=4)
    params = init_params(task.module, 0)
    want = {
        "token.weight": 0.02, "head.weight": 1 / 128, "blocks.0.qkv.weight": 128**-0.5,
        "blocks.1.out.weight": 128**-0.5 / 2, "blocks.1.down.weight": 512**-0.5 / 2,
    }  # fmt: skip
    for name, scale in want.items():
        assert float(params[name].std()) == pytest.approx(scale, rel=0.03), name
    assert (params["blocks.0.norm_mlp.weight"] == 1).all()


def test_margin(tmp_path):
    task, encoded = classifier(vector_pool(7), tmp_path, hidden=(4,))
    params, inputs = wide(task), encoded.inputs(np.arange(7))
    p = (-task.loss(params, inputs)).exp()
    assert torch.allclose(task.margin(params, inputs), p.log() - (1 - p).log(), atol=1e-12)
