"""Fifty kills at random moments of `assay featurize`: the same bytes at the end, and no finished shard done twice."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

import small_store
from small_study import kill_leader

SHARD, KILLS = 16, 50


def published(out: Path) -> dict[str, int]:
    """Shards that are finished now, each with the inode of its numbers: a shard written again has another."""
    found = {}
    for marker in out.glob("steps/features-*/0*.json"):
        file = marker.with_suffix(".npy")
        found[file.name] = file.stat().st_ino
    return found


def finished(process: subprocess.Popen[str]) -> dict[str, int]:
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(said.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_fifty_times(tmp_path: Path, workers: int) -> None:
    world = small_store.write_world(tmp_path / "world", rows=1600, longest=60, width=64, layers=3, heads=4, context=160)
    options = {"workers": workers, "shard": SHARD}
    begin = time.monotonic()
    finished(small_store.start(world, tmp_path / "whole", **options))
    seconds, rng = time.monotonic() - begin, random.Random(workers)
    truth = small_store.whole(small_store.features(tmp_path / "whole"))
    kills, rounds, in_features, below = 0, 0, 0, []
    out = tmp_path / "out"
    while kills < KILLS // 2:
        before = published(out)
        process = small_store.start(world, out, **options)
        try:
            process.wait(timeout=rng.uniform(0.1, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            below += kill_leader(process)
            kills += 1
            _, alive = psutil.wait_procs(below, timeout=15)
            assert not alive, "workers outlived their killed main process"
            after = published(out)
            in_features += len(after) > len(before)
            assert all(after.get(name) == inode for name, inode in before.items()), "a finished shard was done again"
        else:
            finished(process)
            assert small_store.whole(small_store.features(out)) == truth
            shutil.rmtree(out)
            rounds += 1
    before = published(out)
    facts = finished(small_store.start(world, out, **options))
    assert small_store.whole(small_store.features(out)) == truth
    assert all(published(out)[name] == inode for name, inode in before.items())
    assert facts["computed"] <= facts["rows"] - SHARD * len(before), "more was computed than was missing"
    assert in_features >= KILLS // 8, (kills, rounds, in_features)
