"""Vectors of texts by any model of transformers."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

from assay.core.errors import InputError
from assay.core.keys import digest, digest_file
from assay.core.method import Batch, Context, Cost, Count, Featurizer, ModelPath


class Encoder(Featurizer):
    """Pooled last hidden states of an encoder or decoder of transformers, scaled to unit length.

    Formula: e_i = h_i / |h_i|, h_i = sum_t a_t h_it / sum_t a_t over a text's tokens, special ones included: a_t = 1
        for pooling = 'mean', t for 'position', 1 at the first token alone for 'first'
    Reference: Reimers & Gurevych 2019, arXiv:1908.10084; by position: Muennighoff 2022, arXiv:2202.08904
    Note: `path` is the directory of a model as save_pretrained writes it, or its id on the hub; safetensors weights
        only. Longer texts are cut at `context` tokens; a special token in a text is plain characters. Which pooling a
        model was trained for, its card says; the model's files are part of the key of what is stored. Needs the extra
        'hf'
    """

    path: ModelPath = ""
    context: Count = 256
    pooling: Literal["mean", "position", "first"] = "mean"
    column: str = "text"

    cost: ClassVar[Cost] = "forward"

    @property
    def uses_models(self) -> bool:
        return False  # a model of its own

    @cached_property
    def _files(self) -> list[tuple[str, str]]:
        """Everything that makes a vector: weights, the form of the model, and how texts become tokens."""
        from assay.train.pretrained import folder_of, tensor_files

        if not self.path:
            return []
        folder = folder_of(self.path, weights=True)
        about = [file for ending in ("json", "txt", "model") for file in folder.glob(f"*.{ending}")]
        return [(file.name, digest_file(file)) for file in [*tensor_files(folder), *sorted(about)]]

    def code(self) -> str:
        # Other weights at the same path are another method, and so is another tokenizer.
        return digest(super().code(), self._files)

    def init(self, context: Context) -> Any:
        from assay.train.encoder import TextEncoder

        if not self.path:
            raise InputError(
                "encoder: no model is named",
                fix="features = {name = 'encoder', path = 'a folder that save_pretrained wrote, or an id on the hub'}",
            )
        made = TextEncoder(path=self.path, context=self.context, pooling=self.pooling, column=self.column)
        assert made.model is not None  # faults show here, and not in the workers
        return made

    def columns(self, state: Any) -> tuple[str, ...]:
        return tuple(f"hidden:{i}" for i in range(state.width))

    def featurize(self, state: Any, batch: Batch) -> Any:
        return state.vectors(batch.column(self.column))
