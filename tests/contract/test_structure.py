"""The shape of the code: who may import whom, what is imported when, what the command line offers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

import assay
from assay.core.method import KINDS, describe, discover

SOURCE = Path(assay.__file__).parent
DOCS = SOURCE.parents[1] / "docs"
FILES = sorted(SOURCE.rglob("*.py"))

# Imports point right only: from a layer to one below it, or to its own where OWN says so.
LAYERS = [
    ("cli",), ("terminal", "template", "doctor", "plan", "demos"), ("report",), ("bench",), ("trust",),
    ("job", "store"),
    ("summary", "card", "proxies", "tasks", "ship"),
    ("verify", "checks"), ("measure",), ("study",), ("specs",),
    ("features", "scorers", "selectors", "ordering", "filters"),
    ("train", "data"),
    ("numerics", "engine"), ("core",),
]  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Packages whose modules may import one another.
OWN = {"report", "bench", "trust", "train", "data", "numerics", "engine", "core"}
NUMERICS_MAY = {"assay.core.errors", "assay.core.task"}
ROOT = "__init__"  # holds the version and lazy names: anybody may import it

# Module-level objects that do change, and why.
STATE = {("engine/local.py", "_worker"): "set once in each worker process by its initialiser"}


def layer(module: str) -> str:
    """`assay.core.pool` -> core."""
    return (module.split(".") + [ROOT])[1]


def modules(tree: ast.AST, *, types: bool = False) -> Iterator[str]:
    """Every `assay` module that is imported, at the top or inside functions; those for types only if asked for."""
    skipped: set[ast.AST] = set()
    if not types:
        guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        skipped = {inner for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _is_module(inner) else node.module or ""


def _is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return name.startswith("assay.") and (path.with_suffix(".py").exists() or (path / "__init__.py").exists())


def faults(file: str, text: str) -> list[str]:
    """Imports of one file that the rules forbid. `file` is relative to the package."""
    own, found = file.removesuffix(".py").split("/")[0], []
    for module in modules(ast.parse(text)):
        if own == "report" and module.split(".")[0] in ("torch", "safetensors", "sklearn"):
            found.append(f"{file}: report imports {module}")
        if not module.startswith("assay") or own == ROOT:
            continue
        there = layer(module)
        if there == ROOT:
            continue
        if there not in RANK or own not in RANK:
            found.append(f"{file}: {there if there not in RANK else own} is in no layer")
        elif RANK[there] < RANK[own]:
            found.append(f"{file}: {own} imports {module}, which is above it")
        elif RANK[there] == RANK[own] and not (there == own and own in OWN):
            found.append(f"{file}: {own} imports {module} beside it")
        elif own == "numerics" and there == "core" and module not in NUMERICS_MAY:
            found.append(f"{file}: numerics imports {module}")
    return found


def test_imports_point_down() -> None:
    assert not [fault for file in FILES for fault in faults(str(file.relative_to(SOURCE)), file.read_text())]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/pool.py", "from assay.numerics import stats"),
        ("core/pool.py", "import assay.scorers.trak"),
        ("core/pool.py", "def f():\n    from assay.data.readers import read"),
        ("numerics/solve.py", "from assay.core.pool import Pool"),
        ("numerics/solve.py", "from assay.core import pool"),
        ("numerics/solve.py", "from assay.train.loop import train"),
        ("numerics/solve.py", "from assay.engine import local"),
        ("scorers/trak.py", "from assay.scorers.bm25 import BM25"),
        ("scorers/trak.py", "from assay.features.gradients import Gradients"),
        ("scorers/trak.py", "from assay.measure import Measurer"),
        ("train/loop.py", "from assay.data import readers"),
        ("summary.py", "def f():\n    from assay.job import Job"),
        ("summary.py", "from assay.card import write_dataset"),
        ("report/page.py", "def f():\n    import torch"),
        ("report/page.py", "from torch import nn"),
        ("job.py", "from assay.report.page import build"),
        ("job.py", "import assay.cli"),
        ("job.py", "from assay.trust.run import verify_study"),
        ("trust/run.py", "from assay.report.page import build"),
        ("bench/league.py", "from assay.report.league import build_league"),
        ("job.py", "from assay.bench.track import Track"),
        ("store.py", "from assay.job import read_pool"),
        ("study.py", "from assay import cli"),
    ],
)
def test_a_planted_violation_is_caught(file: str, text: str) -> None:
    assert faults(file, text)


def test_what_is_allowed_is_not_caught() -> None:
    assert not faults("numerics/curvature.py", "from assay.core.task import Task\nfrom assay.numerics import solve")
    assert not faults("job.py", "from assay import __version__\nfrom assay.data import gate, readers")
    assert not faults("cli.py", "from assay import plan as planner")
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from assay.job import Job"
    assert not faults("summary.py", typed)


def test_core_names_no_method_and_no_tensor_library() -> None:
    for file in (SOURCE / "core").glob("*.py"):
        assert "torch" not in {m.split(".")[0] for m in modules(ast.parse(file.read_text()))}, file


def constants(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from ((t.id, node.value) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp):
        return True
    name = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
    return name in {"dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict"}


def state(text: str) -> list[str]:
    """Module-level names that hold something that changes: lower-case, empty, assigned into, or declared global."""
    tree, found = ast.parse(text), []
    tables = {name: value for name, value in constants(tree) if mutable(value)}
    for name, value in tables.items():
        empty = isinstance(value, ast.Dict | ast.List) and not ast.unparse(value).strip("[]{}")
        if name != "__all__" and (not name.lstrip("_").isupper() or empty or isinstance(value, ast.Call)):
            found.append(name)
    changes = {"append", "extend", "update", "pop", "add", "clear", "setdefault", "insert", "remove", "popitem"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found += node.names
        held: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            held = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changes:
            held = node.func.value
        if isinstance(held, ast.Name) and held.id in tables:
            found.append(held.id)
    for name, value in constants(tree):
        if any(
            word in ast.unparse(value)
            for word in ("default_rng", "Generator(", "random.", "manual_seed", "RandomState")
        ):
            found.append(name)
    for node in tree.body:
        if isinstance(node, ast.Expr) and any(word in ast.unparse(node) for word in ("manual_seed", "random.seed")):
            found.append(ast.unparse(node))
    return sorted(set(found))


def test_no_module_level_state_or_random_numbers() -> None:
    found = {(str(f.relative_to(SOURCE)), name) for f in FILES for name in state(f.read_text())}
    assert found == set(STATE)


@pytest.mark.parametrize(
    "text",
    [
        "cache = {}", "CACHE: dict = {}", "TABLE = {1: 2}\ndef f():\n    TABLE[3] = 4", "seen = set()",
        "LIST = [1]\ndef f():\n    LIST.append(2)", "import numpy as np\nRNG = np.random.default_rng(0)",
        "x = 1\ndef f():\n    global x", "import torch\ntorch.manual_seed(0)",
    ],
)  # fmt: skip
def test_planted_state_is_caught(text: str) -> None:
    assert state(text)
    assert not state("TABLE = {1: 2}\nNAMES = ('a', 'b')\ndef f():\n    seen = {}\n    seen[1] = TABLE[1]")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_sizes(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"


def test_every_module_says_what_it_is() -> None:
    for file in FILES:
        text = file.read_text()
        assert not text or ast.get_docstring(ast.parse(text)), file


HEAVY = {"torch", "sklearn", "scipy", "tokenizers", "datasets", "pandas", "plotly", "safetensors"}
LISTING = "from assay.core.method import *; from assay.core import method as m; [m.describe(c) for k in m.KINDS.values() for c in m.discover(k).values()]"  # noqa: E501


@pytest.mark.parametrize(
    "code", ["import assay", "import assay.cli", "import assay.study", LISTING], ids=lambda c: c[:18]
)
def test_starting_up_is_light(code: str) -> None:
    """A listing, and the help of a command, must not wait for torch."""
    script = f"import sys, json; {code}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not {name.split(".")[0] for name in loaded} & HEAVY
    assert "pyarrow.dataset" not in loaded


NAMES = [
    "Budget", "Encoded", "Featurizer", "InputError", "Measurer", "Method", "Pool", "Recipe", "Run", "Scorer",
    "Selection", "Selector", "Source", "Study", "Table", "Target", "Task", "__version__", "compare", "contamination",
    "describe", "discover", "ingest", "load_study", "make", "parse_study", "run_study",
]  # fmt: skip


def test_public_names() -> None:
    assert sorted(assay.__all__) == assay.__all__ == NAMES
    for name in NAMES:
        assert getattr(assay, name) is not None
    assert set(NAMES) <= set(dir(assay))
    with pytest.raises(AttributeError, match="no attribute 'Poool'"):
        assay.Poool  # noqa: B018


# The command line: a change here is a change of the interface.
COMMON = ["--json", "--out", "--quiet/-q", "--replace", "--set", "--workers"]
COMMANDS = {
    "demo": ["NAME", *COMMON, "--every", "--quick", "--target"],
    "doctor": ["--json"],
    "export": ["RUN", "--arm", "--out", "--to"],
    "featurize": [
        *COMMON, "--context", "--id-column", "--method", "--model", "--part", "--pool", "--text-column",
    ],
    "init": ["POOL", "--out", "--target"],
    "league": ["TRACKS", "--data", "--json", "--methods", "--out", "--quiet/-q", "--runs", "--workers"],
    "methods": ["--json"],
    "plan": ["STUDY", "--json", "--set", "--workers"],
    "report": ["RUN"],
    "run": [
        "STUDY", *COMMON, "--budget", "--domain-column", "--filters", "--id-column", "--methods", "--pool",
        "--target", "--text-column",
    ],
    "score": [
        "STORES", "--id-column", "--json", "--methods", "--model", "--out", "--quiet/-q", "--target", "--text-column",
        "--workers",
    ],
    "verify": [
        "STUDY", *COMMON, "--domain-column", "--id-column", "--methods", "--metasmooth", "--model", "--pool",
        "--target", "--task", "--text-column",
    ],
}  # fmt: skip


def commands() -> dict[str, click.Command]:
    from assay.cli import app

    root: Any = typer.main.get_command(app)
    return {"": root, **root.commands}


def parameters(command: click.Command) -> list[str]:
    shown = []
    for parameter in command.params:
        is_argument = parameter.param_type_name == "argument"
        shown.append((parameter.name or "").upper() if is_argument else "/".join(parameter.opts))
    return sorted(shown)


def test_the_flags_are_frozen() -> None:
    found = {name: parameters(command) for name, command in commands().items()}
    assert found == {"": ["--version"]} | {name: sorted(flags) for name, flags in COMMANDS.items()}


def test_every_command_and_option_has_help() -> None:
    for name, command in commands().items():
        assert command.help, f"assay {name} has no help"
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"assay {name}: {parameter.opts} has no help"


@pytest.mark.skipif(not (DOCS / "methods.md").exists(), reason="the package is installed without its docs")
def test_the_docs_name_every_method() -> None:
    text = (DOCS / "methods.md").read_text()
    for kind in KINDS.values():
        for name, cls in discover(kind).items():
            assert name in text, f"docs/methods.md does not mention {name}"
            for option in describe(cls)["options"]:
                assert option["name"] in text, f"docs/methods.md does not mention {option['name']} of {name}"
