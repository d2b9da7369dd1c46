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

    return {bar.what: bar.met for bar in filter_bars.check(rows) if bar.found == bar.found}


def test_each_bar_is_met_or_missed_on_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(
        monkeypatch,
        [
            row("exact_dup", "exact_dup", "recall", 1.0), row("exact_dup", "exact_dup", "precision", 0.999),
            row("near_dup", "minhash verify 0.7 star", "precision", 0.995),
            row("near_dup", "minhash", "precision", 0.5),
            row("near_dup decile 1, J 0.1 to 0.2", "minhash", "recall", 0.1, within_3_sd=True, expected=0.11, sd=0.001),
            row("near_dup decile 2, J 0.2 to 0.3", "minhash", "recall", 0.9, within_3_sd=False, expected=0.5, sd=0.01),
            row("foreign", "language", "recall", 0.99, kind="all", at="score", false_drops=0.01),
            row("foreign", "language", "recall", 0.999, kind="all", at="published", false_drops=0.2),
            row("foreign", "language", "recall", 0.2, kind="el", at="score", false_drops=0.01),
            row("leak", "gate verbatim", "recall", 1.0), row("leak", "gate question_only", "recall", 0.3),
        ],
    )  # fmt: skip
    assert found == {
        "exact_dup exact_dup recall at least 1": True, "exact_dup exact_dup precision at least 1": False,
        "near_dup minhash verify 0.7 star precision at least 0.99": True,
        "foreign language recall at least 0.98 at 1.25% false drops or fewer (1.00%)": True,
        "leak gate verbatim recall at least 1": True,
        "near_dup deciles of Jaccard whose recall is within max(3 sd, 1 pair) of 1-(1-s^r)^b, all "
        "(1 by the pair alone)": False,
    }  # fmt: skip


def test_a_bar_whose_false_drops_are_too_many_has_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(monkeypatch, [row("foreign", "language", "recall", 1.0, kind="all", at="score", false_drops=0.02)])
    assert found == {"foreign language recall at least 0.98 at 1.25% false drops or fewer (2.00%)": False}


def test_bars_of_what_did_not_run_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.parts import filter_bars

    nothing = filter_bars.lines([])
    assert len(nothing) == len(filter_bars.FLOORS) + 1 + len(filter_bars.PEERS) + len(filter_bars.GROWN)
    assert all(line.startswith("none ") and line.endswith(": did not run") for line in nothing)
    some = filter_bars.lines([row("leak", "gate verbatim", "recall", 1.0)])
    assert "met  leak gate verbatim recall at least 1: 1.000" in some and len(some) == len(nothing)


def test_both_ratios_of_fasttext_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.parts import filter_bars

    pace = lambda method, value, tool: row("speed", method, "docs_per_second", value, tool)  # noqa: E731
    peer = "datatrove 0.10.1"
    said = filter_bars.lines([
        pace("fasttext", 24_000, "assay"), pace("fasttext", 6000, peer),
        pace("fasttext, one number a word", 16_000, peer), pace("language", 21_000, "assay"),
        pace("language", 300, peer),
    ])  # fmt: skip
    assert "met  speed fasttext at least 2 times datatrove's (the same .bin): 4.000" in said
    assert said[-1] == "also speed fasttext over datatrove's (our .bin, one number a word): 1.500"
    whole = "speed language at least 2 times datatrove's (240 characters of each text against its whole documents)"
    assert f"met  {whole}: 70.000" in said


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
    *bars, last = done.stdout.splitlines()
    assert "met  speed rules docs_per_second at least 10,000: 12,000.000" in bars
    assert "none speed minhash docs_per_second at least 8,000: did not run" in bars
    assert json.loads(last) == json.loads((tmp_path / "out.json").read_text())
    assert [r["bench"] for r in json.loads(last)["rows"]] == ["filters"]
    both = front(tmp_path, "--parts", "classify,rules", *common)
    assert both.returncode == 1 and "classify: ValueError: no model" in both.stderr
    assert len(json.loads(both.stdout.splitlines()[-1])["rows"]) == 1, "a part that fails does not cost the others"
