"""The demos: studies on data that every machine has."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from assay.core.errors import InputError, nearest

if TYPE_CHECKING:
    from assay.study import Study

NAMES = ("text", "digits")
QUICK = {
    "text": ["pool.size=1500", "proxy.passes=0.3", "verify.seeds=2", "train.repeats=0.5", "budget='20%'"],
    "digits": ["proxy.steps=60", "train.steps=60", "verify.seeds=2"],
}


def study(
    name: str, changes: list[str], *, quick: bool = False, every: bool = False, target: str | None = None
) -> Study:
    """A demo's study: `quick` is a shortened form, `every` has the league's methods as arms, `changes` come last.

    Raises `InputError` for an unknown name, and for `every` or a `target` of a demo that has neither.
    """
    from assay import study as studies

    if name not in NAMES:
        raise InputError(f"no demo called {name!r}", fix=nearest(name, NAMES))
    for flag in ("--target",) * (target is not None) + ("--every",) * every:
        if name != "text":
            raise InputError(f"{flag} goes with the text demo only", fix="drop it")
    chosen = [*(QUICK[name] if quick else []), *([f"target.builtin='{target}'"] if target else []), *changes]
    file = Path(__file__).parent / f"{name}.toml"
    if not every:
        return studies.load(file, chosen)
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    return studies.parse(
        studies.override(data | {"methods": ["random"], "arms": _everybody()}, chosen), where=str(file)
    )


def _everybody() -> list[object]:
    """The league's entries, without those that read a column of its targets."""
    from assay.bench.league import default_entries

    return [arm for arm in default_entries() if "subtask" not in arm["method"]]
