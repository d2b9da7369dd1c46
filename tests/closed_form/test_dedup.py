"""Exact, near and partial copies against plain Python: T-a1 to T-a7, and what is beneath them."""

from __future__ import annotations

import itertools
import math
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from assay.core import spill
from assay.core.errors import InputError
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.spill import Spill
from assay.engine import local
from assay.measure import Measurer
from assay.numerics.bloom import Bloom, shape
from assay.numerics.shingles import Reader, sequences, whole
from assay.scorers import exact_dup, minhash, paragraph_dup
from assay.scorers.minhash import MinHash, band_keys, curve, signatures

pytestmark = pytest.mark.usefixtures("one_thread")
SPACES = " \t\n\x1c\x0b\u00a0\u2003"


def table(out: Path, spec: Any, pool: Pool, shard: int = 64, **options: Any) -> Any:
    """The Table of a scorer, made as a run makes it."""
    run = Run.open(out, {})
    run.close()
    return Measurer(run, pool, Pool.from_columns({"text": ["?"]}), shard=shard, **options).table(make(Scorer, spec))


def by_id(found: Any, column: str = "score") -> dict[str, float]:
    return dict(zip([i.decode() for i in found.ids.tolist()], found.column(column).tolist(), strict=True))


def plain_words(text: str, digits: bool = False) -> list[str]:
    """The words of a text, one character at a time."""
    out = ""
    for c in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(c)
        digit = str(unicodedata.digit(c, "")) if digits else "0"
        out += "" if kind in ("Mn", "Me") else digit if kind == "Nd" else c if kind[0] in "LMN" else " "
    return out.split()


def word(number: int) -> str:
    """A word for each number; letters, since all digits are one."""
    return "w" + "".join(chr(97 + int(d)) for d in str(number))


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = plain_words(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} or ({tuple(words)} if words else set())


def edited(seed: int, originals: int = 60, copies: int = 5, words: int = 60) -> Pool:
    """Families of texts: each member has 0 to 8 words of the one before it changed, so that there are chains."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(originals):
        family = rng.integers(0, 5000, words)
        for _ in range(copies):
            texts.append(" ".join(map(word, family.tolist())))
            changed = rng.choice(words, rng.integers(0, 9), replace=False)
            family = family.copy()
            family[changed] = rng.integers(0, 5000, len(changed))
    order = rng.permutation(len(texts))
    ids = [f"{i:05d}" for i in rng.permutation(len(texts))]
    return Pool.from_columns({"id": ids, "text": [texts[i] for i in order]})


# Words.


@pytest.mark.parametrize("digits", [False, True])
def test_words_are_those_of_the_plain_form(digits: bool) -> None:
    texts = [
        "The naïve  Café, in 2024: 13½ — €5!", "", "   ", "x", "tab\tand\nline", "Ärger über ﬁne ΣΊΣΥΦΟΣ",
        "नमस्ते दुनिया १२", "под водой, Ёлка", "e\u0301tude \u0301", "\u0301\u0301a\u0301b c", "a_b-c", "👍 ok 👍",
        "\ud800 lone", "İstanbul",
    ]  # fmt: skip
    hashes, ends = Reader(digits=digits).words(texts)
    known: dict[str, int] = {}
    for text, start, stop in zip(texts, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        words = plain_words(text, digits)
        assert stop - start == len(words), (text, words)
        for word, value in zip(words, hashes[start:stop].tolist(), strict=True):
            assert known.setdefault(word, value) == value, "one word has one hash, wherever it stands"
    assert len(set(known.values())) == len(known), "and no two words have the same"


def test_scripts_without_spaces_have_a_word_for_each_character() -> None:
    _, ends = Reader().words(["漢字かな", "ab漢c", "สวัสดี", "한국어 말"])
    assert np.diff(ends).tolist() == [4, 3, 4, 2]


def test_words_do_not_depend_on_what_is_read_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [t for t in edited(0).column("text")[:20]] + ["été " * 30, "", "x" * 5000]
    together, ends = Reader().words(texts)
    apart = [Reader().words([t])[0] for t in texts]
    assert np.array_equal(together, np.concatenate(apart)) and np.array_equal(np.diff(ends), [len(a) for a in apart])
    monkeypatch.setattr("assay.numerics.shingles.CHARS", 100)
    assert np.array_equal(Reader().words(texts)[0], together)


@pytest.mark.parametrize("n", [1, 2, 5, 13])
@pytest.mark.parametrize("short", [True, False])
def test_sequences_are_those_of_plain_python(n: int, short: bool) -> None:
    rng = np.random.default_rng(n)
    texts = [" ".join(rng.choice(list("abc"), rng.integers(0, 20)).tolist()) for _ in range(200)]
    words, ends = Reader().words(texts)
    hashes, bounds = sequences(words, ends, n, short=short)
    known: dict[tuple[str, ...], int] = {}
    for text, start, stop in zip(texts, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        split = text.split()
        runs = [tuple(split[i : i + n]) for i in range(len(split) - n + 1)]
        runs = runs or ([tuple(split)] if short and split else [])
        assert len(runs) == stop - start
        for run, value in zip(runs, hashes[start:stop].tolist(), strict=True):
            assert known.setdefault(run, value) == value
    assert len(set(known.values())) == len(known)
    lines = whole(words, ends)
    assert len(set(lines.tolist())) == len(set(texts)) and (lines == 0).sum() == texts.count("")


# Sorting on disk.


def test_a_spill_is_a_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "MOST", 100)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, (3, 5, 200), dtype=np.uint64)
    keys[:, :, ::3] = keys[0, 0, 0]  # one key in all runs of all lanes
    keys[1, 2, :9] = [0, 2**64 - 1, 1, 2**63, 2**64 - 1, 0, 0, 5, 2**63]
    made = Spill(tmp_path, "x", lanes=3)
    for run in range(5):
        made.write(run, keys[:, run], np.arange(200) + 200 * run)
    for lane in range(3):
        blocks = list(made.sorted(lane))
        assert len(blocks) == 10
        found = np.concatenate([k for k, _ in blocks])
        assert np.array_equal(found, np.sort(keys[lane].ravel()))
        values = np.concatenate([v for _, v in blocks]).astype(int)
        assert np.array_equal(keys[lane].ravel()[values], found) and len(set(values.tolist())) == 1000
        held = [k for k, _ in blocks if len(k)]
        assert all(a[-1] < b[0] for a, b in itertools.pairwise(held)), "equal keys are in one block"
    made.clear()
    assert not made.has(0) and [len(k) for k, _ in made.sorted()] == [0]


# Exact copies.


def test_keys_are_the_hash_of_the_normal_form() -> None:
    rng = np.random.default_rng(0)
    letters = list(SPACES + "abABéK\x00")
    texts = ["".join(rng.choice(letters, rng.integers(0, 9)).tolist()) for _ in range(3000)] + ["\ud800 x", ""]
    for text, key in zip(texts, exact_dup.keys(texts), strict=True):
        form = " ".join(text.lower().split()).encode("utf-8", "surrogatepass")
        assert key.tobytes() == (xxhash.xxh3_128_digest(form) if form else bytes(16)), repr(text)
    assert exact_dup.keys([]).shape == (0, 2)
    images = [b" A ", b" A ", b"a", b""]
    assert [k.tobytes() for k in exact_dup.keys(images)[:3]] == [xxhash.xxh3_128_digest(i) for i in images[:3]]


def test_a_key_does_not_depend_on_what_is_hashed_with_it() -> None:
    """Bytes, texts, numbers and what is missing, alone and together."""
    values = [b" A ", None, " a", "None", b"a", 3, "3", b"", float("nan")]
    together, alone = exact_dup.keys(values), np.concatenate([exact_dup.keys([v]) for v in values])
    np.testing.assert_array_equal(together, alone)
    hashed = [b" A ", b"", b"a", b"none", b"a", b"3", b"3", b"", b""]
    assert [k.tobytes() for k in together] == [xxhash.xxh3_128_digest(h) if h else bytes(16) for h in hashed]


@pytest.mark.parametrize("name", ["exact_dup", "minhash", "paragraph_dup"])
def test_what_is_missing_is_no_copy(tmp_path: Path, name: str) -> None:
    """Of a title that two lack and one calls None, none is a copy; nor does what is missing change a neighbour."""
    pool = Pool.from_columns({"id": list("abcde"), "text": list("vwxyz"), "title": ["x", None, None, "None", "none"]})
    found = table(tmp_path, {"name": name, "column": "title", **({"n": 1} if name == "paragraph_dup" else {})}, pool)
    copies = {i for i, score in by_id(found).items() if score < 0}
    assert copies == {"e"}
    held = [b"\xff two", None, b"\xff two", None, b"other"]
    found = table(tmp_path / "bytes", {"name": "exact_dup", "column": "image"}, Pool.from_columns(
        {"id": list("abcde"), "text": list("vwxyz"), "image": held}
    ))  # fmt: skip
    assert by_id(found) == {"a": 0, "b": 0, "c": -1, "d": 0, "e": 0}


def test_t_a1_exact_copies_once_more_and_in_any_order(tmp_path: Path) -> None:
    """Idempotent, equivariant under permutation, and as many survivors as classes."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(["a", "B", "b", "\t"], rng.integers(0, 5)).tolist()) for _ in range(400)]
    pool = Pool.from_columns({"id": [f"{i:04d}" for i in rng.permutation(400)], "text": texts})
    found = by_id(table(tmp_path / "0", "exact_dup", pool))
    forms = dict(zip([i.decode() for i in pool.ids.tolist()], (exact_dup.normal(t) for t in texts), strict=True))
    seen: dict[str, int] = {}
    for identity in sorted(forms):
        before = seen.get(forms[identity], 0)
        assert found[identity] == (-before if forms[identity] else 0)
        seen[forms[identity]] = before + 1
    kept = [i for i, s in found.items() if s == 0]
    assert len(kept) == len(set(forms.values()) - {""}) + list(forms.values()).count("")
    mixed = pool.at(rng.permutation(400))
    assert by_id(table(tmp_path / "1", "exact_dup", mixed)) == found
    assert set(by_id(table(tmp_path / "2", "exact_dup", pool.take(kept))).values()) == {0.0}


def test_the_highest_priority_survives(tmp_path: Path) -> None:
    rows = {"id": list("abcd"), "text": ["one two"] * 4, "rank": [1.0, float("nan"), 3.0, 3.0]}
    truth = {"a": -2.0, "b": -3.0, "c": 0.0, "d": -1.0}
    pool = Pool.from_columns(rows)
    for name in ("exact_dup", "minhash"):
        for k, order in enumerate([[0, 1, 2, 3], [3, 1, 0, 2]]):
            spec = {"name": name, "priority": "rank"}
            assert by_id(table(tmp_path / f"{name}{k}", spec, pool.at(order))) == truth
        with pytest.raises(InputError, match="does not hold numbers"):
            table(tmp_path / name, {"name": name, "priority": "text"}, pool)


# Near copies.


def sets_of(jaccard: float, pairs: int, union: int = 100, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Minima of `pairs` pairs of sets of that Jaccard index, each of fresh random hashes."""
    rng = np.random.default_rng(seed)
    shared = round(jaccard * union)
    left = (union - shared) // 2
    hashes = rng.integers(0, 2**64, (pairs, union), dtype=np.uint64)
    one, other = hashes[:, : shared + left], np.concatenate([hashes[:, :shared], hashes[:, shared + left :]], axis=1)
    flat = [signatures(s.ravel(), np.arange(0, s.size + 1, s.shape[1]), 112, 1) for s in (one, other)]
    return flat[0], flat[1], shared / union


@pytest.mark.parametrize("jaccard", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_t_a2_pairs_meet_as_often_as_the_curve_says(jaccard: float) -> None:
    one, other, truth = sets_of(jaccard, 2000)
    met = (band_keys(one, 14) == band_keys(other, 14)).any(axis=0).mean()
    expected = 1 - (1 - truth**8) ** 14
    assert abs(met - expected) <= 3 * math.sqrt(expected * (1 - expected) / 2000)
    assert curve(truth, 14, 8) == pytest.approx(expected)


@pytest.mark.parametrize("jaccard", [0.2, 0.5, 0.8])
def test_t_a3_the_share_of_equal_minima_estimates_jaccard(jaccard: float) -> None:
    one, other, truth = sets_of(jaccard, 2000, seed=1)
    estimates = (one == other).mean(axis=1)
    spread = truth * (1 - truth) / 112
    assert abs(estimates.mean() - truth) <= 3 * math.sqrt(spread / 2000)
    # The minima are not drawn apart from one another, and their mean is the better for it: about half of J (1 - J) / K.
    assert 0.3 * spread < estimates.var() <= spread * (1 + 4 * math.sqrt(2 / 2000))


def test_the_published_points_of_the_curve() -> None:
    assert [round(float(curve(s, 14, 8)), 3) for s in (0.70, 0.75, 0.80, 0.85)] == [0.565, 0.772, 0.924, 0.988]
    assert [round(float(curve(s, 450, 20)), 2) for s in (0.70, 0.75, 0.80)] == [0.30, 0.76, 0.99]


def test_a_band_key_is_of_the_whole_band_and_of_nothing_else() -> None:
    rng = np.random.default_rng(0)
    minima = rng.integers(0, 2**32, (50, 112), dtype=np.uint32)
    keys = band_keys(minima, 14)
    for place in range(112):
        changed = minima.copy()
        changed[:, place] ^= 1
        other = band_keys(changed, 14)
        assert (other[place // 8] != keys[place // 8]).all()
        assert np.array_equal(np.delete(other, place // 8, axis=0), np.delete(keys, place // 8, axis=0))


def test_t_a4_short_texts(tmp_path: Path) -> None:
    """Fewer than n words: one shingle of all of them. No words: no copy."""
    texts = ["Two words", "two  WORDS!", "two", "words two", "", "...", "four words are here", "Four words are here."]
    pool = Pool.from_columns({"id": list("abcdefgh"), "text": texts})
    found = table(tmp_path, "minhash", pool)
    assert by_id(found) == {"a": 0, "b": -1, "c": 0, "d": 0, "e": 0, "f": 0, "g": 0, "h": -1}
    assert by_id(found, "size") == {"a": 2, "b": 2, "c": 1, "d": 1, "e": 1, "f": 1, "g": 2, "h": 2}
    assert found.meta["notes"]["minhash: near copies"]["short"] == 6


def test_numbers_may_tell_texts_apart(tmp_path: Path) -> None:
    texts = [f"A train leaves at {n} and arrives at {n + 3}, how long did it take?" for n in (2, 4, 6)]
    pool = Pool.from_columns({"id": list("abc"), "text": [*texts[:2], texts[1]]})
    found = by_id(table(tmp_path / "0", "minhash", pool))
    assert found == {"a": 0, "b": -1, "c": -2}
    assert by_id(table(tmp_path / "1", {"name": "minhash", "digits": "keep"}, pool)) == {"a": 0, "b": 0, "c": -1}


def compared(pool: Pool, method: MinHash) -> set[tuple[str, str]]:
    """Pairs of ids, earlier first, that share a band; from the same minima, found by comparing all with all."""
    ids, reader = [i.decode() for i in pool.ids.tolist()], Reader()
    keys = {}
    for identity, text in zip(ids, pool.column("text"), strict=True):
        hashes, ends = sequences(*reader.words([text]), method.n, short=True)
        keys[identity] = band_keys(signatures(hashes, ends, method.bands * method.rows, method.seed), method.bands)
    return {(a, b) for a, b in itertools.combinations(sorted(ids), 2) if (keys[a] == keys[b]).any()}


def alike(pool: Pool, pairs: set[tuple[str, str]], least: float) -> set[tuple[str, str]]:
    sets = {i.decode(): shingles(t, 5) for i, t in zip(pool.ids.tolist(), pool.column("text"), strict=True)}
    return {(a, b) for a, b in pairs if len(sets[a] & sets[b]) >= least * len(sets[a] | sets[b])}


def union_find(ids: list[str], pairs: set[tuple[str, str]]) -> dict[str, str]:
    of = {i: i for i in ids}

    def root(i: str) -> str:
        while of[i] != i:
            i = of[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        of[high] = low
    return {i: root(i) for i in ids}


def greedy(ids: list[str], pairs: set[tuple[str, str]]) -> dict[str, str]:
    of: dict[str, str] = {}
    for i in sorted(ids):
        of[i] = next((a for a in sorted(of) if of[a] == a and (a, i) in pairs), i)
    return of


def places(of: dict[str, str]) -> dict[str, float]:
    return {i: -float(sum(of[j] == of[i] for j in of if j < i)) for i in of}


@pytest.mark.parametrize("clusters", ["components", "star"])
@pytest.mark.parametrize("verify", [0.0, 0.6])
def test_clusters_are_those_of_plain_python(tmp_path: Path, clusters: str, verify: float) -> None:
    """T-a5 and T-a6: the same in any order; survivors and removed are the input; each class keeps exactly one."""
    pool = edited(3)
    ids = [i.decode() for i in pool.ids.tolist()]
    spec = {"name": "minhash", "verify": verify, "clusters": clusters}
    method = make(Scorer, spec)
    assert isinstance(method, MinHash)
    pairs = compared(pool, method)
    if verify:
        kept = alike(pool, pairs, verify)
        assert 10 < len(kept) < len(pairs), "verification has something to do"
        pairs = kept
    of = (union_find if clusters == "components" else greedy)(ids, pairs)
    assert union_find(ids, pairs) != greedy(ids, pairs), "the two differ here"
    found = table(tmp_path / "0", spec, pool)
    assert by_id(found) == places(of)
    assert by_id(found, "size") == {i: float(sum(j == of[i] for j in of.values())) for i in ids}
    assert sum(s == 0 for s in by_id(found).values()) == len(set(of.values()))
    mixed = pool.at(np.random.default_rng(4).permutation(len(pool)))
    assert by_id(table(tmp_path / "1", spec, mixed)) == places(of)


def test_clusters_do_not_depend_on_blocks_runs_or_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = edited(5, originals=80)
    for verify in (0.0, 0.6):
        spec = {"name": "minhash", "verify": verify}
        truth = by_id(table(tmp_path / f"{verify}", spec, pool))
        monkeypatch.setattr(minhash, "BLOCK", 37)
        monkeypatch.setattr(minhash, "ROWS", 10)
        monkeypatch.setattr(minhash, "PAIRS", 7)
        monkeypatch.setattr(spill, "MOST", 50)
        assert by_id(table(tmp_path / f"{verify} small", spec, pool)) == truth
        monkeypatch.undo()
    monkeypatch.setattr(minhash, "MANY", 0)
    monkeypatch.setattr(exact_dup, "MANY", 0)
    monkeypatch.setattr(paragraph_dup, "MANY", 0)
    for name in ("minhash", "exact_dup", "paragraph_dup"):
        one, two = (table(tmp_path / f"{name} {w}", name, pool, workers=w).values for w in (1, 2))
        assert one.tobytes() == two.tobytes()


def test_a_run_that_was_killed_finds_its_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, spec = edited(7, originals=20), {"name": "minhash", "verify": 0.5}
    truth = by_id(table(tmp_path / "whole", spec, pool))

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(minhash, "standing", killed)
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path / "killed", spec, pool)
    monkeypatch.undo()
    monkeypatch.setattr(minhash, "signatures", killed)
    assert by_id(table(tmp_path / "killed", spec, pool)) == truth


def test_a_large_band_is_not_compared_all_with_all() -> None:
    rank = np.random.default_rng(0).permutation(500).astype(np.uint32)
    packed = make(Scorer, {"name": "minhash", "verify": 0.5})._candidates(np.zeros(500, np.uint64), rank)  # type: ignore[attr-defined]
    pairs = {(int(p) & 0xFFFFFFFF, int(p) >> 32) for p in packed}
    assert pairs == {(a, b) for b in range(500) for a in range(b) if a < 4 or b - a <= 4} and len(pairs) == len(packed)


def test_what_explains_a_drop_lies_beside_the_table(tmp_path: Path) -> None:
    pool = edited(6)
    found = by_id(table(tmp_path, "minhash", pool))
    (folder,) = (p.parent for p in tmp_path.glob("steps/scores-minhash-*/near-ids.npy"))
    ids, survivors = (np.load(folder / f"near-{n}.npy").tolist() for n in ("ids", "survivors"))
    assert {i.decode() for i in ids} >= {i for i, s in found.items() if s < 0}
    assert all(found[s.decode()] == 0 for s in survivors) and not (folder / "near").exists()


def test_a_domain_of_copies_and_a_large_cluster_are_spoken_of(tmp_path: Path) -> None:
    texts = [f"the same words in all of these texts {'x' * (i == 7)}" for i in range(150)]
    fresh = [" ".join(map(word, range(i, i + 6))) for i in range(0, 600, 10)]
    pool = Pool.from_columns({"text": texts + fresh, "domain": ["copies"] * 150 + ["fresh"] * 60})
    meta = table(tmp_path, "minhash", pool).meta
    assert meta["notes"]["minhash: near copies by domain"]["domains"] == {"copies": [149, 150], "fresh": [0, 60]}
    about = meta["notes"]["minhash: near copies"]
    assert about["largest"] == 150 and about["clusters"] == 1 and about["recall"]["0.8"] == 0.9235
    assert any("one cluster has 150" in w for w in meta["warnings"])
    assert any("more than half of these domains are near copies: copies" in w for w in meta["warnings"])


def test_an_index_above_one_and_a_missing_package_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = edited(0, originals=2)
    with pytest.raises(InputError, match="verify cannot be 3"):
        table(tmp_path / "0", {"name": "minhash", "verify": 3}, pool)
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(InputError, match=r"assay-data\[text\]"):
        table(tmp_path / "1", "minhash", pool)


def test_looking_up_starts_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting them takes longer than looking up ten thousand verdicts; a scorer that reads texts does start them."""
    asked, started = [], local.map

    def counted(*given: Any, workers: int = 1) -> Any:
        asked.append(workers)
        return started(*given, workers=1)

    monkeypatch.setattr(local, "map", counted)
    pool = edited(8, originals=10)
    for name in ("exact_dup", "minhash", "paragraph_dup", "length"):
        asked.clear()
        table(tmp_path / name, name, pool, shard=1, workers=2)
        assert max(asked) == (2 if name == "length" else 1)


# Paragraphs and n-grams.


def test_t_a7_the_shape_of_a_bloom_filter() -> None:
    for items, rate in itertools.product((100, 10_000), (0.5, 0.01, 1e-6)):
        bits, functions = shape(items, rate)
        assert bits == max(64, math.ceil(-items * math.log(rate) / math.log(2) ** 2))
        assert functions == max(1, round(-math.log2(rate)))


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.001])
def test_t_a7_false_positives_at_full_load(rate: float) -> None:
    rng = np.random.default_rng(0)
    hashes = np.unique(rng.integers(0, 2**64, 300_000, dtype=np.uint64))
    rng.shuffle(hashes)
    bloom = Bloom(50_000, rate)
    bloom.add(hashes[:50_000])
    assert bloom.among(hashes[:50_000]).all(), "what was added is found"
    wrong = bloom.among(hashes[50_000:])
    assert wrong.mean() <= 1.2 * rate
    assert abs(wrong.mean() - bloom.fill**bloom.functions) <= 4 * math.sqrt(rate / len(wrong))


def exact_shares(pool: Pool, of: str, n: int) -> dict[str, tuple[float, int]]:
    seen, out = set(), {}
    for identity, text in sorted(zip(pool.ids.tolist(), pool.column("text"), strict=True)):
        parts: list[Any] = []
        for line in text.splitlines():
            words = plain_words(line, True)
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            parts += grams if of == "ngrams" else [tuple(words)] if words else []
        out[identity.decode()] = (-sum(p in seen for p in parts) / max(1, len(parts)), len(parts))
        seen |= set(parts)
    return out


@pytest.mark.parametrize("of", ["ngrams", "paragraphs"])
def test_t_a7_without_false_positives_it_is_the_exact_algorithm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    rng = np.random.default_rng(2)
    lines = [" ".join(rng.choice(list("abcdefgh"), rng.integers(0, 12)).tolist()) for _ in range(150)]
    texts = ["\n".join(rng.choice(lines, rng.integers(0, 6)).tolist()) for _ in range(150)]
    pool = Pool.from_columns({"id": [f"{i:03d}" for i in rng.permutation(150)], "text": texts})
    truth = exact_shares(pool, of, 4)
    assert len({s for s, _ in truth.values()}) > 8
    spec = {"name": "paragraph_dup", "of": of, "n": 4, "false_positives": 1e-12}
    for k, (block, stream) in enumerate([(1 << 14, 1 << 11), (32, 7)]):
        monkeypatch.setattr(paragraph_dup, "BLOCK", block)
        monkeypatch.setattr(paragraph_dup, "STREAM", stream)
        found = table(tmp_path / str(k), spec, pool.at(rng.permutation(150)))
        scores, parts = by_id(found), by_id(found, "parts")
        assert {i: (scores[i], int(parts[i])) for i in scores} == {
            i: (pytest.approx(s), c) for i, (s, c) in truth.items()
        }


def test_new_ngrams_look_seen_no_more_often_than_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paragraph_dup, "STREAM", 10)
    rng = np.random.default_rng(0)
    texts = [" ".join(map(word, rng.integers(0, 10**6, 112).tolist())) for _ in range(400)]
    found = table(tmp_path, {"name": "paragraph_dup", "false_positives": 0.05}, Pool.from_columns({"text": texts}))
    assert (found.column("parts") == 100).all()
    note = found.meta["notes"]["paragraph_dup: Bloom filter"]
    assert note["items"] == 40_000 and note["rate"] <= 1.2 * 0.05
    assert 0 < -found.column("score").mean() <= 1.2 * 0.05


def test_a_probability_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="false_positives cannot be 1"):
        table(tmp_path, {"name": "paragraph_dup", "false_positives": 1}, edited(0, originals=1))


# For use as filters.


@pytest.mark.parametrize("name", ["exact_dup", "minhash", "paragraph_dup"])
def test_presets_name_own_columns_and_keep_the_first_copy_alone(tmp_path: Path, name: str) -> None:
    line = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    pool = Pool.from_columns({"id": list("abc"), "text": [line, line, "something else " + line[::-1]]})
    found, method = table(tmp_path, name, pool), make(Scorer, name)
    bounds = next(iter(method.presets.values()))
    assert set(bounds) <= set(found.columns)
    kept = {
        i for column, (low, high) in bounds.items() for i, s in by_id(found, column).items()
        if (low is None or s >= low) and (high is None or s <= high)
    }  # fmt: skip
    assert kept == {"a", "c"}
