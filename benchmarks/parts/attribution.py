"""Other libraries' scores of the same checkpoints: a folder for each, a process of its own, scores and seconds back.

`export` writes what a script of peer_scripts reads, `run` starts it. Seconds are the script's own, from the model in
memory to the scores, fit included; imports and reading are left out of all contestants' time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .peers import SCRIPTS, Peer, environment, version

Job = dict[str, Any]
Weights = Mapping[str, Any]

LIBRARIES = {
    "dattri": ("dattri", "attribute_dattri.py"),
    "kronfluence": ("kronfluence", "attribute_kronfluence.py"),
    "bergson": ("bergson", "attribute_bergson.py"),
}


@dataclass(frozen=True)
class Library:
    """A peer that is installed: its name and version, and how its script is run."""

    name: str
    version: str
    python: Path
    threads: int

    @property
    def tool(self) -> str:
        return f"{self.name} {self.version}"


def installed(python: Path, threads: int) -> dict[str, Library]:
    """The peers that can be imported; of the others it is said on stderr that they are left out."""
    found = {}
    for name, (module, _) in LIBRARIES.items():
        held = version(python, _peer(name, module))
        if held:
            found[name] = Library(name, held, python, threads)
    return found


def _peer(name: str, module: str) -> Peer:
    return Peer(name, module, lambda *_: [], lambda _: np.zeros(0), "", (("TORCHDYNAMO_DISABLE", "1"),))


def export(
    folder: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], models: Sequence[Weights], jobs: list[Job]
) -> None:
    """What peer_scripts/attribute_common.py (or attribute_bergson.py, for `pool_offsets`) describes."""
    from safetensors.torch import save_file

    for k, params in enumerate(models):
        plain = {name: value.detach().float().contiguous() for name, value in params.items()}
        save_file(plain, folder / f"model-{k}.safetensors")
    name = "tokens.npz" if "pool_offsets" in arrays else "arrays.npz"
    np.savez(folder / name, allow_pickle=False, **arrays)
    text = json.dumps({**about, "models": len(models), "jobs": jobs})
    (folder / "world.json").write_text(text, encoding="utf-8")


def run(library: Library, folder: Path, jobs: int, *, limit: float = 3600.0) -> list[tuple[np.ndarray, float]]:
    """Scores `[targets, pool]` and seconds of each job of the folder."""
    module, script = LIBRARIES[library.name]
    out = Path(tempfile.mkdtemp(prefix=f"{library.name}-", dir=folder))
    command = [str(library.python), str(SCRIPTS / script), str(folder), "--out", str(out)]
    with open(folder / f"{library.name}.log", "w+", encoding="utf-8") as log:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=out, timeout=limit,
            env=environment(_peer(library.name, module), out / "cache", library.threads),
        )  # fmt: skip
        log.seek(0)
        if done.returncode:
            raise RuntimeError(f"{library.tool} ended with {done.returncode}: {log.read()[-3000:]}")
    seconds = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
    found = [(np.load(out / f"scores-{k}.npy"), seconds[k]) for k in range(jobs)]
    shutil.rmtree(out)
    return found
