"""A track that takes seconds: text that comes with Python, and a model of a few thousand weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TRACK = """\
name = "tiny"
about = "documentation and comments among docstrings and code"
source = "python"
rows = 40
more = {{ docs = 50 }}
shuffled = {{ docs = 20 }}
held = {{ docs = 24, comment = 24 }}
[tables]
docs = ["docs"]
both = ["docs", "comment"]
[study]
budget = "20%"
shard = 64
[study.task]
vocab = 300
width = 16
layers = 1
heads = 2
context = 32
[study.proxy]
steps = {steps}
recipe = {{ terms_per_step = 128 }}
[study.train]
steps = {steps}
recipe = {{ terms_per_step = 128, lr = 1e-2 }}
[study.verify]
seeds = 2
random = 2
"""


def write_track(folder: Path, *, steps: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.toml").write_text(TRACK.format(steps=steps), encoding="utf-8")
    return folder / "tiny.toml"


def start(track: Path, folder: Path, *extra: str) -> subprocess.Popen[str]:
    """`assay league` on the track, with its records and runs in a folder, in a session of its own."""
    words = [sys.executable, "-m", "assay.cli", "league", str(track), "--out", str(folder / "records")]
    words += ["--runs", str(folder / "runs"), "--workers", "2", "--json", *extra]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=track.parent)


def finish(track: Path, folder: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    process = start(track, folder, *extra)
    said, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)
