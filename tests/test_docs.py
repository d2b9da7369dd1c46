"""The code of the pages runs as it stands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from assay.study import parse

DOCS = Path(__file__).parents[1] / "docs"


PAGES = {"metagradients.md": lambda space: min(space["gains"]) > 0, "filters.md": lambda space: len(space["kept"]) > 0}
"""Pages, and what must hold of the names at their end."""


@pytest.mark.skipif(not DOCS.exists(), reason="the package is installed without its docs")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) >= 5 and any("assert" in block for block in blocks)
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), space)
    assert PAGES[page](space)


@pytest.mark.skipif(not DOCS.exists(), reason="the package is installed without its docs")
def test_the_study_of_the_page_of_filters_is_one() -> None:
    """The TOML of the page, with a pool and a target."""
    (text,) = re.findall(r"^```toml\n(.*?)^```$", (DOCS / "filters.md").read_text(encoding="utf-8"), re.S | re.M)
    rest = {"pool": {"path": "pool.jsonl"}, "target": {"path": "target.jsonl"}}
    chosen = parse(tomllib.loads(text) | rest)
    assert [f.label for f in chosen.pipeline(chosen.arms[0])] == ["exact_dup", "gopher", "length"]
