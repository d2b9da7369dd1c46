"""`map`: in order, the same for any number of workers; errors arrive, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
import torch

import helpers
from assay.core.errors import InputError
from assay.engine import local
from assay.engine.packing import ALIGNMENT, pack, unpack


def workers_of(pid: int) -> list[psutil.Process]:
    """Worker processes below this one: the server that forks them and the resource tracker stay, by design."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            own = "forkserver" in " ".join(process.cmdline()) or "resource_tracker" in " ".join(process.cmdline())
            parent = process.parent()
            forked = parent is not None and parent.pid != pid and process.status() != psutil.STATUS_ZOMBIE
            if forked or not own:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for(condition, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order(workers):
    assert list(local.map(helpers.scaled, 3, list(range(9)), workers=workers)) == [3 * i for i in range(9)]
    assert list(local.map(helpers.scaled, 3, [], workers=workers)) == []
    assert list(local.map(helpers.scaled, 3, [5], workers=workers)) == [15]
    assert not workers_of(os.getpid())


def test_bytes_do_not_depend_on_workers():
    before = torch.get_num_threads()
    results = [list(local.map(helpers.threads, None, [1, 2, 3], workers=w)) for w in (1, 2)]
    assert results[0] == results[1]
    assert {threads for threads, _ in results[0]} == {1}
    assert torch.get_num_threads() == before, "the caller's threads changed"


def test_a_state_of_more_tensors_than_a_process_may_have_descriptors():
    state = {"weights": {str(k): torch.full((3, 2), float(k)) for k in range(400)}}
    expected = [k * 6 * sum(range(400)) for k in (1, 2, 3)]
    assert list(local.map(helpers.total, state, [1, 2, 3], workers=2)) == expected


def test_packed_tensors_come_back_as_they_were():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(5, 3, generator=generator)
    value = {
        "first": first, "again": [first], "bits": torch.tensor([True, False]), "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64), "half": torch.ones(7, dtype=torch.bfloat16),
        "turned": torch.randn(4, 6, generator=generator).T, "learnt": torch.ones(2, requires_grad=True),
        "part": torch.arange(10)[2:5], "name": "x", "none": {"empty": torch.empty(0)},
    }  # fmt: skip
    packed = pack(value)
    back = unpack(packed)
    for name in ("first", "bits", "empty", "scalar", "half", "turned", "part"):
        assert torch.equal(back[name], value[name]) and back[name].dtype == value[name].dtype
        assert back[name].stride() == value[name].stride()
    assert back["again"][0] is back["first"] or back["again"][0].data_ptr() == back["first"].data_ptr()
    assert back["learnt"].requires_grad and back["name"] == "x"
    assert packed.block is not None and packed.block.is_shared()
    assert all(offset % ALIGNMENT == 0 for offset, _, _ in packed.places)
    assert unpack(pack({"empty": torch.empty(0, 2)}))["empty"].shape == (0, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_arrive_intact(workers):
    results = local.map(helpers.complain, None, list(range(6)), workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError) as caught:
        next(results)
    error = caught.value
    assert (error.what, error.where, error.why, error.fix) == ("item 3 is bad", "row 3", "it was made so", "mend it")
    assert str(error) == "item 3 is bad\n  where: row 3\n  why:   it was made so\n  fix:   mend it"
    assert wait_for(lambda: not workers_of(os.getpid())), "an error left workers behind"


def test_a_killed_worker_is_explained():
    with pytest.raises(InputError, match="worker process died") as caught:
        list(local.map(helpers.crash, None, list(range(6)), workers=2))
    assert "memory" in caught.value.why and "workers" in caught.value.fix
    assert wait_for(lambda: not workers_of(os.getpid()))


def test_leaving_early_leaves_no_workers():
    start = time.monotonic()
    for pid in local.map(helpers.pid_after, 0.0, list(range(50)), workers=2):
        assert pid != os.getpid()
        break
    assert wait_for(lambda: not workers_of(os.getpid())), workers_of(os.getpid())
    results = local.map(helpers.pid_after, 0.2, list(range(500)), workers=2)
    assert isinstance(results, Generator)
    next(results)
    assert workers_of(os.getpid()), "this test does not see workers"
    results.close()
    assert wait_for(lambda: not workers_of(os.getpid()))
    assert time.monotonic() - start < 20


MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts with it ignored
sys.path.insert(0, sys.argv[1])
import helpers
from assay.engine import local
if __name__ == "__main__":
    for _ in local.map(helpers.note_pid, sys.argv[2], list(range(6)), workers=2):
        print("one", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_die_with_their_parent(tmp_path, number):
    script, notes = tmp_path / "main.py", tmp_path / "notes"
    script.write_text(MAIN)
    notes.mkdir()
    command = [sys.executable, str(script), str(Path(__file__).parent), str(notes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as main:
        assert main.stdout is not None and main.stdout.readline() == b"one\n"
        assert wait_for(lambda: len(list(notes.iterdir())) == 2), "two workers should be busy"
        pids = [int(p.name) for p in notes.iterdir()]
        os.kill(main.pid, number)
        # Not reaped yet: the parent is a zombie, which answers to its pid, as in a container without an init.
        gone = wait_for(lambda: not any(alive(pid) for pid in pids))
        main.kill()
    assert gone, f"workers go on after the main process got {number.name}"


WARM = """
import sys, time
from assay.engine import local
import helpers
if __name__ == "__main__":
    local.warm("no_such_module", "sqlite3.dump")
    print(list(local.map(helpers.loaded, "sqlite3.dump", [0, 1], workers=2)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks workers from a server")
def test_workers_begin_with_what_was_asked_for(tmp_path):
    (tmp_path / "main.py").write_text(WARM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "[True, True]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of glibc")
def test_workers_keep_their_memory():
    """Two tensors of 24 MB twenty times over: their pages are handed out a few times, not forty."""
    found = list(local.map(helpers.faults, 20, [0, 1], workers=2))
    assert max(found) < 10 * 24e6 / 4096


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
