"""The checks of a run: what is a rule, what has a bound, and what was only measured, each told as what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from assay.bench import league
from assay.job import run_study
from assay.report import page
from assay.study import parse

pytestmark = pytest.mark.usefixtures("one_thread")


def checks(folder: Path, lr: float) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """By name, of a study whose metagradient is of a training at this rate; and the whole result."""
    recipe = {"optimiser": "sgd", "lr": lr, "terms_per_step": 20, "clip": 0.0}
    metagrad = {"name": "metagrad", "recipe": recipe}
    found = run_study(
        parse(
            {
                "pool": {"builtin": "digits", "size": 100}, "target": {"count": 40}, "budget": "60%",
                "task": {"kind": "classifier", "hidden": [16]}, "proxy": {"steps": 40}, "train": {"repeats": 2},
                "verify": {"seeds": 2, "random": 1}, "methods": ["random"],
                "arms": [{"name": "mine", "method": metagrad}],
            }
        ),
        folder, workers=1,
    )  # fmt: skip
    return {check["name"]: check for check in found["checks"]}, found


def test_a_derivative_that_is_off_is_a_failed_check_and_breaks_no_rule(tmp_path: Path) -> None:
    for lr, good in ((0.5, True), (2.0, False)):
        found, result = checks(tmp_path / str(lr), lr)
        own = found["mine: derivative against finite differences"]
        assert own["ok"] is good and "rule" not in own, own
        said = page.verdict_sentences(result)
        assert (said[-1] == "1 check failed: mine: derivative against finite differences.") is not good
        rules = [name for name, check in found.items() if check.get("rule")]
        assert {f"mine: {x}" for x in ("every id scored once", "within budget", "no contaminated row")} <= {*rules}
        assert all(found[name]["ok"] is True for name in rules)
        league._obeyed(None, result)  # type: ignore[arg-type]


def test_the_page_calls_passed_only_what_has_passed() -> None:
    ended = {"kept": True, "off": False, "seen": None}
    result = {"checks": [{"name": name, "ok": ok, "detail": ""} for name, ok in ended.items()] + [{"name": "old"}]}
    found = page._checked(result["checks"])
    assert {end: [one["name"] for one in some] for end, some in found.items()} == {
        "failed": ["off"], "measured": ["seen", "old"], "passed": ["kept"],
    }  # fmt: skip
