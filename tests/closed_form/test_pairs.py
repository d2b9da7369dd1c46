"""Exact gradients that are met as they are computed, against plain backward passes, one example at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.core.method import Featurizer, Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.table import Table
from assay.measure import Measurer
from assay.numerics import pairs
from assay.numerics.persample import gradients, trainable
from helpers import classifier, language, looped, prepared, text_pool, vector_pool, wide

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {"name": "gradients", "projection": "exact", "store": "float32"}


@dataclasses.dataclass
class World:
    """A model, and the gradients of pool and target by plain backward passes, `[n, p]`."""

    task: Any
    params: dict[str, torch.Tensor]
    pool: Pool
    target: Pool
    folder: Path
    rows: np.ndarray
    asked: np.ndarray

    def measurer(self, out: Path, *, pool: Pool | None = None, **options: Any) -> Measurer:
        run, pool = Run.open(out, {}), pool or self.pool
        run.close()
        paths = {p.fingerprint: self.folder / p.fingerprint for p in (pool, self.target) if p.columns}
        for part in (pool, self.target):
            if part.columns and not paths[part.fingerprint].exists():
                prepared(self.task, part, paths[part.fingerprint])
        return Measurer(
            run, pool, self.target, task=self.task, models=[self.params], encodings=paths, key="k", **options
        )

    def table(self, out: Path, spec: dict[str, Any], **options: Any) -> Table:
        return self.measurer(out, **options).table(make(Scorer, spec))


def flat(task: Any, params: Any, pool: Pool, path: Path) -> np.ndarray:
    found = looped(task, params, prepared(task, pool, path), np.arange(len(pool)))
    return torch.cat([g.flatten(1) for g in found.values()], dim=1).numpy()


@pytest.fixture(params=["perceptron", "decoder", "one token", "long pool"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """Layers that are passed once; many times; once by the target, whose texts are one token long; so by the pool."""
    if request.param == "perceptron":
        pool, target = vector_pool(40), vector_pool(9, seed=1)
        task, _ = classifier(pool, tmp_path / "whole", hidden=(7, 4))
    else:
        pool, target = text_pool(30), text_pool(9, seed=1)
        task, _ = language(pool, tmp_path / "whole", layers=1)
        empty = Pool.from_columns({"id": [f"e{k}" for k in range(5)], "text": [""] * 5})
        target = empty if request.param == "one token" else target
        pool = empty if request.param == "long pool" else pool
    params = wide(task)
    rows, asked = (flat(task, params, p, tmp_path / f"flat{k}") for k, p in enumerate((pool, target)))
    return World(task, params, pool, target, tmp_path / "encoded", rows, asked)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("targets", ["each", "mean"])
@pytest.mark.parametrize("name", ["graddot", "gradcos"])
def test_products_are_those_of_plain_backward_passes(world: World, tmp_path: Path, name: str, targets: str) -> None:
    rows, asked = (unit(x) if name == "gradcos" else x for x in (world.rows, world.asked))
    truth = rows @ asked.T
    truth = truth if targets == "each" else truth.mean(axis=1, keepdims=True)
    found = world.table(tmp_path / "run", {"name": name, "targets": targets, "features": EXACT})
    np.testing.assert_allclose(found.values, truth, rtol=0, atol=1e-10 * np.abs(truth).max())
    assert not list((tmp_path / "run" / "steps").glob("features-*")), "no row of the pool is kept"


@pytest.mark.parametrize("name", ["graddot", "gradcos", "tracin"])
def test_products_do_not_see_batches_shards_or_workers(world: World, tmp_path: Path, name: str) -> None:
    spec = {"name": name, "targets": "each", "features": EXACT}
    whole = world.table(tmp_path / "all", spec).values
    for at, options in enumerate([{"batch": 1}, {"batch": 7, "shard": 4}, {"shard": 8, "workers": 2}]):
        found = world.table(tmp_path / str(at), spec, **options).values
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-12 * np.abs(whole).max())


def test_a_pool_of_bare_ids_is_read_from_its_table(world: World, tmp_path: Path) -> None:
    """What has only features of the pool has the same scores."""
    feature = make(Featurizer, EXACT)
    made = world.measurer(tmp_path / "features")
    path, bare = made.path(feature, world.pool), Pool.bare(world.pool.ids)
    again = world.measurer(tmp_path / "features", pool=bare)
    again.given(feature, bare, path)
    for name in ("graddot", "gradcos"):
        spec = {"name": name, "targets": "each", "features": EXACT}
        found, truth = again.table(make(Scorer, spec)).values, world.table(tmp_path / name, spec).values
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-6 * np.abs(truth).max())


def test_a_gradient_of_zero_has_no_angle() -> None:
    pool = vector_pool(4)
    module = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False)).double()
    x = torch.tensor(np.array(pool.column("pixels")))
    x[2] = 0.0
    params = {n: p.detach() for n, p in module.named_parameters()}

    def loss(held: Any, inputs: Any) -> torch.Tensor:
        return torch.func.functional_call(module, held, (inputs["x"],)).square().sum(dim=1)

    def read(sketch: Any) -> Any:
        return gradients(module, loss, params, {"x": x}, sketch)[0]

    asked = pairs.queries(lambda: [read], trainable(module), unit=True, places=torch.arange(4))
    found = pairs.met(read, asked, unit=True)
    assert found[2].tolist() == [0.0] * 4 and found[:, 2].tolist() == [0.0] * 4
    assert [float(found[i, i]) for i in (0, 1, 3)] == pytest.approx([1.0] * 3, abs=1e-12)
