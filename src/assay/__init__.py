"""Build training sets by measuring what each example teaches the model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.core.errors import InputError
    from assay.core.method import Featurizer, Method, Scorer, Selector, describe, discover, make
    from assay.core.pool import Pool
    from assay.core.run import Run
    from assay.core.selection import Budget, Selection
    from assay.core.table import Table
    from assay.core.target import Target
    from assay.core.task import Encoded, Task
    from assay.data.gate import contamination
    from assay.data.ingest import ingest
    from assay.data.readers import Source
    from assay.job import run_study
    from assay.measure import Measurer
    from assay.study import Study
    from assay.study import load as load_study
    from assay.study import parse as parse_study
    from assay.train.recipe import Recipe
    from assay.verify import compare

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Encoded",
    "Featurizer",
    "InputError",
    "Measurer",
    "Method",
    "Pool",
    "Recipe",
    "Run",
    "Scorer",
    "Selection",
    "Selector",
    "Source",
    "Study",
    "Table",
    "Target",
    "Task",
    "__version__",
    "compare",
    "contamination",
    "describe",
    "discover",
    "ingest",
    "load_study",
    "make",
    "parse_study",
    "run_study",
]

# Where each public name lives: read when it is asked for, so that `import assay` stays light.
_HOMES = {
    "assay.core.errors": ("InputError",),
    "assay.core.method": ("Featurizer", "Method", "Scorer", "Selector", "describe", "discover", "make"),
    "assay.core.pool": ("Pool",),
    "assay.core.run": ("Run",),
    "assay.core.selection": ("Budget", "Selection"),
    "assay.core.table": ("Table",),
    "assay.core.target": ("Target",),
    "assay.core.task": ("Encoded", "Task"),
    "assay.data.gate": ("contamination",),
    "assay.data.ingest": ("ingest",),
    "assay.data.readers": ("Source",),
    "assay.job": ("run_study",),
    "assay.measure": ("Measurer",),
    "assay.study": ("Study", "load_study", "parse_study"),
    "assay.train.recipe": ("Recipe",),
    "assay.verify": ("compare",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name.removesuffix("_study") if home == "assay.study" else name)
    raise AttributeError(f"module 'assay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
