"""`Method`: the base of featurizers, scorers and selectors. The object is the config, and one file is one method."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, dataclass_transform

import numpy as np
import pydantic

from assay.core.errors import InputError, nearest
from assay.core.keys import digest_sources
from assay.core.pool import Pool, positions
from assay.core.progress import Progress
from assay.core.selection import Budget, Selection
from assay.core.table import Table, unit_rows

Positive = Annotated[float, pydantic.Field(gt=0)]
NonNegative = Annotated[float, pydantic.Field(ge=0)]
Count = Annotated[int, pydantic.Field(ge=1)]
Cost = Literal["none", "text", "forward", "gradient", "retrain"]
Bounds = Mapping[str, tuple[float | None, float | None]]
"""Lowest and highest value of a column that stays, by column; None where there is no such end."""
FilePath = Annotated[str, "file"]
"""A file or a folder: in a study, relative to the study's own."""
ModelPath = Annotated[str, "model"]  # where there is no such folder, the id of a model on the hub
Targets = Literal["mean", "each"]
"""Scores for the mean over the target's examples, or a column for each of them, named after its id."""
M = TypeVar("M", bound="Method")
SIGN, SIGNS = re.compile(r"[GL][et]\((..)=([^)]+)\)"), {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Batch(Protocol):
    """What a method sees of a few examples. Everything is read when it is asked for."""

    ids: np.ndarray

    def column(self, name: str) -> list[Any]:
        """Values of a pool column."""
        ...

    def table(self, method: Method) -> np.ndarray:
        """Rows `[b, d]` of the Table that a nested method made."""
        ...

    @property
    def inputs(self) -> dict[str, Any]:
        """The task's tensors for these examples."""
        ...


@dataclass(frozen=True)
class Mark:
    """A model that a training run left on its way, or at its end."""

    params: dict[str, Any]
    optimiser: dict[str, Any]
    """As in `Context.optimisers`."""
    steps: int = 1
    """Training steps since the mark before."""
    rate: float = 1.0
    """Sum of the learning rates of those steps."""


class Context(Protocol):
    """What a method may ask for in `init`: everything, once."""

    pool: Pool
    target: Pool
    task: Any
    models: list[dict[str, Any]]
    optimisers: list[dict[str, Any]]
    """The state of each scoring model's optimiser: slots (`mean`, `square`, `momentum`) -> name -> tensor, and the
    numbers `steps`, `betas`, `eps`, `inertia` (of momentum, else 0), `decay` of weights and data `weight`; empty where
    it is not known."""
    trajectories: list[list[Mark]]
    """For each scoring model the marks of its training run in time order; the last one is the model itself. A model of
    unknown history has one mark of one step at rate 1."""
    barred: np.ndarray
    """Ids of the pool that contain target items: no model that scores may train on them."""
    withheld: np.ndarray
    """Ids of the target that are scored but must choose nothing, for figures on them will be reported."""
    recipe: Any
    """The `Recipe` of the scoring models; None where it is not known."""
    seed: int
    workers: int
    """How many processes a method may use in `init`."""
    progress: Progress

    @property
    def folder(self) -> Path:
        """Where the Table is being made: what a method leaves there, a run that goes on after a kill finds there."""
        ...

    def table(self, method: Method) -> Table:
        """The Table of a nested method over the pool."""
        ...

    def target_table(self, method: Method) -> Table:
        """The Table of a nested method over the half of the target that selects."""
        ...

    def members(self, method: M, every: bool = False) -> list[M]:
        """One copy of a nested method for each scoring model (its `model` field set); or for every mark of each, in
        time order, model after model (its `checkpoint` field set as well)."""
        ...

    def asking(self, target: Pool, pool: Pool | None = None) -> Context:
        """The same models for another target, and for another pool: what a method needs to try out another."""
        ...

    def encoded(self, pool: Pool) -> Any:
        """A pool as the task reads it."""
        ...

    def batches(self, pool: Pool) -> typing.Iterator[Batch]:
        """Model-sized batches over the pool or the selecting half, in a fixed order."""
        ...

    def sample(self, count: int) -> Batch:
        """A keyed sample of the pool: the same examples whatever the order, and whatever the target."""
        ...

    def kept(self, what: str, key: Any, build: typing.Callable[[Path], None], *, flops: float = 0.0) -> Path:
        """A folder that a method fills, once for a key: it is found made the next time, and `build` may find its own
        leftovers in it after a kill."""
        ...

    def spent(self, flops: float) -> None:
        """Enter floating-point operations in the compute ledger."""
        ...

    def warn(self, message: str) -> None:
        """Tell the user; the message also goes into the report."""
        ...

    def note(self, what: str, detail: str, *, ok: bool | None = None, **numbers: Any) -> None:
        """Keep what a method measured of itself, for the report. `ok`: within its bound; what is not stays."""
        ...


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Method:
    """A frozen, keyword-only dataclass whose fields are its options, its repr and its cache key.

    A class is abstract (declared with `abstract=True`) or final: methods are tweaked by wrapping, as a field, never by
    subclassing. A field typed with a `Method` subclass takes an object, a name, or a table with a name and options.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    package: ClassVar[str] = ""
    abstract: ClassVar[bool] = True

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        super().__init_subclass__()
        for base in cls.__mro__[1:]:
            if issubclass(base, Method) and not base.__dict__.get("abstract", False):
                raise TypeError(
                    f"{base.__name__} is final: hold it in a field of {cls.__name__} instead of subclassing it"
                )
        cls.abstract = abstract
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        if type(self).abstract:
            raise TypeError(f"{type(self).__name__} is abstract")
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _coerce(self, name, hint, getattr(self, name)))

    @property
    def name(self) -> str:
        """The file's name, or the dotted module for a method from elsewhere."""
        module = type(self).__module__
        return module.removeprefix(type(self).package + ".")

    def spec(self) -> dict[str, Any]:
        """Name and options as plain JSON; `make` is the inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: v.spec() if isinstance(v, Method) else v for k, v in fields.items()}
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}}

    @property
    def uses_models(self) -> bool:
        """Whether it reads the scoring models, as its cost says; not where an option names a model of its own."""
        return getattr(self, "cost", "none") not in ("none", "text")

    def children(self) -> list[Method]:
        """The methods held in fields: they are computed first."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return [v for v in values if isinstance(v, Method)]

    def code(self) -> str:
        """Hash of the method's own source file and of `numerics`: an edit makes stored results stale."""
        file = Path(inspect.getfile(type(self)))
        return digest_sources(file, Path(__file__).parents[1] / "numerics")


class Featurizer(Method, abstract=True):
    """Examples to vectors. `init` sees everything once; `featurize` is pure, per batch, `[b, d]`.

    `store`: how its Tables are kept. 'float16' keeps rows at unit length beside their float32 norms, in half the space;
    'float32' keeps every bit.
    """

    store: Literal["float16", "float32"] = "float16"

    package: ClassVar[str] = "assay.features"
    cost: ClassVar[Cost] = "forward"

    @property
    def sense(self) -> float:
        """1, or -1 for gradients of a number that is better when it is higher: products of two features take both."""
        return 1.0

    def columns(self, state: Any) -> tuple[str, ...]:
        """Names of the d columns."""
        raise AssertionError

    @property
    def met(self) -> bool:
        """Whether `faced` computes these features where they are met, and makes no Table of them."""
        return False

    def faced(self, context: Context, queries: Featurizer, *, each: bool, unit: bool = False) -> Faced:
        """Products of these features with the target's: a column for each example of the target, or one for their mean;
        `unit`: of features at unit length. By way of Tables, which others then find made, unless it is overridden."""
        context.table(self)
        rows = context.target_table(queries).values.astype(np.float64)
        rows = unit_rows(rows)[0] if unit else rows
        kept = rows if each else rows.mean(axis=0, keepdims=True)
        return _Stored(self, self.sense * queries.sense * kept, unit)

    def init(self, context: Context) -> Any:
        """A small picklable state."""
        return None

    def featurize(self, state: Any, batch: Batch) -> Any:
        """`[b, d]` numbers for a batch of b examples."""
        raise AssertionError


class Faced(Protocol):
    """Features of the pool, to be met with those of a target. Small and picklable."""

    @property
    def passes(self) -> float:
        """How many times the work of its cost class an example takes here; 0 where a Table has what is needed."""
        ...

    def products(self, batch: Batch) -> np.ndarray:
        """`[b, c]` float64, in the sense of what lowers a loss."""
        ...


@dataclass(frozen=True)
class _Stored:
    """`Faced` by way of a Table. `slopes` `[c, d]`: the target's features, or their mean."""

    features: Featurizer
    slopes: np.ndarray
    unit: bool
    passes: float = 0.0

    def products(self, batch: Batch) -> np.ndarray:
        rows = batch.table(self.features).astype(np.float64)
        return (unit_rows(rows)[0] if self.unit else rows) @ self.slopes.T


class Scorer(Method, abstract=True):
    """Examples to scores, higher = keep. `init` sees everything once; `score` is pure, per batch, `[b]` or `[b, c]`.

    `unit` says what the number means. For measured utility: -d target loss / d weight, positive = adding it helps.
    """

    package: ClassVar[str] = "assay.scorers"
    cost: ClassVar[Cost] = "text"
    unit: ClassVar[str] = "arbitrary"
    measures_utility: ClassVar[bool] = False
    lookup: ClassVar[bool] = False  # `score` only looks up what `init` found: further processes would save nothing
    group: ClassVar[str] = ""
    """The column that numbers groups of copies, negative for none; as a filter, each keeps its best row still there."""

    @property
    def passes(self) -> float:
        """How many times the work of its cost class one example takes: 2 for two forward passes."""
        return 1.0

    @property
    def presets(self) -> Mapping[str, Bounds]:
        """Named bounds on this method's own columns, for use as a filter; the first is what it drops unless told."""
        return {}

    def training_terms(self, pool: float, target: float) -> float:
        """Loss terms that `init` trains on for each scoring model, of a pool and a target of so many terms."""
        return 0.0

    def init(self, context: Context) -> Any:
        """A small picklable state."""
        return None

    def columns(self, state: Any) -> tuple[str, ...]:
        """Names of the c columns; the first is what is cut by default."""
        return ("score",)

    def score(self, state: Any, batch: Batch) -> Any:
        """`[b]` or `[b, c]` numbers for a batch of b examples."""
        raise AssertionError


class Selector(Method, abstract=True):
    """A Table of scores to a Selection under a budget."""

    package: ClassVar[str] = "assay.selectors"

    def select(
        self, scores: Table, sizes: np.ndarray, budget: Budget, *, barred: Mapping[str, np.ndarray]
    ) -> Selection:
        """Choose ids. `sizes` [n] are tokens (or ones); `barred` maps a reason to ids that may not be chosen."""
        raise AssertionError


def target_columns(context: Context, targets: Targets) -> tuple[str, ...]:
    """Names of the columns of a score that is taken for the mean of the target, or for each of its examples."""
    return ("score",) if targets == "mean" else tuple(i.decode() for i in context.target.ids.tolist())


def mark_of(context: Context, method: Any) -> Mark:
    """The mark that a method's fields `model` and `checkpoint` name. Raises `InputError` when there is none."""
    if not 0 <= method.model < len(context.trajectories):
        raise InputError(
            f"{method.name}: there is no scoring model {method.model}",
            why=f"there are {len(context.trajectories)}",
            fix="raise proxy.models, or name one from 0",
        )
    marks = context.trajectories[method.model]
    if not -len(marks) <= method.checkpoint < len(marks):
        raise InputError(
            f"{method.name}: there is no checkpoint {method.checkpoint}",
            why=f"the scoring model's training run left {len(marks)}",
            fix="raise proxy.checkpoints, or name one from 0; -1 is the last",
        )
    return marks[method.checkpoint]


def batch_places(context: Context, pool: Pool) -> np.ndarray:
    """Where each of a pool's examples stands in the order of `context.batches`, which goes by length. `[n]`."""
    return positions(np.concatenate([batch.ids for batch in context.batches(pool)]), pool.ids)


KINDS: dict[str, type[Method]] = {"featurizer": Featurizer, "scorer": Scorer, "selector": Selector}


def _hints(cls: type[Method]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _method_type(hint: Any) -> type[Method] | None:
    """The Method subclass in a hint such as `Featurizer` or `Scorer | None`."""
    options = typing.get_args(hint) or (hint,)
    kinds = [o for o in options if isinstance(o, type) and issubclass(o, Method)]
    return kinds[0] if kinds else None


def _coerce(method: Method, name: str, hint: Any, value: Any) -> Any:
    kind = _method_type(hint)
    if kind is not None:
        return None if value is None and type(None) in typing.get_args(hint) else make(kind, value)
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"option {name!r} of {method.name!r} cannot be {value!r}", why=first["msg"], fix=f"it takes {_show(hint)}"
        ) from error


def _show(hint: Any) -> str:
    """A type as users read it."""
    kind, origin, parts = _method_type(hint), typing.get_origin(hint), typing.get_args(hint)
    if kind is not None:
        return kind.__name__.lower()
    if origin is Annotated:
        bounds = ", ".join(str(bound) for note in parts[1:] for bound in getattr(note, "metadata", []))
        return f"{_show(parts[0])} {SIGN.sub(lambda m: f'{SIGNS[m[1]]} {m[2]}', bounds)}".strip()
    if origin in (Literal, typing.Union):
        return " | ".join(repr(part) if origin is Literal else _show(part) for part in parts)
    if isinstance(hint, type) and not parts:
        return hint.__name__.replace("NoneType", "None")
    return re.sub(r"\btyping\.|NoneType", lambda m: "None" if m.group() == "NoneType" else "", str(hint))


def discover(kind: type[M]) -> dict[str, type[M]]:
    """Every method of a kind: one for each file in its package. Dropping in a file is all it takes."""
    return {name: _load(kind, f"{kind.package}.{name}") for name in listed(kind)}


def listed(kind: type[Method]) -> list[str]:
    """Names of every method of a kind, none of which is imported."""
    package = importlib.import_module(kind.package)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def _load(kind: type[M], module_name: str) -> type[M]:
    module = importlib.import_module(module_name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and not value.abstract
        if value.__module__ == module_name
    ]
    if len(found) != 1:
        raise InputError(
            f"module {module_name} defines {len(found)} methods of kind {kind.__name__.lower()}",
            fix=f"keep exactly one `class Name({kind.__name__})` in the file",
        )
    return found[0]


def find(kind: type[M], name: str) -> type[M]:
    """The class of a method by file name, or by dotted module for one from elsewhere."""
    if "." in name:
        try:
            return _load(kind, name)
        except ModuleNotFoundError as error:
            raise InputError(f"no module {name!r}", why=str(error), fix="check PYTHONPATH and the spelling") from error
    if name not in listed(kind):
        raise InputError(f"unknown {kind.__name__.lower()} {name!r}", fix=nearest(name, listed(kind)))
    return _load(kind, f"{kind.package}.{name}")


def make(kind: type[M], spec: Any) -> M:
    """A method from an object, a name, or a mapping `{name, option: value, ...}`.

    Raises `InputError` for an unknown method or option, naming the nearest, and for values of the wrong type.
    """
    if isinstance(spec, kind):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise InputError(
            f"not a {kind.__name__.lower()}: {spec!r}", fix="give a name, or a table with a name and options"
        )
    options = dict(spec)
    cls = find(kind, str(options.pop("name")))
    for option in options:
        if option not in (known := [f.name for f in dataclasses.fields(cls)]):
            raise InputError(f"{spec['name']!r} has no option {option!r}", fix=nearest(option, known))
    return cls(**options)


def placed(kind: type[Method], spec: Any, place: typing.Callable[[str], str]) -> Any:
    """A method as a study writes it, with each `FilePath` and `ModelPath` of it and what it holds put by `place`."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        return spec
    try:
        hints = _hints(find(kind, spec["name"]))
    except InputError:  # told when it is made
        return spec
    moved = dict(spec)
    for option, value in spec.items():
        if (inner := _method_type(hints.get(option))) is not None:
            moved[option] = placed(inner, value, place)
        marks = getattr(hints.get(option), "__metadata__", ()) if isinstance(value, str) else ()
        if "file" in marks or ("model" in marks and Path(place(value)).is_dir()):
            moved[option] = place(value)
    return moved


def describe(cls: type[Method]) -> dict[str, Any]:
    """What `assay methods` prints: summary, formula, unit, reference and options, read from the class."""
    doc = inspect.getdoc(cls) or ""
    named = dict(re.findall(r"^(Formula|Reference|Needs|Note): (.+(?:\n    .+)*)", doc, flags=re.MULTILINE))
    options = []
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        default = made if field.default is dataclasses.MISSING else field.default
        options.append({"name": field.name, "type": _show(_hints(cls)[field.name]), "default": default})
    kind = next(name for name, base in KINDS.items() if issubclass(cls, base))
    return {
        "name": cls.__module__.removeprefix(cls.package + "."),
        "kind": kind,
        "summary": doc.split("\n")[0],
        "formula": " ".join(named.get("Formula", "").split()),
        "reference": " ".join(named.get("Reference", "").split()),
        "note": " ".join(named.get("Note", "").split()),
        "unit": getattr(cls, "unit", ""),
        "cost": getattr(cls, "cost", "none"),
        "measures_utility": getattr(cls, "measures_utility", False),
        "options": options,
    }
