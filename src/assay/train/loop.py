"""The trainer: deterministic, single-threaded, resumable; and the evaluator beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from assay.core.errors import InputError
from assay.core.keys import canonical, digest, hash_ids, shuffled, write_bytes
from assay.core.selection import Selection
from assay.core.task import Encoded, Params, Task
from assay.train import optim
from assay.train.models import first_weights
from assay.train.recipe import Recipe

# Padded terms (rows x longest) of one micro-batch: big enough to feed one core, small enough for its caches.
AREA = 768


@dataclass(frozen=True)
class Trained:
    """Final weights, the optimiser's state, and the training loss of each step (nats per term)."""

    params: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    losses: list[float]


def steps(recipe: Recipe, selection: Selection, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Positions in the selection for each step: epoch after epoch in an order keyed by (seed, epoch, id), as many
    examples as fit in `terms_per_step`.

    `sizes` [n] aligns with the selection. An ordered Selection is read as it stands, again and again.
    """
    if not len(selection):
        raise InputError("nothing is selected", why="a training run needs at least one example", fix="raise the budget")
    batch: list[int] = []
    filled = count = epoch = 0
    while True:
        order = np.arange(len(selection)) if selection.ordered else shuffled(selection.ids, "order", recipe.seed, epoch)
        for position in order.tolist():
            if batch and filled + sizes[position] > recipe.terms_per_step:
                yield np.array(batch)
                batch, filled, count = [], 0, count + 1
                if count == recipe.steps:
                    return
            batch.append(position)
            filled += int(sizes[position])
        epoch += 1


def blocks(lengths: np.ndarray, area: int = AREA) -> list[np.ndarray]:
    """Positions cut into micro-batches of like length, each of at most `area` padded positions (at least one row)."""
    order = np.argsort(lengths, kind="stable")
    cut, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > area:
            cut.append(order[start:end])
            start = end
    return cut


def mark_steps(steps: int, marks: int) -> list[int]:
    """Numbers of steps after which a model is kept: `marks` of them at equal distances, the last at the end.

    >>> mark_steps(10, 3)
    [3, 6, 10]
    """
    if marks > steps:
        raise InputError(
            f"{marks} checkpoints of {steps} steps", why="no two may be the same model", fix="lower proxy.checkpoints"
        )
    return [k * steps // marks for k in range(1, marks + 1)]


def mark_file(path: Path, step: int) -> Path:
    """Where the model after so many steps is kept; the last one is `checkpoint.safetensors`."""
    return path / f"mark-{step}.safetensors"


def trainable(task: Task, params: Params) -> list[str]:
    """Names of the parameters that are trained, in the order of `params`: all but those the task's module freezes."""
    frozen = {name for name, p in task.module.named_parameters() if not p.requires_grad}
    return [name for name in params if name not in frozen]


def noise_keys(task: Task, ids: np.ndarray, seed: int, step: int) -> np.ndarray | None:
    """What the noise of a step is drawn from, `[b]` uint64; None where the task has none."""
    return hash_ids(ids, "noise", seed, step) if task.stochastic else None


def gradient(
    task: Task, params: Params, encoded: Encoded, rows: np.ndarray, weights: np.ndarray, terms: int,
    noise: np.ndarray | None = None,
) -> tuple[list[Tensor], float]:  # fmt: skip
    """Gradient of `(1/T) sum_i w_i n_i loss_i` to each parameter, and that sum; accumulated over micro-batches of like
    length. Zero for frozen parameters. `noise` has the keys of the task's noise, one a row."""
    leaves = {name: params[name].detach().requires_grad_() for name in trainable(task, params)}
    held, value = {name: p.detach() for name, p in params.items()} | leaves, 0.0
    total = [torch.zeros_like(p) for p in leaves.values()]
    for block in blocks(encoded.lengths[rows]):
        batch = encoded.inputs(rows[block]) | ({} if noise is None else task.noise(noise[block]))
        nll, mask = task.terms(held, batch)
        w = torch.as_tensor(weights[block], dtype=nll.dtype)
        loss = (nll * mask).sum(dim=1) @ w / terms
        part = torch.autograd.grad(loss, list(leaves.values()))
        total = [t + p for t, p in zip(total, part, strict=True)]
        value += float(loss.detach())
    found = dict(zip(leaves, total, strict=True))
    # Zeros that take up no memory.
    return [found[n] if n in found else p.new_zeros(()).expand_as(p) for n, p in params.items()], value


def advance(
    task: Task, params: Params, moved: list[str], state: optim.State, encoded: Encoded, rows: np.ndarray,
    weights: np.ndarray, recipe: Recipe, step: int, noise: np.ndarray | None,
) -> tuple[list[Tensor], optim.State, float]:  # fmt: skip
    """One training step: values of the parameters `moved`, the optimiser's state, and the step's summed loss / T.

    Nothing is changed in place. Raises `InputError` when the loss is not finite.
    """
    grads, loss = gradient(task, params, encoded, rows, weights, recipe.terms_per_step, noise)
    if not np.isfinite(loss):
        raise _diverged(f"the training loss is {loss} at step {step}", recipe)
    return *optim.update(recipe, clipped(params, grads, moved, recipe), state, [params[n] for n in moved], step), loss


def clipped(params: Params, grads: list[Tensor], moved: list[str], recipe: Recipe) -> list[Tensor]:
    """Of the gradients of all parameters those of `moved`, clipped as the recipe says."""
    slope = dict(zip(params, grads, strict=True))
    return optim.clip([slope[n] for n in moved], recipe.clip)


def train(
    task: Task,
    encoded: Encoded,
    rows: np.ndarray,
    selection: Selection,
    recipe: Recipe,
    path: Path | None = None,
    *,
    start: Params | None = None,
    save_every: int = 200,
    marks: int = 1,
) -> Trained:
    """Train on a Selection whose k-th id stands in row `rows[k]` of `encoded`. Frozen parameters stay as they are.
    It begins from `start`, else from the weights that the task stores, else from a draw keyed by the recipe's seed.

    With a `path`, the state is kept there every `save_every` steps, a killed run goes on from it to the same bytes,
    and `checkpoint.safetensors` is written at the end; `marks - 1` earlier models are kept as `mark-STEP.safetensors`,
    see `mark_steps`. Raises `InputError` when the loss is not finite.
    """
    due = mark_steps(recipe.steps, marks)[:-1]
    key = digest(recipe.spec(), task.describe(), selection.fingerprint, fingerprint(start) if start else "")
    params = dict(start) if start is not None else first_weights(task, recipe.seed)
    names, moved = list(params), trainable(task, params)
    state, losses = optim.init(recipe, [params[n] for n in moved]), []
    held = load_if(path / "state.safetensors", key) if path else None
    if held is not None and path and all(load_if(mark_file(path, k), key) for k in due if k <= len(held.losses)):
        params = {n: held.params[n] for n in names}
        state, losses = {k: [v[n] for n in moved] for k, v in held.state.items()}, held.losses
    for step, batch in enumerate(steps(recipe, selection, encoded.sizes[rows])):
        if step < len(losses):
            continue
        noise = noise_keys(task, selection.ids[batch], recipe.seed, step)
        values, state, loss = advance(
            task, params, moved, state, encoded, rows[batch], selection.weights[batch], recipe, step, noise
        )
        params |= zip(moved, values, strict=True)
        losses.append(loss * recipe.terms_per_step / max(1, int(encoded.sizes[rows[batch]].sum())))
        if path and step + 1 in due:
            save(mark_file(path, step + 1), _named(params, moved, state, losses), key)
        if path and (step + 1) % save_every == 0 and step + 1 < recipe.steps:
            save(path / "state.safetensors", _named(params, moved, state, losses), key)
    _check_finite(params, recipe)
    trained = _named(params, moved, state, losses)
    if path:
        save(path / "checkpoint.safetensors", trained, key)
        (path / "state.safetensors").unlink(missing_ok=True)
    return trained


def _diverged(what: str, recipe: Recipe) -> InputError:
    return InputError(what, why="training diverged", fix=f"lower lr (now {recipe.lr})")


def _check_finite(params: Params, recipe: Recipe) -> None:
    """The last step has no loss after it that would tell."""
    for name, p in params.items():
        if not p.isfinite().all():
            raise _diverged(f"{name} has weights that are not finite after the last step", recipe)


def _named(params: dict[str, Tensor], moved: list[str], state: optim.State, losses: list[float]) -> Trained:
    return Trained(params, {k: dict(zip(moved, v, strict=True)) for k, v in state.items()}, list(losses))


def save(path: Path, trained: Trained, key: str) -> None:
    """Weights and optimiser state, keyed by parameter name, as safetensors; the same bytes each time.

    The header's metadata is one entry, with a checksum: safetensors has none, and writes several entries in an order
    that changes from call to call.
    """
    tensors = {f"param.{k}": v.contiguous() for k, v in trained.params.items()}
    tensors |= {f"optim.{s}.{k}": v.contiguous() for s, slot in trained.state.items() for k, v in slot.items()}
    tensors["losses"] = torch.tensor(trained.losses, dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = canonical({"format": 1, "key": key, "xxh3": fingerprint(tensors)})
    write_bytes(path, to_bytes(tensors, metadata={"assay": about}))


def load(path: Path) -> Trained:
    """A checkpoint by `save`. Raises `InputError` when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            # Into memory that is aligned as torch's own is: a product of other alignment may differ in its last bit.
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["assay"])
        if about["xxh3"] != fingerprint(tensors):
            raise ValueError("its bytes do not match its checksum")
    except Exception as error:  # safetensors raises its own type, not exported everywhere
        raise InputError(
            "unreadable checkpoint", where=path, why=str(error), fix="delete its folder and run again"
        ) from error
    params = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    state: dict[str, dict[str, Tensor]] = {}
    for k, v in tensors.items():
        if k.startswith("optim."):
            slot, name = k.removeprefix("optim.").split(".", 1)
            state.setdefault(slot, {})[name] = v
    return Trained(params, state, tensors["losses"].tolist())


def load_if(path: Path, key: str) -> Trained | None:
    """The kept state of a killed run, if it is whole and of this very run; any damage means: start again."""
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            same = json.loads(file.metadata()["assay"])["key"] == key
        return load(path) if same else None
    except Exception:  # safetensors raises a type of its own
        return None


def fingerprint(params: Params) -> str:
    """Hash of weights by name."""
    import xxhash

    def content(v: Tensor) -> str:
        # As plain bytes, for numpy does not know every type that torch has; and without a copy.
        return xxhash.xxh3_128_hexdigest(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return digest([(k, str(v.dtype), list(v.shape), content(v)) for k, v in sorted(params.items())])


@torch.no_grad()
def evaluate(task: Task, params: Params, encoded: Encoded, *, area: int = 2 * AREA) -> dict[str, np.ndarray]:
    """`loss` (the task's measure) of each example, `[n]` float64, and the task's further metrics."""
    found: dict[str, np.ndarray] = {}
    for block in blocks(encoded.lengths, area):
        batch = encoded.inputs(block)
        numbers = {"loss": task.measure(params, batch), **task.metrics(params, batch)}
        for name, value in numbers.items():
            found.setdefault(name, np.zeros(len(encoded)))[block] = value.double().numpy()
    return found
