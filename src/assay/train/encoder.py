"""Texts to vectors by a model of transformers that is not the study's own: tokenised, run and pooled without training.

The model is a directory as `save_pretrained` writes it, or the id of one on the hub. Weights by safetensors only; no
code from the directory is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from assay.core.errors import InputError
from assay.core.keys import hash_ids
from assay.core.pool import Pool
from assay.train.loop import blocks
from assay.train.pretrained import config_of, first_line, folder_of, library, quiet, tensor_files

Pooling = Literal["mean", "position", "first"]
# Padded tokens of one pass, and texts that stand for a pool where its work is counted.
AREA, SAMPLE = 4096, 256


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A picklable value: each process opens the model when it first needs it."""

    path: str
    context: int
    """Longest input, in tokens, special ones included; longer texts are cut at the end."""
    pooling: Pooling
    column: str = "text"

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def folder(self) -> Path:
        folder = folder_of(self.path, weights=True)
        if not (folder / "config.json").exists():
            raise InputError("no config.json here", where=folder, fix="give the folder that save_pretrained wrote")
        return folder

    @cached_property
    def config(self) -> Any:
        config = config_of(self.folder, self.context)
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(
                f"a {config.model_type} model has an encoder and a decoder", where=self.folder,
                why="it has no hidden states of a text alone", fix="give an encoder, such as BERT, or a decoder",
            )  # fmt: skip
        return config

    @property
    def width(self) -> int:
        return self.config.get_text_config().hidden_size

    @cached_property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer` with the special tokens of its own post-processor, that cuts at `context`. A special
        token that stands in a text is plain characters."""
        try:
            fast = library("transformers").AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            tokenizer = fast.backend_tokenizer
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                "no fast tokenizer here", where=self.folder, why=first_line(error),
                fix="write it with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)",
            ) from error  # fmt: skip
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.context)
        return tokenizer

    @cached_property
    def model(self) -> Any:
        """The model in evaluation mode, float32. Raises `InputError` for weights that do not cover what it reads."""
        tensor_files(self.folder)
        with quiet():
            try:
                model, told = library("transformers").AutoModel.from_pretrained(
                    self.folder, config=self.config, dtype=torch.float32, use_safetensors=True,
                    trust_remote_code=False, output_loading_info=True,
                )  # fmt: skip
            except Exception as error:  # safetensors and transformers raise many types
                raise InputError(
                    "the weights cannot be loaded", where=self.folder, why=first_line(error),
                    fix="copy the folder again; config.json and the *.safetensors files must belong together",
                ) from error  # fmt: skip
        # Heads on top of the hidden states are not read here.
        lacking = sorted(n for n in told["missing_keys"] if not n.startswith("pooler."))
        if lacking:
            raise InputError(
                f"{len(lacking)} parameters are not among the weights, the first is {lacking[0]!r}",
                where=self.folder, fix="give the folder that save_pretrained wrote",
            )  # fmt: skip
        return model.eval().requires_grad_(False)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """`[n, width]` float32 of length 1; zero where a text has no token."""
        codes = [code.ids for code in self.tokenizer.encode_batch(list(texts))]
        lengths = np.array([len(ids) for ids in codes])
        found = np.zeros((len(codes), self.width), dtype=np.float32)
        filled = np.flatnonzero(lengths)
        for block in blocks(lengths[filled], AREA) if len(filled) else []:
            rows = filled[block]
            found[rows] = self._pass([codes[row] for row in rows.tolist()]).numpy()
        return found

    @torch.inference_mode()
    def _pass(self, codes: list[list[int]]) -> Tensor:
        longest, vocab = max(map(len, codes)), self.config.get_text_config().vocab_size
        tokens, mask = torch.zeros(len(codes), longest, dtype=torch.int64), torch.zeros(len(codes), longest)
        for row, ids in enumerate(codes):
            tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1.0
        if int(tokens.max()) >= vocab:
            raise InputError(
                f"the tokenizer gives token {int(tokens.max())}", where=self.folder,
                why=f"the model knows {vocab}", fix="take both from the same model",
            )  # fmt: skip
        given = {"input_ids": tokens, "attention_mask": mask.to(torch.int64)}
        hidden = self.model(**given).last_hidden_state
        weights = {"mean": mask, "position": mask.cumsum(dim=1) * mask, "first": torch.eye(1, longest)}[self.pooling]
        mean = (hidden * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
        return mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def flops(self, pool: Pool) -> float:
        """Of a pass over a pool, by the lengths of a keyed sample of it: 2 x (weights of matrices) a token, and
        4 x width x layers x length a token for attention."""
        some = pool.at(np.argsort(hash_ids(pool.ids, "sample"), kind="stable")[:SAMPLE])
        t = np.array(
            [len(code.ids) for code in self.tokenizer.encode_batch(some.column(self.column))], dtype=np.float64
        )
        named = self.model.named_parameters()
        matrices = sum(p.numel() for n, p in named if p.dim() >= 2 and "embed" not in n and "pooler" not in n)
        layers = self.config.get_text_config().num_hidden_layers
        return float((2 * matrices * t + 4 * self.width * layers * t * t).mean()) * len(pool)
