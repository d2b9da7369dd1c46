"""Who takes part in which world, with which options, and what is expected of the figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from assay.core.method import Mark
from assay.numerics import lds

from .contest import OURS, Contest, Contestant, Row, centred, grid, row
from .truth import Truth

# Half powers of ten around what was best in trials: ours in units of the mean eigenvalue, the peers' in their own.
DAMPING = [0.3, 1.0, 3.0, 10.0, 30.0]
BLOCKS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]  # of Kronecker factors
WHOLE = [1.0, 10.0, 100.0, 300.0, 1000.0]
STAR = [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]
ABSOLUTE = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
# Ranks do not need more digits.
LOOSE = {"precision": "float32", "tolerance": 1e-3}
# As many products of as many examples as the peer is given.
SUMMED = {"precision": "float32", "tolerance": 1e-2, "minibatch": 100, "limit": 300}
MARKS = 6
PIXELS = {"name": "column", "column": "pixels"}


def of(world: Truth, quick: bool) -> list[Contestant]:
    """All contestants of a world, ours and the peers' alternating."""
    margin = world.measure == "margin"
    found = {"R0": digits, "R1": pictures, "R2": pictures, "R3": documents}[world.case](world, margin)
    return [replace(c, options=c.options[::3]) for c in found] if quick else found


def features(world: Truth, kind: str = "exact", size: int = 2048) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": "gradients", "projection": kind, "store": "float32"}
    return spec if kind == "exact" else {**spec, "size": size}


def influence(solver: str, margin: bool, **options: Any) -> dict[str, Any]:
    return {"name": "influence", "solver": solver, "targets": "each", "measure": _measure(margin), **options}


def _measure(margin: bool) -> str:
    return "margin" if margin else "loss"


def first_order(world: Truth, margin: bool) -> list[Contestant]:
    """GradDot, GradCos, TracIn, and the nulls."""
    # Exact gradients, where they are not gigabytes on disk.
    own = features(world, "sparse", 8192) if world.case == "R2" else features(world)
    both = {"targets": "each", "features": own, "queries": {**own, "measure": _measure(margin)}}
    return [
        Contestant("graddot", {"name": "graddot", **both}),
        Contestant("graddot", {"method": "graddot"}, tool="dattri"),
        Contestant("gradcos", {"name": "gradcos", **both}),
        Contestant("gradcos", {"method": "gradcos"}, tool="dattri"),
        Contestant("tracin", {"name": "tracin", **both}, marks=MARKS),
        Contestant("tracin", {"method": "tracin"}, tool="dattri", marks=MARKS),
        Contestant("nearest", {"name": "nearest", "targets": "each", "features": PIXELS}),
        Contestant("random", {"name": "random"}),
        Contestant("loss", {"name": "loss"}),
    ]


def trak(count: int, kind: str, dims: list[int]) -> list[Contestant]:
    """Of several models, or, for kind 'marks', of checkpoints of one run. Ours projects sparsely and theirs by a normal
    matrix: of as many numbers, both have the same variance."""
    own = {"name": "gradients", "projection": "sparse", "store": "float32", "measure": "margin"}
    spec = {"name": "trak", "features": own, "output": "margin", "targets": "each"}
    name, models = f"trak-{count}", {"kind": kind, "count": count}
    if kind == "marks":
        spec, name, models = {**spec, "every": True}, f"trak-{count}-marks", {"marks": count}
    tried = grid(damping=[0.3, 1.0, 3.0, 10.0], **{"features.size": [512, 2048]})
    theirs = grid(damping=[1e-2, 3e-2, 1e-1, 3e-1], dim=dims)
    return [
        Contestant(name, spec, tried, **models),  # type: ignore[arg-type]
        Contestant(name, {"method": "trak"}, theirs, tool="dattri", **models),  # type: ignore[arg-type]
    ]


def digits(world: Truth, margin: bool) -> list[Contestant]:
    cg, ekfac = _solved("cg", margin, DAMPING, **LOOSE), _solved("ekfac", margin, BLOCKS, precision="float32")
    their_cg = Contestant("cg", {"method": "cg"}, grid(regularization=ABSOLUTE, max_iter=[10, 50]), tool="dattri")
    their_ekfac = Contestant("ekfac", {"method": "ekfac"}, grid(damping=[None, *ABSOLUTE]), tool="kronfluence")
    shape = {"steps": [60, 100, 150], "eps": [3e-3, 1e-2]}
    answer = Contestant("response", {}, grid(**shape, weight=[1.0]), function=response)
    halved = Contestant("response-center-alpha", {}, grid(**shape, weight=[0.5]), kind="center", function=response)
    curved, plain = {"targets": "each", "measure": _measure(margin)}, features(world, "sparse", 512)
    star = {
        "name": "trackstar",
        "targets": "each",
        "features": plain,
        "queries": {**plain, "measure": _measure(margin)},
    }
    untuned = Contestant("cg-untuned", influence("cg", margin, **LOOSE, scale="run", damping=1.0))
    one, marks = trak(1, "full", [512, 2048]), trak(5, "marks", [512, 2048])
    return [
        cg, their_cg, untuned,
        Contestant("exact", influence("exact", margin, precision="float32"), like="cg"),
        Contestant("exact", {"method": "exact"}, tool="dattri", like="cg"),
        _solved("lissa", margin, DAMPING[1:4], **SUMMED),
        Contestant(
            "lissa", {"method": "lissa", "batch_size": 100, "recursion_depth": 300}, grid(scaling=[10.0, 20.0, 50.0]),
            tool="dattri",
        ),
        _solved("arnoldi", margin, DAMPING, **LOOSE, limit=150),
        Contestant(
            "arnoldi", {"method": "arnoldi", "max_iter": 100}, grid(regularization=[0.0, 0.03], proj_dim=[10, 20, 40]),
            tool="dattri",
        ),
        _solved("kfac", margin, BLOCKS, precision="float32"),
        Contestant("kfac", {"method": "kfac"}, grid(damping=[None, *ABSOLUTE]), tool="kronfluence"),
        ekfac, their_ekfac,
        *one, *trak(5, "full", [512, 2048]), *marks, centred(one[0]), centred(marks[0]),
        Contestant("trackstar", star, grid(damping=[0.1, 1.0, 10.0])),
        *first_order(world, margin),
        Contestant("datainf", {"name": "datainf", **curved}, grid(damping=[0.1, 1.0, 10.0])),
        Contestant("datainf", {"method": "datainf", "targets": 50}, grid(regularization=ABSOLUTE[::2]), tool="dattri"),
        Contestant("source", {"name": "source", **curved}, grid(segments=[1, 3]), marks=MARKS),
        answer, centred(cg), centred(untuned), centred(their_cg), centred(ekfac), centred(their_ekfac), halved,
    ]  # fmt: skip


def _solved(solver: str, margin: bool, damping: list[float], **options: Any) -> Contestant:
    return Contestant(solver, influence(solver, margin, **options), grid(damping=damping))


def response(world: Truth, trajectories: list[list[Mark]], options: dict[str, Any], targets: np.ndarray) -> np.ndarray:
    """What the scorer `response` does for one target, for all of them in one vmapped training (parts/r0.py)."""
    from . import r0

    pool, asked = (world.read(p).inputs(np.arange(len(p))) for p in (world.pool, world.targets))
    place = r0.World(pool["x"], pool["y"], asked["x"], asked["y"], world.masks, world.values[:, 0])
    return r0.response(place, trajectories[0][-1].params, targets, lr=0.2, sides="both", **options)


def pictures(world: Truth, margin: bool) -> list[Contestant]:
    """Conjugate gradients in R1 alone: with the 109,386 weights of R2 they take either tool many minutes."""
    cg = _solved("cg", margin, DAMPING[:4], **LOOSE, rank=50)
    their_cg = Contestant("cg", {"method": "cg"}, grid(regularization=ABSOLUTE[1:], max_iter=[10]), tool="dattri")
    ekfac = _solved("ekfac", margin, BLOCKS, precision="float32")
    ten, marks = trak(10, "half", [512]), trak(5, "marks", [512])
    several = [*ten, *marks]
    if world.case == "R2":  # a minute a model and option for the peer: options are those of one model, for both
        several = [replace(c, options=[{}], like="trak-1") for c in [*ten, marks[0]]]
    return [
        *([cg, their_cg, centred(cg)] if world.case == "R1" else []),
        ekfac, Contestant("ekfac", {"method": "ekfac"}, grid(damping=[None, *ABSOLUTE]), tool="kronfluence"),
        *trak(1, "half", [512]), *several, centred(ekfac), *first_order(world, margin),
    ]  # fmt: skip


def documents(world: Truth, margin: bool) -> list[Contestant]:
    # In units of the whole model's eigenvalues: the run is short, and much damping must leave dot products.
    ekfac = _solved("ekfac", margin, WHOLE, precision="float32", scale="model")
    theirs = {
        method: Contestant(method, {"method": method}, grid(damping=[0.1, 1.0, 10.0, 100.0]), tool="bergson")
        for method in ("ekfac", "kfac")
    }
    own = {"targets": "each", "features": features(world)}
    star: dict[str, Any] = {"name": "trackstar", "targets": "each"}
    linear = {"name": "gradients", "metric": "adafactor", "exponent": 0.5, "layers": "linear"}
    return [
        ekfac, theirs["ekfac"],
        _solved("kfac", margin, WHOLE, precision="float32", scale="model"), theirs["kfac"],
        Contestant("graddot", {"name": "graddot", **own}),
        Contestant("graddot", {"method": "graddot"}, tool="bergson"),
        Contestant("gradcos", {"name": "gradcos", **own}),
        Contestant("gradcos", {"method": "gradcos"}, tool="bergson"),
        Contestant("trackstar", star, grid(damping=STAR)),
        Contestant("trackstar-linear", {**star, "features": linear}, grid(damping=STAR)),
        Contestant("trackstar", {"method": "trackstar"}, grid(damping=STAR), tool="bergson"),
        Contestant("source", {"name": "source", "targets": "each", "metric": "adafactor"}, marks=MARKS),
        Contestant("bm25", {"name": "bm25", "targets": "each"}),
        Contestant("random", {"name": "random"}), Contestant("loss", {"name": "loss"}),
        centred(ekfac), centred(theirs["ekfac"]),
    ]  # fmt: skip


def ceilings(world: Truth) -> list[Row]:
    """What noise of seeds lets perfect scores reach, where there are several seeds."""
    most = lds.ceiling(world.values[:, :, world.sides[1]])
    about = {"halves": len(world.masks), "seeds": world.values.shape[1]}
    pairs = [("lds_fixed", most.one), ("lds_avg", most.average)]
    return [row(world.case, OURS, "ceiling", m, v, None, options=about) for m, v in pairs if v is not None]


def differences(contest: Contest) -> list[Row]:
    """On the decoder, EK-FAC against what is cheap, and TrackStar without embeddings against that with all layers: over
    the same draws of halves and targets."""
    pairs = [("ekfac", other) for other in ("graddot", "gradcos", "trackstar", "bm25")]
    found = []
    for one, other in [*pairs, ("trackstar-linear", "trackstar")] if contest.world.case == "R3" else []:
        first, second = (contest.results.get((OURS, name), {}).get("lds_avg") for name in (one, other))
        if first and second:
            value, low, high = lds.difference(first, second)
            found.append(row("R3", OURS, f"{one}-minus-{other}", "difference", value, [low, high]))
    return found
