"""The retrain bank: each model as if trained alone, whatever is trained beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.core.errors import InputError
from assay.core.keys import encode_ids, hash_ids
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.core.task import Encoded, Task
from assay.train import bank, loop
from assay.train.models import Classifier, init_params
from assay.train.recipe import Recipe
from assay.train.vision import ImageClassifier
from helpers import language, prepared, text_pool, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")
D = torch.float64
RECIPE = Recipe(steps=9, terms_per_step=8, lr=0.05, weight_decay=1e-2, clip=0.0)


def task_of(kind: str, folder: Path) -> tuple[Task, Pool, Encoded, Encoded]:
    """A task, its pool of 26, and the pool and a target of 5 as it reads them."""
    if kind == "text":
        pool, target = text_pool(26), text_pool(5, seed=1)
        task, encoded = language(pool, folder / "pool", layers=1)
        return task, pool, encoded, prepared(task, target, folder / "target")
    options: dict[str, dict[str, Any]] = {
        "linear": {}, "perceptron": {"hidden": (7, 6)},
        "dropout": {"hidden": (7, 6), "dropout": 0.3, "activation": "relu"},
    }  # fmt: skip
    pool, target = vector_pool(26, inputs=12), vector_pool(5, inputs=12, seed=1)
    task = ImageClassifier(shape=(3, 2, 2), filters=(4, 5), classes=3) if kind == "convnet" else Classifier(
        inputs=12, classes=3, **options[kind]
    )  # fmt: skip
    return task, pool, prepared(task, pool, folder / "pool"), prepared(task, target, folder / "target")


def alone(
    task: Task,
    pool: Pool,
    encoded: Encoded,
    target: Encoded,
    mask: np.ndarray,
    recipe: Recipe,
    protocol: str,
    measure: str,
) -> np.ndarray:
    """One model by the ordinary trainer."""
    rows, selection = np.arange(len(pool)), Selection(pool.ids, mask.astype(float))
    if protocol == "subset":
        rows = np.flatnonzero(mask)
        selection = Selection.everything(pool.ids[rows])
        recipe = recipe.model_copy(update={"steps": max(1, round(recipe.steps * mask.mean()))})
    start = init_params(task.module, recipe.seed, D)
    params = loop.train(task, encoded, rows, selection, recipe, start=start).params
    batch = target.inputs(np.arange(len(target)))
    return (task.measure(params, batch) if measure == "loss" else -task.margin(params, batch)).numpy()  # type: ignore[attr-defined]


CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("perceptron", "weights", "loss", {"optimiser": "sgd"}),
    ("perceptron", "weights", "margin", {"optimiser": "momentum", "schedule": "cosine", "warmup": 0.3}),
    ("perceptron", "weights", "margin", {"optimiser": "adamw", "clip": 0.05, "final": 0.0}),
    ("perceptron", "subset", "loss", {"optimiser": "adamw", "clip": 0.05, "schedule": "constant"}),
    ("perceptron", "weights", "loss", {"optimiser": "adamw", "eps_root": 1e-3}),
    ("linear", "subset", "margin", {"optimiser": "sgd", "clip": 0.2}),
    ("dropout", "weights", "loss", {"optimiser": "momentum"}),
    ("dropout", "subset", "margin", {"optimiser": "momentum"}),
    ("convnet", "weights", "margin", {"optimiser": "momentum"}),
    ("convnet", "subset", "loss", {"optimiser": "adamw"}),
    ("text", "weights", "loss", {"optimiser": "adamw", "terms_per_step": 60, "clip": 0.5}),
    ("text", "subset", "loss", {"optimiser": "sgd", "terms_per_step": 60}),
]


@pytest.mark.parametrize(("kind", "protocol", "measure", "options"), CASES)
@pytest.mark.parametrize("together", [True, False])
def test_each_model_is_as_if_trained_alone(kind, protocol, measure, options, together, tmp_path, monkeypatch):
    task, pool, encoded, target = task_of(kind, tmp_path)
    ways: set[str] = set()
    if not together:
        monkeypatch.setattr(bank, "FEWEST", 10**9)
    monkeypatch.setattr(bank, "AREA", 40)  # several micro-batches
    recipe = Recipe(**{**RECIPE.model_dump(), **options})
    masks = bank.subsets(pool.ids, 3, 0.5, 0)
    for name in ("_together", "_alone"):
        whole = getattr(bank, name)
        monkeypatch.setattr(bank, name, lambda *a, n=name, f=whole: ways.add(n) or f(*a))
    got = bank.retrain(
        task, encoded, pool.ids, masks, recipe, seeds=(5, 2), targets={"a": target, "b": encoded}, measure=measure,
        protocol=protocol, dtype=D,
    )  # fmt: skip
    assert ways == {"_together" if together else "_alone"}
    assert {name: v.shape for name, v in got.items()} == {"a": (3, 2, 5), "b": (3, 2, 26)}
    for k, mask in enumerate(masks):
        for r, seed in enumerate((5, 2)):
            want = alone(task, pool, encoded, target, mask, recipe.with_seed(seed), protocol, measure)
            assert np.abs(got["a"][k, r] - want).max() < 1e-10
    assert np.ptp(got["a"], axis=0).min() > 1e-6, "subsets make no difference: the test would see no mistake"


def test_eps_root_is_part_of_the_training(tmp_path):
    """Where it is as large as the second moments, the same subsets end elsewhere; and no stored bank of 0 is found."""
    task, pool, encoded, target = task_of("perceptron", tmp_path)
    masks, found = bank.subsets(pool.ids, 2, 0.5, 0), []
    for eps_root in (0.0, 1e-3, 0.0):
        recipe = RECIPE.model_copy(update={"optimiser": "adamw", "eps_root": eps_root})
        found.append(bank.retrain(
            task, encoded, pool.ids, masks, recipe, seeds=(0,), targets={"t": target}, dtype=D, path=tmp_path / "bank",
        )["t"])  # fmt: skip
    assert np.abs(found[1] - found[0]).max() > 1e-2 and np.array_equal(found[2], found[0])
    assert len(list((tmp_path / "bank").iterdir())) == 2


def test_masks_of_several_sizes_train_for_their_own_lengths(tmp_path):
    task, pool, encoded, target = task_of("perceptron", tmp_path)
    masks = np.concatenate([bank.subsets(pool.ids, 2, share, 3) for share in (0.3, 0.8, 0.5)])
    got = bank.retrain(
        task, encoded, pool.ids, masks, RECIPE, seeds=(0,), targets={"t": target}, protocol="subset", dtype=D
    )["t"]
    for k, mask in enumerate(masks):
        want = alone(task, pool, encoded, target, mask, RECIPE, "subset", "loss")
        assert np.abs(got[k, 0] - want).max() < 1e-10


def test_a_model_does_not_depend_on_what_is_trained_beside_it(tmp_path, monkeypatch):
    task, pool, encoded, target = task_of("dropout", tmp_path)
    masks = bank.subsets(pool.ids, 7, 0.5, 0)

    def run(masks, **options):
        return bank.retrain(
            task, encoded, pool.ids, masks, RECIPE, seeds=(4,), targets={"t": target}, dtype=D, **options
        )["t"]

    whole = run(masks)
    assert np.abs(run(masks[::-1])[::-1] - whole).max() < 1e-12
    assert np.abs(run(masks[2:3]) - whole[2:3]).max() < 1e-12
    assert np.array_equal(run(masks, workers=2), whole)
    monkeypatch.setattr(bank, "MODELS", 3)
    monkeypatch.setattr(bank, "FEWEST", 2)
    assert np.abs(run(masks) - whole).max() < 1e-12


def test_frozen_parameters_stay(tmp_path):
    task, pool, encoded, target = task_of("perceptron", tmp_path)
    task.module.get_parameter("layers.0.weight").requires_grad_(False)
    masks = bank.subsets(pool.ids, 3, 0.5, 0)
    found = bank.retrain(task, encoded, pool.ids, masks, RECIPE, seeds=(0,), targets={"t": target}, dtype=D)["t"]
    want = alone(task, pool, encoded, target, masks[1], RECIPE, "weights", "loss")
    assert np.abs(found[1, 0] - want).max() < 1e-10
    other, *_ = task_of("perceptron", tmp_path)
    free = bank.retrain(other, encoded, pool.ids, masks, RECIPE, seeds=(0,), targets={"t": target}, dtype=D)["t"]
    assert np.abs(free - found).min(axis=2).max() > 1e-6


def test_subsets():
    ids = encode_ids(f"row {i}" for i in range(101))
    masks = bank.subsets(ids, 40, 0.5, 7)
    assert masks.shape == (40, 101) and (masks.sum(axis=1) == 50).all()
    assert (bank.subsets(encode_ids(map(str, range(100))), 3, 0.29, 0).sum(axis=1) == 29).all()
    mixed = np.random.default_rng(0).permutation(101)
    assert np.array_equal(bank.subsets(ids[mixed], 40, 0.5, 7), masks[:, mixed]), "they follow the ids"
    assert np.array_equal(bank.subsets(ids, 55, 0.5, 7)[:40], masks), "more subsets begin with the same"
    for other in (bank.subsets(ids, 40, 0.5, 8), masks[1:]):
        assert 0.4 < (other[:39] == masks[:39]).mean() < 0.6
    want = np.argsort(hash_ids(ids, "subset", 7, 2), kind="stable")[:50]
    assert np.array_equal(np.flatnonzero(masks[2]), np.sort(want))
    # Pairs of ids are together in a subset as often as chance has it.
    many = bank.subsets(ids, 2000, 0.5, 1).astype(float)
    share = many.T @ many / 2000
    expected = 50 / 101 * 49 / 100
    assert abs(share[~np.eye(101, dtype=bool)].mean() - expected) < 1e-12
    assert np.abs(share[~np.eye(101, dtype=bool)] - expected).max() < 6 * np.sqrt(expected * (1 - expected) / 2000)
    for share in (0.0, 1.0, 0.001):
        with pytest.raises(InputError, match="share"):
            bank.subsets(ids, 3, share, 0)


def test_dropout_is_keyed_and_of_its_share():
    task = Classifier(inputs=4, hidden=(50, 60), dropout=0.3)
    keys = hash_ids(encode_ids(map(str, range(300))), "noise", 1, 2)
    kept = task.noise(keys)
    assert {n: tuple(v.shape) for n, v in kept.items()} == {"kept.0": (300, 50), "kept.1": (300, 60)}
    for value in kept.values():
        assert abs(float(value.double().mean()) - 0.7) < 5 * np.sqrt(0.21 / value.numel())
        assert np.abs(np.corrcoef(value.numpy().T) - np.eye(value.shape[1])).max() < 6 / np.sqrt(300), (
            "places are apart"
        )
    agree = float((kept["kept.0"] == kept["kept.1"][:, :50]).double().mean())
    assert abs(agree - 0.58) < 0.02, "layers are apart"
    again = task.noise(keys[[7, 7, 3]])
    assert torch.equal(again["kept.0"], kept["kept.0"][[7, 7, 3]]), "nothing but an example's own key counts"
    grouped = task.noise(keys.reshape(3, 100))["kept.1"]
    assert torch.equal(grouped.reshape(300, 60), kept["kept.1"])


def test_dropout_is_off_in_scoring_and_right_on_average():
    task = Classifier(inputs=4, hidden=(8,), classes=3, dropout=0.25)
    params = {n: p * 3 for n, p in init_params(task.module, 0, D).items()}
    plain = Classifier(inputs=4, hidden=(8,), classes=3)
    batch = {"x": torch.randn(1, 4, dtype=D, generator=torch.Generator().manual_seed(0)), "y": torch.tensor([1])}
    assert torch.equal(task.logits(params, batch), plain.logits(params, batch))
    keys = hash_ids(encode_ids(map(str, range(20_000))), "noise", 0, 0)
    many = {n: x.expand(20_000, *x.shape[1:]) for n, x in batch.items()} | task.noise(keys)
    logits = task.logits(params, many)
    error = (logits.mean(dim=0) - plain.logits(params, batch)[0]).abs() / (logits.std(dim=0) / np.sqrt(20_000))
    assert float(error.max()) < 4.5 and float(logits.std(dim=0).min()) > 0.01


def test_tasks_keep_their_keys():
    assert Classifier(inputs=5, classes=3).describe() == {"task": "classifier", "inputs": 5, "hidden": [], "classes": 3}
    convnet = ImageClassifier(shape=(1, 4, 4), filters=(2,), classes=3).describe()
    assert set(convnet) == {"task", "shape", "filters", "classes", "activation"}
    with pytest.raises(InputError, match="nor another draw of first weights"):
        ImageClassifier(first="uniform")
    assert Classifier(dropout=0.1).describe() != Classifier().describe() != Classifier(activation="relu").describe()


def test_what_a_bank_costs(tmp_path):
    task, pool, encoded, target = task_of("perceptron", tmp_path)
    masks = bank.subsets(pool.ids, 3, 0.5, 0)
    one = 2 * (12 * 7 + 7 * 6 + 6 * 3)
    got = [
        bank.flops(task, encoded, masks, RECIPE, seeds=(0, 1), targets={"t": target}, protocol=p)
        for p in ("weights", "subset")
    ]
    assert got == [2 * 3 * (3 * one * 9 * 8 + 5 * one), 2 * 3 * (3 * one * 4 * 8 + 5 * one)]


WHOLE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_bank
test_bank.kept_bank(Path(sys.argv[2]), int(sys.argv[3]))
"""


def kept_bank(folder: Path, stop: int = 10**9) -> np.ndarray:
    """A bank of six chunks on disk; the process kills itself when it would keep one more than `stop`."""
    task, pool, encoded, target = task_of("perceptron", folder)
    bank.MODELS, bank.FEWEST = 4, 2
    whole, count = bank.Bank.keep, 0

    def keep(self: Any, chunk: Any, values: np.ndarray) -> None:
        nonlocal count
        count += 1
        if count > stop:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, chunk, values)

    bank.Bank.keep = keep  # type: ignore[method-assign]
    try:
        masks = bank.subsets(pool.ids, 10, 0.5, 0)
        return bank.retrain(
            task, encoded, pool.ids, masks, RECIPE, seeds=(0, 1), targets={"t": target}, path=folder / "bank"
        )["t"]
    finally:
        bank.Bank.keep, bank.MODELS, bank.FEWEST = whole, 64, 8  # type: ignore[method-assign]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted((folder / "bank").rglob("*")) if f.is_file()}


def test_a_killed_bank_goes_on_to_the_same_bytes(tmp_path):
    want = kept_bank(tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", WHOLE, str(Path(__file__).parent), str(tmp_path / "killed"), "2"])
    assert killed.returncode == -signal.SIGKILL
    assert len(files(tmp_path / "killed")) == 1 + 2 * 2
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "killed" / "bank").rglob("*.npy")}
    assert np.array_equal(kept_bank(tmp_path / "killed"), want)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert all(f.stat().st_mtime_ns == at for f, at in before.items()), "what was done is not done again"


def test_damage_is_mended_and_nothing_else_is_computed(tmp_path, monkeypatch):
    want = kept_bank(tmp_path)
    first, second, *_ = sorted((tmp_path / "bank").rglob("*.npy"))
    held = first.read_bytes()
    first.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    second.unlink()
    runs, whole = [], bank._run
    monkeypatch.setattr(bank, "_run", lambda b, chunk: runs.append(chunk.name) or whole(b, chunk))
    assert np.array_equal(kept_bank(tmp_path), want)
    assert sorted(runs) == sorted([first.stem, second.stem]) and first.read_bytes() == held


def test_everything_that_matters_is_in_the_key(tmp_path):
    task, pool, encoded, target = task_of("perceptron", tmp_path)
    other = prepared(task, vector_pool(5, inputs=12, seed=3), tmp_path / "other")

    def key(**changes: Any) -> str:
        fields: dict[str, Any] = dict(
            task=task, encoded=encoded, ids=pool.ids, recipe=RECIPE, targets={"t": target}, measure="loss",
            protocol="weights", dtype=torch.float32, start=None,
        )  # fmt: skip
        return bank.Bank(**{**fields, **changes}).key

    start = init_params(task.module, 0)
    changes: list[dict[str, Any]] = [
        {"task": Classifier(inputs=12, classes=3, hidden=(7, 6), activation="relu")}, {"encoded": other},
        {"ids": pool.ids[::-1]}, {"recipe": RECIPE.model_copy(update={"lr": 0.06})}, {"targets": {"t": other}},
        {"measure": "margin"}, {"protocol": "subset"}, {"dtype": D}, {"start": start},
        {"start": {n: p + 1 for n, p in start.items()}},
    ]  # fmt: skip
    keys = [key(), *(key(**change) for change in changes)]
    assert len(set(keys)) == len(keys)
    assert key(recipe=RECIPE.with_seed(9)) == keys[0], "the seeds are those of the bank"


def test_bad_input(tmp_path):
    task, pool, encoded, target = task_of("perceptron", tmp_path)
    text, words, tokens, own = task_of("text", tmp_path / "text")
    masks = bank.subsets(pool.ids, 2, 0.5, 0)

    def run(*changed: Any, recipe: Recipe = RECIPE, **options: Any) -> Any:
        given = dict(zip(("task", "encoded", "ids", "masks"), (task, encoded, pool.ids, masks), strict=True))
        given |= dict(zip(given, changed, strict=False)) | {"seeds": (0,), "targets": {"t": target}} | options
        return bank.retrain(recipe=recipe, **given)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="do not fit"):
        run(task, encoded, pool.ids, masks[:, :-1])
    with pytest.raises(InputError, match="do not fit"):
        run(task, encoded, pool.ids, masks.astype(float))
    with pytest.raises(InputError, match="nothing to retrain"):
        run(task, encoded, pool.ids, masks & False)
    with pytest.raises(InputError, match="nothing to retrain"):
        run(seeds=())
    with pytest.raises(InputError, match="no margin"):
        run(text, tokens, words.ids, masks, targets={"t": own}, measure="margin")
    wild = Recipe(steps=20, terms_per_step=8, optimiser="sgd", lr=1e30, clip=0.0)
    with pytest.raises(InputError, match="not finite"):
        run(recipe=wild)
