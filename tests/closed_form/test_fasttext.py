"""The fastText classifier against likelihood ratios, its own library, and what must leave its scores alone."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

fasttext = pytest.importorskip("fasttext")

from assay.core.errors import InputError  # noqa: E402
from assay.core.keys import shuffled  # noqa: E402
from assay.core.method import Scorer, make  # noqa: E402
from assay.core.pool import Pool  # noqa: E402
from assay.core.run import Run  # noqa: E402
from assay.core.selection import Budget  # noqa: E402
from assay.measure import Measurer  # noqa: E402
from assay.numerics.stats import auc, spearman  # noqa: E402
from assay.scorers.fasttext import GOOD, _Classifier, cleared_memory, line  # noqa: E402
from assay.selectors.cut import Cut  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"name": "fasttext", "bucket": 4000, "dim": 8}
WORDS = [f"w{k}" for k in range(60)]


def unigrams(n: int, shares: np.ndarray, seed: int, length: int = 30) -> list[str]:
    """Texts whose words are independent draws."""
    rng = np.random.default_rng(seed)
    return [" ".join(WORDS[k] for k in rng.choice(len(WORDS), length, p=shares)) for _ in range(n)]


def two_models() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    p, q = rng.dirichlet(np.full(len(WORDS), 3.0)), rng.dirichlet(np.full(len(WORDS), 3.0))
    return p, 0.7 * q + 0.3 * p


def ratio(texts: list[str], p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Mean over words of log p - log q."""
    terms = np.log(p) - np.log(q)
    return np.array([np.mean([terms[int(w[1:])] for w in t.split()]) for t in texts])


def measurer(out: Path, pool: list[str], target: list[str], **options: Any) -> Measurer:
    run = Run.open(out, {"name": "fasttext"})
    run.close()
    return Measurer(run, Pool.from_columns({"text": pool}), Pool.from_columns({"text": target}), **options)


def scored(out: Path, pool: list[str], target: list[str], **fields: Any) -> np.ndarray:
    return measurer(out, pool, target).table(make(Scorer, {**QUICK, **fields})).values


@pytest.fixture(scope="module")
def mixed() -> tuple[list[str], list[str]]:
    """A pool, and positives that are drawn from another unigram model."""
    p, q = two_models()
    return unigrams(1500, q, 1), unigrams(800, p, 2)


def test_t_b1_line_ends_are_spaces(mixed: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """T-b1: the score does not change when newlines become spaces, and a text cannot end its line or be a label."""
    scored(tmp_path, mixed[0][:300], mixed[1][:200])
    (file,) = tmp_path.glob("steps/fasttext-model-*/model.bin")
    model = _Classifier(file, "words", GOOD)
    texts = ["w1 w2 w3", "w1\nw2\nw3\n", "w1 w2 w3 __label__hq", "w1 w2 w3 __ label__hq", "w1 w2 w3 </s> w9 w9 w9"]
    values = model.log_odds(texts)
    assert values[0] == values[1] == model.log_odds(["\nw1 w2\n w3"])[0]
    assert values[2] == values[3] != values[0], "a word, not a label"
    assert abs(values[4] - values[0]) > 1e-3, "what stands after an end mark is read"
    again = pickle.loads(pickle.dumps(model))
    assert "model" not in again.__dict__ and (again.log_odds(texts) == values).all()


def test_t_b2_the_kept_share_holds_on_a_fresh_sample(mixed: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """T-b2: a threshold at the top f of a sample keeps f of other texts of the same pool, within three sd."""
    pool, target = mixed
    fields = {"keep": 0.2, "sample": 750, "seed": 3}
    at = measurer(tmp_path, pool, target)
    method = make(Scorer, {**QUICK, **fields})
    table = at.table(method)
    quantile = table.column("quantile")
    inside = np.zeros(len(pool), dtype=bool)
    inside[shuffled(at.pool.ids, "fasttext", "quantiles", 3)[:750]] = True
    low, _ = method.presets["top"]["quantile"]
    kept = quantile >= low  # type: ignore[operator]
    assert abs(int(kept[inside].sum()) - 150) <= 1, "of the sample itself the share is exact"
    sd = math.sqrt(0.2 * 0.8 * 2 / 750)  # the threshold is an estimate too
    assert abs(kept[~inside].mean() - 0.2) < 3 * sd
    noted = table.meta["notes"]["threshold of fasttext"]
    assert ((table.column("score") > noted["threshold"]) == kept).all()
    assert len(noted["percentiles"]) == 101 and np.all(np.diff(noted["percentiles"]) >= 0)


def test_the_quantile_counts_what_is_strictly_below(tmp_path: Path) -> None:
    """Ties never let more than `keep` through: of a pool with two kinds of text half is below nothing."""
    pool = ["short"] * 50 + ["a much longer text than that"] * 50
    pool = [f"{t}{chr(97 + k % 26)}" for k, t in enumerate(pool)]
    values = scored(tmp_path, pool, ["a much longer text than this"] * 10, features="length", held_out=0.01)
    assert set(np.round(values[:, 1], 6).tolist()) == {0.0, 0.5}


def test_the_share_that_ties_really_leave_is_noted(tmp_path: Path) -> None:
    """Of texts that all have one length the preset keeps none, and a warning says so; of two lengths the better one."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[10:], 6).tolist()) for _ in range(100)]
    at = measurer(tmp_path / "one", texts, [f"{t} " * 8 for t in texts[:40]])
    options = {**QUICK, "features": "length"}
    table = at.table(make(Scorer, options))
    assert not (table.column("quantile") >= 0.9).any()
    assert table.meta["notes"]["threshold of fasttext"]["kept"] == 0
    assert any("the preset 'top' keeps nothing: 100.0% of the pool" in w for w in at.warnings)
    long = [f"{t} " * 8 for t in texts[:6]]
    at = measurer(tmp_path / "two", texts + long, [f"{t} " * 8 for t in texts[10:50]])
    table = at.table(make(Scorer, options))
    noted = table.meta["notes"]["threshold of fasttext"]
    assert noted["kept"] == (table.column("quantile") >= 0.9).mean() == 6 / 106
    assert "keep 5.7% of the pool, where 10.0% was asked for" in noted["detail"] and not at.warnings


def test_t_b3_the_best_are_those_of_the_likelihood_ratio(mixed: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """T-b3, Neyman-Pearson: for two unigram models the order is that of the log-likelihood ratio, Spearman >= .95,
    and so is the set of the top tenth."""
    pool, target = mixed
    p, q = two_models()
    found = scored(tmp_path, pool, target, ngrams=1, epochs=25, lr=0.5)[:, 0]
    truth = ratio(pool, p, q)
    assert spearman(found, truth) >= 0.95
    best = lambda x: set(np.argsort(-x)[:150].tolist())  # noqa: E731
    assert len(best(found) & best(truth)) >= 120


def test_t_b4_exchanged_labels_teach_nothing(mixed: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """T-b4: positives that are a random part of the pool's own kind give an area of one half on new texts."""
    p, q = two_models()
    both = unigrams(600, p, 11) + unigrams(600, q, 12)
    order = np.random.default_rng(0).permutation(1200)
    good, pool = [both[i] for i in order[:600]], [both[i] for i in order[600:]]
    at = measurer(tmp_path, pool, good)
    areas = at.table(make(Scorer, {**QUICK, "held_out": 0.5})).meta["notes"][
        "fasttext beside classifiers that see no word"
    ]["auc"]
    assert abs(areas["words"] - 0.5) < 3 * math.sqrt(1 / 12 * 2 / 300)


def test_the_model_in_one_number_is_the_model(tmp_path: Path) -> None:
    """The vectors, replaced by what they add to the log-odds, give the library's own probabilities; of two labels and
    of more, and whichever label is asked for."""
    for labels in ("ab", "abcd"):
        texts = {c: unigrams(60, np.random.default_rng(ord(c)).dirichlet(np.ones(60)), ord(c)) for c in labels}
        file = tmp_path / f"{labels}.txt"
        file.write_text("".join(f"__label__{c} {t}\n" for c in labels for t in texts[c]))
        with cleared_memory():
            model = fasttext.train_supervised(
                str(file), dim=16, bucket=3000, wordNgrams=2, thread=1, verbose=0, epoch=20
            )
        model.save_model(str(tmp_path / f"{labels}.bin"))
        pool = [t for c in labels for t in texts[c]]
        for c in labels[:2]:
            found = scored(
                tmp_path / f"{labels}{c}", pool, pool[:3], classifier=str(tmp_path / f"{labels}.bin"),
                label=f"__label__{c}",
            )[:, 0]  # fmt: skip
            truth = [dict(zip(*model.predict(t, k=-1), strict=True))[f"__label__{c}"] for t in pool]
            # fastText adds 1e-5 to every probability before its logarithm.
            np.testing.assert_allclose(1 / (1 + np.exp(-found)), np.array(truth), atol=2e-5)
    assert auc(found, np.array([t in texts["b"] for t in pool])) > 0.99


def test_a_quantised_model_is_read_by_its_probabilities(mixed: tuple[list[str], list[str]], tmp_path: Path) -> None:
    pool, target = mixed
    file = tmp_path / "t.txt"
    file.write_text(
        "".join(f"__label__hq {t}\n" for t in target[:600]) + "".join(f"__label__cc {t}\n" for t in pool[:600])
    )
    with cleared_memory():
        model = fasttext.train_supervised(str(file), dim=16, bucket=3000, wordNgrams=2, thread=1, verbose=0, epoch=10)
    model.save_model(str(tmp_path / "whole.bin"))
    model.quantize(thread=1)
    model.save_model(str(tmp_path / "small.bin"))
    whole, small = (
        scored(tmp_path / n, pool[:300], target[:3], classifier=str(tmp_path / f"{n}.bin"))[:, 0]
        for n in ("whole", "small")
    )
    assert spearman(whole, small) > 0.97
    truth = [dict(zip(*model.predict(t, k=-1), strict=True))["__label__hq"] for t in pool[:300]]
    np.testing.assert_allclose(1 / (1 + np.exp(-small)), truth, atol=2e-5)


def test_nulls_see_no_word_and_the_user_is_warned(tmp_path: Path) -> None:
    """Positives that differ from the pool in their length and punctuation alone."""
    p, _ = two_models()
    pool = unigrams(400, p, 1, length=12)
    short = [t + " ! ?" for t in unigrams(200, p, 2, length=5)]
    at = measurer(tmp_path / "form", pool, short)
    areas = at.table(make(Scorer, QUICK)).meta["notes"]["fasttext beside classifiers that see no word"]["auc"]
    assert areas["length"] > 0.95 and areas["punctuation"] > 0.95
    assert any("the form of the positives" in w for w in at.warnings)
    words = ["w1 w2 x", "w3 w4 yy"]
    assert [line(t, "punctuation") for t in words] == ["none", "none"]
    assert line("abc", "length") == line("xyz", "length") != line("abcdefgh", "length")
    other = measurer(tmp_path / "words", pool, unigrams(200, two_models()[1], 3, length=12))
    other.table(make(Scorer, {**QUICK, "epochs": 20}))
    assert not other.warnings


def test_positives_from_a_file_and_the_same_model_twice(mixed: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """The file's texts, not the target, are the good class; the same seed gives the same bytes, another does not; and
    another file at the same path is not taken for the first."""
    pool, target = mixed
    file = tmp_path / "good.jsonl"
    file.write_text("".join(json.dumps({"body": t}) + "\n" for t in target[:300]))
    options = {"positives": str(file), "text": "body"}
    by_file = scored(tmp_path / "1", pool[:500], ["nothing of it"], **options)
    assert by_file.tobytes() == scored(tmp_path / "2", pool[:500], ["nothing of it"], **options).tobytes()
    by_target = scored(tmp_path / "3", pool[:500], target[:300])
    np.testing.assert_allclose(by_file, by_target, atol=1e-6)
    assert (scored(tmp_path / "4", pool[:500], target[:300], seed=1) != by_target).any()
    before = make(Scorer, {**QUICK, **options}).code()
    file.write_text("".join(json.dumps({"body": t}) + "\n" for t in pool[:300]))
    assert make(Scorer, {**QUICK, **options}).code() != before


def test_the_preset_is_a_filter(mixed: tuple[list[str], list[str]], tmp_path: Path) -> None:
    pool, target = mixed
    method = make(Scorer, {**QUICK, "keep": 0.25})
    table = measurer(tmp_path, pool[:400], target[:200]).table(method)
    bounds: Any = dict(method.presets["top"])
    kept = Cut(bounds=bounds).select(table, np.ones(400, dtype=np.int64), Budget(400, "examples"), barred={})
    assert len(kept) == 100 and set(kept.ids.tolist()) == set(
        table.ids[np.argsort(-table.column("score"))[:100]].tolist()
    )


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    pool = ["one text", "two texts", "three texts"]
    (tmp_path / "bad.bin").write_bytes(b"\x80\x04not a model")
    cases = [
        ({"classifier": str(tmp_path / "bad.bin")}, "not a fastText model"),
        ({"classifier": str(tmp_path / "none.bin")}, "no such file"),
        ({"classifier": str(tmp_path / "bad.bin"), "features": "length"}, "is not trained"),
        ({"positives": str(tmp_path / "none.jsonl")}, "none.jsonl"),
    ]
    for k, (fields, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            scored(tmp_path / str(k), pool, pool, **fields)
    with pytest.raises(InputError, match="tells two classes apart"):
        scored(tmp_path / "few", pool, ["alone"])
    good = tmp_path / "t.txt"
    good.write_text("__label__a x y\n__label__b z w\n" * 5)
    with cleared_memory():
        fasttext.train_supervised(str(good), dim=4, thread=1, verbose=0).save_model(str(tmp_path / "ab.bin"))
    with pytest.raises(InputError, match="known: __label__a, __label__b"):
        scored(tmp_path / "label", pool, pool, classifier=str(tmp_path / "ab.bin"))
    cut = (tmp_path / "ab.bin").read_bytes()[:200]
    (tmp_path / "cut.bin").write_bytes(cut)
    with pytest.raises(InputError, match="not whole"):
        scored(tmp_path / "cut", pool, pool, classifier=str(tmp_path / "cut.bin"), label="__label__a")
