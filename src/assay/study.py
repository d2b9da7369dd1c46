"""`Study`: all that a run is asked to do, as a TOML file, a Python value, or command-line flags."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from assay.core.errors import InputError, nearest
from assay.core.method import Count, NonNegative, Positive, Scorer, Selector, make
from assay.train.recipe import Recipe

DEFAULT_METHODS = ("random", "length", "loss", "exact_dup", "bm25", "loss_diff", "graddot", "trak")


class _Spec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class PoolSpec(_Spec):
    """Where the pool is, and which of the user's columns mean what."""

    path: str | tuple[str, ...] | None = None
    builtin: Literal["python", "digits"] | None = None
    text: str = "text"
    image: str | None = None
    id: str | None = None
    domain: str | None = None
    keep: tuple[str, ...] = ()
    sample: Count | None = None
    """Use a keyed random sample of this many rows."""
    size: Count = 12_000
    """Rows of the built-in pool."""
    flip: float = pydantic.Field(0.1, ge=0, lt=1)
    """Share of wrong labels planted in the built-in digits."""
    max_chars: Count = 1_000_000
    max_bad: float = pydantic.Field(0.05, ge=0, le=1)
    truth: str | None = None
    """Parquet of known defects by id, for the report only: no method sees it."""
    truth_kind: str = "kind"


class TargetSpec(_Spec):
    """What the user cares about: a file of its own, or a domain of the pool that is held out."""

    name: str = "target"
    path: str | tuple[str, ...] | None = None
    builtin: Literal["docs", "code", "docstring", "comment"] | None = None
    domain: str | None = None
    count: Count = 400
    """How many examples of `domain` are held out."""
    text: str = "text"
    id: str | None = None
    group: str | None = None
    max_chars: Count = 1_000_000
    max_bad: float = pydantic.Field(0.05, ge=0, le=1)


class TaskSpec(_Spec):
    """The model. `text`: the built-in decoder with its own tokenizer. `classifier`: vectors and labels."""

    kind: Literal["text", "classifier"] = "text"
    vocab: int = pydantic.Field(1024, ge=260)
    width: Count = 64
    layers: Count = 3
    heads: Count = 4
    context: int = pydantic.Field(160, ge=8)
    hidden: tuple[int, ...] = ()
    inputs: Count = 64
    classes: Count = 10


class ProxySpec(_Spec):
    """The scoring models: trained on the whole pool, `passes` times through it."""

    models: Count = 1
    passes: Positive = 1.0
    steps: Count | None = None
    recipe: Recipe = Recipe()


class TrainSpec(_Spec):
    """How each arm is trained: the same number of steps for all, `repeats` times through a selection."""

    repeats: Positive = 2.0
    steps: Count | None = None
    recipe: Recipe = Recipe()


class VerifySpec(_Spec):
    """How arms are compared: `seeds` paired trainings of each, `random` independent random selections."""

    seeds: int = pydantic.Field(4, ge=2)
    random: int = pydantic.Field(3, ge=1)
    everything: bool = False
    """Add an arm trained on the whole pool."""
    level: float = pydantic.Field(0.95, gt=0, lt=1)


class ArmSpec(_Spec):
    """One contestant: a scorer, and how its scores become a set."""

    name: str
    method: Any
    select: Any = "cut"


class Study(_Spec):
    """The whole job. `resolve` fills in what was left open, so that the stored study says everything."""

    name: str = "study"
    seed: int = 0
    pool: PoolSpec
    target: TargetSpec
    task: TaskSpec = TaskSpec()
    proxy: ProxySpec = ProxySpec()
    train: TrainSpec = TrainSpec()
    budget: str = "10%"
    methods: tuple[Any, ...] = DEFAULT_METHODS
    arms: tuple[ArmSpec, ...] = ()
    verify: VerifySpec = VerifySpec()
    batch: Count = 64
    """Most examples in one batch of a scorer."""
    shard: Count = 1024
    """Rows of one unit of work; fixed here so that no engine can change a result."""

    def contestants(self) -> list[ArmSpec]:
        """Arms by name: `random` becomes `random-1..n`, each with its own draw."""
        arms: list[ArmSpec] = []
        for spec in (*self.methods, *self.arms):
            arm = spec if isinstance(spec, ArmSpec) else ArmSpec(name=_name(spec), method=spec)
            if arm.method == "random":
                arms += [_random(r + 1, self.seed) for r in range(self.verify.random)]
            else:
                arms.append(arm)
        if not any(a.name.startswith("random-") for a in arms):
            arms = [_random(r + 1, self.seed) for r in range(self.verify.random)] + arms
        names = [a.name for a in arms]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two arms are called {name!r}", fix="give each entry of `arms` its own name")
        return arms

    def spec(self) -> dict[str, Any]:
        """Plain JSON, with the options of every method written out."""
        plain = self.model_dump(mode="json", exclude={"methods", "arms"})
        plain["arms"] = [
            {"name": a.name, "method": make(Scorer, a.method).spec(), "select": make(Selector, a.select).spec()}
            for a in self.contestants()
        ]
        return plain


def _name(spec: Any) -> str:
    if isinstance(spec, Mapping) and "name" in spec:
        return str(spec["name"])
    if isinstance(spec, str):
        return spec
    raise InputError(f"not a method: {spec!r}", where="methods", fix="give a name, or a table with a name and options")


def _random(number: int, seed: int) -> ArmSpec:
    return ArmSpec(name=f"random-{number}", method={"name": "random", "seed": 1000 * seed + number})


def parse(data: Mapping[str, Any], *, where: str = "study") -> Study:
    """A Study from nested tables. Raises `InputError` for unknown keys (naming the nearest), wrong types, and both or
    neither of a path and a built-in."""
    try:
        study = Study.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error, where) from error
    for name, part in (("pool", study.pool), ("target", study.target)):
        ways = [part.path, part.builtin] + ([part.domain] if isinstance(part, TargetSpec) else [])
        given = sum(w is not None for w in ways)
        digits = study.pool.builtin == "digits" and name == "target"
        if given != 1 and not (digits and given == 0):
            options = "path, builtin" + (" and domain" if name == "target" else "")
            raise InputError(f"[{name}] needs exactly one of {options}", where=where, why=f"{given} are given", fix=f"set {name}.path")
    for arm in study.contestants():
        make(Scorer, arm.method)
        make(Selector, arm.select)
    return study


def _explain(error: pydantic.ValidationError, where: str) -> InputError:
    first = error.errors()[0]
    path = [str(p) for p in first["loc"]]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        return InputError(f"unknown key {dotted!r}", where=where, fix=nearest(path[-1], _fields(path[:-1])))
    if first["type"] == "missing":
        return InputError(f"the study has no {dotted!r}", where=where, fix=f"add [{dotted}]")
    given = first.get("input")
    return InputError(f"{dotted} cannot be {given!r}", where=where, why=first["msg"], fix="see `assay init` for an example")


def _fields(path: Sequence[str]) -> list[str]:
    model: Any = Study
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            break
        model = field.annotation
    return list(getattr(model, "model_fields", {}))


def load(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a TOML study; `overrides` are `a.b=value` with TOML values. Paths in it are relative to its folder."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = [p.name for p in path.parent.glob("*.toml")] if path.parent.exists() else []
        raise InputError("no such study", where=path, fix=nearest(path.name, near)) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("unreadable study", where=path, why=str(error), fix="it must be a TOML file: see `assay init`") from error
    for part in ("pool", "target"):
        table = data.get(part)
        if isinstance(table, dict):
            for key in ("path", "truth"):
                if key in table:
                    table[key] = _relative(table[key], path.parent)
    return parse(override(data, overrides), where=str(path))


def _relative(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_relative(v, folder) for v in value]
    if isinstance(value, str) and "://" not in value and not Path(value).is_absolute():
        return str(folder / value)
    return value


def override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys; values are TOML, and a bare word is a string.

    >>> override({"a": {"b": 1}}, ["a.b=2", "a.c=word"])
    {'a': {'b': 2, 'c': 'word'}}
    """
    for item in overrides:
        key, found, value = item.partition("=")
        if not found or not key:
            raise InputError(f"unreadable override {item!r}", where="--set", fix="write --set key.subkey=value")
        try:
            parsed = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            parsed = value
        table = data
        *parents, last = key.strip().split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise InputError(f"{parent!r} is not a table", where=f"--set {item}", fix="check the dotted key")
        table[last] = parsed
    return data


__all__ = ["ArmSpec", "NonNegative", "PoolSpec", "Study", "TargetSpec", "TaskSpec", "load", "override", "parse"]
