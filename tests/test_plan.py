"""`plan`: every stage is there, more work takes more time, and JSON is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import small_study
from assay import plan, study
from assay.cli import app
from assay.core.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_study.write_study(tmp_path_factory.mktemp("plan")).parent


def made(folder: Path, *changes: str) -> plan.Plan:
    return plan.plan(study.load(folder / "study.toml", changes), workers=1)


def test_every_stage_once_in_the_order_of_the_run(folder):
    names = [step.stage for step in made(folder).steps]
    assert len(names) == len(set(names))
    assert names[:4] == ["read", "gate", "encode", "proxy"]
    assert names[-3:] == ["select", "train arms", "report"]
    between = {
        "score: random",
        "score: bm25",
        "score: loss_diff",
        "features: gradients",
        "features: gradients (target)",
    }
    assert between | {"score: trak", "score: loss"} == set(names[4:-3])


def test_numbers_add_up(folder):
    found = made(folder)
    assert found.seconds == pytest.approx(sum(s.seconds for s in found.steps)) and found.seconds > 0
    assert found.memory == max(s.memory for s in found.steps) > 1e8
    assert all(s.seconds >= 0 and s.memory >= 0 and s.disk >= 0 for s in found.steps)
    spec = found.spec()
    assert json.loads(json.dumps(spec)) == spec
    assert [s["stage"] for s in spec["steps"]] == [s.stage for s in found.steps]
    assert spec["rows"] == 160 and spec["jobs"] == 2 * (2 + 3) and spec["training_steps"] == 205


def draft(rows: int, chosen: study.Study, folder: Path) -> plan.Plan:
    """The stages for so many rows at rates that no clock has a part in."""
    from assay.core.pool import Pool
    from assay.core.target import Target
    from assay.data import toys

    toy = toys.skills(160)
    pool = Pool.from_columns(toy.pool)
    rates = {"train": 1e4, "forward": 4e4, "gradient": 1e4, "rss": 4e8}
    methods = [plan.make(plan.Scorer, arm.method) for arm in chosen.contestants()]
    target = Target.split(Pool.from_columns(toy.target))
    held = plan._Draft(
        chosen, plan.sketch_task(chosen, pool, folder), methods, target, rows, 20.0 * rows, rates, 2, 1e9, 0.1
    )
    held.proxy()
    held.scores()
    held.training()
    return plan.Plan(list(held.steps.values()))


def test_more_work_takes_more(folder):
    open_steps = ["train.steps=100000", "proxy.steps=100000"]
    chosen = study.load(folder / "study.toml")
    by_share = chosen.model_copy(
        update={
            "train": chosen.train.model_copy(update={"steps": None}),
            "proxy": chosen.proxy.model_copy(update={"steps": None}),
        }
    )
    small, large = draft(10_000, by_share, folder), draft(20_000, by_share, folder)
    assert 1.7 < large.seconds / small.seconds < 2.1
    assert large.disk > small.disk
    assert large.memory == small.memory, "features stream: memory does not grow with the pool"
    longer = draft(10_000, study.load(folder / "study.toml", open_steps), folder)
    assert longer.seconds > draft(10_000, chosen, folder).seconds
    seeds = by_share.model_copy(update={"verify": by_share.verify.model_copy(update={"seeds": 4})})
    assert draft(10_000, seeds, folder).seconds > small.seconds


def test_exact_gradients_that_are_met_take_time_and_no_disk(folder):
    """A table of them would have 10,000 rows as long as the model."""
    found = []
    for projection in ("exact", "sparse"):
        graddot = {"name": "graddot", "features": {"name": "gradients", "projection": projection}}
        chosen = study.load(folder / "study.toml").model_copy(update={"methods": ("random", graddot)})
        found.append({s.stage: s for s in draft(10_000, chosen, folder).steps})
    met, stored = found
    assert not [name for name in met if name.startswith("features")] and "features: gradients" in stored
    assert met["score: graddot"].disk == stored["score: graddot"].disk < 1e5
    assert met["score: graddot"].seconds > 10_000 * 20 / 1e4 / 2, "the gradient passes of the pool, on two workers"


def test_expected_stages_are_those_that_run(folder, tmp_path):
    """The names that the progress display waits for are the names that the stages announce."""
    from assay.core.progress import Progress
    from assay.job import Job, run_study

    class Listening(Progress):
        def __init__(self) -> None:
            self.stages: list[str] = []

        def begin(self, stage: str, units: int, label: str = "") -> None:
            self.stages.append(stage)

    heard, expected = Listening(), {}

    def estimate(job: Job) -> None:
        if hasattr(job, "pool"):
            expected.update(plan.expectation(job))

    chosen = study.load(folder / "study.toml", ["train.steps=3", "proxy.steps=3"])
    run_study(chosen, tmp_path / "run", workers=1, progress=heard, estimate=estimate)
    assert {s.stage for s in made(folder).steps} == set(heard.stages) - {"estimate"}
    assert not expected or set(expected) == set(heard.stages) - {"read", "estimate"}


def test_digits_on_the_command_line():
    result = CliRunner().invoke(app, ["plan", "demo:digits", "--json", "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    found = json.loads(result.stdout)
    assert found["rows"] == 1200 and found["jobs"] == 30
    assert {"seconds", "memory", "disk", "steps", "rates", "calibration_seconds"} <= found.keys()
    table = CliRunner().invoke(app, ["plan", "demo:digits", "--workers", "1"])
    assert table.exit_code == 0 and "train arms" in table.output and "total" in table.output


def test_an_empty_pool_is_said(folder):
    (folder / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty|no rows|nothing"):
        made(folder, "pool.path='" + str(folder / "empty.jsonl") + "'")


def retraining(found: plan.Plan) -> list[float]:
    return [step.seconds for step in found.steps if step.stage == "retrain (assay verify)"]


def test_a_study_that_says_how_it_is_verified_has_the_time_of_its_bank(folder: Path, monkeypatch) -> None:
    """Every retraining takes its steps at the pace that was measured, and none are planned where none are asked for."""
    assert not retraining(made(folder))
    assert retraining(made(folder, "lds.subsets=10", "lds.seeds=1", "lds.checks=[]"))[0] > 0
    # From here on the pace is said: what one plan and the next measure of a busy machine cannot be compared.
    monkeypatch.setattr(plan, "bank_pace", lambda *_: 0.05)
    few = made(folder, "lds.subsets=10", "lds.seeds=1", "lds.checks=[]", "proxy.steps=7")
    more = made(folder, "lds.subsets=10", "lds.seeds=1", "lds.checks=['removal']", "lds.probes=4", "proxy.steps=7")
    assert few.facts["retrainings"] == {"bank": 10}
    # Methods that are no nulls, the best null, and two fair draws: for 4 targets and 2 sizes.
    removals = 1 + 4 * 2 * (2 + 1 + 2)
    assert more.facts["retrainings"] == {"bank": 10, "removal": removals}
    assert retraining(more)[0] - retraining(few)[0] == pytest.approx(removals * 7 * 0.05)
