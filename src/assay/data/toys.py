"""Toys with known answers, for tests and for the second demo."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import pyarrow as pa

from assay.core.errors import InputError
from assay.data.plant import Planted, Row, Truth, assemble, chance, key, opaque, permuted, tabulate

TRAIN = 1200  # of the 1797 digits
TARGETS = 64

# One list for each slot of a sentence; a sentence takes one entry of each.
COOK = (
    "the a my our".split(),
    "baker cook chef guest neighbour waiter".split(),
    "stirs bakes tastes peels serves grills salts warms".split(),
    "the two some fresh ripe".split(),
    "onions carrots apples mushrooms noodles beans pears lentils".split(),
    "in on near".split(),
    "the a her".split(),
    "pan oven kettle bowl kitchen plate".split(),
    "before after until during".split(),
    "dinner lunch breakfast supper noon".split(),
)
SAIL = (
    "this that your every".split(),
    "captain pilot sailor skipper mate diver".split(),
    "steers moors repairs hoists anchors launches paints tows".split(),
    "three old heavy grey".split(),
    "schooners barges ferries dinghies rafts trawlers canoes sloops".split(),
    "beyond along toward".split(),
    "his its their".split(),
    "harbour reef lagoon lighthouse pier island".split(),
    "while because unless though".split(),
    "storms tides squalls currents fog".split(),
)


def digits(
    *, flip: float = 0.1, seed: int = 0, train: int = TRAIN, test: int | None = None
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Handwritten digits with a share of wrong training labels: train (1200), test (the rest of 1797) and truth.

    `train` and `test` have id, pixels (64 numbers in 0..1), label and domain ("digit 3", after the given label);
    `truth` names each flipped row of `train`, with its true label as detail.
    """
    if not 0 <= flip <= 1:
        raise InputError(f"flip={flip} is not a share", fix="a number from 0 to 1")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels, labels = (bunch.data / 16).astype(np.float32), bunch.target.tolist()  # type: ignore[attr-defined]
    order, rest = permuted(len(labels), seed, "split"), len(labels) - train
    if rest < 2 or (test or 2) > rest:
        raise InputError(
            f"{train} digits to train on and {test or 'some'} to test on", why=f"there are {len(labels)}",
            fix="lower pool.size or target.count",
        )  # fmt: skip
    wrong = sorted(order[:train], key=lambda i: key(seed, "flip", i))[: round(flip * train)]
    given = {i: (labels[i] + 1 + key(seed, "class", i) % 9) % 10 for i in wrong}

    def table(rows: list[int]) -> pa.Table:
        names = [given.get(i, labels[i]) for i in rows]
        return pa.table(
            {
                "id": pa.array([opaque(seed, "digit", i) for i in rows], pa.string()),
                "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels[rows].ravel()), 64).cast(
                    pa.list_(pa.float32())
                ),
                "label": pa.array(names, pa.int64()),
                "domain": pa.array([f"digit {name}" for name in names], pa.string()),
            }
        )

    flipped = [(opaque(seed, "digit", i), "flipped", "", str(labels[i])) for i in order[:train] if i in given]
    return table(order[:train]), table(order[train:][:test]), tabulate(flipped, Truth._fields)


def skills(n: int = 600, seed: int = 0) -> Planted:
    """Half the pool ("good") is sentences about cooking, as the target is; half ("bad") is another language.

    One bad row in two is letter noise. `truth` names every bad row: kind "bad", detail "other_skill" or "noise".
    """
    _enough(n)
    bad = n // 2
    good = _sentences(COOK, n - bad + TARGETS, seed, "cook")
    sail = _sentences(SAIL, bad - bad // 2, seed, "sail")
    noise = [_noise(i, seed) for i in range(bad // 2)]
    rows = [Row(opaque(seed, "good", text), text, "good") for text in good[TARGETS:]]
    truth: list[Truth] = []
    for detail, texts in (("other_skill", sail), ("noise", noise)):
        for text in texts:
            rows.append(Row(opaque(seed, detail, text), text, "bad"))
            truth.append(Truth(rows[-1].id, "bad", "", detail))
    return assemble(rows, _targets(good[:TARGETS], seed), truth, seed)


def null(n: int = 600, seed: int = 0) -> Planted:
    """A control: every row comes from the target's grammar and the domain is a coin toss, so no choice can gain."""
    _enough(n)
    texts = _sentences(COOK, n + TARGETS, seed, "null")
    rows = [Row(opaque(seed, "null", text), text, "ab"[key(seed, "coin", text) % 2]) for text in texts[TARGETS:]]
    return assemble(rows, _targets(texts[:TARGETS], seed), [], seed)


def ridge(n: int = 40, d: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [n, d] and outputs [n] of a noisy linear law, in float64."""
    rng = np.random.default_rng(key(seed, "ridge", n, d))
    x_nd = rng.standard_normal((n, d))
    return x_nd, x_nd @ rng.standard_normal(d) + 0.1 * rng.standard_normal(n)


def _enough(n: int) -> None:
    if not 4 <= n <= 100_000:
        raise InputError(f"n={n} is out of range", fix="from 4 to 100000 rows")


def _targets(texts: list[str], seed: int) -> list[tuple[str, str, str]]:
    return [(opaque(seed, "target", text), text, f"t{i:02d}") for i, text in enumerate(texts)]


def _sentences(grammar: Sequence[Sequence[str]], n: int, seed: int, purpose: str) -> list[str]:
    """The first n different sentences of a keyed sequence."""
    out: dict[str, None] = {}
    for i in count():
        if len(out) == n:
            break
        text = " ".join(slot[key(seed, purpose, i, j) % len(slot)] for j, slot in enumerate(grammar))
        out[text.capitalize() + "."] = None
    return list(out)


def _noise(i: int, seed: int) -> str:
    """Letters and spaces, 50 to 89 of them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    length = 50 + key(seed, "length", i) % 40
    text = "".join(
        " " if chance(seed, "gap", i, j) < 0.17 else letters[key(seed, "letter", i, j) % 26] for j in range(length)
    )
    return f"n{' '.join(text.split())}e"
