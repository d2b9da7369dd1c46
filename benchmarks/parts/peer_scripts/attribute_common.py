"""What the scripts of this folder that attribute share. They run in the peers' environment: nothing of assay is here.

A folder holds `world.json`, `arrays.npz` (x, y of the pool; tx, ty of the targets) and `model-K.safetensors`. In
world.json: `sizes` and `activation` of a perceptron, `measure` (loss or margin), and `jobs`, a list of
{"method", "models", "options"}. Written into `--out`: `scores-J.npy` [targets, pool] for each job (one
row of each example's effect on itself for methods that end in -self), positive where an
example lowers the target's loss (or raises its margin), and `seconds.json`: what each took from the model in memory to
the scores, fit included, imports and reading not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}


class Perceptron(nn.Module):
    """Linear layers, with the parameters' names of the checkpoints."""

    def __init__(self, sizes: list[int], activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = self.activation(layer(x))
        return self.layers[len(self.layers) - 1](x)


@dataclass(frozen=True)
class Folder:
    """What is to be attributed."""

    about: dict[str, Any]
    x: Tensor
    y: Tensor
    tx: Tensor
    ty: Tensor
    models: list[dict[str, Tensor]]

    def module(self, model: int) -> Perceptron:
        made = Perceptron(self.about["sizes"], self.about["activation"])
        made.load_state_dict(self.models[model])
        return made.eval()

    @property
    def margin(self) -> bool:
        return self.about["measure"] == "margin"


def read(path: Path) -> Folder:
    about = json.loads((path / "world.json").read_text(encoding="utf-8"))
    held = np.load(path / "arrays.npz")
    x, tx = (torch.from_numpy(held[name]).float() for name in ("x", "tx"))
    y, ty = (torch.from_numpy(held[name]).long() for name in ("y", "ty"))
    models = [load_file(path / f"model-{k}.safetensors") for k in range(about["models"])]
    return Folder(about, x, y, tx, ty, models)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """log p_y - log(1 - p_y), `[b]`."""
    own = logits.gather(1, y[:, None])
    return own[:, 0] - logits.scatter(1, y[:, None], float("-inf")).logsumexp(dim=1)


def attribute(about: str | None, score: Callable[[Folder, dict[str, Any], Path], np.ndarray]) -> None:
    """Do all jobs of a folder. `score(folder, job, scratch)` gives `[targets, pool]`."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    folder = read(chosen.folder)
    seconds = []
    for index, job in enumerate(folder.about["jobs"]):
        start = time.perf_counter()
        found = score(folder, job, chosen.out / f"scratch-{index}")
        seconds.append(time.perf_counter() - start)
        shape = 1 if job["method"].endswith("-self") else len(folder.ty), len(folder.y)
        if found.shape != shape:
            raise ValueError(f"{job['method']} gave scores of shape {found.shape}, not {shape}")
        np.save(chosen.out / f"scores-{index}.npy", found.astype(np.float32))
    (chosen.out / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
