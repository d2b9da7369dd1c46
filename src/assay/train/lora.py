"""LoRA on any task: low-rank changes of its linear layers, made by peft; and their training, epoch by epoch.

A layer becomes x -> W x + scale B A x, A `[rank, i]` and B `[o, rank]`; only A and B are trained. At the start B is 0,
so that the model is what it was, and only B has a gradient.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from assay.core.errors import InputError, nearest
from assay.core.keys import shuffled
from assay.core.pool import Pool
from assay.core.task import Encoded, Inputs, Params, Task
from assay.numerics.readout import Readout
from assay.train import loop, optim
from assay.train.models import uniform_weights
from assay.train.pretrained import library
from assay.train.recipe import Recipe

# What LESS and most of its followers adapt, where a model's layers are called so.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class Adapted(Task):
    """A task whose linear layers are adapted. `layers`: their names, or last parts of them; () are the attention's
    q, k, v and o where they are called so, else all linear layers but the one that gives the logits."""

    inner: Task
    rank: int
    scale: float = 4.0
    layers: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "rank": self.rank, "scale": self.scale, "layers": self.layers}

    @cached_property
    def _own(self) -> Task:
        """A copy of the task, on a module of its own that has the adapters in it."""
        own = copy.copy(self.inner)  # by its state: what was built stays behind
        module = own.module
        assert own.module is module is not self.inner.module, "a task builds its module once"
        inject(module, adaptable(module, self.layers), self.rank, self.scale)
        return own

    @property
    def module(self) -> nn.Module:
        return self._own.module

    def describe(self) -> dict[str, Any]:
        about = {"rank": self.rank, "scale": self.scale, "layers": list(self.layers)}
        return {"task": "lora", **about, "inner": self.inner.describe()}

    def prepare(self, pool: Pool, path: Path) -> None:
        self.inner.prepare(pool, path)

    def encoded(self, path: Path) -> Encoded:
        return self.inner.encoded(path)

    def terms(self, params: Params, batch: Inputs) -> tuple[Tensor, Tensor]:
        return self._own.terms(params, batch)

    def margin(self, params: Params, batch: Inputs) -> Tensor:
        return self._own.margin(params, batch)  # type: ignore[attr-defined]

    def forward_flops(self, terms: np.ndarray) -> float:
        return self.inner.forward_flops(terms)

    def base(self, params: Params) -> dict[str, Tensor]:
        """The weights of the task that is adapted, by the names that they have here."""
        frozen = [name for name, p in self.module.named_parameters() if not p.requires_grad]
        return {name: params[name.replace(".base_layer.", ".")].detach() for name in frozen}

    def adapters(self, params: Params, seed: int) -> dict[str, Tensor]:
        """First values of A and B: A uniform in +-1/sqrt(inputs), keyed by (seed, name), and B zero. Float32 at least,
        whatever the model has."""
        found = {}
        for name, p in self.module.named_parameters():
            if not p.requires_grad:
                continue
            layer = name.rpartition(".lora_")[0]
            exact = next((v.dtype for n, v in params.items() if n.startswith(f"{layer}.")), torch.float32)
            exact = exact if exact == torch.float64 else torch.float32
            value = torch.zeros(p.shape, dtype=exact)
            if ".lora_A." in name:
                value = uniform_weights(p.shape, p.shape[1], seed, "lora", name).to(exact)
            found[name] = value
        return found


def adaptable(module: nn.Module, wanted: tuple[str, ...] = ()) -> list[str]:
    """Names of the linear layers to adapt. Raises `InputError` for a name that no linear layer has."""
    kinds = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    if any("lora_" in n for n in kinds):
        raise InputError("the model has an adapter already", fix="give the model without it")
    for name in wanted:
        if not any(name in (n, n.rpartition(".")[2]) for n in kinds):
            raise InputError(
                f"the model has no linear layer {name!r}", fix=nearest(name, {n.rpartition(".")[2] for n in kinds})
            )
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None  # type: ignore[operator]
    inside = [n for n, m in kinds.items() if not isinstance(m, Readout) and m is not head] or list(kinds)
    if not inside:
        raise InputError("the model has no linear layer", why="LoRA changes linear layers")
    chosen = wanted or ATTENTION
    found = [n for n in (list(kinds) if wanted else inside) if n in chosen or n.rpartition(".")[2] in chosen]
    return found or inside


def inject(module: nn.Module, names: list[str], rank: int, scale: float) -> None:
    """Put adapters into layers of a module, in place; they alone require grad. There is no dropout."""
    peft = library("peft", "LoRA")
    config = peft.LoraConfig(
        r=rank, lora_alpha=scale * rank, lora_dropout=0.0, bias="none", target_modules=names, init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, module)
    del module.peft_config  # by which others tell peft's own wrappers
    module.eval()


class Checkpoint(NamedTuple):
    """The adapters after an epoch: weights, Adam's moments as they stand (not corrected for their start at zero), all
    by name; the mean learning rate of the epoch, and the mean of its training losses."""

    params: dict[str, Tensor]
    mean: dict[str, Tensor]
    square: dict[str, Tensor]
    rate: float
    loss: float


def batches(ids: np.ndarray, sizes: np.ndarray, recipe: Recipe, epochs: int) -> list[list[np.ndarray]]:
    """Positions of each step of each epoch: all examples once, in an order keyed by (seed, epoch, id)."""
    found: list[list[np.ndarray]] = []
    for epoch in range(epochs):
        cut: list[list[int]] = [[]]
        filled = 0
        for position in shuffled(ids, "order", recipe.seed, epoch).tolist():
            if cut[-1] and filled + sizes[position] > recipe.terms_per_step:
                cut.append([])
                filled = 0
            cut[-1].append(position)
            filled += int(sizes[position])
        found.append([np.array(step) for step in cut])
    return found


def warm_up(
    task: Adapted, base: Params, encoded: Encoded, *, rows: np.ndarray, ids: np.ndarray, recipe: Recipe, epochs: int,
    path: Path, save_every: int = 100,
) -> None:  # fmt: skip
    """Train the adapters by AdamW on the examples in these rows of `encoded`, `epochs` times through them.

    All is the recipe's, but for its steps, which the examples decide. Each epoch's state is kept in `path`, and the
    one between them every `save_every` steps: a killed run goes on from there to the same bytes.
    """
    sizes = encoded.sizes[rows]
    plan = batches(ids, sizes, recipe, epochs)
    recipe = recipe.model_copy(update={"steps": sum(map(len, plan))})
    frozen, params = task.base(base), task.adapters(base, recipe.seed)
    names = list(params)
    state, losses, step = optim.init(recipe, list(params.values())), [], 0
    for epoch, steps in enumerate(plan):
        file, end = _file(path, epoch), step + len(steps)
        held = _held(file) or _held(path / "state.safetensors")
        if held is not None and len(losses) < len(held.losses) <= end:
            params = {n: held.params[n] for n in names}
            state, losses = {k: [v[n] for n in names] for k, v in held.state.items()}, held.losses
        for batch in steps:
            step += 1
            if step <= len(losses):
                continue
            grads, loss = _gradient(task, frozen | params, encoded, rows[batch], recipe, names)
            values, state = optim.update(recipe, optim.clip(grads, recipe.clip), state, list(params.values()), step - 1)
            params = dict(zip(names, values, strict=True))
            losses.append(loss * recipe.terms_per_step / max(1, int(sizes[batch].sum())))
            if step % save_every == 0 and step < end:
                loop.save(path / "state.safetensors", _named(params, state, losses), "")
        if not file.exists():
            loop.save(file, _named(params, state, losses), "")
    (path / "state.safetensors").unlink(missing_ok=True)


def read(path: Path, sizes: np.ndarray, *, ids: np.ndarray, recipe: Recipe, epochs: int) -> list[Checkpoint]:
    """The checkpoints that `warm_up` kept, each with the mean learning rate of its epoch."""
    plan, found, step = batches(ids, sizes, recipe, epochs), [], 0
    recipe = recipe.model_copy(update={"steps": sum(map(len, plan))})
    for epoch, steps in enumerate(plan):
        held, span = loop.load(_file(path, epoch)), range(step, step + len(steps))
        rate, loss = (float(np.mean(x)) for x in ([recipe.rate(s) for s in span], [held.losses[s] for s in span]))
        found.append(Checkpoint(held.params, held.state["mean"], held.state["square"], rate, loss))
        step = span.stop
    return found


def _file(path: Path, epoch: int) -> Path:
    return path / f"epoch-{epoch + 1}.safetensors"


def _gradient(
    task: Adapted, params: Params, encoded: Encoded, rows: np.ndarray, recipe: Recipe, names: list[str]
) -> tuple[list[Tensor], float]:
    grads, loss = loop.gradient(task, params, encoded, rows, np.ones(len(rows)), recipe.terms_per_step)
    if not np.isfinite(loss):
        raise InputError(
            f"the loss of the LoRA warm-up is {loss}", why="training diverged", fix=f"lower lr (now {recipe.lr})"
        )
    slope = dict(zip(params, grads, strict=True))
    return [slope[n] for n in names], loss


def _named(params: dict[str, Tensor], state: optim.State, losses: list[float]) -> loop.Trained:
    slots = {k: dict(zip(params, v, strict=True)) for k, v in state.items()}
    return loop.Trained(params, slots, list(losses))


def _held(file: Path) -> loop.Trained | None:
    """What was kept, if it is there and whole."""
    if not file.exists():
        return None
    try:
        return loop.load(file)
    except InputError:
        file.unlink()
        return None
