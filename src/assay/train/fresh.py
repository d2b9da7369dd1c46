"""A model's folder as `save_pretrained` writes it, made from a config and a tokenizer; weights come with training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.core.errors import InputError
from assay.core.keys import write_json, write_text
from assay.core.task import Params
from assay.train.pretrained import first_line, library, read_json

# What the tokenizer that is trained on a pool calls its end mark; its id is 0.
END = "<|end|>"


def read_config(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """An architecture as a table: the file's, or the one given."""
    if not isinstance(given, str):
        return dict(given)
    path = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
    if not path.is_file():
        raise InputError("no such config", where=path, fix="give a config.json, or a table with model_type")
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError("a config is an object", where=path, fix="give the config.json of a model")
    return found


def write_model(folder: Path, config: Mapping[str, Any], tokenizer: str, *, context: int) -> None:
    """config.json, tokenizer.json and tokenizer_config.json of a causal model that has yet to be trained.

    The vocabulary is the tokenizer's, whatever the config says, and there are `context` positions unless it says.
    Raises `InputError` for a type of model that transformers does not have, and for numbers that do not fit together.
    """
    from tokenizers import Tokenizer

    about = {k: v for k, v in config.items() if k not in ("architectures", "auto_map", "transformers_version")}
    kind = about.pop("model_type", None)
    transformers = library("transformers")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in known:
        raise InputError(
            f"model_type = {kind!r} is no causal model of transformers", where="task.config",
            fix="for example config = {model_type = 'llama', hidden_size = 128, num_hidden_layers = 2, ...}",
        )  # fmt: skip
    about |= {"vocab_size": Tokenizer.from_str(tokenizer).get_vocab_size()}
    about |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    try:
        made = transformers.AutoConfig.for_model(kind, **about)
        if not any(k in about for k in ("max_position_embeddings", made.attribute_map.get("max_position_embeddings"))):
            made.max_position_embeddings = max(context, 1)
        made.architectures = [known[kind]]
        text = json.dumps(made.to_dict(), indent=2, sort_keys=True, default=str)
    except InputError:
        raise
    except Exception as error:  # each config checks itself in its own way
        raise InputError(
            "transformers refuses this config", where="task.config", why=first_line(error), fix="mend the numbers"
        ) from error
    write_text(folder / "config.json", text + "\n")
    write_text(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"})


def write_weights(folder: Path, source: Path, params: Params) -> None:
    """The model of `source` with these weights, in `folder`: any program that reads such folders can open it."""
    from safetensors.torch import save_file

    for name in () if folder == source else ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    save_file({n: p.contiguous() for n, p in params.items()}, folder / "model.safetensors", metadata={"format": "pt"})
