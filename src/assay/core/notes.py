"""What methods measure of themselves while they score: kept in their Tables' meta, told among the report's checks."""

from __future__ import annotations

import math
from typing import Any


def keep(notes: dict[str, Any], what: str, detail: str, ok: bool | None, numbers: dict[str, Any]) -> None:
    """Enter a note. Of several of one name, one for each scoring model, one that is not ok stays, or else the last.

    >>> notes = {}
    >>> for residual in (1e-9, float("nan"), 1e-8):
    ...     keep(notes, "solve", f"residual {residual}", residual < 1e-6, {"residual": residual})
    >>> notes["solve"]
    {'detail': 'residual nan', 'ok': False, 'residual': None}
    """
    if notes.get(what, {}).get("ok") is not False:
        notes[what] = {"detail": detail, "ok": None if ok is None else bool(ok), **_finite(numbers)}


def _finite(value: Any) -> Any:
    """With None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
