"""The bars of filters, and the front that joins their benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FRONT = ROOT / "benchmarks" / "filters.py"
pytestmark = pytest.mark.skipif(not FRONT.exists(), reason="the package is installed without its benchmarks")


def row(case: str, method: str, metric: str, value: float, tool: str = "assay", **more: Any) -> dict[str, Any]:
    return {"case": case, "method": method, "metric": metric, "value": value, "tool": tool, "seconds": 1.0, **more}


def told(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> dict[str, bool]:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.parts import filter_bars

    return {bar.what: bar.met for bar in filter_bars.check(rows)}


def test_each_bar_is_met_or_missed_on_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(
        monkeypatch,
        [
            row("exact_dup", "exact_dup", "recall", 1.0), row("exact_dup", "exact_dup", "precision", 0.999),
            row("near_dup", "minhash verify 0.7 star", "precision", 0.995),
            row("near_dup", "minhash", "precision", 0.5),
            row("near_dup decile 1, J 0.1 to 0.2", "minhash", "recall", 0.1, within_3_sd=True),
            row("near_dup decile 2, J 0.2 to 0.3", "minhash", "recall", 0.9, within_3_sd=False),
            row("foreign", "language", "recall", 0.99, kind="all", at="score", false_drops=0.01),
            row("foreign", "language", "recall", 0.999, kind="all", at="published", false_drops=0.2),
            row("foreign", "language", "recall", 0.2, kind="el", at="score", false_drops=0.01),
            row("leak", "gate verbatim", "recall", 1.0), row("leak", "gate question_only", "recall", 0.3),
        ],
    )  # fmt: skip
    assert found == {
        "exact_dup exact_dup recall at least 1": True, "exact_dup exact_dup precision at least 1": False,
        "near_dup minhash verify 0.7 star precision at least 0.99": True,
        "foreign language recall at least 0.98": True, "leak gate verbatim recall at least 1": True,
        "near_dup deciles of Jaccard whose recall is within 3 sd of 1-(1-s^r)^b, all": False,
    }  # fmt: skip


def test_pace_beside_the_peer_and_growth_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = lambda method, value, tool="assay": row("speed", method, "docs_per_second", value, tool)  # noqa: E731
    peak = lambda case, value: row(case, "minhash", "peak_rss_bytes", value)  # noqa: E731
    found = told(
        monkeypatch,
        [
            speed("minhash", 9000), speed("minhash", 5000, "datatrove 0.10.1"), speed("rules", 30_000),
            speed("rules", 1000, "datatrove 0.10.1"), peak("memory-60k", 100), peak("memory-600k", 130),
        ],
    )  # fmt: skip
    assert found == {
        "speed minhash docs_per_second at least 8,000": True, "speed rules docs_per_second at least 10,000": True,
        "speed minhash at least 2 times datatrove's": False, "speed rules at least 2 times datatrove's": True,
        "memory minhash, 600k over 60k documents at most 1.25": False,
    }  # fmt: skip


STUB = """
from pathlib import Path
DATA = Path("data/domains")
def rows(data, quick, peer, threads):
    assert data.name == "domains" and quick and peer is None and threads == 1
    return [{"bench": "x", "case": "speed", "tool": "assay", "method": "rules", "metric": "docs_per_second",
             "value": 12000.0, "ci": None, "seconds": 1.0}]
"""


def front(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The front on a copy of the benchmarks in which `rules` is a stub and `classify` fails."""
    parts = folder / "benchmarks" / "parts"
    if not parts.exists():
        parts.mkdir(parents=True)
        for name in ("filters.py", "core.py", "parts/__init__.py", "parts/bars.py", "parts/filter_bars.py"):
            (folder / "benchmarks" / name).write_bytes((ROOT / "benchmarks" / name).read_bytes())
        (parts / "contest.py").write_text("OURS = 'assay'\nRow = dict\n")
        (parts / "rules.py").write_text(STUB)
        (parts / "classify.py").write_text("def rows(data, quick, peer, threads):\n    raise ValueError('no model')\n")
    command = [sys.executable, str(folder / "benchmarks" / "filters.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_front_joins_parts_and_prints_json_last(tmp_path: Path) -> None:
    data = tmp_path / "data"
    missing = front(tmp_path, "--data", str(data))
    assert missing.returncode == 2 and "name the folder with --data or ASSAY_DATA" in missing.stderr
    assert front(tmp_path, "--parts", "ruels").returncode == 2
    (data / "domains").mkdir(parents=True)
    for name in ("domains", "defects"):
        (data / "domains" / f"{name}.parquet").touch()
    common = ("--quick", "--data", str(data), "--threads", "1", "--json", str(tmp_path / "out.json"))
    done = front(tmp_path, "--parts", "rules", *common)
    assert done.returncode == 0, done.stderr
    *_, bar, last = done.stdout.splitlines()
    assert bar == "met  speed rules docs_per_second at least 10,000: 12,000.000"
    assert json.loads(last) == json.loads((tmp_path / "out.json").read_text())
    assert [r["bench"] for r in json.loads(last)["rows"]] == ["filters"]
    both = front(tmp_path, "--parts", "classify,rules", *common)
    assert both.returncode == 1 and "classify: ValueError: no model" in both.stderr
    assert len(json.loads(both.stdout.splitlines()[-1])["rows"]) == 1, "a part that fails does not cost the others"
