"""Every study that is shipped parses, resolves, and names methods that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

import small_study
from assay import study
from assay.job import run_study

ROOT = Path(__file__).parents[1]
STUDIES = sorted(ROOT.glob("examples/*.toml")) + sorted(ROOT.glob("src/assay/demos/*.toml"))


def test_there_are_some():
    assert {p.name for p in STUDIES} >= {"domains.toml", "jsonl.toml", "digits.toml", "text.toml"}
    assert {p.stem for p in STUDIES} >= {"r0", "r1", "r2", "r3", "r7s", "filters"}


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_parses(path: Path):
    chosen = study.load(path)
    spec = chosen.spec()
    assert len(spec["arms"]) == len({a["name"] for a in spec["arms"]}) >= 4
    assert sum(a["name"].startswith("random-") for a in spec["arms"]) == chosen.verify.random
    if chosen.pool.path is not None:
        paths = [chosen.pool.path] if isinstance(chosen.pool.path, str) else chosen.pool.path
        assert all(p.startswith(str(path.parent)) for p in paths), "paths are relative to the study"


def test_the_method_in_contributing_runs(tmp_path, monkeypatch):
    """As a module of someone else's, named by its dotted path."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "rarity.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    small = ["train.steps=2", "proxy.steps=2", 'methods=["random", "lab.rarity"]']
    chosen = study.load(small_study.write_study(tmp_path / "study"), small)
    result = run_study(chosen, tmp_path / "run", workers=1)
    assert [a["name"] for a in result["arms"]] == ["random-1", "random-2", "lab.rarity"]
