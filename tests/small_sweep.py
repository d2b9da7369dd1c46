"""A sweep of metagradients and a descent, each in a process of its own that can be killed at any moment.

    python small_sweep.py sweep|descent FOLDER

Every finished step of training adds a byte to FOLDER/steps: `t` trained (or trained again), `r` reversed.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, BRANCH = 64, 8
RECIPE: dict[str, Any] = {"optimiser": "adamw", "lr": 0.01, "eps_root": 1e-8, "steps": STEPS, "terms_per_step": 20}
DESCENT: dict[str, Any] = {
    "recipe": RECIPE, "share": 0.5, "rate": 0.4, "metasteps": 3, "patience": 3, "window": 48, "branch": 6, "insert": 2,
}  # fmt: skip


def worst(steps: int, branch: int, since: int = 0) -> int:
    """Steps that one kill may cost: of training, those before the window or of one child of the tree; of the way back,
    those since the adjoint was kept last, and the replay of the children that these and the next one are in."""
    from assay.numerics.tree import exact_costs
    from assay.train.replay import KEPT

    width = -(-(steps - since) // branch)
    every = max(1, (steps - since) // KEPT)
    children = -(-every // width) + 1
    return max(since, width, every + children * exact_costs(width, branch)[0])


def bounds() -> dict[str, int]:
    """Of both. A descent that goes on makes its finite differences anew: training up to the window, and it twice."""
    since = STEPS - DESCENT["window"]
    return {
        "sweep": worst(STEPS, BRANCH),
        "descent": worst(STEPS, DESCENT["branch"], since) + since + 2 * (STEPS - since),
    }


def counted(folder: Path) -> None:
    """Have every finished step told."""
    from assay.train import loop, replay

    told = os.open(folder / "steps", os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def telling(real: Callable[..., Any], mark: bytes) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = real(*args)
            os.write(told, mark)
            return found

        return call

    loop.advance = telling(loop.advance, b"t")
    replay.reverse = telling(replay.reverse, b"r")


def sweep(folder: Path) -> None:
    import numpy as np
    import torch

    from assay.core.selection import Selection
    from assay.numerics.curvature import slopes
    from assay.train import loop
    from assay.train.models import Classifier
    from assay.train.recipe import Recipe
    from assay.train.replay import Training, metagradient
    from helpers import prepared, vector_pool

    pool, target = vector_pool(60), vector_pool(5, seed=1)
    task = Classifier(inputs=5, hidden=(64, 64), classes=3)
    encoded = prepared(task, pool, folder / "pool")
    asked = prepared(task, target, folder / "target").inputs(np.arange(5))
    made = Training(task, encoded, np.arange(60), Selection.everything(pool.ids), Recipe(**RECIPE))
    found = metagradient(
        made, lambda p: slopes(task, p, [asked], task.loss, made.moved, each=True), branch=BRANCH, phases=2,
        pushes=[5, 40], path=folder / "kept",
    )  # fmt: skip
    tensors = {"phases": torch.from_numpy(found.phases), **{f"final.{n}": p for n, p in found.final.items()}}
    for step, (params, push) in sorted(found.pushes.items()):
        tensors |= {f"push.{step}.{j}": a for j, a in enumerate(push)}
        tensors |= {f"weights.{step}.{n}": p for n, p in params.items()}
    loop.save(folder / "found.safetensors", loop.Trained(tensors, {}, []), "")


def descent(folder: Path) -> None:
    from assay.core.keys import digest
    from assay.core.method import Scorer, make
    from assay.core.pool import Pool
    from assay.core.run import Run
    from assay.data import toys
    from assay.measure import Measurer
    from assay.train.models import Classifier
    from helpers import prepared

    train, test, _ = toys.digits(flip=0.2, train=120, test=80)
    pool, target = Pool.from_columns(train), Pool.from_columns(test)
    task, encodings = Classifier(inputs=64, hidden=(32,), classes=10), {}
    for part in (pool, target):
        encodings[part.fingerprint] = folder / part.fingerprint
        prepared(task, part, folder / part.fingerprint)
    run = Run.open(folder / "run", {"name": "mgd"})
    try:
        models = [{n: p.new_zeros(p.shape) for n, p in task.module.named_parameters()}]
        measurer = Measurer(run, pool, target, task=task, models=models, encodings=encodings, key=digest("descent"))
        table = measurer.table(make(Scorer, {"name": "mgd", **DESCENT}))
    finally:
        run.close()
    (folder / "scores").write_bytes(table.align(pool.ids).values.tobytes())


def start(what: str, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, __file__, what, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def told(folder: Path) -> int:
    file = folder / "steps"
    return file.stat().st_size if file.exists() else 0


def contents(folder: Path) -> dict[str, bytes]:
    """All that is left but what tells seconds, and the steps."""
    clocked = ("steps", "cost.json", ".lock", "environment.json", "command.json")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in clocked)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def killed_and_finished(what: str, whole: Path, folder: Path, kills: int, seed: int, bound: int) -> int:
    """SIGKILL at `kills` random moments, going on each time; what is finished must be `whole` to the byte, for no more
    steps than it and `bound` for each kill. Returns how often it was finished and begun anew."""
    rng, rounds, spent, usual = random.Random(seed), 0, 0, told(whole)

    def done(process: subprocess.Popen[str]) -> None:
        finish(process)
        made, other = contents(whole), contents(folder)
        assert sorted(made) == sorted(other), sorted(made.keys() ^ other.keys())
        differing = [name for name in made if made[name] != other[name]]
        assert not differing, differing[:8]
        assert told(folder) <= usual + spent * bound, (told(folder), usual, spent, bound)

    left = kills
    while left:
        process, before = start(what, folder), told(folder)
        # A number of steps further on, and a part of one: where in the work, not when by a clock that others slow down.
        further = rng.randrange(usual // 4 if kills > 3 else usual // 3)
        while process.poll() is None and told(folder) < before + further:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.004)
        if process.poll() is None:
            process.kill()
            process.communicate()
            left, spent = left - 1, spent + 1
            continue
        done(process)
        shutil.rmtree(folder)
        rounds, spent = rounds + 1, 0
    done(start(what, folder))
    return rounds


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    counted(place)
    {"sweep": sweep, "descent": descent}[sys.argv[1]](place)
