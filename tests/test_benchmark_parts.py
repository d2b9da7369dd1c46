"""What the comparisons with other libraries rest on: all are given the same tokens, and what they did is checked."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

if TYPE_CHECKING:
    from assay.core.method import Context


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return lambda name: importlib.import_module(f"parts.{name}")


def test_documents_are_cut_where_the_tokenizer_cuts(parts, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    module = parts("world")
    monkeypatch.setattr(module, "TEXTS", 500)
    made = module.world(tmp_path, documents=600, layers=1, width=32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.model)
    texts = [json.loads(line)["text"] for line in made.documents.read_text(encoding="utf-8").splitlines()]
    tokens = tokenizer(texts)["input_ids"]
    assert tuple(len(row) for row in tokens) == made.lengths
    assert len(tokens) == 600 and max(made.lengths) == module.LENGTH
    assert len(set(texts)) > 590  # more documents than texts, and yet no round repeats the last one

    again = module.world(tmp_path / "again", documents=600, layers=1, width=32)
    assert again.lengths == made.lengths and again.documents.read_bytes() == made.documents.read_bytes()
    weights = "model.safetensors"
    assert (again.model / weights).read_bytes() == (made.model / weights).read_bytes()


def test_a_cut_loses_whole_words_only(parts):
    from tokenizers import Tokenizer

    from assay.core.pool import Pool
    from assay.train.models import train_tokenizer

    module = parts("world")
    words = ["alpha", "zq", "quixotic", "beta"]
    text = " ".join(words[i * i % 4] + str(i) for i in range(100))
    tokenizer = train_tokenizer(Pool.from_columns({"id": ["0"], "text": [text]}), vocab=300)
    (cut,), (length,) = module._cut(tokenizer, [text])
    whole = Tokenizer.from_str(tokenizer).encode(text).ids
    assert Tokenizer.from_str(tokenizer).encode(cut).ids == whole[:length]
    assert text.startswith(cut) and module.LENGTH - 12 < length <= module.LENGTH


def test_a_peer_that_is_not_there_is_left_out_and_said(parts, tmp_path, capsys):
    peers = parts("peers")
    assert peers.rows(True, 10, tmp_path / "python") == []
    said = capsys.readouterr().err
    assert all(f"{peer.name} is left out" in said for peer in peers.PEERS)


def test_the_option_comes_before_the_environment(parts, tmp_path, monkeypatch):
    peers = parts("peers")
    monkeypatch.delenv("ASSAY_PEERS", raising=False)
    assert peers.interpreter() == peers.PYTHON
    monkeypatch.setenv("ASSAY_PEERS", str(tmp_path / "a"))
    assert peers.interpreter() == tmp_path / "a"
    assert peers.interpreter(tmp_path / "b") == tmp_path / "b"


@pytest.mark.parametrize("fault", ["short", "zero", "nan"])
def test_less_than_the_task_is_not_timed(parts, fault):
    peers = parts("peers")
    features = np.ones((5000, 3), dtype=np.float32)
    peers.check("a tool", features, 5000)
    if fault == "short":
        features = features[:-1]
    else:
        features[4999] = 0 if fault == "zero" else [0, np.nan, 0]
    with pytest.raises(RuntimeError, match="a tool wrote"):
        peers.check("a tool", features, 5000)


# The contest of influence scores.


def test_options_are_laid_over_a_table_and_reach_into_nested_ones(parts):
    contest = parts("contest")
    spec = {"name": "trak", "features": {"name": "gradients", "size": 8}, "damping": 0.1}
    made = contest.overlay(spec, {"damping": 1.0, "features.size": 16})
    assert made == {"name": "trak", "features": {"name": "gradients", "size": 16}, "damping": 1.0}
    assert spec["features"]["size"] == 8  # and the table itself is as it was
    assert contest.grid(a=[1, 2], b=[3]) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}] and contest.grid() == [{}]


@pytest.fixture
def small(parts, tmp_path):
    """R0 with a tenth of its steps, and a bank made up from one model's exact gradients: who scores them is best."""
    truth = parts("truth")
    world = truth.digits(tmp_path, quick=True)
    world.recipe = world.recipe.model_copy(update={"steps": 20})
    return world


def test_targets_that_choose_are_not_reported_on(small):
    chosen, reported = small.sides
    assert not set(chosen) & set(reported) and len(chosen) + len(reported) == len(small.targets)
    assert len(chosen) == len(reported)


@pytest.mark.parametrize("case", ["R0", "R3", "R3-smooth"])
def test_the_bank_is_of_the_training_that_a_metagradient_differentiates(parts, tmp_path, case):
    from assay.train.root import rooted

    truth = parts("truth")
    if case != "R0" and not (truth.DATA / "domains" / "domains.parquet").exists():
        pytest.skip(f"no documents of many domains in {truth.DATA}")
    recipe = truth.build(case, tmp_path, quick=True).recipe
    nobody = cast("Context", None)  # no context is asked: there is a root already
    assert rooted(nobody, "metagrad", recipe, np.arange(3)) == recipe
    assert (recipe.optimiser == "adamw") == (recipe.eps_root > 0)


def test_a_peer_sees_the_model_and_the_data_that_we_score(parts, small, tmp_path, monkeypatch):
    import torch

    attribution, contest = parts("attribution"), parts("contest")
    monkeypatch.syspath_prepend(str(attribution.SCRIPTS))
    common = importlib.import_module("attribute_common")
    trajectories, asked = small.models("full", 2), np.arange(5)
    about, arrays = contest.described(small, asked)
    place = tmp_path / "peer"
    place.mkdir()
    job = {"method": "graddot", "models": [0, 1], "options": {}}
    attribution.export(place, about, arrays, [run[-1].params for run in trajectories], [job])
    folder = common.read(place)
    for index, run in enumerate(trajectories):
        batch = small.read(small.targets).inputs(asked)
        ours = small.task.logits(run[-1].params, batch)
        torch.testing.assert_close(folder.module(index)(folder.tx), ours)
        torch.testing.assert_close(common.margins(ours, folder.ty), small.task.margin(run[-1].params, batch))
    assert folder.margin and folder.about["jobs"] == [job] and len(folder.y) == len(small.pool)


def test_the_best_option_on_one_side_is_reported_on_the_other(parts, small, monkeypatch):
    """A stand-in scorer whose option says how much of the truth it knows."""
    contest, attribution = parts("contest"), parts("attribution")
    rng = np.random.default_rng(0)
    right = rng.normal(size=(len(small.targets), len(small.pool)))
    small.masks = rng.permuted(np.tile(np.arange(len(small.pool)) % 2 == 0, (20, 1)), axis=1)
    small.values = -(small.masks @ right.T)[:, None, :]
    asked = []

    def score(world, trajectories, options, targets):
        asked.append((options["share"], len(targets)))
        noise = np.random.default_rng(1).normal(size=right.shape)
        return (options["share"] * right + (1 - options["share"]) * noise)[targets]

    entrants = contest.Contest(small, {}, workers=1)
    options = contest.grid(share=[0.0, 0.9, 0.4])
    entrants.enter(contest.Contestant("known", {}, options, function=score))
    entrants.enter(contest.Contestant("same", {}, function=score, like="known"))
    tuning = min(contest.TUNING["R0"], len(small.sides[0]))
    assert asked == [(0.0, tuning), (0.9, tuning), (0.4, tuning), *[(0.9, len(small.targets))] * 2]
    row = entrants.rows[0]
    assert row["options"] == {"share": 0.9} and row["method"] == "known" and row["value"] > 0.95
    assert row["ci"][0] < row["value"] <= row["ci"][1] and {r["metric"] for r in entrants.rows} == {
        "lds_fixed",
        "lds_avg",
    }
    entrants.enter(contest.Contestant("absent", {"method": "cg"}, tool="dattri"))
    assert len(entrants.rows) == 4 and attribution.LIBRARIES.keys() >= {"dattri", "kronfluence", "bergson"}


def test_bars_are_told_met_or_not(parts):
    bars = parts("bars")

    def row(tool, method, value, seconds, metric="lds_avg", case="R0", ci=None):
        return {
            "case": case,
            "tool": tool,
            "method": method,
            "metric": metric,
            "value": value,
            "seconds": seconds,
            "ci": ci,
        }

    rows = [
        row("assay", "cg", 0.74, 1.0),
        row("dattri 0", "cg", 0.7, 4.0),
        row("dattri 1", "cg", 0.9, 9.0),
        row("assay", "ekfac", 0.6, 2.0),
        row("assay", "ekfac-minus-bm25", 0.1, 0.0, "difference", "R3", [-0.01, 0.2]),
    ]
    found = {bar.what: bar for bar in bars.check(rows)}
    assert [bar.met for bar in found.values()] == [True, False, False, False]
    assert found["R0 cg at least 5 times as fast as the fastest peer"].found == 4.0
    assert [line[:4] for line in bars.lines(rows)] == ["met ", "MISS", "MISS", "MISS"]


def test_documents_go_to_peers_with_their_start_token(parts, tmp_path):
    from types import SimpleNamespace

    from helpers import language, text_pool

    contest, pool = parts("contest"), text_pool(6, longest=5)
    task, encoded = language(pool, tmp_path / "tokens")
    world = SimpleNamespace(task=task, pool=pool, targets=pool, read=lambda _: encoded)
    about, arrays = contest.described(world, np.arange(len(pool)))
    assert about == {"vocab": 280, "width": 16, "layers": 2, "heads": 2, "context": 24}
    for k, (a, b) in enumerate(zip(arrays["pool_offsets"], arrays["pool_offsets"][1:], strict=False)):
        inputs = encoded.inputs(np.array([k]))
        assert arrays["pool"][a:b].tolist() == [0, *inputs["targets"][0].tolist()]
        assert arrays["pool"][a : b - 1].tolist() == inputs["tokens"][0].tolist()


@pytest.mark.parametrize("case", ["R0", "R1", "R2", "R3"])
def test_every_contestant_of_ours_can_be_made_with_every_option(parts, case):
    from types import SimpleNamespace

    from assay.core.method import Scorer, make

    contest, entries = parts("contest"), parts("entries")
    world = SimpleNamespace(case=case, measure="margin" if case == "R0" else "loss")
    everyone = entries.of(world, False)
    for entrant in everyone:
        if entrant.tool == contest.OURS and not entrant.function:
            assert all(make(Scorer, contest.overlay(entrant.spec, options)) for options in entrant.options)
    pairs = [(entrant.tool, entrant.method) for entrant in everyone]
    assert len(set(pairs)) == len(pairs)
    assert all((entrant.tool, entrant.like) in pairs for entrant in everyone if entrant.like)
    assert len(entries.of(world, True)) == len(everyone)


def test_arms_of_descent_can_be_made_and_share_a_budget(parts, tmp_path):
    from assay.core.method import Scorer, make

    descent = parts("descent")
    world = descent.digits(tmp_path, True)
    assert world.budget == 210 and world.good.sum() == 240 and len(world.pool) == 300
    assert not set(world.selecting.ids.tolist()) & set(world.judging.ids.tolist())
    arms: dict[str, Any] = {name: make(Scorer, arm) for name, arm in world.arms.items() if not callable(arm)}
    assert arms["mgd"].share * len(world.pool) == world.budget
    assert set(world.nulls) <= set(arms) and {"metagrad", "mgd"} <= set(arms)
    own = {name: arms[name].recipe["seed"] for name in ("metagrad", "mgd")}
    judged = {world.recipe.seed * 1000 + k for k in range(world.seeds)}
    assert not set(own.values()) & judged, "who chooses never trains at a seed that is judged"


def test_recall_by_decile_is_held_against_the_curve(parts):
    module = parts("duplicates")
    rng = np.random.default_rng(0)
    alike = rng.uniform(0.5, 1.0, 4000)
    promised = 1 - (1 - alike**8) ** 14
    fair = module.by_decile(alike, rng.random(4000) < promised, 1.0)
    assert [row["pairs"] for row in fair] == [400] * 10 and all(row["within_3_sd"] for row in fair)
    order = np.argsort(alike)
    for tenth, row in enumerate(fair):
        part = order[400 * tenth : 400 * (tenth + 1)]
        assert row["expected"] == pytest.approx(promised[part].mean())
        assert row["sd"] == pytest.approx(np.sqrt((promised[part] * (1 - promised[part])).sum()) / 400)
    lazy = module.by_decile(alike, rng.random(4000) < promised * 0.8, 1.0)
    assert not any(row["within_3_sd"] for row in lazy[3:])


def test_further_rounds_of_a_pool_are_near_copies(parts, tmp_path):
    import pyarrow as pa

    from assay.core.pool import Pool

    module = parts("duplicates")
    rng = np.random.default_rng(0)
    texts = [" ".join("".join(rng.choice(list("abcdef"), 5)) for _ in range(120)) for _ in range(20)]
    table = pa.table({"id": [f"d{i}" for i in range(20)], "text": texts, "domain": ["x"] * 20})
    found = Pool.open(module.write_pool(tmp_path / "pool", table, rounds=3)).column("text")
    assert found[:20] == texts and len(set(found)) == 60
    for first, again in zip(texts, found[20:40], strict=True):
        assert 0.6 < module.jaccard(module.shingles(first), module.shingles(again)) < 1


def test_embeddings_contestants_find_the_same(parts):
    """One cluster: plain numpy's largest cosines with earlier rows are those of semdedup, and so is the set pruned."""
    from assay.core.method import Selector, make
    from assay.core.selection import Budget

    module = parts("embeddings")
    x = module.vectors(300)
    table, noted = module.scored(x, "semdedup", clusters=1, iterations=1)
    # The plain one says 0 of the first, for which nothing is earlier.
    np.testing.assert_allclose(np.minimum(table.column("score"), 1), 1 - module.plain_semdedup(x, 1, 1), atol=2e-6)
    assert noted["reference"] == (table.column("score") < 0.05).sum() >= 25
    table, _ = module.scored(x, "prototypes", clusters=1, iterations=1)
    budget = Budget(40, "examples")
    chosen = make(Selector, "density").select(table, np.ones(300, dtype=int), budget, barred={})
    order = np.argsort(-table.column("distance"))[:40]
    assert sorted(int(i) for i in chosen.ids.tolist()) == sorted(order.tolist())


def test_embeddings_pairs_are_judged_by_either_of_the_two(parts):
    pair = np.array([0, 1, 2, 0, 1, 2, -1, -1])
    dropped = np.array([1, 0, 0, 1, 1, 0, 1, 0], dtype=bool)
    found, precision = parts("embeddings").judged(dropped, pair, 3)
    assert found.tolist() == [True, True, False] and precision == 0.5


def test_a_mixture_has_equal_parts_and_any_one_domain_would_fill_the_budget(parts, tmp_path):
    descent = parts("descent")
    if not descent.DATA.exists():
        pytest.skip("the shared data are not here")
    world = descent.mixture(tmp_path, True)
    scale, names = descent.QUICK, np.array(world.pool.column("domain"))
    for domain in descent.MIXED:
        alone = world.arms[f"only-{domain}"](world) > 0
        assert alone.sum() == scale.clean and world.sizes[alone].sum() == world.budget
        assert (names[alone] == domain).all() and world.good[alone].all()
    assert world.good.sum() == 3 * scale.clean and set(names[world.good]) == set(descent.MIXED)
    for part in (world.selecting, world.judging):
        counts = [part.column("domain").count(domain) for domain in descent.MIXED]
        assert len(set(counts)) == 1 and sum(counts) == len(part)
    seen = [set(part.ids.tolist()) for part in (world.pool, world.selecting, world.judging)]
    assert sum(map(len, seen)) == len(set.union(*seen)), "no document is in two of them"
    assert {f"only-{domain}" for domain in descent.MIXED} < set(world.nulls) < set(world.arms)


def test_the_second_of_a_pair_is_no_right_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.parts import embeddings

    pair = np.array([0, 1, 0, 1, -1, -1])
    for dropped, found, precision in (
        ([0, 2], [True, False], 0.5), ([0, 1], [True, True], 1.0), ([0, 2, 1, 4], [True, True], 0.5),
        ([4], [False, False], 0.0),
    ):  # fmt: skip
        pairs, share = embeddings.judged(np.isin(np.arange(6), dropped), pair, 2)
        assert pairs.tolist() == found and share == precision
        assert embeddings.precisions(np.array(dropped), pair)[-1] == precision


def test_false_drops_are_those_of_text_that_the_bound_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.parts import classify

    fit = np.arange(1000.0)
    assert classify.outside(fit, fit)["perplexity"].mean() == pytest.approx(classify.FALSE)
    assert classify.outside(fit, fit)["perplexity, both sides"].mean() == pytest.approx(classify.FALSE)
    other = fit + 40
    assert classify.outside(fit, other)["perplexity"].mean() == pytest.approx(0.05)
    assert classify.outside(fit, other)["perplexity, both sides"].mean() == pytest.approx(0.045)
