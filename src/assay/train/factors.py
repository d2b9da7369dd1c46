"""Fitting the Kronecker factors of a model on a pool, a part of the data and a group of blocks at a time.

Every part leaves its sums in a file of its own, with a checksum: a fit that was killed goes on where it was, and parts
or groups that other processes fitted are found made. Sums are added up in the order of the parts, whoever made them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from assay.core.errors import InputError
from assay.core.keys import digest, digest_ids, hash_ids, shuffled, write_bytes, write_json
from assay.core.method import Context, batch_places
from assay.core.task import Encoded, Inputs, Params, Task
from assay.numerics.kfac import Block, Factor, Factors, Side, Sums, assembled, bases, footprint, united
from assay.numerics.kfac_passes import Corrections, Moments, added, collect, survey
from assay.numerics.layers import Metric
from assay.numerics.persample import audit, gradients, trainable
from assay.numerics.project import Exact
from assay.train.loop import fingerprint

# Examples on which rules are compared with plain backward passes, and by which blocks are found.
PROBE = 6
# Examples of a part, padded terms of a batch, and examples of a batch.
PART, AREA, BATCH = 4096, 1536, 256
# Labels that are drawn for a small pool, whose few would be noise, and the most for one term.
LABELS, MOST_DRAWS = 10_000, 16


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Which Fisher information: labels drawn from the model (the true one) or the data's own (the empirical one).

    `draws` for each term (0: as many as make LABELS in all). Both passes see the same labels: with fresh ones, what a
    basis has no eigenvalue for would get one that depends on how rounding chose the basis. Pieces of a side have at
    most `block` rows; the data is cut at `most` examples, a keyed sample of it; sums that need more than `limit` bytes
    are made in several groups of blocks, each with passes of its own.
    """

    labels: Literal["sampled", "true"] = "sampled"
    draws: int = 0
    seed: int = 0
    block: int = 512
    most: int = 100_000
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.draws < 0:
            raise InputError(f"draws = {self.draws}", why="it is a number of labels", fix="give 0 or more")


def _draws(fisher: Fisher, terms: int) -> int:
    return fisher.draws or min(MOST_DRAWS, -(-LABELS // max(1, terms)))


def passes(fisher: Fisher, encoded: Encoded) -> float:
    """Forward passes' worth of work of a fit on one model: to draw labels, forward and backward, twice over."""
    each = 3.0 if fisher.labels == "true" else 4.0 * _draws(fisher, int(encoded.sizes.sum()))
    return 2 * each * min(1.0, fisher.most / max(1, len(encoded)))


@dataclass(frozen=True)
class _Fit:
    """One fit: the models, the rows of the data that it is on, and where it keeps what it has."""

    task: Task
    models: Sequence[Params]
    encoded: Encoded
    keys: np.ndarray
    rows: np.ndarray
    fisher: Fisher
    fallback: set[str]
    metric: Metric
    files: _Files

    @cached_property
    def draws(self) -> int:
        return _draws(self.fisher, int(self.encoded.sizes[self.rows].sum()))

    def batches(self, model: int, part: int) -> Iterator[tuple[Inputs, float]]:
        """Batches of one part, of like lengths, with their labels and their number of terms."""
        rows = self.rows[part * PART : (part + 1) * PART]
        order = rows[np.argsort(self.encoded.lengths[rows], kind="stable")]
        for some in _packed(order, self.encoded.lengths):
            inputs, terms = self.encoded.inputs(some), float(self.encoded.sizes[some].sum())
            if self.fisher.labels == "true":
                yield inputs, terms
                continue
            for draw in range(self.draws):
                seed = self.fisher.seed * self.draws + draw
                yield self.task.resample(self.models[model], inputs, self.keys[some], seed), terms

    def sums(self, group: int, stage: int, sketch: Any) -> Sums:
        """Of one pass over all models and parts, those that are there already not computed again."""

        def parts() -> Iterator[Sums]:
            for model, part in product(range(len(self.models)), range(-(-len(self.rows) // PART))):
                name = f"{('moments', 'corrections')[stage]}-{group}-{model}-{part}"
                made = self.files.read(name)
                if made is None:
                    made = collect(
                        sketch(), self.task.module, self.task.summed, self.models[model],
                        self.batches(model, part), fallback=self.fallback, positions=self.task.positions,
                        metric=self.metric,
                    )  # fmt: skip
                    self.files.write(name, made)
                yield made

        return added(parts())

    def group(self, index: int, blocks: list[Block]) -> Factors:
        """Both passes for a group of blocks."""
        made = self.files.read(f"factors-{index}")
        if made is not None:
            return unpacked(made, blocks)
        dtype, size = next(iter(self.models[0].values())).dtype, self.fisher.block
        moments = self.sums(index, 0, lambda: Moments(blocks, size))
        basis = bases(blocks, moments, size, dtype if dtype == torch.float64 else torch.float32)
        factors = assembled(blocks, basis, moments, self.sums(index, 1, lambda: Corrections(blocks, basis)))
        self.files.write(f"factors-{index}", packed(factors))
        self.files.drop(f"moments-{index}-", f"corrections-{index}-")
        return factors


def fit(
    task: Task, models: Sequence[Params], encoded: Encoded, ids: np.ndarray, fisher: Fisher = Fisher(), *,  # noqa: B008
    only: set[str] | None = None, metric: Metric | None = None, path: Path | None = None,
) -> Factors:  # fmt: skip
    """K-FAC and EK-FAC factors over these examples, on average over models; `only` names the parameters (all trainable
    ones), `metric` multiplies gradients entry by entry.

    With a `path`, what is finished stays there, and is taken from there. Raises `InputError` for a task that cannot
    draw labels, if drawn labels are asked for.
    """
    models = [{n: p.detach() for n, p in params.items()} for params in models]
    only, metric = set(trainable(task.module)) if only is None else only, metric or {}
    order = shuffled(ids, "factors", fisher.seed)
    rows, probe = np.sort(order[: fisher.most]), encoded.inputs(order[:PROBE])
    checked = audit(task.module, task.summed, models[-1], probe, Exact(), only=only, metric=metric)
    reading: dict[str, Any] = {"fallback": set(checked.fallback), "metric": metric}
    blocks = survey(task.module, task.summed, models[-1], probe, only=only, **reading)
    key = digest(
        task.describe(), [fingerprint(p) for p in (*models, _flat(metric))], digest_ids(ids), asdict(fisher),
        [asdict(b) for b in blocks], [PART, AREA, BATCH],
    )  # fmt: skip
    keys = hash_ids(ids, "labels")
    run = _Fit(task, models, encoded, keys, rows, fisher, files=_Files(path, key), **reading)
    groups = [run.group(i, some) for i, some in enumerate(grouped(blocks, fisher))]
    return united(groups, checked.share, checked.fallback)


def target_gradients(
    context: Context,
    params: Params,
    names: set[str],
    *,
    measure: Literal["loss", "margin"],
    each: bool,
    fallback: set[str],
) -> dict[str, Tensor]:
    """Gradients of f, the loss or minus the margin, by name: of every target example `[q, *shape]`, or their mean
    `[1, *shape]`; those of `fallback` without rules."""
    task, found = context.task, []
    if measure == "margin" and not hasattr(task, "margin"):
        raise InputError("this task has no margin", why="margins are of classifiers", fix="measure = 'loss'")
    f = task.loss if measure == "loss" else lambda p, batch: -task.margin(p, batch)
    for batch in context.batches(context.target):
        rows, _ = gradients(task.module, f, params, batch.inputs, only=names, fallback=fallback)
        found.append(rows if each else {n: g.sum(dim=0, keepdim=True) for n, g in rows.items()})
    stacked = {n: torch.cat([rows[n] for rows in found]) for n in found[0]}
    if each:
        places = batch_places(context, context.target)
        stacked = {n: g[places] for n, g in stacked.items()}
    else:
        stacked = {n: g.sum(dim=0, keepdim=True) / len(context.target) for n, g in stacked.items()}
    return {n: g.view(-1, *params[n].shape) for n, g in stacked.items()}


def _flat(metric: Metric) -> dict[str, Tensor]:
    """A metric's factors as tensors by name."""
    found = {}
    for name, held in metric.items():
        found |= {name: held} if isinstance(held, Tensor) else {f"{name}|{i}": x for i, x in enumerate(held)}
    return found


def grouped(blocks: list[Block], fisher: Fisher) -> list[list[Block]]:
    """Blocks in groups whose sums stay under the limit, in order; a block over it is a group of its own."""
    groups: list[list[Block]] = [[]]
    for block in blocks:
        room = fisher.limit is None or footprint([*groups[-1], block], fisher.block)["sums"] <= fisher.limit
        if groups[-1] and not room:
            groups.append([])
        groups[-1].append(block)
    return groups


def _packed(rows: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive rows in batches of at most AREA padded terms."""
    start = 0
    for stop in range(1, len(rows) + 1):
        longest = int(lengths[rows[stop : stop + 1]].max(initial=0))
        if stop == len(rows) or (stop + 1 - start) * longest > AREA or stop - start == BATCH:
            yield rows[start:stop]
            start = stop


def packed(factors: Factors) -> dict[str, Tensor]:
    """Factors as named tensors."""
    totals = {"examples": factors.examples, "terms": factors.terms}
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in totals.items()}
    for name, factor in factors.blocks.items():
        found |= {name: factor.corrected, f"{name}|repeats": torch.tensor(factor.repeats, dtype=torch.float64)}
        for side, held in enumerate((factor.rows, factor.columns)):
            found[f"{name}|{side}"] = held.values
            found |= {f"{name}|{side}|{i}": q for i, q in enumerate(held.parts)}
    return found


def unpacked(tensors: dict[str, Tensor], blocks: list[Block]) -> Factors:
    """The inverse of `packed`."""

    def side(name: str, index: int) -> Side:
        count = sum(key.startswith(f"{name}|{index}|") for key in tensors)
        return Side(tuple(tensors[f"{name}|{index}|{i}"] for i in range(count)), tensors[f"{name}|{index}"])

    made = {
        b.name: Factor(b, side(b.name, 0), side(b.name, 1), tensors[b.name], float(tensors[f"{b.name}|repeats"]))
        for b in blocks
    }
    return Factors(made, float(tensors["examples"]), float(tensors["terms"]))


@dataclass(frozen=True)
class _Files:
    """Named sets of tensors in a directory, each with a checksum and the key of the fit; nothing without a path."""

    path: Path | None
    key: str

    def read(self, name: str) -> dict[str, Tensor] | None:
        """What was written under this name by the same fit; None where it is missing or damaged."""
        if self.path is None:
            return None
        try:
            about = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
            data = (self.path / f"{name}.safetensors").read_bytes()
            if about != {"key": self.key, "xxh3": xxhash.xxh3_128_hexdigest(data)}:
                return None
        except (OSError, ValueError):
            return None
        return load_tensors(data)

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        data = save_tensors({n: t.contiguous() for n, t in tensors.items()})
        write_bytes(self.path / f"{name}.safetensors", data)
        write_json(self.path / f"{name}.json", {"key": self.key, "xxh3": xxhash.xxh3_128_hexdigest(data)})

    def drop(self, *starts: str) -> None:
        """Remove what is no longer needed."""
        for file in sorted(self.path.iterdir()) if self.path is not None else []:
            if file.name.startswith(starts):
                file.unlink()
