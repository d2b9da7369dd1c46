"""Verdicts of others: every form by hand, joins by id and by hash, files that are wrong, and ours read back."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay import ship
from assay.core.errors import InputError
from assay.core.keys import decode_ids, encode_ids
from assay.core.method import Scorer, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Selection
from assay.data import verdicts
from assay.filters import parse
from assay.measure import Measurer
from assay.study import load

TEXTS = ["ten chars!", "twenty characters, x", "a third", "the fourth", "a fifth one"]
NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def pool() -> Pool:
    return Pool.from_columns({"id": NAMES, "text": TEXTS, "domain": ["x", "y", "x", "y", "x"]})


def table(tmp_path: Path, pool: Pool, **options: Any) -> Any:
    run = Run.open(tmp_path / "run", {"name": "verdict"})
    try:
        return Measurer(run, pool, pool).table(make(Scorer, {"name": "verdict", **options}))
    finally:
        run.close()


def scores(tmp_path: Path, pool: Pool, **options: Any) -> list[float]:
    return table(tmp_path, pool, **options).column("score").tolist()


def jsonl(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


# Lists.


def test_datatrove_documents_are_a_keep_list(tmp_path: Path, pool: Pool) -> None:
    rows = [{"text": "t", "id": name, "metadata": {"score": 1}} for name in ("d", "a", "zz")]
    assert scores(tmp_path, pool, path=jsonl(tmp_path / "kept.jsonl.gz", rows)) == [1, 0, 0, 1, 0]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "kept.parquet")
    found = table(tmp_path, pool, path=str(tmp_path / "kept.parquet"))
    assert found.column("score").tolist() == [1, 0, 0, 1, 0]
    note = found.meta["notes"]["joined"]
    assert (note["joined"], note["strangers"], note["keys"]) == (2, 1, 3)


def test_curator_lists_what_to_remove(tmp_path: Path) -> None:
    """Integers of its own id column, in several files of one folder."""
    pool = Pool.from_columns({"id": ["0", "1", "2", "3"], "text": TEXTS[:4]})
    (tmp_path / "Ids").mkdir()
    pq.write_table(pa.table({"_curator_dedup_id": [1]}), tmp_path / "Ids" / "part.0.parquet")
    pq.write_table(pa.table({"_curator_dedup_id": [3, 900]}), tmp_path / "Ids" / "part.1.parquet")
    assert scores(tmp_path, pool, path=str(tmp_path / "Ids")) == [1, 0, 1, 0]
    pq.write_table(pa.table({"id": [2]}), tmp_path / "own.parquet")
    assert scores(tmp_path, pool, path=str(tmp_path / "own.parquet"), format="curator") == [1, 1, 0, 1]


def test_datacomp_uids_are_two_numbers(tmp_path: Path) -> None:
    """High half first, as in their resharder; sorted on the way out."""
    names = ["ffffffffffffffff0000000000000001", "00000000000000020000000000000003", "0123456789abcdef0123456789abcdef"]
    pool = Pool.from_columns({"id": names, "text": TEXTS[:3]})
    kept = verdicts.uids([names[0].encode(), names[1].encode()])
    assert kept.dtype == np.dtype("u8,u8") and kept.tolist() == [(2, 3), (2**64 - 1, 1)]
    np.save(tmp_path / "kept.npy", kept)
    assert scores(tmp_path, pool, path=str(tmp_path / "kept.npy")) == [1, 1, 0]
    pq.write_table(pa.table({"uid": [names[2]], "clip": [0.3]}), tmp_path / "kept.parquet")
    assert scores(tmp_path, pool, path=str(tmp_path / "kept.parquet")) == [0, 0, 1]
    with pytest.raises(InputError, match="'a' is no uid"):
        verdicts.uids([b"a"])


def test_a_bare_list_must_say_what_it_means(tmp_path: Path, pool: Pool) -> None:
    (tmp_path / "ids.txt").write_text("b\n\nc\n")
    path = str(tmp_path / "ids.txt")
    with pytest.raises(InputError, match="does not say what it means"):
        scores(tmp_path, pool, path=path)
    assert scores(tmp_path, pool, path=path, means="keep") == [0, 1, 1, 0, 0]
    assert scores(tmp_path, pool, path=path, means="drop") == [1, 0, 0, 1, 1]


# Values.


def test_values_of_columns_and_of_metadata(tmp_path: Path, pool: Pool) -> None:
    rows = [
        {"id": n, "text": "t", "metadata": {"q": k / 10, "deep": {"x": k > 2}}, "p": k} for k, n in enumerate(NAMES)
    ]
    path = jsonl(tmp_path / "v.jsonl", rows)
    assert scores(tmp_path, pool, path=path, column="p") == [0, 1, 2, 3, 4]
    assert scores(tmp_path, pool, path=path, column="q") == [0, 0.1, 0.2, 0.3, 0.4]
    assert scores(tmp_path, pool, path=path, column="metadata.deep.x") == [0, 0, 0, 1, 1]
    assert scores(tmp_path, pool, path=path, column="q", means="drop") == [1, 0.9, 0.8, 0.7, 0.6]
    texts = [{**row, "metadata": json.dumps(row["metadata"])} for row in rows]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "v.parquet")
    assert scores(tmp_path, pool, path=str(tmp_path / "v.parquet"), column="q") == [0, 0.1, 0.2, 0.3, 0.4]
    (tmp_path / "v.csv").write_text("id,keep\n" + "".join(f"{n},{'True' if n < 'c' else 'false'}\n" for n in NAMES))
    assert scores(tmp_path, pool, path=str(tmp_path / "v.csv"), column="keep") == [1, 1, 0, 0, 0]


def test_missing_ids_are_an_error_unless_told(tmp_path: Path, pool: Pool) -> None:
    path = jsonl(tmp_path / "v.jsonl", [{"id": "a", "q": 0.2}, {"id": "c", "q": 0.8}, {"id": "d"}])
    with pytest.raises(InputError, match="3 of 5 rows have no verdict, the first is id 'b'"):
        scores(tmp_path, pool, path=path, column="q")
    assert scores(tmp_path, pool, path=path, column="q", missing=1) == [0.2, 1, 0.8, 1, 1]
    got = scores(tmp_path, pool, path=path, column="q", missing=1, means="drop")
    assert got == pytest.approx([0.8, 1, 0.2, 1, 1]), "missing is the score, whatever the direction"


# Dolma.


def test_spans_of_dolma(tmp_path: Path, pool: Pool) -> None:
    """Of 20 characters, 5 at .8 and 10 at 0: a sum of 4, .2 of the length."""
    attributes = [
        {"q": [[0, 10, 0.9]]}, {"q": [[0, 5, 0.8], [5, 15, 0.0]]}, {"q": []}, {}, {"q": True},
    ]  # fmt: skip
    rows = [{"id": n, "source": "s", "attributes": a} for n, a in zip(NAMES, attributes, strict=True)]
    found = table(tmp_path, pool, path=jsonl(tmp_path / "a.jsonl.gz", rows))
    assert found.columns == ("score", "covered", "highest", "spans")
    np.testing.assert_allclose(found.column("score"), [0.9, 0.2, 0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(found.column("covered"), [1, 0.25, 0, 0, 1], atol=1e-12)
    assert found.column("highest").tolist() == [0.9, 0.8, 0, 0, 1] and found.column("spans").tolist() == [1, 2, 0, 0, 0]
    dups = table(tmp_path, pool, path=str(tmp_path / "a.jsonl.gz"), means="drop")
    np.testing.assert_allclose(dups.column("score"), [0.1, 0.8, 1, 1, 0], atol=1e-12)
    several = jsonl(tmp_path / "b.jsonl", [{"id": n, "attributes": {"q": 1, "r": 0.5}} for n in NAMES])
    with pytest.raises(InputError, match=r"(?s)2 attributes.*q, r.*name one"):
        scores(tmp_path, pool, path=several)
    assert scores(tmp_path, pool, path=several, column="r") == [0.5] * 5
    with pytest.raises(InputError, match="no row has 's'"):
        scores(tmp_path, pool, path=several, column="s")


# By the hash of the text.


def test_joined_by_the_text_where_ids_are_others(tmp_path: Path, pool: Pool) -> None:
    rows = [{"id": f"their {k}", "text": text} for k, text in enumerate(TEXTS) if k != 1]
    path = jsonl(tmp_path / "kept.jsonl", rows)
    with pytest.raises(InputError, match="none of 4 keys is in the pool"):
        scores(tmp_path, pool, path=path)
    assert scores(tmp_path, pool, path=path, by="hash") == [1, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_joined_by_digests(tmp_path: Path, pool: Pool, kind: Any) -> None:
    digests = [hashlib.new(kind, text.encode()).hexdigest().upper() for text in TEXTS[:2]]
    path = jsonl(tmp_path / "h.jsonl", [{"_hashes": d} for d in digests])
    options = {"path": path, "by": "hash", "key": "_hashes", "hash": kind, "means": "drop"}
    assert scores(tmp_path, pool, **options) == [0, 0, 1, 1, 1]


def test_copies_share_the_verdict_of_their_text(tmp_path: Path) -> None:
    pool = Pool.from_columns({"id": NAMES, "text": ["one", "two", "one", "six", "one"]})
    path = jsonl(tmp_path / "v.jsonl", [{"text": "one", "q": 0.3}, {"text": "two", "q": 1}, {"text": "six", "q": 0}])
    assert scores(tmp_path, pool, path=path, by="hash", column="q") == [0.3, 1, 0.3, 0, 0.3]


# What must not matter, and what must.


def test_order_and_pieces_of_files_do_not_matter(tmp_path: Path, pool: Pool) -> None:
    rows = [{"id": n, "q": k} for k, n in enumerate(NAMES)]
    (tmp_path / "pieces").mkdir()
    jsonl(tmp_path / "pieces" / "1.jsonl", rows[3:])
    jsonl(tmp_path / "pieces" / "2.jsonl", rows[:3][::-1])
    assert scores(tmp_path, pool, path=str(tmp_path / "pieces"), column="q") == [0, 1, 2, 3, 4]
    mixed = pool.at([4, 0, 2, 1, 3])
    assert scores(tmp_path / "mixed", mixed, path=str(tmp_path / "pieces"), column="q") == [4, 0, 2, 1, 3]


def test_another_file_at_the_same_path_is_read_anew(tmp_path: Path, pool: Pool) -> None:
    path = jsonl(tmp_path / "v.jsonl", [{"id": n, "q": 1} for n in NAMES])
    assert scores(tmp_path, pool, path=path, column="q") == [1] * 5
    jsonl(tmp_path / "v.jsonl", [{"id": n, "q": 2} for n in NAMES])
    assert scores(tmp_path, pool, path=path, column="q") == [2] * 5


def test_a_study_names_the_file_relative_to_itself(tmp_path: Path) -> None:
    for name in ("one", "two", "three", "four"):
        (tmp_path / f"{name}.txt").write_text("a")
    (tmp_path / "study.toml").write_text(
        'methods = [{name = "verdict", path = "one.txt", means = "keep"}]\n'
        'filters = [{name = "verdict", path = "two.txt", means = "keep"}]\n'
        '[[arms]]\nname = "x"\nmethod = {name = "verdict", path = "three.txt", means = "keep"}\n'
        'filters = [{method = {name = "verdict", path = "four.txt", means = "keep"}, preset = "keep"}]\n'
        '[pool]\npath = "pool.jsonl"\n[target]\npath = "target.jsonl"\n'
    )
    chosen = load(tmp_path / "study.toml")
    named = [chosen.methods[0]["path"], chosen.filters[0]["path"], chosen.arms[0].method["path"]]
    named.append(chosen.arms[0].filters[0]["method"]["path"])
    assert named == [str(tmp_path / f"{name}.txt") for name in ("one", "two", "three", "four")]
    assert parse(chosen.filters[0]).bounds == {"score": (0.5, None)}


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ("a pickle was opened",))


def test_bad_files_are_refused_with_the_place(tmp_path: Path, pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    def said(content: bytes | list[Any], name: str = "v.jsonl", **options: Any) -> str:
        file = tmp_path / name
        file.write_bytes(content) if isinstance(content, bytes) else jsonl(file, content)
        with pytest.raises(InputError) as caught:
            scores(tmp_path, pool, path=str(file), **options)
        return str(caught.value)

    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    bomb = (tmp_path / "bomb.npy").read_bytes()
    assert "not an array of uids" in said(bomb, "bomb.npy") and "a pickle was opened" not in capfd.readouterr().out
    for array in (np.arange(4.0), np.zeros((2, 2), dtype="u8,u8"), np.zeros(2, dtype="u8,u8,u8")):
        np.save(tmp_path / "other.npy", array)
        assert "not an array of uids" in said((tmp_path / "other.npy").read_bytes(), "other.npy")
    assert "not an array of uids" in said(b"PK\x03\x04 nonsense", "z.npy")
    np.save(tmp_path / "huge.npy", np.zeros(3, dtype="u8,u8"))
    boast = (tmp_path / "huge.npy").read_bytes().replace(b"(3,), }", b"(9999999999999,), }", 1)
    assert "not an array of uids" in said(boast, "huge.npy")
    assert "row 2" in said(b'{"id": "a", "q": 1}\n{"id": "b", \n', column="q")
    assert "row 1" in said([{"id": None, "q": 1}], column="q")
    assert "must be a number" in said([{"id": "a", "q": "high"}], column="q")
    assert "must be a number" in said([{"id": "a", "q": [1]}], column="q")
    assert "line is not JSON" in said(b'{"id": "a", "q": NaNN}\n', column="q")
    assert "must be a number" in said(b'{"id": "a", "q": NaN}\n', column="q")
    spans = [[[0, 5]], [[5, 0, 1.0]], [["a", 1, 2]], "x", [[0, 5, None]]]
    for bad in spans:
        assert "must be spans" in said([{"id": "a", "attributes": {"q": bad}}])
    assert "two verdicts on id 'a'" in said([{"id": "a", "q": 1}, {"id": "a", "q": 0}], column="q")
    assert "no column of ids" in said([{"name": "a"}], means="keep")
    assert "did you mean 'docid'" in said([{"docid": "a"}], means="keep", key="dociid")
    assert "no column of text to hash" in said([{"id": "a"}], means="keep", by="hash")
    assert "truncated or corrupt" in said(gzip.compress(b'{"id": "a"}\n' * 99)[:-9], "v.jsonl.gz", means="keep")
    with pytest.raises(InputError, match="no such file"):
        scores(tmp_path, pool, path=str(tmp_path / "none.npy"))
    with pytest.raises(InputError, match="verdict has no file"):
        scores(tmp_path, pool)


def test_the_same_verdict_twice_is_no_conflict(tmp_path: Path, pool: Pool) -> None:
    path = jsonl(tmp_path / "v.jsonl", [{"id": n, "q": 1} for n in [*NAMES, *NAMES]])
    assert scores(tmp_path, pool, path=path, column="q") == [1] * 5


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("held", [[None, 0.5], [0.5, None], [None, 0.5, None, 0.5]])
def test_a_key_with_no_value_is_no_verdict(tmp_path: Path, pool: Pool, held: list[Any], pieces: int) -> None:
    """Before the number or behind it, in one file or another."""
    (tmp_path / "v").mkdir()
    rows = [{"id": "a", "q": value} for value in held]
    rest = [{"id": n, "q": 1} for n in NAMES[1:]]
    for piece in range(pieces):
        jsonl(tmp_path / "v" / f"{piece}.jsonl", rows[piece::pieces] + rest)
    assert scores(tmp_path, pool, path=str(tmp_path / "v"), column="q") == [0.5, 1, 1, 1, 1]
    jsonl(tmp_path / "v" / "last.jsonl", [{"id": "a", "q": None}, {"id": "a", "q": 0.25}])
    with pytest.raises(InputError, match="two verdicts on id 'a'"):
        scores(tmp_path, pool, path=str(tmp_path / "v"), column="q")


# Ours in their forms, and back.


@pytest.fixture
def chosen() -> tuple[Pool, Selection]:
    """Ids are those of contents; the text has a line break and characters beyond ASCII."""
    texts = [*TEXTS, "déjà vu\nin two lines", "emoji 🙂"]
    rows = {"text": texts, "domain": ["x"] * 7, "source": ["d/one.jsonl.gz"] * 4 + ["d/two.parquet"] * 3}
    pool = Pool.from_columns({**rows, "source_row": list(range(7))})
    return pool, Selection(pool.ids[[5, 1, 6]], np.array([1.0, 2.0, 1.0]), {"below the cut": pool.ids[[0, 2, 3, 4]]})


@pytest.mark.parametrize("form", list(ship.FORMS))
def test_what_is_exported_is_read_back(tmp_path: Path, chosen: tuple[Pool, Selection], form: str) -> None:
    pool, selection = chosen
    files = ship.write(form, tmp_path / "out", pool, selection, "bm25")
    again = ship.write(form, tmp_path / "again", pool, selection, "bm25")
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again], "the same bytes each time"
    path = str(tmp_path / "out" / ("attributes" if form == "dolma" else files[0].name))
    options = {"ids": {"means": "keep"}, "curator": {"format": "curator"}}.get(form, {})
    found = table(tmp_path, pool, path=path, **options)
    kept = pool.ids[found.column("score") >= 0.5]
    assert sorted(decode_ids(kept)) == sorted(decode_ids(selection.ids))


def test_the_forms_are_those_of_the_programs(tmp_path: Path, chosen: tuple[Pool, Selection]) -> None:
    pool, selection = chosen

    def lines(file: Path) -> list[Any]:
        return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]

    (file,) = ship.write("datatrove", tmp_path / "t", pool, selection)
    assert [row["id"] for row in lines(file)] == decode_ids(selection.ids) and file.name == "00000.jsonl.gz"
    assert lines(file)[1] == {
        "text": TEXTS[1], "id": decode_ids(pool.ids)[1],
        "metadata": {"domain": "x", "source": "d/one.jsonl.gz", "source_row": 1, "weight": 2.0},
    }  # fmt: skip
    one, two = ship.write("dolma", tmp_path / "d", pool, selection, "bm25")
    assert one == tmp_path / "d" / "attributes" / "assay_bm25" / "d" / "one.jsonl.gz" and two.name == "two.jsonl.gz"
    assert [row["id"] for row in [*lines(one), *lines(two)]] == decode_ids(pool.ids), "every document, in its order"
    assert lines(one)[0]["attributes"] == {"assay__bm25__keep": [[0, 10, 0.0]]}
    assert lines(two)[1]["attributes"] == {"assay__bm25__keep": [[0, len("déjà vu\nin two lines"), 1.0]]}
    (file,) = ship.write("curator", tmp_path / "c", pool, selection)
    assert pq.read_table(file)["id"].to_pylist() == decode_ids(pool.ids[[0, 2, 3, 4]])
    (file,) = ship.write("datacomp", tmp_path / "u", pool, selection, "bm25")
    array = np.load(file, allow_pickle=False)
    assert array.dtype == np.dtype("u8,u8") and array.tolist() == sorted(array.tolist()) and len(array) == 3


def test_files_that_differ_in_their_ending_have_attributes_of_their_own(tmp_path: Path) -> None:
    sources = ["d/x.jsonl", "d/x.jsonl.gz", "d/x.parquet", "d/x-2.jsonl", "y.csv", "y.tsv"]
    rows = {"id": [f"{k}" for k in range(12)], "text": [f"text {k}" for k in range(12)], "source": sources * 2}
    pool = Pool.from_columns(rows)
    files = ship.write("dolma", tmp_path, pool, Selection(pool.ids[:3], np.ones(3), {}), "x")
    assert len({*files}) == 6
    held = [[json.loads(line) for line in gzip.decompress(f.read_bytes()).splitlines()] for f in files]
    assert [[row["id"] for row in rows] for rows in held] == [[f"{k}", f"{k + 6}"] for k in range(6)]
    names = {rows[0]["source"]: str(f.relative_to(tmp_path / "attributes" / "assay_x")) for f, rows in
             zip(files, held, strict=True)}  # fmt: skip
    assert names == {
        "d/x.jsonl": "d/x-3.jsonl.gz", "d/x.jsonl.gz": "d/x.jsonl.gz", "d/x.parquet": "d/x-4.jsonl.gz",
        "d/x-2.jsonl": "d/x-2.jsonl.gz", "y.csv": "y.jsonl.gz", "y.tsv": "y-2.jsonl.gz",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["two\nlines", "two\rlines", " before", "after\u00a0"])
def test_ids_that_no_line_can_hold_are_refused(tmp_path: Path, name: str) -> None:
    pool = Pool.from_columns({"id": ["a", name], "text": ["s", "t"]})
    with pytest.raises(InputError, match="cannot stand on a line of its own"):
        ship.write("ids", tmp_path, pool, Selection.everything(pool.ids))
    ship.write("curator", tmp_path, pool, Selection(pool.ids[:1], np.ones(1), {}))
    assert scores(tmp_path, pool, path=str(tmp_path / "part.0.parquet"), format="curator") == [1, 0]


def test_metadata_without_a_word_in_json_is_left_out(tmp_path: Path) -> None:
    pool = Pool.from_columns({"id": ["a", "b", "c"], "text": list("stu"), "q": [float("nan"), 0.5, float("inf")]})
    (file,) = ship.write("datatrove", tmp_path, pool, Selection.everything(pool.ids))

    def refused(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    held = [json.loads(line, parse_constant=refused)["metadata"] for line in lines]
    assert held == [{"weight": 1.0}, {"q": 0.5, "weight": 1.0}, {"weight": 1.0}]


def test_what_cannot_be_told_is_refused(tmp_path: Path, pool: Pool) -> None:
    selection = Selection.everything(pool.ids)
    with pytest.raises(InputError, match="is no uid"):
        ship.write("datacomp", tmp_path, pool, selection)
    with pytest.raises(InputError, match="did you mean 'dolma'"):
        ship.write("dolmaa", tmp_path, pool, selection)
    bare = Pool.bare(encode_ids(NAMES))
    with pytest.raises(InputError, match="no text, which dolma asks for"):
        ship.write("dolma", tmp_path, bare, selection)
    hostile = Pool.from_columns({"id": ["a"], "text": ["t"], "source": ["../../etc/x.jsonl"]})
    (file,) = ship.write("dolma", tmp_path / "h", hostile, Selection.everything(hostile.ids))
    assert (tmp_path / "h") in file.resolve().parents, "a name in the data leads nowhere else"
