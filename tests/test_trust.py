"""`assay verify`: a toy study end to end, planted methods, interruptions, refusals, and hostile text on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from assay.cli import app
from assay.core.errors import InputError
from assay.core.keys import decode_ids
from assay.core.method import Scorer, make
from assay.core.table import Table
from assay.numerics import lds
from assay.report import page
from assay.study import parse
from assay.train.module import load_task
from assay.trust import checks, standing
from assay.trust.contest import Entry, each
from assay.trust.findings import _check
from assay.trust.run import verify_study
from mylab.oracle import planted

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = """\
import torch.nn as nn
import torch.nn.functional as F
from assay.train.module import ModuleTask


class Tiny(ModuleTask):
    columns = {"x": ("float32", 5), "label": ("int64",)}

    def build(self):
        return nn.Linear(5, 3)

    def per_example(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


task = Tiny()
number = 3
"""
HOSTILE = "<script>alert(1)</script>\u202e"


def write(folder: Path, *, rows: int = 90, targets: int = 16, wrong: int = 9, hostile: str = "") -> Path:
    """Pool, target, truth and a model of the user's; the first `wrong` rows have a wrong label. Returns the folder.

    `hostile`: the model's module, of a pool with text whose ids, domains and texts try to be markup.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    centres = np.eye(3, 5) * 2.0
    for name, count, flips in (("pool", rows, wrong), ("target", targets, 0)):
        true = np.arange(count) % 3
        x = centres[true] + rng.normal(size=(count, 5))
        label = np.where(np.arange(count) < flips, (true + 1) % 3, true)
        columns = {"id": [f"{name} {i}" for i in range(count)], "x": x.tolist(), "label": label.tolist()}
        if hostile:
            columns["id"] = [f"{HOSTILE} {name} {i}" for i in range(count)]
            columns |= {"text": [f"{HOSTILE} {name} word{i % 7} number {i}" for i in range(count)]}
            columns |= {"domain": [HOSTILE] * count}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    truth = {"id": [f"pool {i}" for i in range(wrong)], "kind": ["flipped"] * wrong}
    pq.write_table(pa.table(truth), folder / "truth.parquet")
    (folder / f"{hostile or 'tiny_model'}.py").write_text(MODEL)
    return folder


def study(folder: Path, **changes: Any) -> Any:
    data: dict[str, Any] = {
        "name": "toy",
        "pool": {"path": str(folder / "pool.parquet"), "id": "id", "truth": str(folder / "truth.parquet")},
        "target": {"path": str(folder / "target.parquet"), "id": "id"},
        "task": {"module": f"{folder / 'tiny_model.py'}:task"},
        "proxy": {"steps": 40, "recipe": {"optimiser": "sgd", "lr": 0.5, "terms_per_step": 30, "clip": 0.0}},
        "methods": ["gradcos"],
        "lds": {"subsets": 16, "targets": 16, "probes": 3, "left_out": 10, "draws": 200},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return parse(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """One verification of real trainings, with a grid and every check."""
    grid = {"name": "trak", "grid": {"damping": [0.01, 0.1]}}
    names = ["removal", "leave_one_out", "known_answer", "tail_patch", "mislabel"]
    asked = study(folder, methods=["gradcos", grid], lds={"checks": names})
    return verify_study(asked, folder / "run", workers=1, report=page.build)


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def test_nulls_come_along_and_every_row_has_both_figures_an_interval_and_a_cost(whole: dict[str, Any]) -> None:
    rows = by_name(whole["methods"])
    assert set(rows) == {"random", "loss", "nearest", "graddot", "gradcos", "trak"}
    for name, row in rows.items():
        for label in ("lds_avg", "lds_fixed"):
            low, high = row[label]["ci"]
            assert low < row[label]["value"] < high and len(row[label]["by_target"]) == 8
        assert row["seconds"] > 0
        assert (row["verdict"] == "null") == (name not in ("gradcos", "trak"))
    assert rows["random"]["lds_avg"]["ci"][0] < 0 < rows["random"]["lds_avg"]["ci"][1]
    assert rows["trak"]["flops"] > rows["loss"]["flops"] > 0  # the scoring model, and then the method
    assert rows["trak"]["lds_avg"]["value"] > 0.4 > abs(rows["random"]["lds_avg"]["value"])
    assert whole["bank"]["ceiling"]["average"] > 0.9  # a convex model forgets its seed


def test_options_are_chosen_on_one_half_and_figures_are_of_the_other(folder: Path, whole: dict[str, Any]) -> None:
    row = by_name(whole["methods"])["trak"]
    assert row["options"]["damping"] == max(row["tried"], key=lambda one: one["selecting"])["damping"]
    steps = folder / "run" / "steps"
    values = [np.load(p / "values.npy") for p in steps.glob("bank-*") if (p / "values.npy").exists()]
    bank = next(v for v in values if v.shape == (16, 2, 16))
    tables = [Table.open(p) for p in steps.glob("scores-trak-*")]
    table = next(t for t in tables if t.meta["estimator"]["damping"] == row["options"]["damping"] and len(t) == 90)
    from assay.train.bank import subsets

    masks = subsets(table.ids, 16, 0.5, 0)
    found = lds.lds(masks, table.values, bank.mean(axis=1))
    assert row["lds_avg"]["by_target"] == pytest.approx(found[8:].tolist())
    chosen = next(one for one in row["tried"] if one["damping"] == row["options"]["damping"])
    assert chosen["selecting"] == pytest.approx(float(found[:8].mean()))


def test_an_option_at_the_edge_of_its_grid_is_told() -> None:
    def edges(values: list[Any], chosen: int) -> list[str]:
        tried = [{"damping": v, "selecting": 0.1, "each": True} for v in values]
        return standing.edges(Entry("trak", False, [], tried, chosen))

    assert edges([0.1, 1.0, 10.0], 2) == edges([0.1, 1.0, 10.0], 0) == ["damping"]
    assert edges([0.1, 1.0, 10.0], 1) == edges([0.1, 1.0], 1) == edges(["a", "b", "c"], 0) == []


def test_a_method_beats_the_nulls_only_if_it_beats_each_of_them() -> None:
    """The null with the least gain may be sure to be beaten, and another one not."""
    sure, unsure = (
        {"name": n, "value": v, "ci": ci} for n, v, ci in (("a", 0.1, [0.05, 0.15]), ("b", 0.3, [-0.1, 0.7]))
    )
    row = {"null": False, "lds_avg": {"value": 0.5, "ci": [0.3, 0.7]}}
    assert standing.least([sure, unsure]) == unsure == standing.least([unsure, sure])
    assert standing.verdict(row | {"over_null": unsure}, "lds_avg") == "better than random"
    assert standing.verdict(row | {"over_null": standing.least([sure])}, "lds_avg") == "beats the nulls"


def test_scorers_within_scorers_are_asked_for_each_target_and_for_what_is_measured(folder: Path) -> None:
    asked = study(folder, lds={"measure": "margin"})
    relatif = each(make(Scorer, "relatif"), asked).spec()
    assert (relatif["influence"]["targets"], relatif["influence"]["measure"]) == ("each", "margin")
    tuned = each(make(Scorer, {"name": "tuned", "grid": {"features.size": [64]}}), asked)
    assert tuned.spec()["targets"] == "each" and tuned.spec()["inner"]["queries"]["measure"] == "margin"
    ((_, point),) = tuned.points()  # type: ignore[attr-defined]
    assert point.spec()["features"]["size"] == point.spec()["queries"]["size"] == 64
    dsdm = each(make(Scorer, "dsdm"), asked).spec()
    assert dsdm["estimates"]["queries"]["measure"] == "margin"


def test_one_wrong_label_is_too_few_for_an_auc(monkeypatch: pytest.MonkeyPatch) -> None:
    trust = SimpleNamespace(job=None, spec=SimpleNamespace(level=0.95))
    for wrong in ([True] + [False] * 9, [False] + [True] * 9):
        monkeypatch.setattr(checks, "flipped", lambda _, wrong=wrong: np.array(wrong))
        assert "two of either kind" in checks.mislabel(trust)["refused"]  # type: ignore[arg-type]


def test_findings_say_whether_the_loss_alone_does_as_well() -> None:
    def sentence(check: str, loss: float) -> str:
        rows = [
            {"name": "trak", "null": False, "value": 0.8, "verdict": "better"},
            {"name": "loss", "null": True, "value": loss, "verdict": "better"},
        ]
        return _check({"title": "T", "check": check, "rows": rows, "control": {"name": "random"}})

    assert "loss alone does as well (0.90, the best method 0.80)" in sentence("mislabel", 0.9)
    assert "loss alone does not do as well" in sentence("known_answer", 0.7)
    assert "alone" not in sentence("tail_patch", 0.9)


def test_every_check_has_a_control_and_says_what_it_found(whole: dict[str, Any]) -> None:
    found = {check["check"]: check for check in whole["checks"]}
    assert set(found) == {"removal", "leave_one_out", "known_answer", "tail_patch", "mislabel"}
    for name, check in found.items():
        assert check["control"]["value"] is not None, name
        for row in check["rows"]:
            assert row.get("error") or row["verdict"] in ("better", "worse", "unresolved"), (name, row)
    assert by_name(found["known_answer"]["rows"])["nearest"]["first"] == 1.0  # a copy is nearest to itself
    assert by_name(found["mislabel"]["rows"])["loss"]["verdict"] == "better"  # the null that is often best
    assert {"random, same class", "trak"} <= {curve["name"] for curve in found["removal"]["curves"]}
    assert by_name(found["leave_one_out"]["rows"])["trak"]["value"] > 0.3
    sentences = " ".join(whole["findings"])
    assert all(
        title in sentences for title in ("Removal", "Leave-one-out", "Known answer", "Tail patch", "Wrong labels")
    )


def test_the_page_draws_all_of_it_and_is_complete_in_itself(folder: Path, whole: dict[str, Any]) -> None:
    text = (folder / "run" / "report.html").read_text()
    for words in ("Linear datamodeling score", "LDS against cost", "Removal of the best examples", "ceiling"):
        assert words in text
    for row in whole["methods"]:
        assert row["name"] in text
    assert not re.search(r"(src|href)=[\"']https?:", text)
    again = CliRunner().invoke(app, ["report", str(folder / "run")])
    assert again.exit_code == 0 and (folder / "run" / "report.html").read_text() == text


def test_a_killed_verification_goes_on_and_ends_in_the_same_figures(
    folder: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once after the bank and once in a check; the bank is not trained again."""
    from assay.train import bank

    trained, retrain = [], bank.retrain

    def counted(*args: Any, **options: Any) -> Any:
        trained.append(args[3].shape)
        return retrain(*args, **options)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bank, "retrain", counted)
    grid = {"name": "trak", "grid": {"damping": [0.01, 0.1]}}
    asked = study(folder, methods=["gradcos", grid], lds={"checks": ["removal"]})
    for module, name in ((standing, "score"), (checks, "_curve")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(KeyboardInterrupt):
                verify_study(asked, tmp_path / "run", workers=1)
    done = verify_study(asked, tmp_path / "run", workers=1)
    assert len(trained) == 2  # subsets, and removal: each once
    for row, other in zip(done["methods"], whole["methods"], strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
    assert done["checks"][0]["rows"] == next(c for c in whole["checks"] if c["check"] == "removal")["rows"]
    assert (tmp_path / "run" / "DONE").exists()


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank whose losses are linear in the subset, by the oracle's numbers, with noise of seeds as large again."""

    def retrain(_task: Any, _encoded: Any, ids: Any, masks: Any, _recipe: Any, **options: Any) -> dict[str, Any]:
        names = tuple(decode_ids(TARGETS))
        clean = -(masks @ planted(ids, names, 0))
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(len(masks), len(options["seeds"]), len(names)))
        return {"target": clean[:, None] + NOISE * noise}

    monkeypatch.setattr("assay.train.bank.retrain", retrain)


NOISE = 1.37  # the sd of a half of 90 numbers spread evenly over -1/2..1/2
TARGETS = np.array([])


def test_a_perfect_method_reaches_the_ceiling_and_a_useless_one_is_called_so(
    folder: Path, tmp_path: Path, linear: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assay.trust import ground

    trim = ground.trim

    def noted(trust: Any) -> None:
        trim(trust)
        monkeypatch.setattr("test_trust.TARGETS", trust.target.ids)

    monkeypatch.setattr("assay.trust.run.trim", noted)
    arms = [
        {"name": "perfect", "method": {"name": "mylab.oracle"}},
        {"name": "useless", "method": {"name": "mylab.oracle", "salt": 9}},
        {"name": "upside-down", "method": {"name": "mylab.oracle", "sense": -1.0}},
        {"name": "chosen", "method": {"name": "mylab.oracle"}, "grid": {"noise": [9.0, 0.0, 3.0]}},
    ]
    asked_for = {"subsets": 200, "checks": ["removal"], "removed": [0.1], "probes": 8}
    asked = study(folder, methods=[], arms=arms, lds=asked_for)
    result = verify_study(asked, tmp_path / "run", workers=1)
    rows, top = by_name(result["methods"]), result["bank"]["ceiling"]["average"]
    assert top == pytest.approx(np.sqrt(2 / 3), abs=0.06)  # two seeds, each as noisy as the subsets differ
    assert rows["perfect"]["lds_avg"]["value"] == pytest.approx(top, abs=0.05)
    assert rows["perfect"]["verdict"] == "beats the nulls" and "beats every baseline" in result["findings"][1]
    best = max((r for r in rows.values() if not r["null"]), key=lambda r: r["lds_avg"]["value"])
    assert f"{best['name']} predicts retraining best" in result["findings"][0]
    assert "the best of 4" in result["findings"][0] and "not corrected" in result["findings"][0]
    nulls = {name for name, row in rows.items() if row["null"]}
    for row in rows.values():
        assert row["over_null"]["name"] in nulls - {row["name"]}
        if "over_random" in row:
            assert row["over_null"]["ci"][0] <= row["over_random"]["ci"][0]
    assert rows["useless"]["verdict"] == "no better than random"
    assert rows["upside-down"]["verdict"] == "misleading"
    assert rows["chosen"]["options"]["noise"] == 0.0
    assert "useless" in next(s for s in result["findings"] if "no better than random" in s)
    removal = by_name(result["checks"][0]["rows"])
    assert removal["perfect"]["verdict"] == "better" and removal["upside-down"]["verdict"] != "better"


def test_one_seed_is_called_so(folder: Path, tmp_path: Path) -> None:
    result = verify_study(study(folder, lds={"seeds": 1, "checks": []}), tmp_path / "run", workers=1)
    assert result["bank"]["ceiling"] == {"one": None, "average": None}
    assert all(row["label"] == "lds_fixed" and "lds_avg" not in row for row in result["methods"])
    assert any("One seed" in sentence for sentence in result["findings"])
    page.check(result)
    assert "unknown" in page.render(result)


def test_leave_one_out_refuses_where_effects_are_chance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a model not known to be convex: effects that do not agree between seeds judge nobody."""
    rng = np.random.default_rng(0)

    class Stub:
        spec = study(folder, lds={"left_out": 30}).lds
        judge = np.arange(6)

        class job:  # noqa: N801
            task = object()
            study = study(folder)
            pool = type("P", (), {"ids": np.array([b"a%d" % i for i in range(40)]), "__len__": lambda _: 40})()

    noise = rng.normal(size=(30, 2, 6))
    monkeypatch.setattr(checks, "retrained", lambda *_: (noise, {"wall": 1.0, "flops": 1.0}))
    assert "chance" in checks.leave_one_out(Stub())["refused"]  # type: ignore[arg-type]
    Stub.spec = Stub.spec.model_copy(update={"seeds": 1})
    assert "lds.seeds" in checks.leave_one_out(Stub())["refused"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lds": {"subsets": 9}}, "9 subsets are too few"),
        ({"lds": {"targets": 6}}, "6 target examples are too few"),
        ({"lds": {"examples": 12}}, "12 usable examples"),
        ({"lds": {"measure": "margin"}}, "no margin"),
        ({"methods": [{"name": "trak", "grid": {"dampin": [1]}}]}, "no option 'dampin'"),
        ({"methods": [{"name": "trak", "grid": {"damping": 1}}]}, "unreadable grid"),
        ({"lds": {"checks": ["remval"]}}, "lds.checks"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assay.trust.run.train_proxies", lambda job: pytest.fail("trained"))
    with pytest.raises(InputError, match=message):
        verify_study(study(folder, **changes), tmp_path / "run", workers=1)


def test_a_grid_is_for_verify_alone(folder: Path, tmp_path: Path) -> None:
    from assay.job import run_study

    asked = study(folder, methods=[{"name": "trak", "grid": {"damping": [0.01, 0.1]}}])
    with pytest.raises(InputError, match="grid"):
        run_study(asked, tmp_path / "run", workers=1)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("tiny_model.py", "unreadable task"), ("nowhere.py:task", "no such file"), ("tiny_model.py:tusk", "task"),
        ("tiny_model.py:number", "no Task"), ("no.such.module:task", "cannot be imported"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_loaded_is_told(folder: Path, where: str, message: str) -> None:
    path = f"{folder}/{where}" if where.startswith("tiny") else where
    with pytest.raises(InputError, match=message):
        load_task(path)


def test_a_task_may_be_an_object_a_class_or_a_function(folder: Path) -> None:
    assert load_task(f"{folder}/tiny_model.py:task").describe() == load_task(f"{folder}/tiny_model.py:Tiny").describe()


def test_the_command_line_in_one_line_with_hostile_ids_and_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", hostile="hostile_model")
    words = ["verify", "--pool", str(folder / "pool.parquet"), "--target", str(folder / "target.parquet")]
    words += ["--task", f"{folder / 'hostile_model.py'}:task", "--text-column", "text", "--id-column", "id"]
    words += ["--methods", "gradcos", "--out", str(tmp_path / "run"), "--json", "--workers", "1"]
    sets = ["lds.subsets=12", "lds.targets=16", "proxy.steps=10", "lds.checks=['known_answer']", "lds.probes=2"]
    done = CliRunner().invoke(app, [*words, *[w for item in sets for w in ("--set", item)]])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert {row["name"] for row in found["methods"]} == {"random", "loss", "bm25", "graddot", "gradcos"}
    assert by_name(found["checks"][0]["rows"])["bm25"]["value"] > 0.8
    text = Path(found["report"]).read_text()
    assert "&lt;script&gt;alert(1)" in text and "<script>alert(1)" not in text and "\u202e" not in text


def test_the_keys_of_a_study_are_frozen() -> None:
    from assay.specs import LdsSpec

    assert list(LdsSpec.model_fields) == [
        "examples", "targets", "subsets", "share", "seeds", "protocol", "measure", "level", "draws", "checks", "probes",
        "removed", "left_out", "proponents",
    ]  # fmt: skip
