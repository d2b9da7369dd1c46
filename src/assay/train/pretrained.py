"""Models of Hugging Face transformers on disk and in memory: their files, their structure, their weights.

Weights by safetensors only, no code of a model's own. transformers, peft and the hub are imported when they are needed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.core.errors import InputError
from assay.core.keys import digest, digest_file
from assay.numerics.readout import Readout
from assay.train.models import init_params


def library(name: str, what: str = "a Hugging Face model") -> Any:
    """The package that `what` needs, or an `InputError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{what} needs the package {name!r}", why=str(error), fix="pip install 'assay-data[hf]'"
        ) from error


def folder_of(path: str, *, weights: bool = False) -> Path:
    """The directory of a model: the path itself, or where its files from the hub are kept (weights only if asked)."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise InputError("no such model directory", where=path, fix="give the folder that save_pretrained wrote")
    hub = library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(path, allow_patterns=["*.json", *(["*.safetensors"] if weights else [])]))
    except Exception as error:  # network, spelling, permission: each has a type of its own
        raise InputError(
            f"{path!r} is no directory, and the hub gave no model of that name", why=first_line(error),
            fix="give the folder that save_pretrained wrote",
        ) from error  # fmt: skip


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty when there is no file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError("not JSON", where=path, why=str(error), fix="copy the file again") from error


def tensor_files(folder: Path) -> list[Path]:
    """The folder's safetensors files. Raises `InputError` when there are none, whatever else is there."""
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    raise InputError(
        "no safetensors weights here", where=folder,
        why=f"{pickles[0]} is a pickle, which can run code when read" if pickles else "there is no *.safetensors file",
        fix="load the model where you trust it, and write it again with model.save_pretrained(folder)",
    )  # fmt: skip


def checkpoint_hash(path: str, adapter: str | None = None) -> str:
    """Digest of the bytes of the weights (and the adapter's); which weights a table was made with."""
    files = tensor_files(folder_of(path, weights=True)) + (tensor_files(folder_of(adapter)) if adapter else [])
    return digest([(file.name, digest_file(file)) for file in files])


class Form(NamedTuple):
    """How a model is called, found out once from its structure."""

    readout: Readout | None
    """The output layer, where logits are exactly it of the last hidden states."""
    positions: bool
    """Whether a row of positions is passed for each example: a model that looks up one row for the whole batch adds
    the gradients of its examples up before they can be told apart."""


def config_of(folder: Path, context: int) -> Any:
    """transformers' own config of a folder. Raises `InputError` for one that it cannot read, or of fewer positions than
    `context`."""
    transformers = library("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            "transformers cannot read this config", where=folder, why=first_line(error),
            fix="use an architecture that transformers has itself: code that comes with a model is never run",
        ) from error  # fmt: skip
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise InputError(
            f"context = {context}", where=folder, why=f"the model has {longest} positions",
            fix=f"set context to at most {longest}",
        )  # fmt: skip
    return config


def core_of(module: nn.Module) -> nn.Module:
    """The transformers model, below an adapter's wrapper."""
    return module.get_base_model() if hasattr(module, "peft_config") else module  # type: ignore[operator]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars, notes and warnings; torch's generator afterwards as it was before."""
    logging = library("transformers").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def build(auto: str, config: Any, dtype: torch.dtype, adapter: str | None) -> nn.Module:
    """The model a config describes, in evaluation mode, by the `Auto...` class of that name.

    Its parameters are placeholders that take up no memory; buffers are real. With an adapter, only the adapter's
    parameters require grad.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    maker, empty = getattr(library("transformers"), auto), library("accelerate").init_empty_weights
    with quiet():
        with empty(include_buffers=False):
            try:
                model = maker.from_config(config, attn_implementation="sdpa", **options)
            except ValueError:
                try:
                    model = maker.from_config(config, attn_implementation="eager", **options)
                except ValueError as error:
                    raise InputError(
                        f"transformers has no {auto} of type {config.model_type!r}", why=first_line(error),
                        fix="give a model of the right kind",
                    ) from error  # fmt: skip
            if adapter:
                model = library("peft").get_peft_model(model, _peft_config(adapter))
        core_of(model).tie_weights()  # type: ignore[operator]
    _hollow(model)
    return model.eval()


def form_of(model: nn.Module, *, causal: bool) -> Form:
    """How to call the model. Where logits are the output layer of the last hidden states, that layer becomes a
    `Readout` in the model."""
    core = core_of(model)
    positions, readout = _one_row_of_positions(core), _plain_readout(core) if causal else None
    if readout is not None:
        core.set_submodule(_name_of(core, core.get_output_embeddings()), readout)  # type: ignore[operator]
    return Form(readout, positions)


def check_causal(config: Any) -> None:
    """Raises `InputError` for encoders: they can be opened as causal models, and would see what they are to predict."""
    masked = library("transformers").models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encoder = config.model_type in masked and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"a {config.model_type} model is not causal", why="each token would see those after it",
            fix="give a decoder, or a sequence classifier",
        )  # fmt: skip


def _hollow(model: nn.Module) -> None:
    """Replace parameters without storage by zeros that take up one number each; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for layer in model.modules():
        for name, p in layer.named_parameters(recurse=False):
            if id(p) not in made:
                zeros = torch.zeros((), dtype=p.dtype).expand(p.shape)
                made[id(p)] = nn.Parameter(zeros, requires_grad=p.requires_grad)
            layer._parameters[name] = made[id(p)]


def _name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is layer)


@torch.no_grad()
def _one_row_of_positions(model: nn.Module) -> bool:
    """Whether the model looks positions up once for the whole batch, and can be given them for each example."""

    def looked_up(**given: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        hooks = [
            m.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for m in model.modules() if isinstance(m, nn.Embedding)
        ]  # fmt: skip
        try:
            model(input_ids=torch.ones(2, 3, dtype=torch.int64), **given)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    alone = looked_up()
    if not any(ids.dim() == 2 and len(ids) == 1 for ids in alone):
        return False
    try:
        given = looked_up(position_ids=torch.arange(3).expand(2, 3))
    except TypeError:  # it takes none
        return False
    return len(given) == len(alone) and all(torch.equal(a.expand_as(b), b) for a, b in zip(alone, given, strict=True))


@torch.no_grad()
def _plain_readout(model: nn.Module) -> Readout | None:
    """The output layer as a `Readout`, if logits are it of the last hidden states: with random ones in their place,
    and logits far from zero, both must agree. Models that scale or cap their logits fail."""
    head, base = model.get_output_embeddings(), model.base_model  # type: ignore[operator]
    if type(head) is not nn.Linear or base is model:
        return None
    name, rng = _name_of(model, head), torch.Generator().manual_seed(0)
    weights = {f"{name}.{k}": torch.randn(p.shape, generator=rng) for k, p in head.named_parameters()}
    hidden = torch.randn(1, 3, head.in_features, generator=rng) * 30 / head.in_features**0.5

    def replace(_: nn.Module, args: Any, out: Any) -> Any:
        out.last_hidden_state = hidden
        return out

    hook = base.register_forward_hook(replace)  # type: ignore[operator]
    try:
        found = torch.func.functional_call(model, weights, (), {"input_ids": torch.zeros(1, 3, dtype=torch.int64)})
    finally:
        hook.remove()
    expected = F.linear(hidden, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    logits = found.logits.float()
    same = logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-4, atol=1e-3)
    return Readout.adopt(head) if same else None


def _peft_config(adapter: str) -> Any:
    folder, peft = folder_of(adapter, weights=True), library("peft")
    tensor_files(folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise InputError(
            "no adapter here", where=folder, why=first_line(error), fix="give the folder that peft wrote"
        ) from error
    if config.is_prompt_learning:
        raise InputError(
            f"a {config.peft_type} adapter adds tokens, not weights", where=folder, fix="use LoRA or a relative of it"
        )
    config.inference_mode = False  # its parameters are to require grad
    return config


def load(
    auto: str, config: Any, dtype: torch.dtype, folder: Path, adapter: str | None, module: nn.Module, seed: int | None
) -> dict[str, Tensor]:
    """Stored values of the parameters of `module`, which `build` made; missing ones are drawn if there is a seed."""
    tensor_files(folder)
    with quiet():
        try:
            model, told = getattr(library("transformers"), auto).from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
            missing = {id(p) for n, p in model.named_parameters() if n in told["missing_keys"]}
            if adapter:
                path, options = str(folder_of(adapter, weights=True)), {"config": _peft_config(adapter)}
                model = library("peft").PeftModel.from_pretrained(model, path, is_trainable=True, **options)
        except InputError:
            raise
        except Exception as error:  # safetensors and transformers raise many types
            raise InputError(
                "the weights cannot be loaded", where=folder, why=first_line(error),
                fix="copy the folder again; config.json and the *.safetensors files must belong together",
            ) from error  # fmt: skip
    named = dict(model.named_parameters())
    assert list(named) == [n for n, _ in module.named_parameters()], "the same names with weights and without"
    values = {n: torch.zeros_like(p) if id(p) in missing else p.detach() for n, p in named.items()}
    # An adapter brings layers of its own in the place of some; the old ones are there still, and unused.
    lacking = [n for n, p in named.items() if id(p) in missing and ".original_module." not in n]
    if lacking and seed is None:
        raise InputError(
            f"{len(lacking)} parameters are not among the weights, the first is {lacking[0]!r}", where=folder,
            fix="train them first, or have them drawn: params(seed=0)",
        )  # fmt: skip
    drawn = init_params(module, seed or 0, dtype) if lacking else {}
    return values | {n: drawn[n] for n in lacking}
