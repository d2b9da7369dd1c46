"""What the scripts of this folder share. They run in the peers' environment, so nothing of assay is imported."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments(about: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", type=Path)
    parser.add_argument("documents", type=Path)
    parser.add_argument("out", type=Path, help="folder for features.npy: a row a document, in the file's order")
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="documents a batch")
    return parser.parse_args()


def read(model: Path, documents: Path, attention: str) -> tuple[Any, list[list[int]]]:
    """The model, and the tokens of each document."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(documents, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokens = tokenizer(texts)["input_ids"]
    return AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).eval(), tokens


def linear(model: torch.nn.Module) -> list[str]:
    """The linear layers without the head, which bergson leaves out too."""
    found = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    return [name for name in found if name != "lm_head"]


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [batch, longest]; a label past the end is -100. Attention is causal: no mask is needed."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=0)
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)
    return tokens, labels
