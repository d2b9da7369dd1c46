"""Writes docs/methods.md and docs/cli.md from the code; `--check` fails when they are not what the code says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py: change the code, then run `make docs`. -->\n"
KIND_TITLES = {
    "scorer": ("Scorers", "Examples to scores; higher means keep."),
    "featurizer": ("Featurizers", "Examples to vectors; scorers take them as an option."),
    "selector": ("Selectors", "Scores to a selection under a budget."),
}


def methods() -> str:
    """Every method with its formula, source, unit, cost and options."""
    from assay.core.method import KINDS, describe, discover

    lines = ["# Methods", NOTE, "`assay methods` prints the same. A new method is one file: see CONTRIBUTING.md.", ""]
    for kind, (title, what) in KIND_TITLES.items():
        lines += [f"## {title}", "", what, ""]
        for cls in discover(KINDS[kind]).values():
            lines += _method(describe(cls))
    return "\n".join(lines).rstrip() + "\n"


def _method(entry: dict[str, Any]) -> list[str]:
    lines = [f"### {entry['name']}", "", entry["summary"], ""]
    if entry["formula"]:
        lines += ["```text", entry["formula"], "```", ""]
    facts = [("Reference", entry["reference"]), ("Note", entry["note"])]
    if entry["kind"] == "scorer":
        measured = "yes" if entry["measures_utility"] else "no"
        facts += [("Unit", entry["unit"]), ("Measures utility", measured)]
    if entry["kind"] != "selector":
        facts.append(("Cost", entry["cost"]))
    lines += [f"- {name}: {value}" for name, value in facts if value]
    if entry["options"]:
        lines += ["", "| option | type | default |", "|---|---|---|"]
        lines += [f"| `{o['name']}` | {_cell(o['type'])} | {_cell(_plain(o['default']))} |" for o in entry["options"]]
    return [*lines, ""]


def _plain(value: Any) -> str:
    return value.name if hasattr(value, "spec") else repr(value)


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def cli() -> str:
    """Every command with its arguments and options."""
    import typer

    from assay.cli import app

    root: Any = typer.main.get_command(app)
    lines = ["# Command line", NOTE, "Bad input is one message and status 2; Ctrl-C is status 130.", ""]
    for name, command in root.commands.items():
        lines += [f"## assay {name}", "", command.help or "", ""]
        given = [p for p in command.params if p.name != "help"]
        if given:
            lines += ["| | | default |", "|---|---|---|", *map(_parameter, given), ""]
    return "\n".join(lines).rstrip() + "\n"


def _parameter(p: Any) -> str:
    argument = p.param_type_name == "argument"
    shown = str(p.name).upper() if argument else ", ".join([*p.opts, *p.secondary_opts])
    default = "required" if p.required else "" if p.default in (None, False, (), []) else f"`{p.default}`"
    what = (p.help or "").replace("|", "\\|")
    return f"| `{shown}` | {what} | {default} |"


def main() -> int:
    check, stale = "--check" in sys.argv[1:], []
    for name, text in (("methods.md", methods()), ("cli.md", cli())):
        path = DOCS / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(f"docs/{name}")
        if not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}: run `make docs`" if check else f"wrote {', '.join(stale)}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
