"""Any module as a Task: convolutions and attention on small images."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.core.errors import InputError
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.core.task import Inputs
from assay.train import loop
from assay.train.module import ModuleTask
from assay.train.recipe import Recipe
from helpers import looped, prepared

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 8


class Residual(nn.Module):
    """Two convolutions with batch norm, and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))


class ResNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, width, 3, 2, 1), Residual(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean(dim=(2, 3)))


class ViT(nn.Module):
    """Patches, a learned position for each, one layer of attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.1 * torch.randn(1, (SIDE // 4) ** 2, width))
        self.norm, self.qkv, self.head = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.head((x + F.scaled_dot_product_attention(q, k, v)).mean(dim=1))


class Images(ModuleTask):
    columns = {"image": ("float32", 3, SIDE, SIDE), "label": ("int64",)}

    def build(self) -> nn.Module:
        return ResNet(8)

    def per_example(self, model: Any, batch: Inputs) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


@dataclass(frozen=True, kw_only=True)
class Patches(Images):
    width: int = 12

    def build(self) -> nn.Module:
        return ViT(self.width)


class Denoise(ModuleTask):
    """A regression with a submodule and a weight for each example."""

    columns = {"pixels": ("float64", 5), "label": ("float32",)}

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def per_example(self, model: Any, batch: Inputs) -> Tensor:
        return (model[2](model[1](model[0](batch["pixels"])))[:, 0] - batch["label"]).square()


def images(n: int, *, flat: bool = False) -> Pool:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    x = rng.normal(size=(n, 3, SIDE, SIDE)).astype(np.float32)
    x[np.arange(n), labels] += 1.0
    return Pool.from_columns({"image": x.reshape(n, -1).tolist() if flat else x.tolist(), "label": labels.tolist()})


TASKS = [Images(), Patches()]


@pytest.mark.parametrize("task", TASKS, ids=lambda t: type(t).__name__)
def test_the_loss_is_that_of_the_module(task: ModuleTask, tmp_path: Path) -> None:
    pool = images(6)
    encoded, params = prepared(task, pool, tmp_path), task.params()
    x, y = torch.tensor(pool.column("image")), torch.tensor(pool.column("label"))
    model = task.build().eval()
    model.load_state_dict(params, strict=False)
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y, reduction="none")
    assert torch.allclose(task.loss(params, encoded.inputs(np.arange(6))), expected, atol=1e-6)
    double = {n: p.double() for n, p in params.items()}
    task.module.double()  # buffers of batch norm
    together = task.loss(double, encoded.inputs(np.arange(6)))
    alone = torch.cat([task.loss(double, encoded.inputs(np.array([row]))) for row in range(6)])
    assert together.dtype == torch.float64 and torch.allclose(together, alone, rtol=0, atol=1e-12)
    task.module.float()


@pytest.mark.parametrize("task", TASKS, ids=lambda t: type(t).__name__)
def test_it_trains_to_the_same_bytes(task: ModuleTask, tmp_path: Path) -> None:
    pool = images(30)
    encoded, selection = prepared(task, pool, tmp_path), Selection(pool.ids, np.ones(30))
    recipe = Recipe(steps=20, terms_per_step=30, lr=3e-2)
    trained = loop.train(task, encoded, np.arange(30), selection, recipe, start=task.params())
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    again = loop.train(pickle.loads(pickle.dumps(task)), encoded, np.arange(30), selection, recipe, start=task.params())
    assert loop.fingerprint(again.params) == loop.fingerprint(trained.params)
    scratch = loop.train(task, encoded, np.arange(30), selection, recipe)
    assert scratch.losses[-1] < scratch.losses[0]


def test_submodules_see_the_parameters_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pool = Pool.from_columns({"pixels": rng.normal(size=(4, 5)).tolist(), "label": rng.normal(size=4).tolist()})
    task = Denoise()
    encoded, params = prepared(task, pool, tmp_path), {n: 2 * p.double() for n, p in task.params().items()}
    found = looped(task, params, encoded, np.arange(4))
    batch = encoded.inputs(np.arange(4))
    x, y = batch["pixels"], batch["label"].double()
    inner = (x @ params["0.weight"].T + params["0.bias"]).tanh()
    off = (inner @ params["2.weight"].T + params["2.bias"])[:, 0] - y
    assert torch.allclose(found["2.bias"][:, 0], 2 * off, atol=1e-12)
    back = (2 * off)[:, None] * params["2.weight"] * (1 - inner.square())
    assert torch.allclose(found["0.weight"], torch.einsum("bo,bi->boi", back, x), atol=1e-12)


def test_flops_are_counted() -> None:
    """By hand: a multiplication and an addition for each weight and place."""
    assert Denoise().forward_flops(np.ones(1)) == 2 * (5 * 4 + 4)
    side = SIDE // 2
    expected = 2 * side * side * (27 * 8 + 2 * 72 * 8) + 2 * 8 * 3
    assert Images().forward_flops(np.ones(5)) == 5 * expected


def test_flat_and_nested_images_are_the_same(tmp_path: Path) -> None:
    nested, flat = (
        prepared(Images(), images(3, flat=f), tmp_path / str(f)).inputs(np.arange(3)) for f in (False, True)
    )
    assert torch.equal(nested["image"], flat["image"]) and nested["image"].shape == (3, 3, SIDE, SIDE)


def test_building_is_keyed() -> None:
    state = torch.random.get_rng_state()
    a, b = Images().params(), Images().params()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a[n], b[n]) for n in a) and a["stem.weight"].std() > 0


def test_the_key_covers_source_and_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Patches().describe() == Patches().describe() != Patches(width=16).describe()
    assert Images().describe() != Patches().describe()
    text = (
        "from torch import nn\nfrom assay.train.module import ModuleTask\n"
        "class Net(nn.Linear):\n    def forward(self, x):\n        return super().forward(x)\n"
        "class Own(ModuleTask):\n    columns = {'pixels': ('float32', 2)}\n"
        "    def build(self):\n        return Net(2, 1)\n"
        "    def per_example(self, model, batch):\n        return model(batch['pixels'])[:, 0]\n"
    )
    keys = []
    monkeypatch.syspath_prepend(tmp_path)
    for index, change in enumerate([("", ""), ("", ""), ("[:, 0]", "[:, 0] * 2"), ("forward(x)", "forward(2 * x)")]):
        (tmp_path / f"own{index}.py").write_text(text.replace(*change))
        keys.append(__import__(f"own{index}").Own().describe()["source"])
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [[1.0], [1.0, 2.0]], "label": [0, 1]}, "'image' has values of different shapes"),
        ({"image": [[1.0], [2.0]], "label": [0, 1]}, r"(?s)shape \(1,\).*task says \(3, 8, 8\)"),
        ({"image": ["a", "b"], "label": [0, 1]}, "'image' is no column of numbers"),
        ({"image": np.zeros((2, 192)).tolist(), "label": [0, 0.5]}, "'label' has numbers that are not whole"),
        ({"image": np.full((2, 192), np.nan).tolist(), "label": [0, 1]}, "'image' has numbers that are not finite"),
        ({"image": np.zeros((2, 192)).tolist(), "text": ["a", "b"]}, "no column 'label'"),
    ],
)
def test_bad_columns(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        prepared(Images(), Pool.from_columns(columns), tmp_path)


def test_bad_tasks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes a dtype and the sizes"):

        class Wrong(Images):
            columns = {"image": (3, 8, 8)}

    class Mean(Images):
        def per_example(self, model: Any, batch: Inputs) -> Tensor:
            return super().per_example(model, batch).mean()

    encoded = prepared(Mean(), images(3), tmp_path)
    with pytest.raises(InputError, match=r"Mean gives \(\) for 3 examples"):
        Mean().loss(Mean().params(), encoded.inputs(np.arange(3)))
