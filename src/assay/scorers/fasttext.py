"""A linear classifier of word sequences: what looks like the positives, and unlike the pool, is kept."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from assay.core.errors import InputError, nearest
from assay.core.keys import digest, digest_file, digest_ids, hash_ids, shuffled, uniform, write_json
from assay.core.method import Batch, Bounds, Context, Count, FilePath, Positive, Scorer

Share = Annotated[float, pydantic.Field(gt=0, lt=1)]
Features = Literal["words", "length", "punctuation"]

GOOD, OTHER = "__label__hq", "__label__cc"
# The first four bytes of a model's file, and the newest form that is known.
MAGIC, VERSION = 793712314, 12
# The classifiers of length and of punctuation need little room.
SMALL = {"bucket": 100_000, "dim": 10}
# As close as this to the area of a classifier that sees no word, the words may have taught nothing else.
CLOSE = 0.03
COPY = "copy the file again"
_MARK = re.compile(r"[^\w\s]|_")


class FastText(Scorer):
    """Log-odds that a text is one of the positives and not one of the pool, by a linear classifier of word sequences.

    Formula: s_i = log p(positive | x_i) - log(1 - p(positive | x_i)) = w . mean over words and word n-grams g of E_g;
        quantile_i = share of a keyed sample of the pool with a lower score
    Reference: Li et al. 2024, arXiv:2406.11794 (DCLM); Joulin et al. 2017, arXiv:1607.01759 (fastText)
    Note: positives are the half of the target that selects, or the texts in `positives`; as many keyed draws of the
        pool as `negatives` says stand against them, and the smaller class is repeated until it weighs about as much.
        One thread, lines in a keyed order: the same seed gives the same model. Text is read alike everywhere: line ends
        become spaces, and words that fastText would take for a label or for the end of the line are broken; case and
        punctuation stay. `classifier` is a fastText model to apply instead of training one, `label` its good class. The
        preset keeps the best `keep` of the pool by the column `quantile`; the threshold and the pool's distribution are
        noted, for both belong to this model on this pool: to take a published threshold, bound `score`. Texts of one
        score stand or fall together; the share really kept is noted. Departure: quantiles are of `sample` texts, fewer
        than the million that a pool of a web crawl deserves; at 200,000 a tenth is known to 0.07 percentage points. The
        log-odds rank; they are no calibrated probability. features = 'length' and 'punctuation' are nulls that see no
        word: their areas on texts held out are noted beside the classifier's
    """

    positives: FilePath = ""
    text: str = "text"
    classifier: FilePath = ""
    label: str = GOOD
    features: Features = "words"
    negatives: Count = 10_000
    ngrams: Count = 2
    dim: Count = 100
    epochs: Count = 5
    lr: Positive = 0.1
    bucket: Count = 2_000_000
    held_out: Share = 0.1
    keep: Share = 0.1
    sample: Count = 200_000
    seed: int = 0

    unit: ClassVar[str] = "log-odds"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"top": {"quantile": (1 - self.keep, None)}}

    def code(self) -> str:
        """As of any method, and of the files that the options name."""
        named = [self._source()[1]] if self.positives else []
        named += [digest_file(_existing(self.classifier))] if self.classifier else []
        return digest(Scorer.code(self), *named) if named else Scorer.code(self)

    def columns(self, state: Any) -> tuple[str, ...]:
        return "score", "quantile"

    def init(self, context: Context) -> _Classifier:
        if self.classifier and (self.positives or self.features != "words"):
            raise InputError(
                "fasttext: a classifier that is given is not trained",
                why=f"positives = {self.positives!r}, features = {self.features!r}", fix="leave both out",
            )  # fmt: skip
        model = self._applied(context) if self.classifier else self._trained(context)
        pool = context.pool
        rows = np.sort(shuffled(pool.ids, "fasttext", "quantiles", self.seed)[: self.sample])
        options = {k: v for k, v in self.spec().items() if k != "keep"}
        key = options, self.code(), model.file.parent.name, pool.fingerprint

        def build(part: Path) -> None:
            found = [model.log_odds(shard.column("text")) for shard in pool.at(rows).shards(4096)]
            np.save(part / "sorted.npy", np.sort(np.concatenate(found)), allow_pickle=False)

        state = _Classifier(model.file, self.features, model.label, context.kept("quantiles", key, build))
        known = state.sorted
        percentiles = known[np.minimum(np.arange(101) * len(known) // 100, len(known) - 1)]
        threshold = float(known[math.ceil((1 - self.keep) * len(known)) - 1])
        p = 1 / (1 + math.exp(-threshold))
        kept = float((_below(known, known) >= 1 - self.keep).mean())
        context.note(
            "threshold of fasttext",
            f"log-odds above {threshold:.4f} (probability {p:.4f}) keep {kept:.1%} of the pool, where {self.keep:.1%} "
            f"was asked for, by {len(known)} of its texts", threshold=threshold, kept=kept,
            percentiles=percentiles.tolist(),
        )  # fmt: skip
        if not kept:
            context.warn(
                f"fasttext: the preset 'top' keeps nothing: {(known == threshold).mean():.1%} of the pool share one "
                f"score, the highest; bound `score` at {threshold:.4f} to keep them"
            )
        return state

    def score(self, state: _Classifier, batch: Batch) -> Any:
        found = state.log_odds(batch.column("text"))
        return np.stack([found, _below(state.sorted, found)], axis=1)

    # A classifier that is given.

    def _applied(self, context: Context) -> _Classifier:
        file = _existing(self.classifier)
        key = digest_file(file), self.label

        def build(part: Path) -> None:
            model = _open(file)
            if self.label not in model.labels:
                raise InputError(
                    f"the classifier has no label {self.label!r}", where=file, fix=nearest(self.label, model.labels)
                )
            _collapse(model, self.label)
            model.save_model(str(part / "model.bin"))

        return _Classifier(context.kept("model", key, build) / "model.bin", "words", self.label)

    # One that is trained.

    def _trained(self, context: Context) -> _Classifier:
        good, source = self._positives(context)
        free = np.flatnonzero(~np.isin(context.pool.ids, context.barred))
        rows = np.sort(free[shuffled(context.pool.ids[free], "fasttext", "negatives", self.seed)[: self.negatives]])
        if len(good) < 2 or len(rows) < 2:
            raise InputError(
                f"fasttext: {len(good)} positives against {len(rows)} texts of the pool", where="fasttext",
                why="a classifier tells two classes apart", fix="give at least two of each",
            )  # fmt: skip
        names = ("features", "ngrams", "dim", "epochs", "lr", "bucket", "held_out", "seed")
        key = {n: getattr(self, n) for n in names}, source, digest_ids(context.pool.ids[rows]), context.pool.fingerprint

        def build(part: Path) -> None:
            other = [t for shard in context.pool.at(rows).shards(4096) for t in shard.column("text")]
            self._train(part, good, other)

        path = context.kept("model", key, build)
        self._compare(context, json.loads((path / "about.json").read_text()))
        return _Classifier(path / "model.bin", self.features, GOOD)

    def _source(self) -> tuple[Any, str]:
        """The file of positives, and the hash of what it says."""
        from assay.data import readers

        source = readers.Source(paths=self.positives, text=self.text)
        return source, readers.fingerprint(source)

    def _positives(self, context: Context) -> tuple[list[str], str]:
        """Texts of the good class, and what they are known by."""
        from assay.data import readers

        if not self.positives:
            return context.target.column("text"), context.target.fingerprint
        source, known = self._source()
        texts: list[str] = []
        refused = 0
        for rows, rejected in readers.read(source):
            texts += rows["text"].to_pylist()
            refused += len(rejected)
        if refused:
            context.warn(f"fasttext: {refused} rows of {self.positives} have no text that can be used")
        return texts, known

    def _train(self, part: Path, good: list[str], other: list[str]) -> None:
        """Leave the model, and what is known of it by texts that it was not trained on."""
        from assay.numerics.stats import auc

        sides = [self._split(texts) for texts in (good, other)]
        seen, unseen = [s for s, _ in sides], [u for _, u in sides]
        asked = [t for texts in unseen for t in texts]
        truth = np.arange(len(asked)) < len(unseen[0])
        areas: dict[str, float | None] = {}
        for features in dict.fromkeys((self.features, "length", "punctuation")):
            file = part / ("model.bin" if features == self.features else f"{features}.bin")
            self._fit(file, seen, features)
            known = bool(len(unseen[0]) and len(unseen[1]))
            areas[features] = auc(_Classifier(file, features, GOOD).log_odds(asked), truth) if known else None
            if file.name != "model.bin":
                file.unlink()
        counts = {"positives": len(good), "negatives": len(other), "held_out": [len(u) for u in unseen]}
        write_json(part / "about.json", {**counts, "auc": areas})

    def _split(self, texts: list[str]) -> tuple[list[str], list[str]]:
        """Texts to train on and texts held out: copies of a text are on one side."""
        out = uniform([t.encode() for t in texts], "fasttext", "held out", self.seed) < self.held_out
        kept = [[t for t, o in zip(texts, out, strict=True) if bool(o) is side] for side in (False, True)]
        return (texts, []) if len(kept[0]) < 2 else (kept[0], kept[1])

    def _fit(self, file: Path, sides: list[list[str]], features: Features) -> None:
        library, lines = _library(), file.with_suffix(".txt")
        most = max(map(len, sides))
        entries = []
        for label, texts in zip((GOOD, OTHER), sides, strict=True):
            raw = [t.encode() for t in texts]
            for copy in range(max(1, round(most / len(texts)))):
                keys = hash_ids(raw, "fasttext", "order", label, copy, self.seed).tolist()
                entries += [(k, f"{label} {line(t, features)}\n") for k, t in zip(keys, texts, strict=True)]
        entries.sort()
        lines.write_text("".join(entry for _, entry in entries), encoding="utf-8", newline="\n")
        size = {"bucket": self.bucket, "dim": self.dim}
        if features != "words":
            size = {k: min(v, SMALL[k]) for k, v in size.items()}
        try:
            with cleared_memory():
                model = library.train_supervised(
                    str(lines), wordNgrams=self.ngrams, epoch=self.epochs, lr=self.lr, minCount=1, loss="softmax",
                    thread=1, seed=self.seed % 2**31, verbose=0, **size,
                )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise InputError(
                "fastText could not be trained",
                where="fasttext",
                why=str(error),
                fix="lower lr, or give more positives",
            ) from error
        finally:
            lines.unlink()
        _collapse(model, GOOD)
        model.save_model(str(file))

    def _compare(self, context: Context, about: dict[str, Any]) -> None:
        """Note how well the classifier does on what it has not seen, beside those that see no word."""
        areas = {name: area for name, area in about["auc"].items() if area is not None}
        said = ", ".join(f"{name} {area:.3f}" for name, area in areas.items()) or "too few texts to hold any out"
        null = max((area for name, area in areas.items() if name != "words"), default=0.0)
        learned = areas["words"] >= null + CLOSE if self.features == "words" and areas else None
        context.note(
            "fasttext beside classifiers that see no word",
            f"area under the curve on texts held out: {said} ({about['positives']} positives, "
            f"{about['negatives']} of the pool)", ok=learned, **about,
        )  # fmt: skip
        if learned is False:
            context.warn(
                f"fasttext: words tell positives from the pool hardly better than length or punctuation do ({said}): "
                "the classifier may have learned the form of the positives"
            )


def _below(known: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The share of `known`, in order, that is strictly lower than each score."""
    return np.searchsorted(known, scores, side="left") / len(known)


@dataclass(frozen=True)
class _Classifier:
    """A model in a file, and the pool's scores in order beside it; both are opened where they are needed."""

    file: Path
    features: Features
    label: str
    quantiles: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: self.__dict__[k] for k in ("file", "features", "label", "quantiles")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def model(self) -> Any:
        return _open(self.file)

    @cached_property
    def sorted(self) -> np.ndarray:
        assert self.quantiles is not None
        return np.load(self.quantiles / "sorted.npy", allow_pickle=False)

    def log_odds(self, texts: list[str]) -> np.ndarray:
        """log p - log(1 - p) of the label, `[n]` float64."""
        lines = [line(t, self.features) + "\n" for t in texts]
        model, index = self.model, self.model.labels.index(self.label)
        width, labels = model.get_dimension(), len(model.labels)
        if not _is_collapsed(model):
            found = [dict((name, p) for p, name in model.f.predict(x, -1, 0.0, "replace")) for x in lines]
            p = np.clip([f.get(self.label, 0.0) for f in found], 1e-5, 1 - 1e-5)
            return np.log(p) - np.log1p(-p)
        vector = _library("fasttext_pybind").Vector(width)
        read, view = model.f.getSentenceVector, np.asarray(vector)
        out = np.empty((len(lines), width))
        for row, x in enumerate(lines):
            read(vector, x)
            out[row] = view
        if width == 1:
            return out[:, 0] if index == int(np.argmax(_output(model)[:, 0])) else -out[:, 0]
        if _loss(model) != "softmax" or labels == 1:
            return out[:, index]
        rest = np.delete(out, index, axis=1)
        top = rest.max(axis=1)
        return out[:, index] - top - np.log(np.exp(rest - top[:, None]).sum(axis=1))


def line(text: str, features: Features = "words") -> str:
    """A text as the classifier reads it, without its line end.

    >>> line("One\\ntwo </s> __label__x"), line("One, two!", "punctuation"), line("One, two!", "length")
    ('One two < /s> __ label__x', ', !', 'c13')
    """
    if features == "length":
        return f"c{int(4 * math.log2(len(text) + 1))}"
    if features == "punctuation":
        return " ".join(_MARK.findall(text)) or "none"
    if "__label__" in text:
        text = text.replace("__label__", "__ label__")
    if "</s>" in text:
        text = text.replace("</s>", "< /s>")
    return text.replace("\n", " ")


# <malloc.h>
M_PERTURB = -6


@contextlib.contextmanager
def cleared_memory() -> Iterator[None]:
    """Have glibc hand out memory full of zeros. Elsewhere nothing happens.

    On one thread fastText draws only the first tenth of its vectors and trains the others from whatever stood in memory
    before: not the same twice, and at times NaN.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, another C library
        mallopt = lambda option, value: None  # noqa: E731
    mallopt(M_PERTURB, 0xFF)  # what is filled in is the complement
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)


def _library(name: str = "fasttext") -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            "fasttext needs the package 'fasttext-numpy2-wheel'", why=str(error), fix="pip install 'assay-data[text]'"
        ) from error


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise InputError("no such file", where=path, fix="give the path of a fastText model, a *.bin")
    return Path(path)


def _open(file: Path) -> Any:
    """A fastText model. The file holds numbers and words, no code; a damaged one is refused."""
    head = np.fromfile(file, dtype="<i4", count=2)
    if len(head) < 2 or head[0] != MAGIC or head[1] > VERSION:
        raise InputError("not a fastText model", where=file, fix="give a *.bin that fastText wrote")
    try:
        model = _library().FastText._FastText(str(file))
    except (RuntimeError, ValueError, MemoryError) as error:
        raise InputError("this fastText model cannot be read", where=file, why=str(error), fix=COPY) from error
    if not model.is_quantized():
        # The library reads on past the end of a file that was cut short.
        out = _output(model)
        last = np.fromfile(file, dtype="<f4", count=-1, offset=max(0, file.stat().st_size - out.nbytes))
        if out.shape != (len(model.labels), model.get_dimension()) or not np.array_equal(last, out.ravel()):
            raise InputError("this fastText model is not whole", where=file, why="its end is missing", fix=COPY)
    return model


def _loss(model: Any) -> str:
    return model.f.getArgs().loss.name


def _output(model: Any) -> np.ndarray:
    return np.asarray(model.f.getOutputMatrix())


def _is_collapsed(model: Any) -> bool:
    """Whether the vector of a text is its logits, or for two classes the first's log-odds."""
    if model.is_quantized() or _loss(model) == "hs":
        return False
    out, labels = _output(model), len(model.labels)
    return np.array_equal(out, np.eye(labels)) or (out.shape == (2, 1) and np.array_equal(np.sort(out[:, 0]), [0, 1]))


def _collapse(model: Any, label: str) -> None:
    """Replace the model's vectors by what they add to the logits: the same classifier, exactly, from the mean of fewer
    numbers. Of two classes one number is left, the log-odds. Quantised and tree models stay as they are."""
    if model.is_quantized() or _loss(model) == "hs":
        return
    vectors, out, labels = np.asarray(model.f.getInputMatrix()), _output(model), len(model.labels)
    if labels == 2 and _loss(model) == "softmax":
        sign = np.array([[1.0], [0.0]] if model.labels[0] == label else [[0.0], [1.0]], dtype=np.float32)
        good = int(np.argmax(sign))
        model.set_matrices(np.ascontiguousarray((vectors @ (out[good] - out[1 - good]))[:, None]), sign)
    elif labels <= 4 * model.get_dimension():
        model.set_matrices(vectors @ out.T, np.eye(labels, dtype=np.float32))
