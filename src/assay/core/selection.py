"""`Selection`: which examples, in which order, with which weight, and why the others were dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.errors import InputError
from assay.core.keys import decode_ids, digest, encode_ids, write_json
from assay.core.table import Table


@dataclass(frozen=True)
class Budget:
    """How much may be selected: `amount` examples, or `amount` tokens as the task counts them.

    >>> Budget.parse("10%", examples=200, tokens=9000)
    Budget(amount=900, unit='tokens')
    >>> Budget.parse("2ktok", examples=200, tokens=9000).amount
    2000
    """

    amount: int
    unit: Literal["examples", "tokens"]

    @classmethod
    def parse(cls, text: str, *, examples: int, tokens: int | None) -> Budget:
        """`"10%"` (of tokens, or of examples when the task has no tokens), `"5Mtok"`, `"800"` or `"20k"` examples.

        Raises `InputError` for zero, negative, over the pool, or unreadable amounts.
        """
        word = str(text).strip().replace("_", "").lower()
        unit: Literal["examples", "tokens"] = "examples" if tokens is None else "tokens"
        scale = {"k": 1e3, "m": 1e6, "b": 1e9}
        try:
            if word.endswith("%"):
                amount = float(word[:-1]) / 100 * (examples if tokens is None else tokens)
            else:
                if word.endswith("tok"):
                    word, unit = word[:-3], "tokens"
                else:
                    word, unit = word.removesuffix("ex"), "examples"
                factor = scale.get(word[-1:], 1.0)
                amount = float(word[:-1] if factor != 1.0 else word) * factor
        except ValueError as error:
            fix = "write a share ('10%'), tokens ('5Mtok', '300ktok') or examples ('800', '20k')"
            raise InputError(f"unreadable budget {text!r}", fix=fix) from error
        if unit == "tokens" and tokens is None:
            raise InputError(
                f"budget {text!r} is in tokens", why="this task has no tokens", fix="give examples or a share"
            )
        whole = examples if unit == "examples" else tokens
        assert whole is not None
        if not 1 <= amount < whole + 0.5:
            raise InputError(
                f"budget {text!r} comes to {amount:,.0f} {unit}",
                why=f"it must be at least 1 and at most the {whole:,} {unit} that may be selected",
                fix="give a share between 0% and 100%, or a smaller amount",
            )
        return cls(int(amount + 0.5), unit)


@dataclass(frozen=True, eq=False)
class Selection:
    """Ordered ids with weights (an id may repeat) and, for each dropped id, its reason.

    The order is the curriculum only if `ordered` is true; otherwise the trainer shuffles by its own seed.
    """

    ids: np.ndarray
    weights: np.ndarray
    dropped: Mapping[str, np.ndarray] = field(default_factory=dict)
    ordered: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.weights):
            raise InputError(f"{len(self.ids)} ids and {len(self.weights)} weights", fix="give one weight for each id")
        if not np.isfinite(self.weights).all() or (self.weights < 0).any():
            raise InputError("weights must be finite and at least 0", fix="look for NaN in the scores")

    @classmethod
    def everything(cls, ids: np.ndarray) -> Selection:
        """All of them, weight 1."""
        return cls(ids, np.ones(len(ids)))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        return digest(decode_ids(self.ids), self.weights.tolist(), self.ordered)

    def reasons(self) -> dict[str, int]:
        """How many rows each reason dropped."""
        return dict(Counter({reason: len(ids) for reason, ids in self.dropped.items()}))

    def save(self, path: Path) -> None:
        """`selected.parquet` (id, weight), `dropped.parquet` (id, reason), `selection.json`; always the same bytes."""
        path.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": decode_ids(self.ids), "weight": self.weights}), path / "selected.parquet")
        ids = [i for group in self.dropped.values() for i in decode_ids(group)]
        why = [reason for reason, group in self.dropped.items() for _ in range(len(group))]
        table = pa.table({"id": pa.array(ids, pa.string()), "reason": pa.array(why, pa.string())})
        pq.write_table(table, path / "dropped.parquet")
        write_json(
            path / "selection.json", {"ordered": self.ordered, "meta": dict(self.meta), "dropped": self.reasons()}
        )

    @classmethod
    def open(cls, path: Path) -> Selection:
        import json

        table, dropped = pq.read_table(path / "selected.parquet"), pq.read_table(path / "dropped.parquet")
        about = json.loads((path / "selection.json").read_text())
        ids, why = encode_ids(dropped["id"].to_pylist()), np.array(dropped["reason"].to_pylist(), dtype=str)
        groups = {reason: ids[why == reason] for reason in about["dropped"]}
        weights = table["weight"].to_numpy().astype(np.float64)
        return cls(encode_ids(table["id"].to_pylist()), weights, groups, about["ordered"], about["meta"])


def outside(values: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Which values are below `low` or above `high`, `[n]` bool; None is no bound.

    >>> outside(np.array([1.0, 2.0, 3.0]), 2.0, None).tolist()
    [True, False, False]
    """
    return (values < (-np.inf if low is None else low)) | (values > (np.inf if high is None else high))


def refused(
    scores: Table, barred: Mapping[str, np.ndarray], bounds: Mapping[str, tuple[float | None, float | None]]
) -> np.ndarray:
    """Why a row of scores may not be chosen, `[n]` of str: barred first, then the first bound it breaks; else empty."""
    reason = np.full(len(scores), "", dtype=object)
    for name, ids in barred.items():
        reason[np.isin(scores.ids, ids)] = name
    for name, (low, high) in bounds.items():
        reason[outside(scores.column(name), low, high) & (reason == "")] = f"{name} outside [{low}, {high}]"
    return reason


def by_reason(ids: np.ndarray, reason: np.ndarray) -> dict[str, np.ndarray]:
    """Ids under each reason that is not empty, the reasons sorted."""
    return {str(r): ids[reason == r] for r in sorted(set(reason.tolist()) - {""})}
