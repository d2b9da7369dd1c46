"""Other libraries at the same task: projected gradients of each document, from a file of text to a file of features.

    cd benchmarks; python -m parts.peers [--peers PYTHON] [--documents N] [--threads N] [--quick]

Each run is a process of its own, timed whole: imports, model, tokens, gradients and writing. All have the same model,
documents and tokens (see world.py), 32-bit floats and the same number of threads. Every contestant takes the linear
layers' weights, without the head, which bergson's index never has. All documents are run; nothing is extrapolated.

Settings were chosen on 1000 documents, one run each, of batches of 1024, 2048 and 4096 tokens (bergson), 8 and 16
documents (dattri; 16 and 32 on 2000) and 8, 16, 32 and 64 documents (traker). What favours or hinders a peer is said
in the `note` of its row.

One thread is the default because threads that wait for each other slow down many times over when anything else runs
on the machine. On two idle cores two threads took bergson from 16.3 to 11.6 s; two processes (16.4 s) gained nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .world import World, world

PYTHON = Path(__file__).parents[2] / ".venv-peers/bin/python"
SCRIPTS = Path(__file__).parent / "peer_scripts"
TRAK_DIMENSIONS = 512
BLOCK = 4096  # rows of features looked at together

Row = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """`command(world, out)` is what the peers' python is given; `read(out)` maps the features it left in `out`."""

    name: str
    module: str
    command: Callable[[World, Path], list[str]]
    read: Callable[[Path], np.ndarray]
    note: str
    environment: tuple[tuple[str, str], ...] = ()


def _bergson(place: World, out: Path) -> list[str]:
    return [
        "-m", "bergson", "build", str(out / "index"), "--model", str(place.model), "--dataset", str(place.documents),
        "--truncation", "--token_batch_size", "2048", "--projection_dim", "16", "--precision", "fp32",
    ]  # fmt: skip


def _index(out: Path) -> np.ndarray:
    about = json.loads((out / "index" / "info.json").read_text())
    shape = about["num_grads"], sum(about["grad_sizes"].values())
    return np.memmap(out / "index" / "gradients.bin", dtype=about["base_dtype"], mode="r", shape=shape)


def _script(name: str, dim: int, batch: int) -> Callable[[World, Path], list[str]]:
    def command(place: World, out: Path) -> list[str]:
        paths = [str(path) for path in (SCRIPTS / name, place.model, place.documents, out)]
        return [*paths, "--dim", str(dim), "--batch", str(batch)]

    return command


def _features(out: Path) -> np.ndarray:
    return np.load(out / "features.npy", mmap_mode="r")


PEERS = (
    Peer("bergson", "bergson", _bergson, _index, "16 x 16 numbers a layer"),
    Peer(
        "dattri",
        "dattri",
        _script("run_dattri.py", 256, 16),
        _features,
        "LoGra, 16 x 16 numbers a layer; without torch.compile, with which 2000 documents took 37 s, not 29",
        (("TORCHDYNAMO_DISABLE", "1"),),
    ),
    Peer(
        "traker",
        "trak",
        _script("run_traker.py", TRAK_DIMENSIONS, 64),
        _features,
        f"{TRAK_DIMENSIONS} numbers in all, which favours it; features are not finalized, which favours it too",
    ),
)


def interpreter(option: Path | None = None) -> Path:
    """The peers' python: the option, else ASSAY_PEERS, else PYTHON. Its link is kept: it is what makes it theirs."""
    return Path(option or os.environ.get("ASSAY_PEERS") or PYTHON).absolute()


def rows(
    quick: bool, documents: int, python: Path | None = None, place: World | None = None, threads: int = 1
) -> list[Row]:
    """Tokens a second of each peer that is installed, in the long form of core.py; one turn each if quick, else three.

    `place` is the world of the caller's own runs, if it has one of that many documents.
    """
    chosen = interpreter(python)
    present = {peer: held for peer in PEERS if (held := version(chosen, peer))}
    if not present:
        return []
    with tempfile.TemporaryDirectory(prefix="assay-peers-") as folder:
        place = place or world(Path(folder, "world"), documents)
        spent: dict[str, list[float]] = {peer.name: [] for peer in present}
        for turn in range(1 if quick else 3):
            for peer in present:
                spent[peer.name].append(_run(chosen, peer, place, Path(folder, f"{peer.name}-{turn}"), threads))
    return [_row(peer, version, place, np.array(spent[peer.name]), threads) for peer, version in present.items()]


def _row(peer: Peer, version: str, place: World, seconds: np.ndarray, threads: int) -> Row:
    low, middle, high = (float(x) for x in np.percentile(place.tokens / seconds, [10, 50, 90]))
    return {
        "bench": "gradients", "case": place.case, "tool": f"{peer.name} {version}", "method": "features-end-to-end",
        "metric": "tokens_per_second", "value": middle, "ci": [low, high] if len(seconds) > 1 else None,
        "seconds": float(seconds.sum()), "documents": len(place.lengths), "threads": threads, "note": peer.note,
    }  # fmt: skip


def version(python: Path, peer: Peer) -> str | None:
    """The peer's version, or None and a line on stderr. It is imported: its files are in memory when it is timed."""
    code = f"import importlib.metadata as m, {peer.module}; print(m.version({peer.name!r}))"
    if not python.exists():
        print(f"{peer.name} is left out: there is no {python}; see requirements-peers.txt", file=sys.stderr)
        return None
    around = environment(peer, Path(os.devnull), 1)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=around)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{peer.name} is left out: {python} cannot import it: {why}", file=sys.stderr)
        return None
    return done.stdout.split()[-1]


def environment(peer: Peer, cache: Path, threads: int) -> dict[str, str]:
    """So many threads, no network, and caches of its own, so that nothing is left over from an earlier run."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    fixed = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    fixed |= {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return kept | fixed | dict(peer.environment)


def _run(python: Path, peer: Peer, place: World, out: Path, threads: int) -> float:
    """Wall-clock seconds of one whole process whose features were found to be right."""
    out.mkdir()
    command = [str(python), *peer.command(place, out)]
    around = environment(peer, out / "cache", threads)
    with open(out / "log", "w+") as log:
        start = time.perf_counter()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=around, cwd=out).returncode
        seconds = time.perf_counter() - start
        log.seek(0)
        if code:
            raise RuntimeError(f"{peer.name} ended with {code}: {' '.join(command)}\n{log.read()[-2000:]}")
    check(peer.name, peer.read(out), len(place.lengths))
    return seconds


def check(name: str, features: np.ndarray, documents: int) -> None:
    """A row for each document, all finite, none zero: a tool that did less than the task is not timed."""
    if len(features) != documents:
        raise RuntimeError(f"{name} wrote {len(features)} rows for {documents} documents")
    for start in range(0, documents, BLOCK):
        norms = np.linalg.norm(features[start : start + BLOCK], axis=1)
        if not np.isfinite(norms).all() or not norms.all():
            raise RuntimeError(f"{name} wrote rows that are zero or not finite")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", type=Path, help="python of their environment (or ASSAY_PEERS)")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one turn each, not three")
    chosen = parser.parse_args()
    found = rows(chosen.quick, chosen.documents, chosen.peers, threads=chosen.threads)
    print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
