"""Twenty kills at random moments of a sweep of metagradients, and of a descent: same bytes, and little done twice."""

from __future__ import annotations

from pathlib import Path

import pytest

import small_sweep


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("what", ["sweep", "descent"])
def test_killed_twenty_times(tmp_path: Path, what: str) -> None:
    small_sweep.finish(small_sweep.start(what, tmp_path / "whole"))
    bound = small_sweep.bounds()[what]
    rounds = small_sweep.killed_and_finished(what, tmp_path / "whole", tmp_path / "out", 20, 3, bound)
    assert rounds < 20
