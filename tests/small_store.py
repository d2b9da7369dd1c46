"""A small pool, a target and a model on disk, featurized: what the tests of the store and of its kills share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from assay import store
from assay.core.pool import Pool
from assay.train.loop import Trained, save
from assay.train.models import LanguageModel, init_params, train_tokenizer, write_task
from helpers import text_pool


def write_pool(path: Path, pool: Pool) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in pool.column("text")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_world(folder: Path, *, rows: int = 60, longest: int = 12, **sizes: int) -> Path:
    """`pool.jsonl`, `target.jsonl` and `model/`, which is as a run leaves its scoring model, but not trained."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = text_pool(rows, longest=longest)
    write_pool(folder / "pool.jsonl", pool)
    write_pool(folder / "target.jsonl", text_pool(9, seed=1, longest=longest))
    shape = {"vocab": 280, "width": 16, "layers": 1, "heads": 2, "context": 24, **sizes}
    task = LanguageModel(tokenizer=train_tokenizer(pool, vocab=shape["vocab"]), **shape)
    write_model(folder / "model", task, seed=0)
    return folder


def write_model(path: Path, task: Any, seed: int) -> None:
    path.mkdir(exist_ok=True)
    write_task(path / "task.json", task)
    save(path / "checkpoint.safetensors", Trained(init_params(task.module, seed), {}, []), "test")


def order(world: Path, *, sets: tuple[str, ...] = ("rank=4", "shard=8"), **options: Any) -> store.Order:
    return store.order(str(world / "pool.jsonl"), str(world / "model"), sets=sets, **options)


def words(world: Path, out: Path, *, shard: int = 8, workers: int = 1, extra: tuple[str, ...] = ()) -> list[str]:
    """The same as a command line."""
    words = ["featurize", "--pool", "pool.jsonl", "--model", "model", "--out", str(out), "--workers", str(workers)]
    return [sys.executable, "-m", "assay.cli", *words, "--set", "rank=4", "--set", f"shard={shard}", "--json", *extra]


def start(world: Path, out: Path, **options: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = words(world, out, **options)
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=world)


def features(out: Path) -> Path:
    """The folder of the pool's features; `.part` while they are made."""
    found = sorted(out.glob("steps/features-*"))
    assert len(found) == 1, found
    return found[0]


def shards(folder: Path) -> dict[str, bytes]:
    """The files of numbers in a table's folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def whole(folder: Path) -> dict[str, bytes]:
    """All files of a table's folder but what a clock wrote."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "cost.json"}
