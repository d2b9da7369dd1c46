"""Twenty kills at random moments."""

from __future__ import annotations

import time

import pytest

import small_study


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_twenty_times(tmp_path):
    study, begin = small_study.write_study(tmp_path / "study", rows=320, steps=450), time.monotonic()
    done = small_study.finish(study, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    small_study.killed_and_finished(
        study, tmp_path / "whole", tmp_path / "run", time.monotonic() - begin, kills=20, seed=2
    )
