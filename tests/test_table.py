"""Pools, tables, selections, budgets and targets: rows join by id, and damage is found."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.core.errors import InputError
from assay.core.keys import decode_ids, encode_ids, hash_ids, shuffled, uniform, write_bytes
from assay.core.pool import Pool, PoolWriter, positions
from assay.core.selection import Budget, Selection
from assay.core.table import COUNTS, Table, TableWriter
from assay.core.target import Target

IDS = encode_ids(f"row{i}" for i in range(11))
VALUES = np.random.default_rng(0).normal(size=(11, 2)).astype(np.float32)


def on_disk(path: Path) -> Table:
    writer = TableWriter(path, IDS, ("a", "b"), shard_rows=4)
    for index in (2, 0, 1):
        writer.write(index, VALUES[slice(*writer.span(index))])
    return writer.finish({"unit": "nats"})


# Tables.


def test_shards_in_any_order_make_the_table(tmp_path):
    table = on_disk(tmp_path)
    assert np.array_equal(table.values, VALUES) and decode_ids(table.ids) == decode_ids(IDS)
    assert table.meta == {"unit": "nats", "coverage": 1.0, "nan": 0, **dict.fromkeys(COUNTS, 0)}
    fresh = Table.open(tmp_path)
    assert [len(block) for block in fresh.shards()] == [4, 4, 3]
    for start, stop in ((0, 11), (3, 5), (4, 8), (10, 11), (5, 5)):
        assert np.array_equal(fresh.rows(start, stop), VALUES[start:stop]), (start, stop)
    assert np.array_equal(fresh.column("b"), VALUES[:, 1].astype(np.float64))
    with pytest.raises(InputError, match="no column 'c'"):
        fresh.column("c")


def test_align_joins_by_id(tmp_path):
    order = np.random.default_rng(3).permutation(11)[:7]
    aligned = on_disk(tmp_path).align(IDS[order])
    assert np.array_equal(aligned.values, VALUES[order]) and np.array_equal(aligned.ids, IDS[order])
    again = aligned.align(IDS[order][[2, 2, 0]])
    assert np.array_equal(again.values, VALUES[order][[2, 2, 0]])
    with pytest.raises(InputError, match="1 of 2 ids are not here, the first is 'row99'"):
        aligned.align(encode_ids([decode_ids(IDS[order])[0], "row99"]))
    with pytest.raises(InputError, match="not here"):
        Table(IDS[:0], ("a",), np.zeros((0, 1))).align(IDS[:1])


def test_positions():
    known = encode_ids(["b", "aaa", "c"])
    assert positions(known, encode_ids(["c", "b", "c"])).tolist() == [2, 0, 2]
    assert positions(known, encode_ids([])).tolist() == []
    for wrong in ("a", "aaaa", "d", ""):
        with pytest.raises(InputError, match="not here"):
            positions(known, encode_ids(["b", wrong]))


@pytest.mark.parametrize("name", ["00000.npy", "00001.npy", "00002.npy", "ids.npy"])
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path, name):
    on_disk(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for at in (0, 9, len(whole) // 2, len(whole) - 1):
        data = bytearray(whole)
        data[at] ^= 1
        (tmp_path / name).write_bytes(bytes(data))
        with pytest.raises(InputError, match="damaged") as caught:
            _ = Table.open(tmp_path).values
        assert caught.value.where == str(tmp_path / name), f"byte {at}"
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match="missing") as caught:
        _ = Table.open(tmp_path).values
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("text", [None, b"", b"{", b'{"ids": 1}', b"\xff\xfe{}"])
def test_an_unfinished_table_is_refused(tmp_path, text):
    on_disk(tmp_path)
    (tmp_path / "manifest.json").unlink()
    if text is not None:
        (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(InputError, match="not a finished table") as caught:
        Table.open(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_a_killed_writer_continues(tmp_path):
    writer = TableWriter(tmp_path, IDS, ("a", "b"), shard_rows=4)
    writer.write(1, VALUES[4:8])
    writer.write(0, VALUES[:4])
    (tmp_path / "00000.json").unlink()  # killed between the shard and its marker
    (tmp_path / ".00002.npy.77.tmp").write_bytes(b"half")
    again = TableWriter(tmp_path, IDS, ("a", "b"), shard_rows=4)
    assert [again.has(i) for i in range(len(again))] == [False, True, False]
    with pytest.raises(AssertionError, match="are missing"):
        again.finish()
    again.write(0, VALUES[:4])
    again.write(2, VALUES[8:])
    assert np.array_equal(again.finish().values, VALUES)
    for ids, columns, dtype in (
        (IDS[::-1], ("a", "b"), np.float32), (IDS, ("a", "c"), np.float32), (IDS, ("a", "b"), np.float64),
    ):  # fmt: skip
        other = TableWriter(tmp_path, ids, columns, shard_rows=4, dtype=dtype)
        assert not other.has(1), "a shard of another table was taken"
    data = bytearray((tmp_path / "00001.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "00001.npy").write_bytes(bytes(data))
    assert not again.has(1), "a damaged shard was kept"
    (tmp_path / "00002.json").write_bytes(b"\xff[1]")
    assert not again.has(2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(tmp_path, bad):
    values = VALUES.astype(np.float64)
    values[6, 1] = values[7, 0] = bad
    writer = TableWriter(tmp_path, IDS, ("a", "b"), shard_rows=4)
    with pytest.raises(InputError, match="2 rows .* the first is id 'row6'"):
        writer.write(1, values[4:8])
    assert not writer.has(1)


def test_parquet_round_trip(tmp_path):
    table = Table(IDS, ("a", "b"), VALUES.astype(np.float64))
    table.to_parquet(tmp_path / "t.parquet")
    back = Table.from_parquet(tmp_path / "t.parquet", IDS[::-1])
    assert back.columns == ("a", "b") and np.array_equal(back.values, VALUES[::-1].astype(np.float64))
    saved = back.save(tmp_path / "saved")
    assert np.array_equal(saved.align(IDS).values, table.values) and saved.values.dtype == np.float64


def test_parquet_from_elsewhere(tmp_path):
    def write(**columns) -> Path:
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    ids = encode_ids(["7", "5"])
    path = write(key=[5, 6, 7], note=["x", "y", "z"], s=[0.5, 0.6, 0.7], n=[1, 2, 3])
    table = Table.from_parquet(path, ids, id_column="key")
    assert table.columns == ("s", "n"), "the ids are no column of numbers"
    assert table.values.tolist() == [[0.7, 3.0], [0.5, 1.0]]
    with pytest.raises(InputError, match="no column 'id'"):
        Table.from_parquet(path, ids)
    with pytest.raises(InputError, match="'5' stands in the file twice"):
        Table.from_parquet(write(id=["5", "7", "5"], s=[1.0, 2.0, 3.0]), ids)
    with pytest.raises(InputError, match="not here, the first is '7'"):
        Table.from_parquet(write(id=["5"], s=[1.0]), ids)
    with pytest.raises(InputError, match="no numeric column"):
        Table.from_parquet(write(id=["5"], s=["one"]), ids)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="unreadable Parquet"):
        Table.from_parquet(tmp_path / "x.parquet", ids)


def test_empty_table(tmp_path):
    table = Table(IDS[:0], ("a",), np.zeros((0, 1), np.float32)).save(tmp_path)
    assert len(table) == 0 and table.values.shape == (0, 1) and table.rows(0, 5).shape == (0, 1)


def test_repeated_ids_are_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="ids repeat"):
        Table(encode_ids(["a", "a"]), ("x",), np.zeros((2, 1))).save(tmp_path)


# Pools.

ROWS = {"text": ["one", "two", "one", "three", "one", "two"], "domain": list("xyxyzz")}


def test_ids_are_content_with_counts():
    pool = Pool.from_columns(ROWS)
    ids = decode_ids(pool.ids)
    assert ids[2] == ids[0] + "-1" and ids[4] == ids[0] + "-2" and ids[5] == ids[1] + "-1"
    assert len(set(ids)) == 6 and len(set(pool.contents.tolist())) == 3
    labelled = Pool.from_columns({"text": ["one", "one"], "label": [0, 1]})
    assert len(set(labelled.contents.tolist())) == 2, "the label is content"
    assert decode_ids(Pool.from_columns({"text": ["one"], "domain": ["q"]}).ids) == ids[:1], "the domain is not"
    with pytest.raises(InputError, match="repeats ids"):
        Pool.from_columns({"id": ["a", "a"], "text": ["one", "two"]})
    with pytest.raises(InputError, match="no column 'txt'"):
        pool.column("txt")


@pytest.mark.parametrize("cuts", [(6,), (1, 2, 3), (4, 2)])
@pytest.mark.parametrize("shard_rows", [2, 4, 100])
@pytest.mark.parametrize("named", [True, False])
def test_writer_equals_memory(tmp_path, cuts, shard_rows, named):
    columns = {**ROWS, **({"id": [f"é{i}" for i in range(6)]} if named else {})}
    memory, whole = Pool.from_columns(columns), pa.table(columns)
    writer = PoolWriter(tmp_path, shard_rows=shard_rows)
    start = 0
    for size in cuts:
        assert writer.write(whole.slice(start, size)) == []
        start += size
    disk = writer.finish(origin="test")
    for pool in (disk, Pool.open(tmp_path), pickle.loads(pickle.dumps(disk))):
        assert np.array_equal(pool.ids, memory.ids) and np.array_equal(pool.contents, memory.contents)
        assert pool.fingerprint == memory.fingerprint and pool.columns == memory.columns
        order = [5, 0, 3, 3]
        for name in memory.columns:
            assert pool.column(name) == memory.column(name)
            assert pool.at(order).column(name) == [memory.column(name)[i] for i in order]
    assert len(list(tmp_path.glob("*.parquet"))) == -(-6 // shard_rows)


def test_repeated_user_ids_are_reported(tmp_path):
    writer = PoolWriter(tmp_path, shard_rows=2)
    assert writer.write(pa.table({"id": ["a", "b", "a"], "text": ["1", "2", "3"]})) == [2]
    assert writer.write(pa.table({"id": ["c", "b", "d", "c"], "text": ["4", "5", "6", "7"]})) == [1, 3]
    pool = writer.finish()
    assert decode_ids(pool.ids) == ["a", "b", "c", "d"] and pool.column("text") == ["1", "2", "4", "6"]


def test_empty_pool(tmp_path):
    writer = PoolWriter(tmp_path)
    writer.write(pa.table({"text": pa.array([], pa.string())}))
    pool = writer.finish()
    assert len(pool) == 0 and pool.column("text") == [] and list(pool.shards(3)) == []


def test_views_keep_ids():
    pool = Pool.from_columns(ROWS)
    view = pool.at(slice(1, 5)).at([3, 0])
    assert decode_ids(view.ids) == [decode_ids(pool.ids)[i] for i in (4, 1)] and view.column("text") == ["one", "two"]
    taken = pool.take(decode_ids(pool.ids)[::-2])
    assert taken.column("domain") == ["z", "y", "y"] and np.array_equal(taken.ids, pool.ids[[5, 3, 1]])
    assert [len(s) for s in pool.shards(4)] == [4, 2]
    assert [t for s in pool.shards(4) for t in s.column("text")] == ROWS["text"]
    with pytest.raises(InputError, match="not here"):
        pool.take(["nobody"])
    assert pool.domains().tolist() == list("xyxyzz")
    assert Pool.from_columns({"text": ["a"]}).domains().tolist() == ["all"]


def test_fingerprints():
    prints = [
        Pool.from_columns(ROWS), Pool.from_columns(ROWS).at([1, 0, 2, 3, 4, 5]), Pool.from_columns(ROWS).at(slice(5)),
        Pool.from_columns({"text": [*ROWS["text"][:5], "TWO"]}),
        Pool.from_columns({**ROWS, "id": list("abcdef")}),
        Pool.from_columns({"text": [*ROWS["text"][:5], "TWO"], "id": list("abcdef")}),
    ]  # fmt: skip
    assert len({p.fingerprint for p in prints}) == len(prints), "two different pools have one fingerprint"
    assert Pool.from_columns(ROWS).fingerprint == prints[0].fingerprint == prints[1].at([1, 0, 2, 3, 4, 5]).fingerprint


# Keys.


def test_keyed_randomness_depends_on_nothing_else():
    order = np.random.default_rng(0).permutation(11)
    assert np.array_equal(hash_ids(IDS, "s", 1)[order], hash_ids(IDS[order], "s", 1))
    assert np.array_equal(IDS[shuffled(IDS, "s", 1)], IDS[order][shuffled(IDS[order], "s", 1)])
    assert not np.array_equal(hash_ids(IDS, "s", 1), hash_ids(IDS, "s", 2))
    assert hash_ids([b"row0"], "s", 1)[0] == hash_ids(encode_ids(["row0", "a much longer id"]), "s", 1)[0]
    u = uniform(encode_ids(map(str, range(4000))), "u")
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.005


def test_writing_leaves_no_half_files(tmp_path):
    write_bytes(tmp_path / "x", b"1")
    write_bytes(tmp_path / "x", b"22")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"22"


# Selections and budgets.


@pytest.mark.parametrize(
    "text, examples, tokens, want",
    [
        ("10%", 200, 9000, (900, "tokens")),
        ("10%", 200, None, (20, "examples")),
        ("100%", 200, 9001, (9001, "tokens")),
        ("12.5%", 1000, None, (125, "examples")),
        ("5Mtok", 10, 6_000_000, (5_000_000, "tokens")),
        ("300ktok", 10, 300_000, (300_000, "tokens")),
        ("77tok", 10, 100, (77, "tokens")),
        ("20k", 20_000, 9, (20_000, "examples")),
        ("1.5k", 20_000, None, (1500, "examples")),
        ("800", 800, 9, (800, "examples")),
        (" 1_000 ", 1000, 9, (1000, "examples")),
        ("50ex", 100, 9, (50, "examples")),
    ],
)
def test_budgets(text, examples, tokens, want):
    assert Budget.parse(text, examples=examples, tokens=tokens) == Budget(*want)


@pytest.mark.parametrize(
    "text, message",
    [
        ("0", "comes to 0"), ("0%", "comes to 0"), ("-5", "comes to -5"), ("-10%", "comes to -90"),
        ("801", "comes to 801"),
        ("800.5", "comes to"), ("101%", "comes to"), ("1k", "comes to 1,000"), ("9001tok", "comes to 9,001"),
        ("1Btok", "comes to"), ("nan", "comes to nan"), ("inf", "comes to inf"), ("nan%", "comes to nan"),
        ("", "unreadable"), ("k", "unreadable"), ("%", "unreadable"), ("tok", "unreadable"), ("ten", "unreadable"),
        ("5 apples", "unreadable"), ("5Mtokens", "unreadable"), ("1,000", "unreadable"), ("0x10", "unreadable"),
    ],
)  # fmt: skip
def test_bad_budgets(text, message):
    with pytest.raises(InputError, match=message) as caught:
        Budget.parse(text, examples=800, tokens=900 if "%" in text else 9000)
    assert caught.value.fix


def test_budget_in_tokens_needs_tokens():
    with pytest.raises(InputError, match="in tokens"):
        Budget.parse("5tok", examples=10, tokens=None)


def test_selection_round_trip(tmp_path):
    selection = Selection(
        encode_ids(["b", "a", "b"]), np.array([1.0, 0.5, 2.0]),
        {"too short": encode_ids(["c", "d"]), "budget": encode_ids(["eé"]), "none": encode_ids([])}, True, {"k": 1},
    )  # fmt: skip
    selection.save(tmp_path / "1")
    back = Selection.open(tmp_path / "1")
    assert back.fingerprint == selection.fingerprint and back.ordered and dict(back.meta) == {"k": 1}
    assert back.reasons() == {"too short": 2, "budget": 1, "none": 0} == selection.reasons()
    assert {k: decode_ids(v) for k, v in back.dropped.items()} == {
        "too short": ["c", "d"],
        "budget": ["eé"],
        "none": [],
    }
    back.save(tmp_path / "2")
    for name in ("selected.parquet", "selection.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    Selection.everything(encode_ids(["a"])).save(tmp_path / "3")
    assert dict(Selection.open(tmp_path / "3").dropped) == {}


def test_selection_fingerprints():
    base = Selection.everything(encode_ids(["a", "b"]))
    others = [
        Selection.everything(encode_ids(["b", "a"])), Selection.everything(encode_ids(["a"])),
        Selection(base.ids, np.array([1.0, 2.0])), Selection(base.ids, base.weights, ordered=True),
    ]  # fmt: skip
    assert len({s.fingerprint for s in [base, *others]}) == 5
    assert base.fingerprint == Selection(base.ids, np.ones(2), {"x": encode_ids(["z"])}).fingerprint


@pytest.mark.parametrize("weights", [[1.0], [1.0, np.nan], [1.0, np.inf], [1.0, -0.1]])
def test_bad_weights(weights):
    with pytest.raises(InputError, match="weight"):
        Selection(encode_ids(["a", "b"]), np.array(weights))


# Targets.


def test_target_keeps_groups_whole_and_balanced():
    rng = np.random.default_rng(0)
    groups = [f"g{g}" for g in rng.integers(0, 25, 200)]
    pool = Pool.from_columns({"text": [f"t{i}" for i in range(200)], "group": groups})
    target = Target.split(pool, seed=3)
    halves = [set(half.column("group")) for half in (target.selecting, target.judging)]
    assert not halves[0] & halves[1], "a group is in both halves"
    assert len(target.selecting) + len(target.judging) == 200
    largest = max(groups.count(g) for g in groups)
    assert abs(len(target.selecting) - len(target.judging)) <= largest
    other = Target.split(pool, seed=4)
    assert set(decode_ids(other.selecting.ids)) != set(decode_ids(target.selecting.ids))
    order = rng.permutation(200)
    permuted = Target.split(pool.at(order), seed=3)
    assert set(decode_ids(permuted.selecting.ids)) == set(decode_ids(target.selecting.ids)), (
        "the split depends on order"
    )


def test_target_without_groups_keeps_copies_together():
    pool = Pool.from_columns({"text": ["a", "b", "a", "c", "d", "a", "e", "f"]})
    target = Target.split(pool)
    halves = [set(half.column("text")) for half in (target.selecting, target.judging)]
    assert not halves[0] & halves[1] and len(target.selecting) == len(target.judging) == 4


def test_groups_of_any_type():
    pool = Pool.from_columns({"text": list("abcdef"), "group": [1, 1, 2, 2, None, None]})
    target = Target.split(pool)
    sides = {t: half for half in ("selecting", "judging") for t in getattr(target, half).column("text")}
    assert sides["a"] == sides["b"] and sides["c"] == sides["d"] and len(sides) == 6


def test_targets_that_cannot_be_split():
    with pytest.raises(InputError, match="empty"):
        Target.split(Pool.from_columns({"text": pa.array([], pa.string()).to_pylist()}))
    for columns in ({"text": ["a"]}, {"text": ["a", "a"]}, {"text": ["a", "b"], "group": ["g", "g"]}):
        with pytest.raises(InputError, match="cannot be split"):
            Target.split(Pool.from_columns(columns))
