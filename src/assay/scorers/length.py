"""Longer first."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from assay.core.method import Batch, Scorer


class Length(Scorer):
    """Number of characters: longer documents are kept.

    Formula: s_i = characters of the text
    Reference: Rae et al. 2021, arXiv:2112.11446, app. A (length as a quality rule)
    """

    unit: ClassVar[str] = "characters"

    def score(self, state: Any, batch: Batch) -> Any:
        return np.array([len(text) for text in batch.column("text")], dtype=np.float64)
