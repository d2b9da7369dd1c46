"""The parts of a Study: what may be said of its pool, target, model, training and verification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from assay.core.method import Count, NonNegative, Positive
from assay.train.recipe import Recipe

if TYPE_CHECKING:
    from assay.train.models import Classifier

# Names that become files: no path may hide in them.
FileName = Annotated[str, pydantic.Field(pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,99}$")]


class Spec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


def dialogue(spec: PoolSpec | TargetSpec) -> bool:
    """Whether the examples are completions of prompts, and not whole texts."""
    return spec.completion is not None or spec.messages is not None


class PoolSpec(Spec):
    """Where the pool is, and which of the user's columns mean what."""

    path: str | tuple[str, ...] | None = None
    builtin: Literal["python", "digits", "images"] | None = None
    """A pool that comes with its target: text of Python, scikit-learn's digits, or labelled images at `path`."""
    text: str = "text"
    prompt: str | None = None
    """With `completion`: two columns in the place of `text`; a causal model's loss is then that of the completion."""
    completion: str | None = None
    messages: str | None = None
    """In the place of both, chats, lists of {role, content}: the assistant's last turn is the completion."""
    image: str | None = None
    id: str | None = None
    domain: str | None = None
    keep: tuple[str, ...] = ()
    sample: Count | None = None
    """Use a keyed random sample of this many rows."""
    size: Count | None = None
    """Rows of the built-in pool: 12,000 of Python, 1,200 digits or all images, unless given."""
    take: Literal["first", "random"] = "random"
    """Which images: from the top of their file, or drawn by the seed."""
    flip: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Share of wrong labels planted in the built-in digits and images."""
    max_chars: Count = 1_000_000
    max_bad: float = pydantic.Field(default=0.05, ge=0, le=1)
    truth: str | None = None
    """Parquet of known defects by id, for the report only: no method sees it."""
    truth_kind: str = "kind"


class TargetSpec(Spec):
    """What the user cares about: a file of its own, or a domain of the pool that is held out."""

    HELD_OUT: ClassVar[int] = 400
    name: str = "target"
    path: str | tuple[str, ...] | None = None
    builtin: Literal["docs", "code", "docstring", "comment"] | None = None
    domain: str | None = None
    count: Count | None = None
    """How many examples of `domain` are held out, 400 unless given; of digits and images, how many test on: all."""
    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    id: str | None = None
    group: str | None = None
    keep: tuple[str, ...] = ()
    """Further columns that methods may read, such as the subtasks of `less`."""
    max_chars: Count = 1_000_000
    max_bad: float = pydantic.Field(default=0.05, ge=0, le=1)


class PretrainSpec(Spec):
    """A first training on all of the pool's text, before anything else: every model begins from its weights."""

    passes: NonNegative = 0.0
    recipe: Recipe = Recipe()


class TaskSpec(Spec):
    """The model. `text`: the built-in decoder with its own tokenizer. `classifier`: vectors and labels. `convnet`:
    images and labels.

    `causal`: a model of transformers. Either `model`, a folder or an id of the hub, with its own tokenizer; or
    `config`, a config.json or a table of the same keys, with a tokenizer of `vocab` tokens trained on the pool.
    `module`: a Task of the user's.
    """

    kind: Literal["text", "classifier", "convnet", "causal", "module"] = "text"
    model: str | None = None
    config: str | dict[str, Any] | None = None
    weights: Literal["stored", "random"] = "stored"
    """Where training begins: at the model's own weights, or at weights drawn by the seed. With `config` there are
    none, unless `pretrain` makes some."""
    pretrain: PretrainSpec = PretrainSpec()
    template: str = "{prompt}\n"
    """What stands before a completion."""
    module: str | None = None
    """`file.py:object` or `package.module:object`: a Task, its class, or a function that gives one."""
    vocab: int = pydantic.Field(default=1024, ge=260)
    width: Count = 64
    layers: Count = 3
    heads: Count = 4
    context: int = pydantic.Field(default=160, ge=8)
    hidden: tuple[int, ...] = ()
    inputs: Count = 64
    classes: Count = 10
    activation: Literal["gelu", "relu"] = "gelu"
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Share of each hidden layer that is dropped while training; scoring and evaluation never drop any."""
    first: Literal["normal", "uniform"] = "normal"
    """First weights of a perceptron: 'normal', N(0, 1/fan_in) and biases 0; 'uniform', PyTorch's own, a third of that
    variance, biases too."""
    shape: tuple[Count, Count, Count] = (3, 32, 32)
    """Channels, height and width of a convnet's images."""
    filters: tuple[Count, ...] = (24, 48, 96)

    def classifier(self) -> Classifier:
        """The Task of vectors or images and labels."""
        from assay.train.models import Classifier
        from assay.train.vision import ImageClassifier

        common: dict[str, Any] = {"classes": self.classes, "activation": self.activation, "first": self.first}
        if self.kind == "convnet":
            return ImageClassifier(shape=self.shape, filters=self.filters, **common)
        return Classifier(inputs=self.inputs, hidden=self.hidden, dropout=self.dropout, **common)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """A module that is given says the kind."""
        return {"kind": "module", **data} if isinstance(data, dict) and data.get("module") else data


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


Check = Literal["leave_one_out", "removal", "mislabel", "tail_patch", "known_answer"]


class LdsSpec(Spec):
    """How `assay verify` holds scores against retraining: on subsets (LDS), and by further checks."""

    examples: Count = 1000
    """Most examples of the pool that are used: a keyed sample. 500 for language models, unless given."""
    targets: int = pydantic.Field(default=64, ge=2)
    """Most target examples that are used: half of them choose options, half are reported."""
    subsets: Count = 60
    """40 for language models, unless given."""
    share: float = pydantic.Field(default=0.5, gt=0, lt=1)
    """Share of the examples in each subset."""
    seeds: int = pydantic.Field(default=2, ge=1, le=1000)
    """Trainings of each subset; two or more show how much of a loss is chance."""
    protocol: Literal["weights", "subset"] = "weights"
    """`weights`: examples outside a subset keep their places in the order and weigh 0. `subset`: they are not there."""
    measure: Literal["loss", "margin"] = "loss"
    level: float = pydantic.Field(default=0.95, gt=0, lt=1)
    draws: int = pydantic.Field(default=2000, ge=100)
    """Of the bootstrap."""
    checks: tuple[Check, ...] | None = None
    """Further checks; by default all that mean something for the task and the data."""
    probes: int = pydantic.Field(default=8, ge=2)
    """Reported targets that removal, tail patch and known answer look at."""
    removed: tuple[Annotated[float, pydantic.Field(gt=0, lt=1)], ...] = (0.02, 0.05)
    """Shares of the pool that removal takes away, each at most half of the target's class."""
    left_out: int = pydantic.Field(default=64, ge=10)
    """Examples that leave-one-out leaves out, one by one."""
    proponents: Count = 8
    """Best examples of a target that tail patch trains on."""


class SmoothSpec(Spec):
    """How `assay verify --metasmooth` asks whether training can be differentiated: data weights w are moved to
    w (1 + h v) and w (1 + 2 h v), with a random sign v for each example."""

    h: float = pydantic.Field(default=0.1, gt=0, le=0.5)
    directions: Count = 3
    """Random v, each two trainings; figures are their mean."""
    center: Positive = 1.0
    """w, the data weight of all examples: metagrad's option of this name."""
    remedies: bool = True
    """Run the same again with each change that may help."""


class ArmSpec(Spec):
    """One contestant: a scorer, and how its scores become a set."""

    name: FileName
    method: Any
    select: Any = "cut"
    grid: dict[str, tuple[Any, ...]] = {}
    """Options to choose among, for `assay verify`: option -> values."""
    filters: tuple[Any, ...] = ()
    """What leaves the pool before this arm's budget is filled, after the filters of the study: see `Study.filters`."""
    order: Any = None
    """When each visit comes, see `ordering`: a name, a table with a name and options, or a list of these, applied one
    after the other. Not given, the trainer shuffles."""
