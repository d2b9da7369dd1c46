"""Which figure of metasmoothness foretells whether metagradients foretell retraining.

    python -m benchmarks.parts.smoothness [--quick]

Nine trainings of small perceptrons on 300 of scikit-learn's digits, from smooth to chaotic, each linearised at data
weights 1 and 1/2: figures of metasmoothness from seven trainings each, beside the LDS of the exact metagradient on 40
random halves of the same seed (24 targets, each for itself). `spearman`: over the 18, of LDS with S, S', minus the
curvature, and linearity, at h = 0.1, and with linearity at h = 1/2 (`halves`): moves as large as to a random half.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from benchmarks.core import Row
from benchmarks.parts.truth import vectors

from assay.core.keys import encode_ids, shuffled
from assay.core.selection import Selection
from assay.core.task import Params
from assay.numerics import lds
from assay.numerics.curvature import slopes
from assay.numerics.stats import spearman
from assay.train.bank import retrain, subsets
from assay.train.models import Classifier
from assay.train.recipe import Recipe
from assay.train.replay import Training, metagradient
from assay.train.smooth import Probe, measure

POOL, TARGETS, HALVES, DIRECTIONS = 300, 24, 40, 3
PLAIN: dict[str, Any] = {
    "steps": 150, "terms_per_step": 30, "optimiser": "sgd", "lr": 0.5, "weight_decay": 1e-3, "schedule": "linear",
    "warmup": 0.0, "final": 0.0, "clip": 0.0,
}  # fmt: skip
MOMENTUM = {"optimiser": "momentum", "weight_decay": 0.0, "schedule": "constant"}
ADAMW = {"optimiser": "adamw", "eps_root": 1e-8}
RELU, DEEP = {"activation": "relu"}, {"activation": "relu", "hidden": (64, 64)}
TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd .5, GELU": ({}, {}),
    "sgd .5, ReLU": ({}, RELU),
    "momentum .02, ReLU": ({**MOMENTUM, "lr": 0.02}, RELU),
    "momentum .05, two ReLU": ({**MOMENTUM, "lr": 0.05}, DEEP),
    "momentum .1, two ReLU": ({**MOMENTUM, "lr": 0.1}, DEEP),
    "momentum .1, two ReLU, batch 10": ({**MOMENTUM, "lr": 0.1, "terms_per_step": 10, "steps": 450}, DEEP),
    "adamw .003, ReLU": ({**ADAMW, "lr": 0.003}, RELU),
    "adamw .01, ReLU": ({**ADAMW, "lr": 0.01}, RELU),
    "adamw .03, GELU": ({**ADAMW, "lr": 0.03}, {}),
}
FIGURES = ("agreement", "mended", "curvature", "linearity")


def one(folder: Path, recipe: Recipe, task: Classifier) -> list[dict[str, float]]:
    """Figures and LDS, linearised at data weights of 1 and of 1/2."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = shuffled(encode_ids(str(i) for i in range(len(bunch.target))), "smoothness")  # type: ignore[attr-defined]
    encoded, pools = [], []
    for name, rows in (("p", order[:POOL]), ("t", order[POOL : POOL + TARGETS])):
        pools.append(vectors(bunch.data[rows] / 16, bunch.target[rows], name))  # type: ignore[attr-defined]
        task.prepare(pools[-1], _made(folder / name))
        encoded.append(task.encoded(folder / name))
    ids, inputs = pools[0].ids, encoded[1].inputs(np.arange(TARGETS))
    masks = subsets(ids, HALVES, 0.5, 0)
    values = retrain(task, encoded[0], ids, masks, recipe, seeds=[0], targets={"t": encoded[1]})["t"].mean(axis=1)

    def read(params: Params) -> np.ndarray:
        return task.loss(params, inputs).detach().double().numpy()

    found = []
    for center in (1.0, 0.5):
        training = Training(task, encoded[0], np.arange(POOL), Selection(ids, np.full(POOL, center)), recipe)
        figures = [asdict(each) for each in measure(Probe(training, read), DIRECTIONS)]
        row = {name: float(np.mean([each[name] for each in figures])) for name in FIGURES}
        row["halves"] = float(np.mean([each.linearity for each in measure(Probe(training, read, 0.5), DIRECTIONS)]))
        exact = metagradient(training, lambda p, t=training: slopes(task, p, [inputs], task.loss, t.moved, each=True))
        row["lds"] = float(np.nanmean(lds.lds(masks, -exact.weights, values)))
        found.append(row | {"center": center})
    return found


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def rows(quick: bool) -> list[Row]:
    common = {"bench": "metagrad", "case": "smoothness", "tool": "assay", "ci": None}
    every: list[dict[str, float]] = []
    made: list[Row] = []
    for name, (keys, shape) in list(TRAININGS.items())[:: 4 if quick else 1]:
        start = time.perf_counter()
        task = Classifier(**{"inputs": 64, "hidden": (64,), "classes": 10, **shape})
        with TemporaryDirectory() as folder:
            found = one(Path(folder), Recipe(**{**PLAIN, **keys}), task)
        for row in found:
            method = f"{name}, center {row['center']:g}"
            print(method, ", ".join(f"{k} {row[k]:.3f}" for k in ("lds", *FIGURES, "halves")))
            for metric in ("lds", *FIGURES, "halves"):
                label = "lds_fixed" if metric == "lds" else metric
                seconds = time.perf_counter() - start
                made.append({**common, "method": method, "metric": label, "value": row[metric], "seconds": seconds})
        every += found
    truth = np.array([row["lds"] for row in every])
    for figure in (*FIGURES, "halves"):
        sign = -1 if figure == "curvature" else 1
        value = spearman(sign * np.array([row[figure] for row in every]), truth)
        label = "linearity, h = 1/2" if figure == "halves" else figure
        made.append({**common, "method": label, "metric": "spearman", "value": value, "seconds": 0.0})
    for row in made:
        if row["metric"] == "spearman":
            print(f"{row['method']}: Spearman {row['value']:.3f} with LDS")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    print(json.dumps({"rows": rows(parser.parse_args().quick)}))
