"""Scorers over marks and models, and their nulls, against dense algebra, brute force and short training."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_scorers import World, exact_features, hessian, looped_flat, near, three, two, world  # noqa: F401 - fixtures
from torch import Tensor

from assay.core.errors import InputError
from assay.core.keys import decode_ids
from assay.core.method import Batch, Cost, Featurizer, Mark, Scorer, Selector, make
from assay.core.pool import Pool
from assay.core.run import Run
from assay.core.selection import Budget
from assay.core.table import Table, unit_rows
from assay.measure import Measurer
from assay.numerics.stats import spearman
from helpers import prepared

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT, MARGIN = exact_features(), exact_features("margin")


def theta(seed: int, size: int = 18) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(w: World, out: Path, spec: Any, runs: list[list[Mark]], **options: Any) -> Table:
    models = [run[-1].params for run in runs]
    return w.measurer(out, models, trajectories=runs, **options).table(make(Scorer, spec))


def single(w: World, out: Path, spec: Any, at: Tensor) -> Table:
    return table(w, out, spec, [[Mark(w.params(at), {})]])


def jacobian(w: World, at: Tensor, inputs: Any, measure: str = "loss") -> np.ndarray:
    sign, call = (1, w.task.loss) if measure == "loss" else (-1, w.task.margin)
    return (sign * torch.func.jacrev(lambda t: call(w.params(t), inputs))(at)).numpy()


# TracIn.


def marks(w: World, seeds: list[int], rates: list[float], steps: list[int]) -> list[Mark]:
    return [Mark(w.params(theta(s)), {}, k, r) for s, r, k in zip(seeds, rates, steps, strict=True)]


def test_tracin_is_the_rate_weighted_sum_over_marks(three: World, tmp_path: Path) -> None:  # noqa: F811
    runs = [marks(three, [0, 1, 2], [0.3, 0.2, 0.1], [2, 2, 3]), marks(three, [3, 4], [0.5, 0.1], [1, 1])]
    for queries, measure in ((None, "loss"), (MARGIN, "margin")):
        want = np.zeros((len(three.target), len(three.pool)))
        for run in runs:
            for mark in run:
                at = torch.cat([p.flatten() for p in mark.params.values()])
                dots = jacobian(three, at, three.questions, measure) @ jacobian(three, at, three.inputs).T
                want += mark.rate / sum(m.steps for m in run) / len(runs) * dots
        spec = {"name": "tracin", "features": EXACT, "queries": queries}
        found = table(three, tmp_path / f"{measure} each", {**spec, "targets": "each"}, runs)
        near(found.values.T, want, 1e-6)
        assert found.columns == tuple(i.decode() for i in three.target.ids)
        near(table(three, tmp_path / f"{measure} mean", spec, runs).values[:, 0], want.mean(axis=0), 1e-6)


def test_tracin_of_a_model_of_unknown_history_is_graddot(three: World, tmp_path: Path) -> None:  # noqa: F811
    runs = [[Mark(three.params(theta(s)), {})] for s in range(2)]
    found = [table(three, tmp_path / n, {"name": n, "features": EXACT}, runs).values for n in ("tracin", "graddot")]
    near(found[0], found[1], 1e-12)


def test_tracin_is_what_one_step_on_the_example_did(three: World, tmp_path: Path) -> None:  # noqa: F811
    """The fall of the target loss in one step of SGD on {i}, up to O(rate^2): half the rate, a quarter of the error."""
    before, errors = theta(3), []
    loss = float(three.asked_loss(before))
    slopes = torch.func.jacrev(three.losses)(before)
    for rate in (4e-3, 2e-3):
        worst = 0.0
        for i in (0, 7, 20):
            after = before - rate * slopes[i]
            run = [[Mark(three.params(after), {}, 1, rate)]]
            found = table(three, tmp_path / f"{rate}{i}", {"name": "tracin", "features": EXACT}, run).values[i, 0]
            worst = max(worst, abs(loss - float(three.asked_loss(after)) - found))
        errors.append(worst)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_tracin_needs_features_of_marks(three: World, tmp_path: Path) -> None:  # noqa: F811
    runs = [marks(three, [0, 1], [0.1, 0.1], [1, 1])]
    with pytest.raises(InputError, match="the training runs left 2 marks"):
        table(three, tmp_path, {"name": "tracin", "features": "column"}, runs)


# TRAK.

TRAK = {"name": "trak", "features": MARGIN, "output": "margin", "damping": 0.1, "every": True}


def trak_margin(w: World, ats: list[Tensor], weighted: bool = True) -> np.ndarray:
    """`[q, n]` from dense matrices: the two factors are averaged over models apart from each other."""
    first, second = [], []
    for at in ats:
        phi, asked = jacobian(w, at, w.inputs, "margin"), jacobian(w, at, w.questions, "margin")
        p = np.exp(-w.losses(at).numpy())
        gram = phi.T @ ((p * (1 - p) if weighted else np.ones(len(p)))[:, None] * phi)
        gram += 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram))
        first.append(asked @ np.linalg.solve(gram, phi.T))
        second.append(1 - p)
    return np.mean(first, axis=0) * np.mean(second, axis=0)


@pytest.mark.parametrize("weighted", [True, False])
def test_trak_over_marks_averages_two_factors(three: World, tmp_path: Path, weighted: bool) -> None:  # noqa: F811
    ats = [theta(s) for s in range(4)]
    runs = [[Mark(three.params(t), {}) for t in part] for part in (ats[:2], ats[2:])]
    want = trak_margin(three, ats, weighted)
    spec = {**TRAK, "weighted": weighted}
    near(table(three, tmp_path / "each", {**spec, "targets": "each"}, runs).values.T, want, 1e-5)
    near(table(three, tmp_path / "mean", spec, runs).values[:, 0], want.mean(axis=0), 1e-5)
    last = table(three, tmp_path / "last", {**spec, "every": False, "targets": "each"}, runs)
    near(last.values.T, trak_margin(three, [ats[1], ats[3]], weighted), 1e-5)


@pytest.mark.parametrize("name", ["trak", "trackstar", "tracin"])
def test_equal_marks_are_one(three: World, tmp_path: Path, name: str) -> None:  # noqa: F811
    """And so are equal models. Copies, so that nothing is shared by accident."""
    spec: dict[str, Any] = {"name": name, "features": EXACT, "targets": "each"}
    spec |= {} if name == "tracin" else {"every": True}

    def copies(n: int) -> list[Mark]:
        return [Mark({k: p.clone() for k, p in three.params(theta(0)).items()}, {}, 2, 0.3) for _ in range(n)]

    one = table(three, tmp_path / "1", spec, [copies(1)]).values
    for k, runs in enumerate(([copies(3)], [copies(1), copies(1)])):
        near(table(three, tmp_path / f"more {k}", spec, runs).values, one, 1e-9)


def test_trak_projects_each_model_by_signs_of_its_own(three: World, tmp_path: Path) -> None:  # noqa: F811
    """The first by those of the seed given; the target's features by the same as the pool's, of either measure."""
    small = {"projection": "sparse", "size": 6, "store": "float32"}
    runs = [[Mark(three.params(theta(0)), {})], [Mark(three.params(theta(0)), {})]]

    def spec(seed: int, **more: Any) -> dict[str, Any]:
        loss, asked = ({"name": "gradients", **small, "seed": seed, "measure": m} for m in ("loss", "margin"))
        return {"name": "trak", "features": loss, "queries": asked, "targets": "each", **more}

    one, other = (table(three, tmp_path / f"{s}", spec(s), runs[:1]).values for s in (3, 4))
    assert np.abs(one - other).max() > 0.1 * np.abs(one).max()
    near(table(three, tmp_path / "own", spec(3), runs).values, (one + other) / 2, 1e-9)
    near(table(three, tmp_path / "shared", spec(3, projections="shared"), runs).values, one, 1e-9)


def test_trak_of_the_margin_is_that_of_the_loss_in_another_unit(two: World, tmp_path: Path) -> None:  # noqa: F811
    """A target example's loss falls by Q_q for each unit of its margin: queries may be of either."""
    at = two.fit(decay=0.02)
    spec = {"name": "trak", "features": MARGIN, "output": "margin", "targets": "each"}
    margin = single(two, tmp_path / "a", {**spec, "queries": MARGIN}, at).values
    loss = single(two, tmp_path / "b", {**spec, "queries": EXACT}, at).values
    q = 1 - torch.exp(-two.task.loss(two.params(at), two.questions)).numpy()
    near(loss, margin * q, 1e-5)


# DsDm.


def test_dsdm_takes_the_best_set_of_a_linear_model(two: World, tmp_path: Path) -> None:  # noqa: F811
    """All 495 ways to take 4 of 12: what one Newton step on them adds to the mean margin of the target."""
    at, rows = two.fit(decay=0.02), np.arange(12)
    pool = two.pool.at(rows)
    prepared(two.task, pool, tmp_path / "few")
    w = World(two.task, pool, two.target, two.task.encoded(tmp_path / "few"), two.asked, tmp_path)
    (tmp_path / "target").symlink_to(two.folder / "target")
    (tmp_path / "pool").symlink_to(tmp_path / "few")
    spec = {"name": "dsdm", "estimates": {"name": "trak", "features": MARGIN, "output": "margin"}}
    scores = single(w, tmp_path / "run", spec, at)
    cut = make(Selector, "cut").select(scores, np.ones(12, np.int64), Budget(4, "examples"), barred={})
    h = hessian(lambda t: w.losses(t).sum())(at)
    damped = h + 0.1 * h.trace() / len(at) * torch.eye(len(at), dtype=torch.float64)
    slope = torch.func.grad(lambda t: w.task.margin(w.params(t), w.questions).mean())(at)
    grads = torch.func.jacrev(w.losses)(at)
    gains = {s: -float(slope @ torch.linalg.solve(damped, grads[list(s)].sum(dim=0))) for s in
             itertools.combinations(range(12), 4)}  # fmt: skip
    best = max(gains, key=gains.__getitem__)
    assert sorted(cut.ids.tolist()) == sorted(pool.ids[list(best)].tolist())


def test_dsdm_counts_groups_alike(tmp_path: Path, three: World) -> None:  # noqa: F811
    columns = {name: three.target.column(name) for name in ("pixels", "label")}
    target = Pool.from_columns({**columns, "task": ["a"] * 6 + ["b"] * 2 + ["c"]})
    prepared(three.task, target, tmp_path / "target")
    (tmp_path / "pool").symlink_to(three.folder / "pool")
    w = World(three.task, three.pool, target, three.encoded, three.task.encoded(tmp_path / "target"), tmp_path)
    inner = {"name": "trak", "features": EXACT}
    each = single(w, tmp_path / "1", {**inner, "targets": "each"}, theta(0)).values
    found = single(w, tmp_path / "2", {"name": "dsdm", "estimates": inner, "per": "group", "group": "task"}, theta(0))
    near(found.values[:, 0], np.mean([each[:, :6].mean(1), each[:, 6:8].mean(1), each[:, 8]], axis=0), 1e-10)
    plain = single(w, tmp_path / "3", {"name": "dsdm", "estimates": inner}, theta(0))
    near(plain.values[:, 0], each.mean(axis=1), 1e-10)
    with pytest.raises(InputError, match="needs groups"):
        single(w, tmp_path / "4", {"name": "dsdm", "per": "group"}, theta(0))


# TrackStar.


class Turned(Featurizer):
    """Exact gradients in another basis. Formula: x Q. Reference: none."""

    inner: Featurizer = dataclasses.field(default_factory=lambda: EXACT)  # type: ignore[assignment]
    turn: int = 0

    cost: ClassVar[Cost] = "gradient"

    def columns(self, state: Any) -> tuple[str, ...]:
        return tuple(map(str, range(18)))

    def init(self, context: Any) -> Any:
        context.table(self.inner)
        context.target_table(self.inner)
        q, _ = np.linalg.qr(np.random.default_rng(self.turn).normal(size=(18, 18)))
        return q if self.turn else np.eye(18)

    def featurize(self, state: Any, batch: Batch) -> Any:
        return (batch.table(self.inner) @ state).astype(np.float64)


def star(features: Any = EXACT, **options: Any) -> dict[str, Any]:
    return {"name": "trackstar", "features": features, "targets": "each", **options}


def test_trackstar_is_the_dense_formula(three: World, tmp_path: Path) -> None:  # noqa: F811
    own, asked = (looped_flat(three, theta(0), e) for e in (three.encoded, three.asked))
    r = 0.3 * asked.T @ asked / len(asked) + 0.7 * own.T @ own / len(own)
    r += 0.05 * np.trace(r) / len(r) * np.eye(len(r))
    values, vectors = np.linalg.eigh(r)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    want = unit_rows(own @ root)[0] @ unit_rows(asked @ root)[0].T
    near(single(three, tmp_path, star(mix=0.3, damping=0.05), theta(0)).values, want, 1e-5)


def test_trackstar_without_a_metric_is_gradcos(three: World, tmp_path: Path) -> None:  # noqa: F811
    """Damped without end, R is a multiple of the identity."""
    plain = {"name": "gradcos", "features": EXACT, "targets": "each"}
    want = single(three, tmp_path / "1", plain, theta(0)).values
    near(single(three, tmp_path / "2", star(damping=1e9), theta(0)).values, want, 1e-6)


def test_trackstar_does_not_see_the_basis(three: World, tmp_path: Path) -> None:  # noqa: F811
    """Features kept in float32; rounding is what is left."""
    for options in ({"mix": 0.4}, {}):
        found = [
            single(three, tmp_path / f"{turn}{options}", star(Turned(turn=turn, store="float32"), **options), theta(0))
            for turn in (0, 1)
        ]
        near(found[1].values, found[0].values, 1e-3)


def test_trackstar_mixes_where_the_two_cross(three: World, tmp_path: Path) -> None:  # noqa: F811
    """At the k-th eigenvalue both parts of R are equal: (1 - mix) a = mix b."""
    own, asked = (looped_flat(three, theta(0), e) for e in (three.encoded, three.asked))
    a, b = (np.linalg.eigvalsh(x.T @ x / len(x))[-2] for x in (own, asked))
    found = single(three, tmp_path, star(crossing=2), theta(0)).meta["notes"]
    (mix,) = found["share of the target in R"]["mix"]
    assert mix == pytest.approx(a / (a + b), rel=1e-4) and (1 - mix) * a == pytest.approx(mix * b, rel=1e-4)


# Nulls.


def test_nearest_is_the_largest_cosine_of_inputs(three: World, tmp_path: Path) -> None:  # noqa: F811
    x, q = (np.array(p.column("pixels")) for p in (three.pool, three.target))
    want = unit_rows(x)[0] @ unit_rows(q)[0].T
    spec = {"name": "nearest", "features": {"name": "column", "store": "float32"}}
    near(single(three, tmp_path / "1", {**spec, "targets": "each"}, theta(0)).values, want, 1e-6)
    near(single(three, tmp_path / "2", spec, theta(0)).values[:, 0], want.max(axis=1), 1e-6)
    near(single(three, tmp_path / "3", {**spec, "reduce": "mean"}, theta(0)).values[:, 0], want.mean(axis=1), 1e-6)
    with pytest.raises(InputError, match="has no effect"):
        single(three, tmp_path / "4", {**spec, "targets": "each", "reduce": "mean"}, theta(0))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1.0], [1.0, 2.0]], "does not hold vectors"),
        (["a", "b"], "does not hold vectors"),
        ([[1.0], [np.nan]], "finite"),
    ],
)
def test_a_column_that_holds_no_vectors(tmp_path: Path, values: Any, said: str) -> None:
    pool = Pool.from_columns({"text": ["a", "b"], "x": values})
    run = Run.open(tmp_path, {})
    run.close()
    with pytest.raises(InputError, match=said):
        Measurer(run, pool, pool).table(make(Featurizer, {"name": "column", "column": "x"}))
    with pytest.raises(InputError, match="there is no column 'y'"):
        Measurer(run, pool, pool).table(make(Featurizer, {"name": "column", "column": "y"}))


def test_bm25_of_each_query(tmp_path: Path) -> None:
    pool = Pool.from_columns({"text": ["cat cat dog", "dog", "a mat and a cat", "none of them"]})
    target = Pool.from_columns({"id": ["p", "q", "r"], "text": ["cat", "dog mat", "cat dog"]})
    run = Run.open(tmp_path, {})
    run.close()
    measurer = Measurer(run, pool, target)
    each = measurer.table(make(Scorer, {"name": "bm25", "targets": "each"}))
    assert each.columns == ("p", "q", "r")
    for reduce in ("mean", "max"):
        one = measurer.table(make(Scorer, {"name": "bm25", "reduce": reduce})).values[:, 0]
        near(one, getattr(each.values, reduce)(axis=1), 1e-12)
    near(each.values[:, 2], each.values[:, 0] + measurer_of(tmp_path, pool, "dog"), 1e-12)
    with pytest.raises(InputError, match="has no effect"):
        measurer.table(make(Scorer, {"name": "bm25", "targets": "each", "reduce": "max"}))


def measurer_of(out: Path, pool: Pool, text: str) -> np.ndarray:
    run = Run.open(out / text, {})
    run.close()
    return Measurer(run, pool, Pool.from_columns({"text": [text]})).table(make(Scorer, "bm25")).values[:, 0]


# Options chosen by short training.

GRID = [1e-3, 1.0, 1e6]


def tuned(steps: int, lr: float, **more: Any) -> dict[str, Any]:
    inner = {"name": "trak", "features": MARGIN, "output": "margin"}
    return {
        "name": "tuned", "inner": inner, "grid": {"damping": GRID}, "steps": steps, "lr": lr, "optimiser": "sgd",
        "terms_per_step": 160, "groups": 10, **more,
    }  # fmt: skip


def rows_of(found: Table) -> list[dict[str, Any]]:
    (note,) = [v for k, v in found.meta["notes"].items() if "short trainings" in k]
    return note["table"]


def chosen(rows: list[dict[str, Any]]) -> float:
    return max(rows, key=lambda row: row["tuning"])["options"]["damping"]


def test_one_step_asks_for_no_metric_and_many_for_the_newton_step(tmp_path: Path) -> None:
    """Logistic regression, full batches from the optimum. A first step moves along plain gradients: damping without end
    is exact. Many steps reach the optimum of the part, nearly the Newton step: hardly any damping is best."""
    w = world(tmp_path, 2, rows=160)
    at = w.fit(decay=1e-3).float()
    few = single(w, tmp_path / "few", tuned(1, 1e-3, targets="each"), at)
    many = single(w, tmp_path / "many", tuned(100, 1.0), at)
    assert chosen(rows_of(few)) == GRID[2] and chosen(rows_of(many)) == GRID[0]
    for found, best in ((few, rows_of(few)[2]), (many, rows_of(many)[0])):
        assert best["tuning"] > 0.95 and best["held_out"] > 0.95, "a line is all that there is to find"
        options = {**best["options"], "targets": "each" if found is few else "mean"}
        plain = single(w, tmp_path / str(best), {**tuned(1, 1.0)["inner"], **options}, at)
        assert found.values.tobytes() == plain.values.tobytes() and found.columns == plain.columns


def test_figures_are_rank_correlations_with_short_trainings(two: World, tmp_path: Path) -> None:  # noqa: F811
    """By hand: one step on part g moves the weights by lr/T times the part's summed gradients."""
    from assay.core.keys import shuffled

    at = two.fit(decay=1e-3).float()
    rows = rows_of(single(two, tmp_path / "tuned", tuned(1, 0.5, groups=6, parts=3, terms_per_step=30), at))
    ids, grads = two.pool.ids, jacobian(two, at, two.inputs)
    masks = np.zeros((6, 30), dtype=bool)
    for g in range(6):
        masks[g, shuffled(ids, "tuned", "cut", 0, g // 3)[g % 3 * 10 : (g % 3 + 1) * 10]] = True

    def asked(t: Tensor) -> np.ndarray:
        return two.task.loss(two.params(t), two.questions).numpy()

    moves = torch.tensor(masks @ grads) * 0.5 / 30
    falls = np.stack([asked(at) - asked(at - move) for move in moves])
    order = shuffled(two.target.ids, "tuned", "target", 0)
    spec = {**tuned(1, 1.0)["inner"], "targets": "each"}
    for row, damping in zip(rows, GRID, strict=True):
        scores = single(two, tmp_path / str(damping), {**spec, "damping": damping}, at).values
        found = np.array([spearman(masks @ scores[:, q], falls[:, q]) for q in range(9)])[order]
        assert row["tuning"] == pytest.approx(found[:5].mean(), abs=0.06)
        assert row["held_out"] == pytest.approx(found[5:].mean(), abs=0.06)


def test_the_choice_does_not_see_batches_or_order(two: World, tmp_path: Path) -> None:  # noqa: F811
    at = two.fit(decay=1e-3).float()
    spec = tuned(3, 1.0, groups=6, sample=20, count=6, terms_per_step=30)
    plain = single(two, tmp_path / "1", spec, at)
    again = single(two, tmp_path / "2", spec, at)
    assert plain.values.tobytes() == again.values.tobytes() and rows_of(plain) == rows_of(again)
    small = table(two, tmp_path / "3", spec, [[Mark(two.params(at), {})]], batch=3, shard=7)
    mixed = two.pool.at(np.random.default_rng(0).permutation(30))
    prepared(two.task, mixed, tmp_path / "pool")
    (tmp_path / "target").symlink_to(two.folder / "target")
    w = World(two.task, mixed, two.target, two.task.encoded(tmp_path / "pool"), two.asked, tmp_path)
    other = single(w, tmp_path / "4", spec, at)
    for found in (small, other):
        assert chosen(rows_of(found)) == chosen(rows_of(plain))
        near(found.align(two.pool.ids).values, plain.values, 1e-4)
        for a, b in zip(rows_of(found), rows_of(plain), strict=True):
            assert a["tuning"] == pytest.approx(b["tuning"], abs=0.02)


def test_dsdm_of_estimates_for_each_target_is_their_mean(two: World, tmp_path: Path) -> None:  # noqa: F811
    inner, at = {"name": "graddot", "features": EXACT}, theta(0, two.fit().numel())
    found = [
        single(two, tmp_path / t, {"name": "dsdm", "estimates": {**inner, "targets": t}}, at) for t in ("mean", "each")
    ]
    near(found[1].values, found[0].values, 1e-6)
    assert len(found[1].columns) == 1


def test_targets_that_are_withheld_choose_nothing(two: World, tmp_path: Path) -> None:  # noqa: F811
    """Other reported targets, all wrong and with other ids: the table of options stays as it is."""
    at = two.fit(decay=1e-3).float()
    spec = tuned(3, 1.0, groups=6, terms_per_step=30)
    x, y, ids = np.array(two.target.column("pixels")), np.array(two.target.column("label")), decode_ids(two.target.ids)
    found = []
    for name in ("as they are", "others"):
        if name == "others":
            x[5:], y[5:], ids[5:] = -3 * x[5:], 1 - y[5:], [f"other {i}" for i in range(len(ids) - 5)]
        folder = tmp_path / name
        target = Pool.from_columns({"id": ids, "pixels": x.tolist(), "label": y.tolist()})
        prepared(two.task, target, folder / "target")
        (folder / "pool").symlink_to(two.folder / "pool")
        w = World(two.task, two.pool, target, two.encoded, two.task.encoded(folder / "target"), folder)
        runs = [[Mark(w.params(at), {})]]
        free, bound = (
            rows_of(table(w, folder / kind, spec, runs, **options))
            for kind, options in (("free", {}), ("bound", {"withheld": target.ids[5:]}))
        )
        found.append((free, bound))
    assert found[0][1] == found[1][1] and found[0][0] != found[1][0]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"grid": {"dampin": [1.0]}}, "has no option 'dampin'"), ({"grid": {"features.sise": [1]}}, "sise"),
        ({"grid": {"damping": []}}, "nothing to choose"), ({"inner": "loss", "grid": {}}, "nothing to choose"),
        ({"grid": {"damping": [-1.0]}}, "cannot be -1"), ({"parts": 1}, "cannot be 1"),
    ],
)  # fmt: skip
def test_tuned_refuses_a_grid_that_is_none(spec: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(Scorer, {"name": "tuned", **spec})


def test_a_grid_reaches_the_features(two: World, tmp_path: Path) -> None:  # noqa: F811
    made = make(Scorer, {"name": "tuned", "grid": {"features.rank": [2, 3], "damping": [0.1, 1.0]}})
    options = [(s.features.rank, s.damping) for _, s in made.points()]  # type: ignore[attr-defined]
    assert options == [(2, 0.1), (2, 1.0), (3, 0.1), (3, 1.0)]
