"""`league`: every method meets the same pool, budget, trainer and seeds; what came of it is a record."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from assay import __version__
from assay.bench import track as tracks
from assay.bench.known import SOUND
from assay.bench.track import ORACLE, Track
from assay.core.errors import InputError
from assay.core.keys import digest, write_json
from assay.core.method import KINDS, listed
from assay.core.pool import positions
from assay.core.progress import Progress
from assay.core.run import libraries
from assay.job import Job, run_study
from assay.numerics.stats import family_intervals, verdict
from assay.summary import LOT, clean_items
from assay.verify import compare

FORMAT = 1
ENTRIES = Path(__file__).with_name("entries.toml")
# Of the simulation behind the intervals that hold together.
DRAWS = 4000


def default_entries() -> list[dict[str, Any]]:
    """The arms that enter when nobody is named, as far as this version has their methods."""
    found = [_arm(entry) for entry in tomllib.loads(ENTRIES.read_text(encoding="utf-8"))["entries"]]
    return [arm for arm in found if present(arm)]


def _arm(entry: Any) -> dict[str, Any]:
    return {"name": entry, "method": {"name": entry}} if isinstance(entry, str) else dict(entry)


def present(arm: Mapping[str, Any]) -> bool:
    """Whether all methods that an arm names are there; those of other packages are taken at their word."""
    known = {name for kind in KINDS.values() for name in listed(kind)}
    parts = [arm["method"], arm.get("select", "cut"), *arm.get("filters", ())]
    return all("." in name or name in known for part in parts for name in _named(part))


def _named(value: Any) -> Iterator[str]:
    """The names of a method, and of those in its nested tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if isinstance(value.get("name"), str):
            yield value["name"]
        yield from (name for inner in value.values() if isinstance(inner, Mapping) for name in _named(inner))


def run_track(
    track: Track, out: Path, *, runs: Path, data: Path, methods: list[str] | None = None, workers: int | None = None,
    progress: Progress | None = None, command: str = "", report: Callable[[Path], Path] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a track, or go on with it, and write `out/TRACK.json`; returns what that holds.

    Without `methods` the default entries run, and whatever else the record has. With them only those run: the record's
    other entries stay as they are, for which the random runs must be the recorded ones. Steps are kept in `runs`, so
    only what is new is computed. Raises `InputError` for a selection that breaks a rule of the track.
    """
    progress, file = progress or Progress(), out / f"{track.name}.json"
    spec = json.loads(track.model_dump_json())
    held = _recorded(file)
    same = bool(held) and held["track"] == spec
    if held and not same and methods is not None:
        raise InputError(
            f"the record is of another track {track.name!r}", where=file, why="its recipe, trainer or seeds differ",
            fix="run the track without --methods, which replaces the record",
        )  # fmt: skip
    record: dict[str, Any] = {"format": FORMAT, "track": spec, "tables": {}}
    folder = tracks.build(track, data, runs / "pools")
    before = held["tables"] if same else {}
    for table, study in tracks.studies(track, folder, _entering(before, methods)):
        seen: list[dict[str, Any]] = []

        def watch(job: Job, result: dict[str, Any], table: str = table, seen: list[Any] = seen) -> None:
            seen.append(_table(track, table, job, result))

        run_study(
            study, runs / study.name, workers=workers, progress=progress, replace=True, command=command, report=report,
            store=runs, watch=watch,
        )  # fmt: skip
        record["tables"][table] = _merged(before.get(table), seen[0], strict=methods is not None, where=file)
        out.mkdir(parents=True, exist_ok=True)
        # Tables that are not due yet stay as they were: a killed run leaves no hole.
        write_json(file, {**record, "tables": before | record["tables"]})
    return record


def _recorded(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        version = held["format"]
        if not isinstance(held["track"], dict) or not isinstance(held["tables"], dict):
            raise TypeError("its track and its tables are no tables")
    except (ValueError, KeyError, TypeError) as error:
        why = f"it has no key {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            "this is no record of a track", where=file, why=why, fix="move it away, or choose another --out"
        ) from error
    if version != FORMAT:
        raise InputError(f"the record is of format {version}, this is {FORMAT}", where=file, fix="choose another --out")
    return held


def _entering(before: Mapping[str, Any], methods: list[str] | None) -> list[dict[str, Any]]:
    """The arms that run: those named, or all defaults and then what else was recorded."""
    usual = {arm["name"]: arm for arm in default_entries()}
    if methods is not None:
        for name in methods:
            if name == ORACLE or name.startswith("random"):
                raise InputError(f"{name!r} is a row of every table already", where="--methods", fix="drop it")
        return [usual.get(name, _arm(name)) for name in methods]
    old = {e["name"]: e["arm"] for table in before.values() for e in table["entries"] if not e["oracle"]}
    return [*usual.values(), *(arm for name, arm in old.items() if name not in usual and present(arm))]


def _table(track: Track, table: str, job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """One table of a record, of a finished job."""
    _obeyed(track, result)
    arms = {arm["name"]: arm for arm in result["study"]["arms"]}
    rows = [_row(track, table, job, arm, arms[arm["name"]]) for arm in result["arms"]]
    training = {k: result["training"][k] for k in ("model", "parameters", "steps", "tokens", "repeats", "seeds")}
    target = {**result["target"], "fingerprint": job.target.judging.fingerprint}
    pool = {k: result["pool"][k] for k in ("rows", "tokens", "domains", "fingerprint")}
    return {
        "pool": pool, "target": target, "budget": result["budget"], "training": training,
        "detectable": result["detectable"], "nulls": result["nulls"], "level": job.study.verify.level,
        "random": [row for row in rows if row["name"].startswith("random-")],
        "entries": [row for row in rows if not row["name"].startswith("random-")],
    }  # fmt: skip


def _obeyed(track: Track, result: dict[str, Any]) -> None:
    """No entry may spend more than the budget, leave an example unscored, or take a row that holds a target item."""
    rules = [check for check in result["checks"] if check.get("rule")]
    assert rules, "every run is held to the rules"
    for check in rules:
        if not check["ok"]:
            raise InputError(f"not allowed in the league: {check['name']}", where=track.name, why=check["detail"])


def _row(track: Track, table: str, job: Job, arm: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """An entry: what it is, what it chose, what came of it, what it cost, and what it was made with."""
    clean, lot = clean_items(job), arm["by_lot"]
    losses = {n: np.stack([seed["loss"][clean] for seed in seeds]) for n, seeds in job.judged.items()}
    draws = np.stack([v for n, v in losses.items() if n.startswith("random-") and n != arm["name"]])
    level = job.study.verify.level
    found = compare(losses[arm["name"]], draws, level=level, draw=lot > LOT)
    selection, method = job.selections[arm["name"]], job.methods[arm["name"]]
    rows = positions(job.pool.ids, selection.ids)
    sizes, domains = job.sizes[rows], job.pool.domains()[rows]
    sound = np.array(job.pool.column(SOUND), dtype=bool)[rows]
    share = lambda mask: float(sizes[mask].sum() / sizes.sum())  # noqa: E731
    return {
        "name": arm["name"], "oracle": arm["name"] == ORACLE, "arm": spec, "judged_loss": arm["judged_loss"],
        "by_seed": arm["by_seed"], "by_item": " ".join(f"{x:.5f}" for x in losses[arm["name"]].mean(axis=0)),
        **found, "by_lot": lot,
        "cost_class": arm["cost_class"], "cost": arm["selection_flops_share"], "selected": arm["selected"],
        "tokens": arm["tokens"], "of_budget": _spent(job, arm) / job.budget.amount, "domains": arm["domains"],
        "own": {domain: share(sound & (domains == domain)) for domain in track.tables[table]},
        "damaged": share(~sound), "defects": {k: v["selected"] for k, v in arm["planted"].items()},
        "made": {
            "assay": __version__, "method": method.code(), "run": job.run.code, "libraries": digest(libraries()),
            "selection": selection.fingerprint,
        },
    }  # fmt: skip


def _spent(job: Job, arm: dict[str, Any]) -> int:
    """What a selection takes of the budget, in its unit."""
    return arm["tokens"] if job.budget.unit == "tokens" else arm["selected"]


def _merged(old: dict[str, Any] | None, new: dict[str, Any], *, strict: bool, where: Path) -> dict[str, Any]:
    """The new table with the old one's other entries, which stand only beside the random runs that they met."""
    names = {row["name"] for row in new["entries"]}
    others = [row for row in (old or {}).get("entries", []) if row["name"] not in names]
    if others and not _equal_anchors(old or {}, new):
        if strict:
            raise InputError(
                "the random runs are not the recorded ones", where=where,
                why="this machine, its libraries or the trainer differ from those that made the record, so its other "
                "entries met other runs", fix="run the track without --methods: every entry is made anew",
            )  # fmt: skip
        others = []
    entries = sorted([*new["entries"], *others], key=lambda row: row["name"])
    whole = {**new, "entries": entries}
    return {**whole, "family": family(whole)}


def _equal_anchors(old: dict[str, Any], new: dict[str, Any]) -> bool:
    own = [[(row["name"], row["by_seed"], row["by_item"]) for row in table["random"]] for table in (old, new)]
    return json.loads(json.dumps(own[0])) == json.loads(json.dumps(own[1]))


def margins(
    table: Mapping[str, Any], rows: list[dict[str, Any]], than: dict[str, Any] | None = None
) -> list[np.ndarray]:
    """Gains of rows, averaged down to each of the crossed factors, `[n, k]`: over the random draws (draws, seeds,
    items), or over another row (seeds, items)."""
    base = [than] if than is not None else table["random"]
    seeds = {id(r): np.array(r["by_seed"]) for r in [*base, *rows]}
    items = {id(r): np.array(r["by_item"].split(), dtype=float) for r in [*base, *rows]}
    centre = np.array([np.mean([seeds[id(b)].mean() for b in base]) - seeds[id(r)].mean() for r in rows])
    draw = np.stack([[seeds[id(b)].mean() - seeds[id(r)].mean() for r in rows] for b in base])
    by_seed = np.stack([np.mean([seeds[id(b)] for b in base], axis=0) - seeds[id(r)] for r in rows], axis=1)
    by_item = np.stack([np.mean([items[id(b)] for b in base], axis=0) - items[id(r)] for r in rows], axis=1)
    by_item += centre - by_item.mean(axis=0)  # items were rounded
    return [m for m in (draw, by_seed, by_item) if len(m) > 1]


def differences(
    table: Mapping[str, Any], rows: list[dict[str, Any]], than: dict[str, Any], luck: np.ndarray
) -> list[np.ndarray]:
    """As `margins` over another row, with the variance of the random draws for each of the two that fell by lot.

    `luck` `[k]` says how many of them did: 0, 1 or 2. The draws stand in such a way that the variance of their mean is
    so many times that of one draw.
    """
    found, draws = margins(table, rows, than), np.array([np.mean(row["by_seed"]) for row in table["random"]])
    if len(draws) > 1 and luck.any():
        gain = np.array([np.mean(than["by_seed"]) - np.mean(row["by_seed"]) for row in rows])
        found.insert(0, gain + (draws - draws.mean())[:, None] * np.sqrt(len(draws) * luck))
    return found


def family(table: Mapping[str, Any]) -> dict[str, Any]:
    """What many contestants at once allow to be said: intervals that hold together, and who ties with the best.

    The oracle is no contestant. `tied` are those whose gain cannot be told from the largest one's, by intervals of the
    differences that hold together and know of the luck of those that fell by lot.
    """
    rows = [row for row in table["entries"] if not row["oracle"]]
    if not rows:
        return {"size": 0, "share": None, "entries": {}, "best": None, "tied": []}
    level = table["level"]
    lot = np.array([row["by_lot"] > LOT for row in rows])
    gains, low, high, share = family_intervals(margins(table, rows), level=level, single=lot, draws=DRAWS)
    bounds = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    entries = {r["name"]: {"ci": [*b], "verdict": verdict(*b)} for r, b in zip(rows, bounds, strict=True)}
    best = rows[int(np.argmax(gains))]
    rest = [row for row in rows if row is not best]
    tied = []
    if rest:
        luck = lot[[row is not best for row in rows]] + float(best["by_lot"] > LOT)
        _, _, most, _ = family_intervals(differences(table, rest, best, luck), level=level, draws=DRAWS)
        tied = [row["name"] for row, bound in zip(rest, most, strict=True) if bound >= 0]
    return {"size": len(rows), "share": share, "entries": entries, "best": best["name"], "tied": tied}
