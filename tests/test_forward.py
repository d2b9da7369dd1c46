"""The job hands forward-only methods what they need, and what they measured of themselves reaches the user."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import small_study
from assay import job, proxies, study
from assay.data import toys
from assay.measure import Measurer

METHODS = ("random", {"name": "directional", "metric": "adam"}, {"name": "response", "steps": 3, "eps": 1.0})


def test_a_study_of_forward_only_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_study.write_study(tmp_path / "study", rows=80, steps=12)
    leaked = {"id": "leak", "text": str(toys.skills(80).target["text"][0]) * 4, "domain": "good"}
    with open(path.parent / "pool.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(leaked) + "\n")
    given: dict[str, Any] = {}

    def watched(*args: Any, **options: Any) -> Measurer:
        given.update(options)
        return Measurer(*args, **options)

    monkeypatch.setattr(proxies, "Measurer", watched)
    chosen = study.load(path).model_copy(update={"methods": METHODS})
    result = job.run_study(chosen, tmp_path / "run", workers=1)

    (state,) = given["optimisers"]
    assert state["steps"] == 12 and state["betas"] == chosen.proxy.recipe.betas
    assert set(state["square"]) == set(given["models"][0])
    assert given["barred"].tolist() == [b"leak"]
    checks = {c["name"]: c["detail"] for c in result["checks"]}
    found = re.match(r"Spearman (\d\.\d+) on 32 examples", checks["directional: agreement with exact derivatives"])
    assert found and float(found[1]) > 0.95
    arms = {a["name"]: a for a in result["arms"]}
    assert arms["directional"]["cost_class"] == "forward" and arms["response"]["selected"] > 0
