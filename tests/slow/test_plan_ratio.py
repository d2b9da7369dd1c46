"""The plan of the first demo against the demo itself, on this machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def assay(*words: str) -> dict:
    command = [sys.executable, "-m", "assay.cli", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_time_and_memory_within_a_factor_of_one_and_a_half(tmp_path):
    planned = assay("plan", "demo:text")
    run = assay("demo", "text", "--out", str(tmp_path / "run"))
    ratios = {"time": planned["seconds"] / run["wall"], "memory": planned["memory"] / run["peak_rss"]}
    assert all(1 / 1.5 < r < 1.5 for r in ratios.values()), ratios
