"""Order, bounds, errors and deaths of the pool of worker processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.data.worker_pool import WorkerPool

# The workers import these functions by name, so they live in a module and not in a test.
WORK = """
import os, signal, time

def slow_first(shared, task):
    time.sleep(0.2 if task == 0 else 0)
    return shared * task, os.getpid()

def fail_on_three(shared, task):
    if task == 3:
        raise {"value": ValueError("task three"), "type": TypeError("a bug")}[shared]
    return task

def die_on_three(shared, task):
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return b"x" * shared

def sleep(shared, task):
    time.sleep(600)
"""

PARENT = """
import contextlib
import pool_work
from megatron_exact.data.worker_pool import WorkerPool

if __name__ == "__main__":
    tasks = ((1, task) for task in range(100))
    print("started", flush=True)
    with WorkerPool(pool_work.sleep, 2) as pool:
        with contextlib.closing(pool.map_in_order(0, tasks, max_pending_bytes=10)) as results:
            next(results)
"""


def map_in_order(
    function: Callable[[Any, Any], Any],
    shared: Any,
    tasks: Iterable[tuple[int, Any]],
    *,
    workers: int,
    max_pending_bytes: int,
) -> Generator[Any]:
    """Run tasks in a pool of their own; closing the generator ends the workers early."""
    with WorkerPool(function, workers) as pool:
        yield from pool.map_in_order(shared, tasks, max_pending_bytes=max_pending_bytes)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    (tmp_path / "pool_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pool_work", raising=False)
    import pool_work

    yield pool_work
    del sys.modules["pool_work"]


def tasks(count: int) -> Iterator[tuple[int, int]]:
    return ((1, task) for task in range(count))


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(work: object, workers: int) -> None:
    results = list(map_in_order(work.slow_first, 10, tasks(40), workers=workers, max_pending_bytes=100))
    assert [value for value, _ in results] == [10 * task for task in range(40)]
    processes = {process for _, process in results}
    assert len(processes) == workers
    assert (os.getpid() in processes) == (workers == 1)


def test_no_task_at_all(work: object) -> None:
    assert list(map_in_order(work.slow_first, 1, tasks(0), workers=2, max_pending_bytes=1)) == []


def test_tasks_are_read_ahead_only_so_far(work: object) -> None:
    taken: list[int] = []

    def watched() -> Iterator[tuple[int, int]]:
        for task in range(30):
            taken.append(task)
            yield 10, task

    results = map_in_order(work.slow_first, 1, watched(), workers=2, max_pending_bytes=25)
    with contextlib.closing(results):
        next(results)
        assert len(taken) == 3  # two of 10 bytes wait, the third made room for itself


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_error_arrives_as_it_is(work: object, workers: int) -> None:
    results = map_in_order(work.fail_on_three, "value", tasks(20), workers=workers, max_pending_bytes=9)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^task three$"):
        next(results)


def test_a_fault_of_ours_arrives_with_its_traceback(work: object) -> None:
    results = map_in_order(work.fail_on_three, "type", tasks(20), workers=2, max_pending_bytes=9)
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process.*fail_on_three.*TypeError: a bug"):
        list(results)


@pytest.mark.parametrize("size", [1, 10_000_000])
def test_a_killed_worker_is_an_error_and_no_hang(work: object, size: int) -> None:
    results = map_in_order(work.die_on_three, size, tasks(8), workers=2, max_pending_bytes=9)
    with pytest.raises(ValueError, match=r"worker process died \(exit code -9\).*fewer --workers"):
        list(results)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def descendants(process: int) -> set[int]:
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == process:
                    found |= {int(entry.name)} | descendants(int(entry.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    """^C reaches the whole group, the others only the parent. A busy worker notices after its task, 3 s."""
    (tmp_path / "pool_work.py").write_text(WORK.replace("time.sleep(600)", "time.sleep(3)"))
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        parent.stdout.readline()
        while len(children := descendants(parent.pid)) < 3:  # two workers and a resource tracker
            time.sleep(0.05)
        time.sleep(0.5)
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)
        else:
            parent.send_signal(how)
        errors = parent.stderr.read()  # ends once no process holds it
    assert parent.returncode != 0
    deadline = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))
    assert "SpawnProcess" not in errors  # no traceback of a worker
