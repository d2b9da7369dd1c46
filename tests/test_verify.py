"""Verdicts: what was planted is found, what was not is left open, and paired training is the same however it is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Selection
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from assay.verify import compare, detectable, judged, paired_training, verify
from helpers import prepared, vector_pool

SEEDS, ITEMS, DRAWS = 5, 60, 3


def world(rng: np.random.Generator, gain: float = 0.0, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """An arm `[seeds, items]` and baseline draws `[draws, seeds, items]` with all the effects that a trial has."""
    item, seed = rng.normal(2, 0.5, ITEMS), rng.normal(0, 0.05, (SEEDS, 1))
    draw = rng.normal(0, noise, (DRAWS, 1, 1))
    base = item + seed + draw + rng.normal(0, noise, (DRAWS, SEEDS, 1)) + rng.normal(0, 0.05, (DRAWS, SEEDS, ITEMS))
    effect = gain + rng.normal(0, noise, ITEMS)
    arm = item + seed - effect + rng.normal(0, noise, (SEEDS, 1)) + rng.normal(0, 0.05, (SEEDS, ITEMS))
    return arm, base


@pytest.mark.parametrize(("gain", "truth"), [(0.3, "better"), (-0.3, "worse")])
def test_a_planted_effect_is_found(gain: float, truth: str) -> None:
    arm, base = world(np.random.default_rng(0), gain)
    found = compare(arm, base)
    assert found["verdict"] == truth
    assert found["ci"][0] < gain < found["ci"][1] and found["gain"] == pytest.approx(gain, abs=0.05)
    assert found["gain"] == pytest.approx(base.mean() - arm.mean())


def test_intervals_contain_the_truth_and_noise_is_unresolved() -> None:
    rng, inside, open_ = np.random.default_rng(1), 0, 0
    for _ in range(200):
        found = compare(*world(rng))
        inside += found["ci"][0] <= 0 <= found["ci"][1]
        open_ += found["verdict"] == "unresolved"
    assert inside == open_ >= 186, "95 % or more, less three standard errors"


def test_a_level_widens_the_interval() -> None:
    arm, base = world(np.random.default_rng(2), 0.05)
    widths = [np.ptp(compare(arm, base, level=level)["ci"]) for level in (0.8, 0.95, 0.99)]
    assert widths[0] < widths[1] < widths[2]


def test_an_identical_arm_is_unresolved() -> None:
    arm, _ = world(np.random.default_rng(3))
    assert compare(arm, np.stack([arm, arm])) == {"gain": 0.0, "ci": [0.0, 0.0], "verdict": "unresolved"}


def test_one_seed_and_one_item_decide_nothing() -> None:
    found = compare(np.array([[1.0]]), np.array([[[9.0]]]))
    assert found["verdict"] == "unresolved" and found["ci"] == [-math.inf, math.inf]


def test_items_that_differ_in_difficulty_do_not_blur_a_paired_gain() -> None:
    rng = np.random.default_rng(4)
    item = rng.normal(0, 10, ITEMS)
    arm = np.tile(item - 0.01, (SEEDS, 1)) + rng.normal(0, 1e-3, (SEEDS, ITEMS))
    assert compare(arm, np.tile(item, (2, SEEDS, 1)))["verdict"] == "better"


def test_verify_compares_each_arm_with_the_random_ones() -> None:
    rng = np.random.default_rng(5)
    arm, base = world(rng, 0.3)
    losses = {"random-0": base[0], "random-1": base[1], "random-2": base[2], "trak": arm, "everything": base.mean(0)}
    found = verify(losses)
    assert list(found) == list(losses)
    assert found["trak"]["verdict"] == "better" and found["trak"]["gain"] == compare(arm, base)["gain"]
    assert found["random-0"]["gain"] == pytest.approx(base[1:].mean() - base[0].mean())
    assert all(found[f"random-{k}"]["verdict"] == "unresolved" for k in range(3))
    assert found["trak"]["over_everything"]["verdict"] == "better"
    assert "over_everything" not in found["everything"]
    for name, own in losses.items():
        low, high = found[name]["judged_loss_ci"]
        assert low < own.mean() < high and found[name]["judged_loss"] == own.mean()
        assert found[name]["by_seed"] == pytest.approx(own.mean(axis=1).tolist())


def test_a_single_random_arm_has_nothing_to_be_held_against() -> None:
    arm, base = world(np.random.default_rng(6), 0.3)
    found = verify({"random-0": base[0], "trak": arm})
    assert "verdict" not in found["random-0"] and found["trak"]["verdict"] == "better"


def test_detectable_gain() -> None:
    """2.8 = 1.96 + 0.84: at that true gain a two-sided z test on the difference of two means finds it 4 times in 5."""
    rng, sd, n = np.random.default_rng(7), 0.1, 8
    losses = {f"random-{k}": rng.normal(0, sd, (n, 1)) + np.zeros((1, 4)) for k in range(400)}
    gain = detectable(losses)
    assert gain == pytest.approx(2.8 * sd * math.sqrt(2 / n), rel=0.05)
    differences = gain + rng.normal(0, sd, (20_000, n)).mean(axis=1) - rng.normal(0, sd, (20_000, n)).mean(axis=1)
    assert (differences / (sd * math.sqrt(2 / n)) > 1.96).mean() == pytest.approx(0.8, abs=0.03)
    assert math.isnan(detectable({"trak": np.zeros((3, 3))}))
    assert math.isnan(detectable({"random-0": np.zeros((1, 3))}))


# Paired training.


class Bench:
    def __init__(self, folder: Path) -> None:
        self.task = Classifier(inputs=5, hidden=(4,), classes=3)
        self.pool, self.judging = vector_pool(60), vector_pool(12, seed=1)
        self.encodings = {}
        for name, part in (("pool", self.pool), ("judging", self.judging)):
            prepared(self.task, part, folder / name)
            self.encodings[part.fingerprint] = folder / name
        ids = self.pool.ids
        self.arms = {
            "random-0": Selection.everything(ids[:30]), "random-1": Selection.everything(ids[30:]),
            "same": Selection.everything(ids[:30].copy()),
        }  # fmt: skip

    def train(
        self, out: Path, pool: Pool | None = None, judging: Pool | None = None,
        encodings: dict[str, Path] | None = None, **options: Any,
    ) -> tuple[Run, dict[str, Any]]:  # fmt: skip
        run = Run.open(out, {})
        recipe = Recipe(steps=6, terms_per_step=16, lr=0.05, seed=3)
        try:
            return run, paired_training(
                run, self.task, pool or self.pool, encodings or self.encodings, judging or self.judging, self.arms,
                recipe, seeds=2, **options,
            )  # fmt: skip
        finally:
            run.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def files(run: Run) -> dict[str, bytes]:
    kept = ("judged.jsonl", "checkpoint.safetensors")
    return {str(p.relative_to(run.path)): p.read_bytes() for p in run.path.rglob("*") if p.name in kept}


def test_paired_training_does_not_depend_on_the_workers(bench: Bench, tmp_path: Path) -> None:
    one, first = bench.train(tmp_path / "1")
    two, second = bench.train(tmp_path / "2", workers=2)
    assert files(one) == files(two) and len(files(one)) == 2 * 2 * 2, "two distinct arms, two seeds, two files"
    assert list(first) == list(second) == list(bench.arms)
    for arm in first:
        assert len(first[arm]) == 2
        for a, b in zip(first[arm], second[arm], strict=True):
            assert sorted(a) == ["accuracy", "loss"] and all((a[k] == b[k]).all() for k in a)
            assert a["loss"].shape == (12,) and np.isfinite(a["loss"]).all()
        assert (first[arm][0]["loss"] != first[arm][1]["loss"]).any(), "seeds differ"


def test_finished_training_is_reused(bench: Bench, tmp_path: Path) -> None:
    run, first = bench.train(tmp_path / "run")
    times = {p: p.stat().st_mtime_ns for p in run.path.rglob("judged.jsonl")}
    again, second = bench.train(tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("judged.jsonl")} == times
    for arm in first:
        assert all((a["loss"] == b["loss"]).all() for a, b in zip(first[arm], second[arm], strict=True))
    assert [s["flops"] for s in again.ledger] == [s["flops"] for s in run.ledger], "the cost is known again"


def test_an_equal_selection_is_trained_once_and_gives_the_same_numbers(bench: Bench, tmp_path: Path) -> None:
    run, found = bench.train(tmp_path)
    assert all((a["loss"] == b["loss"]).all() for a, b in zip(found["same"], found["random-0"], strict=True))
    assert len(list((run.path / "steps").glob("train-*"))) == 4


def test_a_damaged_job_is_trained_anew(bench: Bench, tmp_path: Path) -> None:
    run, first = bench.train(tmp_path)
    for kind in ("train", "judge"):
        step = next(run.steps.glob(f"{kind}-*"))
        (step / "step.json").unlink()
        for file in (*step.glob("*.jsonl"), *step.glob("*.safetensors")):
            file.write_text("half a li")
    _, second = bench.train(tmp_path)
    assert all((a["loss"] == b["loss"]).all() for arm in first for a, b in zip(first[arm], second[arm], strict=True))


def test_another_judging_half_finds_the_trainings_made(bench: Bench, tmp_path: Path) -> None:
    """What was trained does not depend on what judges it; and the numbers are those of training for it alone."""
    run, first = bench.train(tmp_path / "both")
    trained = {p: p.stat().st_mtime_ns for p in run.steps.glob("train-*/checkpoint.safetensors")}
    other = vector_pool(9, seed=2)
    prepared(bench.task, other, tmp_path / "encoded")
    encodings = {**bench.encodings, other.fingerprint: tmp_path / "encoded"}
    _, second = bench.train(tmp_path / "both", judging=other, encodings=encodings)
    assert {p: p.stat().st_mtime_ns for p in run.steps.glob("train-*/checkpoint.safetensors")} == trained
    assert len(list(run.steps.glob("judge-*"))) == 2 * len(trained)
    _, alone = bench.train(tmp_path / "alone", judging=other, encodings=encodings)
    assert all((a["loss"] == b["loss"]).all() for arm in alone for a, b in zip(alone[arm], second[arm], strict=True))
    assert len(second["same"][0]["loss"]) == 9 and len(first["same"][0]["loss"]) == 12


def test_costs_are_entered(bench: Bench, tmp_path: Path) -> None:
    """Three forward passes' worth for each of about steps x terms_per_step examples."""
    run, _ = bench.train(tmp_path)
    (entry,) = [e for e in run.ledger if e["stage"] == "train arms"]
    assert entry["flops"] == pytest.approx(4 * 3 * bench.task.forward_flops(np.ones(6 * 16)))
    assert entry["wall"] > 0 and entry["peak_rss"] > 0


def test_judged_reads_what_was_written(bench: Bench, tmp_path: Path) -> None:
    run, found = bench.train(tmp_path)
    folders = sorted(run.steps.glob("judge-*"))
    kept = [judged(folder)["loss"].tolist() for folder in folders]
    assert all(seed["loss"].tolist() in kept for arm in found.values() for seed in arm)
