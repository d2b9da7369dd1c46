"""Whatever a user can get wrong: one clear message and status 2, or a row set aside with its reason; never a traceback."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from assay import cli
from assay.core.errors import InputError
from assay.core.pool import Pool, PoolWriter

WORDS = "the a cat dog tree sees runs under over green small code model learns fast".split()
FAST = [
    *("--budget", "50%", "--workers", "1", "--quiet", "--set", "verify.seeds=2", "--set", "verify.random=1"),
    *("--set", "train.steps=2", "--set", "task.width=16", "--set", "task.layers=1", "--set", "task.vocab=280"),
]
FILES = ["run", "--pool", "p.jsonl", "--target", "t.jsonl", "--out", "d"]
RUN = [*FILES, "--methods", "random,length", *FAST]


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    texts = [f"{seed} {i} " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(15, 25))) for i in range(count)]
    return [{"text": text, "uid": f"{seed}-{i}", "domain": "ab"[i % 2]} for i, text in enumerate(texts)]


def lines(found: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in found)


POOL, TARGET = rows(60, 1), rows(12, 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good pool `p.jsonl` and a good target `t.jsonl`."""
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_bytes(lines(POOL))
    Path("t.jsonl").write_bytes(lines(TARGET))
    return tmp_path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`assay` in this process: (status, standard output, standard error)."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["assay", *args])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


class Case(NamedTuple):
    """What is spoiled, what is run, and what the message must say."""

    name: str
    spoil: Callable[[], Any]
    args: list[str]
    says: list[str]


def put(path: str, content: bytes | str | list[Any]) -> Callable[[], Any]:
    data = lines(content) if isinstance(content, list) else content.encode() if isinstance(content, str) else content
    return lambda: Path(path).write_bytes(data)


def nothing() -> None:
    pass


def run(*args: str) -> list[str]:
    """The standard command with options changed: a later one wins."""
    return [*RUN, *args]


def truncated_parquet() -> None:
    pq.write_table(pa.Table.from_pylist(POOL), "p.parquet")
    Path("p.parquet").write_bytes(Path("p.parquet").read_bytes()[:-40])


def made_by(study: dict[str, Any], **about: Any) -> Callable[[], None]:
    def make() -> None:
        Path("d/steps/read-pool-0").mkdir(parents=True)
        Path("d/steps/read-pool-0/step.json").write_text("{}")
        Path("d/study.json").write_text(json.dumps({"format": 1, "study": study, **about}))

    return make


def with_tree() -> None:
    Path("d").mkdir()
    Path("d/thesis.tex").write_text("years of work")


STUDY = (
    'name = "s"\nbudget = "50%"\nmethods = ["random", "length"]\n[pool]\npath = "p.jsonl"\n[target]\npath = "t.jsonl"\n'
)


def study(extra: str, drop: str = "") -> Callable[[], Any]:
    return put("s.toml", STUDY.replace(drop, "") + extra if drop else STUDY + extra)


S = ["run", "s.toml", "--out", "d", *FAST[2:]]
GZ, ZST = gzip.compress(lines(POOL)), zstandard.compress(lines(POOL))
LONG = lines(POOL)[:-30]

FILE_CASES = [
    Case("missing pool", nothing, run("--pool", "p.jsnl"), ["no such file", "where: p.jsnl", "did you mean 'p.jsonl'"]),
    Case("missing target", nothing, run("--target", "tt.jsonl"), ["no such file", "where: tt.jsonl", "'t.jsonl'"]),
    Case("missing directory", nothing, run("--pool", "data/p.jsonl"), ["no such file", "there is no directory"]),
    Case("empty glob", nothing, run("--pool", "*.csv"), ["no file matches", "*.csv", "quote it"]),
    Case("unknown suffix", put("p.docx", b"PK"), run("--pool", "p.docx"), ["unknown kind of file", "p.docx", ".jsonl"]),
    Case("truncated gzip", put("p.jsonl.gz", GZ[:-20]), run("--pool", "p.jsonl.gz"), ["truncated or corrupt", "p.jsonl.gz"]),
    Case("truncated zst", put("p.jsonl.zst", ZST[:-20]), run("--pool", "p.jsonl.zst"), ["truncated or corrupt", ".zst"]),
    Case("truncated parquet", truncated_parquet, run("--pool", "p.parquet"), ["truncated or corrupt", "p.parquet"]),
    Case("gzip by name only", put("p.jsonl.gz", LONG), run("--pool", "p.jsonl.gz"), ["truncated or corrupt", "gzip"]),
    Case("no column in the pool", nothing, run("--text-column", "txt"), ["no column 'txt'", "p.jsonl", "'text'"]),
    Case("no column in the target", nothing, run("--set", "target.text=txet"), ["no column 'txet'", "t.jsonl", "'text'"]),
    Case("no id column", nothing, run("--id-column", "uuid"), ["no column 'uuid'", "p.jsonl", "did you mean 'uid'"]),
    Case("no group column", nothing, run("--set", "target.group=grp"), ["no column 'grp'", "t.jsonl", "it has: text"]),
    Case("no domain column", nothing, run("--domain-column", "domian"), ["no column 'domian'", "mean 'domain'"]),
    Case("empty pool", put("p.jsonl", b""), RUN, ["hold no rows", "p.jsonl"]),
    Case("blank pool", put("p.jsonl", b"\n\n \n"), RUN, ["hold no rows", "p.jsonl"]),
    Case("empty target", put("t.jsonl", b""), RUN, ["hold no rows", "t.jsonl"]),
    Case("pool of empty texts", put("p.jsonl", [{"text": ""}] * 3), RUN, ["the pool is empty", "3 x empty text"]),
    Case("target of one row", put("t.jsonl", TARGET[:1]), RUN, ["cannot be split", "1 row", "at least 2"]),
    Case("target of equal rows", put("t.jsonl", TARGET[:1] * 3), RUN, ["cannot be split", "1 group", "at least 2"]),
    Case("target is the pool", nothing, run("--target", "p.jsonl"), ["60 of 60 target examples", "proves nothing"]),
    Case(
        "shared ids",
        put("t.jsonl", [{**row, "uid": POOL[i]["uid"]} for i, row in enumerate(TARGET)]),
        run("--id-column", "uid", "--set", "target.id=uid"),
        ["12 ids stand in both", "'1-0'", "proves nothing", "remove them"],
    ),
    Case("unknown domain", nothing, ["plan", "demo:text", "--set", "target.builtin=dosc"], ["target.builtin", "'docs'"]),
    Case("too many bad rows", put("p.jsonl", lines(POOL) + b"oops\n" * 30), RUN,
         ["30 of 90 rows of the pool are bad (33%)", "30 x line is not JSON", "row 61", "--set pool.max_bad=0.34"]),
    Case("too many bad target rows", put("t.jsonl", lines(TARGET) + b"oops\n" * 30), RUN,
         ["30 of 42 rows of the target", "--set target.max_bad="]),
    Case("JSON array", put("p.json", b"[\n" + b'{"text": "a"},\n' * 9), run("--pool", "p.json"), ["one JSON document", "jq"]),
    Case("UTF-16", put("p.jsonl", lines(POOL).decode().encode("utf-16")), RUN, ["UTF-16", "p.jsonl", "iconv"]),
]  # fmt: skip

OPTION_CASES = [
    Case("budget zero", nothing, run("--budget", "0"), ["budget '0'", "above zero"]),
    Case("budget zero percent", nothing, run("--budget", "0%"), ["budget '0%'", "above zero"]),
    Case("budget negative", nothing, run("--budget", "-5%"), ["budget '-5%'", "above zero"]),
    Case("budget over the pool", nothing, run("--budget", "5Mtok"), ["comes to 5,000,000 tokens", "at most the"]),
    Case("budget of more than all", nothing, run("--budget", "150%"), ["budget '150%'", "at most 100%"]),
    Case("budget garbage", nothing, run("--budget", "lots"), ["unreadable budget 'lots'", "'10%'"]),
    Case("budget empty", nothing, run("--budget", ""), ["unreadable budget ''", "'10%'"]),
    Case("budget not a number", nothing, run("--budget", "nan%"), ["budget 'nan%'"]),
    Case("unknown method", nothing, run("--methods", "lenght"), ["unknown scorer 'lenght'", "did you mean 'length'"]),
    Case("no method", nothing, run("--methods", ""), ["unknown scorer ''", "known: "]),
    Case("method that is a path", nothing, run("--methods", "../length"), ["not a method: '../length'"]),
    Case("method with a slash", nothing, run("--methods", "a/length"), ["unknown scorer 'a/length'", "'length'"]),
    Case("method twice", nothing, run("--methods", "length,length"), ["two arms are called 'length'", "own name"]),
    Case("missing module", nothing, run("--methods", "mylab.rarity"), ["no module 'mylab.rarity'", "PYTHONPATH"]),
    Case("module without a method", nothing, run("--methods", "email.mime"), ["defines 0 methods", "email.mime"]),
    Case("unknown option of a method", nothing, run("--set", 'methods=[{name="bm25", k2=1}]'),
         ["'bm25' has no option 'k2'", "known: ", "k1"]),
    Case("option of the wrong type", nothing, run("--set", 'methods=[{name="bm25", k1="high"}]'),
         ["option 'k1' of 'bm25' cannot be 'high'", "it takes float >= 0"]),
    Case("infinite option", nothing, run("--set", 'methods=[{name="bm25", k1=inf}]'), ["k1 cannot be inf", "finite"]),
    Case("infinite recipe", nothing, run("--set", "train.recipe.lr=inf"), ["train.recipe.lr cannot be inf", "finite"]),
    Case("infinite repeats", nothing, run("--set", "train.repeats=inf"), ["train.repeats cannot be inf", "finite"]),
    Case("heads that do not fit", nothing, run("--set", "task.width=65"), ["width of 65", "4 heads", "multiple of 4"]),
    Case("methods not a list", nothing, run("--set", "methods=random"), ["methods cannot be 'random'", 'takes a list']),
    Case("set without a value", nothing, run("--set", "pool"), ["unreadable override 'pool'", "key.subkey=value"]),
    Case("set without a key", nothing, run("--set", "=3"), ["unreadable override '=3'", "key.subkey=value"]),
    Case("set with a gap", nothing, run("--set", "a..b=3"), ["unreadable override 'a..b=3'", "key.subkey=value"]),
    Case("set below a value", nothing, run("--set", "budget.x=3"), ["'budget' is not a table", "--set budget.x=3"]),
    Case("set half a list", nothing, run("--set", 'methods=["random"'), ["unreadable value", "close its quotes"]),
    Case("set unknown key", nothing, run("--set", "verify.seed=3"), ["unknown key 'verify.seed'", "mean 'seeds'"]),
    Case("set unknown deep key", nothing, run("--set", "train.recipe.lrr=3"), ["unknown key 'train.recipe.lrr'", "'lr'"]),
    Case("set wrong type", nothing, run("--set", "verify.seeds=many"), ["verify.seeds cannot be 'many'", "whole number"]),
    Case("set a path to a number", nothing, run("--set", "pool.path=3"), ["pool.path cannot be 3", "a string"]),
    Case("set a table to a number", nothing, run("--set", "pool=3"), ["pool cannot be 3", "a table of keys"]),
    Case("path that is not UTF-8", nothing, run("--pool", "p\udcff.jsonl"), ["pool.path is not UTF-8", "rename"]),
    Case("too few seeds", nothing, run("--set", "verify.seeds=1"), ["verify.seeds cannot be 1", "greater than or equal"]),
    Case("negative seed", nothing, run("--set", "seed=-1"), ["seed cannot be -1", "greater than or equal to 0"]),
    Case("arm that is a path", nothing, run("--set", 'arms=[{name="../../x", method="length"}]'),
         ["arms.0.name cannot be '../../x'", "without /"]),
    Case("unknown key of an arm", nothing, run("--set", 'arms=[{name="x", metod="length", method="bm25"}]'),
         ["unknown key 'arms.0.metod'", "did you mean 'method'"]),
    Case("classifier of text", nothing, run("--set", "task.kind=classifier"), ["does not fit the pool", "'text'"]),
    Case("no pool", nothing, ["run", "--target", "t.jsonl"], ["both --pool and --target", "assay init"]),
    Case("study and pool", study(""), ["run", "s.toml", "--pool", "p.jsonl"], ["--pool do not go with a study file"]),
    Case("unknown flag", nothing, run("--pol", "x"), ["No such option", "--pol"]),
    Case("unknown demo", nothing, ["demo", "txt"], ["no demo called 'txt'", "did you mean 'text'"]),
    Case("target of another demo", nothing, ["demo", "digits", "--target", "docs"], ["--target goes with the text demo"]),
]  # fmt: skip

STUDY_CASES = [
    Case("unknown key", study("[verfy]\nseeds = 2\n"), S, ["unknown key 'verfy'", "s.toml", "did you mean 'verify'"]),
    Case("misnamed table", study("[pol]\npath = 'x'\n", drop='[pool]\npath = "p.jsonl"\n'), S, ["'pol'", "mean 'pool'"]),
    Case("missing table", study("", drop='[pool]\npath = "p.jsonl"\n'), S, ["the study has no 'pool'", "s.toml"]),
    Case("wrong type", study("[verify]\nseeds = 'four'\n"), S[:4], ["verify.seeds cannot be 'four'", "whole number"]),
    Case("not TOML", put("s.toml", "pool: p.jsonl\n"), S, ["unreadable study", "s.toml", "line 1", "assay init"]),
    Case("a pool as the study", nothing, ["run", "p.jsonl"], ["unreadable study", "p.jsonl", "must be a TOML file"]),
    Case("binary study", put("s.toml", b"\xff\xfe\x00"), S, ["unreadable study", "s.toml"]),
    Case("study is a directory", lambda: Path("s.toml").mkdir(), S, ["unreadable study", "s.toml", "directory"]),
    Case("missing study", study(""), ["run", "ss.toml"], ["no such study", "ss.toml", "did you mean 's.toml'"]),
    Case("path and builtin", put("s.toml", STUDY.replace("[target]", 'builtin = "python"\n[target]')),
         S, ["exactly one of path and builtin", "both are given", "drop one"]),
    Case("neither path nor builtin", put("s.toml", STUDY.replace('path = "p.jsonl"', "")), S, ["neither is given"]),
    Case("target of a builtin", put("s.toml", STUDY.replace('path = "t.jsonl"', 'builtin = "docs"')), S,
         ["[target] has no file", "target.path"]),
    Case("target of no kind", put("s.toml", STUDY.replace('path = "t.jsonl"', "")), S, ["path and domain", "neither"]),
    Case("a key that does nothing", put("s.toml", STUDY.replace("[target]", "size = 9\n[target]")), S,
         ["pool.size does nothing here", "drop pool.size"]),
    Case("builtin with a target file", put("s.toml", STUDY.replace('path = "p.jsonl"', 'builtin = "python"')), S,
         ["target.path does nothing here", "drop target.path"]),
    Case("missing domain", put("s.toml", STUDY.replace('path = "t.jsonl"', 'domain = "c"')), S, ["0 rows of domain 'c'", "a, b"]),
    Case("plan of a missing study", study(""), ["plan", "ss.toml"], ["no such study", "did you mean 's.toml'"]),
    Case("plan of an unknown demo", nothing, ["plan", "demo:txt"], ["no demo called 'txt'", "did you mean 'text'"]),
    Case("plan of a missing pool", put("s.toml", STUDY.replace("p.jsonl", "p.jsnl")), ["plan", "s.toml"],
         ["no such file", "p.jsnl", "did you mean 'p.jsonl'"]),
    Case("plan of an empty target", lambda: (study("")(), put("t.jsonl", b"")()), ["plan", "s.toml"], ["no rows", "t.jsonl"]),
    Case("init over a study", study(""), ["init", "p.jsonl", "--out", "s.toml"], ["there already", "s.toml", "--out"]),
    Case("init onto a directory", lambda: Path("x").mkdir(), ["init", "p.jsonl", "--out", "x"], ["it is a directory"]),
    Case("init nowhere", nothing, ["init", "p.jsonl", "--out", "x/s.toml"], ["cannot be written", "no directory x"]),
    Case("init of a missing pool", nothing, ["init", "p.jsnl"], ["no such file", "did you mean 'p.jsonl'"]),
    Case("init of an empty pool", put("p.jsonl", b""), ["init", "p.jsonl"], ["p.jsonl", "no rows"]),
    Case("init of numbers", put("p.jsonl", [{"x": 1}] * 3), ["init", "p.jsonl"], ["no column looks like text", "columns: x"]),
    Case("init of a broken pool", put("p.jsonl.gz", GZ[:50]), ["init", "p.jsonl.gz"], ["truncated or corrupt", "p.jsonl.gz"]),
    Case("init with a missing target", nothing, ["init", "p.jsonl", "--target", "tt.jsonl"], ["no such file", "'t.jsonl'"]),
]  # fmt: skip

DIRECTORY_CASES = [
    Case("out is a file", put("d", b"x"), RUN, ["cannot be written", "where: d", "d is a file", "--out"]),
    Case("out in a file", put("x", b"x"), run("--out", "x/d"), ["cannot be written", "x is a file", "--out"]),
    Case("not a run", with_tree, RUN, ["holds something else", "thesis.tex", "new --out"]),
    Case("another study", made_by({"seed": 7, "budget": "20%"}), RUN,
         ["run of another study", "budget: there '20%', now '50%'", "seed: there 7, now 0", "--replace"]),
    Case("older format", made_by({}, format=0), RUN, ["written in format 0", "reads format 1", "environment.json"]),
    Case("corrupt study.json", lambda: (made_by({})(), Path("d/study.json").write_bytes(b'{"format": 1, "st\xff')), RUN,
         ["cannot be read", "d/study.json", "--out"]),
    Case("study.json without a study", lambda: (made_by({})(), Path("d/study.json").write_text('{"format": 1}')), RUN,
         ["cannot be read", "it has no 'study'"]),
    Case("study.json is a list", lambda: (made_by({})(), Path("d/study.json").write_text("[]")), RUN, ["cannot be read"]),
    Case("report on nothing", nothing, ["report", "d"], ["no such run", "where: d"]),
    Case("report on an unfinished run", made_by({}), ["report", "d"], ["no result to report on", "d/result.json", "continues"]),
    Case("report on half a result", lambda: (made_by({})(), Path("d/result.json").write_text('{"arms"')), ["report", "d"],
         ["d/result.json", "not complete JSON"]),
    Case("report on a strange result", lambda: (made_by({})(), Path("d/result.json").write_text("[1]")), ["report", "d"],
         ["d/result.json", "format"]),
]  # fmt: skip

CASES = [*FILE_CASES, *OPTION_CASES, *STUDY_CASES, *DIRECTORY_CASES]


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_refused(case: Case, folder: Path, call: Any) -> None:
    """Status 2, and what, where and why or a fix."""
    case.spoil()
    status, out, err = call(*case.args)
    assert status == 2, err
    assert not out, "what went wrong belongs on standard error"
    for words in case.says:
        assert words in err
    if "such option" not in err:
        assert err.startswith("error: ") and ("where:" in err or "why:" in err or "fix:" in err)
    assert not Path("d/DONE").exists()


def test_not_readable(folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open if os.getuid() else None
    Path("p.jsonl").chmod(0)
    if real is None:  # root may read everything: the refusal is made up
        from assay.data import formats, readers  # both before either is patched: one takes its name from the other

        def denied(path: str) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        for module in (formats, readers):
            monkeypatch.setattr(module, "opened", denied)
    for args in (RUN, ["init", "p.jsonl"]):
        status, _, err = call(*args)
        assert status == 2 and "permission denied" in err and "p.jsonl" in err and "chmod" in err


def quarantine(what: str = "pool") -> list[dict[str, Any]]:
    (found,) = Path("d/steps").glob(f"read-{what}-*/quarantine.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


def result() -> dict[str, Any]:
    return json.loads(Path("d/result.json").read_text())


HUGE = b'{"text": "' + b"many words " * 4_800_000 + b'"}\n'  # 50 MB in one line
BAD_ROWS = {
    "not JSON": (b"{oops\n", "line is not JSON"),
    "not an object": (b"[1, 2]\n", "not a JSON object (list)"),
    "no text": (b'{"uid": "x"}\n', "no column 'text'"),
    "null": (b'{"text": null, "uid": "x"}\n', "null text"),
    "number": (b'{"text": 3, "uid": "x"}\n', "text is not a string (int)"),
    "empty": (b'{"text": " \\n ", "uid": "x"}\n', "empty text"),
    "not UTF-8": (b'{"text": "caf\xe9", "uid": "x"}\n', "not UTF-8 (byte 0xe9 at position 13)"),
    "surrogate": (b'{"text": "\\ud800", "uid": "x"}\n', "text has lone surrogates"),
    "NUL": (b'{"text": "a\\u0000b", "uid": "x"}\n', "text contains NUL bytes"),
    "raw NUL": (b'{"text": "a\0b", "uid": "x"}\n', "line is not JSON"),
    "long": (json.dumps({"text": "x" * 1_000_001, "uid": "x"}).encode() + b"\n", "exceeds max_chars=1000000"),
    "50 MB": (HUGE, "line is longer than"),
    "used id": (json.dumps({"text": "a new text", "uid": "1-0"}).encode() + b"\n", "id was used by an earlier row"),
    "null id": (b'{"text": "a new text", "uid": null}\n', "no id"),
}


def test_bad_rows_are_set_aside(folder: Path, call: Any) -> None:
    """Every fault of a row, all in one pool: told with row and reason, counted, and the run succeeds."""
    Path("p.jsonl").write_bytes(lines(POOL) + b"".join(line for line, _ in BAD_ROWS.values()))
    status, _, err = call(*run("--id-column", "uid"))
    assert status == 0, err
    found = quarantine()
    assert [entry["row"] for entry in found] == list(range(61, 61 + len(BAD_ROWS)))
    for entry, (name, (_, reason)) in zip(found, BAD_ROWS.items(), strict=True):
        assert reason in entry["reason"], name
        assert entry["where"] == "p.jsonl" or entry["where"].endswith("/p.jsonl")
        assert len(entry["preview"]) <= 120
    told = result()
    assert told["pool"]["rows"] == 60
    assert told["pool"]["quarantined"]["total"] == len(BAD_ROWS)
    assert sum(told["pool"]["quarantined"]["reasons"].values()) == len(BAD_ROWS)
    assert any("14 rows of the pool set aside" in warning for warning in told["warnings"])


@pytest.mark.parametrize("what", ["pool", "target"])
def test_bad_bytes_in_parquet(what: str, folder: Path, call: Any) -> None:
    """Bytes that are no UTF-8 under a string column, and a row too long; those of the target are told as well."""
    texts = [row["text"].encode() for row in (POOL if what == "pool" else TARGET)] + [b"caf\xe9", b"x" * 2_000_000]
    array = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": array}), "bad.parquet")
    status, _, err = call(*run(f"--{what}", "bad.parquet"))
    assert status == 0, err
    assert [entry["row"] for entry in quarantine(what)] == [len(texts) - 1, len(texts)]
    (warning,) = (w for w in result()["warnings"] if f"2 rows of the {what} set aside" in w)
    assert "not UTF-8" in warning and "quarantine.jsonl" in warning


def test_huge_document_in_little_memory(folder: Path) -> None:
    """50 MB in one line never stand in memory whole: 29 MB are the most that is read of a line."""
    Path("p.jsonl").write_bytes(lines(POOL) + HUGE)
    code = """
        import resource, pathlib
        from assay.data import readers
        from assay.data.ingest import ingest
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pool = ingest(readers.Source(paths="p.jsonl"), pathlib.Path("out"))
        print(len(pool), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 60 and grown < 120


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_score_that_is_no_number(value: str, folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method from elsewhere that returns NaN or infinity for one row is named, with the row."""
    package = f"lab_{'nan' if 'nan' in value else 'inf'}"
    module = f"{package}.broken"
    Path(package).mkdir()
    Path(package, "broken.py").write_text(
        textwrap.dedent(f"""
        from assay.core.method import Scorer
        class Broken(Scorer):
            cost = "none"
            def score(self, state, batch):
                return [{value} if i == batch.ids.tolist()[0] else 1.0 for i in batch.ids.tolist()]
    """)
    )
    monkeypatch.syspath_prepend(str(folder))
    status, _, err = call(*run("--methods", f"random,length,{module}"))
    assert status == 2, err
    assert "NaN" in err and "id '" in err and "scores-broken" in err


@pytest.mark.parametrize("stage", ["study.json", "pool.json", "step.json", "result.json", "report.html"])
def test_full_disk(stage: str, folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the disk fills: one message, and the same command goes on when there is space."""
    real = os.replace

    def full(source: Any, target: Any, **options: Any) -> None:
        if Path(target).name == stage:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        real(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        status, _, err = call(*RUN)
        assert status == 2 and "the disk is full" in err and "d/" in err and "free space" in err
        assert not (Path("d/DONE").exists() and stage != "report.html")
    status, _, err = call(*RUN)
    assert status == 0 and Path("d/DONE").exists(), err


def test_directory_that_cannot_be_written(folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    status, _, err = call(*RUN)
    assert status == 2
    assert "cannot be written" in err and "where: d" in err and "Permission denied" in err and "--out" in err


def steps() -> set[str]:
    return {p.name for p in Path("d/steps").iterdir()}


def plain(found: dict[str, Any]) -> Any:
    """A result without what the clock says."""
    if isinstance(found, dict):
        clock = ("wall", "cpu", "peak_rss", "selection_seconds", "ledger", "command")
        return {k: plain(v) for k, v in found.items() if k not in clock}
    return [plain(v) for v in found] if isinstance(found, list) else found


def test_another_study_takes_over(folder: Path, call: Any) -> None:
    """Both sides of each difference are shown; `--replace` keeps the steps whose inputs did not change."""
    assert call(*RUN)[0] == 0
    before = {p.name: (p / "step.json").stat().st_mtime_ns for p in Path("d/steps").iterdir()}
    other = run("--budget", "30%", "--set", "seed=0")
    status, _, err = call(*other)
    assert status == 2 and "budget: there '50%', now '30%'" in err and "--replace" in err
    assert Path("d/DONE").exists() and result()["study"]["budget"] == "50%", "the refused call changes nothing"
    status, _, err = call(*other, "--replace")
    assert status == 0, err
    kept = {name for name in before if name in steps()}
    assert any(n.startswith("read-pool") for n in kept) and any(n.startswith("scores-length") for n in kept)
    assert all((Path("d/steps") / n / "step.json").stat().st_mtime_ns == before[n] for n in kept), "computed again"
    assert result()["study"]["budget"] == "30%"


def test_a_first_try_with_a_typing_error_leaves_nothing_in_the_way(folder: Path, call: Any) -> None:
    """A run that failed before its first step has nothing to lose: the mended command may use the directory."""
    assert call(*run("--pool", "p.jsnl"))[0] == 2
    status, _, err = call(*RUN)
    assert status == 0, err


def test_leftovers_of_a_kill(folder: Path, call: Any) -> None:
    """Half-made steps, temporary files, a damaged state file: the run goes on and ends in the same result."""
    assert call(*RUN)[0] == 0
    whole = plain(result())
    Path("d/DONE").unlink()
    Path("d/result.json").unlink()
    shutil.rmtree("d/dataset")
    for path in list(Path("d/steps").iterdir()):
        if path.name.startswith(("train", "scores-length", "read-pool", "tokenizer", "gate")):
            path.rename(path.with_name(path.name + ".part"))
            path = path.with_name(path.name + ".part")
            (path / "step.json").unlink()
            (path / ".step.json.123.tmp").write_text("{")
            for found in [*path.glob("*.json"), *path.glob("*.parquet"), *path.glob("*.npy")]:
                found.write_bytes(found.read_bytes()[: found.stat().st_size // 2])
            if path.name.startswith("train"):
                (path / "state.safetensors").write_bytes(b"half a state")
    Path("d/.study.json.99.tmp").write_text("{")
    status, _, err = call(*RUN)
    assert status == 0, err
    assert plain(result()) == whole
    assert not list(Path("d/steps").glob("*.part")) and not list(Path("d").rglob("*.tmp"))


@pytest.mark.parametrize("damage", [b"", b"[]", b"{"])
def test_a_damaged_step(damage: bytes, folder: Path, call: Any) -> None:
    """A finished step whose bookkeeping is gone (power loss): the message says what to delete."""
    assert call(*RUN)[0] == 0
    (cost,) = Path("d/steps").glob("gate-*/cost.json")
    cost.write_bytes(damage)
    status, _, err = call(*RUN)
    assert status == 2 and "damaged" in err and f"delete {cost.parent}" in err
    shutil.rmtree(cost.parent)
    assert call(*RUN)[0] == 0


def test_two_processes_in_one_directory(folder: Path, call: Any) -> None:
    Path("d").mkdir()
    with open("d/.lock", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, err = call(*RUN)
        assert status == 2 and "another process is working" in err and "where: d" in err and "wait" in err
        assert not Path("d/study.json").exists()
    assert call(*RUN)[0] == 0


def test_in_a_real_process(folder: Path) -> None:
    """The installed command, refused beside a run, killed in the middle, and finished by the same call."""
    command = [sys.executable, "-m", "assay.cli", *RUN]
    first = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        while not list(Path("d").glob("steps/gate-*")) and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        beside = subprocess.run(command, capture_output=True, text=True)
        assert first.poll() is None and beside.returncode == 2
        assert "another process" in beside.stderr and "Traceback" not in beside.stderr
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert not Path("d/DONE").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and Path("d/DONE").exists(), done.stderr


def test_no_content_column(tmp_path: Path) -> None:
    """A table without a column of content would give its rows no ids."""
    table = pa.table({"body": ["a", "b"]})
    for make in (lambda: Pool.from_columns(table), lambda: PoolWriter(tmp_path / "x").write(table)):
        with pytest.raises(InputError, match="no content column") as caught:
            make()
        assert "body" in caught.value.why and "text" in caught.value.fix


def test_flags_and_again(folder: Path, call: Any) -> None:
    """The way without a study file; the same call again computes nothing and gives the same."""
    for name in ("p.jsonl", "t.jsonl"):
        Path(name).write_text(Path(name).read_text().replace('"text"', '"body"'))
    command = [*FILES, "--text-column", "body", "--methods", "random, bm25", *FAST, "--json"]
    status, first, err = call(*command)
    assert status == 0, err
    told = json.loads(first.strip().splitlines()[-1])
    assert [arm["name"] for arm in told["arms"]] == ["random-1", "bm25"]
    assert told["report"] == "d/report.html" and Path(told["report"]).exists()
    made = {p: p.stat().st_mtime_ns for p in Path("d/steps").rglob("*")}
    status, second, _ = call(*command)
    assert status == 0 and plain(json.loads(second.strip().splitlines()[-1])) == plain(told)
    assert {p: p.stat().st_mtime_ns for p in Path("d/steps").rglob("*")} == made


def test_init_edit_plan_run(folder: Path, call: Any) -> None:
    """As a new user would, with the study in a folder of its own and names that need quoting."""
    Path("studies").mkdir()
    name = 'päge 😀 "one".jsonl'
    Path("p.jsonl").rename(name)
    status, out, err = call("init", name, "--target", "t.jsonl", "--out", "studies/s.toml")
    assert status == 0 and "assay plan studies/s.toml" in out, err
    made = Path("studies/s.toml").read_text()
    Path("studies/s.toml").write_text(made.replace('"loss", "exact_dup", "bm25", "loss_diff", "graddot", "trak"', ""))
    status, out, err = call("plan", "studies/s.toml", "--workers", "1")
    assert status == 0 and "total" in out, err
    status, _, err = call("run", "studies/s.toml", "--out", "d", *FAST)
    assert status == 0 and Path("d/report.html").exists(), err
    assert result()["study"]["pool"]["domain"] == "domain"


def test_a_stored_study_replays(folder: Path, call: Any) -> None:
    """study.json holds the resolved study: parsed again it is the same study."""
    from assay.study import parse

    assert call(*RUN)[0] == 0
    held = json.loads(Path("d/study.json").read_text())["study"]
    assert json.loads(json.dumps(parse(held).spec())) == held
