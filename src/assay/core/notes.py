"""What methods measure of themselves while they score: kept in their Tables' meta, told among the report's checks."""

from __future__ import annotations

from typing import Any

from assay.core.keys import without_nan


def keep(notes: dict[str, Any], what: str, detail: str, ok: bool | None, numbers: dict[str, Any]) -> None:
    """Enter a note. Of several of one name, one for each scoring model, one that is not ok stays, or else the last.

    >>> notes = {}
    >>> for residual in (1e-9, float("nan"), 1e-8):
    ...     keep(notes, "solve", f"residual {residual}", residual < 1e-6, {"residual": residual})
    >>> notes["solve"]
    {'detail': 'residual nan', 'ok': False, 'residual': None}
    """
    if notes.get(what, {}).get("ok") is not False:
        notes[what] = {"detail": detail, "ok": None if ok is None else bool(ok), **without_nan(numbers)}
