"""A sweep of metagradients, or a descent, that is killed goes on to the same bytes; it does little twice."""

from __future__ import annotations

from pathlib import Path

import pytest

import small_sweep


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["sweep", "descent"])
def test_killed_twice(tmp_path: Path, what: str) -> None:
    small_sweep.finish(small_sweep.start(what, tmp_path / "whole"))
    bound = small_sweep.bounds()[what]
    small_sweep.killed_and_finished(what, tmp_path / "whole", tmp_path / "out", 2, 1, bound)
