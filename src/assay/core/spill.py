"""`Spill`: pairs of numbers sorted on disk, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Pairs that are in memory together: 16 bytes each, and as much again to sort them.
MOST = 1 << 18


class Spill:
    """Pairs (key, value) of 64-bit numbers in several lanes; a lane is read in order of its keys.

    Each `write` leaves one sorted run, in a file of its own that appears whole or not at all, so processes may write
    side by side and a run that goes on after a kill finds what was written. `sorted` reads a lane range by range of
    the keys, about `MOST` pairs at a time: keys should be spread evenly below `top`.
    """

    def __init__(self, folder: Path, name: str, lanes: int = 1) -> None:
        self.folder, self.name, self.lanes = folder, name, lanes
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:06d}.npy"

    def has(self, index: int) -> bool:
        return self.path(index).exists()

    def write(self, index: int, keys: np.ndarray, values: np.ndarray) -> None:
        """One run of each lane: `keys` `[lanes, m]`, and their values `[m]`, the same in every lane."""
        order = np.argsort(keys, axis=1, kind="stable")
        run = np.stack([np.take_along_axis(keys, order, axis=1), values.astype(np.uint64)[order]], axis=1)
        aside = self.path(index).with_suffix(f".{os.getpid()}.tmp")
        with open(aside, "wb") as file:
            np.save(file, run)
        os.replace(aside, self.path(index))

    def runs(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}-*.npy"))

    def sorted(self, lane: int = 0, top: int = 1 << 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys in ascending order and their values, block by block; equal keys are never in two blocks."""
        runs = self.runs()
        total = sum(np.load(path, mmap_mode="r").shape[2] for path in runs)
        parts = max(1, -(-total // MOST))
        bounds = np.array([top * p // parts for p in range(1, parts)], dtype=np.uint64)
        # Where each range begins in each run: found once, so that a block reads nothing but itself.
        cuts = [self._cuts(path, lane, bounds) for path in runs]
        for part in range(parts):
            blocks = [_read(path, lane, cut[part], cut[part + 1]) for path, cut in zip(runs, cuts, strict=True)]
            keys, values = np.concatenate(blocks, axis=1) if blocks else np.zeros((2, 0), dtype=np.uint64)
            order = np.argsort(keys, kind="stable")
            yield keys[order], values[order]

    def _cuts(self, path: Path, lane: int, bounds: np.ndarray) -> np.ndarray:
        keys = np.load(path, mmap_mode="r")[lane, 0]
        return np.concatenate([[0], np.searchsorted(keys, bounds), [len(keys)]]).astype(np.int64)

    def clear(self) -> None:
        for path in self.runs():
            path.unlink()


def _read(path: Path, lane: int, start: int, stop: int) -> np.ndarray:
    """Pairs `[2, m]` of one run; the file is mapped for no longer than this takes."""
    return np.array(np.load(path, mmap_mode="r")[lane, :, start:stop])
