"""Readers: the same rows whatever the format, a reason for each bad row, one clear error for each bad file."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from assay.core.errors import InputError
from assay.data.readers import Rejected, Source, files, fingerprint, read, sniff

ROWS = [
    {
        "text": f'document {i}, with ümlauts,\n"quotes" and\ttabs' + "x" * (i % 5),
        "uid": i + 1,
        "domain": ["web", "code", None][i % 3],
        "score": i / 4,
        "label": ["a", "b"][i % 2],
        "good": i % 2 == 0,
        "vec": [float(i), 0.5],
    }
    for i in range(250)
]
KEEP = ("score", "label", "good", "vec")
MAPPED: dict[str, Any] = {"id": "uid", "keep": KEEP}
FORMATS = [
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "ndjson",
    "json",
    "parquet",
    "pq",
    "csv",
    "csv.gz",
    "tsv",
    "arrow",
    "saved",
]


def packed(path: Path, data: bytes) -> None:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)


def write(folder: Path, form: str, rows: list[dict[str, Any]], stem: str = "pool") -> Path:
    """`rows` in a format; "saved" is a directory as `datasets` saves it, with a stale file beside."""
    path = folder / f"{stem}.{form}"
    table = pa.Table.from_pylist(rows) if rows else pa.table({"text": pa.array([], pa.string())})
    if form in ("parquet", "pq"):
        pq.write_table(table, path, row_group_size=100)
    elif form == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=60)
    elif form == "saved":
        path.mkdir()
        names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
        half = (len(rows) + 1) // 2
        for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
            with pa.ipc.new_stream(str(path / name), table.schema) as writer:
                writer.write_table(part, max_chunksize=60)
        (path / "cache-123.arrow").write_bytes(b"stale")
        (path / "dataset_info.json").write_text("{}")
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    elif form.startswith(("csv", "tsv")):
        text = path.with_suffix(".tmp")
        with text.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, delimiter="," if form.startswith("csv") else "\t")
            writer.writerow(rows[0])
            writer.writerows([cell(v) for v in row.values()] for row in rows)
        packed(path, text.read_bytes())
        text.unlink()
    else:
        packed(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, bool)) else value


def collect(source: Source, batch_rows: int = 1024) -> tuple[list[dict[str, Any]], list[Rejected]]:
    rows, rejected = [], []
    for batch, bad in read(source, batch_rows=batch_rows):
        assert batch.num_rows <= batch_rows
        batch.validate(full=True)
        rows += batch.to_pylist()
        rejected += bad
    return rows, rejected


def lines(path: Path, *rows: object) -> Path:
    """A jsonl file; bytes are written as they are."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def reasons(source: Source) -> list[tuple[int, str]]:
    return [(row.row, row.reason) for row in collect(source)[1]]


# ---- the same rows from everywhere ----


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("batch_rows", [7, 1024])
def test_content_is_the_same_in_every_format(tmp_path: Path, form: str, batch_rows: int) -> None:
    path = write(tmp_path, form, ROWS)
    rows, rejected = collect(Source(paths=str(path), **MAPPED), batch_rows)
    assert not rejected
    expected = [
        {"text": r["text"], "id": str(r["uid"]), "domain": r["domain"] or ""} | {k: r[k] for k in KEEP} for r in ROWS
    ]
    assert [{k: v for k, v in r.items() if not k.startswith("source")} for r in rows] == expected
    if form != "saved":
        assert [(r["source"], r["source_row"]) for r in rows] == [(path.name, i + 1) for i in range(len(ROWS))]


@pytest.mark.parametrize("form", FORMATS)
def test_schema(tmp_path: Path, form: str) -> None:
    batch, _ = next(read(Source(paths=str(write(tmp_path, form, ROWS)), **MAPPED)))
    kinds = {"text": pa.string(), "id": pa.string(), "domain": pa.string(), "score": pa.float64(), "label": pa.string()}
    kinds |= {"good": pa.bool_(), "vec": pa.list_(pa.float64(), 2), "source": pa.string(), "source_row": pa.int64()}
    assert {field.name: field.type for field in batch.schema} == kinds


def test_memory_url() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/readers/a/pool.jsonl", b'{"text": "one"}\n')
    fs.pipe("/readers/b/pool.csv", b"text\ntwo\n")
    fs.pipe("/readers/b/notes.txt", b"no data")
    try:
        for paths in ("memory://readers", "memory://readers/*", "memory://readers/**/pool.*"):
            rows, _ = collect(Source(paths=paths))
            assert [(r["text"], r["source"]) for r in rows] == [("one", "a/pool.jsonl"), ("two", "b/pool.csv")]
        assert len(fingerprint(Source(paths="memory://readers"))) == 32
        with pytest.raises(InputError, match="did you mean 'pool.jsonl'"):
            files(Source(paths="memory://readers/a/pol.jsonl"))
    finally:
        fs.rm("/readers", recursive=True)


def test_files_are_sorted_and_hidden_ones_skipped(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", ".dir/x.jsonl", "sub/c.jsonl", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines(tmp_path / name, {"text": name})
    found = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl")]
    assert files(Source(paths=str(tmp_path))) == found
    assert files(Source(paths=f"{tmp_path}/**/*.jsonl")) == found
    assert files(Source(paths=(found[1], f"{tmp_path}/*.jsonl"))) == found[:2]
    rows, _ = collect(Source(paths=str(tmp_path)))
    assert [row["source"] for row in rows] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    jsonl, table = tmp_path / "a.jsonl", tmp_path / "b.csv"
    jsonl.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \r\n{"text": "two"}')
    table.write_bytes(b"\xef\xbb\xbftext\r\none\r\n\r\ntwo")
    for path, numbers in ((jsonl, [1, 4]), (table, [1, 2])):
        rows, rejected = collect(Source(paths=str(path)))
        assert [row["text"] for row in rows] == ["one", "two"] and not rejected
        assert [row["source_row"] for row in rows] == numbers


def test_a_long_csv_field_and_the_global_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows, _ = collect(Source(paths=str(write(tmp_path, "csv", [{"text": "x" * 500_000}]))))
    assert len(rows[0]["text"]) == 500_000 and csv.field_size_limit() == before


def test_a_line_beyond_all_limits_is_cut_and_the_next_is_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "x" * (2**24 + 200)}, {"text": "short"})
    rows, rejected = collect(Source(paths=str(path), max_chars=10))
    assert [row["text"] for row in rows] == ["short"]
    assert "line is longer than" in rejected[0].reason and len(rejected[0].preview) == 120


def test_streaming_does_not_read_ahead(tmp_path: Path) -> None:
    good = [{"text": f"{i:06d}" + os.urandom(500).hex()} for i in range(3000)]
    path = write(tmp_path, "jsonl.gz", good)
    path.write_bytes(path.read_bytes()[:-1000])
    batches = read(Source(paths=str(path)), batch_rows=10)
    assert next(batches)[0].num_rows == 10  # the damage at the end is not seen yet
    with pytest.raises(InputError, match=r"after line 2\d\d\d"):
        list(batches)


# ---- bad rows ----


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": "x"', "line is not JSON: "),
        (b"[" * 100_000, "line is not JSON: "),
        (b'{"text": ' + b"9" * 5000 + b"}", "line is not JSON: "),
        (b"[1]", "not a JSON object (list)"),
        (b'{"text": "ab\xff"}', "not UTF-8 (byte 0xff at position 12)"),
        ({"body": "x"}, "no column 'text'"),
        ({"text": 3}, "text is not a string (int)"),
        ({"text": ["x"]}, "text is not a string (list)"),
        ({"text": None}, "null text"),
        ({"text": ""}, "empty text"),
        ({"text": " \n\t\u00a0"}, "empty text"),
        ({"text": "a\0b"}, "text contains NUL bytes"),
        ({"text": "x" * 101}, "text of 101 characters exceeds max_chars=100; split the document"),
        (b'{"text": "\\ud800 alone"}', "text has lone surrogates"),
    ],
)
def test_reasons_in_jsonl(tmp_path: Path, row: object, reason: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "before"}, row, {"text": "\U0001f600 after"})
    rows, rejected = collect(Source(paths=str(path), max_chars=100))
    assert [r["text"] for r in rows] == ["before", "\U0001f600 after"]
    (bad,) = rejected
    assert bad.reason.startswith(reason) and (bad.row, bad.where) == (2, str(path))
    assert len(bad.preview) <= 120 and bad.preview.isprintable()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"only", "row has 1 fields, the header has 2"),
        (b"a,b,c", "row has 3 fields, the header has 2"),
        (b"a\xff,b", "not UTF-8 (byte 0xff at position 1)"),
        (b",b", "empty text"),
        (b"a\0b,b", "text contains NUL bytes"),
        (b'"a"b,c', "not CSV: "),
        (b"x" * 101 + b",b", "text of 101 characters exceeds max_chars=100; split the document"),
    ],
)
def test_reasons_in_csv(tmp_path: Path, record: bytes, reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,uid\n"two\nlines",1\n' + record + b"\nlast,3\n")
    rows, rejected = collect(Source(paths=str(path), id="uid", max_chars=100))
    assert [(r["text"], r["source_row"]) for r in rows] == [("two\nlines", 1), ("last", 3)]
    assert [r.row for r in rejected] == [2] and rejected[0].reason.startswith(reason)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_reasons_in_typed_files(tmp_path: Path, kind: Any, form: str) -> None:
    values = ["good", None, "  ", "a\0b", "x" * 101, "good"]
    table = pa.table({"text": pa.array(values, pa.string()).cast(kind)})
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    long = "text of 101 characters exceeds max_chars=100; split the document"
    expected = [(2, "null text"), (3, "empty text"), (4, "text contains NUL bytes"), (5, long)]
    assert reasons(Source(paths=str(path), max_chars=100)) == expected


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"a\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    rows, rejected = collect(Source(paths=f"{tmp_path}/a.parquet"))
    assert [r["text"] for r in rows] == ["fine"]
    assert [(r.row, r.reason) for r in rejected] == [(2, "not UTF-8 (byte 0xff at position 1)")]
    assert rejected[0].preview == "a\N{REPLACEMENT CHARACTER}"
    assert sniff(f"{tmp_path}/a.parquet")["rows"] == 2


def test_ids_and_domains(tmp_path: Path) -> None:
    values = [7, "seven", None, "", 1.5, True, {"a": 1}]
    rows = [{"text": "x", "uid": v, "site": v} for v in values] + [{"text": "x"}]
    got, rejected = collect(Source(paths=str(lines(tmp_path / "a.jsonl", *rows)), id="uid", domain="site"))
    assert [(r["id"], r["domain"]) for r in got] == [("7", "7"), ("seven", "seven")]
    assert [r.reason for r in rejected] == [
        *("no id", "no id", "id is not a string (float)", "id is not a string (bool)", "id is not a string (dict)"),
        "no id",
    ]
    got, rejected = collect(Source(paths=f"{tmp_path}/a.jsonl", domain="site"))
    assert [r["domain"] for r in got] == ["7", "seven", "", "", "1.5", "true", ""]
    assert [r.reason for r in rejected] == ["domain is not a string (dict)"]


def test_kept_columns_that_change(tmp_path: Path) -> None:
    rows = [{"text": "x", "n": 1, "v": [1, 2], "s": "a"} for _ in range(100)]
    odd = [
        {"n": "b"},
        {"v": [1]},
        {"v": [1, None]},
        {"n": 2**53 + 1},
        {"n": True},
        {"s": {"a": 1}},
        {"n": None, "s": 5},
    ]
    path = lines(tmp_path / "a.jsonl", *rows, *({"text": "x"} | row for row in odd))
    got, rejected = collect(Source(paths=str(path), keep=("n", "v", "s")))
    assert {k: got[-1][k] for k in ("n", "v", "s")} == {"n": None, "v": None, "s": "5"} and len(got) == 101
    assert [r.reason for r in rejected] == [
        "column 'n' is not a number exact in float64 (b)",
        "column 'v' is not a list of 2 numbers ([1])",
        "column 'v' is not a list of 2 numbers ([1, None])",
        "column 'n' is not a number exact in float64 (9007199254740993)",
        "column 'n' is not a number exact in float64 (True)",
        "column 's' is not a string (dict)",
    ]


def test_kept_list_lengths_in_parquet(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "v": pa.array([[1.0, 2.0], [3.0], None], pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "a.parquet")
    rows, rejected = collect(Source(paths=f"{tmp_path}/a.parquet", keep=("v",)))
    assert [r["v"] for r in rows] == [[1.0, 2.0], None]
    assert [(r.row, r.reason) for r in rejected] == [(2, "column 'v' is not a list of 2 numbers ([3.0])")]


def test_images(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.png").write_bytes(b"png")
    (tmp_path / "img/empty.png").write_bytes(b"")
    values = ["img/a.png", "img/b.png", "img/empty.png", None, 5, "http://x/y.png", "img"]
    path = lines(tmp_path / "a.jsonl", *({"img": v, "n": 1} for v in values))
    rows, rejected = collect(Source(paths=str(path), text=None, image="img"))
    assert [(r["image"], r["source_row"]) for r in rows] == [(b"png", 1)] and "text" not in rows[0]
    assert [r.reason.split(":")[0] for r in rejected] == [
        *("file not found", "empty image", "null image", "image is neither bytes nor a path (int)"),
        *("image is a URL, not a file beside its table", "image cannot be read (Is a directory)"),
    ]
    before = fingerprint(Source(paths=str(path), text=None, image="img"))
    (tmp_path / "img/a.png").write_bytes(b"pnG")
    assert fingerprint(Source(paths=str(path), text=None, image="img")) != before
    structs = [{"bytes": b"png", "path": None}, {"bytes": None, "path": "img/a.png"}]
    for name, column in (("s", structs), ("b", [b"png", b""])):
        pq.write_table(pa.table({"img": column}), tmp_path / f"{name}.parquet")
    rows, _ = collect(Source(paths=f"{tmp_path}/s.parquet", text=None, image="img"))
    assert [r["image"] for r in rows] == [b"png", b"pnG"]
    assert reasons(Source(paths=f"{tmp_path}/b.parquet", text=None, image="img")) == [(2, "empty image")]


# ---- bad files ----


def cut(path: Path, keep: float = 0.6) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def noise(path: Path) -> Path:
    path.write_bytes(bytes(range(256)) * 4)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: write(d, "csv", ROWS).with_name("pol.csv"), "no such file(.|\n)*did you mean 'pool.csv'"),
    "no directory": (lambda d: d / "nowhere/pool.csv", "no such file(.|\n)*there is no directory"),
    "suffix": (lambda d: put(d / "a.jsnl", b"{}"), r"unknown kind of file(.|\n)*did you mean '.jsonl'"),
    "packed parquet": (lambda d: put(d / "a.parquet.gz", b"x"), "unknown kind of file"),
    "suffixes of a glob": (lambda d: put(d / "a.txt", b"x").with_name("*.txt"), "unknown kind of file"),
    "empty directory": (lambda d: folder(d / "empty"), "no data files in this directory"),
    "empty glob": (lambda d: d / "*.jsonl", "no file matches"),
    "no rows": (lambda d: put(d / "a.jsonl", b"\n\n"), "hold no rows"),
    "empty csv": (lambda d: put(d / "a.csv", b""), "hold no rows"),
    "header only": (lambda d: put(d / "a.csv", b"text\n"), "hold no rows"),
    "empty parquet table": (lambda d: write(d, "parquet", []), "hold no rows"),
    "cut gzip": (lambda d: cut(write(d, "jsonl.gz", ROWS)), r"truncated or corrupt(.|\n)*pool.jsonl.gz \(after line "),
    "cut zstd": (
        lambda d: cut(write(d, "jsonl.zst", ROWS)),
        r"truncated or corrupt(.|\n)*pool.jsonl.zst \(after line ",
    ),
    "cut csv.gz": (lambda d: cut(write(d, "csv.gz", ROWS)), r"truncated or corrupt(.|\n)*\(after row "),
    "cut parquet": (lambda d: cut(write(d, "parquet", ROWS)), "truncated or corrupt(.|\n)*pool.parquet"),
    "cut arrow": (lambda d: cut(write(d, "arrow", ROWS)), "truncated or corrupt(.|\n)*pool.arrow"),
    "cut saved": (
        lambda d: cut(write(d, "saved", ROWS) / "data-00001-of-00002.arrow").parent,
        r"truncated or corrupt(.|\n)*data-00001-of-00002.arrow \(after row \d+",
    ),
    **{
        f"noise {s}": ((lambda d, s=s: noise(d / f"a.{s}")), "truncated or corrupt")
        for s in ("jsonl.gz", "csv.zst", "parquet", "arrow")
    },
    "empty parquet": (lambda d: put(d / "a.parquet", b""), "truncated or corrupt"),
    "lost part": (
        lambda d: ((p := write(d, "saved", ROWS)) / "data-00000-of-00002.arrow").unlink() or p,
        "no such file",
    ),
    "bad state": (lambda d: put(write(d, "saved", ROWS) / "state.json", b"{").parent, "truncated or corrupt"),
    "jsonl column": (lambda d: write(d, "jsonl", [{"txet": "x"}] * 9), "no column 'text'(.|\n)*did you mean 'txet'"),
    "csv column": (lambda d: write(d, "csv", [{"txet": "x"}] * 9), "no column 'text'(.|\n)*did you mean 'txet'"),
    "parquet column": (
        lambda d: write(d, "parquet", [{"txet": "x"}] * 9),
        "no column 'text'(.|\n)*did you mean 'txet'",
    ),
    "arrow column": (lambda d: write(d, "saved", [{"txet": "x"}] * 9), "no column 'text'(.|\n)*did you mean 'txet'"),
    "parquet type": (lambda d: write(d, "parquet", [{"text": 5}]), "cannot be the text(.|\n)*int64"),
    "twice in csv": (lambda d: put(d / "a.csv", b"text,text\na,b\n"), "two columns are called 'text'"),
    "header bytes": (lambda d: put(d / "a.csv", b"text,\xff\na,b\n"), "header cannot be read"),
    "header quotes": (lambda d: put(d / "a.csv", b'"text"x,b\na,b\n'), "header cannot be read"),
    "utf-16": (lambda d: put(d / "a.csv", "text\nx\n".encode("utf-16")), "UTF-16"),
    "array": (lambda d: put(d / "a.json", json.dumps(ROWS, indent=1).encode()), "one JSON document"),
    "no such protocol": (lambda d: "memry://a.jsonl", "unknown kind of URL(.|\n)*did you mean 'memory'"),
    "nothing": (lambda d: (), "no paths were given"),
    "empty path": (lambda d: "", "an empty path"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    make, message = BAD_FILES[case]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        collect(Source(paths=path if isinstance(path, tuple) else str(path)))
    assert caught.value.where


def test_corrupt_parquet_page(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [{"text": os.urandom(500).hex()} for _ in range(200)])
    data = bytearray(path.read_bytes())
    data[60_000:90_000] = bytes(30_000)
    path.write_bytes(data)
    with pytest.raises(InputError, match="truncated or corrupt"):
        collect(Source(paths=str(path)))


def test_corrupt_arrow_offsets(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["one", "two", "three"]})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    data, offsets = path.read_bytes(), b"".join(i.to_bytes(4, "little") for i in (0, 3, 6, 11))
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, offsets[:4] + b"\xff\xff\xff\x6f" + offsets[8:]))
    with pytest.raises(InputError, match="truncated or corrupt"):
        collect(Source(paths=str(path)))


@pytest.mark.parametrize("state", [b'{"_data_files": [{"x": 1}]}', b'{"_data_files": 7}'])
def test_a_state_file_of_another_kind(tmp_path: Path, state: bytes) -> None:
    put(tmp_path / "state.json", state)
    with pytest.raises(InputError, match="bad _data_files"):
        files(Source(paths=str(tmp_path)))


@pytest.mark.parametrize("mapping", [{"id": "uidd"}, {"domain": "domane"}, {"keep": ("scores",)}, {"image": "vecs"}])
def test_every_mapped_column_is_looked_for(tmp_path: Path, mapping: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="did you mean"):
        read(Source(paths=str(write(tmp_path, "jsonl", ROWS)), **mapping))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"text": None}, "neither a text nor an image"),
        ({"keep": ("source",)}, "cannot keep column 'source'"),
        ({"keep": ("score", "score")}, "cannot keep column 'score'"),
        ({"max_chars": 0}, "max_chars must be positive"),
    ],
)
def test_mappings_that_cannot_work(tmp_path: Path, mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(Source(paths=str(write(tmp_path, "jsonl", ROWS)), **mapping))


def test_a_column_that_changes_between_files(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"text": "x", "n": 1, "v": [1.0]})
    lines(tmp_path / "b.jsonl", {"text": "x", "n": "one", "v": [1.0, 2.0]})
    rows, _ = collect(Source(paths=str(tmp_path), keep=("n",)))
    assert [r["n"] for r in rows] == ["1", "one"]  # as strings
    with pytest.raises(InputError, match="column 'v' changes its type(.|\n)*b.jsonl"):
        read(Source(paths=str(tmp_path), keep=("v",)))


def test_several_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, "saved", ROWS[:4], stem=split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train.saved", "test.saved"]}')
    with pytest.raises(InputError, match="several splits(.|\n)*name one: .*train.saved"):
        files(Source(paths=str(tmp_path)))
    assert len(collect(Source(paths=f"{tmp_path}/train.saved"))[0]) == 4


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "csv", ROWS)
    monkeypatch.setattr(type(fsspec.filesystem("file")), "_open", refuse)  # chmod does not stop root
    for call in (read, fingerprint):
        with pytest.raises(InputError, match="permission denied(.|\n)*pool.csv"):
            call(Source(paths=str(path)))


# ---- the hub ----


def test_hub_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'assay-data\[hf\]'"):
        read(Source(paths="hf://owner/name"))


def test_hub_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match="cannot reach the data(.|\n)*no route"):
        read(Source(paths="hf://owner/name"))


def test_hub_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def with_format(self, kind: str) -> Stream:
            assert kind == "arrow"
            return self

        def iter(self, batch_size: int) -> Any:
            yield from (pa.Table.from_pylist(ROWS[i : i + batch_size]) for i in range(0, len(ROWS), batch_size))

    def load_dataset(name: str, *, streaming: bool, split: str) -> Stream:
        assert (name, streaming, split) == ("owner/name", True, "test")
        return Stream()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows, rejected = collect(Source(paths="hf://owner/name?split=test", **MAPPED), 64)
    assert [r["text"] for r in rows] == [r["text"] for r in ROWS] and not rejected
    assert sniff("hf://owner/name?split=test")["rows"] is None


# ---- fingerprint, sniff ----


def test_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", ROWS)
    source = Source(paths=str(path))
    first = fingerprint(source)
    assert first == fingerprint(source) and len(first) == 32
    moved = folder(tmp_path / "moved") / "other.jsonl"
    moved.write_bytes(path.read_bytes())
    assert fingerprint(Source(paths=str(moved))) == first
    for change in ({"text": "label"}, {"id": "uid"}, {"keep": ("score",)}, {"max_chars": 9}):
        assert fingerprint(dataclasses.replace(source, **change)) != first
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert fingerprint(source) != first


def test_fingerprint_sees_where_files_end(tmp_path: Path) -> None:
    found = set()
    for i, (a, b) in enumerate([(b"xy", b"z"), (b"x", b"yz")]):
        here = folder(tmp_path / str(i))
        put(here / "a.jsonl", a)
        put(here / "b.jsonl", b)
        found.add(fingerprint(Source(paths=str(here))))
    assert len(found) == 2


@pytest.mark.parametrize("form", FORMATS)
def test_sniff(tmp_path: Path, form: str) -> None:
    found = sniff(str(write(tmp_path, form, ROWS)))
    assert found["columns"] == list(ROWS[0])
    assert (found["text"], found["id"], found["domain"]) == ("text", "uid", "domain")
    assert len(found["examples"]["text"]) == 3 and found["examples"]["label"][0] == "a"
    assert 125 <= found["rows"] <= 500 and found["files"] == (2 if form == "saved" else 1)


def test_sniff_counts_a_short_file(tmp_path: Path) -> None:
    assert sniff(str(write(tmp_path, "csv", ROWS[:20])))["rows"] == 20
