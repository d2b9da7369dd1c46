"""The one exception that speaks to users: what was given, where, why it cannot work, how to mend it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path


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


def os_error(error: OSError, out: Path | None = None) -> InputError:
    """Failures of the machine in the users' words."""
    where, why = error.filename or out or "", error.strerror or str(error)
    kept, other = "; finished steps are kept" if out else "", "choose another --out" if out else "choose another place"
    # numpy writes "N requested and M written" without a number of the error.
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "requested and" in str(error):
        return InputError("the disk is full", where=where, why=why, fix=f"free space or {other}{kept}")
    if error.errno == errno.EFBIG:
        return InputError("a file may not grow that large", where=where, why=why, fix="raise `ulimit -f`" + kept)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return InputError("too many open files", where=where, why=why, fix="raise `ulimit -n`" + kept)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError("no permission", where=where, why=why, fix=f"change the permissions or {other}{kept}")
    return InputError("the system refused", where=where, why=why, fix=f"mend the cause and run the command again{kept}")
