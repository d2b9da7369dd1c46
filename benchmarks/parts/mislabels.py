"""Wrong labels: a tenth of R2's labels are made wrong, and who ranks them first? AUC, with DeLong's interval.

Ranked are an example's effect on itself (`*-self`, and `memorization`, which retrains: high is suspicious), its mean
utility for the targets (`trak-10`: low is suspicious), and the null, its loss: of one model, and averaged over as many
as the others have. Ten models, each trained on a random half of the wrong data; nothing is tuned. `memorization` trains
ten of its own, on five halves and what they leave, and its seconds are of that; those of the others are of models made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from assay.core.method import Mark
from assay.numerics.stats import auc_interval

from . import contest, truth
from .attribution import Library
from .contest import OURS, Contestant, Row

FLIP, COUNT = 0.1, 10


def contestants(count: int) -> list[tuple[Contestant, Callable[[np.ndarray], np.ndarray]]]:
    """Each with what makes one suspicion an example of its scores `[targets or 1, pool]`."""
    own = {"name": "gradients", "projection": "sparse", "size": 512, "store": "float32", "measure": "margin"}
    peer: dict[str, Any] = {"method": "trak-self", "dim": 512, "damping": 1e-2}
    retrained = {"name": "memorization", "folds": 2, "repeats": count // 2}  # an even count
    trak = {"name": "trak", "features": own, "output": "margin", "targets": "each", "damping": 0.1}
    return [
        (Contestant("trak-self", {"name": "self_trak", "features": own, "output": "margin"}, count=count), lowest),
        (Contestant("trak-self", peer, tool="dattri", count=count), highest),
        (Contestant("memorization", retrained, count=count), lowest),
        (Contestant(f"trak-{count}", trak, count=count), lowest),
        (Contestant(f"loss-{count}", {}, count=count, function=losses), lowest),
        (Contestant("loss", {"name": "loss"}), lowest),
        (Contestant("random", {"name": "random"}), lowest),
    ]


def lowest(scores: np.ndarray) -> np.ndarray:
    return -scores.mean(axis=0)


def losses(world: truth.Truth, trajectories: list[list[Mark]], options: dict[str, Any], targets: np.ndarray) -> Any:
    """Minus the mean loss over models, `[1, pool]`: of about half of them, an example is a stranger's."""
    import torch

    batch = world.read(world.pool).inputs(np.arange(len(world.pool)))
    with torch.no_grad():
        found = [world.task.loss(run[-1].params, batch).double().numpy().ravel() for run in trajectories]
    return -np.mean(found, axis=0)[None]


def highest(scores: np.ndarray) -> np.ndarray:
    return scores.mean(axis=0)


def rows(
    folder: Path, libraries: dict[str, Library], *, quick: bool, images: Path | None, workers: int, count: int = COUNT
) -> list[Row]:
    world = truth.build("R2", folder, quick=quick, images=images, flip=FLIP)
    assert world.flipped is not None
    entrants, found = contest.Contest(world, libraries, workers), []
    for contestant, suspicion in contestants(2 if quick else count):
        if contestant.tool != OURS and contestant.tool not in libraries:
            continue
        scored = entrants.score(replace(contestant, kind="half"), [{}], np.arange(len(world.targets)))[0]
        value, low, high = auc_interval(suspicion(scored.values), world.flipped)
        tool = OURS if contestant.tool == OURS else libraries[contestant.tool].tool
        about = {"models": contestant.count, "wrong": int(world.flipped.sum())}
        found.append(contest.row("R2", tool, contestant.method, "auc", value, [low, high], scored.seconds, about))
        contest.told(found[-1])
    return found
