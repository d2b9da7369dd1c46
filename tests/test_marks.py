"""Marks of a training run: what they are, that a kill does not change them, and that methods read the right ones."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_study
from assay import proxies, study
from assay.core.errors import InputError
from assay.core.method import Featurizer, Mark, Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Selection
from assay.job import run_study
from assay.measure import Measurer
from assay.train import loop
from assay.train.models import init_params
from assay.train.recipe import Recipe
from helpers import classifier, prepared, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(steps=10, terms_per_step=8, lr=0.05, warmup=0.0, schedule="constant", seed=4)
NAMES = ["checkpoint.safetensors", "mark-3.safetensors", "mark-6.safetensors"]


def trained(folder: Path, out: Path | None, recipe: Recipe = RECIPE, **options: Any) -> loop.Trained:
    pool = vector_pool(30)
    task, encoded = classifier(pool, folder)
    return loop.train(task, encoded, np.arange(30), Selection.everything(pool.ids), recipe, out, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


def test_a_mark_is_what_a_run_of_so_many_steps_ends_in(tmp_path: Path) -> None:
    """At a constant rate the schedule does not know how long the run is."""
    trained(tmp_path / "a", tmp_path / "out", marks=3)
    assert sorted(contents(tmp_path / "out")) == NAMES
    for step in (3, 6):
        mark = loop.load(loop.mark_file(tmp_path / "out", step))
        short = trained(tmp_path / "a", None, RECIPE.model_copy(update={"steps": step}))
        assert mark.losses == short.losses and len(mark.losses) == step
        for held, want in ((mark.params, short.params), *((mark.state[s], short.state[s]) for s in short.state)):
            assert all(torch.equal(held[n], want[n]) for n in want)


def test_marks_change_nothing_else(tmp_path: Path) -> None:
    for marks in (1, 3):
        trained(tmp_path / "a", tmp_path / str(marks), marks=marks)
    plain = contents(tmp_path / "1")
    assert list(plain) == NAMES[:1] and plain[NAMES[0]] == contents(tmp_path / "3")[NAMES[0]]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_marks
from assay.train import optim
whole = optim.update
def update(recipe, grads, state, params, at):
    if at == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(recipe, grads, state, params, at)
optim.update = update
test_marks.trained(Path(sys.argv[2]), Path(sys.argv[3]), marks=3, save_every=4)
"""


def test_a_killed_run_leaves_the_same_marks(tmp_path: Path) -> None:
    """It goes on from step 4; were the mark of step 3 missing or damaged, it would begin anew to make it."""
    trained(tmp_path / "a", tmp_path / "whole", marks=3)
    killed = tmp_path / "killed"
    words = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "a"), str(killed), "7"]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    assert sorted(contents(killed)) == [*NAMES[1:], "state.safetensors"]
    for lost in ("nothing", "all", "half"):
        shutil.copytree(killed, tmp_path / lost)
        mark = tmp_path / lost / "mark-3.safetensors"
        if lost == "half":
            mark.write_bytes(mark.read_bytes()[:-40])
        elif lost == "all":
            mark.unlink()
        trained(tmp_path / "a", tmp_path / lost, marks=3, save_every=4)
        assert contents(tmp_path / lost) == contents(tmp_path / "whole"), lost


def test_there_are_no_more_marks_than_steps(tmp_path: Path) -> None:
    assert loop.mark_steps(4, 4) == [1, 2, 3, 4] and loop.mark_steps(7, 1) == [7]
    with pytest.raises(InputError, match="11 checkpoints of 10 steps"):
        trained(tmp_path, None, marks=11)


def test_trajectories_know_their_rates(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"schedule": "linear", "warmup": 0.2, "final": 0.0})
    last = trained(tmp_path / "a", tmp_path / "out", recipe, marks=4)
    marks = proxies.trajectory(tmp_path / "out", recipe, 4)
    assert [m.steps for m in marks] == [2, 3, 2, 3]
    assert [m.rate for m in marks[:2]] == [pytest.approx(x) for x in (0.025 + 0.05, 0.05 * (1 + 7 / 8 + 6 / 8))]
    assert sum(m.rate for m in marks) == pytest.approx(sum(recipe.rate(k) for k in range(10)))
    assert [m.optimiser["steps"] for m in marks] == [2, 5, 7, 10] and marks[0].optimiser["betas"] == recipe.betas
    assert all(torch.equal(marks[-1].params[n], last.params[n]) for n in last.params)


# What methods see.

EXACT = {"name": "gradients", "projection": "exact", "store": "float32"}


class World:
    """Two scoring models of three marks each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pool, self.target = folder, vector_pool(12), vector_pool(5, seed=1)
        self.task, _ = classifier(self.pool, folder / "pool")
        prepared(self.task, self.target, folder / "target")
        models = [[init_params(self.task.module, 10 * k + m) for m in range(3)] for k in range(2)]
        self.runs = [[Mark(p, {}, m + 1, 0.1 * (m + 1)) for m, p in enumerate(run)] for run in models]

    def measurer(self, out: Path, runs: list[list[Mark]] | None = None) -> Measurer:
        run, runs = Run.open(out, {}), runs or self.runs
        run.close()
        encodings = {self.pool.fingerprint: self.folder / "pool", self.target.fingerprint: self.folder / "target"}
        return Measurer(
            run, self.pool, self.target, task=self.task, models=[r[-1].params for r in runs], trajectories=runs,
            encodings=encodings, key="k",
        )  # fmt: skip


def test_members_are_models_or_every_mark(tmp_path: Path) -> None:
    measurer = World(tmp_path).measurer(tmp_path / "run")
    named = [(m.model, m.checkpoint) for m in measurer.members(make(Featurizer, EXACT), every=True)]  # type: ignore[attr-defined]
    assert named == [(0, 0), (0, 1), (0, -1), (1, 0), (1, 1), (1, -1)]
    plain = measurer.members(make(Featurizer, EXACT))
    assert [(m.model, m.checkpoint) for m in plain] == [(0, -1), (1, -1)]  # type: ignore[attr-defined]
    assert len(measurer.members(make(Featurizer, "embed"), every=True)) == 2, "it has no checkpoint to choose"


def test_a_table_is_of_the_mark_that_it_names(tmp_path: Path) -> None:
    world = World(tmp_path)
    measurer = world.measurer(tmp_path / "run")
    for member in measurer.members(make(Featurizer, EXACT), every=True):
        params = world.runs[member.model][member.checkpoint].params  # type: ignore[attr-defined]
        alone = world.measurer(tmp_path / str(member), [[Mark(params, {})]]).table(make(Featurizer, EXACT))
        table = measurer.table(member)
        assert table.values.tobytes() == alone.values.tobytes()
        assert table.meta["checkpoints"] == [loop.fingerprint(params)]
    every = [loop.fingerprint(mark.params) for run in world.runs for mark in run]
    assert measurer.checkpoints(make(Scorer, {"name": "graddot", "features": EXACT})) == every
    assert measurer.checkpoints(make(Scorer, "loss")) == [every[2]]


def test_another_mark_in_the_place_of_one_is_refused(tmp_path: Path) -> None:
    world, features = World(tmp_path), make(Featurizer, {**EXACT, "checkpoint": 1})
    world.measurer(tmp_path / "run").table(features)
    other = [[run[1], run[0], run[2]] for run in world.runs]
    world.measurer(tmp_path / "run", other).table(make(Featurizer, EXACT))
    with pytest.raises(InputError, match="weights of another model"):
        world.measurer(tmp_path / "run", other).table(features)


def test_a_mark_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no checkpoint 3"):
        World(tmp_path).measurer(tmp_path / "run").table(make(Featurizer, {**EXACT, "checkpoint": 3}))


def test_a_study_trains_its_scoring_models_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted data, in the same order and number of steps; as many marks as were asked for; one table each."""
    given: dict[str, Any] = {}

    def watched(*args: Any, **options: Any) -> Measurer:
        given.update(options, pool=args[1])
        return Measurer(*args, **options)

    monkeypatch.setattr(proxies, "Measurer", watched)
    path = small_study.write_study(tmp_path / "study", rows=60, steps=12)
    feature = {"name": "gradients", "rank": 2, "checkpoint": 1}
    chosen = study.load(path, ["proxy.checkpoints=3", "proxy.weight=0.5", "train.steps=2"])
    inner = {"name": "gradcos", "features": {"name": "gradients", "rank": 2}}
    tuned = {"name": "tuned", "inner": inner, "grid": {"features.rank": [1, 2]}, "groups": 2, "steps": 1}
    methods = ("random", {"name": "graddot", "features": feature}, tuned)
    result = run_study(chosen.model_copy(update={"methods": methods}), tmp_path / "run", workers=1)

    (folder,) = (tmp_path / "run").glob("steps/proxy-*")
    assert {"mark-4.safetensors", "mark-8.safetensors", "checkpoint.safetensors"} <= {p.name for p in folder.iterdir()}
    (marks,) = given["trajectories"]
    assert [m.steps for m in marks] == [4, 4, 4]
    pool: Pool = given["pool"]
    recipe = chosen.proxy.recipe.model_copy(update={"steps": 12}).with_seed(100_000)
    encoded = given["task"].encoded(given["encodings"][pool.fingerprint])
    halved = Selection(pool.ids, np.full(len(pool), 0.5))
    want = loop.train(given["task"], encoded, np.arange(len(pool)), halved, recipe).params
    assert all(torch.equal(marks[-1].params[n], want[n]) for n in want)
    (said,) = [
        c["detail"] for c in result["checks"] if c["name"] == "tuned: options of gradcos against 2 short trainings"
    ]
    assert "features.rank 1: " in said and "features.rank 2: " in said and said.count("(chosen)") == 1
