"""The one exception that speaks to users: what was given, where, why it cannot work, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot work.

    The command line prints the message without a traceback and exits with status 2. Invariants of
    the program itself are `assert`s, never an `InputError`.

    >>> print(InputError("no column 'txet'", where="pool.csv", why="it has: id, text", fix="did you mean 'text'?"))
    no column 'txet'
      where: pool.csv
      why:   it has: id, text
      fix:   did you mean 'text'?
    """

    def __init__(self, what: str, *, where: object = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, str(where), why, fix
        lines = [what]
        lines += [
            f"  {name:<6} {value}" for name, value in (("where:", self.where), ("why:", why), ("fix:", fix)) if value
        ]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and worker processes raise these.
        return _rebuild, (self.what, self.where, self.why, self.fix)


def _rebuild(what: str, where: str, why: str, fix: str) -> InputError:
    return InputError(what, where=where, why=why, fix=fix)


def nearest(word: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'?"`, or the list of what is known when nothing is near.

    >>> nearest("trakk", ["trak", "bm25"])
    "did you mean 'trak'? (known: bm25, trak)"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    listing = ", ".join(names) if names else "nothing"
    return f"did you mean '{close[0]}'? (known: {listing})" if close else f"known: {listing}"
