"""Line rules of the RefinedWeb type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from assay.core.method import Batch, Bounds, Scorer
from assay.numerics.bounds import ratio, scored
from assay.numerics.characters import ALNUM, ALPHA, DIGIT, UPPER, Texts

COUNTED = "likes shares comments retweets reposts quotes bookmarks upvotes downvotes downloads views followers"
COUNTER = re.compile(rf"\W*\d[\d,.]*[kmb]?\s+(?:{COUNTED.replace(' ', '|')})\W*")
MOST_CAPITAL, MOST_DIGITS, FEW_WORDS = 0.5, 0.999999, 2
LONGEST = 1 + max(map(len, COUNTED.split()))


class Refinedweb(Scorer):
    """How much of a document lies in lines that RefinedWeb's rules would take away; over 5% drops it.

    Formula: removed_words = words in lines that are mostly capitals (over half of all characters), all digits, a
        counter ('3 likes') or of fewer than two words / words, 1 if there are none; capital_lines, digit_lines,
        counter_lines, single_lines = shares of the lines that are not empty; words = all of them; score = -1 if
        removed_words > 0.05, else 0
    Reference: Penedo et al. 2023, arXiv:2306.01116, app. G.2; thresholds as in DCLM, Li et al. 2024, arXiv:2406.11794
    Note: a word is what white space separates and has a letter or a digit; lines are judged and not removed; the
        rules on addresses need the address of a page and are not here
    """

    unit: ClassVar[str] = "minus rules broken"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"refinedweb": {"removed_words": (None, 0.05)}}

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("score", "removed_words", "words", "capital_lines", "digit_lines", "counter_lines", "single_lines")

    def score(self, state: Any, batch: Batch) -> Any:
        given = batch.column("text")
        texts = Texts(given)
        lines, chunks = texts.lines, texts.chunks
        line = lines.holding(chunks.starts)
        words = np.bincount(line[texts.united(chunks) & ALNUM != 0], minlength=len(lines.starts))
        digits = texts.number(lines, DIGIT)
        rules = {
            "capital_lines": texts.number(lines, UPPER) > MOST_CAPITAL * lines.sizes,
            "digit_lines": (digits > MOST_DIGITS * lines.sizes) & (lines.sizes > 0),
            "counter_lines": np.zeros(len(lines.starts), dtype=bool),
            "single_lines": (np.bincount(line, minlength=len(lines.starts)) < FEW_WORDS) & (lines.sizes > 0),
        }
        letters = texts.number(lines, ALPHA)
        for at in np.flatnonzero((digits > 0) & (letters > 0) & (letters <= LONGEST)).tolist():
            start = texts.starts[lines.owners[at]]
            text = given[lines.owners[at]][lines.starts[at] - start : lines.ends[at] - start]
            rules["counter_lines"][at] = COUNTER.fullmatch(text.lower()) is not None
        bad = np.logical_or.reduce(list(rules.values()))
        total, filled = lines.total(words), lines.total(lines.sizes > 0)
        removed = np.where(total > 0, ratio(lines.total(np.where(bad, words, 0)), total), 1.0)
        found = {
            "removed_words": removed,
            "words": total,
            **{name: ratio(lines.total(hit), filled) for name, hit in rules.items()},
        }
        return scored(found, self.presets["refinedweb"])
