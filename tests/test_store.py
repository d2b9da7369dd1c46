"""The feature store: what float16 rows cost, that nothing but the features matters to their bytes, and that damage is
told, and mended, one shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import small_store
from assay import store
from assay.core.errors import InputError
from assay.core.keys import decode_ids, encode_ids
from assay.core.method import Cost, Featurizer, Scorer, make
from assay.core.pool import Pool
from assay.core.progress import Progress
from assay.core.run import Run
from assay.core.table import Table, TableWriter, join, unit_rows
from assay.measure import Measurer, even
from assay.train import loop
from assay.train.loop import fingerprint
from assay.train.models import Classifier, init_params
from helpers import prepared, text_pool, vector_pool

ROWS, SHARD = 60, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store.write_world(tmp_path_factory.mktemp("world"), rows=ROWS)


@pytest.fixture(scope="module")
def made(world: Path) -> Path:
    """A finished store; not to be written to."""
    store.featurize(small_store.order(world), world / "store", workers=1, command="assay featurize --pool p --out s")
    return world / "store"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


# Float16 rows.


def table(path: Path, values: np.ndarray, dtype: str = "float16", shard_rows: int = 4) -> Table:
    ids, columns = encode_ids(f"r{i}" for i in range(len(values))), [f"c{i}" for i in range(values.shape[1])]
    writer = TableWriter(path, ids, columns, shard_rows=shard_rows, dtype=dtype)
    for index in range(len(writer)):
        writer.write(index, values[slice(*writer.span(index))])
    return writer.finish()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_an_entry_is_wrong_by_at_most_half_a_step_of_float16(tmp_path: Path, scale: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(11, 50)) * np.exp(3 * rng.normal(size=(11, 50))) * scale).astype(np.float32)
    found = table(tmp_path, values)
    assert found.values.dtype == np.float32
    exact = values.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    bound = norms * np.maximum(np.abs(exact / norms) * 2.0**-11, 2.0**-25)
    # Beyond the half step: the norm, the quotient and the product in float32.
    assert (np.abs(found.values - exact) <= bound + 4 * 2.0**-24 * np.abs(exact)).all()
    assert (np.abs(found.values - exact) > 0.2 * bound).any(), "the bound is far from sharp"
    kept = np.concatenate([np.load(tmp_path / f"{i:05d}.norm.npy") for i in range(3)])
    assert kept.dtype == np.float32 and np.array_equal(kept, norms[:, 0].astype(np.float32))
    unit = np.concatenate([np.load(tmp_path / f"{i:05d}.npy") for i in range(3)])
    assert unit.dtype == np.float16 and np.allclose(np.linalg.norm(unit.astype(float), axis=1), 1, atol=1e-3)


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    values = np.array([[1, 0, 1e-9], [0, 0, 0], [3, 1e-3, 0], [1e-6, 1e-20, 1e-20], [0, 0, 0]], np.float32)
    meta = table(tmp_path / "a", values, shard_rows=2).meta
    assert (meta["zero_rows"], meta["underflow"], meta["overflow"]) == (2, 3, 0)
    assert np.array_equal(Table.open(tmp_path / "a").values[[1, 4]], np.zeros((2, 3)))
    with pytest.raises(InputError, match="1 rows .* the first is id 'r1'"):
        table(tmp_path / "b", np.array([[1.0, 1.0], [3e38, 3e38]]))  # its length is no float32
    with pytest.raises(InputError, match="the first is id 'r0'"):
        table(tmp_path / "c", np.array([[1e300, 1.0]]))
    plain = table(tmp_path / "d", values, "float32")
    assert np.array_equal(plain.values, values) and plain.meta["underflow"] == 0 and plain.meta["zero_rows"] == 2
    small = table(tmp_path / "e", np.array([[1e-60, 1.0]]), "float32")
    assert small.meta["underflow"] == 1


def test_unit_rows_of_any_size() -> None:
    x = np.array([[3e-25, 4e-25], [0, 0], [3e30, 4e30]], np.float32)
    unit, norms = unit_rows(x)
    assert unit.dtype == np.float32 and np.allclose(unit, [[0.6, 0.8], [0, 0], [0.6, 0.8]], rtol=1e-6)
    assert np.allclose(norms, [5e-25, 0, 5e30], rtol=1e-6)


def test_joined_tables_read_their_own_shards(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(9, 3))
    one, two = table(tmp_path / "a", values, "float64"), table(tmp_path / "b", values[:3] + 1, "float64")
    with pytest.raises(InputError, match="3 ids stand in more than one"):
        join([one, two], tmp_path / "c", {})
    two.ids = encode_ids(["a longer id", "y", "z"])
    join([two, one], tmp_path / "c", {"of": "two"})
    both = Table.open(tmp_path / "c")
    assert decode_ids(both.ids)[:4] == ["a longer id", "y", "z", "r0"] and both.meta == {"of": "two"}
    assert np.array_equal(both.values, np.concatenate([values[:3] + 1, values]))
    assert np.array_equal(Table.open(tmp_path / "c").rows(2, 8), both.values[2:8])
    assert not list((tmp_path / "c").glob("0*")), "numbers were copied"
    with pytest.raises(InputError, match="other columns"):
        join([one, table(tmp_path / "d", values[:, :2], "float64")], tmp_path / "e", {})


# Featurize.


def test_a_store_is_the_featurizers_numbers(world: Path, made: Path, tmp_path: Path) -> None:
    """Within float16 of what the featurizer gives, joined by id, with the facts beside them."""
    exact = small_store.order(world, sets=("rank=4", "shard=8", "store=float32"))
    store.featurize(exact, tmp_path / "exact", workers=1)
    held, truth = Table.open(small_store.features(made)), Table.open(small_store.features(tmp_path / "exact"))
    pool = text_pool(ROWS)
    assert np.array_equal(held.ids, pool.ids) and held.columns == truth.columns
    unit, _ = unit_rows(truth.values.astype(np.float64))
    found, _ = unit_rows(held.values.astype(np.float64))
    assert 1e-5 < np.abs(found - unit).max() < 2.0**-11
    model = store.open_model(str(world / "model"))
    assert held.meta["checkpoints"] == [fingerprint(model.params)] and held.meta["target"] is None
    told = json.loads((made / "result.json").read_text())
    encoded = model.task.encoded(next(made.glob("steps/encode-*")))
    assert told["tokens"] == encoded.sizes.sum() and told["rows"] == told["computed"] == ROWS
    assert told["bytes"] == sum(p.stat().st_size for p in small_store.features(made).iterdir())


def test_workers_do_not_change_a_byte(world: Path, made: Path, tmp_path: Path) -> None:
    store.featurize(small_store.order(world), tmp_path / "s", workers=2)
    assert small_store.whole(small_store.features(tmp_path / "s")) == small_store.whole(small_store.features(made))


class Stops(Progress):
    """Is interrupted after so many shards."""

    def __init__(self, after: int) -> None:
        self.left, self.stage = after, ""

    def begin(self, stage: str, units: int, label: str = "") -> None:
        self.stage = stage

    def advance(self, units: int = 1) -> None:
        self.left -= units * (self.stage == "features: gradients")
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_store_goes_on(world: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.featurize(small_store.order(world), tmp_path / "s", workers=1, progress=Stops(3))
    with pytest.raises(InputError, match="no finished store"):
        store.Store.open(tmp_path / "s")
    facts = store.featurize(small_store.order(world), tmp_path / "s", workers=1)
    assert facts["computed"] == ROWS - 3 * SHARD
    assert small_store.whole(small_store.features(tmp_path / "s")) == small_store.whole(small_store.features(made))
    assert store.featurize(small_store.order(world), tmp_path / "s", workers=1)["computed"] == 0


@pytest.fixture(scope="module")
def parts(world: Path) -> list[Path]:
    found = [world / f"part-{i}" for i in (1, 2, 3)]
    for i, path in enumerate(found, 1):
        store.featurize(small_store.order(world, part=f"{i}/3"), path, workers=1)
    return found


def test_parts_are_the_whole(made: Path, parts: list[Path], tmp_path: Path) -> None:
    tables = [Table.open(small_store.features(path)) for path in parts]
    one = Table.open(small_store.features(made))
    assert [len(t) for t in tables] == [16, 24, 20]
    assert np.array_equal(np.concatenate([t.ids for t in tables]), one.ids)
    assert np.array_equal(np.concatenate([t.values for t in tables]), one.values)
    files = [data for path in parts for name, data in small_store.shards(small_store.features(path)).items()
             if name != "ids.npy"]  # fmt: skip
    assert files == [data for name, data in small_store.shards(small_store.features(made)).items() if name != "ids.npy"]
    for t in tables:
        assert {k: t.meta[k] for k in ("notes", "checkpoints")} == {k: one.meta[k] for k in ("notes", "checkpoints")}


def test_small_pools_have_small_shards() -> None:
    assert [store.shard_of(rows) for rows in (1, 2_000, 20_000, 40_000, 10**9)] == [128, 128, 256, 512, 1024]


@pytest.mark.parametrize("area", [100, 1000, 4096, 10**6])
def test_batches_of_a_shard_are_of_one_size(area: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 300)
    cut, plain = even(lengths, area), loop.blocks(lengths, area)
    spans = [len(b) * lengths[b].max() for b in cut]
    assert sorted(np.concatenate(cut)) == list(range(300)) and max(spans) <= area and len(cut) == len(plain)
    # The first of equal batches is full but for what one more row would have added.
    assert min(spans) > 0.5 * max(spans) or len(cut) == 1 or area == 100


def test_batches_change_nothing_but_rounding(world: Path, tmp_path: Path) -> None:
    found = []
    for i, size in enumerate(("area=1", "area=100000", "batch=3")):
        order = small_store.order(world, sets=("rank=4", "shard=8", "store=float32", size))
        store.featurize(order, tmp_path / str(i), workers=1)
        found.append(Table.open(small_store.features(tmp_path / str(i))).values)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5 * np.abs(found[0]).max())


def test_models_of_transformers(world: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    task: Any = store.open_model(str(world / "model")).task
    config = transformers.GPT2Config(vocab_size=280, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "tokenizer.json").write_text(task.tokenizer)
    (tmp_path / "gpt" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    order = store.order(str(world / "pool.jsonl"), str(tmp_path / "gpt"), sets=("rank=2", "shard=8"), context=24)
    store.featurize(order, tmp_path / "s", workers=1)
    found = store.score([tmp_path / "s"], str(world / "target.jsonl"), workers=1)
    assert found["rows"] == ROWS and found["methods"]["gradcos"]["highest"] < 1
    note = Table.open(small_store.features(tmp_path / "s")).meta["notes"]["gradients against plain backward passes"]
    assert note["error"] < 1e-4 and note["share"] == 1.0


# Score.


def test_scores_are_those_of_a_run(world: Path, made: Path, parts: list[Path], tmp_path: Path) -> None:
    """A Measurer that has pool, target and models at once gives the same numbers."""
    pool, asked = text_pool(ROWS), text_pool(9, seed=1)
    model = store.open_model(str(world / "model"))
    encodings = {}
    for name, part in (("pool", pool), ("target", asked)):
        prepared(model.task, part, tmp_path / name)
        encodings[part.fingerprint] = tmp_path / name
    run = Run.open(tmp_path / "run", {"name": "test"})
    measurer = Measurer(run, pool, asked, task=model.task, models=[model.params], encodings=encodings, key="k", shard=8)
    store.score([made], str(world / "target.jsonl"), out=tmp_path / "a.parquet", workers=1)
    store.score([parts[k] for k in (2, 0, 1)], str(world / "target.jsonl"), out=tmp_path / "b.parquet", workers=2)
    one, other = (Table.from_parquet(tmp_path / f"{k}.parquet", pool.ids) for k in "ab")
    assert one.columns == ("graddot", "gradcos", "trak") and np.array_equal(one.values, other.values)
    for name in one.columns:
        truth = measurer.table(make(Scorer, {"name": name, "features": {"name": "gradients", "rank": 4}})).values[:, 0]
        np.testing.assert_allclose(one.column(name), truth, rtol=0, atol=1e-9 * np.abs(truth).max())
        assert truth.std() > 0
    run.close()


def test_no_score_holds_the_features(made: Path, parts: list[Path], world: Path, monkeypatch: Any) -> None:
    whole = Table.values.fget
    assert whole is not None

    def values(self: Table) -> np.ndarray:
        assert len(self) < ROWS or len(self.columns) <= 3, "all features of the pool are in memory"
        return whole(self)

    monkeypatch.setattr(Table, "values", property(values))
    found = store.score(parts, str(world / "target.jsonl"), workers=1)
    assert found["parts"] == 3 and set(found["methods"]) == set(store.DEFAULT_METHODS)
    best = found["methods"]["trak"]["top"]
    assert [one["score"] for one in best] == sorted((one["score"] for one in best), reverse=True)


def test_score_reads_neither_pool_nor_text(made: Path, world: Path, tmp_path: Path) -> None:
    """With the pool gone and the model moved, a store still scores."""
    shutil.copytree(world / "model", tmp_path / "moved")
    shutil.copytree(made, tmp_path / "store")
    for step in (tmp_path / "store" / "steps").glob("*"):
        if not step.name.startswith("features"):
            shutil.rmtree(step)
    about = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps(about | {"model": "/nowhere"}))
    store.score([tmp_path / "store"], str(world / "target.jsonl"), model=str(tmp_path / "moved"), workers=1)
    with pytest.raises(InputError, match="no such model directory"):
        store.score([tmp_path / "store"], str(world / "target.jsonl"), workers=1)


# Damage.


def flips(folder: Path, count: int) -> Iterator[tuple[Path, int, int]]:
    """Single bits in the files that a reader reads, evenly over their bytes."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix == ".npy" or p.name == "manifest.json"]
    rng = np.random.default_rng(0)
    for k in range(count):
        file = files[k % len(files)]
        yield file, int(rng.integers(file.stat().st_size)), int(rng.integers(8))


def test_a_hundred_flipped_bits_are_found_and_named(copy: Path) -> None:
    folder, found = small_store.features(copy), 0
    for file, at, bit in flips(folder, 100):
        data = file.read_bytes()
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
        with pytest.raises(InputError) as caught:
            sum(len(block) for block in Table.open(folder).shards())
        assert caught.value.where == str(folder if file.name == "manifest.json" else file)
        assert "assay featurize --pool p --out s" in caught.value.fix, "the command that mends it is not named"
        file.write_bytes(data)
        found += 1
    assert found == 100 and Table.open(folder).intact()


@pytest.mark.parametrize("hurt", ["00003.npy", "00003.norm.npy", "ids.npy", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_the_same_command_mends_what_is_damaged_and_no_more(
    world: Path, made: Path, copy: Path, hurt: str, how: str
) -> None:
    folder = small_store.features(copy)
    file, before = folder / hurt, {p.name: p.stat().st_ino for p in folder.glob("0*.npy")}
    if how == "gone":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(bytes(data))
    facts = store.featurize(small_store.order(world), copy, workers=1)
    assert small_store.whole(folder) == small_store.whole(small_store.features(made))
    again = {name for name, inode in before.items() if (folder / name).stat().st_ino != inode}
    assert facts["computed"] == (SHARD if hurt.startswith("00003") else 0)
    assert again - {hurt} <= {"00003.npy", "00003.norm.npy"}


def test_a_damaged_shard_stops_a_score(world: Path, copy: Path) -> None:
    file = small_store.features(copy) / "00002.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="a shard is damaged") as caught:
        store.score([copy], str(world / "target.jsonl"), workers=1)
    assert caught.value.where == str(file) and "assay featurize --pool p --out s" in caught.value.fix


# Invariants.


class Zero(Featurizer):
    """Half and one more of the rows are zero."""

    nonzero: int = 0

    cost: ClassVar[Cost] = "text"

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("a", "b")

    def featurize(self, state: Any, batch: Any) -> Any:
        place = np.array([int(t.split()[0]) for t in batch.column("text")])
        return np.repeat((place < self.nonzero).astype(float)[:, None], 2, axis=1)


def test_mostly_zero_features_are_refused(tmp_path: Path) -> None:
    pool, run = text_pool(20), Run.open(tmp_path, {"name": "test"})
    measurer = Measurer(run, pool, pool)
    with pytest.raises(InputError, match="11 of 20 rows of .* are zero"):
        measurer.table(Zero(nonzero=9))
    assert measurer.table(Zero(nonzero=10)).meta["zero_rows"] == 10
    run.close()


def test_features_of_other_weights_are_refused(world: Path, tmp_path: Path) -> None:
    """The key says the same model; the weights say another."""
    pool, model = text_pool(20), store.open_model(str(world / "model"))
    prepared(model.task, pool, tmp_path / "pool")
    run, feature = Run.open(tmp_path / "run", {"name": "test"}), make(Featurizer, {"name": "gradients", "rank": 2})

    def measurer(seed: int) -> Measurer:
        params = init_params(model.task.module, seed)
        encodings = {pool.fingerprint: tmp_path / "pool"}
        return Measurer(run, pool, pool, task=model.task, models=[params], encodings=encodings, key="same")

    first = measurer(0).table(feature)
    assert measurer(0).table(feature).meta == first.meta
    with pytest.raises(InputError, match="gradients was computed with the weights of another model"):
        measurer(1).table(feature)
    run.close()


# Messages.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"part": "3"}, "unreadable part '3'"),
        ({"part": "0/4"}, "unreadable part"),
        ({"part": "5/4"}, "unreadable part"),
        ({"sets": ("rnak=4",)}, "has no option 'rnak'"),
        ({"sets": ("shard=0",)}, "shard cannot be 0"),
        ({"sets": ("area=many",)}, "area cannot be 'many'"),
        ({"sets": ("model=1",)}, "there is one model"),
        ({"sets": ("store=float8",)}, "option 'store'"),
        ({"method": "gradient"}, "did you mean 'gradients'"),
    ],
)
def test_orders_that_cannot_be(world: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        small_store.order(world, **options)


def test_stores_that_cannot_be(world: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not go into 9 parts") as caught:
        store.featurize(small_store.order(world, part="2/9"), tmp_path / "a", workers=1)
    assert "60 rows, 8 shards" in caught.value.why
    with pytest.raises(InputError, match="run of another study"):
        store.featurize(small_store.order(world, part="1/2"), made, workers=1)
    with pytest.raises(InputError, match="context of this model is fixed"):
        store.featurize(small_store.order(world, context=8), tmp_path / "b", workers=1)
    task = Classifier(inputs=5, classes=3)
    small_store.write_model(tmp_path / "model", task, 0)
    with pytest.raises(InputError, match="does not read text"):
        store.open_model(str(tmp_path / "model"))
    (tmp_path / "model" / "task.json").write_text('{"task": "soup"}')
    with pytest.raises(InputError, match="not a task that assay wrote"):
        store.open_model(str(tmp_path / "model"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.json").write_text("{}")
    with pytest.raises(InputError, match="no scoring model"):
        store.open_model(str(tmp_path / "run"))


def test_parts_that_do_not_fit(world: Path, made: Path, parts: list[Path], tmp_path: Path) -> None:
    target = str(world / "target.jsonl")
    with pytest.raises(InputError, match="2 of 3 parts are missing: 1/3, 3/3"):
        store.score([parts[1]], target)
    with pytest.raises(InputError, match="a part too many"):
        store.score([parts[0], parts[1], parts[1], parts[2]], target)
    with pytest.raises(InputError, match="a part too many") as caught:
        store.score([parts[0], made], target)
    assert "one is of 3 parts, one of 1" in caught.value.why
    other = small_store.order(world, sets=("rank=2", "shard=8"), part="2/3")
    store.featurize(other, tmp_path / "other", workers=1)
    with pytest.raises(InputError, match="no parts of one store") as caught:
        store.score([parts[0], tmp_path / "other", parts[2]], target)
    assert "method" in caught.value.why


def test_scores_that_cannot_be(world: Path, made: Path, tmp_path: Path) -> None:
    target = str(world / "target.jsonl")
    with pytest.raises(InputError, match="no finished store"):
        store.score([tmp_path], target)
    with pytest.raises(InputError, match="'bm25' cannot score a store") as caught:
        store.score([made], target, methods=("bm25",))
    assert "graddot" in caught.value.fix
    task: Any = store.open_model(str(world / "model")).task
    small_store.write_model(tmp_path / "model", task, seed=5)
    with pytest.raises(InputError, match="made with another model"):
        store.score([made], target, model=str(tmp_path / "model"))


# The command line.


def test_the_commands(world: Path, tmp_path: Path) -> None:
    from assay.cli import app

    call = CliRunner().invoke
    pool, model = str(world / "pool.jsonl"), str(world / "model")
    words = ["featurize", "--pool", pool, "--model", model, "--out", str(tmp_path / "s"), "--set", "rank=2"]
    done = call(app, [*words, "--workers", "1", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["rows"] == facts["computed"] == ROWS and facts["rows_per_second"] > 0 and facts["peak_rss"] > 1e7
    again = call(app, [*words, "--workers", "1"])
    assert "60 examples x" in again.stdout and "nothing to compute" in again.stdout
    out = tmp_path / "scores.parquet"
    words = ["score", str(tmp_path / "s"), "--target", str(world / "target.jsonl"), "--methods", "trak,graddot"]
    done = call(app, [*words, "--out", str(out), "--workers", "1"])
    assert done.exit_code == 0 and "60 examples scored for 9" in done.stdout and "best by trak" in done.stdout
    assert pq.read_table(out).column_names == ["id", "trak", "graddot"]


def test_a_pool_of_vectors_has_no_bare_text() -> None:
    bare = Pool.bare(vector_pool(3).ids)
    assert len(bare) == 3 and bare.columns == ()
