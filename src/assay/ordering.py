"""Orderings: functions Selection -> Selection that keep every visit and decide only when each one comes.

A Selection whose ids repeat is all visits of a training run (`repeated`); the trainer reads an ordered one as it
stands. Everything is keyed by id and by which visit of its example it is, so that the order of the pool never matters.
Utilities and losses are arrays aligned with the selection's rows; higher utility = better.
"""

from __future__ import annotations

import dataclasses
import inspect
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from assay.core.errors import InputError, nearest
from assay.core.keys import digest, hash_ids
from assay.core.selection import Selection
from assay.core.table import Table

if TYPE_CHECKING:
    from assay.train.recipe import Recipe


def repeated(selection: Selection, passes: int) -> Selection:
    """All visits of `passes` times through, one pass after the other."""
    if passes < 1:
        raise InputError(f"{passes} passes", fix="give one or more")
    ids, weights = np.tile(selection.ids, passes), np.tile(selection.weights, passes)
    return dataclasses.replace(selection, ids=ids, weights=weights)


def visits(ids: np.ndarray) -> np.ndarray:
    """Which visit of its example each row is: 0 for the first row with its id.

    >>> visits(np.array([b"a", b"b", b"a"])).tolist()
    [0, 0, 1]
    """
    order = np.argsort(ids, kind="stable")
    same = ids[order]
    starts = np.flatnonzero(np.r_[True, same[1:] != same[:-1]])
    found = np.empty(len(ids), dtype=np.int64)
    found[order] = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    return found


def shuffled(selection: Selection, *, seed: int = 0) -> Selection:
    """The trainer's own order at this seed: pass after pass, each in an order keyed by (seed, pass, id)."""
    passes = visits(selection.ids)
    keys = np.zeros(len(selection), dtype=np.uint64)
    for number in np.unique(passes).tolist():
        rows = np.flatnonzero(passes == number)
        keys[rows] = hash_ids(selection.ids[rows], "order", seed, number)
    return _at(selection, np.lexsort((selection.ids, keys, passes)))


def reversed_(selection: Selection) -> Selection:
    """From the end to the beginning."""
    return _at(selection, np.arange(len(selection))[::-1])


def curriculum(selection: Selection, utility: np.ndarray, *, rising: bool = True, seed: int = 0) -> Selection:
    """By utility, the best at the end (or, not `rising`, at the beginning); ties fall by the key."""
    values = _column(selection, utility)
    return _at(selection, np.lexsort((_keys(selection, seed), values if rising else -values)))


def loss_sorted(selection: Selection, losses: np.ndarray, *, rising: bool = True, seed: int = 0) -> Selection:
    """By the loss of a scoring model, the easy ones at the beginning (or, not `rising`, at the end)."""
    return curriculum(selection, losses, rising=rising, seed=seed)


def anneal(
    selection: Selection, utility: np.ndarray, sizes: np.ndarray, *, share: float = 0.3, seed: int = 0
) -> Selection:
    """The best last: the visits of highest utility that hold `share` of all terms come at the end, the others before;
    within each part the order is random."""
    if not 0 < share < 1:
        raise InputError(f"share = {share}", why="a part of the visits is kept for the end", fix="give 0 < share < 1")
    values, keys = _column(selection, utility), _keys(selection, seed)
    best = np.lexsort((keys, -values))
    late = np.zeros(len(selection), dtype=bool)
    late[best[np.cumsum(sizes[best]) <= share * sizes.sum()]] = True
    return _at(selection, np.lexsort((keys, late)))


def best_phase(
    selection: Selection, utility: np.ndarray, sizes: np.ndarray, *, moved: float = 1 / 3, seed: int = 0
) -> Selection:
    """Each visit in the phase of training in which its utility is highest, as far as there is room.

    `utility` [n, P] by phase. Phases hold equal terms: of all ways to fill them, the sum of utilities over visits is
    the greatest; where sizes are equal, exactly so. Where they are not, at most P visits that would have to be divided
    go where most room is left, and no phase is overfull by a whole one. Within a phase the order is random.
    A utility is a derivative, and moving all visits of an example at once is no small step: with `moved` < 1 at least
    floor((1 - moved) c / P) of its c visits stay in each phase. Moving a third gained in both cases that were judged,
    moving all gained more in one of them and lost in the other (benchmarks/parts/ordering.py).
    """
    if not 0 < moved <= 1:
        raise InputError(f"moved = {moved}", why="it is a share of the visits", fix="give 0 < moved <= 1")
    if utility.ndim != 2 or utility.shape[1] < 2 or len(utility) != len(selection):
        raise InputError(
            f"utilities of shape {utility.shape} have no phases", why=f"there are {len(selection)} visits",
            fix="give a column for each phase: {name = 'metagrad', phases = 4}",
        )  # fmt: skip
    keys = _keys(selection, seed)
    canonical = np.lexsort((keys, selection.ids))
    phase = np.empty(len(selection), dtype=np.int64)
    phase[canonical] = _assigned(selection.ids[canonical], _finite(utility)[canonical], sizes[canonical], moved)
    return _at(selection, np.lexsort((keys, phase)), phases=utility.shape[1])


def _assigned(ids: np.ndarray, utility: np.ndarray, sizes: np.ndarray, moved: float) -> np.ndarray:
    """The phase of each visit, `[n]`; visits of one example stand together.

    A transport problem: x_ip visits of example i in phase p, sum_p x_ip = c_i, sum_i n_i x_ip <= room_p. Its vertices
    are whole where all n_i are equal, and have fewer than P examples that are divided where they are not.
    """
    firsts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    counts, own, size = np.diff(np.r_[firsts, len(ids)]), utility[firsts], sizes[firsts]
    stay = np.floor((1 - moved) * counts / utility.shape[1] + 1e-9)[:, None].repeat(utility.shape[1], axis=1)
    rooms = _rooms(sizes, utility.shape[1]) - size @ stay
    whole = stay + _transport(own, counts - stay.sum(axis=1), size, rooms)
    taken = np.floor(whole + 1e-6).astype(np.int64)
    room = sizes.sum() / utility.shape[1] - size @ taken
    left = counts - taken.sum(axis=1)
    for i in np.lexsort((np.arange(len(left)), -size)).tolist():
        for _ in range(int(left[i])):
            place = int(np.argmax(room))
            taken[i, place] += 1
            room[place] -= size[i]
    return np.concatenate([np.repeat(np.arange(utility.shape[1]), row) for row in taken])


def _rooms(sizes: np.ndarray, phases: int) -> np.ndarray:
    """Terms of each phase; whole visits where all are of one size."""
    unit = int(sizes[0]) if (sizes == sizes[0]).all() else 0
    if not unit:
        return np.full(phases, sizes.sum() / phases)
    ends = np.array([len(sizes) * p // phases for p in range(phases + 1)])
    return np.diff(ends) * float(unit)


def _transport(utility: np.ndarray, counts: np.ndarray, sizes: np.ndarray, rooms: np.ndarray) -> np.ndarray:
    from scipy import sparse
    from scipy.optimize import linprog

    n, phases = utility.shape
    columns = np.arange(n * phases)
    each = sparse.csr_array((np.ones(n * phases), (columns // phases, columns)), shape=(n, n * phases))
    room = sparse.csr_array((np.repeat(sizes, phases), (columns % phases, columns)), shape=(phases, n * phases))
    scale = float(np.abs(utility).max()) or 1.0
    # The interior point method crosses over to a vertex, and is several times faster here than the simplex method.
    found = linprog(
        -(utility / scale).ravel(), A_ub=room, b_ub=rooms, A_eq=each, b_eq=counts, bounds=(0, None), method="highs-ipm"
    )
    assert found.status == 0, found.message
    return found.x.reshape(n, phases)


def fitted(
    selection: Selection, recipe: Recipe, sizes: Callable[[np.ndarray], np.ndarray],
    order: Callable[[Selection], Selection],
) -> Selection:  # fmt: skip
    """The visits that training on a selection makes, in an order, so that the last of them is in training's last step.

    They are the very visits of the training that is not ordered, where examples are of equal size. Where they are not,
    steps fill otherwise in another order: a few more visits are added, or the first ones of the order fall out (few,
    that is, where a step holds many examples), and what room is left in the last step is filled by the first ones.
    `sizes` gives the terms of ids.
    """
    from assay.train.loop import steps

    terms, count = sizes(selection.ids), recipe.steps
    for length in range(count, 2 * count + 1):
        longer = recipe.model_copy(update={"steps": length})
        rows = np.concatenate(list(islice(steps(longer, selection, terms), length)))
        made = order(dataclasses.replace(selection, ids=selection.ids[rows], weights=selection.weights[rows]))
        own = sizes(made.ids)
        if _filled(own, recipe.terms_per_step) >= count:
            # Without its first visit a sequence fills as many steps as with it, or one less: some suffix fills `count`.
            first = bisect_left(range(len(own)), True, key=lambda k: _filled(own[k:], recipe.terms_per_step) <= count)
            return dataclasses.replace(made, ids=made.ids[first:], weights=made.weights[first:])
    raise AssertionError("no order of twice the visits fills half the steps")


def _filled(sizes: np.ndarray, terms: int) -> int:
    """How many steps a sequence of visits fills or begins, as the trainer fills them."""
    count = filled = 0
    for size in sizes.tolist():
        if not count or filled + size > terms:
            count, filled = count + 1, 0
        filled += size
    return count


def _at(selection: Selection, order: np.ndarray, **about: Any) -> Selection:
    meta = {**selection.meta, **about}
    return dataclasses.replace(
        selection, ids=selection.ids[order], weights=selection.weights[order], ordered=True, meta=meta
    )


def _keys(selection: Selection, seed: int) -> np.ndarray:
    """A rank for each visit, by a hash of its id and which visit it is; no two are equal."""
    passes = visits(selection.ids)
    keys = np.zeros(len(selection), dtype=np.uint64)
    for number in np.unique(passes).tolist():
        rows = np.flatnonzero(passes == number)
        keys[rows] = hash_ids(selection.ids[rows], "visit", seed, number)
    rank = np.empty(len(selection), dtype=np.int64)
    rank[np.lexsort((passes, selection.ids, keys))] = np.arange(len(selection))
    return rank


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("an order by NaN or infinity", why="a rank needs numbers", fix="mend the scorer")
    return values


def _column(selection: Selection, values: np.ndarray) -> np.ndarray:
    values = _finite(values)
    if values.shape != (len(selection),):
        raise InputError(f"values of shape {values.shape} for {len(selection)} visits", fix="give one for each")
    return values


Needs = Literal["nothing", "utility", "phases", "loss"]
# By the name that a study gives, and what each reads.
ORDERS: Mapping[str, tuple[Callable[..., Selection], Needs]] = {
    "shuffled": (shuffled, "nothing"), "reversed": (reversed_, "nothing"), "curriculum": (curriculum, "utility"),
    "anneal": (anneal, "utility"), "best_phase": (best_phase, "phases"), "loss_sorted": (loss_sorted, "loss"),
}  # fmt: skip


def parse(order: Any) -> list[tuple[str, dict[str, Any]]]:
    """What a study says: a name, a table with a name and options, or a list of these, applied one after the other.

    Raises `InputError` for a name or an option that there is not.
    """
    found = []
    for one in order if isinstance(order, list | tuple) else [order]:
        table = {"name": one} if isinstance(one, str) else one
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise InputError(f"not an order: {one!r}", where="order", fix="order = {name = 'anneal', share = 0.3}")
        name, options = table["name"], {k: v for k, v in table.items() if k != "name"}
        if name not in ORDERS:
            raise InputError(f"no order called {name!r}", where="order", fix=nearest(name, list(ORDERS)))
        known = inspect.signature(ORDERS[name][0]).parameters
        known = {k: p.default for k, p in known.items() if p.kind is p.KEYWORD_ONLY}
        for key, value in options.items():
            if key not in known:
                raise InputError(f"{name} has no option {key!r}", where="order", fix=nearest(key, list(known)))
            kinds = (int, float) if isinstance(known[key], float) else (type(known[key]),)
            if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(known[key], bool):
                raise InputError(f"{name}: {key} cannot be {value!r}", where="order", fix=f"such as {known[key]!r}")
        found.append((name, options))
    return found


def ordered(
    order: Any, selection: Selection, scores: Table, sizes: Table, losses: Callable[[], Table] | None = None, *,
    seed: int = 0,
) -> Selection:  # fmt: skip
    """The selection after all orders of a study, read from the arm's own scores, and from the scoring model's losses
    where an order asks for them; `sizes` has the terms of each id.

    What an order leaves to chance is keyed by `seed`, the one that is trained at; by both where the study gives a seed
    of its own, which then names another draw and not one draw for all.
    """
    for name, options in parse(order):
        function, needs = ORDERS[name]
        given: list[np.ndarray] = []
        if needs == "utility":
            given = [scores.align(selection.ids).values[:, 0].astype(np.float64)]
        elif needs == "phases":
            columns = [c for c in scores.columns if c.startswith("phase ")]
            given = [scores.align(selection.ids).values[:, [scores.columns.index(c) for c in columns]]]
        elif needs == "loss":
            if losses is None:
                raise InputError("there is no scoring model", where="order = loss_sorted", fix="use a model-aware arm")
            given = [losses().align(selection.ids).values[:, 0].astype(np.float64)]
        if name in ("anneal", "best_phase"):
            given.append(sizes.align(selection.ids).values[:, 0])
        if "seed" in inspect.signature(function).parameters:
            own = options.get("seed", 0)
            options = options | {"seed": int(digest("order", own, seed)[:8], 16) if own else seed}
        selection = function(selection, *given, **options)
    return selection
