"""`Run`: a directory that says all about how it was made, continues when killed, and replays itself."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from assay.core.errors import InputError
from assay.core.keys import digest, digest_sources, write_json

FORMAT = 1
PACKAGE = Path(__file__).parents[1]


class Ledger:
    """What a step costs: wall and CPU seconds of the process tree, floating-point operations, peak memory."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.flops = 0.0

    def spent(self, flops: float) -> None:
        self.flops += float(flops)


class Run:
    """A study's directory. `step` is its one verb: compute once, keep by the hash of everything that went in.

    study.json        the resolved study, and the format of this directory
    environment.json  versions and machine
    command.json      the command line that made it, and makes it go on
    steps/<name>-<key>/   results; `<name>-<key>.part` while they are made
    result.json       written last, with the report
    DONE              the run is complete

    Runs that share a `store` have their steps there, not below their own directories: what one of them computed, the
    next one finds.
    """

    def __init__(self, path: Path, store: Path | None = None) -> None:
        self.path, self.store = path, store
        self.steps = (store or path) / "steps"
        self.ledger: list[dict[str, Any]] = []
        self.used: list[str] = []
        self._nested: list[dict[str, float]] = []
        # An edit of the trainer, the readers or a library's new version makes stored results stale.
        self._code = [digest_sources(*(PACKAGE / p for p in ("core", "data", "numerics", "train"))), libraries()]
        self._locks: list[Any] = []

    @property
    def code(self) -> str:
        """Hash of the code and of the libraries' versions that stored results depend on."""
        return digest(self._code)

    @classmethod
    def open(
        cls, path: Path, study: dict[str, Any], *, replace: bool = False, command: str = "", store: Path | None = None
    ) -> Run:
        """Create the directory, or continue the run of the same study in it.

        Raises `InputError` when it holds another study (both sides of each difference are printed), another format,
        something that is no run, or cannot be written.
        """
        run = cls(path, store)
        try:
            for folder in (path, *((store,) if store else ())):
                folder.mkdir(parents=True, exist_ok=True)
            (path / ".probe").write_text("")
            (path / ".probe").unlink()
        except OSError as error:
            blocked = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
            raise InputError(
                "the output directory cannot be written", where=path,
                why=f"{blocked} is a file" if blocked else error.strerror or str(error), fix="choose another --out",
            ) from error  # fmt: skip
        try:
            for folder in (path, *((store,) if store else ())):
                run._acquire(folder)
            run._begin(study, replace)
            if command:
                write_json(path / "command.json", {"command": command, "folder": os.getcwd()})
        except BaseException:
            run.close()
            raise
        return run

    def _begin(self, study: dict[str, Any], replace: bool) -> None:
        known = self.path / "study.json"
        if known.exists():
            self._compare(known, study, replace)
            if json.loads(known.read_text(encoding="utf-8"))["study"] != json.loads(json.dumps(study)):
                for old in ("result.json", "report.html"):
                    (self.path / old).unlink(missing_ok=True)
        else:
            others = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            if others:
                why = f"it has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} and no study.json"
                raise InputError(
                    "the output directory holds something else", where=self.path, why=why,
                    fix="choose an empty or new --out",
                )  # fmt: skip
        (self.path / "DONE").unlink(missing_ok=True)
        write_json(known, {"format": FORMAT, "study": study})
        write_json(self.path / "environment.json", environment())
        self.steps.mkdir(exist_ok=True)

    def _acquire(self, folder: Path) -> None:
        """One process at a time works in a directory; the lock falls with the process, however it ends."""
        import fcntl

        self._locks.append(open(folder / ".lock", "a+"))  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                "another process is working in this run", where=folder, fix="wait for it, or choose another --out"
            ) from error

    def close(self) -> None:
        while self._locks:
            self._locks.pop().close()

    def _compare(self, known: Path, study: dict[str, Any], replace: bool) -> None:
        try:
            held = json.loads(known.read_text(encoding="utf-8"))
            version = held["format"]
            before = held["study"] if version == FORMAT else None
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                "the file that says which study a run is of cannot be read", where=known, why=why,
                fix="choose another --out; or delete the file and its directory to start anew",
            ) from error  # fmt: skip
        if version != FORMAT:
            raise InputError(
                f"this run was written in format {version}, this version of assay reads format {FORMAT}",
                where=self.path, fix="choose another --out, or use the version of assay named in environment.json",
            )  # fmt: skip
        changes = differences(before, json.loads(json.dumps(study)))
        kept = any(self.steps.glob("*/step.json"))  # a run that failed before its first step loses nothing
        if changes and kept and not replace:
            raise InputError(
                "the directory holds the run of another study",
                where=self.path,
                why="\n         ".join(f"{key}: there {old!r}, now {new!r}" for key, old, new in changes),
                fix="choose another --out, or pass --replace (steps whose inputs did not change are kept)",
            )

    def step(self, name: str, key: Any, build: Callable[[Path, Ledger], None], *, label: str = "") -> Path:
        """The directory of a step's result, computed by `build(folder, ledger)` unless it is there.

        `key` is everything the result depends on. `build` may find its own leftovers in the folder and go on from them.
        """
        final, part, full = self.place(name, key)
        if not (final / "step.json").exists():
            part.mkdir(parents=True, exist_ok=True)
            ledger = Ledger()
            self._nested.append({"wall": 0.0, "cpu": 0.0})
            with Meter() as meter:
                build(part, ledger)
            inner = self._nested.pop()
            if self._nested:
                self._nested[-1]["wall"] += meter.wall
                self._nested[-1]["cpu"] += meter.cpu
            # Steps asked for while this one was made enter the ledger on their own.
            cost = {
                "wall": meter.wall - inner["wall"],
                "cpu": meter.cpu - inner["cpu"],
                "flops": ledger.flops,
                "peak_rss": meter.peak,
            }
            self.commit(final, part, {"name": name, "key": key, "hash": full}, {"stage": label or name, **cost})
        self.touch(final.name)
        return final

    def place(self, name: str, key: Any) -> tuple[Path, Path, str]:
        """Where a step's result stands when done, where it is made, and the full hash of its key."""
        full = digest(name, key, self._code)
        final = self.steps / f"{name}-{full[:16]}"
        return final, final.with_name(final.name + ".part"), full

    def commit(self, final: Path, part: Path, about: dict[str, Any], cost: dict[str, Any]) -> None:
        """Publish a step: cost and key are written, then the folder is renamed."""
        write_json(part / "cost.json", cost)
        write_json(part / "step.json", about)
        for left in part.rglob(".*.tmp"):  # of an earlier try that was killed while it wrote
            left.unlink()
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)

    def touch(self, name: str) -> None:
        """Note that the study uses this step: its cost enters the ledger, once."""
        if name not in self.used:
            self.used.append(name)
            self.ledger.append(self.cost(name))

    def absorb(self, stage: str, names: list[str], workers: int) -> None:
        """Enter many parallel steps as one stage: seconds and operations added, wall shared by workers."""
        costs = [self.cost(name) for name in names]
        self.used += [name for name in names if name not in self.used]
        total: dict[str, float] = {k: sum(c[k] for c in costs) for k in ("wall", "cpu", "flops")}
        total["wall"] /= max(1, min(workers, len(costs)))
        self.ledger.append({"stage": stage, **total, "peak_rss": max((c["peak_rss"] for c in costs), default=0)})

    def cost(self, name: str) -> dict[str, Any]:
        """What a finished step cost: stage, wall and cpu seconds, flops, peak_rss in bytes."""
        step = self.steps / name
        try:
            found = json.loads((step / "cost.json").read_text(encoding="utf-8"))
            assert isinstance(found, dict)
            return found
        except (ValueError, FileNotFoundError, AssertionError) as error:
            raise InputError(
                "a finished step is damaged", where=step / "cost.json", why=str(error) or "not an object",
                fix=f"delete {step} and run again: it is computed anew",
            ) from error  # fmt: skip

    def publish(self, result: dict[str, Any]) -> None:
        """Write the result: all that a report needs."""
        write_json(self.path / "result.json", result)

    def done(self) -> None:
        """The marker that comes last, after the report."""
        (self.path / "DONE").write_text("")

    def clean(self) -> int:
        """Remove steps that the finished study does not use: leftovers of kills and of replaced studies. Those of a
        shared store stay, for another run may use them."""
        for left in self.path.glob(".*.tmp"):
            left.unlink()
        stale = [] if self.store else [p for p in self.steps.iterdir() if p.name not in self.used]
        for path in stale:
            shutil.rmtree(path, ignore_errors=True)
        return len(stale)


class Meter:
    """Wall and CPU seconds, and peak resident memory, of this process and all below it between enter and exit.

    The tree is sampled every `period` seconds: workers are no children of this process that the system would account
    for at its end, and what one spends after its last sample is missed.
    """

    def __init__(self, period: float = 0.5) -> None:
        self.period, self.wall, self.cpu, self.peak = period, 0.0, 0.0, 0
        self._seconds: dict[int, tuple[float, float]] = {}

    def __enter__(self) -> Meter:
        import threading

        self._stop = threading.Event()
        self._start = time.perf_counter()
        self._sample(fresh=False, memory=False)  # memory is dear to ask for, and soon seen
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self.period):
            self._sample()

    def _sample(self, fresh: bool = True, memory: bool = True) -> None:
        """`fresh`: a process not seen before began after this meter, so all its seconds count."""
        held = 0
        for process in _tree():
            with suppress(psutil.Error):
                held += resident(process) if memory else 0
                times = process.cpu_times()
                spent = times.user + times.system
                begun, _ = self._seconds.get(process.pid, (0.0 if fresh else spent, spent))
                self._seconds[process.pid] = begun, spent
        self.peak = max(self.peak, held)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self.wall = time.perf_counter() - self._start
        self.cpu = sum(last - first for first, last in self._seconds.values())


def _tree() -> list[psutil.Process]:
    with suppress(psutil.Error):
        me = psutil.Process()
        return [me, *me.children(recursive=True)]
    return []


def tree_rss() -> int:
    """Resident bytes of this process and all its children; a page that several share is split between them (PSS),
    where the system can tell (Linux); elsewhere it counts once for each."""
    total = 0
    for process in _tree():
        with suppress(psutil.Error):
            total += resident(process)
    return total


def resident(process: psutil.Process) -> int:
    """Proportional set size of one process in bytes, or its resident set size where there is none."""
    try:
        return int(process.memory_full_info().pss)
    except (AttributeError, psutil.AccessDenied):
        return process.memory_info().rss


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves in which two nested values differ, as (dotted key, old, new).

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    [('a.b', 1, 3)]
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [(prefix, old, new)]


def libraries() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    versions: dict[str, str] = {}
    for package in ("assay-data", "torch", "numpy", "pyarrow", "tokenizers", "scipy", "scikit-learn", "safetensors"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a run."""
    versions = libraries()
    machine = {"python": platform.python_version(), "platform": platform.platform(), "processor": platform.machine()}
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    return {**machine, "cores": os.cpu_count() or 1, "memory": memory, **versions}
