"""The documents and the model on which gradient features are timed: made from nothing, the same on every machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

VOCAB, LENGTH = 4096, 96
TEXTS = 4000  # rows of the built-in pool; the tokenizer is trained on all of them


@dataclass(frozen=True)
class World:
    """`model` is a directory in the form of `transformers`; `documents` a file of JSON lines with id and text."""

    case: str
    model: Path
    documents: Path
    lengths: tuple[int, ...]  # tokens of each document, LENGTH at most

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def world(folder: Path, documents: int, layers: int = 4, width: int = 128) -> World:
    """A Llama of seeded random weights and `documents` documents of real text, in `folder`.

    Document i is text i of the built-in pool and one other, a different one in every round through the pool. It is
    cut *before* it is written, at the last word that ends within LENGTH tokens, so that no tool's way of truncating
    matters: a word boundary is one of the tokenizer too, and all tools see the same tokens.
    """
    from assay.core.pool import Pool
    from assay.data import builtin
    from assay.train.models import train_tokenizer

    columns = builtin.python_text(target="docs", size=TEXTS, seed=0).pool
    tokenizer = train_tokenizer(Pool.from_columns(columns), vocab=VOCAB)
    texts, lengths = _cut(tokenizer, _joined(columns.column("text").to_pylist(), documents))
    place = World(f"llama-w{width}-l{layers}", folder / "model", folder / "documents.jsonl", tuple(lengths))
    folder.mkdir(parents=True, exist_ok=True)
    with open(place.documents, "w", encoding="utf-8") as file:
        for index, text in enumerate(texts):
            file.write(json.dumps({"id": f"d{index:06d}", "text": text}) + "\n")
    _save(place.model, tokenizer, layers, width)
    return place


def _joined(texts: list[str], documents: int) -> list[str]:
    n = len(texts)
    return [f"{texts[i % n]}\n{texts[(i + 1 + i // n) % n]}" for i in range(documents)]


def _cut(tokenizer: str, texts: list[str]) -> tuple[list[str], list[int]]:
    """The texts, each without its words past LENGTH tokens, and their numbers of tokens."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_str(tokenizer)
    cut = []
    for text, code in zip(texts, reader.encode_batch(texts), strict=True):
        if len(code) > LENGTH:
            word = code.word_ids.index(code.word_ids[LENGTH])  # the first token of the word that does not fit
            text = text[: code.offsets[word][0]]
        cut.append(text)
    return cut, [len(code) for code in reader.encode_batch(cut)]


def _save(model: Path, tokenizer: str, layers: int, width: int) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Positions far beyond LENGTH: bergson takes no batch of more tokens than the model has positions.
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=344 * width // 128, num_hidden_layers=layers,
        num_attention_heads=max(width // 32, 1), max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(model)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer), eos_token="<|end|>", pad_token="<|end|>", model_max_length=4096
    )
    fast.save_pretrained(model)
