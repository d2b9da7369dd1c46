"""LESS against dense algebra in float64, on a tiny Llama with LoRA, and the planted answers of METHODS' T-f tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.method import make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Selection
from assay.core.table import Table
from assay.core.task import Task
from assay.measure import Measurer
from assay.numerics.project import Exact
from assay.scorers.less import Less, _Run, _State, round_robin
from assay.train import loop, lora
from assay.train.models import LanguageModel, init_params, train_tokenizer
from assay.train.recipe import Recipe
from helpers import prepared, text_pool

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'assay-data[hf]'")
pytest.importorskip("peft", reason="needs the extra: pip install 'assay-data[hf]'")

from assay.train.fresh import write_model  # noqa: E402
from assay.train.hf import CausalLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
N = 20
OPTIONS: dict[str, Any] = {
    "share": 0.4, "epochs": 2, "rank": 2, "scale": 3.0, "lr": 0.02, "terms_per_step": 40, "projection": "exact",
}  # fmt: skip


def target_pool(n: int = 6, repeat: int = 0) -> Pool:
    texts = text_pool(n, seed=7).column("text")
    subtasks = [f"task {i % 3}" for i in range(n)]
    for _ in range(repeat):
        texts, subtasks = [*texts, texts[0]], [*subtasks, subtasks[0]]
    return Pool.from_columns({"text": texts, "subtask": subtasks})


@dataclass
class World:
    task: Task
    pool: Pool
    models: list[dict[str, Tensor]]
    folder: Path

    def measurer(self, out: Path, target: Pool | None = None, **options: Any) -> Measurer:
        target = target_pool() if target is None else target
        run = Run.open(out, {"name": "less"})
        run.close()
        encodings = {}
        for part in (self.pool, target):
            encodings[part.fingerprint] = path = self.folder / part.fingerprint
            prepared(self.task, part, path)
        held: dict[str, Any] = {"task": self.task, "models": self.models, "encodings": encodings, "key": "k"}
        return Measurer(run, self.pool, target, **{**held, **options})

    def table(self, out: Path, target: Pool | None = None, held: dict[str, Any] | None = None, **options: Any) -> Table:
        return self.measurer(out, target, **(held or {})).table(Less(**{**OPTIONS, **options}))

    def inputs(self, pool: Pool) -> Any:
        return prepared(self.task, pool, self.folder / pool.fingerprint).inputs(np.arange(len(pool)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Llama in float64 that has learnt a little; its norms compute in float32 unless they are told not to."""
    from transformers.models.llama import modeling_llama

    def exact(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    folder, pool = tmp_path_factory.mktemp("less"), text_pool(N)
    (folder / "model").mkdir()
    write_model(folder / "model", LLAMA, train_tokenizer(pool, vocab=270), context=16)
    task = CausalLM(path=str(folder / "model"), context=16)
    start = init_params(task.module, 0, torch.float64)
    encoded = prepared(task, pool, folder / "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", exact)
        recipe = Recipe(steps=20, terms_per_step=200, lr=1e-2)
        everything = Selection.everything(pool.ids)
        trained = loop.train(task, encoded, np.arange(len(pool)), everything, recipe, start=start)
        yield World(task, pool, [trained.params], folder)


def dense(world: World, adapters: dict[str, Tensor], scale: float) -> Callable[[Any], list[dict[str, Tensor]]]:
    """Gradients of each example's loss in A and B, from the definition: the weights are W + scale B A. No adapters of
    peft, no hooks and no rules."""

    def gradients(inputs: Any) -> list[dict[str, Tensor]]:
        found = []
        for i in range(len(inputs["tokens"])):
            leaves = {n: p.clone().requires_grad_() for n, p in adapters.items()}
            params = dict(world.models[0])
            for name in {n.partition(".lora_")[0] for n in leaves}:
                a, b = (leaves[f"{name}.lora_{side}.default.weight"] for side in "AB")
                params[f"{name}.weight"] = params[f"{name}.weight"] + scale * b @ a
            loss = world.task.loss(params, {k: v[i : i + 1] for k, v in inputs.items()}).sum()
            found.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
        return found

    return gradients


def checkpoints(out: Path, epochs: int = 2) -> list[loop.Trained]:
    (folder,) = (out / "steps").glob("less-warm-up-*")
    return [loop.load(folder / f"epoch-{e + 1}.safetensors") for e in range(epochs)]


def flat(found: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([found[n].flatten() for n in sorted(found)]).numpy()


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize("drop", [False, True])
def test_scores_are_the_dense_formula(world: World, tmp_path: Path, drop: bool) -> None:
    """T-f1: without a projection the score is the sum of exact cosines, entry by entry in Adam's metric."""
    found = world.table(tmp_path / "run", subtask="subtask", reduction="none", drop_momentum=drop)
    target, want = target_pool(), np.zeros((N, 3))
    rates = epoch_rates(tmp_path / "run")
    for rate, mark in zip(rates, checkpoints(tmp_path / "run"), strict=True):
        gradients = dense(world, mark.params, 3.0)
        steps, asked = [], [flat(g) for g in gradients(world.inputs(target))]
        for g in gradients(world.inputs(world.pool)):
            m, v = mark.state["mean"], mark.state["square"]
            top = g if drop else {n: 0.9 * m[n] + 0.1 * x for n, x in g.items()}
            steps.append(flat({n: top[n] / torch.sqrt(0.999 * v[n] + 0.001 * x * x + 1e-8) for n, x in g.items()}))
        for j in range(3):
            want[:, j] += [rate * np.mean([cosine(s, q) for q in asked[j::3]]) for s in steps]
    assert found.columns == ("task 0", "task 1", "task 2")
    np.testing.assert_allclose(found.values, want / sum(rates), rtol=0, atol=1e-9)


def epoch_rates(out: Path) -> list[float]:
    """Mean learning rate of each epoch, from how many steps each took."""
    counts = [len(mark.losses) for mark in checkpoints(out)]
    recipe = Recipe(steps=counts[-1], lr=0.02, warmup=0.03, final=0.0)
    spans = zip([0, *counts], counts, strict=False)
    return [float(np.mean([recipe.rate(s) for s in range(first, last)])) for first, last in spans]


def test_the_warm_up_is_adams_training_of_a_and_b(world: World, tmp_path: Path) -> None:
    """Against torch's own Adam on W + scale B A: weights and moments, by name; B starts at zero and A does not move
    in the first step."""
    world.table(tmp_path / "run")
    marks = checkpoints(tmp_path / "run")
    task = lora.Adapted(inner=world.task, rank=2, scale=3.0)
    assert all(n.rpartition(".lora_")[0].endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for n in marks[0].params)
    seed = recipe_seed()
    start = task.adapters(world.models[0], seed)
    assert all(not p.any() for n, p in start.items() if ".lora_B." in n)
    ids = chosen(world)
    sizes = prepared(world.task, world.pool, world.folder / world.pool.fingerprint).sizes
    rows = np.flatnonzero(np.isin(world.pool.ids, ids))
    recipe = Recipe(terms_per_step=40, lr=0.02, betas=(0.9, 0.999), weight_decay=0.0, warmup=0.03, final=0.0, seed=seed)
    plan = lora.batches(world.pool.ids[rows], sizes[rows], recipe, 2)
    recipe = recipe.model_copy(update={"steps": sum(map(len, plan))})
    assert len(marks[-1].losses) == recipe.steps
    leaves = {n: p.clone() for n, p in start.items()}
    optimiser = torch.optim.Adam([{"params": [p], "name": n} for n, p in leaves.items()], betas=(0.9, 0.999), eps=1e-8)
    step, everything = 0, world.inputs(world.pool)
    for epoch, batches in enumerate(plan):
        for batch in batches:
            own = {k: v[rows[batch]] for k, v in everything.items()}
            n = torch.from_numpy(sizes[rows][batch]).double()
            grads = dense(world, leaves, 3.0)(own)
            total = {k: torch.stack([w * g[k] for w, g in zip(n, grads, strict=True)]).sum(0) / 40 for k in leaves}
            norm = float(torch.cat([g.flatten() for g in total.values()]).norm())
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
                group["params"][0].grad = total[group["name"]] * min(1.0, 1.0 / norm)
            optimiser.step()
            step += 1
        for group in optimiser.param_groups:
            name, p = group["name"], group["params"][0]
            state = optimiser.state[p]
            mark = marks[epoch]
            for held, truth in ((mark.params, p), (mark.state["mean"], state["exp_avg"])):
                torch.testing.assert_close(held[name], truth, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(mark.state["square"][name], state["exp_avg_sq"], rtol=1e-7, atol=1e-14)


def recipe_seed() -> int:
    from assay.core.keys import digest

    return int(digest(0, "less", 0)[:7], 16)


def chosen(world: World) -> np.ndarray:
    """The keyed share: the smallest hashes of ids, whatever the order of the pool."""
    from assay.core.keys import hash_ids

    order = np.argsort(hash_ids(world.pool.ids, "less", 0, 0))
    return world.pool.ids[order[: round(0.4 * N)]]


@pytest.fixture(scope="module")
def state(world: World) -> tuple[_State, _Run]:
    """A warm-up by hand: adapters at random, with moments at random."""
    task = lora.Adapted(inner=world.task, rank=2, scale=3.0)
    rng = torch.Generator().manual_seed(1)
    params = {n: torch.randn(p.shape, generator=rng).double() * 0.1 for n, p in task.adapters({}, 0).items()}
    mean = {n: torch.randn(p.shape, generator=rng).double() * 1e-3 for n, p in params.items()}
    square = {n: torch.rand(p.shape, generator=rng).double() * 1e-5 for n, p in params.items()}
    run = _Run(task.base(world.models[0]), [lora.Checkpoint(params, mean, square, 1.0, 0.0)], [1.0], [])
    return _State(task, Exact(), frozenset(), [run], ("score",), 1.0), run


def test_constant_second_moments_give_the_preconditioned_cosine(world: World, state: tuple[_State, _Run]) -> None:
    """T-f2: m = 0 and v = c: Gamma = .1 g / sqrt(b2 c + (1 - b2) g^2 + eps)."""
    made, run = state
    (mark,) = run.marks
    zero = {n: torch.zeros_like(p) for n, p in mark.params.items()}
    flatmark = mark._replace(mean=zero, square={n: torch.full_like(p, 4e-4) for n, p in mark.params.items()})
    method, inputs = Less(projection="exact"), world.inputs(world.pool)
    rows = method._rows(made, run, flatmark, inputs)
    asked = method._rows(made, run, flatmark, world.inputs(target_pool()), "loss")
    gradients = dense(world, mark.params, 3.0)
    plain = [flat(g) for g in gradients(inputs)]
    for i, g in enumerate(plain):
        step = g / np.sqrt(0.999 * 4e-4 + 0.001 * g * g + 1e-8)
        for q, other in enumerate(gradients(world.inputs(target_pool()))):
            assert rows[i] @ asked[q] == pytest.approx(cosine(step, flat(other)), abs=1e-9)


def test_order_of_parameters_does_not_matter(world: World, state: tuple[_State, _Run], tmp_path: Path) -> None:
    """T-f3: names decide. Weights, moments and the model's own weights are given in another order."""
    made, run = state
    (mark,) = run.marks

    def mixed(held: dict[str, Tensor]) -> dict[str, Tensor]:
        names = np.random.default_rng(3).permutation(list(held)).tolist()
        assert names != list(held)
        return {n: held[n] for n in names}

    other = mark._replace(params=mixed(mark.params), mean=mixed(mark.mean), square=mixed(mark.square))
    shuffled = dataclasses.replace(run, frozen=mixed(run.frozen))
    for projection in ("exact", "sparse", "dense"):
        from assay.numerics.project import sketch

        using = dataclasses.replace(made, sketch=sketch(projection, 0 if projection == "exact" else 64, 0))
        first, second = (
            Less()._rows(using, r, m, world.inputs(world.pool)) for r, m in ((run, mark), (shuffled, other))
        )
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-12)
    plain = world.table(tmp_path / "a").values
    again = world.table(tmp_path / "b", held={"models": [mixed(world.models[0])]}).values
    np.testing.assert_allclose(plain, again, rtol=0, atol=1e-12)


def test_another_parameters_moments_would_be_seen(world: World, state: tuple[_State, _Run]) -> None:
    """The control of the test above: moments that are joined by position give other rows."""
    made, run = state
    (mark,) = run.marks
    same = [n for n, p in mark.params.items() if p.shape == next(iter(mark.params.values())).shape]
    wrong = mark._replace(square={**mark.square, same[0]: mark.square[same[1]], same[1]: mark.square[same[0]]})
    first, second = (Less()._rows(made, run, m, world.inputs(world.pool)) for m in (mark, wrong))
    assert np.abs(first - second).max() > 1e-3


def test_a_repeated_target_example_counts_once(world: World, tmp_path: Path) -> None:
    """T-f4."""
    for reduction in ("mean", "max"):
        options: dict[str, Any] = {"subtask": "subtask", "reduction": reduction}
        once = world.table(tmp_path / f"once {reduction}", **options).values
        twice = world.table(tmp_path / f"twice {reduction}", target_pool(repeat=2), **options).values
        np.testing.assert_allclose(once, twice, rtol=0, atol=1e-12)


def test_reductions(world: World, tmp_path: Path) -> None:
    """T-f5: max >= mean; and each reduction is what it says of the subtasks' columns."""
    measurer = world.measurer(tmp_path / "run")
    tables = {
        r: measurer.table(make(Less, {"name": "less", **OPTIONS, "subtask": "subtask", "reduction": r})).values
        for r in ("none", "max", "mean", "zscore", "round_robin")
    }
    columns = tables["none"]
    np.testing.assert_allclose(tables["max"][:, 0], columns.max(axis=1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(tables["mean"][:, 0], columns.mean(axis=1), rtol=0, atol=1e-12)
    assert (tables["max"] >= tables["mean"]).all() and (tables["max"] > tables["mean"]).any()
    z = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    np.testing.assert_allclose(tables["zscore"][:, 0], z.max(axis=1), rtol=0, atol=1e-9)
    first = np.argsort(-tables["round_robin"][:, 0])[:3]
    assert set(first) >= {columns[:, 0].argmax()} and sorted(-tables["round_robin"][:, 0]) == list(range(N))
    places = round_robin(columns, world.pool.ids)
    taken = [int(np.flatnonzero(places == k)[0]) for k in range(N)]
    for k, row in enumerate(taken):
        assert columns[row, k % 3] == max(columns[r, k % 3] for r in taken[k:]), "each turn takes the best that is left"


def test_scaling_all_rates_changes_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T-f6: only shares of the learning rate count."""
    plain, read = world.table(tmp_path / "a").values, lora.read
    monkeypatch.setattr(lora, "read", lambda *a, **k: [m._replace(rate=1e-3 * m.rate) for m in read(*a, **k)])
    np.testing.assert_allclose(world.table(tmp_path / "b").values, plain, rtol=0, atol=1e-12)
    monkeypatch.setattr(lora, "read", lambda *a, **k: [m._replace(rate=m.rate**3) for m in read(*a, **k)])
    assert np.abs(world.table(tmp_path / "c").values - plain).max() > 1e-6


def test_batches_of_pool_and_target_do_not_matter(world: World, tmp_path: Path) -> None:
    plain = world.table(tmp_path / "a", subtask="subtask").values
    for name, held in (("b", {"batch": 2}), ("c", {"area": 20, "shard": 7})):
        found = world.table(tmp_path / name, held=held, subtask="subtask").values
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-11)


def test_a_column_for_each_target_example(world: World, tmp_path: Path) -> None:
    measurer, target = world.measurer(tmp_path / "run"), target_pool()
    each = measurer.table(Less(**OPTIONS, targets="each"))
    assert each.columns == tuple(i.decode() for i in target.ids.tolist())
    mean = measurer.table(Less(**OPTIONS)).values[:, 0]
    np.testing.assert_allclose(each.values.mean(axis=1), mean, rtol=0, atol=1e-12)


def test_barred_examples_do_not_train_the_adapters(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = chosen(world)
    trained: list[set[bytes]] = []

    def watched(*args: Any, **options: Any) -> None:
        trained.append(set(options["ids"].tolist()))
        lora_warm_up(*args, **options)

    lora_warm_up = lora.warm_up
    monkeypatch.setattr(lora, "warm_up", watched)
    for name, barred in (("a", ids[:0]), ("b", ids[:2])):
        world.table(tmp_path / name, held={"barred": barred})
    assert trained[0] == set(ids.tolist()) and not trained[1] & set(ids[:2].tolist())
    assert set(ids[2:].tolist()) <= trained[1], "the others stay: the draw is keyed by id"
    with pytest.raises(InputError, match="nothing to train the adapters on"):
        world.table(tmp_path / "c", held={"barred": world.pool.ids})


def test_a_killed_warm_up_goes_on_to_the_same_bytes(world: World, tmp_path: Path) -> None:
    task = lora.Adapted(inner=world.task, rank=2)
    encoded = prepared(world.task, world.pool, world.folder / world.pool.fingerprint)
    rows = np.arange(9)
    recipe = Recipe(terms_per_step=20, lr=0.02, betas=(0.9, 0.999), weight_decay=0.0, final=0.0)
    options: dict[str, Any] = {"rows": rows, "ids": world.pool.ids[rows], "recipe": recipe, "epochs": 2}

    def run(folder: Path, stop: int | None = None) -> list[bytes]:
        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            calls, update = [0], lora.optim.update

            def counted(*args: Any) -> Any:
                calls[0] += 1
                if calls[0] == stop:
                    raise KeyboardInterrupt
                return update(*args)

            patch.setattr(lora.optim, "update", counted)
            lora.warm_up(task, world.models[0], encoded, path=folder, save_every=2, **options)
        return [(folder / f"epoch-{e}.safetensors").read_bytes() for e in (1, 2)]

    whole = run(tmp_path / "whole")
    steps = len(loop.load(tmp_path / "whole" / "epoch-2.safetensors").losses)
    assert steps > 6
    for stop in (2, 4, steps - 1):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"part {stop}", stop)
        assert run(tmp_path / f"part {stop}") == whole
    (tmp_path / "whole" / "epoch-1.safetensors").write_bytes(b"damaged")
    assert run(tmp_path / "whole") == whole


def test_planted_tasks_are_told_apart(tmp_path: Path) -> None:
    """T-f7: of two disjoint tasks, the top 5% for one target are of its task."""
    rng = np.random.default_rng(0)

    def texts(n: int, words: Sequence[str], ordered: bool = True) -> list[str]:
        made, k = [], len(words)
        for start, length in zip(rng.integers(0, k, n), rng.integers(6, 12, n), strict=True):
            at = start + np.arange(length) if ordered else rng.integers(0, k, length)
            made.append(" ".join(words[int(w) % k] for w in at))
        return made

    count = "one two three four five six seven eight".split()
    spell = "ant bee cat dog eel fox gnu hen".split()
    before = Pool.from_columns({"text": texts(160, [*count, *spell], ordered=False)})
    pool = Pool.from_columns({"text": [*texts(80, count), *texts(80, spell)]})
    target = Pool.from_columns({"text": [*texts(6, count), *texts(6, spell)], "subtask": ["a"] * 6 + ["b"] * 6})
    shape = {"vocab": 300, "width": 16, "layers": 1, "heads": 2, "context": 24}
    task = LanguageModel(tokenizer=train_tokenizer(pool, vocab=300), **shape)
    encoded, recipe = prepared(task, before, tmp_path / "t"), Recipe(steps=20, terms_per_step=400, lr=1e-2)
    model = loop.train(task, encoded, np.arange(160), Selection.everything(before.ids), recipe).params
    found = World(task, pool, [model], tmp_path).table(
        tmp_path / "run", target, subtask="subtask", reduction="none", projection="sparse", size=1024, share=0.2,
        terms_per_step=200,
    )  # fmt: skip
    for column, own in zip(found.values.T, (range(80), range(80, 160)), strict=True):
        assert np.isin(np.argsort(-column)[:8], own).mean() >= 0.9


def test_bad_options(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'subtsk'"):
        world.table(tmp_path / "a", subtask="subtsk")
    with pytest.raises(InputError, match="no linear layer 'q_prj'.*"):
        world.table(tmp_path / "b", layers=("q_prj",))
    only = world.measurer(tmp_path / "c")
    only.table(Less(**{**OPTIONS, "layers": ("up_proj",)}))
    assert all(".up_proj." in n for n in checkpoints(tmp_path / "c")[0].params)


def test_peft_is_asked_for_by_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="LoRA needs the package 'peft'"):
        _ = lora.Adapted(inner=world.task, rank=2).module
