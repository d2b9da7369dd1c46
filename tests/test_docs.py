"""The code of the pages runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.skipif(not DOCS.exists(), reason="the package is installed without its docs")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", ["metagradients.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) >= 5 and any("assert" in block for block in blocks)
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), space)
    assert min(space["gains"]) > 0
