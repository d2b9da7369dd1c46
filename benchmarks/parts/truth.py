"""Worlds whose truth is known: data, scoring models, and what retraining on random halves of the data does.

R0  1000 of scikit-learn's digits, 300 targets (keyed split), a 64-64-10 GELU perceptron, SGD at .5 down to 0 linearly,
    batches of 50, 15 epochs, weight_decay/2 |params|^2 with .001; minus the margin; 100 halves x 5 seeds as data
    weights of 0 and 1, so that halves of a seed share first weights and batches.
R1  5000 images of 28 x 28, 200 targets, logistic regression, SGD .01, batches of 32, 20 epochs; loss; 100 halves,
    each trained alone (Deng et al. 2024, arXiv:2410.04555, on Fashion-MNIST unless MNIST's files are given; pixels
    are moved to mean 0 and standard deviation 1, and first weights are PyTorch's own, as published).
R2  the same, 100 targets, with a 784-128-64-10 ReLU perceptron, dropout .1, SGD .01 with momentum .9, batches of 64,
    50 epochs.
R2-10, R2-50  R2 without dropout, for 10 and 50 epochs, 64 targets, 50 halves as data weights of one seed.
R3  512 documents of 64 tokens of many domains, 64 targets, a decoder of 2 layers and width 64, AdamW 2e-3 with the
    eps_root that metagradients need (so that they and the bank are of one training), batches of 32, 4 epochs; loss; 100
    halves as data weights.
R3-smooth  R3 with eps_root = 1e-6, about the mean square of its gradients, in place of 1e-8.

Options are chosen on half of the targets, those of even rank in a keyed order, and figures are of the other half.
Banks and models are kept in a folder: a second run trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from assay.core.keys import digest, encode_ids, shuffled
from assay.core.method import Mark
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.core.task import Encoded, Task
from assay.train import loop
from assay.train.recipe import Recipe

DATA = Path(__file__).parents[3] / "shared" / "data"
CASES = ("R0", "R1", "R2", "R3")
# Epochs of the variants of R2 without dropout, halves as data weights of 0 and 1, for exact derivatives.
LONG = {"R2-10": 10, "R2-50": 50}
# eps_root. Far below the mean square of gradients, the first steps, whose moments are of themselves alone, are signs.
DECODERS = {"R3": 1e-8, "R3-smooth": 1e-6}


@dataclass
class Truth:
    """One world. `values` [halves, seeds, targets]: what was measured after training on each half, lower is better."""

    case: str
    task: Task
    pool: Pool
    targets: Pool
    recipe: Recipe
    measure: str
    protocol: str
    folder: Path
    seeds: int
    halves: int
    masks: np.ndarray = field(init=False)
    values: np.ndarray = field(init=False)
    flipped: np.ndarray | None = None
    """Which labels of the pool are wrong, where some were made so."""
    kept: dict[str, list[list[Mark]]] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the targets on which options are chosen, and of those on which figures are."""
        order = shuffled(self.targets.ids, "influence", "sides")
        return np.sort(order[0::2]), np.sort(order[1::2])

    def encoded(self, pool: Pool) -> Path:
        path = self.folder / f"encoded-{digest(self.task.describe(), pool.fingerprint)[:16]}"
        if not (path / "whole").exists():
            path.mkdir(parents=True, exist_ok=True)
            self.task.prepare(pool, path)
            (path / "whole").touch()
        return path

    def read(self, pool: Pool) -> Encoded:
        return self.task.encoded(self.encoded(pool))

    def models(self, kind: str, count: int, marks: int = 1) -> list[list[Mark]]:
        """Trajectories of scoring models: `full` trained at data weights 1, `center` at 1/2, `half` on a random half
        of the data each, other halves than the bank's."""
        from assay.proxies import trajectory

        name = f"{kind}-{marks}"
        held = self.kept.setdefault(name, [])
        rows = np.arange(len(self.pool))
        encoded = self.read(self.pool)
        others = self._others() if kind == "half" else None
        for k in range(len(held), count):
            recipe, weights = self.recipe.with_seed(k), np.full(len(rows), 0.5 if kind == "center" else 1.0)
            own = rows if others is None else np.flatnonzero(others[k])
            if others is not None:
                recipe, weights = recipe.model_copy(update={"steps": math.ceil(recipe.steps / 2)}), weights[own]
            key = digest(recipe.spec(), self.task.describe(), self.pool.fingerprint, kind, marks)[:16]
            path = self.folder / f"model-{key}"
            if not (path / "checkpoint.safetensors").exists():
                path.mkdir(parents=True, exist_ok=True)
                chosen = Selection(self.pool.ids[own], weights)
                loop.train(self.task, encoded, own, chosen, recipe, path, marks=marks)
            held.append(trajectory(path, recipe, marks, float(weights[0])))
        return held[:count]

    def _others(self) -> np.ndarray:
        from assay.train.bank import subsets

        return subsets(self.pool.ids, 64, 0.5, seed=1)

    def measured(self, workers: int) -> Truth:
        """Itself, with the bank trained or found made."""
        from assay.train.bank import retrain, subsets

        self.masks = subsets(self.pool.ids, self.halves, 0.5, seed=0)
        found = retrain(
            self.task, self.read(self.pool), self.pool.ids, self.masks, self.recipe, seeds=range(self.seeds),
            targets={"targets": self.read(self.targets)}, measure=self.measure, protocol=self.protocol,  # type: ignore[arg-type]
            path=self.folder / "bank", workers=workers,
        )  # fmt: skip
        self.values = found["targets"]
        return self


def build(case: str, folder: Path, *, quick: bool = False, images: Path | None = None, flip: float = 0.0) -> Truth:
    """One of the worlds, without its bank. `flip`: the share of the pool's labels that are made wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    if case == "R0":
        return digits(folder, quick)
    if case in ("R1", "R2", *LONG):
        return pictures(case, folder, quick, images or DATA / "fashion_mnist" / "fashion_mnist.npz", flip)
    return decoder(case, folder, quick)


def vectors(x: np.ndarray, y: np.ndarray, prefix: str) -> Pool:
    ids = [f"{prefix}{k:05d}" for k in range(len(y))]
    return Pool.from_columns({"id": ids, "pixels": x.astype(np.float32).tolist(), "label": y.tolist()})


def digits(folder: Path, quick: bool) -> Truth:
    from sklearn.datasets import load_digits

    from assay.train.models import Classifier

    bunch = load_digits()
    x, y = bunch.data / 16, bunch.target  # type: ignore[attr-defined]
    split = shuffled(encode_ids(str(i) for i in range(len(y))), "r0", "split")
    own, asked = split[:1000], split[1000 : 1000 + (80 if quick else 300)]
    recipe = Recipe(
        steps=300, terms_per_step=50, optimiser="sgd", lr=0.5, weight_decay=1e-3, schedule="linear", warmup=0.0,
        final=0.0, clip=0.0,
    )  # fmt: skip
    task, seeds, halves = Classifier(inputs=64, hidden=(64,), classes=10), 2 if quick else 5, 40 if quick else 100
    pool, targets = vectors(x[own], y[own], "p"), vectors(x[asked], y[asked], "t")
    return Truth("R0", task, pool, targets, recipe, "margin", "weights", folder, seeds, halves)


def pictures(case: str, folder: Path, quick: bool, images: Path, flip: float) -> Truth:
    from assay.data.images import labelled_images
    from assay.train.models import Classifier

    asked = {"R1": 200, "R2": 100}.get(case, 64)
    count, asked = (1000, 60) if quick else (5000, asked)
    own, tests, truth, _ = labelled_images(images, size=count, count=asked, take="first", flip=flip)
    pool, targets = Pool.from_columns(own), Pool.from_columns(tests)
    wrong = encode_ids(truth["id"].to_pylist())
    inputs = len(own["pixels"][0])
    common: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "clip": 0.0, "lr": 0.01}
    if case == "R1":
        task = Classifier(inputs=inputs, classes=10, first="uniform")
        batch, epochs, kind = 32, 20, "sgd"
    else:
        dropout = 0.1 if case == "R2" else 0.0
        task = Classifier(
            inputs=inputs, hidden=(128, 64), classes=10, activation="relu", dropout=dropout, first="uniform"
        )
        batch, epochs, kind = 64, LONG.get(case, 50), "momentum"
    steps = epochs * math.ceil(count / batch)
    recipe = Recipe(steps=steps // 5 if quick else steps, terms_per_step=batch, optimiser=kind, **common)  # type: ignore[arg-type]
    flipped = np.isin(pool.ids, wrong) if flip else None
    protocol, halves = ("weights", 50) if case in LONG else ("subset", 100)
    return Truth(
        case, task, pool, targets, recipe, "loss", protocol, folder, 1, 20 if quick else halves, flipped=flipped
    )


def decoder(case: str, folder: Path, quick: bool) -> Truth:
    import pyarrow.parquet as pq

    from assay.train.models import LanguageModel, train_tokenizer

    table = pq.read_table(DATA / "domains" / "domains.parquet", columns=["id", "text"])
    names, texts = table["id"].to_pylist(), table["text"].to_pylist()
    order = shuffled(encode_ids(names), "influence", "documents")
    count, asked = (128, 16) if quick else (512, 64)
    ids, words = _long([(names[k], texts[k]) for k in order], 400, count + asked)
    everything = Pool.from_columns({"id": ids, "text": words})
    pool, targets = everything.at(slice(0, count)), everything.at(slice(count, count + asked))
    vocab, context = 1024, 64
    task = LanguageModel(
        tokenizer=train_tokenizer(pool, vocab=vocab), vocab=vocab, width=64, layers=2, heads=4, context=context
    )
    recipe = Recipe(
        steps=4 * count // 32, terms_per_step=32 * context, optimiser="adamw", lr=2e-3, betas=(0.9, 0.95),
        weight_decay=0.01, schedule="linear", warmup=0.1, final=0.0, clip=0.0, eps_root=DECODERS[case],
    )  # fmt: skip
    return Truth(case, task, pool, targets, recipe, "loss", "weights", folder, 1, 20 if quick else 100)


def _long(rows: Sequence[tuple[str, str]], characters: int, count: int) -> tuple[list[str], list[str]]:
    """The first documents that fill the context."""
    chosen = [(name, text) for name, text in rows if len(text) >= characters][:count]
    return [name for name, _ in chosen], [text for _, text in chosen]
