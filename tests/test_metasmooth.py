"""`assay verify --metasmooth`: figures of real trainings, what is tried for which recipe, kills and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from assay.cli import app
from assay.core.errors import InputError
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.proxies import seed_of
from assay.report import page
from assay.study import parse
from assay.train.loop import train
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from assay.train.replay import Training
from assay.train.smooth import Probe, measure
from assay.trust import smooth
from assay.trust.run import verify_study
from helpers import prepared, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")

DEAF = """
import torch.nn as nn
import torch.nn.functional as F
from assay.train.module import ModuleTask


class Deaf(ModuleTask):
    columns = {"pixels": ("float32", 64), "label": ("int64",)}

    def build(self):
        return nn.Linear(64, 10)

    def per_example(self, model, batch):
        return 0 * F.cross_entropy(model(batch["pixels"]), batch["label"], reduction="none")


task = Deaf()
"""


def study(**changes: Any) -> Any:
    data: dict[str, Any] = {
        "name": "toy", "pool": {"builtin": "digits", "size": 120}, "target": {"count": 40},
        "task": {"kind": "classifier", "hidden": [8], "activation": "relu"},
        "proxy": {"steps": 12, "recipe": {"optimiser": "sgd", "lr": 0.5, "terms_per_step": 30, "weight_decay": 0.0}},
        "lds": {"targets": 20}, "smooth": {"directions": 2},
    }  # fmt: skip
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value}
    return parse(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("smooth") / "run"
    return out, verify_study(study(), out, workers=1, report=page.build, metasmooth=True)


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["smooth"]["rows"]}


def reread(out: Path, result: dict[str, Any], asked: Any) -> tuple[Classifier, Pool, list[Any], Recipe]:
    """The task, the pool, pool and target as a verification reads them, and the recipe of the first scoring model."""
    task = Classifier(hidden=(8,), activation="relu")
    encoded = [task.encoded(p) for p in sorted(out.glob("steps/encode-*"))]
    parts = [next(e for e in encoded if len(e) == count) for count in (result["pool"]["used"], 20)]
    pool = next(Pool.open(p / "pool") for p in out.glob("steps/builtin-*"))
    assert len(pool) == len(parts[0])
    recipe = Recipe(**asked.proxy.recipe.model_dump(exclude={"steps", "seed"}), steps=12, seed=seed_of(asked, 0))
    return task, pool, parts, recipe


def test_the_figures_are_those_of_the_trainings_themselves(whole: tuple[Path, dict[str, Any]]) -> None:
    """By the same names, by hand."""
    out, result = whole
    found = rows(result)
    task, known, (pool, target), recipe = reread(out, result, study())
    ids = known.ids

    def read(params: Any) -> np.ndarray:
        with torch.no_grad():
            return task.loss(params, target.inputs(np.arange(20))).double().numpy()

    for name, center, h, since in (
        ("as it is", 1.0, 0.1, 0), (smooth.HALVES, 0.5, 0.5, 0), ("the last tenth alone", 1.0, 0.1, 11),
    ):  # fmt: skip
        chosen = Selection(ids, np.full(len(ids), center))
        training = Training(task, pool, np.arange(len(ids)), chosen, recipe)
        want = measure(Probe(training, read, h, since), 2)
        assert found[name]["linearity"] == pytest.approx(np.mean([w.linearity for w in want]), abs=1e-6)
        assert found[name]["agreement_by_direction"] == pytest.approx([w.agreement for w in want], abs=1e-6)
        assert found[name]["curvature"] == pytest.approx(np.mean([w.curvature for w in want]), rel=1e-5)
    # Without decay or momentum, half the data weights are half the learning rate.
    half, slow = found["data weights of a half"], found["half the learning rate"]
    assert half["loss"] == pytest.approx(slow["loss"], rel=1e-5)
    assert half["mended"] == pytest.approx(slow["mended"], abs=1e-3)


def test_the_page_and_the_findings_say_it(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    text = (out / "report.html").read_text()
    base = result["smooth"]["rows"][0]
    assert base["verdict"] in ("usefully", "with care", "not usefully") and f"{base['linearity']:.3f}" in text
    for row in result["smooth"]["rows"]:
        assert row["name"] in text and row["seconds"] > 0 and row["flops"] > 0
    assert result["findings"][0].startswith("This training can") and "random half" in " ".join(result["findings"])
    assert not [line for line in text.splitlines() if "None" in line]
    again = CliRunner().invoke(app, ["report", str(out)])
    assert again.exit_code == 0 and (out / "report.html").read_text() == text


def test_what_is_tried_is_what_the_recipe_and_the_task_allow() -> None:
    def names(task: Any, **recipe: Any) -> dict[str, smooth.Variant]:
        return {v.name: v for v in smooth.variants(task, Recipe(**{"steps": 40, **recipe}), 1.0, 0.1, 3e-5)}

    plain = names(Classifier(), optimiser="sgd", clip=0.0, weight_decay=0.0)
    assert set(plain) == {
        "as it is", smooth.HALVES, "data weights of a half", "the last tenth alone", "half the learning rate",
        "twice the batch, half the steps", "half the steps", "weight decay",
    }  # fmt: skip
    assert plain["the last tenth alone"].since == 36 and plain["weight decay"].recipe.weight_decay == 0.01
    more = names(Classifier(hidden=(4,), activation="relu", dropout=0.2), optimiser="adamw", weight_decay=0.1)
    assert set(more) - set(plain) == {
        "eps_root", "ten times the weight decay", "no clipping", "GELU for ReLU", "no dropout",
        "first weights of PyTorch",
    }  # fmt: skip
    assert names(Classifier(), eps_root=1e-8)["more eps_root"].recipe.eps_root == 3e-5
    assert names(Classifier(), eps_root=1e-4)["more eps_root"].recipe.eps_root == 1e-2
    assert more["eps_root"].recipe.eps_root == 3e-5 and more["as it is"].recipe.eps_root == 0
    assert more["GELU for ReLU"].task.activation == "gelu" and more["no dropout"].task.dropout == 0  # type: ignore[attr-defined]
    assert more["first weights of PyTorch"].task.first == "uniform"  # type: ignore[attr-defined]
    for name, variant in more.items():
        assert name == "as it is" or variant.how
        changed = {k for k, v in variant.recipe if v != getattr(more["as it is"].recipe, k)}
        assert len(changed) <= (2 if name.startswith("twice") else 1)


def test_adamw_without_eps_root_is_measured_as_it_is(tmp_path: Path) -> None:
    recipe = {"optimiser": "adamw", "lr": 0.01, "terms_per_step": 30}
    asked = study(proxy={"steps": 6, "recipe": recipe}, smooth={"directions": 1, "remedies": False})
    result = verify_study(asked, tmp_path / "run", workers=1, metasmooth=True)
    (row,) = result["smooth"]["rows"]
    assert -1 <= row["metric"] <= 1 and row["metric"] != row["agreement"]
    # The trainer's own arithmetic, which has no root: bit for bit.
    task, pool = Classifier(inputs=5, hidden=(4,), classes=3), vector_pool(40)
    encoded, everything = prepared(task, pool, tmp_path / "pool"), Selection.everything(pool.ids)
    variant = smooth.variants(task, Recipe(steps=6, **recipe), 1.0, 0.1, 3e-5)[0]
    training = Training(task, encoded, np.arange(40), everything, variant.run)
    want = train(task, encoded, np.arange(40), everything, variant.recipe).params
    found = training.named(training.run(training.initial(), 0))
    assert all(torch.equal(found[name], p) for name, p in want.items())


def test_the_root_that_is_tried_is_the_one_that_metagradients_take(tmp_path: Path) -> None:
    from assay.train.root import rooted

    asked = study(proxy={"recipe": {"optimiser": "adamw", "lr": 0.01, "terms_per_step": 30}}, smooth={"directions": 1})
    result = verify_study(asked, tmp_path / "run", workers=1, metasmooth=True)
    task, pool, (encoded, _), recipe = reread(tmp_path / "run", result, asked)
    told: dict[str, Any] = {}
    context: Any = SimpleNamespace(
        task=task, pool=pool, encoded=lambda _: encoded, spent=lambda _: None,
        note=lambda *_, **facts: told.update(facts),
    )  # fmt: skip
    root = rooted(context, "metagrad", recipe, np.arange(len(pool))).eps_root
    assert rows(result)["eps_root"]["how"] == f"--set proxy.recipe.eps_root={root:g}" and 1e-6 < root < 1
    assert told == {"eps_root": root}


def test_a_killed_measurement_goes_on_from_the_trainings_it_has(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, one = [], smooth._train

    def some(bench: Any, item: Any) -> str:
        if len(trained) in (3, 14, 31):
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(item.file.name)
        return one(bench, item)

    monkeypatch.setattr(smooth, "_train", some)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            verify_study(study(), tmp_path / "run", workers=1, metasmooth=True)
    done = verify_study(study(), tmp_path / "run", workers=1, metasmooth=True)
    assert len(trained) - 3 == 5 * len(done["smooth"]["rows"])  # each once
    for row, other in zip(done["smooth"]["rows"], whole[1]["smooth"]["rows"], strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    count = len(trained)
    verify_study(study(), tmp_path / "run", workers=1, metasmooth=True)
    assert len(trained) == count and not list((tmp_path / "run" / "steps").glob("*.part"))


def test_a_loss_that_no_weight_reaches_is_an_error_and_no_smooth_training(tmp_path: Path) -> None:
    (tmp_path / "deaf_model.py").write_text(DEAF)
    asked = study(task={"kind": "module", "module": f"{tmp_path / 'deaf_model.py'}:task", "hidden": [],
                        "activation": "gelu"}, smooth={"remedies": False})  # fmt: skip
    with pytest.raises(InputError, match="data weights do not reach the loss"):
        verify_study(asked, tmp_path / "run", workers=1, metasmooth=True)


def test_the_command_prints_json_and_refuses_methods(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        'name = "toy"\n[pool]\nbuiltin = "digits"\nsize = 120\n[target]\ncount = 40\n[task]\nkind = "classifier"\n'
        '[proxy]\nsteps = 5\nrecipe = {optimiser = "sgd", lr = 0.5, terms_per_step = 30}\n'
        "[smooth]\ndirections = 1\nremedies = false\n"
    )
    command = ["verify", str(tmp_path / "study.toml"), "--metasmooth", "--workers", "1"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["smooth"]["rows"][0]["verdict"] == "usefully" and found["smooth"]["h"] == 0.1
    assert Path(found["report"]).exists()
    refused = CliRunner().invoke(app, [*command, "--methods", "trak"])
    assert isinstance(refused.exception, InputError) and "does not go with" in str(refused.exception)
    with pytest.raises(InputError, match=r"smooth\.h"):
        study(smooth={"h": 0.7})
