"""FineWeb's own rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from assay.core.method import Batch, Bounds, Scorer
from assay.numerics import repeats
from assay.numerics.bounds import ratio, scored
from assay.numerics.characters import STOP, Texts
from assay.numerics.tokens import tokens

SHORT = 30


class Fineweb(Scorer):
    """FineWeb's four rules on lines: minus the number broken, and each statistic as a column.

    Formula: score = -#{columns outside their bounds}; over the lines that are not blank: ended_lines = share that end
        with a sentence mark, short_lines = share of at most 30 characters, dup_line_chars = characters of copies
        after the first / characters without newlines; newlines = newlines / words
    Reference: Penedo et al. 2024, arXiv:2406.17557, sec. 3.6; thresholds as in datatrove
    Note: FineWeb takes these after C4's rules have removed lines; here nothing is removed. A closing quote after the
        mark does not end a line
    """

    unit: ClassVar[str] = "minus rules broken"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {
            "fineweb": {
                "ended_lines": (0.12, None), "short_lines": (None, 0.67), "dup_line_chars": (None, 0.01),
                "newlines": (None, 0.3),
            }
        }  # fmt: skip

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("score", *self.presets["fineweb"])

    def score(self, state: Any, batch: Batch) -> Any:
        texts = Texts(batch.column("text"))
        breaks = texts.lines.counts - 1
        lines = texts.lines.only(texts.stripped(texts.lines).sizes > 0)
        ended = texts.has(STOP)[np.maximum(lines.ends - 1, 0)]
        _, copied = repeats.copies(lines, texts.hashes(lines), every=False)
        found = {
            "ended_lines": ratio(lines.total(ended), lines.counts),
            "short_lines": ratio(lines.total(lines.sizes <= SHORT), lines.counts),
            "dup_line_chars": ratio(copied, texts.lengths - breaks),
            "newlines": ratio(breaks, tokens(texts).counts),
        }
        return scored(found, self.presets["fineweb"])
