"""Moments of optimisers, keyed by parameter name: read from checkpoints of several makers, or estimated.

Names decide, never positions: a state that is keyed by position alone is joined to names through its groups, and
refused unless every shape fits in exactly one way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from assay.core.errors import InputError, nearest
from assay.core.selection import Selection
from assay.core.task import Encoded, Params, Task
from assay.train import loop
from assay.train.recipe import Recipe

# What a moment is called by us, by torch, and by torch in older files.
SLOTS = {
    "mean": ("mean", "exp_avg"),
    "square": ("square", "exp_avg_sq"),
    "momentum": ("momentum", "momentum_buffer"),
}
OURS = {theirs: ours for ours, names in SLOTS.items() for theirs in names}
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
FILES = ("checkpoint.safetensors", "optimizer.safetensors", "optimizer.pt", "optimizer.bin")


class Moments(NamedTuple):
    """`state[slot][name]`: 'mean' and 'square' (Adam's m and v, not corrected for their start at zero), or 'momentum'.

    After `steps` steps the corrected ones are m / (1 - b1^steps) and v / (1 - b2^steps). `steps` is None where there
    is nothing to correct, or where the file does not say.
    """

    state: dict[str, dict[str, Tensor]]
    steps: int | None


Found = dict[str, dict[str, Tensor]]
"""Parameter name -> slot -> tensor."""


def load_moments(path: Path | str, module: nn.Module) -> Moments:
    """Moments of the parameters of `module` that require grad, on the CPU, from a file or a folder with one:

    - `checkpoint.safetensors` of `assay.train.loop.save`;
    - safetensors with keys `exp_avg_sq.<name>` or `<name>.exp_avg_sq`;
    - `optimizer.pt` of torch or of a Hugging Face Trainer (read with `weights_only`), keyed by position;
    - a full optimiser state keyed by name, `{"state": {name: {"exp_avg", "exp_avg_sq", "step"}}}`, as FSDP gives it.

    Prefixes of wrappers (FSDP, `torch.compile`, DataParallel) are dropped from names. A parameter that is in a group
    and has no state never had a gradient: its moments are zero. Raises `InputError` for a damaged file, for names or
    shapes that are not the module's, and for positions that fit in no way or in several.
    """
    file = _file(Path(path))
    if file.suffix == ".safetensors":
        found, steps = _from_safetensors(file)
        return _checked(found, steps, module, file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have types of their own
        raise InputError(
            "unreadable optimiser state", where=file, why=(str(error) or type(error).__name__).splitlines()[0],
            fix="give the file that torch.save(optimizer.state_dict(), ...) wrote; only tensors and numbers are read",
        ) from error  # fmt: skip
    found, steps = _from_state_dict(content, module, file)
    return _checked(found, steps, module, file)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError("no such optimiser state", where=path, fix=f"give a file, or a folder with {', '.join(FILES)}")
    for name in FILES:
        if (path / name).is_file():
            return path / name
    sharded = next((p for p in sorted(path.rglob("*.distcp"))), None)
    if sharded is not None:
        raise InputError(
            "a sharded optimiser state", where=sharded.parent, why="its tensors are spread over several files",
            fix="python -m torch.distributed.checkpoint.format_utils dcp_to_torch <this folder> optimizer.pt",
        )  # fmt: skip
    raise InputError("no optimiser state in this folder", where=path, fix=f"it should hold {' or '.join(FILES)}")


def _from_safetensors(file: Path) -> tuple[Found, int | None]:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call]
            own = "assay" in (opened.metadata() or {})
            tensors = {} if own else {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises a type of its own
        raise InputError("unreadable optimiser state", where=file, why=str(error), fix="copy the file again") from error
    if own:
        trained = loop.load(file)
        names = {name for slot in trained.state.values() for name in slot}
        return {n: {s: v[n] for s, v in trained.state.items()} for n in names}, len(trained.losses)
    found: Found = {}
    steps = None
    for key, tensor in tensors.items():
        head, _, rest = key.removeprefix("optim.").partition(".")
        name, _, last = key.rpartition(".")
        if "step" in (key, head, last):
            steps = max(steps or 0, int(tensor.max()))
        elif head in OURS:
            found.setdefault(rest, {})[OURS[head]] = tensor
        elif last in OURS:
            found.setdefault(name, {})[OURS[last]] = tensor
        else:
            raise InputError(
                f"what is tensor {key!r}?",
                where=file,
                fix="name tensors exp_avg.<parameter> and exp_avg_sq.<parameter>",
            )
    return found, steps


def _from_state_dict(content: Any, module: nn.Module, file: Path) -> tuple[Found, int | None]:
    for key in ("optimizer", "optimizer_state_dict", "optim"):
        if isinstance(content, dict) and "state" not in content and key in content:
            content = content[key]
    state = content.get("state") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise InputError(
            "no optimiser state in this file", where=file, why="it has no dictionary 'state'",
            fix="give what torch.save(optimizer.state_dict(), ...) wrote",
        )  # fmt: skip
    groups = content.get("param_groups") or []
    if any(isinstance(key, int) for key in state) or (groups and not state):
        state = _by_name(state, groups, module, file)
    found: Found = {}
    steps = []
    for name, entry in state.items():
        found[name] = {OURS[k]: v for k, v in entry.items() if k in OURS and isinstance(v, Tensor)}
        steps += [int(entry["step"])] if "step" in entry else []
    if found and not any(found.values()):
        slots = sorted({str(k) for entry in state.values() for k in entry})
        raise InputError(
            "the optimiser keeps no moments that are known", where=file, why=f"it has: {', '.join(slots) or 'nothing'}",
            fix="give a state of AdamW, Adam or SGD with momentum that is not quantised",
        )  # fmt: skip
    return found, max(steps) if steps else None


def _by_name(state: Mapping[int, Any], groups: list[Any], module: nn.Module, file: Path) -> dict[str, Any]:
    """A state keyed by position, keyed by name; parameters without state are left empty."""
    try:
        positions = [list(group["params"]) for group in groups]
        told = [list(group["param_names"]) if "param_names" in group else None for group in groups]
    except (KeyError, TypeError) as error:
        raise InputError("unreadable groups of parameters", where=file, why=repr(error), fix="save it again") from error
    decays = [float(group.get("weight_decay") or 0.0) for group in groups]
    flat = [p for group in positions for p in group]
    if groups and all(names is not None and len(names) == len(p) for names, p in zip(told, positions, strict=True)):
        names = [name for group in told for name in group or ()]
        return {name: state.get(p, {}) for p, name in zip(flat, names, strict=True)}
    shapes = {name: p.shape for name, p in module.named_parameters()}
    ways = set(_orders(module, [len(p) for p in positions], decays))
    fitting = []
    for way in sorted(ways):
        fits = all(_fits(state.get(p, {}), shapes[name]) for p, name in zip(flat, way, strict=True))
        fitting += [way] if fits else []
    if len(fitting) == 1:
        return {name: state.get(p, {}) for p, name in zip(flat, fitting[0], strict=True)}
    sizes = " + ".join(str(len(p)) for p in positions)
    own = sum(p.requires_grad for p in module.parameters())
    raise InputError(
        f"the state is keyed by position, in groups of {sizes}, and {'no' if not fitting else len(fitting)} order of "
        f"the model's {own} parameters fits",
        where=file, why="names and shapes must agree, or moments would go to the wrong weights",
        fix="save it with names: torch.optim.AdamW(model.named_parameters()), or torch.distributed.checkpoint's "
        "get_optimizer_state_dict(model, optimizer)",
    )  # fmt: skip


def _fits(entry: Mapping[str, Any], shape: torch.Size) -> bool:
    return all(entry[k].shape == shape for k in OURS if isinstance(entry.get(k), Tensor))


def _orders(module: nn.Module, sizes: list[int], decays: list[float]) -> Iterable[tuple[str, ...]]:
    """Orders in which common trainers hand a module's parameters to an optimiser in groups of these sizes."""
    owners = {f"{path}.{n}" if path else n: m for path, m in module.named_modules() for n in m._parameters}
    shapes = {n: p.dim() for n, p in module.named_parameters()}
    norm = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
    rules: list[Callable[[str], bool]] = [
        # Trainers of transformers, newest first: by names and LayerNorm; by the class; LayerNorm only.
        lambda n: not norm.search(n.lower()) and not isinstance(owners[n], nn.LayerNorm),
        lambda n: "bias" not in n and "Norm" not in type(owners[n]).__name__,
        lambda n: "bias" not in n and not isinstance(owners[n], nn.LayerNorm),
        # Scripts: no decay for biases and a parameter that is called so; or for vectors.
        lambda n: not any(word in n for word in ("bias", "LayerNorm.weight", "layer_norm.weight")),
        lambda n: shapes[n] >= 2,
    ]
    for names in ([n for n, p in module.named_parameters() if p.requires_grad], list(shapes)):
        if sizes == [len(names)]:
            yield tuple(names)
        if len(sizes) != 2:
            continue
        for rule in rules:
            parts = [n for n in names if rule(n)], [n for n in names if not rule(n)]
            for first, second in (parts, parts[::-1]):
                falls = decays[0] - decays[1] if first is parts[0] else decays[1] - decays[0]
                if sizes == [len(first), len(second)] and falls >= 0:
                    yield (*first, *second)


def _namer(module: nn.Module) -> Callable[[str], str]:
    """A stored name to the module's own: without wrappers, and shared parameters by their first name."""
    first = {id(p): n for n, p in module.named_parameters()}
    own = {n: first[id(p)] for n, p in module.named_parameters(remove_duplicate=False)}

    def name_of(stored: str) -> str:
        name = stored
        for wrapper in WRAPPERS if name not in own else ():
            name = name.replace(wrapper, "")
        while name not in own and name.startswith("module."):
            name = name.removeprefix("module.")
        return own.get(name, name)

    return name_of


def _checked(stored: Found, steps: int | None, module: nn.Module, file: Path) -> Moments:
    """The moments of all parameters that require grad, by the module's names, in its order."""
    known, name_of = dict(module.named_parameters()), _namer(module)
    found: Found = {}
    for name, slots in stored.items():
        found.setdefault(name_of(name), {}).update(slots)
    slots = sorted({slot for entry in found.values() for slot in entry})
    if not slots:
        raise InputError(
            "the optimiser has no moments", where=file, fix="give a state of Adam, or of SGD with momentum"
        )
    for name in found:
        if name not in known:
            raise InputError(f"the model has no parameter {name!r}", where=file, fix=_near(name, known))
    state: dict[str, dict[str, Tensor]] = {slot: {} for slot in slots}
    for name, p in known.items():
        if not p.requires_grad:
            continue
        if name not in found:
            raise InputError(f"no moments of parameter {name!r}", where=file, fix=_near(name, found))
        lacking = [slot for slot in slots if slot not in found[name]] if found[name] else []
        if lacking:
            raise InputError(f"parameter {name!r} has no {lacking[0]!r}", where=file, fix="save the state again")
        for slot in slots:
            tensor = found[name].get(slot, torch.zeros(p.shape))
            if tensor.shape != p.shape:
                raise InputError(
                    f"{slot!r} of {name!r} has shape {tuple(tensor.shape)}", where=file,
                    why=f"the parameter has {tuple(p.shape)}", fix="give the optimiser of this very model",
                )  # fmt: skip
            if not tensor.isfinite().all() or (slot == "square" and (tensor < 0).any()):
                raise InputError(
                    f"{slot!r} of {name!r} has numbers that cannot be", where=file,
                    why="moments are finite, and squares not negative", fix="take an earlier checkpoint",
                )  # fmt: skip
            state[slot][name] = tensor
    return Moments(state, steps)


def _near(name: str, known: Iterable[str]) -> str:
    """As `nearest`, without listing hundreds of parameters."""
    text = nearest(name, known)
    return text if len(text) < 300 else text[:300].rsplit(", ", 1)[0] + ", ..."


def estimate_moments(
    task: Task,
    params: Params,
    encoded: Encoded,
    rows: np.ndarray,
    ids: np.ndarray,
    *,
    terms_per_step: int,
    steps: int,
    seed: int = 0,
) -> Moments:
    """Moments at fixed parameters: mean = avg g, square = avg g^2 over `steps` mini-batches, with g the gradient of
    (1/T) sum_i n_i loss_i over examples that fit in T = `terms_per_step` terms, in an order keyed by (seed, id).

    What Adam's v would settle at if the model stood still; nothing to correct, so `steps` is None. The k-th id stands
    in row `rows[k]` of `encoded`. For checkpoints that came without their optimiser.
    """
    recipe = Recipe(steps=steps, terms_per_step=terms_per_step, seed=seed)
    ones = np.ones(len(ids))
    mean = {name: torch.zeros_like(params[name]) for name in loop.trainable(task, params)}
    square = {name: torch.zeros_like(p) for name, p in mean.items()}
    for batch in loop.steps(recipe, Selection(ids, ones), encoded.sizes[rows]):
        grads, _ = loop.gradient(task, params, encoded, rows[batch], ones[batch], terms_per_step)
        for name, grad in zip(params, grads, strict=True):
            if name in mean:
                mean[name] += grad / steps
                square[name] += grad.square() / steps
    return Moments({"mean": mean, "square": square}, None)


def agreement(loaded: Moments, estimated: Moments) -> dict[str, float]:
    """Correlation of log square, loaded and estimated, over the entries of each parameter: a check of names against
    the model's own gradients. Near 0 where a parameter has another's moments; 1 where all is well and noise is small.

    Only entries that are positive in both count; NaN for parameters with fewer than three, or without variation.
    """
    found = {}
    for name, square in loaded.state["square"].items():
        pair = torch.stack([square.flatten().double(), estimated.state["square"][name].flatten().double()])
        pair = pair[:, (pair > 0).all(dim=0)].log()
        centred = pair - pair.mean(dim=1, keepdim=True)
        scale = centred.norm(dim=1).prod()
        found[name] = float(centred[0] @ centred[1] / scale) if pair.shape[1] > 2 and scale > 0 else float("nan")
    return found
