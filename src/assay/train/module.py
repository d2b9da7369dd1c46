"""`ModuleTask`: any `torch.nn.Module` with a loss for each example."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from abc import abstractmethod
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from assay.core.errors import InputError, nearest
from assay.core.keys import digest
from assay.core.pool import Pool
from assay.core.task import Encoded, Inputs, Params, Task
from assay.train.models import with_params

SHARD = 2048
DTYPES = ("float32", "float64", "int64")


class _Columns(Encoded):
    """One memory-mapped array a column; one term an example."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        self.sizes = np.ones(len(self.arrays[names[0]]), dtype=np.int64)

    def inputs(self, rows: np.ndarray) -> Inputs:
        return {name: torch.from_numpy(array[rows]) for name, array in self.arrays.items()}


class ModuleTask(Task):
    """Any module as a Task: say which columns it reads, how it is built, and what the loss of each example is.

    `columns` maps a column of the pool to the dtype and shape of one value; the pool may hold it as nested lists or
    as a flat one. `build` gives the module, with torch's generator at a seed of its own.
    `per_example` gets that module with the right parameters in it, and a batch: a tensor `[b, ...]` for each column.
    It returns the loss of each example, `[b]`, which must not depend on the other examples of the batch.

    The module is in evaluation mode: batch norm uses the running statistics that `build` gives it, and does not mix
    examples. `describe` covers the source of the class and of the module's own classes, and the fields of a
    dataclass; raise `version` when something else that they use changes.

    >>> import torch.nn.functional as F
    >>> class Softmax(ModuleTask):
    ...     columns = {"pixels": ("float32", 4), "label": ("int64",)}
    ...     def build(self):
    ...         return nn.Linear(4, 3)
    ...     def per_example(self, model, batch):
    ...         return F.cross_entropy(model(batch["pixels"]), batch["label"], reduction="none")
    >>> task, batch = Softmax(), {"pixels": torch.zeros(2, 4), "label": torch.tensor([0, 2])}
    >>> zeros = {name: torch.zeros_like(p) for name, p in task.params().items()}
    >>> task.loss(zeros, batch).exp().round(decimals=4)
    tensor([3., 3.])
    >>> task.forward_flops(np.ones(2))
    48.0
    """

    columns: ClassVar[dict[str, tuple[Any, ...]]]
    version: ClassVar[int] = 0

    reduction: ClassVar[str] = "one term an example"
    measure_unit: ClassVar[str] = "nats per example"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, spec in getattr(cls, "columns", {}).items():
            if not spec or spec[0] not in DTYPES or not all(isinstance(n, int) and n > 0 for n in spec[1:]):
                raise InputError(
                    f"column {name!r} of {cls.__name__} is {spec!r}", why="it takes a dtype and the sizes of one value",
                    fix=f"for example ('float32', 3, 32, 32); the dtype is one of {', '.join(DTYPES)}",
                )  # fmt: skip

    @abstractmethod
    def build(self) -> nn.Module:
        """The module. What it draws is keyed by a seed; weights from a file are welcome."""

    @abstractmethod
    def per_example(self, model: Any, batch: Inputs) -> Tensor:
        """The loss of each example, `[b]`, lower is better; `model` is the module with the right parameters."""

    @cached_property
    def module(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval()

    def params(self) -> dict[str, Tensor]:
        """The values that `build` gave, by name: where training, or a measurement, may start."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def describe(self) -> dict[str, Any]:
        kinds = {type(m) for m in self.module.modules() if not type(m).__module__.startswith("torch.")}
        sources = sorted(_source(kind) for kind in {*kinds, *_bases(type(self))})
        return {
            "task": f"module:{type(self).__qualname__}", "version": self.version,
            "fields": digest(asdict(self) if is_dataclass(self) else {}),  # type: ignore[arg-type]
            "columns": {name: list(spec) for name, spec in self.columns.items()},
            "source": digest(sources, str(self.module)),
        }  # fmt: skip

    def prepare(self, pool: Pool, path: Path) -> None:
        for name, (dtype, *shape) in self.columns.items():
            file = path / f"{name}.npy"
            array = np.lib.format.open_memmap(file, "w+", dtype=np.dtype(dtype), shape=(len(pool), *shape))
            for index, shard in enumerate(pool.shards(SHARD)):
                values = _array(name, shard.column(name), dtype, tuple(shape))
                array[index * SHARD : index * SHARD + len(shard)] = values
            array.flush()

    def encoded(self, path: Path) -> Encoded:
        return _Columns(path, tuple(self.columns))

    def terms(self, params: Params, batch: Inputs) -> tuple[Tensor, Tensor]:
        loss = with_params(self.module, params, self.per_example, _as_params(batch, params))
        rows = len(next(iter(batch.values())))
        if loss.shape != (rows,):
            raise InputError(
                f"per_example of {type(self).__name__} gives {tuple(loss.shape)} for {rows} examples",
                why="it must give one number an example", fix="use reduction='none', and the mean over other axes",
            )  # fmt: skip
        return loss[:, None], torch.ones_like(loss[:, None])

    def forward_flops(self, terms: np.ndarray) -> float:
        """Operations of one example as torch counts them (products of matrices, convolutions, attention), times the
        examples."""
        return self._flops * float(np.sum(terms))

    @cached_property
    def _flops(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        batch = {name: torch.zeros(1, *shape, dtype=getattr(torch, d)) for name, (d, *shape) in self.columns.items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.per_example(self.module, _as_params(batch, dict(self.module.named_parameters())))
        return float(counter.get_total_flops())


def load_task(where: str) -> Task:
    """The Task that `file.py:object` or `package.module:object` names: an object, a class, or a function giving one.

    The file's folder joins the search path, so that workers find the module too. Raises `InputError`.
    """
    module, found, name = where.rpartition(":")
    fix = "write file.py:object or package.module:object, the object a Task such as a ModuleTask"
    if not found or not name or not module:
        raise InputError(f"unreadable task {where!r}", fix=fix)
    path = Path(module)
    folder, dotted = (str(path.resolve().parent), path.stem) if path.suffix == ".py" else (os.getcwd(), module)
    if path.suffix == ".py" and not path.is_file():
        raise InputError("no such file", where=module, fix=fix)
    sys.path[:0] = [folder] if folder not in sys.path else []
    try:
        held = importlib.import_module(dotted)
    except Exception as error:  # whatever the user's file raises
        raise InputError(
            "the module of the task cannot be imported", where=module, why=f"{type(error).__name__}: {error}",
            fix="mend the file: `python -c 'import ...'` must work in its folder",
        ) from error  # fmt: skip
    if path.suffix == ".py" and Path(str(held.__file__)).resolve() != path.resolve():
        raise InputError(f"another module is called {dotted!r}", where=str(held.__file__), fix="rename your file")
    if not hasattr(held, name):
        raise InputError(f"{module} has no {name!r}", fix=nearest(name, [n for n in vars(held) if n[0] != "_"]))
    value = getattr(held, name)
    if not isinstance(value, Task) and callable(value):
        try:
            value = value()
        except TypeError as error:
            raise InputError(
                f"{name} gives no task", where=where, why=str(error), fix="give one that takes nothing"
            ) from error
    if not isinstance(value, Task):
        raise InputError(f"{name!r} is no Task but {type(value).__name__}", where=where, fix=fix)
    return value


def _as_params(batch: Inputs, params: Params) -> Inputs:
    """The batch with its fractions in the precision of the parameters."""
    exact = next((p.dtype for p in params.values() if p.is_floating_point()), torch.float32)
    return {name: x.to(exact) if x.is_floating_point() else x for name, x in batch.items()}


def _bases(kind: type) -> list[type]:
    """The class and those it inherits from that are the user's."""
    return [base for base in kind.__mro__ if issubclass(base, ModuleTask) and base is not ModuleTask]


def _source(kind: type) -> str:
    """Source text of a class; where there is no file, that of its methods."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        pass
    methods = [value for _, value in sorted(vars(kind).items()) if inspect.isfunction(value)]
    try:
        return "".join(inspect.getsource(method) for method in methods)
    except (OSError, TypeError) as error:
        raise InputError(
            f"the source of {kind.__qualname__} cannot be read", why="results are keyed by it",
            fix="define the class in a file, not at a prompt",
        ) from error  # fmt: skip


def _array(name: str, values: list[Any], dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of one column, `[n, *shape]`. Raises `InputError` for what is no number, ragged, or of another size."""
    try:
        found = np.array(values)
    except ValueError as error:
        raise InputError(
            f"column {name!r} has values of different shapes", fix=f"each must have shape {shape}"
        ) from error
    if found.dtype.kind not in "biuf":
        raise InputError(f"column {name!r} is no column of numbers", fix="store numbers, or nested lists of them")
    if found.size != len(values) * int(np.prod(shape, dtype=np.int64)):
        raise InputError(
            f"values of column {name!r} have shape {found.shape[1:]}", why=f"the task says {shape}",
            fix=f"set columns[{name!r}] of the task",
        )  # fmt: skip
    cast = found.astype(dtype)
    if dtype == "int64" and not np.array_equal(cast, found):
        raise InputError(f"column {name!r} has numbers that are not whole", fix="call its dtype float32")
    if not np.isfinite(cast).all():
        raise InputError(f"column {name!r} has numbers that are not finite", fix="drop or mend those rows")
    return cast.reshape(len(values), *shape)
