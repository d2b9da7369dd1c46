"""From the user's files to a Pool on disk: one pass, constant memory, bad rows set aside with their reasons."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from assay.core.errors import InputError
from assay.core.pool import Pool, PoolWriter
from assay.core.run import Ledger, Run
from assay.data import readers

# Rows are judged bad in bulk only once there are enough of them to speak of a share.
GRACE = 20
EXAMPLES = 20


def ingest(source: readers.Source, path: Path, *, what: str = "pool", max_bad: float = 0.05) -> Pool:
    """Read, check, and store rows; `quarantine.jsonl` gets each bad row with file, row number and reason.

    Raises `InputError` when nothing is left, or when more than the share `max_bad` of the rows is bad.
    """
    writer, reasons, examples = PoolWriter(path), Counter[str](), []
    rows = bad = 0
    with open(path / "quarantine.jsonl", "w", encoding="utf-8") as quarantine:
        for batch, rejected in readers.read(source):
            table = pa.Table.from_batches([batch])
            repeated = writer.write(table) if batch.num_rows else []
            rejected = sorted([*rejected, *(_repeated(table, row) for row in repeated)], key=lambda one: one.row)
            rows += batch.num_rows + len(rejected) - len(repeated)
            bad += len(rejected)
            for one in rejected:
                entry = {"where": one.where, "row": one.row, "reason": one.reason, "preview": one.preview}
                quarantine.write(json.dumps(entry) + "\n")
                reasons[kind(one.reason)] += 1
                if len(examples) < EXAMPLES:
                    examples.append(entry)
    _judge(rows, bad, reasons, examples, source, what, max_bad)
    return writer.finish(read=rows, quarantined={"total": bad, "reasons": dict(reasons), "examples": examples})


def store(table: pa.Table, path: Path) -> Pool:
    """A table made in memory (a built-in pool), stored like any other."""
    writer = PoolWriter(path)
    writer.write(table)
    (path / "quarantine.jsonl").write_text("")
    return writer.finish(read=table.num_rows, quarantined={"total": 0, "reasons": {}, "examples": []})


def read_step(
    run: Run, source: readers.Source, *, what: str, max_bad: float = 0.05, key: Any = None
) -> tuple[Path, dict[str, Any], str]:
    """The pool of a source as a step of a run; what was set aside, and a sentence about it (empty when nothing was)."""

    def build(part: Path, _: Ledger) -> None:
        ingest(source, part, what=what, max_bad=max_bad)

    step = run.step(f"read-{what}", (readers.fingerprint(source), key), build, label=f"read {what}")
    found = json.loads((step / "pool.json").read_text(encoding="utf-8"))["quarantined"]
    if not found["total"]:
        return step, found, ""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in found["reasons"].items())
    rows = "1 row" if found["total"] == 1 else f"{found['total']} rows"
    return step, found, f"{rows} of the {what} set aside: {reasons} (see {step / 'quarantine.jsonl'})"


def kind(reason: str) -> str:
    """A reason without its numbers and quotes, so that counts add up.

    >>> kind("text of 60000000 characters exceeds max_chars=1000000; split the document")
    'text of N characters exceeds max_chars=N'
    >>> kind("not UTF-8 (byte 0xe9 at position 13)")
    'not UTF-8'
    """
    import re

    head = reason.split(";")[0].split(":")[0]
    return re.sub(r"(?<![A-Za-z-])(0x[0-9a-f]+|\d[\d,_]*)", "N", re.sub(r" \(.*\)", "", head)).strip()


def _repeated(table: pa.Table, row: int) -> readers.Rejected:
    value: Any = lambda name: table[name][row].as_py()  # noqa: E731
    return readers.Rejected(
        value("source"), value("source_row"), "id was used by an earlier row", str(value("id"))[:120]
    )


def _judge(
    rows: int, bad: int, reasons: Counter[str], examples: list[Any], source: readers.Source, what: str, max_bad: float
) -> None:
    where = source.paths if isinstance(source.paths, str) else ", ".join(source.paths)
    common = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    first = f"; first: {examples[0]['where']} row {examples[0]['row']}" if examples else ""
    if rows == bad:
        why = f"all {bad} rows were set aside: {common}{first}" if bad else "it has no rows"
        raise InputError(
            f"the {what} is empty",
            where=where,
            why=why,
            fix=f"mend the file, or name its columns ({what}.text, {what}.id)",
        )
    if bad > GRACE and bad > max_bad * rows:
        raise InputError(
            f"{bad} of {rows} rows of the {what} are bad ({bad / rows:.0%})",
            where=where, why=common + first,
            fix=f"mend them, or accept them with --set {what}.max_bad={min(1.0, bad / rows + 0.01):.2f}",
        )  # fmt: skip
