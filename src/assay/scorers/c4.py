"""Rules of C4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from assay.core.method import Batch, Bounds, Scorer
from assay.numerics.bounds import ratio, scored
from assay.numerics.characters import DOT, OPEN, Spans, Texts
from assay.numerics.tokens import sentences, tokens

CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
ENDS = (".", "?", "!", '"', "'")
NOTICES = (
    ("lorem ipsum",), ("javascript",),
    ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"),
)  # fmt: skip
STEMS = ("lorem ipsum", "javascript", "cookie", "terms of use", "privacy policy")
"""What a text with a notice has at least one of."""
LONG_WORD, FEW_WORDS, LONG_LINE = 1000, 3, 200


class C4(Scorer):
    """C4's rules: minus the number broken, and each statistic as a column.

    Formula: a line stays if it ends in one of . ? ! " ' and not in '...', has 3 words and more, none of over 1000
        characters, and neither 'javascript' nor a policy notice; sentences = those of the lines that stay,
        lorem_ipsum and curly_brackets = lines with them; *_any = the same without the rule on ends; kept_lines =
        share that stays, long_lines = lines of 200 characters and more; score = -#{sentences < 5, lorem_ipsum > 0,
        curly_brackets > 0}
    Reference: Raffel et al. 2020, arXiv:1910.10683, sec. 2.2; order of rules as in datatrove; mC4: Xue et al. 2021,
        arXiv:2010.11934
    Note: lines are judged and not removed; the list of bad words is not included; presets: c4, any_end (as FineWeb
        applies it), mc4 (three long lines)
    """

    unit: ClassVar[str] = "minus rules broken"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {
            "c4": {"sentences": (5, None), "lorem_ipsum": (None, 0), "curly_brackets": (None, 0)},
            "any_end": {"sentences_any": (5, None), "lorem_ipsum_any": (None, 0), "curly_brackets_any": (None, 0)},
            "mc4": {"long_lines": (3, None)},
        }

    def columns(self, state: Any) -> tuple[str, ...]:
        rules = (name for bounds in self.presets.values() for name in bounds)
        return ("score", *rules, "kept_lines")

    def score(self, state: Any, batch: Batch) -> Any:
        given = batch.column("text")
        texts = Texts(given)
        lines = texts.stripped(texts.split_lines)
        blanked = [CITATION.sub(_blank, t) if "[" in t else t for t in given]
        cleared = texts if blanked == given else Texts(blanked)
        count = sentences(cleared, tokens(cleared), lines)
        sound, ended = wordy(texts, lines), ends(texts, lines, given)
        found_stems = [[s for s in STEMS if s in low] for low in map(str.lower, given)]
        lorem, script, policy = (containing(texts, lines, given, found_stems, what) for what in NOTICES)
        opened = np.zeros(len(lines.starts), dtype=bool)
        opened[lines.holding(np.flatnonzero(texts.has(OPEN)))] = True
        found: dict[str, np.ndarray] = {}
        for suffix, alive in (("", sound & ended), ("_any", sound)):
            rest = alive & ~script
            kept = rest & ~policy
            found[f"sentences{suffix}"] = lines.total(np.where(kept, count, 0))
            found[f"lorem_ipsum{suffix}"] = lines.total(alive & lorem)
            found[f"curly_brackets{suffix}"] = lines.total(rest & opened)
            found.setdefault("kept_lines", ratio(lines.total(kept), lines.counts))
        found["long_lines"] = texts.lines.total(texts.lines.sizes >= LONG_LINE)
        return scored({name: found[name] for name in self.columns(state)[1:]}, self.presets["c4"])


def _blank(citation: re.Match[str]) -> str:
    """As many blanks, so that all else keeps its place."""
    return " " * len(citation[0])


def wordy(texts: Texts, lines: Spans) -> np.ndarray:
    """Flags: a line has words enough, and none is too long."""
    chunks = texts.chunks
    line = lines.holding(chunks.starts)
    count = np.bincount(line, minlength=len(lines.starts))
    return (count >= FEW_WORDS) & (np.bincount(line[chunks.sizes > LONG_WORD], minlength=len(count)) == 0)


def ends(texts: Texts, lines: Spans, given: list[str]) -> np.ndarray:
    """Flags: a line, its citations taken away, ends with a closing mark and not with three full stops."""
    last = np.maximum(lines.ends - 1, 0)
    code, dot = texts.codes[last], texts.has(DOT)
    three = dot[last] & dot[np.maximum(last - 1, 0)] & dot[np.maximum(last - 2, 0)] & (lines.sizes >= 3)
    good = np.isin(code, [ord(c) for c in ENDS]) & ~three & (lines.sizes > 0)
    for at in np.flatnonzero((code == ord("]")) & (lines.sizes > 0)).tolist():
        line = CITATION.sub("", _text(texts, lines, given, at))
        good[at] = line.endswith(ENDS) and not line.endswith("...")
    return good


def containing(
    texts: Texts, lines: Spans, given: list[str], stems: list[list[str]], phrases: tuple[str, ...]
) -> np.ndarray:
    """Flags: a line has one of these phrases, in any case. `stems`: those of `STEMS` that each text has."""
    flags = np.zeros(len(lines.starts), dtype=bool)
    for k, present in enumerate(stems):
        if any(stem in phrase for stem in present for phrase in phrases):
            for at in range(lines.offsets[k], lines.offsets[k + 1]):
                line = _text(texts, lines, given, at).lower()
                flags[at] = any(p in line for p in phrases)
    return flags


def _text(texts: Texts, lines: Spans, given: list[str], at: int) -> str:
    owner = lines.owners[at]
    start = texts.starts[owner]
    return given[owner][lines.starts[at] - start : lines.ends[at] - start]
