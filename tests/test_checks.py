"""The checks of a run: what is a rule, what has a bound, and what was only measured, each told as what it is."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from assay.bench import league
from assay.card import card, manifest
from assay.core import notes
from assay.job import run_study
from assay.report import page
from assay.study import parse
from assay.terminal import show_result
from assay.train import finite

pytestmark = pytest.mark.usefixtures("one_thread")


def checks(folder: Path, lr: float, arms: Any = None) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """By name, of a study whose metagradient, unless other arms are given, is of a training at this rate; and the whole
    result."""
    recipe = {"optimiser": "sgd", "lr": lr, "terms_per_step": 20, "clip": 0.0}
    metagrad = {"name": "metagrad", "recipe": recipe}
    found = run_study(
        parse(
            {
                "pool": {"builtin": "digits", "size": 100}, "target": {"count": 40}, "budget": "60%",
                "task": {"kind": "classifier", "hidden": [16]}, "proxy": {"steps": 40}, "train": {"repeats": 2},
                "verify": {"seeds": 2, "random": 1}, "methods": ["random"],
                "arms": arms or [{"name": "mine", "method": metagrad}],
            }
        ),
        folder, workers=1,
    )  # fmt: skip
    return {check["name"]: check for check in found["checks"]}, found


def test_a_derivative_that_is_off_is_a_failed_check_and_breaks_no_rule(tmp_path: Path) -> None:
    """It is told in the verdict, in the terminal and on the card of the dataset."""
    name = "mine: derivative against finite differences"
    for lr, good in ((0.5, True), (2.0, False)):
        found, result = checks(tmp_path / str(lr), lr)
        own = found[name]
        assert own["ok"] is good and "rule" not in own, own
        assert (page.verdict_sentences(result)[-1] == f"1 check failed: {name}.") is not good
        console = Console(file=io.StringIO(), width=200)
        show_result(result, console)
        assert (f"check failed: {name}: {own['detail']}" in console.file.getvalue()) is not good  # type: ignore[attr-defined]
        mine = next(arm for arm in result["arms"] if arm["name"] == "mine")
        assert (f"- {name}" in card(mine, result)) is not good
        assert [check["ok"] for check in manifest(mine, result)["checks"] if check["name"] == name] == [good]
        rules = [name for name, check in found.items() if check.get("rule")]
        assert {f"mine: {x}" for x in ("every id scored once", "within budget", "no contaminated row")} <= {*rules}
        assert all(found[name]["ok"] is True for name in rules)
        league._obeyed(None, result)  # type: ignore[arg-type]


def test_what_arms_rest_on_is_told_with_their_names(tmp_path: Path) -> None:
    """A method within a method, features that two arms share, a Table that two arms share; not what was only tried."""
    poor, good = ({"name": "influence", "solver": "arnoldi", "rank": rank} for rank in (1, 500))
    methods = {
        "flat": {"name": "relatif", "influence": {**poor, "damping": 0.01}},
        "influence": {**good, "damping": 10.0},
        "again": {**good, "damping": 10.0},
        "graddot": {"name": "graddot"},
        "gradcos": {"name": "gradcos"},
        "picked": {
            "name": "tuned",
            "inner": poor,
            "grid": {"damping": [1e-4, 1e3]},
            "steps": 5,
            "groups": 8,
            "parts": 4,
        },
    }
    _, result = checks(tmp_path, 0.5, [{"name": name, "method": method} for name, method in methods.items()])
    told = [(check["name"], check["ok"]) for check in result["checks"] if not check.get("rule")]
    solves = [one for one in told if "solve by arnoldi" in one[0]]
    assert sorted(solves) == [
        ("again: solve by arnoldi", True),
        ("flat (influence): solve by arnoldi", False),
        ("influence: solve by arnoldi", True),
        ("picked (influence): solve by arnoldi", True),
    ]
    assert [one for one in told if "(gradients)" in one[0]] == [
        ("graddot, gradcos (gradients): gradients against plain backward passes", True)
    ]
    cards = {arm["name"]: card(arm, result) for arm in result["arms"] if arm["name"] in methods}
    assert [name for name, text in cards.items() if "Checks that failed" in text] == ["flat"]
    assert "- flat ?influence?: solve by arnoldi" in cards["flat"]


@pytest.mark.parametrize(
    ("gaps", "ok", "kept"),
    [([0.01, 0.05], True, 0.05), ([0.01, 0.3], False, 0.3), ([0.05, math.nan], False, None), ([math.inf], False, None)],
)
def test_a_gap_that_is_no_number_is_no_small_one(gaps: list[float], ok: bool, kept: float | None) -> None:
    held: dict[str, Any] = {}
    warned: list[str] = []

    def note(what: str, detail: str, *, ok: Any = None, **numbers: Any) -> None:
        notes.keep(held, what, detail, ok, numbers)

    finite.tell(SimpleNamespace(note=note, warn=warned.append), "x", gaps, "weights move by")  # type: ignore[arg-type]
    (found,) = held.values()
    assert found["ok"] is ok and found["apart"] == kept and bool(warned) is not ok
    json.dumps(held, allow_nan=False)


def test_the_page_calls_passed_only_what_has_passed() -> None:
    """What failed comes first and all of it is counted; what has passed is folded."""
    ended = {f"off {k}": False for k in range(70)} | {"seen": None, "kept": True, "held": True}
    found = [{"name": name, "ok": ok, "detail": f"of {name}"} for name, ok in ended.items()] + [{"name": "old"}]
    result: dict[str, Any] = {
        "format": 1, "name": "m", "pool": {"rows": 10}, "target": {"name": "t", "measure": "nats"},
        "budget": {"unit": "examples", "amount": 5}, "training": {"seeds": [0]}, "checks": found,
        "arms": [{"name": "random-1", "verdict": "baseline", "judged_loss": 1.0, "by_seed": [1.0]}],
    }  # fmt: skip
    assert page.verdict_sentences(result)[-1] == ("70 checks failed: off 0, off 1, off 2, off 3, off 4 and 65 more.")
    section = page.render(result).split('id="checks"')[1].split("</section>")[0]
    text = " ".join(re.sub(r"<[^>]*>", " ", section).split())
    failed, rest = text.split("and 10 more")
    measured, passed = rest.split("2 checks passed")
    assert failed.count("✗ failed off") == 60 and "✓" not in failed and "·" not in failed
    assert [measured.count(f"· measured {name}") for name in ("seen of seen", "old")] == [1, 1]
    assert [passed.count(f"✓ passed {name}") for name in ("kept of kept", "held of held")] == [1, 1]
    assert "✗" not in rest and "✓" not in measured and "·" not in passed
