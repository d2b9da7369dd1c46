"""A run that is killed goes on to the same bytes; a damaged table is named, and mended as the message says."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("step", ["scores-trak", "features-gradients"])
def test_a_flipped_byte_is_mended_by_the_same_command(undisturbed, tmp_path, step):
    study, whole, _, _ = undisturbed
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    folder = max(run.glob(f"steps/{step}-*"), key=lambda path: len(list(path.glob("*.npy"))))
    shard = folder / "00001.npy"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(bytes(data))
    before = {path: path.stat().st_ino for path in folder.glob("0*.npy")}
    mended = small_study.finish(study, run)
    assert mended.returncode == 0, mended.stderr
    small_study.same(whole, run)
    again = {path.name for path, inode in before.items() if path.stat().st_ino != inode}
    assert {name.split(".")[0] for name in again} == {"00001"}, "one shard, and no other, is computed anew"
