"""Filters in a study: random passes those of the study, a budget is filled from what is left, and all is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import small_study
from assay import plan as planner
from assay.core.errors import InputError
from assay.core.selection import Selection
from assay.data import toys
from assay.job import run_study
from assay.report.page import build
from assay.study import load, parse
from assay.terminal import show_result
from assay.trust.run import spec as verified

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 160
SMALL = {
    "budget": "20%",
    "task": {"vocab": 300, "width": 16, "layers": 1, "heads": 2, "context": 32},
    "train": {"steps": 2, "recipe": {"terms_per_step": 128}},
    "proxy": {"steps": 2, "recipe": {"terms_per_step": 128}},
    "verify": {"seeds": 2, "random": 2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of good and bad rows, five exact copies of rows of the good half, and 30 short rows of a third domain."""
    folder = tmp_path_factory.mktemp("pool")
    small_study.write_study(folder, rows=ROWS)
    lines = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    good = [row for row in lines if row["domain"] == "good"]
    copies = [{**row, "id": f"copy {k}"} for k, row in enumerate(good[:5])]
    short = [{"id": f"short {k}", "text": f"no. {k}", "domain": "short"} for k in range(30)]
    with open(folder / "pool.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*copies, *short])
    return folder


def study(folder: Path, **more: Any) -> Any:
    return parse(
        SMALL
        | {
            "pool": {"path": str(folder / "pool.jsonl"), "id": "id", "domain": "domain"},
            "target": {"path": str(folder / "target.parquet"), "id": "id"}, **more,
        }
    )  # fmt: skip


LONG = {"name": "length", "bounds": {"score": [20, float("inf")]}}


@pytest.fixture(scope="module")
def done(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    asked = study(
        made,
        filters=["exact_dup"],
        methods=["random", "bm25"],
        arms=[
            {"name": "long bm25", "method": "bm25", "filters": [LONG]},
            {"name": "long random", "method": "random", "filters": [LONG]},
        ],
        verify={"seeds": 2, "random": 2, "everything": True},
    )
    out = tmp_path_factory.mktemp("run") / "run"
    return asked, run_study(asked, out, workers=1), out


def test_all_arms_pass_the_filters_of_the_study(done: tuple[Any, dict[str, Any], Path]) -> None:
    _, result, out = done
    assert [a["name"] for a in result["arms"]] == [
        "random-1", "random-2", "bm25", "long bm25", "long random", "everything",
    ]  # fmt: skip
    copies = {row["id"] for row in _dropped(out, "random-1") if row["reason"] == "exact_dup: score below 0"}
    assert len(copies) == 5
    for arm in result["arms"]:
        kept = set(_kept(out, arm["name"]))
        assert kept and not kept & copies, arm["name"]
        if arm["name"] != "everything":
            assert arm["dropped"]["exact_dup: score below 0"] == 5
    everything = next(a for a in result["arms"] if a["name"] == "everything")
    assert everything["selected"] == result["pool"]["rows"] - 5 - result["contamination"]["hits"]


def test_an_arm_passes_its_own_as_well_and_fills_the_same_budget(done: tuple[Any, dict[str, Any], Path]) -> None:
    _, result, out = done
    arms = {a["name"]: a for a in result["arms"]}
    for name in ("long bm25", "long random"):
        assert not any(i.startswith("short") for i in _kept(out, name))
        assert arms[name]["dropped"]["length: score below 20"] == 30
    assert any(i.startswith("short") for i in _kept(out, "random-1") + _kept(out, "random-2"))
    amount = result["budget"]["amount"]
    assert all(0.9 * amount < a["tokens"] <= amount for n, a in arms.items() if n != "everything")
    assert arms["long random"]["verdict"] != "baseline", "random after a filter of its own is a contestant"


def test_scores_are_computed_once_whatever_the_number_of_arms(done: tuple[Any, dict[str, Any], Path]) -> None:
    _, result, out = done
    for name in ("bm25", "exact_dup", "length"):
        assert len(list((out / "steps").glob(f"scores-{name}-*"))) == 1
        assert sum(row["stage"] == f"score: {name}" for row in result["ledger"]) == 1


def test_stages_and_the_mixture_are_in_the_result(done: tuple[Any, dict[str, Any], Path]) -> None:
    _, result, _ = done
    plain, long = result["pipelines"]
    assert plain["arms"] == ["random-1", "random-2", "bm25", "everything"]
    assert long["arms"] == ["long bm25", "long random"]
    assert [s["name"] for s in long["stages"]] == ["contamination gate", "exact_dup", "length"]
    assert long["stages"][2]["domains"]["short"] == {"in": 30, "out": 0}
    assert long["stages"][2]["starved"] == [{"domain": "short", "kept": 0.0, "others": 1.0}]
    warned = [w for w in result["warnings"] if "mixture" in w]
    assert len(warned) == 1 and "the filter 'length' keeps 0.0% of domain 'short'" in warned[0]
    rows = long["stages"][2]["out"]["rows"]
    assert rows == result["pool"]["rows"] - result["contamination"]["hits"] - 5 - 30


def test_the_report_shows_them(done: tuple[Any, dict[str, Any], Path]) -> None:
    page = build(done[2]).read_text()
    section = page.split('id="filters"')[1].split("</section>")[0]
    assert "random-1, random-2, bm25, everything" in section and "long bm25, long random" in section
    assert re.search(r"<b>! 0%</b>", section) and "length: score below 20" in section
    assert "Filters change the mixture of domains: length keeps 0% of short" in page


def test_the_dataset_and_the_terminal_tell_of_them(done: tuple[Any, dict[str, Any], Path]) -> None:
    _, result, out = done
    card = (out / "dataset" / "long bm25" / "README.md").read_text()
    gate = result["pipelines"][1]["stages"][0]["out"]["rows"]
    assert f"| exact_dup | {gate} | {gate - 5} |\n| length | {gate - 5} | {gate - 35} |" in card
    manifest = json.loads((out / "dataset" / "long bm25" / "manifest.json").read_text())
    assert manifest["filters"]["stages"] == result["pipelines"][1]["stages"]
    console = Console(record=True, width=200)
    show_result(result, console)
    said = console.export_text()
    assert (
        f"rows left for long bm25, long random: contamination gate {gate}, exact_dup {gate - 5}, length {gate - 35}"
        in said
    )


def test_a_draw_from_what_filters_left_counts_its_luck(done: tuple[Any, dict[str, Any], Path]) -> None:
    _, result, out = done
    lots = {arm["name"]: arm["by_lot"] for arm in result["arms"]}
    assert lots["long random"] == lots["random-1"] == 1.0 and max(lots["bm25"], lots["everything"]) < 0.5
    console = Console(record=True, width=200)
    show_result(result, console)
    for said in (console.export_text(), re.sub("<[^>]*>", "", build(out).read_text())):
        assert "long random †" in said and "bm25 †" not in said and "fell by lot" in said


def test_the_stored_study_says_all_and_runs_to_the_same_selections(
    done: tuple[Any, dict[str, Any], Path], tmp_path: Path
) -> None:
    asked, result, out = done
    stored = result["study"]
    assert stored["filters"][0]["bounds"] == {"score": [0.0, None]}
    again = parse({**_without(asked.spec()), "methods": [], "arms": _arms(stored)})
    assert again.spec()["arms"] == stored["arms"] and again.spec()["filters"] == stored["filters"]
    run_study(again, tmp_path / "run", workers=1)
    for name in ("random-1", "long bm25"):
        assert _kept(tmp_path / "run", name) == _kept(out, name)
    assert "filters" not in verified(asked), "a verification reads no filters"


def _without(spec: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in spec.items() if k not in ("arms", "methods")}


def _arms(stored: dict[str, Any]) -> list[dict[str, Any]]:
    return [a for a in stored["arms"] if not a["name"].startswith("random-")]


def _kept(out: Path, arm: str) -> list[str]:
    return [i.decode() for i in Selection.open(out / "selections" / arm).ids.tolist()]


def _dropped(out: Path, arm: str) -> list[dict[str, str]]:
    import pyarrow.parquet as pq

    return pq.read_table(out / "selections" / arm / "dropped.parquet").to_pylist()


def test_a_filter_may_need_a_model(made: Path, tmp_path: Path) -> None:
    """The scoring models are trained for it, and what it costs is the arm's."""
    asked = study(made, methods=["random", {"name": "length", "filters": [{"name": "loss", "keep": "50%"}]}])
    result = run_study(asked, tmp_path / "run", workers=1)
    arm = next(a for a in result["arms"] if a["name"] == "length")
    assert arm["selection_flops"] > 0 and any("best 50%" in reason for reason in arm["dropped"])
    stage = result["pipelines"][0]["stages"][1]
    assert stage["out"]["rows"] == round(stage["in"]["rows"] / 2)


def test_an_unfilled_budget_is_told_and_an_empty_pool_refused(made: Path, tmp_path: Path) -> None:
    hard = {"name": "length", "keep": "10%"}
    result = run_study(study(made, filters=[hard], budget="50%", methods=["random"]), tmp_path / "run", workers=1)
    assert any("the filters of random-1 leave" in w and "it is not filled" in w for w in result["warnings"])
    nothing = {"name": "length", "bounds": {"score": [1e6, float("inf")]}}
    with pytest.raises(InputError, match="the filters leave nothing: 'length' drops the last"):
        run_study(study(made, filters=["exact_dup", nothing]), tmp_path / "none", workers=1)
    unknown = {"name": "length", "bounds": {"scor": [1, 2]}}
    with pytest.raises(InputError, match="did you mean 'score'"):
        run_study(study(made, filters=[unknown]), tmp_path / "unknown", workers=1)


def test_contaminated_rows_are_counted_with_the_filters_on(made: Path, tmp_path: Path) -> None:
    """What a method would have taken of them is read after its filters: those are part of the method."""
    import pyarrow.parquet as pq

    leak = pq.read_table(made / "target.parquet")["text"].to_pylist()[:4]
    longer = [text + " and so on, for the rest of the day" for text in leak]
    pool = [json.loads(line) for line in (made / "pool.jsonl").read_text().splitlines()]
    pool += [{"id": f"leak {k}", "text": text, "domain": "good"} for k, text in enumerate(longer)]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pool))
    below = {"name": "length", "bounds": {"score": [0, min(map(len, longer)) - 1]}}
    asked = study(
        made, pool={"path": str(path), "id": "id", "domain": "domain"}, methods=["random", "bm25"], budget="90%",
        arms=[{"name": "short", "method": "bm25", "filters": [below]}],
    )  # fmt: skip
    result = run_study(asked, tmp_path / "run", workers=1)
    hits = {a["name"]: a["contamination"]["hits"] for a in result["arms"]}
    assert result["contamination"]["hits"] >= 4 and hits["short"] == hits["bm25"] - 4 >= 0
    gate = result["pipelines"][0]["stages"][0]
    assert gate["reasons"] == {"contains a target item": result["contamination"]["hits"]}


def test_a_plan_counts_filters(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_rates", lambda probe, worker: {"train": 1e5, "forward": 3e5, "rss": 1e8})
    steps = lambda **more: {s.stage for s in planner.plan(study(made, methods=["random"], **more), 1).steps}  # noqa: E731
    filtered = steps(filters=["exact_dup", {"name": "loss", "keep": 0.5}])
    assert filtered - steps() == {"score: exact_dup", "score: loss", "proxy"}


def test_a_timed_filter_grows_with_the_rows() -> None:
    """A start is paid once; what each row takes, for every row."""
    pool = planner.Pool.from_columns(toys.skills(256).pool)
    from assay.core.method import Scorer, make

    class Clock:
        at = iter([1.0 + 0.01 * 64, 1.0 + 0.01 * 256])

        def lap(self) -> float:
            return next(Clock.at)

    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "_Clock", Clock)
        found = planner._sift_seconds(make(Scorer, "length"), pool, pool, 10_000, Path(folder))
    assert found == pytest.approx(1.0 + 0.01 * 10_000)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"filters": "exact_dup"}, "it takes a list"), ({"filters": ["exact_dupp"]}, "did you mean 'exact_dup'"),
        ({"arms": [{"name": "x", "method": "bm25", "filters": ["length"]}]}, "has no presets"),
        ({"methods": [{"name": "bm25", "filters": "exact_dup"}]}, "unreadable filters of 'bm25'"),
    ],
)  # fmt: skip
def test_unreadable_filters_are_refused_before_anything_runs(made: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        study(made, **change)
    assert said in str(caught.value)


def test_from_a_file_and_the_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (made / "study.toml").read_text()
    (made / "filtered.toml").write_text(
        'filters = ["exact_dup", {name = "length", bounds = {score = [20, inf]}}]\n' + text
    )
    assert [f.label for f in load(made / "filtered.toml").pipeline()] == ["exact_dup", "length"]
    from assay import cli

    flags: Callable[..., Any] = lambda *more: cli.app(  # noqa: E731
        ["run", str(made / "study.toml"), "--out", str(tmp_path / "run"), "--json", "--workers", "1", *more],
        standalone_mode=False,
    )
    flags("--filters", "exact_dup", "--methods", "random,length", "--set", "train.steps=2", "--set", "proxy.steps=2")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [a["dropped"]["exact_dup: score below 0"] for a in told["arms"]] == [5, 5, 5]
    with pytest.raises(InputError, match="'length' does not say what stays"):
        flags("--filters", "length")


def test_no_filters_leave_a_study_as_it_was(made: Path, tmp_path: Path) -> None:
    result = run_study(study(made, methods=["random", "length"]), tmp_path / "run", workers=1)
    assert result["pipelines"] == [] and "filters" not in result["study"]
    assert "filters" not in "".join(map(str, result["study"]["arms"]))
    key = json.loads(next((tmp_path / "run" / "steps").glob("select-*/step.json")).read_text())["key"]
    assert sorted(key) == ["barred", "budget", "code", "scores", "select", "sizes"]
    assert np.isfinite(result["arms"][0]["judged_loss"])


def test_a_run_is_exported_and_its_verdicts_are_filters(
    done: tuple[Any, dict[str, Any], Path], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an arm kept, as another program would list it, is a filter of another study: random is then from it."""
    from assay import cli

    call: Callable[..., Any] = lambda *words: cli.app(["export", str(done[2]), *words], standalone_mode=False)  # noqa: E731
    call("--arm", "bm25", "--to", "curator", "--out", str(tmp_path / "ids"))
    assert capsys.readouterr().out.strip() == str(tmp_path / "ids" / "part.0.parquet")
    listed = {"name": "verdict", "path": str(tmp_path / "ids"), "format": "curator"}
    result = run_study(study(made, filters=[listed], methods=["random"], budget="5%"), tmp_path / "run", workers=1)
    assert set(_kept(tmp_path / "run", "random-1")) <= set(_kept(done[2], "bm25"))
    assert any("verdict: joined" in check["name"] for check in result["checks"])
    with pytest.raises(InputError, match="did you mean 'bm25'"):
        call("--arm", "bm52", "--to", "ids")
    with pytest.raises(InputError, match="no finished run"):
        cli.app(["export", str(made), "--arm", "x", "--to", "ids"], standalone_mode=False)
    with pytest.raises(InputError, match="recommends no arm"):
        cli.app(["export", str(made), "--to", "ids"], standalone_mode=False)


def test_another_way_of_filtering_makes_selections_anew(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selections with filters follow the code of filters; those without are found again."""
    from assay import filters

    asked = study(
        made, methods=["random"], arms=[{"name": "long", "method": "random", "filters": [LONG]}],
        verify={"seeds": 2, "random": 1, "everything": False},
    )  # fmt: skip

    def steps() -> set[str]:
        run_study(asked, tmp_path / "run", workers=1)
        return {path.name for path in (tmp_path / "run" / "steps").glob("select-*")}

    before = steps()
    assert steps() == before
    other = tmp_path / "filters.py"
    other.write_text(Path(str(filters.__file__)).read_text() + "\n# another\n")
    monkeypatch.setattr(filters, "__file__", str(other))
    after = steps()
    assert len(before) == len(after) == 2 and len(before & after) == 1


def test_names_in_the_data_do_not_drive_the_terminal(tmp_path: Path) -> None:
    """A domain that is called as an escape sequence, in a warning, in a table of results and among best ids."""
    from io import StringIO

    from assay import terminal

    def shown(show: Callable[[Console], None]) -> str:
        out = StringIO()
        show(Console(file=out, force_terminal=True, color_system=None, width=200))
        return out.getvalue()

    name = "news\x1b[2J\x1b]0;owned\x07\u202e"
    said = shown(lambda console: terminal.Bars(console).warn(f"the filters keep 1% of domain {name!s}"))
    spread = {"lowest": 0.0, "median": 0.0, "highest": 0.0, "positive": 0.0, "top": [{"id": name}]}
    scores = {"rows": 1, "target": 1, "methods": {"bm25": spread}, "wall": 1.0, "peak_rss": 1, "out": "o"}
    said += shown(lambda console: terminal.show_scores(scores, console))
    row = {"name": name, "linearity": None, "agreement": 0.1, "mended": 0.1, "curvature": 0.1, "verdict": "unknown"}
    smooth = {
        "name": name, "target": {"measure": "loss"}, "findings": [name],
        "smooth": {"directions": 1, "center": 1.0, "h": 0.1, "rows": [{**row, "loss": 1.0}]},
    }  # fmt: skip
    said += shown(lambda console: terminal.show_smooth(smooth, console))
    assert said.count("news\\x1b[2J\\x1b]0;owned\\x07\\x202e") == 5
    assert not {"\x1b]", "\x07", "\u202e", "\x1b[2J"} & {part for part in ("\x1b]", "\x07", "\u202e", "\x1b[2J")
                                                          if part in said}  # fmt: skip


def test_a_bound_on_no_column_is_refused_before_scores_are_written(made: Path, tmp_path: Path) -> None:
    asked = study(made, methods=["random"], filters=[{"name": "length", "bounds": {"wrods": [1, 2]}}])
    with pytest.raises(InputError, match="length has no column 'wrods'"):
        run_study(asked, tmp_path / "run", workers=1)
    (step,) = (tmp_path / "run" / "steps").glob("scores-length-*")
    assert step.suffix == ".part" and not list(step.iterdir())
