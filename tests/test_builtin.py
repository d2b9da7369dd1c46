"""The built-in text and the toys: what is planted is there, and nothing else is."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from assay.core.errors import InputError
from assay.data import toys
from assay.data.builtin import Planted, python_text, snippets
from assay.data.plant import char_noise, grams, letter_shuffle, near, word_shuffle

SIZE = 1200
DOMAINS = ("docs", "docstring", "comment", "code")


@cache
def planted(target: str = "docs") -> Planted:
    return python_text(target=target, size=SIZE)


def by_id(table) -> dict[str, dict]:
    return {row["id"]: row for row in table.to_pylist()}


def copies(data: Planted, kind: str, detail: str | None = None) -> list[tuple[dict, dict]]:
    """(copy, original) of the planted rows of one kind."""
    pool = by_id(data.pool)
    originals = by_id(data.target) if kind == "leak" else pool
    rows = [row for row in data.truth.to_pylist() if row["kind"] == kind and detail in (None, row["detail"])]
    return [(pool[row["id"]], originals[row["of"]]) for row in rows]


def clean(data: Planted) -> list[dict]:
    planted_ids = set(data.truth["id"].to_pylist())
    return [row for row in data.pool.to_pylist() if row["id"] not in planted_ids]


def digest(data: Planted) -> str:
    parts = [str(table.to_pylist()) for table in (data.pool, data.target, data.truth)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@pytest.mark.parametrize("target", DOMAINS)
def test_counts_and_columns(target):
    data = planted(target)
    assert data.pool.column_names == ["id", "text", "domain"]
    assert data.target.column_names == ["id", "text", "group"]
    assert data.truth.column_names == ["id", "kind", "of", "detail"]
    ids = data.pool["id"].to_pylist() + data.target["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[0-9a-f]{16,}", id) for id in ids)
    assert abs(data.pool.num_rows - SIZE) <= 2
    kinds = Counter(data.truth["kind"].to_pylist())
    details = Counter(data.truth["detail"].to_pylist())
    assert kinds["exact_dup"] == kinds["near_dup"] == 48 and kinds["leak"] == 40
    assert {details[d] for d in ("char_noise", "letter_shuffle", "no_spaces", "loop")} == {12}
    domains = Counter(row["domain"] for row in clean(data))
    assert domains[target] == details["word_shuffle"] == SIZE // 10
    rest = [domains[d] for d in DOMAINS if d != target]
    assert max(rest) - min(rest) <= 1
    assert 150 <= data.target.num_rows <= 400
    assert len(set(data.target["group"].to_pylist())) >= 8


@pytest.mark.parametrize("target", DOMAINS)
def test_target_is_apart_from_the_pool(target):
    data = planted(target)
    target_grams = set().union(*(grams(text, 13) for text in data.target["text"].to_pylist()))
    leaks = {copy["id"] for copy, _ in copies(data, "leak")}
    for row in data.pool.to_pylist():
        assert (row["id"] in leaks) != grams(row["text"], 13).isdisjoint(target_grams), row["text"]
    for copy, original in copies(data, "leak"):
        assert copy["text"] == original["text"] and copy["domain"] == target
    groups = set(data.target["group"].to_pylist())
    assert all(("/" in group or group.endswith(".py")) == (target != "docs") for group in groups)


def test_exact_copies_are_the_only_repeats():
    data = planted()
    for copy, original in copies(data, "exact_dup"):
        assert (copy["text"], copy["domain"]) == (original["text"], original["domain"])
    per_original = Counter(original["id"] for _, original in copies(data, "exact_dup"))
    assert max(per_original.values()) > 2 and min(per_original.values()) == 1
    assert {original["domain"] for _, original in copies(data, "exact_dup")} == set(DOMAINS)
    texts = Counter(" ".join(text.lower().split()) for text in data.pool["text"].to_pylist())
    assert sum(n - 1 for n in texts.values()) == len(copies(data, "exact_dup"))


def test_clean_text_is_snippets_without_near_repeats():
    rows = clean(planted())
    for row in rows:
        assert 120 <= len(row["text"]) <= 420
        assert row["text"] == row["text"].rstrip() and row["text"].replace("\n", "").isprintable()
    own = [grams(row["text"], 5) for row in rows]
    assert all(2 * len(a & b) < max(len(a), len(b)) for a, b in combinations(own, 2))
    docstrings = [row["text"] for row in rows if row["domain"] == "docstring"]
    assert not any(">>>" in text for text in docstrings)
    code = [row["text"] for row in rows if row["domain"] == "code"]
    commented = [
        text for text in code if re.search(r"(?m)^\s*# ", text)
    ]  # left: long strings, such as verbose patterns
    assert len(commented) < 0.03 * len(code)
    assert sum("\n    " in text for text in code) > len(code) / 3


@pytest.mark.parametrize("target", DOMAINS)
def test_near_copies_share_part_of_their_five_grams(target):
    overlaps = []
    for copy, original in copies(planted(target), "near_dup"):
        a, b = grams(copy["text"], 5), grams(original["text"], 5)
        overlaps.append(len(a & b) / len(a | b))
        assert copy["text"] != original["text"]
    assert 0.4 < np.median(overlaps) < 0.8
    assert np.quantile(overlaps, 0.05) > 0.15 and max(overlaps) < 1


@pytest.mark.parametrize("target", DOMAINS)
def test_shuffled_copies_keep_their_words(target):
    data = planted(target)
    pairs = copies(data, "garbled", "word_shuffle")
    for copy, original in pairs:
        assert copy["text"] != original["text"]
        assert Counter(copy["text"].split()) == Counter(original["text"].split())
        assert copy["domain"] == original["domain"] == target
    assert {original["id"] for _, original in pairs} == {r["id"] for r in clean(data) if r["domain"] == target}


def test_other_garbles():
    data = planted()
    for copy, original in copies(data, "garbled", "char_noise"):
        changed = sum(a != b for a, b in zip(copy["text"], original["text"], strict=True))
        assert 0.08 < changed / len(original["text"]) < 0.35
    for copy, original in copies(data, "garbled", "letter_shuffle"):
        assert copy["text"] != original["text"] and Counter(copy["text"]) == Counter(original["text"])
        assert len(copy["text"].split()) == len(original["text"].split())
    for copy, original in copies(data, "garbled", "no_spaces"):
        assert copy["text"] == "".join(original["text"].split())
    for copy, _ in copies(data, "garbled", "loop"):
        assert len(set(copy["text"].split())) <= 4 and len(copy["text"].split()) >= 12


def test_planting_of_one_text():
    text = "one two three four five six seven eight nine ten"
    assert sorted(word_shuffle(text, 0).split()) == sorted(text.split()) and word_shuffle(text, 0) != text
    assert word_shuffle("b a", 0) == "a b"
    assert near(text, "zebra", 0)[0] != text
    assert char_noise(text, 0) != char_noise(text, 1)
    assert letter_shuffle("a b", 0) == "a b"


def test_same_bytes_in_another_process():
    code = (
        "import hashlib\nfrom assay.data.builtin import python_text\nd = python_text(size=1200)\n"
        "s = ''.join(str(t.to_pylist()) for t in (d.pool, d.target, d.truth))\n"
        "print(hashlib.sha256(s.encode()).hexdigest())\n"
        "import sys; assert not {'torch', 'sklearn'} & set(sys.modules), 'heavy import'\n"
    )
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == digest(planted())
    assert digest(python_text(size=SIZE, seed=1)) != digest(planted())


def test_own_root(tmp_path):
    with pytest.raises(InputError, match="topics"):
        python_text(root=tmp_path)
    with pytest.raises(InputError, match="standard library"):
        python_text(root=tmp_path / "nothing")
    (tmp_path / "pydoc_data").mkdir()
    sentence = "This is the text of a topic, and it is made of words that may be the same as others. "
    topics = {"one": "Title\n*****\n\n" + sentence * 3}
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}")
    comment = (
        "# A remark that is long enough to be kept, since it goes on and on\n# for two lines, and then for a third,\n"
    )
    module = f'''"""{"The module does a number of things to the data that it is given. " * 2}"""
{comment}# which is the last of the lines.
value = "# not a comment" + '# {"x" * 70}'  # but this is one, and it isn't kept
text = """
# inside a string
{"y" * 60}
"""
'''
    (tmp_path / "a.py").write_text(module)
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text(module.replace("module", "suite"))
    found = {domain: (text, group) for text, domain, group in snippets(tmp_path)}
    assert {domain: group for domain, (_, group) in found.items()} == {
        "docs": "one",
        "docstring": "a.py",
        "comment": "a.py",
        "code": "a.py",
    }
    assert "Title" not in found["docs"][0] and "last of the lines." in found["comment"][0]
    assert "# not a comment" in found["code"][0] and "# inside a string" in found["code"][0]
    assert "but this is one" not in found["code"][0] and "module does" not in found["code"][0]


def test_input_errors():
    with pytest.raises(InputError, match="did you mean 'docs'"):
        python_text(target="doc")
    with pytest.raises(InputError, match="too small"):
        python_text(size=10)


def test_digits():
    train, test, truth = toys.digits()
    assert (train.num_rows, test.num_rows, truth.num_rows) == (1200, 597, 120)
    assert len(set(train["id"].to_pylist()) | set(test["id"].to_pylist())) == 1797
    pixels = np.array(train["pixels"].to_pylist(), dtype=np.float32)
    assert pixels.shape == (1200, 64) and pixels.min() == 0 and pixels.max() == 1
    honest, _, nothing = toys.digits(flip=0)
    assert nothing.num_rows == 0 and honest["id"].to_pylist() == train["id"].to_pylist()
    true = dict(zip(honest["id"].to_pylist(), honest["label"].to_pylist(), strict=True))
    flipped = {row["id"]: int(row["detail"]) for row in truth.to_pylist()}
    for row in train.to_pylist():
        assert row["domain"] == f"digit {row['label']}"
        assert (row["label"] != true[row["id"]]) == (row["id"] in flipped)
        assert flipped.get(row["id"], true[row["id"]]) == true[row["id"]]
    assert set(truth["kind"].to_pylist()) == {"flipped"} and set(truth["of"].to_pylist()) == {""}
    with pytest.raises(InputError, match="share"):
        toys.digits(flip=2)


def test_skills_and_null():
    data = toys.skills()
    domains = Counter(data.pool["domain"].to_pylist())
    assert domains == {"good": 300, "bad": 300} and data.target.num_rows == 64
    assert len(set(data.target["group"].to_pylist())) == 64
    texts = data.pool["text"].to_pylist() + data.target["text"].to_pylist()
    assert len(set(texts)) == len(texts) and all(40 <= len(text) <= 120 for text in texts)
    bad = {row["id"] for row in data.pool.to_pylist() if row["domain"] == "bad"}
    assert set(data.truth["id"].to_pylist()) == bad
    assert Counter(data.truth["detail"].to_pylist()) == {"other_skill": 150, "noise": 150}
    vocabulary = set(" ".join(data.target["text"].to_pylist()).lower().split())
    good = [row["text"] for row in data.pool.to_pylist() if row["domain"] == "good"]
    assert all(len(vocabulary & set(text.lower().split())) >= 8 for text in good)
    control = toys.null()
    assert control.pool.num_rows == 600 and control.truth.num_rows == 0 and control.target.num_rows == 64
    assert 240 < Counter(control.pool["domain"].to_pylist())["a"] < 360
    with pytest.raises(InputError, match="out of range"):
        toys.null(0)


def test_ridge():
    x, y = toys.ridge()
    assert x.shape == (40, 5) and y.shape == (40,) and x.dtype == y.dtype == np.float64
    again, _ = toys.ridge()
    assert np.array_equal(x, again)
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert 0.05 < residual.std() < 0.15
