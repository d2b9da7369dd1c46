"""Who takes part in which world, with which options, and what is expected of the figures."""

from __future__ import annotations

from typing import Any

import numpy as np

from assay.core.method import Mark
from assay.numerics import lds

from .contest import OURS, Contest, Contestant, Row, centred, grid, row
from .truth import Truth

# Of a tenth to ten times what was best in trials, by half powers of ten. Ours are in units of the mean eigenvalue, the
# peers' in the units of each.
EXACT = {"name": "gradients", "projection": "exact", "store": "float32"}
DAMPING = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
ABSOLUTE = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
MARKS = 6
PIXELS = {"name": "column", "column": "pixels"}


def of(world: Truth, quick: bool) -> list[Contestant]:
    """All contestants of a world, ours and the peers' alternating."""
    margin = world.measure == "margin"
    found = {"R0": digits, "R1": pictures, "R2": pictures, "R3": documents}[world.case](world, margin)
    if quick:
        found = [Contestant(**{**vars(c), "options": c.options[::3]}) for c in found]
    return found


def features(world: Truth, kind: str = "exact", size: int = 2048) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": "gradients", "projection": kind, "store": "float32"}
    return spec if kind == "exact" else {**spec, "size": size}


def influence(solver: str, margin: bool, **options: Any) -> dict[str, Any]:
    return {"name": "influence", "solver": solver, "targets": "each", "measure": _measure(margin), **options}


def _measure(margin: bool) -> str:
    return "margin" if margin else "loss"


def first_order(world: Truth, margin: bool) -> list[Contestant]:
    """GradDot, GradCos, TracIn, and the nulls."""
    own = features(world)
    both = {"targets": "each", "features": own, "queries": {**own, "measure": _measure(margin)}}
    return [
        Contestant("graddot", {"name": "graddot", **both}),
        Contestant("graddot", {"method": "graddot"}, tool="dattri"),
        Contestant("gradcos", {"name": "gradcos", **both}),
        Contestant("gradcos", {"method": "gradcos"}, tool="dattri"),
        Contestant("tracin", {"name": "tracin", **both}, marks=MARKS),
        Contestant("tracin", {"method": "tracin"}, tool="dattri", marks=MARKS),
        Contestant(
            "nearest", {"name": "nearest", "targets": "each", "features": {"name": "column", "column": "pixels"}}
        ),
        Contestant("random", {"name": "random"}),
        Contestant("loss", {"name": "loss"}),
    ]


def trak(count: int, kind: str, sizes: list[int], dims: list[int]) -> list[Contestant]:
    own = {"name": "gradients", "projection": "dense", "store": "float32", "measure": "margin"}
    spec = {"name": "trak", "features": own, "output": "margin", "targets": "each"}
    return [
        Contestant(
            f"trak-{count}", spec, grid(damping=[0.01, 0.1, 1.0, 10.0], **{"features.size": sizes}), kind=kind,
            count=count,
        ),
        Contestant(
            f"trak-{count}", {"method": "trak"}, grid(damping=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1], dim=dims),
            tool="dattri", kind=kind, count=count,
        ),
    ]  # fmt: skip


def digits(world: Truth, margin: bool) -> list[Contestant]:
    cg = Contestant("cg", influence("cg", margin), grid(damping=DAMPING))
    ekfac = Contestant("ekfac", influence("ekfac", margin), grid(damping=DAMPING))
    their_cg = Contestant("cg", {"method": "cg"}, grid(regularization=ABSOLUTE, max_iter=[10, 50]), tool="dattri")
    their_ekfac = Contestant("ekfac", {"method": "ekfac"}, grid(damping=[None, *ABSOLUTE]), tool="kronfluence")
    shape = {"steps": [60, 100, 150], "eps": [3e-3, 1e-2]}
    answer = Contestant("response", {}, grid(**shape, weight=[1.0]), function=response)
    halved = Contestant("response-center-alpha", {}, grid(**shape, weight=[0.5]), kind="center", function=response)
    curved = {"targets": "each", "measure": _measure(margin)}
    return [
        cg, their_cg,
        Contestant("exact", influence("exact", margin), like="cg"),
        Contestant("exact", {"method": "exact"}, tool="dattri", like="cg"),
        Contestant("lissa", influence("lissa", margin), grid(damping=DAMPING)),
        Contestant(
            "lissa", {"method": "lissa", "batch_size": 100, "recursion_depth": 300}, grid(scaling=[10.0, 20.0, 50.0]),
            tool="dattri",
        ),
        Contestant("arnoldi", influence("arnoldi", margin), grid(damping=DAMPING)),
        Contestant(
            "arnoldi", {"method": "arnoldi", "max_iter": 100}, grid(regularization=[0.0, 0.03], proj_dim=[10, 20, 40]),
            tool="dattri",
        ),
        Contestant("kfac", influence("kfac", margin), grid(damping=DAMPING)),
        Contestant("kfac", {"method": "kfac"}, grid(damping=[None, *ABSOLUTE]), tool="kronfluence"),
        ekfac, their_ekfac,
        *trak(1, "full", [512, 2048], [512, 2048]), *trak(5, "full", [512, 2048], [512, 2048]),
        *first_order(world, margin),
        Contestant("datainf", {"name": "datainf", **curved}, grid(damping=DAMPING)),
        Contestant("datainf", {"method": "datainf", "targets": 50}, grid(regularization=ABSOLUTE[::2]), tool="dattri"),
        Contestant("source", {"name": "source", **curved}, grid(damping=[0.0]), marks=MARKS),
        answer, centred(cg), centred(their_cg), centred(ekfac), centred(their_ekfac), halved,
    ]  # fmt: skip


def response(world: Truth, trajectories: list[list[Mark]], options: dict[str, Any], targets: np.ndarray) -> np.ndarray:
    """What the scorer `response` does for one target, for all of them in one vmapped training (parts/r0.py)."""
    from . import r0

    pool, asked = (world.read(p).inputs(np.arange(len(p))) for p in (world.pool, world.targets))
    place = r0.World(pool["x"], pool["y"], asked["x"], asked["y"], world.masks, world.values[:, 0])
    return r0.response(place, trajectories[0][-1].params, targets, lr=0.2, sides="both", **options)


def pictures(world: Truth, margin: bool) -> list[Contestant]:
    cg = Contestant("cg", influence("cg", margin), grid(damping=DAMPING))
    their_cg = Contestant("cg", {"method": "cg"}, grid(regularization=ABSOLUTE, max_iter=[10]), tool="dattri")
    ekfac = Contestant("ekfac", influence("ekfac", margin), grid(damping=DAMPING))
    their_ekfac = Contestant("ekfac", {"method": "ekfac"}, grid(damping=[None, *ABSOLUTE]), tool="kronfluence")
    return [
        cg, their_cg, ekfac, their_ekfac,
        *trak(1, "half", [512, 2048], [512]), *trak(10, "half", [512, 2048], [512]), *first_order(world, margin),
        centred(cg), centred(ekfac),
    ]  # fmt: skip


def documents(world: Truth, margin: bool) -> list[Contestant]:
    ekfac = Contestant("ekfac", influence("ekfac", margin), grid(damping=[0.01, 0.1, 1.0, 10.0]))
    their_ekfac = Contestant("ekfac", {"method": "ekfac"}, grid(damping=[0.01, 0.1, 1.0, 10.0]), tool="bergson")
    own = {"targets": "each", "features": features(world)}
    return [
        ekfac, their_ekfac,
        Contestant("kfac", influence("kfac", margin), grid(damping=[0.01, 0.1, 1.0, 10.0])),
        Contestant("kfac", {"method": "kfac"}, grid(damping=[0.01, 0.1, 1.0, 10.0]), tool="bergson"),
        Contestant("graddot", {"name": "graddot", **own}),
        Contestant("graddot", {"method": "graddot"}, tool="bergson"),
        Contestant("gradcos", {"name": "gradcos", **own}),
        Contestant("gradcos", {"method": "gradcos"}, tool="bergson"),
        Contestant("trackstar", {"name": "trackstar", "targets": "each"}),
        Contestant("trackstar", {"method": "trackstar"}, grid(damping=[0.01, 0.1, 1.0], dim=[16]), tool="bergson"),
        Contestant("bm25", {"name": "bm25", "targets": "each"}),
        Contestant("random", {"name": "random"}), Contestant("loss", {"name": "loss"}),
        centred(ekfac), centred(their_ekfac),
    ]  # fmt: skip


def ceilings(world: Truth) -> list[Row]:
    """What noise of seeds lets perfect scores reach, where there are several seeds."""
    most = lds.ceiling(world.values[:, :, world.sides[1]])
    about = {"halves": len(world.masks), "seeds": world.values.shape[1]}
    pairs = [("lds_fixed", most.one), ("lds_avg", most.average)]
    return [row(world.case, OURS, "ceiling", m, v, None, options=about) for m, v in pairs if v is not None]


def differences(contest: Contest) -> list[Row]:
    """EK-FAC against what is cheap, on the decoder: over the same draws of halves and targets."""
    first = contest.results.get((OURS, "ekfac"), {}).get("lds_avg")
    if contest.world.case != "R3" or first is None:
        return []
    found = []
    for other in ("graddot", "gradcos", "trackstar", "bm25"):
        second = contest.results.get((OURS, other), {}).get("lds_avg")
        if second:
            value, low, high = lds.difference(first, second)
            found.append(row("R3", OURS, f"ekfac-minus-{other}", "difference", value, [low, high]))
    return found
