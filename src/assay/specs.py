"""The parts of a Study: what may be said of its pool, target, model, training and verification."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from assay.core.method import Count, Positive
from assay.train.recipe import Recipe

# Names that become files: no path may hide in them.
FileName = Annotated[str, pydantic.Field(pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,99}$")]


class Spec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class PoolSpec(Spec):
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
    flip: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Share of wrong labels planted in the built-in digits."""
    max_chars: Count = 1_000_000
    max_bad: float = pydantic.Field(default=0.05, ge=0, le=1)
    truth: str | None = None
    """Parquet of known defects by id, for the report only: no method sees it."""
    truth_kind: str = "kind"


class TargetSpec(Spec):
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
    max_bad: float = pydantic.Field(default=0.05, ge=0, le=1)


class TaskSpec(Spec):
    """The model. `text`: the built-in decoder with its own tokenizer. `classifier`: vectors and labels."""

    kind: Literal["text", "classifier"] = "text"
    vocab: int = pydantic.Field(default=1024, ge=260)
    width: Count = 64
    layers: Count = 3
    heads: Count = 4
    context: int = pydantic.Field(default=160, ge=8)
    hidden: tuple[int, ...] = ()
    inputs: Count = 64
    classes: Count = 10


class ProxySpec(Spec):
    """The scoring models: trained on the whole pool, `passes` times through it."""

    models: Count = 1
    passes: Positive = 1.0
    steps: Count | None = None
    checkpoints: Count = 1
    """Models that each training run leaves, at equal distances in steps, the last at its end."""
    weight: Positive = 1.0
    """Data weight of every example: 0.5 is the centre of what training on random halves does, in the same steps."""
    recipe: Recipe = Recipe()


class TrainSpec(Spec):
    """How each arm is trained: the same number of steps for all, `repeats` times through a selection."""

    repeats: Positive = 2.0
    steps: Count | None = None
    recipe: Recipe = Recipe()


class VerifySpec(Spec):
    """How arms are compared: `seeds` paired trainings of each, `random` independent random selections."""

    seeds: int = pydantic.Field(default=4, ge=2, le=1000)
    random: int = pydantic.Field(default=3, ge=1)
    everything: bool = False
    """Add an arm trained on the whole pool."""
    level: float = pydantic.Field(default=0.95, gt=0, lt=1)


class ArmSpec(Spec):
    """One contestant: a scorer, and how its scores become a set."""

    name: FileName
    method: Any
    select: Any = "cut"
