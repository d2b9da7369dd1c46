"""`loss_diff` with a control: the formula, and the corrupted target it rests on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from assay.core.pool import Pool
from assay.scorers.loss_diff import LossDiff, shuffle_words


def pool(texts: list[str]) -> Pool:
    return Pool.from_columns({"id": [f"i{k}" for k in range(len(texts))], "text": texts})


def test_shuffled_words_are_the_same_words_in_a_keyed_order():
    texts = [
        "one two three four five six seven eight",
        "a b c d e f g h i j",
        "alone",
        "one two three four five six seven eight",
    ]
    shuffled = shuffle_words(pool(texts), seed=0).column("text")
    assert [sorted(t.split()) for t in shuffled] == [sorted(t.split()) for t in texts]
    assert shuffled[0] != texts[0] and shuffled[1] != texts[1] and shuffled[2] == "alone"
    assert shuffled[0] != shuffled[3], "the order is keyed by id: equal texts of two ids are shuffled apart"
    assert shuffle_words(pool(texts), seed=0).column("text") == shuffled
    assert shuffle_words(pool(texts), seed=1).column("text") != shuffled
    reverse = shuffle_words(pool(texts).at([1, 0]), seed=0).column("text")
    assert reverse == [shuffled[1], shuffled[0]], "an item's order must not depend on where it stands"


@pytest.mark.parametrize("control", [0.0, 0.5, 2.0])
def test_score_is_the_documented_formula(control, monkeypatch):
    losses = {"before": [3.0, 2.0], "after": [1.0, 1.5], "shuffled": [2.5, 1.0]}
    weights = {name: {"losses": torch.tensor(values, dtype=torch.float64)} for name, values in losses.items()}
    target = pool(["one two three", "four five six"])
    moved = lambda _self, _context, part, _params: weights["after" if part is target else "shuffled"]  # noqa: E731
    monkeypatch.setattr(LossDiff, "_moved", moved)
    task = SimpleNamespace(loss=lambda params, inputs: params["losses"])
    context = SimpleNamespace(task=task, target=target, models=[weights["before"], dict(weights["before"])])
    scorer = LossDiff(control=control)
    got = scorer.score(scorer.init(context), SimpleNamespace(inputs=None))  # type: ignore[arg-type]
    b, a, s = (np.array(losses[k]) for k in ("before", "after", "shuffled"))
    assert np.allclose(got.numpy()[:, 0], (b - a) + control * (s - a), rtol=1e-15)


def test_control_costs_a_third_pass():
    assert LossDiff().passes == 2.0 and LossDiff(control=0.5).passes == 3.0
