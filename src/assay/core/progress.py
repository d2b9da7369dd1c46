"""Progress as the stages tell it; the command line draws it, scripts ignore it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Silent. `begin` names a stage and its number of units, `advance` counts them, `warn` speaks to the user."""

    def begin(self, stage: str, units: int, label: str = "") -> None:
        """A stage starts; one that is already done begins and ends at once."""

    def advance(self, units: int = 1) -> None:
        """So many units of the current stage are done."""

    def skip(self, units: int) -> None:
        """So many units of the current stage were done before: they say nothing about its pace."""
        self.advance(units)

    def end(self) -> None:
        """The current stage is done."""

    def warn(self, message: str) -> None:
        """Something the user should know; it is also kept for the report."""

    def track(self, stage: str, items: Iterable[T], units: int | None = None, label: str = "") -> Iterator[T]:
        """`begin`, one `advance` for each item, `end`."""
        total = units if units is not None else len(items) if isinstance(items, Sized) else 0
        self.begin(stage, total, label)
        for item in items:
            yield item
            self.advance()
        self.end()
