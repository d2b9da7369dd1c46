"""`Study`: all that a run is asked to do, as a TOML file, a Python value, or command-line flags."""

from __future__ import annotations

import itertools
import math
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pydantic

from assay import filters, ordering
from assay.core.errors import InputError, nearest
from assay.core.method import Count, NonNegative, Scorer, Selector, find, make, placed
from assay.core.selection import Budget
from assay.specs import (
    ArmSpec,
    FileName,
    LdsSpec,
    PoolSpec,
    ProxySpec,
    SmoothSpec,
    Spec,
    TargetSpec,
    TaskSpec,
    TrainSpec,
    VerifySpec,
    dialogue,
)

DEFAULT_METHODS = ("random", "length", "loss", "exact_dup", "bm25", "loss_diff", "graddot", "trak")


class Study(Spec):
    """The whole job. `resolve` fills in what was left open, so that the stored study says everything."""

    name: FileName = "study"
    seed: int = pydantic.Field(default=0, ge=0, lt=2**31)
    pool: PoolSpec
    target: TargetSpec
    task: TaskSpec = TaskSpec()
    proxy: ProxySpec = ProxySpec()
    train: TrainSpec = TrainSpec()
    budget: str = "10%"
    methods: tuple[Any, ...] = DEFAULT_METHODS
    arms: tuple[ArmSpec, ...] = ()
    filters: tuple[Any, ...] = ()
    """What leaves the pool before any budget is filled, that of the random arms as well; one after the other. Each is a
    scorer's name, or a table with its options and `preset`, `bounds` or `keep`."""
    verify: VerifySpec = VerifySpec()
    lds: LdsSpec = LdsSpec()
    smooth: SmoothSpec = SmoothSpec()
    batch: Count = 64
    """Most examples in one batch of a scorer."""
    area: Count = 1536
    """Most padded tokens in one batch of a scorer's model: memory does not grow with the length of documents."""
    shard: Count = 1024
    """Rows of one unit of work; fixed here so that no engine can change a result."""

    @pydantic.field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def supplied(self) -> dict[str, Any]:
        """What `data.supplied` takes for a built-in pool."""
        pool = self.pool
        return {
            "kind": pool.builtin, "target": self.target.builtin, "size": pool.size, "count": self.target.count,
            "take": pool.take, "flip": pool.flip, "path": Path(str(pool.path)) if pool.path else None,
            "seed": self.seed,
        }  # fmt: skip

    def columns(self, what: str) -> dict[str, Any]:
        """Which columns of the pool's or the target's files mean what, as a `Source` is told."""
        spec = self.pool if what == "pool" else self.target
        found: dict[str, Any] = {
            "text": spec.text, "prompt": spec.prompt, "completion": spec.completion, "messages": spec.messages,
            "id": spec.id, "max_chars": spec.max_chars,
        }  # fmt: skip
        if what == "pool":
            found |= {"image": self.pool.image, "domain": self.pool.domain, "keep": self.pool.keep}
        else:
            group = (self.target.group,) if self.target.group else ()
            found |= {"keep": tuple(dict.fromkeys((*group, *self.target.keep)))}
        if self.task.module is not None:
            # A task of the user's names its columns; the text is read beside them if it was asked for.
            wanted = getattr(self.user_task, "columns", {})
            found["keep"] = tuple(dict.fromkeys((*found["keep"], *(name for name in wanted if name != "text"))))
            found["text"] = spec.text if "text" in wanted or "text" in spec.model_fields_set else None
        return found

    @cached_property
    def user_task(self) -> Any:
        """The Task that `task.module` names."""
        from assay.train.module import load_task

        assert self.task.module is not None
        return load_task(self.task.module)

    def _reserved(self, arm: ArmSpec) -> bool:
        """Whether an arm bears the name of a baseline that it is not."""
        spec = arm.method.get("name") if isinstance(arm.method, Mapping) else arm.method
        return arm.name == "everything" or (arm.name.startswith("random-") and spec != "random")

    def contestants(self) -> list[ArmSpec]:
        """Arms by name: `random` becomes `random-1..n`, each with its own draw."""
        arms: list[ArmSpec] = []
        for spec in (*self.methods, *self.arms):
            arm = spec if isinstance(spec, ArmSpec) else _arm(spec)
            if arm.method == "random" and not arm.filters:
                arms += [_random(r + 1, self.seed) for r in range(self.verify.random)]
            else:
                arms.append(arm)
        if not any(a.name.startswith("random-") for a in arms):
            arms = [_random(r + 1, self.seed) for r in range(self.verify.random)] + arms
        for arm in arms:
            if self._reserved(arm):
                raise InputError(
                    f"an arm cannot be called {arm.name!r}", why="that name is kept for a baseline",
                    fix="give the entry of `arms` another name",
                )  # fmt: skip
        names = [a.name for a in arms]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two arms are called {name!r}", fix="give each entry of `arms` its own name")
        return arms

    def pipeline(self, arm: ArmSpec | None = None) -> list[filters.Filter]:
        """The filters of the study, then those of an arm."""
        return [filters.parse(one) for one in (*self.filters, *(arm.filters if arm else ()))]

    def spec(self) -> dict[str, Any]:
        """Plain JSON, with the options of every method written out."""
        left_out = {"methods", "arms", "lds", "smooth", "filters"}
        plain: dict[str, Any] = self.model_dump(mode="json", exclude=left_out) | {"methods": []}
        plain |= {"filters": [one.spec() for one in self.pipeline()]} if self.filters else {}
        for recipe in (plain["train"]["recipe"], plain["proxy"]["recipe"], plain["task"]["pretrain"]["recipe"]):
            for decided in ("steps", "seed"):
                del recipe[decided]
        plain["arms"] = [
            {"name": a.name, "method": make(Scorer, a.method).spec(), "select": make(Selector, a.select).spec()}
            | ({"order": a.order} if a.order is not None else {})
            | ({"filters": [filters.parse(one).spec() for one in a.filters]} if a.filters else {})
            for a in self.contestants()
        ]
        return plain


def _arm(spec: Any) -> ArmSpec:
    """A method as an arm of its own name; a name that is no method is told as such."""
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if not isinstance(name, str) or name.startswith("."):
        raise InputError(
            f"not a method: {spec!r}", where="methods", fix="give a name, or a table with a name and options"
        )
    grid: Any = {}
    # A method with an option of this name, as `tuned`, chooses for itself.
    if isinstance(spec, Mapping) and "grid" in spec and "grid" not in find(Scorer, name).__dataclass_fields__:
        spec, grid = {k: v for k, v in spec.items() if k != "grid"}, spec["grid"]
        if not isinstance(grid, Mapping) or not all(isinstance(v, list | tuple) and len(v) for v in grid.values()):
            fix = "write grid = {damping = [0.01, 0.1, 1.0]}: a list of values for each option"
            raise InputError(f"unreadable grid of {name!r}: {grid!r}", where="methods", fix=fix)
        for variant in variants(spec, grid):
            make(Scorer, variant)
    own: dict[str, Any] = {}
    for key in ("order", "filters"):
        if isinstance(spec, Mapping) and key in spec and key not in find(Scorer, name).__dataclass_fields__:
            own[key], spec = spec[key], {k: v for k, v in spec.items() if k != key}
    make(Scorer, spec)
    listed = own.pop("filters", ())
    if not isinstance(listed, list | tuple):
        raise InputError(f"unreadable filters of {name!r}: {listed!r}", where="methods", fix='filters = ["exact_dup"]')
    return ArmSpec(name=name, method=spec, grid={k: tuple(v) for k, v in grid.items()}, filters=tuple(listed), **own)


def variants(spec: Any, grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A method with every combination of the values of its grid.

    >>> variants("trak", {"damping": [0.1, 1.0]})
    [{'name': 'trak', 'damping': 0.1}, {'name': 'trak', 'damping': 1.0}]
    """
    base = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    return [base | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _random(number: int, seed: int) -> ArmSpec:
    return ArmSpec(name=f"random-{number}", method={"name": "random", "seed": 1000 * seed + number})


def parse(data: Mapping[str, Any], *, where: str = "study") -> Study:
    """A Study from nested tables. Raises `InputError` for unknown keys (naming the nearest), wrong types, keys that do
    not go together, and both or neither of a path and a built-in."""
    try:
        study = Study.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error, where) from error
    _check_sources(study, where)
    _check_task(study, where)
    _check_recipes(study, where)
    _check_budget(study, where)
    for arm in study.contestants():
        try:
            make(Scorer, arm.method)
            make(Selector, arm.select)
            study.pipeline(arm)
            if arm.order is not None:
                ordering.parse(arm.order)
        except InputError as error:
            raise InputError(error.what, where=error.where or where, why=error.why, fix=error.fix) from error
    for key, value in _leaves(study.spec()):
        if isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
            raise InputError(f"{key} is not UTF-8: {value!r}", where=where, fix="rename the file")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} cannot be {value}", where=where, why="it must be finite", fix="give a number")
    return study


def _check_recipes(study: Study, where: str) -> None:
    """Keys that something else decides are refused, not silently overruled."""
    first = study.task.pretrain.recipe
    if "steps" in first.model_fields_set:
        raise InputError("task.pretrain.recipe.steps does nothing here", where=where, fix="set task.pretrain.passes")
    for part, recipe in (("train", study.train.recipe), ("proxy", study.proxy.recipe), ("task.pretrain", first)):
        for key, instead in (("steps", f"{part}.steps"), ("seed", "seed")):
            if key in recipe.model_fields_set:
                raise InputError(f"{part}.recipe.{key} does nothing here", where=where, fix=f"set {instead}")


def _check_sources(study: Study, where: str) -> None:
    pool, target = study.pool, study.target
    if pool.builtin == "images":
        if not isinstance(pool.path, str):
            why = "labelled images come from one .npz file or one folder"
            raise InputError("pool.builtin = 'images' has no path", where=where, why=why, fix="set pool.path")
    elif (pool.path is None) == (pool.builtin is None):
        why, fix = (
            ("neither is given", "set pool.path") if pool.path is None else ("both are given", "drop one of them")
        )
        raise InputError("[pool] needs exactly one of path and builtin", where=where, why=why, fix=fix)
    given = [key for key in ("path", "builtin", "domain") if getattr(target, key) is not None]
    if pool.builtin is None:
        if "builtin" in given:
            why = "target.builtin goes with pool.builtin, and the pool is a path"
            raise InputError(
                "[target] has no file", where=where, why=why, fix="set target.path or target.domain instead"
            )
        if len(given) != 1:
            why, fix = ("both are given", "drop one of them") if given else ("neither is given", "set target.path")
            raise InputError("[target] needs exactly one of path and domain", where=where, why=why, fix=fix)
    else:
        wrong = [key for key in given if key != "builtin" or pool.builtin != "python"]
        if wrong:
            why = f"pool.builtin = {pool.builtin!r} brings its own target"
            raise InputError(
                f"target.{wrong[0]} does nothing here", where=where, why=why, fix=f"drop target.{wrong[0]}"
            )
    unused = {"size": "builtin", "flip": "builtin"} if pool.builtin is None else dict.fromkeys(
        ("text", "prompt", "completion", "messages", "image", "id", "domain", "keep", "max_chars", "max_bad"), "path"
    )  # fmt: skip
    unused |= {} if pool.builtin == "images" else {"take": "builtin = 'images'"}
    for key, partner in unused.items():
        if getattr(pool, key) != PoolSpec.model_fields[key].default:
            why = f"it goes with pool.{partner}, which is not given"
            raise InputError(f"pool.{key} does nothing here", where=where, why=why, fix=f"drop pool.{key}")


def _check_causal(study: Study, where: str) -> None:
    """What goes with a model of transformers, and what with others."""
    task, default = study.task, TaskSpec()
    causal = task.kind == "causal"
    if causal and (task.model is None) == (task.config is None):
        raise InputError(
            "a causal task needs exactly one of task.model and task.config", where=where,
            fix="model = 'folder or hub id', or config = {model_type = 'llama', ...}",
        )  # fmt: skip
    apart = ["width", "layers", "heads"] if causal else ["model", "config", "weights", "pretrain", "template"]
    apart += ["vocab", "pretrain"] if causal and task.model is not None else []
    apart += ["weights"] if causal and task.model is None else []
    for key in apart:
        if getattr(task, key) != getattr(default, key):
            raise InputError(f"task.{key} does nothing here", where=where, fix=f"drop task.{key}")
    for what, spec in (("pool", study.pool), ("target", study.target)):
        if (spec.prompt is None) != (spec.completion is None):
            raise InputError(f"{what}.prompt and {what}.completion go together", where=where, fix="name both columns")
        if spec.completion is not None and spec.messages is not None:
            raise InputError(f"{what}.completion and {what}.messages are both given", where=where, fix="drop one")
    if dialogue(study.pool) and not causal:
        raise InputError(
            "completions are for causal models", where=where,
            why=f"the loss of task.kind = {task.kind!r} is that of whole texts", fix="set task.kind = 'causal'",
        )  # fmt: skip
    if study.target.path is not None and dialogue(study.target) != dialogue(study.pool):
        raise InputError(
            "the pool and the target must both have completions, or both texts", where=where,
            fix="set prompt and completion, or messages, of [pool] and of [target]",
        )  # fmt: skip
    if dialogue(study.pool) and "{prompt}" not in task.template:
        raise InputError(f"task.template = {task.template!r} has no {{prompt}}", where=where, fix='"{prompt}\\n"')


def _check_task(study: Study, where: str) -> None:
    _check_causal(study, where)
    task = study.task
    digits = study.pool.builtin == "digits"
    if (task.module is not None) != (task.kind == "module"):
        why = f"task.kind is {task.kind!r}, and task.module is {'missing' if task.module is None else 'given'}"
        raise InputError(
            "[task] does not say which model", where=where, why=why, fix="set task.module = 'file.py:object'"
        )
    if task.kind == "module":
        return
    kinds = {"digits": ("classifier",), "images": ("classifier", "convnet")}.get(
        study.pool.builtin or "", ("text", "causal")
    )
    if task.kind not in kinds:
        has = {"digits": "the digits are vectors with labels", "images": "images are pixels with labels"}
        why = has.get(study.pool.builtin or "", "the pool is text, without vectors and labels")
        fix = f"set task.kind = {' or '.join(map(repr, kinds))}"
        raise InputError(f"task.kind = {task.kind!r} does not fit the pool", where=where, why=why, fix=fix)
    if task.dropout and task.kind != "classifier":
        raise InputError("task.dropout does nothing here", where=where, why="it is for hidden layers of a classifier",
                         fix="drop task.dropout")  # fmt: skip
    if digits and (task.inputs, task.classes) != (64, 10):
        why = f"an image has 64 pixels and there are 10 digits, not {task.inputs} and {task.classes}"
        raise InputError("the classifier does not fit the digits", where=where, why=why, fix="drop both keys")
    if task.kind == "text" and task.width % task.heads:
        why = "each head takes an equal share"
        fix = f"set task.width to a multiple of {task.heads}"
        raise InputError(
            f"a width of {task.width} cannot be shared by {task.heads} heads", where=where, why=why, fix=fix
        )


def _check_budget(study: Study, where: str) -> None:
    """What no pool can mend is found now and not after the scoring."""
    most = 10**15
    try:
        Budget.parse(study.budget, examples=most, tokens=most)
    except InputError as error:
        if error.what.startswith("unreadable"):
            raise InputError(error.what, where=where, why=error.why, fix=error.fix) from error
        raise InputError(
            f"budget {study.budget!r} selects nothing, or more than the pool",
            where=where, why="a budget is above zero and at most 100%", fix="write '10%', '300ktok' or '20k', say",
        ) from error  # fmt: skip


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


_TAKES = {
    "string_type": "a string", "tuple_type": 'a list, such as ["a", "b"]', "int_type": "a whole number",
    "int_parsing": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "float_parsing": "a number", "bool_type": "true or false", "bool_parsing": "true or false",
    "model_type": "a table of keys", "string_unicode": "UTF-8 text",
    "string_pattern_mismatch": "a name of up to 100 characters without / and without a dot in front",
}  # fmt: skip


def _explain(error: pydantic.ValidationError, where: str) -> InputError:
    problems = error.errors()
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    first = (unknown or problems)[0]
    # Of a union, pydantic names the branch it tried: that is no part of the user's key.
    path = [p for p in first["loc"] if isinstance(p, int) or p in _known_keys() or p == first["loc"][-1] and unknown]
    dotted = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        return InputError(f"unknown key {dotted!r}", where=where, fix=nearest(str(path[-1]), _fields(path[:-1])))
    if first["type"] == "missing":
        return InputError(f"the study has no {dotted!r}", where=where, fix=f"add {dotted}: see `assay init`")
    takes = " or ".join(
        dict.fromkeys(
            _TAKES[p["type"]] for p in problems if p["type"] in _TAKES and p["loc"][: len(path)] == tuple(path)
        )
    )
    fix = f"it takes {takes}" if takes else "see `assay init` for an example"
    return InputError(f"{dotted} cannot be {first.get('input')!r}", where=where, why=first["msg"], fix=fix)


def _models(model: Any) -> Iterator[Any]:
    """A model and all models in its fields."""
    yield model
    for field in model.model_fields.values():
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel):
                yield from _models(inner)


def _known_keys() -> set[str]:
    return {key for model in _models(Study) for key in model.model_fields}


def _fields(path: Sequence[str | int]) -> list[str]:
    """The keys of the table at a path of keys and places in lists."""
    model: Any = Study
    for part in path:
        if isinstance(part, int):
            model = next(iter(typing.get_args(model)), None)
        else:
            field = getattr(model, "model_fields", {}).get(part)
            model = None if field is None else field.annotation
    return list(getattr(model, "model_fields", {}))


def load(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a TOML study; `overrides` are `a.b=value` with TOML values. Paths in it are relative to its folder."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = [p.name for p in path.parent.glob("*.toml")] if path.parent.exists() else []
        raise InputError("no such study", where=path, fix=nearest(path.name, near)) from error
    except OSError as error:
        raise InputError(
            "unreadable study", where=path, why=error.strerror or str(error), fix="give a TOML file that you may read"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(
            "unreadable study", where=path, why=str(error), fix="it must be a TOML file: `assay init POOL` writes one"
        ) from error
    for part, keys in (("pool", ("path", "truth")), ("target", ("path",)), ("task", ("module",))):
        table = data.get(part)
        if isinstance(table, dict):
            for key in keys:
                # A dotted module is no file.
                if key in table and (key != "module" or ".py:" in str(table[key])):
                    table[key] = _relative(table[key], path.parent)
    task = data.get("task")
    if isinstance(task, dict):
        for key in ("model", "config"):  # an id of the hub looks like a path: it is one where there is such a folder
            value = task.get(key)
            if isinstance(value, str) and (key == "config" or (path.parent / value).is_dir()):
                task[key] = _relative(value, path.parent)
    return parse(override(_placed(data, path.parent), overrides), where=str(path))


def _placed(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With files that options of methods name relative to the study's folder."""

    def moved(spec: Any) -> Any:
        if not isinstance(spec, Mapping):
            return spec
        held = {k: moved(v) if k == "method" else v for k, v in spec.items()}
        held |= {"filters": [moved(one) for one in spec["filters"]]} if isinstance(spec.get("filters"), list) else {}
        return placed(Scorer, held, lambda value: _relative(value, folder))

    lists = [key for key in ("methods", "arms", "filters") if isinstance(data.get(key), list)]
    return data | {key: [moved(one) for one in data[key]] for key in lists}


def _relative(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_relative(v, folder) for v in value]
    if isinstance(value, str) and value and "://" not in value and not value.startswith(("/", "~")):
        return str(folder / value)
    return value


def override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys; values are TOML, and a bare word is a string.

    >>> override({"a": {"b": 1}}, ["a.b=2", "a.c=word"])
    {'a': {'b': 2, 'c': 'word'}}
    """
    for item in overrides:
        key, found, value = item.partition("=")
        *parents, last = [part.strip() for part in key.split(".")]
        if not found or not all((*parents, last)):
            raise InputError(f"unreadable override {item!r}", where="--set", fix="write --set key.subkey=value")
        parsed, table = _value(item, value.strip()), data
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise InputError(f"{parent!r} is not a table", where=f"--set {item}", fix="check the dotted key")
        table[last] = parsed
    return data


def _value(item: str, text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        if text.startswith(("[", "{", '"', "'")):
            fix = 'close its quotes and brackets, and quote it for the shell: --set \'a.b=["x", "y"]\''
            raise InputError("unreadable value", where=f"--set {item}", why=str(error), fix=fix) from error
        return text


__all__ = ["ArmSpec", "NonNegative", "PoolSpec", "Study", "TargetSpec", "TaskSpec", "load", "override", "parse"]
