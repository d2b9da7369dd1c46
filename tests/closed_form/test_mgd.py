"""Metagradient descent: its surrogate against closed forms, its update against its rules, and planted harm removed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from assay.core.errors import InputError
from assay.core.keys import digest, encode_ids
from assay.core.method import Scorer, Selector, make
from assay.core.pool import Pool
from assay.core.run import Ledger, Run
from assay.core.selection import Budget, Selection
from assay.data import toys
from assay.measure import Measurer
from assay.numerics.curvature import exact_gradients, slopes
from assay.report import curves
from assay.report.page import _faults
from assay.scorers.mgd import _Descent, _Seen, balance
from assay.summary import _curves
from assay.train import loop, optim, replay
from assay.train.additions import Additions
from assay.train.descent import Multiset, places
from assay.train.models import Classifier, first_weights
from assay.train.recipe import Recipe
from helpers import classifier, prepared, vector_pool

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = {"steps": 12, "terms_per_step": 6, "clip": 0.0, "weight_decay": 0.1}
RECIPES = {
    "sgd": Recipe(optimiser="sgd", lr=0.2, **PLAIN),
    "momentum": Recipe(optimiser="momentum", lr=0.1, **PLAIN),
    "adamw": Recipe(optimiser="adamw", lr=0.05, eps_root=1e-6, **PLAIN),
}


def multiset(tmp_path: Path, recipe: Recipe) -> tuple[Multiset, Any, Any]:
    """A float64 run on 20 of 30 examples, some twice; and the target."""
    pool, target = vector_pool(30), vector_pool(8, seed=1)
    task, encoded = classifier(pool, tmp_path / "pool", hidden=(4,))
    asked = prepared(task, target, tmp_path / "target")
    counts = 1 + np.arange(20) % 2
    passes = recipe.steps * recipe.terms_per_step / counts.sum()
    training = Multiset(
        task, encoded, np.arange(20), Selection.everything(pool.ids[:20]), recipe, dtype=torch.float64, counts=counts,
        passes=float(passes),
    )  # fmt: skip
    return training, encoded, asked


def objective(training: Multiset, asked: Any) -> Any:
    inputs = [asked.inputs(np.arange(len(asked)))]
    return lambda p: slopes(training.task, p, inputs, training.task.loss, training.moved, each=False)


def additions(training: Multiset, asked: Any, step: int) -> Additions:
    made = replay.metagradient(training, objective(training, asked), since=step, pushes=[step])
    params, push = made.pushes[step]
    flat = torch.cat([a.flatten(1) for a in push], dim=1).T
    return Additions(training.task, tuple(training.moved), set(), [(params, flat)], training.recipe.terms_per_step)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("name", RECIPES)
def test_an_addition_to_the_last_step_is_one_steps_influence(name: str, tmp_path: Path) -> None:
    """T-g5: -d f/d zeta_i = (n_i/T) lr grad f(theta_T)^T P grad loss_i(theta_{T-1}), P the step's own metric."""
    recipe = RECIPES[name]
    training, encoded, asked = multiset(tmp_path, recipe)
    last = recipe.steps - 1
    state = training.initial()
    for step in range(last):
        state = training.advance(state, step)
    params = training.named(state)
    slope = objective(training, asked)(training.named(training.advance(state, last)))[:, 0]
    lr = recipe.rate(last)
    metric = torch.ones_like(slope)
    if name == "adamw":
        batch = training.batches[last]
        grads, _ = loop.gradient(training.task, params, encoded, batch, np.ones(len(batch)), recipe.terms_per_step)
        g, m, v = flat(grads), flat(state.slots["mean"]), flat(state.slots["square"])
        (b1, b2), t = recipe.betas, recipe.steps
        moment = (b1 * m + (1 - b1) * g) / (1 - b1**t)
        root = ((b2 * v + (1 - b2) * g * g) / (1 - b2**t) + recipe.eps_root).sqrt()
        bend = moment * (1 - b2) * g / ((1 - b2**t) * root * (root + recipe.eps) ** 2)
        metric = (1 - b1) / (1 - b1**t) / (root + recipe.eps) - bend
    rows = np.arange(30)
    own = exact_gradients(training.task, params, encoded.inputs(rows), only=training.moved)
    want = lr / recipe.terms_per_step * (own @ (metric * slope))
    found = additions(training, asked, last).utilities(encoded.inputs(rows), encoded.sizes[rows])
    assert found.shape == (1, 30, 1)
    np.testing.assert_allclose(found[0, :, 0], want.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_an_addition_equals_training_with_a_little_of_it(name: str, tmp_path: Path) -> None:
    """Of an example that is in the multiset, and of one that is not: central differences at a step in mid-run."""
    recipe, step, h = RECIPES[name], 7, 1e-5
    training, encoded, asked = multiset(tmp_path, recipe)
    before = training.initial()
    for k in range(step):
        before = training.advance(before, k)

    def value(row: int, zeta: float) -> float:
        batch = training.batches[step]
        rows, weights = np.append(training.rows[batch], row), np.append(np.ones(len(batch)), zeta)
        moved, slots, _ = loop.advance(
            training.task, training.named(before), training.moved, before.slots, encoded, rows, weights, recipe, step,
            None,
        )  # fmt: skip
        after = training.run(replay.State(moved, slots), step + 1)
        with torch.no_grad():
            return float(training.task.loss(training.named(after), asked.inputs(np.arange(len(asked)))).mean())

    rows = np.array([3, 25])
    seen = [-(value(row, h) - value(row, -h)) / (2 * h) for row in rows.tolist()]
    found = additions(training, asked, step).utilities(encoded.inputs(rows), encoded.sizes[rows])[0, :, 0]
    np.testing.assert_allclose(found, seen, rtol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_that_holds_no_copy_is_reversed_too(name: str, tmp_path: Path) -> None:
    """What is added there still has its derivative: central differences."""
    training, encoded, asked = multiset(tmp_path, RECIPES[name])
    batches = [b if step != 7 else b[:0] for step, b in enumerate(training.batches)]
    object.__setattr__(training, "batches", batches)
    rows, zeta, h, since = np.array([3, 25]), np.array([1.0, -0.5]), 1e-5, 7
    before = training.initial()
    for step in range(since):
        before = training.advance(before, step)

    def value(sign: float) -> float:
        after = training.run(training.added(before, since, rows, sign * h * zeta), since + 1)
        with torch.no_grad():
            return float(training.task.loss(training.named(after), asked.inputs(np.arange(len(asked)))).mean())

    found = additions(training, asked, since).utilities(encoded.inputs(rows), encoded.sizes[rows])[0, :, 0]
    np.testing.assert_allclose(found @ zeta, -(value(1) - value(-1)) / (2 * h), rtol=1e-6)


# Where copies are visited.


def visits(ids: np.ndarray, counts: np.ndarray, **options: Any) -> list[list[bytes]]:
    given = {"steps": 40, "passes": 2.5, "seed": 0, **options}
    return [ids[step].tolist() for step in places(ids, counts, **given)]


def test_a_count_that_changes_moves_that_example_alone() -> None:
    ids = encode_ids(f"e{k}" for k in range(50))
    counts = np.arange(50) % 4
    for row in range(8):
        more = counts + (np.arange(50) == row)
        before, after = visits(ids, counts), visits(ids, more)
        own = ids[row]
        assert [[i for i in step if i != own] for step in before] == [[i for i in step if i != own] for step in after]
        held, now = ([step.count(own) for step in run] for run in (before, after))
        assert all(a <= b for a, b in zip(held, now, strict=True)) and sum(now) - sum(held) in (2, 3)


def test_every_copy_has_one_visit_in_a_pass() -> None:
    ids, counts = encode_ids(f"e{k}" for k in range(60)), np.arange(60) % 3
    for turn in range(3):
        steps = visits(ids, counts, passes=3.0, steps=30)[10 * turn : 10 * turn + 10]
        seen = [i for step in steps for i in step]
        assert [seen.count(i) for i in ids.tolist()] == counts.tolist()


def test_places_do_not_depend_on_the_order_of_ids() -> None:
    ids, counts = encode_ids(f"e{k}" for k in range(50)), np.arange(50) % 3
    mixed = np.random.default_rng(0).permutation(50)
    assert visits(ids[mixed], counts[mixed]) == visits(ids, counts)
    assert visits(ids, counts, seed=1) != visits(ids, counts)


def test_a_smaller_share_of_visits_is_a_part_of_a_larger_one() -> None:
    """Whatever else is in the multiset; and it is the share that it says."""
    ids, counts = encode_ids(f"e{k}" for k in range(3000)), 1 + np.arange(3000) % 2
    runs = [visits(ids, counts, share=share) for share in (0.3, 0.6, 1.0)]
    for less, more in zip(runs, runs[1:], strict=False):
        assert all(not Counter(a) - Counter(b) for a, b in zip(less, more, strict=True))
    assert runs[2] == visits(ids, counts)
    whole = sum(map(len, runs[2]))
    for run, share in zip(runs, (0.3, 0.6), strict=False):
        assert abs(sum(map(len, run)) - share * whole) < 4 * np.sqrt(whole * share * (1 - share))


def test_free_descent_trains_no_longer_as_its_multiset_grows(world: World, tmp_path: Path) -> None:
    """Of a multiset twice the budget every other visit is made, in as many steps, at weight 1; of a small one the
    loss is scaled up."""
    own = bare(world, tmp_path, tau="free", most=0, share=0.3)
    budget = RECIPE["steps"] * RECIPE["terms_per_step"]
    for size, weight in ((90, 1.0), (180, 1.0), (300, 1.0), (600, 1.0), (45, 2.0)):
        counts = np.zeros(300, dtype=np.int64)
        counts[: min(size, 300)] = 2 if size == 600 else 1
        training = own.training(counts, 0)
        assert (training.selection.weights == weight).all() and len(training.batches) == RECIPE["steps"]
        terms = sum(map(len, training.batches))
        assert abs(terms * weight / budget - 1) < 0.06, (size, terms)


def bare(world: World, folder: Path, **options: Any) -> _Descent:
    """A descent on the digits, as while its method is computed."""
    measurer = world.measurer(folder / "run")
    frame: Any = SimpleNamespace(uses=[], warnings=[], notes={}, ledger=Ledger(), method=mgd(**OPTIONS))
    measurer._stack.append(frame)
    return _Descent.of(mgd(**{**OPTIONS, **options}), measurer)


@pytest.mark.parametrize("options", [{}, {"insert": 3}, {"folds": 2, "window": 30}, {"tau": "free", "insert": 2}])
def test_the_first_step_is_checked_by_finite_differences(world: World, tmp_path: Path, options: Any) -> None:
    """The derivative is the slope that training itself shows; a wrong one is told."""
    own = bare(world, tmp_path, precision="float64", **options)
    counts = own.first()
    seen, frame = own.seen(counts, set()), own.context._stack[-1]  # type: ignore[attr-defined]
    own.checked(counts, seen.utility)
    (note,) = frame.notes.values()
    assert note["apart"] < 1e-3 and not frame.warnings
    own.checked(counts, -seen.utility)
    assert frame.notes.popitem()[1]["apart"] == pytest.approx(2.0, abs=0.01)
    assert "mgd: the derivative is 200% off" in frame.warnings[0]


def test_a_broken_last_pass_is_a_fair_share() -> None:
    ids = encode_ids(f"e{k}" for k in range(4000))
    seen = sum(map(len, visits(ids, np.ones(4000, dtype=np.int64), passes=0.25)))
    assert abs(seen - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75)
    assert visits(ids, np.zeros(4000, dtype=np.int64), steps=3) == [[], [], []]


# The update.


def mgd(**options: Any) -> Any:
    return make(Scorer, {"name": "mgd", **options})


def descent(n: int = 200, *, seed: int = 0, sizes: np.ndarray | None = None, **options: Any) -> _Descent:
    method = mgd(**{"share": 0.3, "rate": 0.5, **options})
    ids = encode_ids(f"e{k:04d}" for k in range(n))
    sizes = np.ones(n, dtype=np.int64) if sizes is None else sizes
    context: Any = SimpleNamespace(seed=seed)
    return _Descent(
        method, context, Recipe(), ids, np.arange(n), sizes, np.ones(n, dtype=bool), method.share * sizes.sum(),
        ids[:0], ids[:0],
    )  # fmt: skip


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("tau", ["budget", "free"])
def test_counts_stay_whole_and_within_bounds(tau: str, most: int) -> None:
    """T-g8, along many updates by random utilities; and at the balance the multiset stays as large as it may be."""
    rng = np.random.default_rng(0)
    for seed in range(5):
        sizes = rng.integers(1, 30, 200)
        own = descent(seed=seed, sizes=sizes, tau=tau, most=most)
        counts = own.first()
        assert own.budget - counts @ sizes < sizes[counts == 0].min()
        for metastep in range(15):
            utility = rng.normal(size=200) * sizes + 5 * (np.arange(200) < 20)
            after = own.moved(counts, utility, metastep)
            assert after.dtype.kind == "i" and after.min() >= 0 and (not most or after.max() <= most)
            assert np.abs(after - counts).max() == 1, "a count moves by one"
            if tau == "budget":
                assert 0 <= own.budget + 1e-6 - after @ sizes < 2 * sizes.max()
            counts = after
        assert most == 1 or counts.max() > 1


def test_what_has_no_utility_stays() -> None:
    rng = np.random.default_rng(0)
    for tau in ("budget", "free"):
        own = descent(tau=tau, rate=1.0)
        counts, utility = own.first(), rng.normal(size=200)
        utility[::3] = 0.0
        after = own.moved(counts, utility, 0)
        assert (after[::3] == counts[::3]).all() and (after != counts).any()
        assert (own.moved(counts, np.zeros(200), 0) == counts).all()


def test_at_rate_one_the_balance_takes_the_best() -> None:
    """Then an update at `most` = 1 is the cut itself, by utility per term."""
    rng = np.random.default_rng(1)
    sizes = np.full(200, 7)
    own = descent(rate=1.0, sizes=sizes)
    utility = rng.normal(size=200)
    after = own.moved(own.first(), utility, 0)
    assert sorted(np.flatnonzero(after)) == sorted(np.argsort(-utility)[:60])


def test_free_follows_the_sign() -> None:
    utility = np.random.default_rng(2).normal(size=200)
    own = descent(tau="free", rate=1.0, most=0)
    counts = own.first()
    after = own.moved(counts, utility, 0)
    assert (after == np.maximum(0, counts + np.sign(utility))).all()


def test_a_share_moves_and_it_is_keyed() -> None:
    utility = np.random.default_rng(2).normal(size=4000)
    own = descent(4000, tau="free", rate=0.25, most=0)
    counts = own.first()
    changed = [own.moved(counts + 1, utility, k) != counts + 1 for k in range(2)]
    assert all(abs(c.mean() - 0.25) < 0.03 for c in changed)
    assert abs((changed[0] & changed[1]).mean() - 0.0625) < 0.02, "metasteps draw anew"
    first = descent(400, tau="free", rate=0.25, most=0)
    assert (first.moved(counts[:400] + 1, utility[:400], 0) == own.moved(counts + 1, utility, 0)[:400]).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_balance_is_the_lowest_level_that_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    value, up, down = rng.integers(-3, 4, 12).astype(float), rng.integers(0, 3, 12) * 1.0, rng.integers(0, 3, 12) * 1.0

    def change(tau: float) -> float:
        return float(up[value > tau].sum() - down[value < tau].sum())

    room = float(rng.integers(-4, 5))
    grid = [-np.inf, *np.arange(-4, 4.1, 0.5), np.inf]
    fits = [tau for tau in grid if change(tau) <= room]
    found = balance(value, up, down, room)
    assert change(found) == (change(fits[0]) if fits else change(np.inf))


# The whole of it.


class World:
    """Digits at a linear model: a convex problem, some of whose labels are wrong."""

    def __init__(self, folder: Path, flip: float = 0.2, pool: int = 300, target: int = 400) -> None:
        train, test, truth = toys.digits(flip=flip, train=pool, test=target)
        self.pool, self.target = Pool.from_columns(train), Pool.from_columns(test)
        self.wrong = np.isin(self.pool.ids, encode_ids(truth["id"].to_pylist()))
        self.task, self.folder = Classifier(inputs=64, hidden=(), classes=10), folder
        for part in (self.pool, self.target):
            prepared(self.task, part, folder / part.fingerprint)

    def measurer(self, out: Path, **options: Any) -> Measurer:
        run = Run.open(out, {"name": "mgd"})
        run.close()
        encodings = {part.fingerprint: self.folder / part.fingerprint for part in (self.pool, self.target)}
        key = digest(self.task.describe())
        models = [{n: torch.zeros_like(p) for n, p in self.task.module.named_parameters()}]
        return Measurer(
            run, self.pool, self.target, task=self.task, models=models, encodings=encodings, key=key, **options
        )


RECIPE = {"steps": 40, "terms_per_step": 60, "lr": 0.5, "optimiser": "sgd", "clip": 0.0}
OPTIONS = {"recipe": RECIPE, "share": 0.7, "rate": 0.4, "metasteps": 10, "patience": 10}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("digits"))


def test_planted_harm_is_removed(world: World, tmp_path: Path) -> None:
    """T-g7: of wrong labels, 95% leave within ten metasteps."""
    measurer = world.measurer(tmp_path / "run")
    table = measurer.table(mgd(**OPTIONS))
    counts = np.floor(table.column("score"))
    assert set(counts.tolist()) == {0.0, 1.0} and counts.sum() == 210
    assert counts[world.wrong].mean() <= 0.05
    rows = table.meta["notes"]["descent"]["trajectory"]
    assert len(rows) <= 11 and rows[0]["changed"] == 0 and all(r["terms"] == 210 for r in rows)
    best = table.meta["notes"]["descent"]["best"]
    assert rows[best]["hold"] == min(r["hold"] for r in rows) < rows[0]["hold"]
    job: Any = SimpleNamespace(methods={"m": mgd(**OPTIONS)}, measurer=measurer)
    (told,) = _curves(job)["m"]
    assert told["lines"] == {"selects": [r["select"] for r in rows], "held out": [r["hold"] for r in rows]}
    plot = curves.curve(told)
    assert plot and plot["best_at"] == best and not list(_faults(told, curves.SCHEMA, ""))
    cut = make(Selector, "cut").select(table, np.ones(300, dtype=np.int64), Budget(210, "examples"), barred={})
    assert set(cut.ids.tolist()) == set(table.ids[counts > 0].tolist()), "the cut is the multiset"


def test_without_a_limit_copies_may_repeat_and_the_cut_still_begins_with_them(world: World, tmp_path: Path) -> None:
    short = {**OPTIONS, "metasteps": 3, "most": 0, "tau": "free", "share": 0.3}
    table = world.measurer(tmp_path / "run").table(mgd(**short))
    counts = np.floor(table.column("score"))
    assert counts.max() > 1 and counts.min() == 0
    assert len({r["terms"] for r in table.meta["notes"]["descent"]["trajectory"]}) > 1


def test_a_model_never_scores_what_it_was_trained_on(world: World, tmp_path: Path) -> None:
    """So an example has the same utility, to the last bit, in the multiset and out of it; with one fold it has not."""
    for folds in (1, 3):
        measurer = world.measurer(tmp_path / str(folds))
        frame: Any = SimpleNamespace(uses=[], warnings=[], notes={}, method=mgd(**OPTIONS))
        measurer._stack.append(frame)
        own = _Descent.of(mgd(**{**OPTIONS, "folds": folds}), measurer)
        counts = own.first()
        out = counts.copy()
        row = int(np.flatnonzero(counts)[0])
        out[row] = 0
        same = own.folds == own.folds[row]
        before, after = (own.seen(c, set()).utility for c in (counts, out))
        if folds == 1:
            assert same.all() and before[row] != after[row]
            continue
        assert (before[same] == after[same]).all() and (before[~same] != after[~same]).mean() > 0.9
        for fold in range(folds):
            training = own.training(counts, fold)
            assert set(training.selection.ids.tolist()) == set(own.ids[(counts > 0) & (own.folds != fold)].tolist())
            assert (training.selection.weights == 1.5).all(), "the others take up its share of the loss"


def test_memory_moves_by_a_running_mean(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, asked = iter(np.random.default_rng(0).normal(size=(3, 300))), []
    held: list[np.ndarray] = []

    def seen(self: Any, counts: np.ndarray, slow: set[str]) -> _Seen:
        held.append(next(given))
        return _Seen(1.0, 1.0 / len(held), held[-1])

    def moved(self: Any, counts: np.ndarray, utility: np.ndarray, metastep: int) -> np.ndarray:
        asked.append(utility)
        return counts

    monkeypatch.setattr(_Descent, "seen", seen)
    monkeypatch.setattr(_Descent, "moved", moved)
    table = world.measurer(tmp_path / "run").table(mgd(**{**OPTIONS, "metasteps": 2, "memory": 0.75}))
    assert (asked[0] == held[0]).all()
    np.testing.assert_allclose(asked[1], 0.75 * held[0] + 0.25 * held[1], rtol=1e-12)
    order = np.argsort(np.argsort(table.align(np.sort(table.ids)).column("score") % 1))
    assert (order == np.argsort(np.argsort(held[2]))).all(), "ties fall by the utilities of the best metastep itself"


def test_metasteps_that_vary_have_trainings_of_their_own(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    whole = _Descent.seen

    def seen(self: Any, counts: np.ndarray, slow: set[str]) -> _Seen:
        used.append(self.recipe.seed)
        return whole(self, counts, slow)

    monkeypatch.setattr(_Descent, "seen", seen)
    short = {**OPTIONS, "metasteps": 2, "recipe": {**RECIPE, "seed": 3}}
    one = world.measurer(tmp_path / "one").table(mgd(**short))
    assert used == [3, 3, 3]
    varied = world.measurer(tmp_path / "varied").table(mgd(**short, vary=True))
    assert used[3:] == [403_000, 403_001, 403_002]
    same = world.measurer(tmp_path / "same").table(
        mgd(**{**short, "metasteps": 1, "recipe": {**RECIPE, "seed": 403_000}})
    )
    rows = [t.meta["notes"]["descent"]["trajectory"] for t in (varied, same, one)]
    assert rows[0][0] == rows[1][0] != rows[2][0], "the first one is that seed's"
    assert rows[0][1]["changed"] == rows[1][1]["changed"] and rows[0][1]["select"] != rows[1][1]["select"]


def test_descent_can_go_on_from_the_scoring_models(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each metastep from the first model; the first loss is that of a training that begins there, under the root of a
    gradient of that model."""
    begun: list[Multiset] = []
    whole = _Descent.training

    def training(self: Any, counts: np.ndarray, fold: int) -> Multiset:
        begun.append(whole(self, counts, fold))
        return begun[-1]

    monkeypatch.setattr(_Descent, "training", training)
    models = [first_weights(world.task, 40 + k, torch.float32) for k in range(2)]
    measurer = world.measurer(tmp_path / "one")
    measurer.models = models
    recipe = {**RECIPE, "optimiser": "adamw", "lr": 0.01}
    table = measurer.table(mgd(**{**OPTIONS, "metasteps": 2, "check": 0, "recipe": recipe}, begin="model"))
    for one in begun[-3:]:
        assert all(torch.equal(one.first[name], p) for name, p in models[0].items())
    encoded, chosen = measurer.encoded(world.pool), Selection.everything(np.sort(world.pool.ids))
    rows, own = np.argsort(world.pool.ids, kind="stable"), begun[-1].recipe
    batch = next(loop.steps(own, chosen, encoded.sizes[rows]))
    grads, _ = loop.gradient(world.task, models[0], encoded, rows[batch], np.ones(len(batch)), own.terms_per_step)
    entries = flat(optim.clip(grads, own.clip)).double()
    assert own.eps_root == float(f"{float((entries[entries != 0] ** 2).mean()):.1e}")
    state = begun[-3].run(begun[-3].initial(), 0)
    asked = measurer.encoded(world.target).inputs(np.arange(len(world.target)))
    with torch.no_grad():
        losses = world.task.loss(begun[-3].named(state), asked).numpy()
    row = table.meta["notes"]["descent"]["trajectory"][0]
    held = round(0.2 * len(losses))
    mean = (row["hold"] * held + row["select"] * (len(losses) - held)) / len(losses)
    assert mean == pytest.approx(float(losses.mean()), rel=1e-5)


def test_descent_from_a_model_that_is_not_there_is_refused(world: World, tmp_path: Path) -> None:
    measurer = world.measurer(tmp_path / "run")
    measurer.models = []
    with pytest.raises(InputError, match="there is no scoring model"):
        measurer.table(mgd(**OPTIONS, begin="model"))


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the reversed steps of the third metastep: two are found made, and of the third its own states."""
    short = mgd(**{**OPTIONS, "metasteps": 3})
    whole = world.measurer(tmp_path / "whole").table(short)
    calls, own = [0], replay.reverse

    def counted(limit: int) -> Any:
        def reverse(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] > limit:
                raise Stopped
            return own(*args)

        calls[0] = 0
        return reverse

    monkeypatch.setattr(replay, "reverse", counted(50))  # twenty to a metastep
    with pytest.raises(Stopped):
        world.measurer(tmp_path / "run").table(short)
    monkeypatch.setattr(replay, "reverse", counted(1000))
    again = world.measurer(tmp_path / "run").table(short)
    assert again.values.tobytes() == whole.values.tobytes() and again.meta["notes"] == whole.meta["notes"]
    assert 30 <= calls[0] < 40, "what was made, and what was kept of a sweep, is not made again"


def test_it_begins_with_what_another_scorer_ranks_best(world: World, tmp_path: Path) -> None:
    """And the start's scores are of the half that chooses alone: what watches has no say."""
    measurer = world.measurer(tmp_path / "run")
    method = mgd(**{**OPTIONS, "start": {"name": "graddot", "features": "gradients"}, "share": 0.25})
    frame: Any = SimpleNamespace(uses=[], warnings=[], notes={})
    measurer._stack.append(frame)  # as while a method is computed
    own = _Descent.of(method, measurer)
    assert not set(own.selects.tolist()) & set(own.holds.tolist())
    assert (len(own.selects), len(own.holds)) == (320, 80), "a fifth watches"
    counts = own.first()
    part = world.target.at(np.flatnonzero(np.isin(world.target.ids, own.selects)))
    scores = measurer.asking(part).table(method.start).align(own.ids).column("score")
    assert counts.sum() == 75 and scores[counts == 1].min() >= scores[counts == 0].max()


def test_what_is_barred_or_withheld_takes_no_part(world: World, tmp_path: Path) -> None:
    barred, withheld = world.pool.ids[::4], world.target.ids[::3]
    measurer = world.measurer(tmp_path / "run", barred=barred, withheld=withheld)
    own = _Descent.of(mgd(**OPTIONS), measurer)
    asked = np.concatenate([own.selects, own.holds])
    assert set(asked.tolist()) == set(world.target.ids.tolist()) - set(withheld.tolist())
    counts, rng = own.first(), np.random.default_rng(0)
    for metastep in range(4):
        counts = own.moved(counts, rng.normal(size=300), metastep)
        assert not np.isin(own.ids[counts > 0], barred).any() and counts.sum() == 157  # 0.7 of 225


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 2.0}, "share = 2"),
        ({"rate": 1.5}, "rate = 1.5"),
        ({"memory": 1.5}, "memory = 1.5"),
        ({"share": 1e-6}, "nothing to begin with"),
        ({"hold": 1.0}, "cannot both choose and watch"),
        ({"window": 41}, "no window of 41 steps"),
        ({"insert": 50}, "no window of 50 steps"),
        ({"insert": 7, "window": 6}, "additions to 7 of them"),
        ({"recipe": None}, "does not know how to train"),
        ({"recipe": {"steeps": 3}}, "recipe.steeps"),
    ],
)
def test_what_cannot_be_is_refused(world: World, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        world.measurer(tmp_path / "run").table(mgd(**{**OPTIONS, **changes}))
