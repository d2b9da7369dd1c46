"""The retrain bank: hundreds of trainings on subsets of one pool, many at once, kept on disk as they are made.

Legend: M masks, R seeds, n examples, q targets; m models of one chunk, b rows of one batch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.core.errors import InputError
from assay.core.keys import digest, digest_ids, digest_sources, hash_ids, shuffled, write_bytes, write_json, write_text
from assay.core.progress import Progress
from assay.core.selection import Selection
from assay.core.task import Encoded, Inputs, Params, Task
from assay.engine import local
from assay.train import loop, optim
from assay.train.models import first_weights
from assay.train.recipe import Recipe

Measure = Literal["loss", "margin"]
Protocol = Literal["weights", "subset"]
MEASURES, PROTOCOLS = ("loss", "margin"), ("weights", "subset")

# Most models of one chunk, and most weights of all its models together: larger chunks gain little, and two workers
# should both have one.
MODELS, WEIGHTS = 64, 1 << 23
# Fewer models than this at once gain nothing over one after another; nor does a model whose own step has more
# operations than this: it keeps a core busy by itself (LOG.md, 2026-11-24).
FEWEST, STEP = 8, 2e8
# Positions of one micro-batch, over all models of a chunk.
AREA = 8192
# Files whose text a bank is keyed by.
SOURCES = ("bank", "loop", "models", "optim", "recipe", "vision")
# Examples of equal length are kept as tensors, up to so many bytes of them.
HELD = 1 << 28


def subsets(ids: np.ndarray, count: int, share: float, seed: int) -> np.ndarray:
    """`[count, n]`: row k marks exactly floor(share n) of the ids, those of the least hash of (seed, k, id).

    It depends on the set of ids and not on their order. Raises `InputError` for a share that leaves none or all.
    """
    keep = math.floor(round(share * len(ids), 6))  # 0.29 x 100 is a little under 29
    if not 1 <= keep < len(ids):
        raise InputError(
            f"a share of {share} of {len(ids)} examples is {keep} of them",
            why="a subset has at least one example and lacks at least one", fix="give a share between 0 and 1",
        )  # fmt: skip
    masks = np.zeros((count, len(ids)), dtype=bool)
    for k in range(count):
        masks[k, shuffled(ids, "subset", seed, k)[:keep]] = True
    return masks


def retrain(
    task: Task, encoded: Encoded, ids: np.ndarray, masks: np.ndarray, recipe: Recipe, *, seeds: Sequence[int],
    targets: Mapping[str, Encoded], measure: Measure = "loss", protocol: Protocol = "weights",
    path: Path | None = None, workers: int = 1, progress: Progress | None = None,
    dtype: torch.dtype = torch.float32, start: Params | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What is measured after training on each subset from each seed: `[M, R, q]` for each set of targets.

    `ids` [n] and the columns of `masks` [M, n] align with `encoded`; a seed decides the first weights (unless `start`
    gives them), the order and the noise. `measure`: the task's measure (its loss), or minus the margin; lower is
    better. `protocol` 'weights': all examples keep their places in the order, and those outside a subset weigh 0, so
    that the subsets of a seed share first weights, batches and denominators. 'subset': training on the subset alone,
    for `steps` times its share of the examples.

    Each model equals `loop.train` alone up to rounding. Where the task's module can be mapped over stacked weights,
    many models train at once; otherwise each is a job of its own. Finished chunks are kept under `path`, keyed by all
    that decides them: a killed bank goes on, and a larger one uses what there is. Raises `InputError` when a training
    diverges, for masks that do not fit, or for a margin that the task does not have.
    """
    bank = Bank(task, encoded, ids, recipe, dict(targets), measure, protocol, dtype, start)
    _check(bank, masks, seeds)
    if path is not None:
        about, folder = bank.about, path / f"bank-{bank.key[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "bank.json", about)
        bank = replace(bank, path=folder)
    chunks = bank.chunks(masks, seeds)
    progress = progress or Progress()
    progress.begin("retrain", len(masks) * len(seeds), "retrain on subsets")
    kept = [bank.kept(chunk) for chunk in chunks]
    progress.skip(sum(len(c.rows) for c, found in zip(chunks, kept, strict=True) if found is not None))
    missing = [k for k, found in enumerate(kept) if found is None]
    for k, values in zip(missing, local.map(_run, bank, [chunks[k] for k in missing], workers=workers), strict=True):
        kept[k] = values
        progress.advance(len(chunks[k].rows))
    progress.end()
    found = np.zeros((len(masks), len(seeds), bank.width))
    for chunk, values in zip(chunks, kept, strict=True):
        found[chunk.rows, chunk.column] = values
    cuts = np.cumsum([len(e) for e in bank.targets.values()])[:-1]
    return dict(zip(bank.targets, np.split(found, cuts, axis=2), strict=True))


def flops(
    task: Task, encoded: Encoded, masks: np.ndarray, recipe: Recipe, *, seeds: Sequence[int],
    targets: Mapping[str, Encoded], protocol: Protocol = "weights",
) -> float:  # fmt: skip
    """Floating-point operations of a bank, for the ledger: all its trainings, and a forward pass over the targets
    after each."""
    taken = [_length(recipe, mask, protocol) * recipe.terms_per_step for mask in masks]
    reading = sum(task.forward_flops(np.asarray(e.sizes)) for e in targets.values())
    return len(seeds) * (sum(task.training_flops(encoded.sizes, t) for t in taken) + len(masks) * reading)


def _length(recipe: Recipe, mask: np.ndarray, protocol: Protocol) -> int:
    """Steps of one training: by protocol 'subset' as many passes over the subset as the recipe makes over all."""
    return recipe.steps if protocol == "weights" else max(1, round(recipe.steps * float(mask.mean())))


@dataclass(frozen=True)
class Chunk:
    """Models of one seed that are trained together: `rows` of the masks, and the masks themselves."""

    rows: np.ndarray
    masks: np.ndarray
    seed: int
    column: int

    @property
    def name(self) -> str:
        return digest(self.seed, xxhash.xxh3_128_hexdigest(np.packbits(self.masks, axis=1).tobytes()), self.masks.shape)


@dataclass(frozen=True, eq=False)
class Bank:
    """All that decides what a chunk measures, but its seed and masks; picklable."""

    task: Task
    encoded: Encoded
    ids: np.ndarray
    recipe: Recipe
    targets: dict[str, Encoded]
    measure: Measure
    protocol: Protocol
    dtype: torch.dtype
    start: Params | None
    path: Path | None = None

    @property
    def width(self) -> int:
        return sum(len(e) for e in self.targets.values())

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the bank is keyed by, as JSON."""
        return {
            "task": self.task.describe(), "recipe": self.recipe.with_seed(0).spec(), "ids": digest_ids(self.ids),
            "pool": _content(self.encoded), "targets": {name: _content(e) for name, e in self.targets.items()},
            "measure": self.measure, "protocol": self.protocol, "dtype": str(self.dtype), "together": self.together,
            "start": loop.fingerprint(self.start) if self.start is not None else None,
            "code": digest_sources(*(Path(__file__).with_name(f"{name}.py") for name in SOURCES)),
        }  # fmt: skip

    @cached_property
    def key(self) -> str:
        return digest(self.about)

    @cached_property
    def together(self) -> int:
        """How many models train at once; 1 for those whose module cannot be mapped, or is too large to gain by it."""
        first = self.first(0)
        if self.task.training_flops(np.asarray(self.encoded.sizes), self.recipe.terms_per_step) > STEP:
            return 1
        fit = min(MODELS, WEIGHTS // max(1, sum(p.numel() for p in first.values())))
        return fit if fit >= FEWEST and _maps(self.task, first, self.encoded) else 1

    def first(self, seed: int) -> dict[str, Tensor]:
        """First weights, in the precision of the bank."""
        values = self.start if self.start is not None else first_weights(self.task, seed, self.dtype)
        return {n: p.to(self.dtype) if p.is_floating_point() else p for n, p in values.items()}

    def chunks(self, masks: np.ndarray, seeds: Sequence[int]) -> list[Chunk]:
        """Of each seed, and of masks with equal numbers of steps, runs of even size."""
        lengths = np.array([_length(self.recipe, mask, self.protocol) for mask in masks])
        found = []
        for column, seed in enumerate(seeds):
            for length in np.unique(lengths):
                same = np.flatnonzero(lengths == length)
                for rows in np.array_split(same, -(-len(same) // self.together)):
                    found.append(Chunk(rows, masks[rows], seed, column))
        return found

    def run(self, chunk: Chunk) -> Recipe:
        steps = _length(self.recipe, chunk.masks[0], self.protocol)
        return self.recipe.model_copy(update={"seed": chunk.seed, "steps": steps})

    def kept(self, chunk: Chunk) -> np.ndarray | None:
        """The numbers of a finished chunk, `[m, q]`; None when there are none, or none that are whole."""
        if self.path is None:
            return None
        file = self.path / f"{chunk.name}.npy"
        try:
            data = file.read_bytes()
            if file.with_suffix(".xxh3").read_text() != xxhash.xxh3_128_hexdigest(data):
                return None
            values = np.load(io.BytesIO(data), allow_pickle=False)
        except (OSError, ValueError):
            return None
        return values if values.shape == (len(chunk.rows), self.width) else None

    def keep(self, chunk: Chunk, values: np.ndarray) -> None:
        if self.path is None:
            return
        held, file = io.BytesIO(), self.path / f"{chunk.name}.npy"
        np.save(held, values, allow_pickle=False)
        write_bytes(file, held.getvalue())
        write_text(file.with_suffix(".xxh3"), xxhash.xxh3_128_hexdigest(held.getvalue()))

    def selection(self, mask: np.ndarray) -> tuple[np.ndarray, Selection]:
        """Rows of the pool and the Selection of one training, as `loop.train` takes them."""
        if self.protocol == "weights":
            return np.arange(len(self.ids)), Selection(self.ids, mask.astype(np.float64))
        rows = np.flatnonzero(mask)
        return rows, Selection.everything(self.ids[rows])


def _check(bank: Bank, masks: np.ndarray, seeds: Sequence[int]) -> None:
    if masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != len(bank.ids) or len(bank.ids) != len(bank.encoded):
        raise InputError(
            f"masks of shape {masks.shape} and dtype {masks.dtype} do not fit {len(bank.ids)} examples",
            fix="give one row of true and false for each subset, over all examples",
        )
    if not masks.any(axis=1).all() or not len(masks) or not len(seeds) or not bank.width:
        raise InputError("nothing to retrain", why="there must be a subset, an example in each, a seed and a target",
                         fix="give at least one of each")  # fmt: skip
    if bank.measure not in MEASURES or bank.protocol not in PROTOCOLS:
        raise InputError(f"no measure {bank.measure!r} or no protocol {bank.protocol!r}",
                         fix=f"they are one of {MEASURES} and of {PROTOCOLS}")  # fmt: skip
    if bank.measure == "margin" and not hasattr(bank.task, "margin"):
        raise InputError("this task has no margin", why="it is of classes and their labels", fix="measure = 'loss'")


def _content(encoded: Encoded) -> str:
    """Hash of all that a model reads."""
    hasher = xxhash.xxh3_128()
    for start in range(0, len(encoded), 256):
        for name, x in sorted(encoded.inputs(np.arange(start, min(len(encoded), start + 256))).items()):
            hasher.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            hasher.update(x.contiguous().numpy().data)
    return hasher.hexdigest()


def _maps(task: Task, params: Params, encoded: Encoded) -> bool:
    """Whether the task's terms can be mapped over stacked weights, to the same numbers."""
    batch = encoded.inputs(np.arange(min(2, len(encoded))))
    other = {n: p * 1.5 if p.is_floating_point() else p for n, p in params.items()}
    try:
        pair = {n: torch.stack([p, other[n]]) for n, p in params.items()}
        with sdpa_kernel(SDPBackend.MATH):
            found = vmap(lambda own: task.terms(own, batch)[0])(pair)
            want = torch.stack([task.terms(own, batch)[0] for own in (params, other)])
    except Exception:  # whatever a module does that no transform can follow
        return False
    return found.shape == want.shape and torch.allclose(found, want, rtol=1e-3, atol=1e-5)


def _run(bank: Bank, chunk: Chunk) -> np.ndarray:
    """What is measured after the trainings of one chunk, `[m, q]`; kept."""
    values = _alone(bank, chunk) if bank.together == 1 else _together(bank, chunk)
    if not np.isfinite(values).all():
        raise InputError("a retrained model measures numbers that are not finite", why="training diverged",
                         fix=f"lower lr (now {bank.recipe.lr})")  # fmt: skip
    bank.keep(chunk, values)
    return values


def _alone(bank: Bank, chunk: Chunk) -> np.ndarray:
    """One model by the ordinary trainer, which keeps its state beside the bank."""
    import shutil

    (mask,) = chunk.masks
    rows, selection = bank.selection(mask)
    folder = bank.path / f"{chunk.name}.part" if bank.path else None
    start = bank.first(chunk.seed)
    trained = loop.train(bank.task, bank.encoded, rows, selection, bank.run(chunk), folder, start=start)
    values = _measured(bank, {n: p[None] for n, p in trained.params.items()}, alone=True)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return values


@sdpa_kernel(SDPBackend.MATH)  # the one form of attention that maps over weights
def _together(bank: Bank, chunk: Chunk) -> np.ndarray:
    """All models of a chunk at once, by the arithmetic of `loop.train` on stacked weights."""
    recipe, first, count = bank.run(chunk), bank.first(chunk.seed), len(chunk.rows)
    moved = loop.trainable(bank.task, first)
    fixed = {n: p for n, p in first.items() if n not in moved}
    params = [first[n].expand(count, *first[n].shape).clone() for n in moved]
    state, read = optim.init(recipe, params), _reader(bank.encoded)
    for step, batch in enumerate(_batches(bank, chunk, recipe, read)):
        slopes, loss = _slopes(bank.task, fixed, dict(zip(moved, params, strict=True)), batch, recipe.terms_per_step)
        if not loss.isfinite().all():
            raise InputError(f"the training loss of a subset is not finite at step {step}", why="training diverged",
                             fix=f"lower lr (now {recipe.lr})")  # fmt: skip
        params, state = optim.update(recipe, _clip(slopes, recipe.clip), state, params, step)
    stacked = dict(zip(moved, params, strict=True))
    return _measured(bank, stacked | {n: p.expand(count, *p.shape) for n, p in fixed.items()})


@dataclass(frozen=True)
class _Step:
    """Micro-batches of one step: tensors `[b, ...]` for all models or `[m, b, ...]`, and data weights `[m, b]`."""

    parts: list[tuple[Inputs, Tensor]]
    each: bool
    """Whether every model has examples of its own."""


def _batches(bank: Bank, chunk: Chunk, recipe: Recipe, read: Callable[[np.ndarray], Inputs]) -> Iterator[_Step]:
    """The steps of a chunk, as `loop.steps` makes them for each model."""
    area, lengths, sizes = max(1, AREA // len(chunk.rows)), bank.encoded.lengths, bank.encoded.sizes

    def part(ids: np.ndarray, rows: np.ndarray, weights: np.ndarray, step: int) -> tuple[Inputs, Tensor]:
        inputs = read(rows)
        if bank.task.stochastic:
            keys = hash_ids(ids.ravel(), "noise", recipe.seed, step).reshape(ids.shape)
            inputs = inputs | bank.task.noise(keys)
        return inputs, torch.as_tensor(weights, dtype=bank.dtype)

    if bank.protocol == "weights":
        for step, rows in enumerate(loop.steps(recipe, Selection.everything(bank.ids), sizes)):
            cuts = [rows[block] for block in loop.blocks(lengths[rows], area)]
            yield _Step([part(bank.ids[cut], cut, chunk.masks[:, cut], step) for cut in cuts], False)
        return
    runs = []
    for mask in chunk.masks:
        rows, selection = bank.selection(mask)
        runs.append((rows, loop.steps(recipe, selection, sizes[rows])))
    for step in range(recipe.steps):
        own = [rows[next(taken)] for rows, taken in runs]
        # Of like length side by side; what is missing in the shorter batches stands in with weight 0.
        own = [rows[np.argsort(lengths[rows], kind="stable")] for rows in own]
        width = max(map(len, own))
        rows_mb = np.stack([np.pad(rows, (width - len(rows), 0), mode="edge") for rows in own])
        weights_mb = np.stack([np.arange(width) >= width - len(rows) for rows in own])
        blocks = loop.blocks(lengths[rows_mb].max(axis=0), area)
        cuts = [(rows_mb[:, block], weights_mb[:, block]) for block in blocks]
        yield _Step([part(bank.ids[rows], rows, weights, step) for rows, weights in cuts], True)


def _reader(encoded: Encoded) -> Callable[[np.ndarray], Inputs]:
    """The task's tensors for rows of any shape, `[*rows.shape, ...]`; from memory, where all are of one length."""
    if len(np.unique(encoded.lengths)) == 1:
        one = encoded.inputs(np.arange(1))
        if len(encoded) * sum(x.numel() * x.element_size() for x in one.values()) <= HELD:
            whole = encoded.inputs(np.arange(len(encoded)))
            return lambda rows: {name: x[torch.from_numpy(rows)] for name, x in whole.items()}

    def read(rows: np.ndarray) -> Inputs:
        found = encoded.inputs(rows.ravel())
        return {name: x.reshape(*rows.shape, *x.shape[1:]) for name, x in found.items()}

    return read


def _slopes(
    task: Task, fixed: Params, params: dict[str, Tensor], step: _Step, terms: int
) -> tuple[list[Tensor], Tensor]:
    """Gradients `[m, ...]` of each model's own `(1/T) sum_i w_i n_i loss_i`, and that sum `[m]`."""

    def one(own: Params, batch: Inputs) -> Tensor:
        nll, mask = task.terms({**fixed, **own}, batch)
        return (nll * mask).sum(dim=1)

    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    total, value = [], torch.zeros(())
    for inputs, weights in step.parts:
        loss = (vmap(one, in_dims=(0, 0 if step.each else None))(leaves, inputs) * weights).sum(dim=1) / terms
        # No model's loss looks at another's weights: the gradient of the sum is the gradient of each.
        part = torch.autograd.grad(loss.sum(), list(leaves.values()))
        total = [t + p for t, p in zip(total, part, strict=True)] if total else list(part)
        value = value + loss.detach()
    return total, value


def _clip(slopes: list[Tensor], limit: float) -> list[Tensor]:
    """`optim.clip` of each model by its own norm."""
    if not limit:
        return slopes
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in slopes])
    scale = torch.clamp(limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-12), max=1.0)
    return [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in slopes]


def _measured(bank: Bank, stacked: Params, *, alone: bool = False) -> np.ndarray:
    """`[m, q]` float64 of the models' measures on all targets, one set after the other; lower is better."""
    task, count = bank.task, len(next(iter(stacked.values())))
    stacked = {n: p.detach() for n, p in stacked.items()}

    def measure(own: Params, batch: Inputs) -> Tensor:
        return task.measure(own, batch) if bank.measure == "loss" else -task.margin(own, batch)  # type: ignore[attr-defined]

    found = []
    for encoded in bank.targets.values():
        values = np.zeros((count, len(encoded)))
        for block in loop.blocks(encoded.lengths, max(1, AREA // count)):
            batch = encoded.inputs(block)
            if alone:
                values[0, block] = measure({n: p[0] for n, p in stacked.items()}, batch).double().numpy()
            else:
                values[:, block] = vmap(measure, in_dims=(0, None))(stacked, batch).double().numpy()
        found.append(values)
    return np.concatenate(found, axis=1)
