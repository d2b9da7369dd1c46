"""Prompts and completions as token ids: the model reads both, and its loss is that of the completion alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay.core.errors import InputError
from assay.core.pool import Pool
from assay.core.task import Inputs
from assay.train.models import Tokens, write_tokens


def split_to_fit(prompt: list[int], completion: list[int], context: int) -> tuple[list[int], list[int]]:
    """Both, cut to `context` tokens: the completion keeps its beginning, at least half of the context, or all of it;
    the prompt keeps its end, which is nearest to what is predicted.

    >>> split_to_fit([1, 2, 3, 4], [5, 6, 7, 8], 6)
    ([2, 3, 4], [5, 6, 7])
    >>> split_to_fit([1, 2, 3, 4], [5, 6], 5)
    ([2, 3, 4], [5, 6])
    >>> split_to_fit([1], [5, 6, 7, 8], 4)
    ([1], [5, 6, 7])
    """
    completion = completion[: context - min(len(prompt), context // 2)]
    return prompt[max(0, len(prompt) + len(completion) - context) :], completion


def checked(codes: list[list[int]], shard: Pool, vocab: int, what: str) -> list[list[int]]:
    """Raises `InputError` for a text without tokens, or a token that the model has no row for."""
    for row, ids in zip(shard.ids.tolist(), codes, strict=True):
        if not ids:
            raise InputError(f"row {row.decode()!r} has {what}", why="its text is empty", fix="drop such rows")
        if max(ids) >= vocab:
            raise InputError(
                f"the tokenizer gives token {max(ids)}", why=f"the model knows {vocab}",
                fix="use the tokenizer that belongs to the model",
            )  # fmt: skip
    return codes


def write_dialogues(
    path: Path, pool: Pool, tokenizer: Any, template: str, end: list[int], context: int, vocab: int
) -> None:
    """Columns `prompt` and `completion` of a pool as token ids, as `Dialogues` reads them."""
    for column in ("prompt", "completion"):
        if column not in pool.columns:
            raise InputError(
                f"there is no column {column!r}", why="the loss is that of completions, given their prompts",
                fix="name the columns: prompt and completion of [pool] and [target]",
            )  # fmt: skip
    heads: list[int] = []

    def codes(texts: list[str]) -> list[list[int]]:
        return [code.ids for code in tokenizer.encode_batch(texts, add_special_tokens=False)]

    def documents() -> Iterator[list[int]]:
        for shard in pool.shards(2048):
            prompts = codes([template.replace("{prompt}", prompt or "") for prompt in shard.column("prompt")])
            completions = checked(codes(shard.column("completion")), shard, vocab, "nothing to predict")
            for head, tail in zip(prompts, completions, strict=True):
                head, tail = split_to_fit(head, tail + end, context)
                heads.append(len(head))
                yield head + tail

    write_tokens(path, documents(), vocab)
    np.save(path / "prompts.npy", np.array(heads, dtype=np.int64), allow_pickle=False)


class Dialogues(Tokens):
    """As `Tokens`, but the terms of an example are those after its prompt."""

    def __init__(self, path: Path, start: int) -> None:
        super().__init__(path, start)
        self.prompts = np.load(path / "prompts.npy", allow_pickle=False)
        self.sizes = np.diff(self.offsets) - self.prompts

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def inputs(self, rows: np.ndarray) -> Inputs:
        found = super().inputs(rows)
        places = torch.arange(found["mask"].shape[1])
        found["mask"] *= places[None, :] >= torch.from_numpy(self.prompts[rows])[:, None]
        return found
