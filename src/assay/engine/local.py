"""`map(fn, state, items)` over processes of this machine: in order, bounded, one thread each.

Every worker computes on a single thread, whatever the machine has: sums then have one order, and results do not depend
on how many workers there are. `workers <= 1` runs in this process, to the same bytes.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from assay.core.errors import InputError
from assay.engine.packing import Packed, pack, unpack

T = TypeVar("T")
R = TypeVar("R")


# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
PRELOAD = ("torch", "numpy", "pyarrow.parquet", "pydantic", "scipy.stats", "safetensors.torch")


def default_workers() -> int:
    """As many as this process may use cores, at most 64."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(64, usable)


def map(fn: Callable[[Any, T], R], state: Any, items: Sequence[T], *, workers: int = 1) -> Iterator[R]:
    """Yield `fn(state, item)` for each item, in the items' order; `state` is sent to each worker once.

    At most two items per worker are in flight. Raises what `fn` raises, and `InputError` when a worker was killed.
    """
    if workers <= 1 or len(items) <= 1:
        yield from _serial(fn, state, items)
        return
    context = _context()
    pool = ProcessPoolExecutor(
        min(workers, len(items)), mp_context=context, initializer=_begin, initargs=(fn, pack(state))
    )
    try:
        yield from _in_order(pool, items, 2 * workers)
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died",
            why="it was killed from outside, most often because memory ran out",
            fix="use fewer workers (--workers 1) or a smaller batch, then run the same command: finished work is kept",
        ) from error
    finally:
        _end(pool)


def _in_order(pool: ProcessPoolExecutor, items: Iterable[T], ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(_call, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _end(pool: ProcessPoolExecutor) -> None:
    """Leave no worker behind, also when the loop was left early (Ctrl-C, an error)."""
    processes = list((pool._processes or {}).values())
    interrupted = sys.exc_info()[0] is not None
    pool.shutdown(wait=not interrupted, cancel_futures=True)
    if interrupted:
        for process in processes:
            process.terminate()


def warm(*modules: str) -> None:
    """Begin to load the heavy packages, and these modules, for workers to come, beside what this process does next.

    No more than a saving of seconds: without it, or with it in vain, workers load what they miss themselves.
    """
    context = _context(modules)
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def _context(modules: Sequence[str] = ()) -> Any:
    """Workers forked from a clean server that has the heavy packages loaded: they start fast, and share its pages."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, *modules])
        return context
    return multiprocessing.get_context("spawn")


_worker: dict[str, Any] = {}  # set once in each worker process by `_begin`; never in the main process


def _begin(fn: Callable[[Any, Any], Any], state: Packed) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _one_thread()
    _keep_memory()
    _worker.update(fn=fn, state=unpack(state))
    threading.Thread(target=_watch, daemon=True).start()


def _keep_memory() -> None:
    """Have glibc keep freed memory for the next batch, which wants as much again.

    By default a large tensor is a fresh mapping each time, whose pages the kernel hands out and zeroes one by one:
    measured at a sixth of a training step (LOG.md, 2026-11-24). Elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, another C library
        return
    for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 26)):
        mallopt(option, value)


def _watch() -> None:
    """A worker whose main process was killed must not go on writing beside its successor.

    Waits on the pipe that the main process holds open: asking after its pid would find it alive while it is a zombie.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _worker["fn"](_worker["state"], item)


def _serial(fn: Callable[[Any, T], R], state: Any, items: Iterable[T]) -> Iterator[R]:
    import torch

    threads = torch.get_num_threads()
    for item in items:
        try:
            with _one_thread():
                result = fn(state, item)
        finally:
            torch.set_num_threads(threads)
        yield result


def _one_thread() -> threadpool_limits:
    """One thread for torch and for numpy's linear algebra, which orders its sums by its threads."""
    import torch

    torch.set_num_threads(1)
    return threadpool_limits(1)
