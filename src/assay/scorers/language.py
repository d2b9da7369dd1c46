"""Is it written in the languages that are wanted?"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from assay.core.errors import InputError, nearest
from assay.core.method import Batch, Bounds, Context, Count, Scorer

PIECES = 3
"""A long text is read at its beginning, middle and end, so that a heading alone does not decide."""


@dataclass(frozen=True)
class Model:
    """py3langid's automaton, which turns bytes into features, and its table of features by class."""

    rows: np.ndarray
    moves: np.ndarray
    found: np.ndarray
    table: np.ndarray
    prior: np.ndarray
    classes: tuple[str, ...]


@functools.cache
def _model() -> Model:
    """Read once in each process: it is the same for all."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise InputError(
            "language needs py3langid", why=f"it cannot be imported: {error}", fix="pip install 'assay-data[text]'"
        ) from error
    made = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return Model(
        np.asarray(made.tk_row, dtype=np.int64) << 8, np.asarray(made.tk_nextmove), np.asarray(made.tk_output),
        made.nb_ptc, np.asarray(made.nb_pc, dtype=np.float64), tuple(made.nb_classes),
    )  # fmt: skip


class Language(Scorer):
    """Probability that a text is in one of the wanted languages.

    Formula: score = sum over wanted l of softmax_l(z / sqrt(bytes)), z_l = log prior_l + sum_f log(1 + count_f) log
        p(f|l) over byte sequences f; best = 1 if the most probable language is wanted, else 0
    Reference: Lui & Baldwin 2012, aclanthology.org/P12-3005 (langid.py); model and scale of py3langid (Barbaresi)
    Note: at most `characters` are read, in three pieces from beginning, middle and end, white space as single blanks.
        Presets: best asks that the most probable language is a wanted one, as DataComp does; fineweb asks for more
        than 0.65, which FineWeb and DCLM ask of another model: probabilities are not calibrated, so the number means
        something else here. Short texts, names, code and numbers are told badly
    """

    languages: tuple[str, ...] = ("en",)
    characters: Count = 240

    unit: ClassVar[str] = "probability"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"best": {"best": (1.0, None)}, "fineweb": {"score": (float(np.nextafter(0.65, 1)), None)}}

    def init(self, context: Context) -> Any:
        known = set(_model().classes)
        for language in self.languages:
            if language not in known:
                raise InputError(f"language: {language!r} is not known", fix=nearest(language, known))
        if not self.languages:
            raise InputError("language: no language is wanted", fix="name one, such as languages = ['en']")

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("score", "best")

    def score(self, state: Any, batch: Batch) -> Any:
        pieces = [sample(text, self.characters) for text in batch.column("text")]
        model = _model()
        z = evidence(model, pieces) / np.sqrt([[max(len(p), 1)] for p in pieces])
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        names = sorted(set(model.classes))
        # Some languages have two classes, for two scripts.
        merged = np.stack([p[:, [c == name for c in model.classes]].sum(axis=1) for name in names], axis=1)
        wanted = np.isin(names, self.languages)
        return np.column_stack([merged[:, wanted].sum(axis=1), wanted[merged.argmax(axis=1)]])


def sample(text: str, characters: int) -> bytes:
    """The part that is read, as py3langid is given it: NFC, in lower case if all of it is in capitals.

    >>> sample("one\\n two", 240)
    b'one two'
    """
    if len(text) > characters:
        size = max(characters // PIECES, 1)
        last = len(text) - size
        text = " ".join(text[last * k // (PIECES - 1) :][:size] for k in range(PIECES))
    text = " ".join(text.split())
    text = text.lower() if text.isupper() else text
    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    return text.encode("utf-8", "surrogatepass")


def evidence(model: Model, pieces: list[bytes]) -> np.ndarray:
    """z `[texts, classes]`. Texts walk the automaton side by side; each sum is in the order of its features."""
    from scipy.sparse import csr_matrix

    sizes = np.array([len(p) for p in pieces], dtype=np.int64)
    longest = int(sizes.max(initial=0))
    letters = np.zeros((len(pieces), longest), dtype=np.uint8)
    letters[np.arange(longest) < sizes[:, None]] = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    seen = np.full((longest, len(pieces)), -1, dtype=np.int32)
    states = np.zeros(len(pieces), dtype=np.int64)
    # The longest come first, so those still walking are a slice.
    order = np.argsort(-sizes, kind="stable")
    columns = np.ascontiguousarray(letters[order].T)
    walking = np.searchsorted(-sizes[order], -np.arange(longest), side="left")
    for k, count in enumerate(walking.tolist()):
        states = model.moves[model.rows[states[:count]] + columns[k, :count]]
        seen[k, :count] = model.found[states]
    places, texts = np.nonzero(seen >= 0)
    width = len(model.found) + 1
    keys, counts = np.unique(order[texts] * width + seen[places, texts], return_counts=True)
    rows, features = np.divmod(keys, width)
    place = np.zeros(width, dtype=np.int32)
    place[features] = 1
    used = np.flatnonzero(place)
    place[used] = np.arange(len(used))
    offsets = np.searchsorted(rows, np.arange(len(pieces) + 1))
    logs = np.log1p(counts.astype(np.float32))
    weights = csr_matrix((logs, place[features], offsets), shape=(len(pieces), len(used)))
    known = (weights @ model.table[used].astype(np.float32)).astype(np.float64)
    # Nothing found says nothing: all classes alike, as py3langid has it.
    return np.where(np.diff(offsets)[:, None] > 0, model.prior + known, 0.0)
