"""Filters: what leaves the pool before a budget is filled, in which order, and for which reason.

A filter is a scorer whose columns are compared with bounds. Filters act one after the other: a row is dropped by the
first one that it fails, and later ones do not see it. Scores are those of the whole pool, computed once whatever the
number of pipelines; what depends on the rows that are left is only `keep` (a share of them) and, for scorers that name
groups of copies (`Scorer.group`), which copy stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.core.errors import InputError, nearest
from assay.core.keys import canonical, hash_ids
from assay.core.method import Bounds, Method, Scorer, make
from assay.core.selection import outside
from assay.core.table import Table

GATE = "contains a target item"
FLOOR = 0.5
"""A stage that keeps less of a domain than this share of what it keeps of the others changes the mixture: told."""
FEWEST = 20
"""Rows of a domain below which its share is chance."""
KEYS = ("preset", "bounds", "keep", "column")


@dataclass(frozen=True)
class Filter:
    """A scorer and what must hold of its columns, or which share of the rows its `column` lets pass."""

    method: Scorer
    preset: str | None
    bounds: Bounds
    keep: float | None = None
    column: str = ""

    @property
    def label(self) -> str:
        """The method's name, and the preset where it is not the method's first."""
        name, first = self.method.name.rpartition(".")[2], next(iter(self.method.presets), None)
        return name if self.preset in (None, first) else f"{name} {self.preset}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the scorer that it looks at, by name."""
        return tuple(self.bounds) if self.keep is None else (self.column,) if self.column else ()

    def spec(self) -> dict[str, Any]:
        """Plain JSON with every bound written out; `parse` is the inverse."""
        found: dict[str, Any] = {"method": self.method.spec()}
        found |= {} if self.preset is None else {"preset": self.preset}
        if self.keep is not None:
            return found | {"keep": self.keep, "column": self.column}
        return found | {"bounds": {name: list(ends) for name, ends in self.bounds.items()}}

    def judge(self, table: Table, here: np.ndarray) -> dict[str, np.ndarray]:
        """Reason -> which of the rows `here` (`[n]` bool) it drops, each row under one reason."""
        if self.keep is not None:
            return {f"not among the best {100 * self.keep:g}%": here & ~self._best(table, here)}
        found, left = {}, here.copy()
        for name, (low, high) in self.bounds.items():
            falls = left & outside(table.column(name), low, high)
            if self.method.group and name == table.columns[0]:
                falls &= ~self._heirs(table, left)
            found[_told(name, low, high)] = falls
            left &= ~falls
        return found

    def _best(self, table: Table, here: np.ndarray) -> np.ndarray:
        """The best rows by the column, as many as the share says; ties fall by a hash of the id."""
        rows = np.flatnonzero(here)
        order = rows[
            np.lexsort((hash_ids(table.ids[rows], "tie"), -table.column(self.column or table.columns[0])[rows]))
        ]
        chosen = np.zeros(len(here), dtype=bool)
        assert self.keep is not None
        chosen[order[: round(self.keep * len(order))]] = True
        return chosen

    def _heirs(self, table: Table, here: np.ndarray) -> np.ndarray:
        """Of each group of copies, the best row that is still here: it stays even if the group's own survivor, which an
        earlier filter dropped, would have been the one to stay.

        One row for a group, whatever holds the group together. Of exact copies that is right. Where members are like
        the survivor and not each other (stars of `minhash`, groups of `semdedup`), or are joined by chains, those
        that only the lost row had held together are dropped all the same, with nothing here that says what they say.
        """
        groups, scores = table.column(self.method.group), table.column(table.columns[0])
        rows = np.flatnonzero(here & (groups >= 0))
        rows = rows[np.lexsort((table.ids[rows], -scores[rows], groups[rows]))]
        first = np.ones(len(rows), dtype=bool)
        first[1:] = groups[rows][1:] != groups[rows][:-1]
        chosen = np.zeros(len(here), dtype=bool)
        chosen[rows[first]] = True
        return chosen


def _told(name: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{name} below {low:g}" if high is None else f"{name} above {high:g}"
    return f"{name} outside [{low:g}, {high:g}]"


def parse(spec: Any) -> Filter:
    """A filter from a scorer's name, or a table with its name and options and, of the filter itself, `preset`, `bounds`
    (column -> [low, high]), or `keep` (a share) with `column`.

    `method = {name = ..., ...}` in the place of the name holds options that are called as those of the filter.
    Raises `InputError` for an unknown method, option or preset and for bounds that nothing can meet.
    """
    if isinstance(spec, Filter):
        return spec
    if not isinstance(spec, str | Mapping):
        raise InputError(f"not a filter: {spec!r}", fix="give a scorer's name, or a table with a name and options")
    table: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    own = {key: table.pop(key) for key in KEYS if key in table}
    named = "method" not in table
    if not named:
        inner = table.pop("method")
        if table:
            raise InputError(
                f"a filter has no key {next(iter(table))!r} beside `method`",
                fix="put options into `method`, or drop it",
            )
        table = {"name": inner} if isinstance(inner, str) else inner
    method = make(Scorer, table)
    if named and own.get("column") and (inside := _inside(method, own, "column")):
        raise InputError(
            f"filter {method.name!r}: `column` could be the filter's or the scorer's", why="both have one",
            fix=f"{inside}; for the filter's write method = {{name = {method.name!r}}} beside it",
        )  # fmt: skip
    if own.get("keep") is not None:
        return _by_rank(method, own)
    if own.get("column"):
        raise InputError(f"filter {method.name!r}: `column` goes with `keep`", fix="name columns in `bounds`")
    preset, given = own.get("preset"), _bounds(method, own.get("bounds"))
    if preset is None and not given:
        preset = next(iter(method.presets), None)
        if preset is None:
            raise InputError(
                f"filter {method.name!r} does not say what stays", why="this scorer has no presets",
                fix="write bounds = {score = [low, high]}, or keep = 0.5",
            )  # fmt: skip
    if preset is not None and preset not in method.presets:
        why = "" if method.presets else "this scorer has none"
        raise InputError(
            f"filter {method.name!r} has no preset {preset!r}", why=why,
            fix=_inside(method, own, "preset") or nearest(str(preset), method.presets),
        )  # fmt: skip
    merged = {**(method.presets[preset] if preset is not None else {}), **given}
    bounds = {name: ends for name, ends in merged.items() if ends != (None, None)}
    if not bounds:
        raise InputError(f"filter {method.name!r} bounds nothing", fix="drop it, or give a column one end")
    return Filter(method, preset, bounds)


def _inside(method: Scorer, own: Mapping[str, Any], key: str) -> str:
    """How to write an option of the scorer that is called as one of the filter; empty where it has none."""
    if key not in {field.name for field in dataclasses.fields(method)}:
        return ""
    return f"for the scorer's option write method = {{name = {method.name!r}, {key} = {own[key]!r}}} without `name`"


def _by_rank(method: Scorer, own: Mapping[str, Any]) -> Filter:
    if own.get("preset") is not None or own.get("bounds"):
        raise InputError(
            f"filter {method.name!r} has both `keep` and bounds", fix="write it twice, one after the other"
        )
    share = own["keep"]
    if isinstance(share, str) and share.strip().endswith("%"):
        try:
            share = float(share.strip()[:-1]) / 100
        except ValueError:
            pass
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(
            f"filter {method.name!r} cannot keep {own['keep']!r}", why="it is a share of the rows that reach it",
            fix="; ".join(filter(None, ["write keep = 0.3, or keep = '30%'", _inside(method, own, "keep")])),
        )  # fmt: skip
    return Filter(method, None, {}, float(share), str(own.get("column") or ""))


def _bounds(method: Scorer, given: Any) -> dict[str, tuple[float | None, float | None]]:
    """Bounds as written: `[low, high]`, where an end that is missing is null or infinite."""
    if given is None:
        return {}
    fix = "write bounds = {words = [50, 1000], score = [0, inf]}: for each column its lowest and highest value"
    if not isinstance(given, Mapping):
        raise InputError(f"filter {method.name!r}: unreadable bounds {given!r}", fix=fix)
    found = {}
    for name, ends in given.items():
        if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(map(_is_end, ends)):
            raise InputError(f"filter {method.name!r}: unreadable bounds of {name}: {ends!r}", fix=fix)
        low, high = (None if e is None or abs(e) == np.inf else float(e) for e in ends)
        wrong = ends[0] == np.inf or ends[1] == -np.inf or (low is not None and high is not None and low > high)
        if wrong:
            raise InputError(f"filter {method.name!r}: no {name} lies in {list(ends)}", fix="give the lower end first")
        found[str(name)] = (low, high)
    return found


def _is_end(value: Any) -> bool:
    """Whether a value can be one end of an interval: a number, and no NaN, or nothing."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value == value)


def checking(pipeline: Sequence[Filter]) -> Callable[[Method, Sequence[str]], None]:
    """A check that a scorer has the columns that these filters look at. It raises `InputError` for one that has not."""
    wanted: dict[str, list[str]] = {}
    for one in pipeline:
        wanted.setdefault(canonical(one.method.spec()), []).extend(one.columns)

    def check(method: Method, columns: Sequence[str]) -> None:
        for name in wanted.get(canonical(method.spec()), []):
            if name not in columns:
                why = f"it has: {', '.join(columns[:50])}"
                raise InputError(
                    f"{method.name} has no column {name!r}", where="filters", why=why, fix=nearest(name, columns)
                )

    return check


@dataclass(frozen=True)
class Sieve:
    """What a pipeline of filters left, and what each of its stages did.

    `stages` are plain JSON: `name`, `in` and `out` (rows and terms), `domains` (rows in and out), `reasons`, `starved`.
    """

    dropped: dict[str, np.ndarray]
    left: np.ndarray
    stages: list[dict[str, Any]]


def sift(
    filters: Sequence[Filter], tables: Sequence[Table], sizes: np.ndarray, domains: np.ndarray, barred: np.ndarray
) -> Sieve:
    """Apply filters in order to what `barred` (`[n]` bool, the first stage) leaves; all Tables are of one pool."""
    here, dropped, stages = np.ones(len(sizes), dtype=bool), dict[str, np.ndarray](), []
    names, counts = np.unique(domains, return_inverse=True)

    def stage(name: str, found: Mapping[str, np.ndarray]) -> None:
        before, taken = here.copy(), {}
        for reason, rows in found.items():
            here[rows] = False
            taken |= {reason: int(rows.sum())} if rows.any() else {}
        stages.append(_stage(name, before, here, sizes, names, counts) | {"reasons": taken})

    stage("contamination gate", {GATE: barred})
    labels = unique([f.label for f in filters])
    for one, table, label in zip(filters, tables, labels, strict=True):
        found = {f"{label}: {reason}": rows for reason, rows in one.judge(table, here).items()}
        dropped |= {reason: table.ids[rows] for reason, rows in found.items() if rows.any()}
        stage(label, found)
    return Sieve(dropped, here, stages)


def unique(labels: Sequence[str]) -> list[str]:
    """
    >>> unique(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    before = [labels[:place].count(label) for place, label in enumerate(labels)]
    return [f"{label} ({k + 1})" if k else label for label, k in zip(labels, before, strict=True)]


def _stage(
    name: str, before: np.ndarray, after: np.ndarray, sizes: np.ndarray, names: np.ndarray, codes: np.ndarray
) -> dict[str, Any]:
    own = [np.bincount(codes[rows], minlength=len(names)) for rows in (before, after)]
    return {
        "name": name,
        "in": {"rows": int(before.sum()), "tokens": int(sizes[before].sum())},
        "out": {"rows": int(after.sum()), "tokens": int(sizes[after].sum())},
        "domains": {
            str(d): {"in": int(a), "out": int(b)} for d, a, b in zip(names.tolist(), own[0], own[1], strict=True)
        },
        "starved": starved(dict(zip(names.tolist(), zip(own[0].tolist(), own[1].tolist(), strict=True), strict=True))),
    }  # fmt: skip


def starved(domains: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Domains of at least `FEWEST` rows of which less than `FLOOR` times the share of all others was kept.

    >>> starved({"a": (100, 90), "b": (100, 10)})
    [{'domain': 'b', 'kept': 0.1, 'others': 0.9}]
    """
    came, went = (sum(pair[k] for pair in domains.values()) for k in (0, 1))
    found = []
    for name, (before, after) in domains.items():
        if before < FEWEST or came == before:
            continue
        kept, others = after / before, (went - after) / (came - before)
        if kept < FLOOR * others:
            found.append({"domain": str(name), "kept": kept, "others": others})
    return found


def findings(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the stages did to the mixture, in sentences: for each stage, and for all together where no single one is to
    blame."""
    said, blamed = [], set()
    for stage in stages[1:]:
        blamed |= {one["domain"] for one in stage["starved"]}
        said += [f"the filter {stage['name']!r} keeps {_shares(one)}" for one in stage["starved"]]
    if len(stages) > 2:
        last = stages[-1]["domains"]
        whole = starved({d: (stages[1]["domains"][d]["in"], last[d]["out"]) for d in last})
        said += [f"the filters together keep {_shares(one)}" for one in whole if one["domain"] not in blamed]
    return said


def _shares(one: Mapping[str, Any]) -> str:
    name, kept, others = one["domain"], one["kept"], one["others"]
    return f"{kept:.1%} of domain {name!r} and {others:.1%} of the others: that changes the mixture of domains"
