"""Reducible loss against losses of models that are trained and read here, one example at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.core.errors import InputError
from assay.core.keys import digest
from assay.core.method import Scorer, make, placed
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Selection
from assay.core.task import Encoded
from assay.measure import Measurer
from assay.train.loop import save, train
from assay.train.models import LanguageModel, init_params, write_task
from assay.train.recipe import Recipe
from helpers import language, prepared, text_pool

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(steps=12, terms_per_step=64, lr=1e-2)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.pool, self.target = folder, text_pool(30), text_pool(8, seed=5)
        self.task, self.encoded = language(self.pool, folder / "pool")
        self.asked: Encoded = prepared(self.task, self.target, folder / "target")
        self.models: list[dict[str, Any]] = [init_params(self.task.module, s) for s in (1, 2)]

    def measurer(self, out: Path, task: Any = None) -> Measurer:
        run = Run.open(out, {"name": "rho"})
        run.close()
        encodings = {self.pool.fingerprint: self.folder / "pool", self.target.fingerprint: self.folder / "target"}
        return Measurer(
            run, self.pool, self.target, task=task or self.task, models=self.models, encodings=encodings, key="k",
            recipe=RECIPE,
        )  # fmt: skip

    def scores(self, out: Path, **fields: Any) -> np.ndarray:
        return self.measurer(out).table(make(Scorer, {"name": "rho", **fields})).values[:, 0]

    def losses(self, params: Any, task: Any = None) -> np.ndarray:
        """One example at a time."""
        with torch.no_grad():
            rows = [(task or self.task).loss(params, self.encoded.inputs(np.array([i]))) for i in range(len(self.pool))]
        return torch.cat(rows).double().numpy()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("rho"))


def test_a_reference_trained_on_the_target_from_its_first_weights(world: World, tmp_path: Path) -> None:
    """s = mean loss of the scoring models - loss of the reference, trained here by the same recipe for three passes."""
    found = world.scores(tmp_path / "a", epochs=3)
    steps = -(-3 * int(world.asked.sizes.sum()) // 64)
    recipe = RECIPE.model_copy(update={"steps": steps, "seed": int(digest(0, "rho")[:8], 16)})
    everything = Selection.everything(world.target.ids)
    reference = train(world.task, world.asked, np.arange(len(world.asked)), everything, recipe).params
    truth = np.mean([world.losses(p) for p in world.models], axis=0) - world.losses(reference)
    np.testing.assert_allclose(found, truth, atol=1e-5)
    longer = world.scores(tmp_path / "b", recipe={"steps": steps + 20})
    assert np.abs(longer - found).max() > 1e-3


def test_a_reference_that_is_given(world: World, tmp_path: Path) -> None:
    """A folder as a run leaves it; of another width too, for only the reading must be the same. The model itself as the
    reference of one scoring model gives the difference to the mean."""
    other = LanguageModel(tokenizer=world.task.tokenizer, vocab=280, width=8, layers=1, heads=2, context=24)
    for name, task, params in (
        ("same", world.task, world.models[0]), ("other", other, init_params(other.module, 3))
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        trained = train(
            task,
            world.encoded,
            np.arange(30),
            Selection.everything(world.pool.ids),
            RECIPE.model_copy(update={"steps": 1}),
            start=params,
        )  # noqa: E501
        save(folder / "checkpoint.safetensors", trained, "k")
        write_task(folder / "task.json", task)
        found = world.scores(tmp_path / f"run-{name}", reference=str(folder))
        truth = np.mean([world.losses(p) for p in world.models], axis=0) - world.losses(trained.params, task)
        np.testing.assert_allclose(found, truth, atol=1e-5)
    before = make(Scorer, {"name": "rho", "reference": str(tmp_path / "same")}).code()
    (tmp_path / "same" / "checkpoint.safetensors").write_bytes(
        (tmp_path / "other" / "checkpoint.safetensors").read_bytes()
    )
    assert make(Scorer, {"name": "rho", "reference": str(tmp_path / "same")}).code() != before, "stale scores are seen"


def test_what_cannot_be_subtracted_is_refused(world: World, tmp_path: Path) -> None:
    shorter = LanguageModel(tokenizer=world.task.tokenizer, vocab=280, width=8, layers=1, heads=2, context=16)
    (tmp_path / "m").mkdir()
    write_task(tmp_path / "m" / "task.json", shorter)
    pool = Pool.from_columns({"text": ["a b", "c d"]})
    encoded = prepared(shorter, pool, tmp_path / "e")
    once = RECIPE.model_copy(update={"steps": 1})
    trained = train(shorter, encoded, np.arange(2), Selection.everything(pool.ids), once)
    save(tmp_path / "m" / "checkpoint.safetensors", trained, "k")
    with pytest.raises(InputError, match="in another way: context"):
        world.scores(tmp_path / "1", reference=str(tmp_path / "m"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no model of this study's kind"):
        world.scores(tmp_path / "2", reference=str(tmp_path / "empty"))
    with pytest.raises(InputError, match="is not trained"):
        world.scores(tmp_path / "3", reference=str(tmp_path / "m"), recipe={"steps": 1})


def test_a_study_names_the_reference_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "lab" / "reference").mkdir(parents=True)
    spec = {"name": "rho", "reference": "reference"}
    assert placed(Scorer, spec, lambda path: str(tmp_path / "lab" / path)) == {
        "name": "rho", "reference": str(tmp_path / "lab" / "reference"),
    }  # fmt: skip
