"""What a reversed step of training costs, in units of one training step: a Llama of 4 layers and width 128, AdamW.

    python -m benchmarks.parts.reversal [--quick]

`train` is the trainer's own step (gradient, clipping, update). `step-only`: `reverse` with 1 target and with 16.
`sqrt-1-target`: whole sweeps of 256 steps by the tree of 16 branches, each in units of a training whose steps go on in
between, less 1 for its own. `log-1-target`: what the tree of two costs, by its exact number of restored steps at the
price of a training step. `sqrt-16-targets`: as the last, a target. Memory, of a sweep of 2 or of 16 branches, in memory
or on disk: `seen`, the most bytes of tensors alive at once, `formula` (parts/live.py), and `process`, by how much the
process grows, with what its allocator keeps.
bergson's `magic` is timed as a process, less its `train` of the same documents: as many steps of as many documents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.core import Row, row, take_turns  # noqa: E402
from benchmarks.parts.world import World, world  # noqa: E402

DOCUMENTS, LENGTH, TARGETS = 8, 96, 16
CASE = "cost-T256"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def training(place: World, folder: Path, steps: int) -> Any:
    """The run that is reversed, and the inputs of its targets."""
    from assay.core.pool import Pool
    from assay.core.selection import Selection
    from assay.data import readers
    from assay.data.ingest import ingest
    from assay.train.hf import CausalLM
    from assay.train.recipe import Recipe
    from assay.train.replay import Training

    ingest(readers.Source(paths=str(place.documents), text="text", id="id"), folder / "pool", what="pool", max_bad=0.0)
    task, pool = CausalLM(path=str(place.model), context=LENGTH), Pool.open(folder / "pool")
    (folder / "tokens").mkdir()
    task.prepare(pool, folder / "tokens")
    encoded = task.encoded(folder / "tokens")
    recipe = Recipe(steps=steps, terms_per_step=DOCUMENTS * LENGTH, lr=1e-3, eps_root=1e-8)
    chosen = Selection.everything(pool.ids)
    made = Training(task, encoded, np.arange(len(pool)), chosen, recipe, start=task.params())
    return made, encoded.inputs(np.arange(TARGETS))


def slopes(made: Any, inputs: Any, count: int) -> Any:
    """Objective: the mean loss, or that of each of the first documents."""
    from assay.numerics.curvature import slopes as found

    def each(params: Any) -> Any:
        import torch

        rows = [{n: x[k : k + 1] for n, x in inputs.items()} for k in range(count)]
        return torch.cat([found(made.task, params, [r], made.task.loss, made.moved, each=False) for r in rows], dim=1)

    return each


def rows(quick: bool, threads: int, python: Path | None = None) -> list[Row]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="assay-reversal-") as name:
            folder, steps = Path(name), 16 if quick else 256
            place = world(folder / "world", DOCUMENTS * steps)
            return [
                *_steps(place, folder, steps, quick),
                *_peaks(folder, quick),
                *_peer(place, folder, steps, python, threads),
            ]
    finally:
        torch.set_num_threads(before)


def _steps(place: World, folder: Path, steps: int, quick: bool) -> list[Row]:
    from assay.numerics.tree import exact_costs
    from assay.train.adjoint import Adjoint
    from assay.train.reverse import reverse

    made, inputs = training(place, folder, steps)
    held = {"state": made.initial(), "at": 0}
    for at in range(4):
        held["state"] = made.advance(held["state"], at)
    state = held["state"]
    given = {}
    for count in (1, TARGETS):
        flat = slopes(made, inputs, count)(made.named(state))
        sizes = [p.numel() for p in state.params]
        parts = [s.T.reshape(-1, *p.shape) for s, p in zip(flat.split(sizes), state.params, strict=True)]
        given[count] = Adjoint.of(made.recipe, parts)

    def train() -> float:
        made.advance(state, 4)
        return 1.0

    def back(count: int) -> Any:
        def turn() -> float:
            reverse(made, state, 4, given[count])  # as in a sweep: its adjoint goes on to the next turn
            return 1.0

        return turn

    pace, spent = take_turns({"train": train, "one": back(1), "many": back(TARGETS)}, 3 if quick else 15)
    base = float(np.median(pace["train"]))

    def told(method: str, values: np.ndarray, seconds: float) -> Row:
        return row("metagrad", CASE, method, "ratio_to_training", values, seconds)

    found = [
        told("step-only", pace["one"] / base, spent["one"]),
        told("step-only-16-targets", pace["many"] / base / TARGETS, spent["many"]),
    ]
    ratios, sweep, seconds = _sweeps(made, inputs, 1 if quick else 3)
    found.append(told("sqrt-1-target", ratios, seconds))
    again = sweep.restored / steps
    found.append(told("sqrt-16-targets", (pace["many"] / base + again) / TARGETS, spent["many"]))
    total, states = exact_costs(steps, 2)
    again = (total - (steps - 1)) / steps  # all but one of training's own steps are among them
    found.append(told("log-1-target", pace["one"] / base + again, spent["one"]))
    counts = {"sqrt-restored": sweep.restored, "sqrt-states": sweep.peak, "log-restored": total, "log-states": states}
    return found + [row("metagrad", CASE, name, "count", np.array([float(v)]), 0.0) for name, v in counts.items()]


def _sweeps(made: Any, inputs: Any, turns: int) -> tuple[np.ndarray, Any, float]:
    """What whole sweeps cost beside their own training, in trainings; the last sweep, and seconds of all.

    A training of its own goes on step by step in between, one for each step that is trained and reversed: a machine
    that is shared is faster or slower from minute to minute.
    """
    from assay.core.progress import Progress
    from assay.train.replay import metagradient

    class Beside(Progress):
        seconds, done, at, state = 0.0, 0, 0, made.initial()

        def advance(self, units: int = 1) -> None:
            self.done += units
            while self.at < self.done // 2:
                start = time.perf_counter()
                self.state = made.advance(self.state, self.at)
                self.at += 1
                self.seconds += time.perf_counter() - start

    ratios, spent, sweep = [], 0.0, None
    for _ in range(turns):
        beside, sweep = Beside(), None
        start = time.perf_counter()
        sweep = metagradient(made, slopes(made, inputs, 1), progress=beside)
        seconds = time.perf_counter() - start - beside.seconds
        assert beside.at == made.recipe.steps
        ratios.append(seconds / beside.seconds - 1)
        spent += seconds
    return np.array(ratios), sweep, spent


def _peaks(folder: Path, quick: bool) -> list[Row]:
    """The most bytes of a sweep with its states in memory or on disk, and those that the formula says."""
    steps = 16 if quick else 64
    place, made = world(folder / "small", 2 * steps), []
    for branch, where in ((2, "memory"), (16, "memory"), (16, "disk")):
        text = subprocess.run(
            [sys.executable, __file__, "--peak", str(place.model), str(place.documents), str(steps), str(branch),
             where], check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        for name, value in json.loads(text.splitlines()[-1]).items():
            made.append(row("metagrad", "cost-memory", f"{branch}-{where}-{name}", "bytes", np.array([value]), 0.0))
    return made


def peak(model: str, documents: str, steps: int, branch: int, where: str) -> None:
    """The most bytes of tensors in a sweep, those that the formula says, and by how much this process grows."""
    import psutil
    import torch
    from benchmarks.parts import live

    from assay.core.progress import Progress
    from assay.train.adjoint import Adjoint
    from assay.train.replay import metagradient
    from assay.train.reverse import reverse

    class Watch(Progress):
        most = 0

        def advance(self, units: int = 1) -> None:
            self.most = max(self.most, psutil.Process().memory_info().rss)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        made, inputs = training(World("small", Path(model), Path(documents), ()), Path(name), steps)
        state, objective = made.initial(), slopes(made, inputs, 1)
        # Once through everything, so that what the libraries keep for themselves is there before.
        live.made_once(made)
        reverse(
            made, made.advance(state, 0), 1, Adjoint.of(made.recipe, [torch.zeros_like(p)[None] for p in state.params])
        )
        objective(made.named(state))
        before, watch = psutil.Process().memory_info().rss, Watch()
        metagradient(made, objective, branch=branch, progress=watch, path=_kept(name, "first", where))
        seen = live.most(lambda: metagradient(made, objective, branch=branch, path=_kept(name, "second", where)))
        said = live.foretold(made, branch, 1, on_disk=where == "disk")
    print(json.dumps({"seen": float(seen), "formula": said, "process": float(watch.most - before)}))


def _kept(folder: str, name: str, where: str) -> Path | None:
    return Path(folder) / name if where == "disk" else None


def _peer(place: World, folder: Path, steps: int, python: Path | None, threads: int) -> list[Row]:
    """bergson's own command lines on the same documents: `magic` less `train`, in units of its training steps."""
    from .peers import Peer, version

    if python is None or not python.exists():
        return []
    held = version(python, Peer("bergson", "bergson", lambda *_: [], lambda _: np.zeros(0), ""))
    if not held:
        return []
    query = folder / "query.jsonl"
    with open(place.documents, encoding="utf-8") as file:
        query.write_text("".join(line for _, line in zip(range(DOCUMENTS), file, strict=False)), encoding="utf-8")
    common = [
        "--model", str(place.model), "--batch_size", str(DOCUMENTS), "--precision", "fp32",
        "--eps_root", "1e-8", "--lr", "1e-3", "--overwrite", "true",
    ]  # fmt: skip
    asked = ["--query.dataset", str(query), "--query.truncation", "true", "--save_mode", "sqrt"]
    seconds = {}
    final, whole = ["--save_mode", "final", "--truncation", "true"], str(place.documents)
    # A training of one step is what starting up takes.
    for name, command, own in (
        ("start", "train", [*final, "--dataset", str(query)]),
        ("train", "train", [*final, "--dataset", whole]),
        ("magic", "magic", [*asked, "--data.dataset", whole, "--data.truncation", "true", "--skip_validation", "true"]),
    ):
        start = time.perf_counter()
        done = subprocess.run(
            [str(python), "-m", "bergson", command, str(folder / name), *common, *own], capture_output=True,
            text=True, check=False,
            env={**os.environ, "TORCHDYNAMO_DISABLE": "1", **{name: str(threads) for name in THREADS}},
        )  # fmt: skip
        if done.returncode:
            print(f"bergson {command} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            return []
        seconds[name] = time.perf_counter() - start
    ratio = (seconds["magic"] - seconds["train"]) / (seconds["train"] - seconds["start"])
    made = row("metagrad", CASE, "sqrt-1-target", "ratio_to_training", np.array([ratio]), seconds["magic"])
    return [{**made, "tool": f"bergson {held}"}]


if __name__ == "__main__":
    if "--peak" in sys.argv:
        model, documents, steps, branch, where = sys.argv[sys.argv.index("--peak") + 1 :]
        peak(model, documents, int(steps), int(branch), where)
    else:
        for line in rows("--quick" in sys.argv, 1, Path(os.environ.get("ASSAY_PEERS", "/nonexistent"))):
            print(line)
