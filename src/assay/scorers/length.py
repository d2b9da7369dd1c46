"""Longer first."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from assay.core.method import Batch, Scorer
from assay.numerics.characters import ALNUM, Texts


class Length(Scorer):
    """Number of characters: longer documents are kept.

    Formula: score = characters of the text; words = its words, what white space separates and has a letter or a digit
    Reference: Rae et al. 2021, arXiv:2112.11446, app. A (length as a quality rule)
    Note: no preset, for bounds are a matter of the pool; published: 50 to 100,000 words (Gopher), at least 3 words
        and 6 characters (DataComp's basic filter of captions, Gadre et al. 2023, arXiv:2304.14108)
    """

    unit: ClassVar[str] = "characters"

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("score", "words")

    def score(self, state: Any, batch: Batch) -> Any:
        texts = Texts(batch.column("text"))
        words = texts.chunks.total(texts.united(texts.chunks) & ALNUM != 0)
        return np.column_stack([texts.lengths, words]).astype(np.float64)
