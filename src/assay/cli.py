"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from assay import __version__
from assay.core.errors import InputError, nearest, os_error

app = typer.Typer(
    help="Build training sets by measuring what each example teaches the model.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

Out = Annotated[
    Path | None, typer.Option("--out", help="Directory of the run; made if missing, continued if it is there.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the study: a.b=value (TOML). Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object last on standard output; no tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes of one thread each; default: all cores.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Take over a directory that holds another study's run.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"assay {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Build training sets by measuring what each example teaches the model."""


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help="text | digits")] = "text",
    target: Annotated[str | None, typer.Option(help="For text: docs | code | docstring | comment.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A shortened form that still runs every stage.")] = False,
    every: Annotated[bool, typer.Option("--every", help="For text: the league's methods, not a fast choice.")] = False,
    out: Out = None, sets: Sets = None, json_: Json = False, quiet: Quiet = False, workers: Workers = None,
    replace: Replace = False,
) -> None:  # fmt: skip
    """Run the whole loop on data that comes with Python (text) or scikit-learn (digits)."""
    from assay import demos

    study = demos.study(name, sets or [], quick=quick, every=every, target=target)
    parts = (study.name, target, "every" if every else None, "quick" if quick else None)
    folder = out or Path("runs") / "-".join(part for part in parts if part)
    _run(study, folder, json_, quiet, workers, replace)


@app.command()
def run(
    study: Annotated[Path | None, typer.Argument(help="A study in TOML; or give --pool and --target.")] = None,
    pool: Annotated[str | None, typer.Option(help="File, directory, glob or URL of the pool.")] = None,
    target: Annotated[str | None, typer.Option(help="File of the target: what the model should do well.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text, in both files.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of ids in the pool; default: ids from content.")] = None,
    domain_column: Annotated[str | None, typer.Option(help="Column of domains in the pool.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated: random,bm25,trak.")] = None,
    budget: Annotated[str | None, typer.Option(help="10% | 5Mtok | 20k (examples).")] = None,
    filters: Annotated[
        str | None, typer.Option(help="Comma-separated: exact_dup,gopher. What leaves the pool before every arm.")
    ] = None,
    out: Out = None, sets: Sets = None, json_: Json = False, quiet: Quiet = False, workers: Workers = None,
    replace: Replace = False,
) -> None:  # fmt: skip
    """Score a pool, select under a budget, train on every selection, verify, report."""
    flags = {"pool": pool, "target": target, "text": text_column, "ids": id_column, "domain": domain_column}
    changes = [] if filters is None else [f"filters={json.dumps(_listed(filters))}"]
    chosen = _chosen(study, flags, [*(sets or []), *changes], methods, budget)
    _run(chosen, out or Path("runs") / chosen.name, json_, quiet, workers, replace)


@app.command()
def verify(
    study: Annotated[str | None, typer.Argument(help="A study in TOML, or demo:digits; or give --pool.")] = None,
    pool: Annotated[str | None, typer.Option(help="File, directory, glob or URL of the training examples.")] = None,
    target: Annotated[str | None, typer.Option(help="File of the target: what scores are asked for.")] = None,
    task: Annotated[str | None, typer.Option(help="Your own model: file.py:object, a Task such as ModuleTask.")] = None,
    model: Annotated[str | None, typer.Option(help="Or a directory of transformers, trained from its weights.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text, in both files.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of ids in the pool; default: ids from content.")] = None,
    domain_column: Annotated[str | None, typer.Option(help="Column of domains in the pool.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated: gradcos,trak. Nulls come along.")] = None,
    metasmooth: Annotated[
        bool,
        typer.Option("--metasmooth", help="Ask instead whether training can be differentiated, and what would help."),
    ] = False,
    out: Out = None, sets: Sets = None, json_: Json = False, quiet: Quiet = False, workers: Workers = None,
    replace: Replace = False,
) -> None:  # fmt: skip
    """Say whether attribution scores can be believed: hold them against real retraining, beside nulls."""
    if metasmooth and methods is not None:
        raise InputError(
            "--methods does not go with --metasmooth", why="it is a question about the training", fix="drop one of them"
        )
    flags = {"pool": pool, "target": target, "text": text_column, "ids": id_column, "domain": domain_column}
    flags |= {"task": task, "model": model}
    chosen = _chosen(study, flags, sets or [], methods, None)
    folder = out or Path("runs") / f"{chosen.name}-{'metasmooth' if metasmooth else 'verify'}"
    _verify(chosen, folder, json_, quiet, workers, replace, metasmooth)


FLAGS = {
    "pool": "--pool", "target": "--target", "text": "--text-column", "ids": "--id-column", "domain": "--domain-column",
    "task": "--task", "model": "--model",
}  # fmt: skip


def _chosen(
    study: Path | str | None, flags: dict[str, str | None], sets: list[str], methods: str | None, budget: str | None
) -> Any:
    """The study of a command: a file with changes, or what the flags say."""
    from assay import study as studies

    if study is not None:
        extra = [FLAGS[name] for name, value in flags.items() if value is not None]
        if extra:
            raise InputError(
                f"{', '.join(extra)} do not go with a study file", fix="change the file, or use --set pool.path=..."
            )
        changes = [*sets]
        changes += [f"budget={json.dumps(budget)}"] if budget is not None else []
        changes += [f"methods={json.dumps(_listed(methods))}"] if methods is not None else []
        return _study(str(study), changes)
    places = (flags[name] for name in ("pool", "target", "text", "ids", "domain"))
    given = _flags(*places, methods=methods, budget=budget)
    if flags.get("task") and flags.get("model"):
        raise InputError("--task and --model are two models", fix="give one of them")
    if flags.get("task"):
        given["task"] = {"module": flags["task"]}
    if flags.get("model"):
        given["task"] = {"kind": "causal", "model": flags["model"]}
    return studies.parse(studies.override(given, sets))


def _flags(
    pool: str | None, target: str | None, text: str | None, ids: str | None, domain: str | None, methods: str | None,
    budget: str | None,
) -> dict[str, Any]:  # fmt: skip
    if pool is None or target is None:
        raise InputError(
            "give a study file, or both --pool and --target", fix="`assay init POOL` writes a study to start from"
        )
    from assay.template import stem

    part = {"text": text} if text else {}
    data: dict[str, Any] = {"name": stem(pool, "run")}
    data["pool"] = {"path": pool, **part, **({"id": ids} if ids else {}), **({"domain": domain} if domain else {})}
    data["target"] = {"path": target, **part, "name": stem(target, "target")}
    data |= {} if methods is None else {"methods": _listed(methods)}
    return data | ({} if budget is None else {"budget": budget})


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


@app.command()
def featurize(
    pool: Annotated[str, typer.Option(help="File, directory, glob or URL of the pool.")],
    model: Annotated[str, typer.Option(help="Directory of a transformers model, or of an `assay run`.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the store; continued and mended if it is there.")],
    text_column: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of ids; default: ids from content.")] = None,
    method: Annotated[str, typer.Option(help="The featurizer.")] = "gradients",
    context: Annotated[int | None, typer.Option(min=1, help="Longest text in tokens (transformers models).")] = None,
    part: Annotated[str, typer.Option(help="2/4: the second of four parts, each into a store of its own.")] = "1/1",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the featurizer (rank=8), or shard, batch, area. Repeatable."),
    ] = None,
    json_: Json = False, quiet: Quiet = False, workers: Workers = None, replace: Replace = False,
) -> None:  # fmt: skip
    """Write the features of a pool to a store, once; `assay score` reads them for any target."""
    from assay import store, terminal

    order = store.order(
        pool, model, method=method, sets=sets or [], part=part, text=text_column, id=id_column, context=context
    )
    command = shlex.join(["assay", *sys.argv[1:]])
    with _watched(out, command, quiet or json_) as bars:
        facts = store.featurize(order, out, workers=workers, progress=bars, replace=replace, command=command)
    if json_:
        typer.echo(json.dumps(facts))
    elif not quiet:
        terminal.show_store(facts)


@app.command()
def score(
    stores: Annotated[list[Path], typer.Argument(help="A store, or all parts of one.", metavar="STORE...")],
    target: Annotated[str, typer.Option(help="File of the target: what the model should do well.")],
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "graddot,gradcos,trak",
    out: Annotated[Path, typer.Option("--out", help="Parquet file of the scores, by id.")] = Path("scores.parquet"),
    text_column: Annotated[str | None, typer.Option(help="Column of the target's text; default: the store's.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the target's ids.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the store's model is now, if it was moved.")] = None,
    json_: Json = False, quiet: Quiet = False, workers: Workers = None,
) -> None:  # fmt: skip
    """Score the examples of a store for a target: reads features, not the pool."""
    from assay import store, terminal

    with _watched(out, shlex.join(["assay", *sys.argv[1:]]), quiet or json_) as bars:
        found = store.score(
            stores, target, methods=_listed(methods), out=out, text=text_column, id=id_column, model=model,
            workers=workers, progress=bars,
        )  # fmt: skip
    if json_:
        typer.echo(json.dumps(found))
    elif not quiet:
        terminal.show_scores(found)


@app.command()
def plan(
    study: Annotated[str, typer.Argument(help="A study in TOML, or demo:text, demo:digits.")],
    sets: Sets = None, json_: Json = False, workers: Workers = None,
) -> None:  # fmt: skip
    """Estimate time, memory and disk before anything runs, from a few seconds of measurement on this machine."""
    from rich.console import Console
    from rich.table import Table

    from assay import plan as planner
    from assay import terminal
    from assay.engine.local import default_workers

    made = planner.plan(_study(study, sets or []), workers or default_workers())
    if json_:
        typer.echo(json.dumps(made.spec()))
        return
    table = Table(title="Plan", title_justify="left", show_footer=True)
    table.add_column("stage", "total")
    table.add_column("time", terminal.duration(made.seconds), justify="right")
    table.add_column("memory", terminal.size(made.memory), justify="right")
    table.add_column("disk", terminal.size(made.disk), justify="right")
    for step in made.steps:
        table.add_row(step.stage, terminal.duration(step.seconds), terminal.size(step.memory), terminal.size(step.disk))
    Console().print(table)


@app.command()
def init(
    pool: Annotated[str, typer.Argument(help="The pool: file, directory, glob or URL.")],
    target: Annotated[str | None, typer.Option(help="The target's file, if there is one already.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where to write the study.")] = Path("study.toml"),
) -> None:
    """Look at a pool and write a commented study for it."""
    from assay.template import study_for

    if out.is_dir():
        raise InputError(
            "the study cannot be written", where=out, why="it is a directory", fix=f"--out {out}/study.toml"
        )
    if out.exists():
        raise InputError("the study is there already", where=out, fix="choose another --out, or delete it")
    text = study_for(pool, target, out)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        why = f"there is no directory {out.parent}" if not out.parent.exists() else error.strerror or str(error)
        raise InputError("the study cannot be written", where=out, why=why, fix="choose another --out") from error
    typer.echo(f"wrote {out}: look it over, then `assay plan {out}` and `assay run {out}`")


@app.command()
def league(
    tracks: Annotated[
        list[str] | None, typer.Argument(help="Tracks by name, or TOML files of your own; default: all there are.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated: only these enter; the record's other entries stay.")
    ] = None,
    data: Annotated[
        Path, typer.Option(envvar="ASSAY_DATA", help="Folder that has domains/domains.parquet.")
    ] = Path("../shared/data"),
    out: Annotated[Path, typer.Option("--out", help="Folder of the records and their page.")] = Path("records"),
    runs: Annotated[
        Path, typer.Option(help="Folder of runs and steps; continued if it is there.")
    ] = Path("runs/league"),
    json_: Json = False, quiet: Quiet = False, workers: Workers = None,
) -> None:  # fmt: skip
    """Let methods compete on the same pool, budget, trainer and seeds, and write the records and their page."""
    from assay import terminal
    from assay.bench import league as leagues
    from assay.bench import track as known
    from assay.report.league import build_league
    from assay.report.page import build

    command, chosen = shlex.join(["assay", *sys.argv[1:]]), [known.load(name) for name in tracks or known.names()]
    named = None if methods is None else _listed(methods)
    with _watched(runs, command, quiet or json_) as bars:
        found = [
            leagues.run_track(
                track, out, runs=runs, data=data, methods=named, workers=workers, progress=bars, command=command,
                report=build,
            )
            for track in chosen
        ]  # fmt: skip
    page = build_league(out)
    if json_:
        typer.echo(json.dumps({"tracks": {r["track"]["name"]: r["tables"] for r in found}, "page": str(page)}))
    elif not quiet:
        for record in found:
            terminal.show_league(record)
        typer.echo(f"page: {page}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The directory of a finished `assay run`.")],
    to: Annotated[str, typer.Option("--to", help="datatrove | dolma | curator | datacomp | ids")],
    arm: Annotated[str | None, typer.Option(help="Whose selection; default: the recommended arm.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to; default: export/ in the run.")] = None,
) -> None:
    """Write what an arm selected in the form of another program; the scorer `verdict` reads all of them."""
    from assay import ship

    name = arm or ship.recommended(run)
    pool, selection = ship.opened(run, name)
    for file in ship.write(to, out or run / "export" / f"{name}-{to}", pool, selection, name):
        typer.echo(str(file))


@app.command()
def methods(json_: Json = False) -> None:
    """List every method with its formula, source, options and cost."""
    from assay import terminal
    from assay.core.method import KINDS, describe, discover

    entries = [describe(cls) for kind in KINDS.values() for cls in discover(kind).values()]
    if json_:
        typer.echo(json.dumps(entries, default=str))
    else:
        terminal.show_methods(entries)


@app.command()
def doctor(json_: Json = False) -> None:
    """Show versions, devices and extras, and test the installation in ten seconds."""
    from assay.doctor import examine, show

    found = examine()
    if json_:
        typer.echo(json.dumps(found))
    else:
        show(found)
    if not found["ok"]:
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The directory of a run.")]) -> None:
    """Draw the report of a finished run anew."""
    from assay.report.page import build

    if not run.is_dir():
        near = nearest(run.name, [p.name for p in run.parent.glob("*/")]) if run.parent.is_dir() else ""
        raise InputError(
            "no such run", where=run, why="there is no directory of this name", fix=near or "check the path"
        )
    typer.echo(str(build(run)))


def _study(name: str, changes: list[str]) -> Any:
    from assay import study as studies

    if name.startswith("demo:"):
        from assay import demos

        return demos.study(name.removeprefix("demo:"), changes)
    return studies.load(Path(name), changes)


@contextlib.contextmanager
def _watched(out: Path, command: str, silent: bool) -> Iterator[Any]:
    """Progress of one long call; Ctrl-C and failures of the machine become messages."""
    from assay import terminal
    from assay.core.progress import Progress

    bars = Progress() if silent else terminal.Bars()
    try:
        yield bars
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted: finished work is kept in {out}; to go on, run again:\n  {command}", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        raise os_error(error, out) from error
    finally:
        if isinstance(bars, terminal.Bars):
            bars.close()


def _run(study: Any, out: Path, json_: bool, quiet: bool, workers: int | None, replace: bool) -> None:
    from assay import plan as planner
    from assay import terminal
    from assay.job import run_study
    from assay.report.page import build

    command = shlex.join(["assay", *sys.argv[1:]])
    with _watched(out, command, quiet or json_) as bars:
        live = bars if isinstance(bars, terminal.Bars) and bars.console.is_terminal else None
        estimate = (lambda job: live.expect(planner.expectation(job))) if live else None
        result = run_study(
            study, out, workers=workers, progress=bars, replace=replace, command=command, report=build,
            estimate=estimate,
        )  # fmt: skip
    if json_:
        kept = "name target budget training arms nulls recommended contamination pipelines checks warnings".split()
        brief = {k: result[k] for k in [*kept, "wall", "peak_rss"]}
        typer.echo(json.dumps({**brief, "run": str(out), "report": str(out / "report.html")}))
    elif not quiet:
        terminal.show_result(result)
        typer.echo(f"{terminal.duration(result['wall'])}, {terminal.size(result['peak_rss'])} of memory")
        typer.echo(f"report:   {out / 'report.html'}\ndatasets: {out / 'dataset'}")


def _verify(
    study: Any, out: Path, json_: bool, quiet: bool, workers: int | None, replace: bool, metasmooth: bool
) -> None:
    from assay import terminal
    from assay.report.page import build
    from assay.trust.run import verify_study

    command = shlex.join(["assay", *sys.argv[1:]])
    with _watched(out, command, quiet or json_) as bars:
        intent = terminal.show_smooth_intent if metasmooth else terminal.show_intent
        begin = intent if isinstance(bars, terminal.Bars) else None
        result = verify_study(
            study, out, workers=workers, progress=bars, replace=replace, command=command, report=build, begin=begin,
            metasmooth=metasmooth,
        )  # fmt: skip
    if json_:
        own = "smooth training model" if metasmooth else "bank methods checks level"
        kept = f"name pool target {own} findings warnings wall peak_rss".split()
        brief = {k: result[k] for k in kept}
        typer.echo(json.dumps({**brief, "run": str(out), "report": str(out / "report.html")}))
    elif not quiet:
        (terminal.show_smooth if metasmooth else terminal.show_trust)(result)
        typer.echo(f"{terminal.duration(result['wall'])}, {terminal.size(result['peak_rss'])} of memory")
        typer.echo(f"report:   {out / 'report.html'}")


def main() -> None:
    """Entry point: bad input is one clear message and status 2, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Batches come in ever new shapes, and a process would keep what was compiled for a thousand of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    try:
        app()
    except InputError as error:
        from assay.terminal import terminal_safe

        typer.echo(f"error: {terminal_safe(str(error))}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"error: {os_error(error)}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
