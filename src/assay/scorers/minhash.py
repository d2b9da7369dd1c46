"""Near copies of an earlier example."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import write_bytes
from assay.core.method import Batch, Bounds, Context, Count, NonNegative, Scorer
from assay.core.pool import Pool
from assay.core.spill import Spill
from assay.engine import local
from assay.numerics.shingles import Reader, mixed, offsets, sequences, written

# Documents that are read together, and those of one item of work; fewer than so many are not worth more processes.
ROWS, BLOCK, MANY = 1024, 1 << 14, 1 << 18
# A document of a band is compared with so many that stand first in it, and with so many just before it.
REACH = 4
# Pairs of documents whose words are in memory together.
PAIRS = 4096
# A domain that loses more than this, or one cluster with more of the pool than that, is worth a word.
LOST, LARGE = 0.5, 0.01
LOW = np.uint64(0xFFFFFFFF)


def curve(jaccard: Any, bands: int, rows: int) -> Any:
    """Probability that two documents meet in at least one band: 1 - (1 - s^r)^b.

    >>> [round(float(curve(s, 14, 8)), 3) for s in (0.7, 0.75, 0.8, 0.85)]
    [0.565, 0.772, 0.924, 0.988]
    """
    return 1 - (1 - np.asarray(jaccard, dtype=np.float64) ** rows) ** bands


class MinHash(Scorer):
    """Near copies by MinHash: 0 for the survivor of its cluster, minus the members before it for the others.

    Formula: s_i = -#{j in cluster(i) : j before i}; i, j are compared if any of b bands of r minima of hashed word
        n-grams is equal, which has probability 1 - (1 - J^r)^b, and joined if J(i, j) >= verify
    Reference: Broder 1997, doi:10.1109/SEQUEN.1997.666900; bands as in FineWeb, Penedo et al. 2024, arXiv:2406.17557
    Needs: rensa: pip install 'assay-data[text]'
    Note: words are those of the text in lower case without diacritics and punctuation, digits as 0 or, for pools whose
        texts differ in their numbers alone, as they are. A text of fewer than n words has one n-gram, of all its words;
        one without words is no copy. The order is that of ids, or first that of a column of numbers, `priority`, whose
        highest value stays. 'components' joins along chains; with 'star' an example goes only if it was compared with
        one that stays. A band of more than nine documents has each compared with the first four and the four before
        it. The column `size` counts the cluster's members, `cluster` numbers it (-1: none): as a filter, the first
        member that earlier filters left stays, also where the others are like the lost survivor alone. Files
        `near-*.npy` beside the Table hold the ids that are in clusters, and those of their survivors
    """

    column: str = "text"
    n: Count = 5
    digits: Literal["zero", "keep"] = "zero"
    bands: Count = 14
    rows: Count = 8
    verify: NonNegative = 0.0
    clusters: Literal["components", "star"] = "components"
    priority: str = ""
    seed: int = 1

    unit: ClassVar[str] = "minus near copies before"
    lookup: ClassVar[bool] = True
    group: ClassVar[str] = "cluster"

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"first": {"score": (0.0, None)}}

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("score", "size", "cluster")

    def init(self, context: Context) -> Path:
        if self.verify > 1:
            raise InputError(f"minhash: verify cannot be {self.verify:g}", why="no Jaccard index is above 1")
        pool, folder = context.pool, context.folder / "near"
        bands = Spill(folder, "bands", self.bands)
        blocks = range(-(-len(pool) // BLOCK))
        workers = context.workers if len(pool) >= MANY else 1
        short = sum(local.map(_block, _Job(self, pool, bands), blocks, workers=workers))
        rank = ranks(pool, self.priority)
        pairs = Spill(folder, "pairs")
        pairs.clear()
        met = (self._candidates(k, rank[rows]) for lane in range(self.bands) for k, rows in bands.sorted(lane))
        for index, packed in enumerate(met):
            pairs.write(index, packed[None], np.zeros(len(packed)))
        leaders, compared, joined = self._clusters(pairs, np.argsort(rank).astype(np.uint32), folder)
        before, size = standing(leaders)
        self._notes(context, rank, before, size, {"short": short, "compared": compared, "joined": joined})
        _save(context.folder, pool, rank, leaders, before, size)
        shutil.rmtree(folder)
        return context.folder

    def _candidates(self, keys: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Distinct pairs of documents of one band to compare: the rank of the later one times 2^32 plus the other's."""
        same = keys[1:] == keys[:-1]
        met = np.zeros(len(keys), dtype=bool)
        met[1:] = same
        met[:-1] |= same
        keys, rank = keys[met], rank[met].astype(np.uint64)
        order = np.lexsort((rank, keys))
        keys, rank = keys[order], rank[order]
        at = np.arange(len(keys))
        fresh = np.ones(len(keys), dtype=bool)
        fresh[1:] = keys[1:] != keys[:-1]
        start = np.maximum.accumulate(np.where(fresh, at, 0))
        place = at - start
        # Without verification every member joins the one before it, and no other comparison can add to that.
        reach = REACH if self.verify or self.clusters == "star" else 1
        chosen = []
        for step in range(1, reach + 1):
            late = np.flatnonzero(place >= step)
            chosen.append((rank[late] << np.uint64(32)) | rank[late - step])
        for first in range(reach if reach > 1 else 0):
            late = np.flatnonzero(place > first + reach)
            chosen.append((rank[late] << np.uint64(32)) | rank[start[late] + first])
        return np.concatenate(chosen)

    def _clusters(self, pairs: Spill, row: np.ndarray, folder: Path) -> tuple[np.ndarray, int, int]:
        """The survivor's rank for each rank; how many distinct pairs were compared, and how many were joined."""
        count = len(row)
        grow = _Components(count) if self.clusters == "components" else _Stars(count)
        compared = joined = 0
        sets = _Sets(folder) if self.verify else None
        for keys, _ in pairs.sorted(top=max(1, count) << 32):
            packed = _once(keys)
            late, early = packed >> np.uint64(32), packed & LOW
            if sets:
                parts = (slice(start, start + PAIRS) for start in range(0, len(packed), PAIRS))
                alike = [sets.jaccard(row[early[p]], row[late[p]]) >= self.verify for p in parts]
                kept = np.concatenate([np.zeros(0, dtype=bool), *alike])
                late, early = late[kept], early[kept]
            compared, joined = compared + len(packed), joined + len(late)
            grow.join(early, late)
        return grow.leaders(), compared, joined

    def _notes(
        self, context: Context, rank: np.ndarray, before: np.ndarray, size: np.ndarray, counts: dict[str, Any]
    ) -> None:
        copies, largest = int((before > 0).sum()), int(size.max(initial=1))
        recall = {f"{s:g}": round(float(curve(s, self.bands, self.rows)), 4) for s in (0.6, 0.7, 0.8, 0.9)}
        context.note(
            "minhash: near copies",
            f"{copies} of {len(rank)} examples; the largest cluster has {largest}; expected to be found at a Jaccard "
            f"index of " + ", ".join(f"{s}: {p:.1%}" for s, p in recall.items()),
            copies=copies, largest=largest, clusters=int(((size > 1) & (before == 0)).sum()), recall=recall, **counts,
        )  # fmt: skip
        if largest > max(100, LARGE * len(rank)):
            context.warn(
                f"minhash: one cluster has {largest} of {len(rank)} examples, perhaps by chains of near copies or a "
                "shared template: set verify = 0.7 or clusters = 'star'"
            )
        shares = _by_domain(context.pool, before[rank] > 0)
        if shares:
            said = ", ".join(f"{name} {lost / count:.1%} of {count}" for name, (lost, count) in shares.items())
            context.note("minhash: near copies by domain", said, domains={k: list(v) for k, v in shares.items()})
        emptied = [name for name, (lost, count) in shares.items() if lost > LOST * count]
        if emptied and len(shares) > 1:
            context.warn(f"minhash: more than half of these domains are near copies: {', '.join(emptied)}")

    def score(self, state: Path, batch: Batch) -> Any:
        ids = np.load(state / "near-ids.npy", mmap_mode="r")
        known = np.load(state / "near-clusters.npy", mmap_mode="r")
        found = np.tile(np.array([0.0, 1.0, -1.0]), (len(batch.ids), 1))
        where = np.minimum(np.searchsorted(ids, batch.ids), len(ids) - 1)
        here = np.flatnonzero(ids[where] == batch.ids)
        found[here] = known[:, where[here]].T * np.array([-1.0, 1.0, 1.0]) + 0.0  # no negative zero
        return found


# Signatures.


def signatures(hashes: np.ndarray, ends: np.ndarray, count: int, seed: int) -> np.ndarray:
    """MinHash of each set of 64-bit hashes, none of them empty: `[n, count]` uint32. `InputError` without rensa."""
    try:
        import rensa
    except ImportError as error:
        raise InputError(
            "minhash needs the package 'rensa'", why=str(error), fix="pip install 'assay-data[text]'"
        ) from error
    if len(ends) == 1:
        return np.zeros((0, count), dtype=np.uint32)
    library: Any = rensa  # compiled, without types
    made = library.RMinHash.digest_matrix_from_flat_token_hashes(hashes, ends.astype(np.uint64), count, seed)
    flat = chain.from_iterable(made.to_rows())
    return np.fromiter(flat, dtype=np.uint32, count=(len(ends) - 1) * count).reshape(-1, count)


def band_keys(minima: np.ndarray, bands: int) -> np.ndarray:
    """One 64-bit hash of each band's whole row of minima: `[bands, n]`."""
    parts = minima.reshape(len(minima), bands, -1).astype(np.uint64)
    keys = np.zeros(parts.shape[:2], dtype=np.uint64)
    for k in range(parts.shape[2]):
        keys = mixed(keys * np.uint64(0x9E3779B97F4A7C15) + parts[:, :, k] + np.uint64(1))
    return np.ascontiguousarray(keys.T)


@dataclass(frozen=True)
class _Job:
    method: MinHash
    pool: Pool
    bands: Spill


def _block(job: _Job, index: int) -> int:
    """Write the band keys of one block of documents, and their sets for verification; how many are short."""
    method, keys, rows, sets, counts, short = job.method, [], [], [], [], 0
    counted = job.bands.folder / f"short-{index:06d}"
    if job.bands.has(index) and counted.exists():
        return int(counted.read_text())
    reader, start = Reader(digits=method.digits == "keep"), index * BLOCK
    for part in job.pool.at(slice(start, start + BLOCK)).shards(ROWS):
        words, ends = reader.words([written(v) for v in part.column(method.column)])
        short += int(((np.diff(ends) > 0) & (np.diff(ends) < method.n)).sum())
        hashes, ends = sequences(words, ends, method.n, short=True)
        some = np.flatnonzero(np.diff(ends))
        minima = signatures(hashes, np.append(ends[some], ends[-1]), method.bands * method.rows, method.seed)
        keys.append(band_keys(minima, method.bands))
        rows.append(start + some)
        if method.verify:
            held, sizes = _distinct(hashes, ends)
            sets.append(held)
            counts.append(sizes)
        start += len(part)
    if method.verify:
        _write_sets(job.bands.folder, index, np.concatenate(sets), offsets(np.concatenate(counts)))
    write_bytes(counted, str(short).encode())
    job.bands.write(index, np.concatenate(keys, axis=1), np.concatenate(rows))
    return short


# Verification.


def _distinct(hashes: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sets: 32 bits of each distinct hash, sorted within its document; and their sizes `[n]`."""
    document = np.repeat(np.arange(len(ends) - 1, dtype=np.uint64), np.diff(ends))
    both = _once(np.sort((document << np.uint64(32)) | (hashes >> np.uint64(32))))
    return both.astype(np.uint32), np.bincount((both >> np.uint64(32)).astype(np.int64), minlength=len(ends) - 1)


def _once(ascending: np.ndarray) -> np.ndarray:
    """Each value once. (`np.unique` hashes first, which took seven times as long.)"""
    first = np.ones(len(ascending), dtype=bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return ascending[first]


def _write_sets(folder: Path, index: int, values: np.ndarray, ends: np.ndarray) -> None:
    write_bytes(folder / f"sets-{index:06d}.u32", values.tobytes())
    write_bytes(folder / f"ends-{index:06d}.i64", ends.tobytes())


class _Sets:
    """The sets of documents on disk: a read for each, and no file is ever held in memory."""

    def __init__(self, folder: Path) -> None:
        self.ends = [np.fromfile(path, dtype=np.int64) for path in sorted(folder.glob("ends-*.i64"))]
        self.paths = sorted(folder.glob("sets-*.u32"))

    def read(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The sets of these rows one after the other, and their sizes."""
        open_files: dict[int, int] = {}
        data, sizes = [], []
        try:
            for row in rows:
                block, at = divmod(row, BLOCK)
                if block not in open_files:
                    open_files[block] = os.open(self.paths[block], os.O_RDONLY)
                start, stop = int(self.ends[block][at]), int(self.ends[block][at + 1])
                data.append(os.pread(open_files[block], 4 * (stop - start), 4 * start))
                sizes.append(stop - start)
        finally:
            for file in open_files.values():
                os.close(file)
        return np.frombuffer(b"".join(data), dtype=np.uint32), np.array(sizes, dtype=np.int64)

    def jaccard(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """|A and B| / |A or B| for each pair of documents, from 32-bit hashes of their n-grams."""
        sides, sizes = zip(*(self.read(side.tolist()) for side in (rows, others)), strict=True)
        keyed = [
            (np.repeat(np.arange(len(rows), dtype=np.uint64), size) << np.uint64(32)) | side
            for side, size in zip(sides, sizes, strict=True)
        ]
        both = np.sort(np.concatenate(keyed), kind="stable")  # two ascending runs: merged
        twice = both[1:][both[1:] == both[:-1]] >> np.uint64(32)
        shared = np.bincount(twice.astype(np.int64), minlength=len(rows))
        return shared / np.maximum(sizes[0] + sizes[1] - shared, 1)


# Clusters.


def ranks(pool: Pool, priority: str) -> np.ndarray:
    """Where each row of the pool stands in the order in which copies survive, `[n]` uint32."""
    if len(pool) >= int(LOW):
        raise InputError(f"minhash: {len(pool)} examples are too many", fix="split the pool by domain or by source")
    first: list[np.ndarray] = []
    if priority:
        try:
            blocks = [np.array(s.column(priority), dtype=np.float64) for s in pool.shards(BLOCK)]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"minhash: column {priority!r} does not hold numbers", why=str(error),
                fix="name a column of numbers as priority, or none",
            ) from error  # fmt: skip
        values = np.concatenate(blocks)
        first = [-np.where(np.isnan(values), -np.inf, values)]
    order = np.lexsort((pool.ids, *first)) if first else np.argsort(pool.ids, kind="stable")
    rank = np.empty(len(pool), dtype=np.uint32)
    rank[order] = np.arange(len(pool), dtype=np.uint32)
    return rank


class _Components:
    """Documents joined along chains of pairs; the leader of each component is its lowest rank."""

    def __init__(self, count: int) -> None:
        self.labels = np.arange(count, dtype=np.int32)

    def join(self, early: np.ndarray, late: np.ndarray) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if len(early):
            # The graph has what these pairs touch, and no more. Labels are ranks of documents that label themselves.
            touched, ends = np.unique(self.labels[np.concatenate([early, late])], return_inverse=True)
            one, other = ends.reshape(2, -1)
            graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(len(touched), len(touched)))
            _, parts = connected_components(graph, directed=False)
            _, lowest = np.unique(parts, return_index=True)  # `touched` ascends: the first is the lowest
            self.labels[touched] = touched[lowest[parts]]
            self.labels = self.labels[self.labels]

    def leaders(self) -> np.ndarray:
        return self.labels


class _Stars:
    """Documents that were compared with an earlier one that stays go to the first such one."""

    def __init__(self, count: int) -> None:
        from array import array

        self.of = array("l", range(count))

    def join(self, early: np.ndarray, late: np.ndarray) -> None:
        """Pairs come in ascending order of the later document, then of the earlier: whoever is earlier is settled."""
        of = self.of
        for first, second in zip(early.tolist(), late.tolist(), strict=True):
            if of[second] == second and of[first] == first:
                of[second] = first

    def leaders(self) -> np.ndarray:
        return np.array(self.of, dtype=np.int64)


def standing(leaders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many members of its cluster stand before each document, by rank; and its cluster's size. `[n]`, `[n]`."""
    counts = np.bincount(leaders, minlength=len(leaders))
    size = counts[leaders].astype(np.uint32)
    before = np.zeros(len(leaders), dtype=np.uint32)
    members = np.flatnonzero(size > 1)
    order = members[np.argsort(leaders[members], kind="stable")]
    group = leaders[order]
    at, fresh = np.arange(len(order)), np.ones(len(order), dtype=bool)
    fresh[1:] = group[1:] != group[:-1]
    before[order] = at - np.maximum.accumulate(np.where(fresh, at, 0))
    return before, size


def _save(
    folder: Path, pool: Pool, rank: np.ndarray, leaders: np.ndarray, before: np.ndarray, size: np.ndarray
) -> None:
    """What `score` reads, sorted by id: members of clusters, their survivors, members before them, members in all."""
    row = np.argsort(rank)
    members = np.flatnonzero(size > 1)
    members = members if len(members) or not len(size) else np.zeros(1, dtype=np.int64)  # never empty
    ids = pool.ids[row[members]]
    order = np.argsort(ids, kind="stable")
    members = members[order]
    np.save(folder / "near-ids.npy", ids[order])
    np.save(folder / "near-survivors.npy", pool.ids[row[leaders[members]]])
    number = np.where(size[members] > 1, leaders[members].astype(np.int64), -1)
    np.save(folder / "near-clusters.npy", np.stack([before[members], size[members], number]))


def _by_domain(pool: Pool, copy: np.ndarray) -> dict[str, tuple[int, int]]:
    """Near copies and examples of each domain; nothing where the pool names none."""
    found: dict[str, tuple[int, int]] = {}
    if "domain" not in pool.columns:
        return found
    start = 0
    for part in pool.shards(BLOCK):
        names, which = np.unique(part.domains(), return_inverse=True)
        lost = np.bincount(which, weights=copy[start : start + len(part)], minlength=len(names))
        for name, gone, count in zip(names.tolist(), lost.tolist(), np.bincount(which).tolist(), strict=True):
            before = found.get(name, (0, 0))
            found[name] = before[0] + int(gone), before[1] + count
        start += len(part)
    return dict(sorted(found.items()))
