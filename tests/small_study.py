"""A small study with known answers, run in a process of its own: what the tests of kills and of plans share."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from assay.core.keys import digest_file
from assay.data import toys

STUDY = """\
name = "small"
budget = "40%"
shard = 32
methods = [
    "random", "bm25", {{name = "loss_diff", steps = 5, terms_per_step = 256}},
    {{name = "trak", features = {{name = "gradients", rank = 4}}}},
]
[pool]
path = "pool.jsonl"
id = "id"
domain = "domain"
[target]
path = "target.parquet"
id = "id"
[task]
vocab = 300
width = 16
layers = 1
heads = 2
context = 32
[proxy]
steps = {steps}
recipe = {{terms_per_step = 128}}
[train]
steps = {steps}
recipe = {{terms_per_step = 128}}
[verify]
seeds = 2
random = 2
"""

# What a run may write differently each time: seconds, memory, and where it stands.
CLOCKED = {"wall", "cpu", "peak_rss", "selection_seconds", "ledger", "command", "seconds"}


def write_study(folder: Path, *, rows: int = 160, steps: int = 205) -> Path:
    """Pool, target and `study.toml` in a folder. More than 200 steps, so that training keeps its state once."""
    folder.mkdir(parents=True, exist_ok=True)
    made = toys.skills(rows)
    lines = [json.dumps(row, ensure_ascii=False) for row in made.pool.to_pylist()]
    (folder / "pool.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pq.write_table(made.target, folder / "target.parquet")
    (folder / "study.toml").write_text(STUDY.format(steps=steps))
    return folder / "study.toml"


def start(study: Path, out: Path, *, workers: int = 2, extra: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`assay run` on the study, in a session of its own."""
    words = [sys.executable, "-m", "assay.cli", "run", str(study), "--out", str(out), "--workers", str(workers)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*words, "--json", *extra], stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=study.parent
    )


def finish(study: Path, out: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    process = start(study, out, **options)
    said, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def kill_leader(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL the main process alone; returns the ones below it, which must end on their own."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    process.kill()
    process.wait()
    assert process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    return below


def timeless(value: Any) -> Any:
    """Nested values without what a clock, a memory meter or a path wrote."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKED}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(run: Path) -> dict[str, Any]:
    """Every file of a run: a hash of its bytes, or its numbers where the clock has a part in them.

    `cost.json` and the ledger hold seconds and memory only; the report is drawn from `result.json`, which is compared.
    """
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if path.name in ("cost.json", "command.json", ".lock", "report.html"):
            found[name] = None
        elif name == "result.json" or (name.startswith("dataset") and path.name == "manifest.json"):
            found[name] = timeless(json.loads(path.read_text()))
        else:
            found[name] = digest_file(path)
    return found


def same(one: Path, other: Path) -> None:
    """Assert that two runs hold the same files with the same content; the first few that differ are named."""
    a, b = contents(one), contents(other)
    assert sorted(a) == sorted(b), {"only in one": sorted(a.keys() ^ b.keys())[:8]}
    differing = [name for name in a if a[name] != b[name]]
    assert not differing, differing[:8]


def killed_and_finished(study: Path, whole: Path, out: Path, seconds: float, kills: int, seed: int) -> int:
    """Kill the main process at `kills` random moments, going on each time; every finished run must equal `whole`.

    Returns how often a run was finished before its turn to be killed came (it is then begun anew).
    """
    rng, below, rounds = random.Random(seed), [], 0
    for _ in range(kills):
        process = start(study, out)
        try:
            process.wait(timeout=rng.uniform(0.2, 0.8) * seconds)
        except subprocess.TimeoutExpired:
            below += kill_leader(process)
        else:
            said, errors = process.communicate()
            assert process.returncode == 0, said + errors
            same(whole, out)
            shutil.rmtree(out)
            rounds += 1
    done = finish(study, out)
    assert done.returncode == 0, done.stderr
    same(whole, out)
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive, "workers outlived their killed main process"
    return rounds
