"""A run that is killed goes on to the same bytes; a damaged table is named, and mended as the message says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import small_study

pytestmark = pytest.mark.xdist_group("kill")  # one process makes the run that all compare with


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, Path, float, subprocess.CompletedProcess[str]]:
    """The study, its run, how many seconds that took, and what it said."""
    folder = tmp_path_factory.mktemp("undisturbed")
    study, begin = small_study.write_study(folder / "study"), time.monotonic()
    done = small_study.finish(study, folder / "run")
    assert done.returncode == 0, done.stderr
    return study, folder / "run", time.monotonic() - begin, done


@pytest.mark.timeout(300)
def test_killed_twice(undisturbed, tmp_path):
    study, whole, seconds, _ = undisturbed
    small_study.killed_and_finished(study, whole, tmp_path / "run", seconds, kills=2, seed=1)


def test_json_is_one_line_on_standard_output(undisturbed):
    _, run, _, done = undisturbed
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    said = json.loads(lines[0])
    assert Path(said["run"]) == run and Path(said["report"]).exists()
    assert {"name", "judged_loss", "gain_over_random", "ci", "verdict"} <= said["arms"][0].keys()


def test_workers_do_not_change_a_byte(undisturbed, tmp_path):
    study, whole, _, _ = undisturbed
    done = small_study.finish(study, tmp_path / "run", workers=1)
    assert done.returncode == 0, done.stderr
    small_study.same(whole, tmp_path / "run")


def test_a_flipped_byte_is_named_and_mended(undisturbed, tmp_path):
    study, whole, _, _ = undisturbed
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shard = next(run.glob("steps/scores-trak-*/00001.npy"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(bytes(data))
    hurt = small_study.finish(study, run)
    assert hurt.returncode == 2 and "Traceback" not in hurt.stderr
    assert str(shard) in hurt.stderr, hurt.stderr
    # The message says which folder to delete; that and the same command mend the run.
    found = re.search(r"delete the folder (\S+)", hurt.stderr)
    assert found and Path(found[1]) == shard.parent
    shutil.rmtree(found[1])
    mended = small_study.finish(study, run)
    assert mended.returncode == 0, mended.stderr
    small_study.same(whole, run)
