"""Tracks are frozen and draw what they say; the league ends in the same bytes however it got there."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt

import small_study
import small_track
from assay import filters
from assay import study as studies
from assay.bench import league, track
from assay.core.errors import InputError
from assay.core.keys import digest
from assay.core.pool import Pool
from assay.core.target import Target
from assay.data import gate
from assay.job import run_study
from assay.report.league import _plain, build_league, ordered
from assay.verify import compare

pytestmark = pytest.mark.xdist_group("league")  # one process makes the league that all compare with
METHODS = "bm25,loss,graddot"
TOML = tomllib.loads(small_track.TRACK.format(steps=20))

# A change of one of these is another contest: give it another name.
FROZEN = {
    "clean-domain": "942dd99bc06fd59f7916f1d7dfd46d3a",
    "mixture": "6f7e379197b4ff123d5ed1e0c3218fe1",
    "noisy-domain": "e8adc6e6c517b8eee83874314dfc83e8",
}


@pytest.fixture(scope="module")
def documents() -> Iterator[Any]:
    """The text of Python, read once."""
    found, patch = track._documents(track.Track(**TOML), Path()), pytest.MonkeyPatch()
    patch.setattr(track, "_documents", lambda _, path: found)
    yield found
    patch.undo()


@pytest.fixture(scope="module")
def tiny(documents: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[track.Track, Path, Path]:
    """The track, its file, and a folder whose `pools` has its files."""
    folder = tmp_path_factory.mktemp("tiny")
    file = small_track.write_track(folder)
    loaded = track.load(str(file))
    track.build(loaded, folder, folder / "runs" / "pools")
    return loaded, file, folder


def fresh(tiny: tuple[track.Track, Path, Path], folder: Path) -> Path:
    """A folder in which the track's files are made already."""
    shutil.copytree(tiny[2] / "runs", folder / "runs")
    return folder


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> tuple[Path, float, subprocess.CompletedProcess[str]]:
    """An undisturbed league: its folder, how many seconds it took, and what it said."""
    folder, begin = fresh(tiny, tmp_path_factory.mktemp("whole") / "league"), time.monotonic()
    done = small_track.finish(tiny[1], folder, "--methods", METHODS)
    assert done.returncode == 0, done.stderr
    return folder, time.monotonic() - begin, done


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "records" / "tiny.json").read_text())


def written(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "records").iterdir())}


# Tracks.


def test_the_shipped_tracks_are_frozen() -> None:
    assert {name: digest(json.loads(track.load(name).model_dump_json())) for name in track.names()} == FROZEN


@pytest.mark.parametrize("name", track.names())
def test_the_shipped_tracks_make_studies(name: str, tmp_path: Path) -> None:
    loaded = track.load(name)
    found = dict(track.studies(loaded, tmp_path, league.default_entries()))
    assert list(found) == list(loaded.tables)
    for made in found.values():
        assert made.verify.seeds == 5 and made.verify.random >= 3 and made.budget == "10%"
        assert {"bm25", "loss_diff", "influence", "trak", "oracle"} <= {arm.name for arm in made.contestants()}


def test_tracks_of_one_recipe_share_their_pool(tiny, tmp_path: Path) -> None:
    clean, mixture = track.load("clean-domain"), track.load("mixture")
    kept = ("source", "seed", "rows", "more", "shuffled", "held", "study")
    assert all(getattr(clean, key) == getattr(mixture, key) for key in kept)
    other = tiny[0].model_copy(update={"name": "other", "tables": {"comment": ("comment",)}})
    assert track.build(other, tmp_path, tiny[2] / "runs" / "pools") == track.build(
        tiny[0], tmp_path, tiny[2] / "runs" / "pools"
    )


def test_the_pool_is_what_the_recipe_says(tiny) -> None:
    loaded, _, folder = tiny
    files = track.build(loaded, folder, folder / "runs" / "pools")
    rows = pq.read_table(files / "pool.parquet").to_pylist()
    assert Counter(r["domain"] for r in rows if r["sound"]) == {"docs": 50, "docstring": 40, "comment": 40, "code": 40}
    damaged = [r for r in rows if not r["sound"]]
    assert len(damaged) == 20 and {r["domain"] for r in damaged} == {"docs"}
    assert {r["id"] for r in damaged} == set(pq.read_table(files / "truth.parquet")["id"].to_pylist())
    words = lambda text: tuple(sorted(text.split()))  # noqa: E731
    sound = {words(r["text"]): r["text"] for r in rows if r["sound"]}
    assert all(sound[words(r["text"])] != r["text"] for r in damaged), "the same words in another order"
    held = [pq.read_table(files / f"held-{domain}.parquet").to_pylist() for domain in ("docs", "comment")]
    assert [len(part) for part in held] == [24, 24] and held[1][0]["part"] == "comment"
    target = Pool.from_columns({"text": [r["text"] for part in held for r in part]})
    pool = Pool.from_columns({"text": [r["text"] for r in rows]})
    assert not len(gate.contamination(pool, Target("held", target, target.at([]))).ids)


def test_the_same_documents_give_the_same_bytes_and_another_seed_others(tiny, tmp_path: Path) -> None:
    loaded, _, folder = tiny
    first = track.build(loaded, folder, folder / "runs" / "pools")
    again = track.build(loaded, folder, tmp_path)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    other = track.build(loaded.model_copy(update={"seed": 1}), folder, tmp_path)
    ids = [set(pq.read_table(path / "pool.parquet")["id"].to_pylist()) for path in (first, other)]
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rows = 40", "rows"), ('docs = ["docs"]', "nothing is held out"), ("[study]", "the track says it"),
        ('source = "python"', "--data"), ("random = 2", "2 or more"), ("seeds = 2", "cannot have everything"),
    ],
)  # fmt: skip
def test_bad_tracks_are_told(change: str, said: str, tmp_path: Path) -> None:
    new = {
        "rows = 40": "rows = 0", 'docs = ["docs"]': 'docs = ["code"]', "[study]": "[study]\nseed = 3",
        'source = "python"': 'source = "domains"', "random = 2": "random = 1",
        "seeds = 2": "everything = true\nseeds = 2",
    }[change]  # fmt: skip
    file = small_track.write_track(tmp_path)
    file.write_text(file.read_text().replace(change, new, 1))
    with pytest.raises(InputError, match=said):
        track.build(track.load(str(file)), tmp_path, tmp_path / "pools")


def test_an_unknown_track_and_an_unknown_domain_name_the_nearest(tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="noisy-domain"):
        track.load("noisy-domian")
    wrong = tiny[0].model_copy(update={"more": {"doc": 3}})
    with pytest.raises(InputError, match="docs"):
        track.build(wrong, tmp_path, tmp_path / "pools")


# Entries.


def test_entries_of_methods_that_are_not_there_are_left_out() -> None:
    assert league.present({"name": "a", "method": {"name": "bm25"}, "select": {"name": "cut"}})
    assert league.present({"name": "a", "method": {"name": "mylab.rarity"}})
    assert not league.present({"name": "a", "method": {"name": "no_such_method"}})
    assert not league.present({"name": "a", "method": {"name": "tuned", "inner": {"name": "no_such_method"}}})
    assert not league.present({"name": "a", "method": {"name": "bm25"}, "filters": ["no_such_filter"]})
    assert not league.present({"name": "a", "method": "bm25", "filters": [{"method": {"name": "no_such_filter"}}]})
    assert league.present({"name": "a", "method": "bm25", "filters": ["exact_dup"], "select": "cut"})
    names = [arm["name"] for arm in league.default_entries()]
    assert len(names) == len(set(names)) and {"length", "loss", "bm25", "trak", "less", "response"} <= set(names)


def test_thresholds_enter_as_filters_and_never_as_ranks() -> None:
    """What keeps or drops has no order: cut to a budget by its statistic it would be another method."""
    arms = {arm["name"]: arm for arm in league.default_entries()}
    thresholds = (
        "exact_dup",
        "minhash",
        "paragraph_dup",
        "language",
        "gopher",
        "c4",
        "fineweb",
        "refinedweb",
        "semdedup",
    )
    for name in thresholds:
        (one,) = arms[name]["filters"]
        assert arms[name]["method"] == "random" and filters.parse(one).method.name == name
    for name in ("rules+bm25", "rules+loss_diff"):
        loose = filters.parse(arms[name]["filters"][2]).bounds
        published = filters.parse("gopher").bounds
        assert set(published) - set(loose) == {"alpha_words", "stop_words"} and loose["words"] == (20, 100_000)
        assert all(loose[rule] == published[rule] for rule in set(loose) - {"words"})
    assert arms["density"]["method"]["clusters"] == 50 and arms["density"]["filters"][0]["name"] == "semdedup"


def test_the_oracle_needs_the_truth(tmp_path: Path) -> None:
    """A user's study has none: the oracle cannot be chosen as a method there."""
    changes = ['methods=["random", {name="assay.bench.known", domains=["a"]}]', "train.steps=2"]
    chosen = studies.load(small_study.write_study(tmp_path / "study"), changes)
    with pytest.raises(InputError, match="no column 'sound'"):
        run_study(chosen, tmp_path / "run")
    with pytest.raises(InputError, match="a row of every table"):
        league._entering({}, ["oracle"])


# The league.


def test_the_record_and_the_page(whole) -> None:
    folder, _, done = whole
    said = json.loads(done.stdout.splitlines()[-1])
    held = record(folder)
    assert said["tracks"]["tiny"] == held["tables"] and Path(said["page"]).exists()
    page = (folder / "records" / "README.md").read_text()
    for name in ("docs", "both"):
        table = held["tables"][name]
        rows = {row["name"]: row for row in table["entries"]}
        assert set(rows) == {"bm25", "loss", "graddot", "oracle"} and len(table["random"]) == 2
        assert all(0.9 < row["of_budget"] <= 1 for row in [*rows.values(), *table["random"]]), "the budget is respected"
        assert [n for n, row in rows.items() if row["oracle"]] == ["oracle"]
        assert set(table["family"]["entries"]) == {"bm25", "loss", "graddot"}, "the oracle is no contestant"
        assert sum(rows["oracle"]["own"].values()) == pytest.approx(1.0) or name == "docs"
        assert rows["oracle"]["damaged"] == 0 or sum(rows["oracle"]["own"].values()) < 1
        assert f"tiny: {name}" in page and page.count("| *oracle* |") == 2 and "random (mean of 2)" in page
        assert rows["graddot"]["cost"] > rows["bm25"]["cost"] == 0
        assert rows["graddot"]["by_lot"] < 0.1 and all(row["by_lot"] == 1 for row in table["random"])
    even = held["tables"]["both"]["entries"]
    own = next(row["own"] for row in even if row["oracle"])
    assert own["docs"] == pytest.approx(own["comment"], abs=0.1), "as many tokens of each domain of a mixture"
    assert "<svg" in (folder / "records" / "league.svg").read_text()


def test_a_record_says_what_verify_said(whole) -> None:
    """Losses by seed and by item are all that the intervals need."""
    table = record(whole[0])["tables"]["docs"]
    rows = {row["name"]: row for row in table["entries"]}
    for row in rows.values():
        parts = [m[:, 0] for m in league.margins(table, [row])]
        total = sum(p.var(ddof=1) / len(p) for p in parts)
        assert all(p.mean() == pytest.approx(row["gain"]) for p in parts)
        low, high = row["ci"]
        df = total**2 / sum((p.var(ddof=1) / len(p)) ** 2 / (len(p) - 1) for p in parts)
        from scipy import stats

        assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, df) * total**0.5, rel=1e-3)
    names = [row["name"] for row in ordered(table)]
    assert sorted(names) == sorted([*rows, "random (mean of 2)"])


def test_tables_share_what_does_not_look_at_the_target(whole) -> None:
    """Two targets of one pool: random arms and the perplexity filter are trained once, features are computed once."""
    steps = Counter(path.name.split("-")[0] for path in (whole[0] / "runs" / "steps").iterdir())
    arms = 2 + 4  # random, and the others
    assert steps["judge"] == 2 * 2 * arms
    assert steps["train"] <= 2 * (2 * arms - 3), "both random arms and the loss are shared"
    assert steps["proxy"] == 1
    assert len(list((whole[0] / "runs" / "steps").glob("features-gradients-*"))) == 1 + 2, "the pool, and two targets"


@pytest.mark.timeout(600)
def test_killed_and_continued(tiny, whole, tmp_path: Path) -> None:
    folder, seconds, _ = whole
    own, rng = fresh(tiny, tmp_path / "league"), np.random.default_rng(5)
    for share in rng.uniform(0.3, 0.9, 2):
        process = small_track.start(tiny[1], own, "--methods", METHODS)
        try:
            process.wait(timeout=share * seconds)
        except subprocess.TimeoutExpired:
            pass
        small_study.kill_leader(process)
    done = small_track.finish(tiny[1], own, "--methods", METHODS)
    assert done.returncode == 0, done.stderr
    assert written(own) == written(folder)


@pytest.mark.timeout(600)
def test_an_entry_is_added_later(tiny, whole, tmp_path: Path) -> None:
    """The others keep their rows and are not trained again, whether or not their runs are still there."""
    folder, _, _ = whole
    for keep in (True, False):
        own = tmp_path / str(keep)
        shutil.copytree(folder, own)
        if not keep:
            shutil.rmtree(own / "runs" / "steps")
        before = {p.name for p in (own / "runs").glob("steps/train-*")}
        done = small_track.finish(tiny[1], own, "--methods", "length,exact_dup")
        assert done.returncode == 0, done.stderr
        old, new = record(folder)["tables"], record(own)["tables"]
        for name in old:
            rows = {row["name"]: row for row in new[name]["entries"]}
            assert rows["exact_dup"]["by_lot"] == 1, "it drops nothing: a hash chose among equal scores"
            assert "length" in rows and all(rows[row["name"]] == row for row in old[name]["entries"])
            assert new[name]["random"] == old[name]["random"] and new[name]["family"]["size"] == 5
        added = {p.name for p in (own / "runs").glob("steps/train-*")} - before
        assert len(added) == (2 * 2 if keep else 2 * (2 + 2 + 2)), "two; and without the runs, two oracles and random"


def test_other_random_runs_are_not_compared_with(tiny, whole, tmp_path: Path) -> None:
    old = record(whole[0])["tables"]["docs"]
    new = json.loads(json.dumps(old))
    new["entries"] = new["entries"][:1]
    new["random"][0]["by_seed"][0] += 1e-9
    with pytest.raises(InputError, match="not the recorded ones"):
        league._merged(old, new, strict=True, where=tmp_path)
    alone = league._merged(old, new, strict=False, where=tmp_path)
    assert [row["name"] for row in alone["entries"]] == [new["entries"][0]["name"]]


def test_a_record_of_another_track_is_not_added_to(tiny, whole, tmp_path: Path) -> None:
    shutil.copytree(whole[0] / "records", tmp_path / "records")
    other = tiny[0].model_copy(update={"seed": 9})
    with pytest.raises(InputError, match="another track"):
        league.run_track(other, tmp_path / "records", runs=tmp_path / "runs", data=tmp_path, methods=["length"])


def test_what_was_recorded_enters_again(tiny, whole, tmp_path: Path) -> None:
    """Entries that are no defaults run with the defaults, by the options that the record has."""
    before = record(whole[0])["tables"]
    mine = next(row for row in before["docs"]["entries"] if row["name"] == "graddot")
    mine["name"] = mine["arm"]["name"] = "mine"
    arms = league._entering(before, None)
    assert [arm["name"] for arm in arms] == [*(arm["name"] for arm in league.default_entries()), "mine"]
    for _, made in track.studies(tiny[0], tmp_path, arms[-1:]):
        assert next(arm for arm in made.spec()["arms"] if arm["name"] == "mine") == mine["arm"]
    mine["arm"]["method"]["name"] = "no_such_method"
    assert league._entering(before, None)[-1]["name"] != "mine"


def test_an_overdrawn_budget_is_refused(tiny) -> None:
    good = {"name": "x: within budget", "ok": True, "detail": "9 of 10", "rule": True}
    league._obeyed(tiny[0], {"checks": [good, {**good, "ok": False, "rule": False}]})
    with pytest.raises(InputError, match="x: within budget"):
        league._obeyed(tiny[0], {"checks": [good, {**good, "ok": False}]})


def made(rng: np.random.Generator, gains: list[float], *, seeds: int = 5, items: int = 40) -> dict[str, Any]:
    """A table of arms with planted gains over three random draws, as a record has them."""
    item, seed = rng.normal(4, 0.5, items), rng.normal(0, 0.05, (seeds, 1))

    def row(name: str, shift: float, oracle: bool = False) -> dict[str, Any]:
        losses = item + seed - shift + rng.normal(0, 0.02, (seeds, 1)) + rng.normal(0, 0.05, (seeds, items))
        return {"name": name, "oracle": oracle, "by_lot": 0.0, "losses": losses, "by_seed": losses.mean(1).tolist(),
                "by_item": " ".join(f"{x:.5f}" for x in losses.mean(0))}  # fmt: skip

    rows = [row(f"m{k}", gain) for k, gain in enumerate(gains)] + [row("oracle", 9.0, True)]
    return {"level": 0.95, "entries": rows, "random": [row(f"random-{k}", rng.normal(0, 0.01)) for k in range(3)]}


def test_family_finds_what_was_planted_and_ties_what_is_equal() -> None:
    table = made(np.random.default_rng(0), [0.5, 0.5, 0.2, 0.0, -0.4])
    found = league.family(table)
    assert found["size"] == 5 and found["best"] in ("m0", "m1")
    assert set(found["tied"]) == {"m0", "m1"} - {found["best"]}
    verdicts = [found["entries"][f"m{k}"]["verdict"] for k in range(5)]
    assert verdicts == ["better", "better", "better", "unresolved", "worse"]
    for row in table["entries"][:-1]:
        plain = compare(row["losses"], np.stack([r["losses"] for r in table["random"]]))["ci"]
        together = found["entries"][row["name"]]["ci"]
        assert together[0] <= plain[0] + 1e-4 and together[1] >= plain[1] - 1e-4, "never narrower than alone"


def test_a_selection_by_lot_is_itself_a_draw() -> None:
    """The luck of its draw is in its intervals: those of `compare` with `draw`."""
    table = made(np.random.default_rng(1), [0.1, 0.1])
    alone = league.family(table)["entries"]
    table["entries"][1]["by_lot"] = 1.0
    found = league.family(table)["entries"]
    width = {name: np.ptp(found[name]["ci"]) for name in found}
    assert width["m1"] > 1.2 * np.ptp(alone["m1"]["ci"])
    draws = np.stack([r["losses"] for r in table["random"]])
    plain = compare(table["entries"][1]["losses"], draws, draw=True)["ci"]
    assert width["m1"] >= np.ptp(plain) - 1e-4


def test_equal_draws_tie_with_the_best() -> None:
    """A difference from the best knows of the luck of all that fell by lot: with it, equal draws are seldom apart."""
    rng, apart = np.random.default_rng(2), {0.0: 0, 1.0: 0}
    for _ in range(40):
        table = made(rng, [*rng.normal(0, 0.03, 4)])
        for row in table["random"]:
            shift = rng.normal(0, 0.03)
            row["by_seed"] = (np.array(row["by_seed"]) + shift).tolist()
            row["by_item"] = " ".join(f"{float(x) + shift:.5f}" for x in row["by_item"].split())
        for lot in apart:
            for row in table["entries"][:-1]:
                row["by_lot"] = lot
            apart[lot] += len(league.family(table)["tied"]) < 3
    assert apart[0.0] > 15 and apart[1.0] <= 6


def test_the_luck_of_a_difference_is_that_of_two_draws() -> None:
    table = made(np.random.default_rng(3), [0.1, 0.2])
    first, best = table["entries"][:2]
    plain = league.margins(table, [first], best)
    spread = np.var([np.mean(row["by_seed"]) for row in table["random"]], ddof=1)
    assert len(league.differences(table, [first], best, np.array([0.0]))) == len(plain) == 2
    for luck in (1.0, 2.0):
        draws, *rest = league.differences(table, [first], best, np.array([luck]))
        assert all(np.array_equal(a, b) for a, b in zip(rest, plain, strict=True))
        assert draws.mean() == pytest.approx(plain[0].mean()) and draws.var(ddof=1) / 3 == pytest.approx(luck * spread)


def test_the_share_of_a_budget_is_in_its_unit() -> None:
    arm = {"tokens": 900, "selected": 30}
    for unit, spent in (("tokens", 900), ("examples", 30)):
        assert league._spent(cast(Any, SimpleNamespace(budget=SimpleNamespace(unit=unit))), arm) == spent


def test_other_files_of_the_folder_are_passed_over(whole, tmp_path: Path) -> None:
    shutil.copytree(whole[0] / "records", tmp_path / "records")
    page = build_league(tmp_path / "records").read_text()
    for name, held in (("other", '{"format": 1}'), ("list", "[1]"), ("broken", "{"), ("half", '{"track": {}}')):
        (tmp_path / "records" / f"{name}.json").write_text(held)
    assert build_league(tmp_path / "records").read_text() == page


@pytest.mark.parametrize("held", ['{"format": 1}', '{"format": 1, "track": 3, "tables": {}}', "[1]", "{", "null"])
def test_a_record_that_is_none_is_told(held: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(held)
    with pytest.raises(InputError, match="no record of a track"):
        league._recorded(tmp_path / "tiny.json")


@pytest.mark.parametrize(
    "name",
    ["[x](http://a.b)", "![x](//a.b/c.png)", "http://a.b", "www.a.b", "<img src=x>", "a_b_ *c* ~~d~~ `e`", "x@a.b"],
)
def test_names_of_a_record_are_words(name: str) -> None:
    """Rendered, they are what they were, and neither links nor images nor emphasis."""
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(_plain(name))
    assert re.findall(r"<[^>]*>", rendered) == ["<p>", "</p>"]
    assert html.unescape(rendered) == f"<p>{name.replace('`', chr(39))}</p>\n"
    assert not any(bare in _plain(name) for bare in ("://", "www.", "@"))


def test_the_page_says_what_was_measured_and_no_level_of_its_own(whole) -> None:
    page = (whole[0] / "records" / "README.md").read_text()
    head = page[: page.index("## tiny")]
    assert "93.5%" in head and "91.5%" in head and "a 95% interval" not in " ".join(head.split())


def test_the_page_escapes_what_records_hold(whole, tmp_path: Path) -> None:
    held = record(whole[0])
    held["track"]["about"] = "<script>alert(1)</script> | *x*"
    held["tables"]["docs"]["entries"][0]["name"] = "<b>|x"
    held["tables"]["docs"]["family"] = league.family(held["tables"]["docs"])
    (tmp_path / "tiny.json").write_text(json.dumps(held))
    (tmp_path / "tiny.md").write_text("What I read in it.\n")
    page = build_league(tmp_path).read_text()
    assert "<script>" not in page and "<b>" not in page and "What I read in it." in page
    assert "<b>" not in (tmp_path / "league.svg").read_text()
    for line in page.splitlines():
        assert not line.startswith("| ") or "own" in line or line.replace("\\|", "").count("|") in (11, 12)
