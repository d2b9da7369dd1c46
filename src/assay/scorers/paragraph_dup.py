"""Text that earlier examples have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import write_bytes
from assay.core.method import Batch, Bounds, Context, Count, Positive, Scorer
from assay.core.pool import Pool
from assay.engine import local
from assay.numerics.bloom import Bloom
from assay.numerics.shingles import Reader, offsets, sequences, whole, written

# Documents that are read together, those of one item of work, and those that are asked of the filter together; fewer
# than so many are not worth more processes.
ROWS, BLOCK, STREAM, MANY = 1024, 1 << 14, 1 << 11, 1 << 18


class ParagraphDup(Scorer):
    """Share of an example's word n-grams, or of its paragraphs, that an earlier example has.

    Formula: s_i = -#{g in i : g in j for some j before i} / #{g in i}, g the n-grams of each paragraph, or the
        paragraphs; by a Bloom filter of m = -N ln p / (ln 2)^2 bits and k = (m / N) ln 2 hash functions for all N
    Reference: BFF of DataComp-LM, Li et al. 2024, arXiv:2406.11794; Bloom 1970, doi:10.1145/362686.362692
    Note: earlier is by id, so files may be read in any order. A paragraph is a line; words are those of the text in
        lower case without diacritics and punctuation. A paragraph of fewer than n words has no n-grams,
        and an example without any scores 0. Everything is remembered, also of examples that a preset drops. A new
        n-gram looks seen with probability p for the last example, and less for those before it. Memory: 1.2 bytes for
        each n-gram of the pool at p = .01; on disk 8 while it runs. The column `parts` counts n-grams or paragraphs
    """

    column: str = "text"
    of: Literal["ngrams", "paragraphs"] = "ngrams"
    n: Count = 13
    false_positives: Positive = 0.01

    unit: ClassVar[str] = "minus share seen before"
    lookup: ClassVar[bool] = True

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"dclm": {"score": (-0.8, None)}}

    def columns(self, state: Any) -> tuple[str, ...]:
        return ("score", "parts")

    def init(self, context: Context) -> Path:
        if self.false_positives >= 1:
            raise InputError(
                f"paragraph_dup: false_positives cannot be {self.false_positives:g}", why="it is a probability",
                fix="give a number below 1",
            )  # fmt: skip
        pool, folder = context.pool, context.folder / "seen"
        folder.mkdir(exist_ok=True)
        order = np.argsort(pool.ids, kind="stable")
        rank = np.empty(len(pool), dtype=np.int64)
        rank[order] = np.arange(len(pool))
        job = _Job(self, pool, rank, folder)
        workers = context.workers if len(pool) >= MANY else 1
        total = sum(local.map(_block, job, range(-(-len(pool) // BLOCK)), workers=workers))
        bloom = Bloom(total, self.false_positives)
        shares, parts = np.zeros(len(pool)), np.zeros(len(pool), dtype=np.uint32)
        for start, hashes, ends in _Blocks(folder, len(pool)).stream():
            counts = np.diff(ends)
            owner = np.repeat(np.arange(len(counts)), counts)
            hits = np.bincount(owner[seen(bloom, hashes, owner)], minlength=len(counts))
            shares[start : start + len(counts)] = hits / np.maximum(counts, 1)
            parts[start : start + len(counts)] = counts
        rate = bloom.fill**bloom.functions
        context.note(
            "paragraph_dup: Bloom filter",
            f"{total} {self.of}, {bloom.size} bits, {bloom.functions} hash functions, {bloom.fill:.1%} of the bits set "
            f"at the end: {rate:.2%} of new {self.of} then look seen",
            items=total, bits=bloom.size, functions=bloom.functions, fill=bloom.fill, rate=rate,
        )  # fmt: skip
        np.save(context.folder / "seen-ids.npy", pool.ids[order])
        np.save(context.folder / "seen.npy", np.stack([0.0 - shares, parts]))
        shutil.rmtree(folder)
        return context.folder

    def score(self, state: Path, batch: Batch) -> Any:
        ids = np.load(state / "seen-ids.npy", mmap_mode="r")
        return np.load(state / "seen.npy", mmap_mode="r")[:, np.searchsorted(ids, batch.ids)].T

    def parts(self, reader: Reader, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the n-grams or paragraphs of some texts, and where each text's begin and end."""
        split = [text.splitlines() for text in texts]
        lines = offsets(np.array([len(s) for s in split]))
        words, ends = reader.words([line for s in split for line in s])
        if self.of == "ngrams":
            hashes, ends = sequences(words, ends, self.n, short=False)
            return hashes, ends[lines]
        some = np.diff(ends) > 0
        return whole(words, ends)[some], offsets(some)[lines]


def seen(bloom: Bloom, hashes: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Which hashes an earlier document has: one that the filter knows, or one with a lower number here. All are added.

    `owner` `[g]` ascends: the document of each hash.
    """
    known = bloom.among(hashes)
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    bloom.add(distinct)
    return known | (owner[first][which] < owner)


@dataclass(frozen=True)
class _Job:
    method: ParagraphDup
    pool: Pool
    rank: np.ndarray
    folder: Path


def _block(job: _Job, index: int) -> int:
    """Write the hashes of one block of documents in order of rank, and where each begins; how many there are."""
    reader, start = Reader(digits=True), index * BLOCK
    stop = min(len(job.pool), start + BLOCK)
    found = []
    for part in job.pool.at(slice(start, stop)).shards(ROWS):
        texts = [written(v) for v in part.column(job.method.column)]
        hashes, ends = job.method.parts(reader, texts)
        found += [hashes[a:b].tobytes() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    order = np.argsort(job.rank[start:stop])
    data = [found[i] for i in order.tolist()]
    ends = offsets(np.array([len(d) for d in data]))
    write_bytes(job.folder / f"hashes-{index:06d}.u64", b"".join(data))
    write_bytes(job.folder / f"about-{index:06d}.i64", np.concatenate([job.rank[start:stop][order], ends]).tobytes())
    return int(ends[-1]) // 8


class _Blocks:
    """What `_block` left, read in order of rank."""

    def __init__(self, folder: Path, count: int) -> None:
        self.count, self.paths = count, sorted(folder.glob("hashes-*.u64"))
        self.about = sorted(folder.glob("about-*.i64"))

    def stream(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First rank, hashes and ends of `STREAM` documents at a time, by rank."""
        held = [np.fromfile(path, dtype=np.int64) for path in self.about]
        ranks, ends = [h[: len(h) // 2] for h in held], [h[len(h) // 2 :] for h in held]
        for start in range(0, self.count, STREAM):
            stop = min(self.count, start + STREAM)
            data: list[bytes] = [b""] * (stop - start)
            for path, order, end in zip(self.paths, ranks, ends, strict=True):
                low, high = np.searchsorted(order, [start, stop]).tolist()
                raw = _read(path, int(end[low]), int(end[high]))
                cuts = (end[low : high + 1] - end[low]).tolist()
                for place, a, b in zip((order[low:high] - start).tolist(), cuts[:-1], cuts[1:], strict=True):
                    data[place] = raw[a:b]
            counts = np.array([len(d) // 8 for d in data])
            yield start, np.frombuffer(b"".join(data), dtype=np.uint64), offsets(counts)


def _read(path: Path, start: int, stop: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, stop - start, start)
    finally:
        os.close(file)
