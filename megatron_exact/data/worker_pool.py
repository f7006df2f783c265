"""A pool of processes that gives results in the order of its tasks and never hangs.

`concurrent.futures` and `multiprocessing.Pool` can wait for ever for a worker that was killed in the middle
of a result (out of memory), and leave idle workers behind when the parent is killed. Here each worker has a
pipe of its own, whose other end only the parent holds: a death of either side is an end of file for the
other. One thread a worker talks to it in lockstep, so neither side can block the other.

Processes are spawned, not forked: tokenizer libraries hold threads and locks that do not survive a fork. As
always with spawn, a script that calls this needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

PENDING_TASKS_PER_WORKER = 3


class _Worker:
    """One process and the parent's end of its pipe."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, function), daemon=True)
        self.process.start()
        far_end.close()  # only the worker holds it now
        self._is_ready = False

    def call(self, shared: Any, task: Any) -> Any:
        """The worker's result of one task; what all tasks share is sent before the first."""
        try:
            if not self._is_ready:
                self._connection.send(shared)
                self._is_ready = True
            self._connection.send(task)
            error, result = self._connection.recv()
        except (EOFError, OSError) as end:
            self.process.join(timeout=5)
            raise ValueError(
                f"a worker process died (exit code {self.process.exitcode}), perhaps for want of memory: "
                "run with fewer --workers"
            ) from end
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        """End the process, whatever it is doing; a `call` that waits for it fails."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Close the pipe, once no `call` uses it."""
        self._connection.close()


def map_in_order[Shared, Task, Result](
    function: Callable[[Shared, Task], Result],
    shared: Shared,
    tasks: Iterable[tuple[int, Task]],
    *,
    workers: int,
    max_pending_bytes: int,
) -> Generator[Result]:
    """Yield `function(shared, task)` for every task, in order.

    Args:
        function: at the top level of a module. ValueErrors it raises arrive here as they are.
        shared: sent once to each worker.
        tasks: (size in bytes, task), consumed lazily.
        workers: processes; 1 runs everything in this process.
        max_pending_bytes: tasks are read ahead until their sizes exceed this (one task always fits).

    Raises:
        ValueError: from `function`, or because a worker process died.
        RuntimeError: a fault in `function`, with the worker's traceback.

    Close the generator (`contextlib.closing`) to end the workers early.
    """
    if workers == 1:
        for _, task in tasks:
            yield function(shared, task)
        return
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    started: list[_Worker] = []

    def run(task: Task) -> Result:
        worker = idle.get()
        try:
            result: Result = worker.call(shared, task)
            return result
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)
    try:
        _start_workers(function, workers, started)
        for worker in started:
            idle.put(worker)
        yield from _in_order(threads, run, tasks, workers * PENDING_TASKS_PER_WORKER, max_pending_bytes)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.kill()  # ends the thread that waits for it, too
        threads.shutdown(wait=True)
        for worker in started:
            worker.close()


def _start_workers(function: Callable[[Any, Any], Any], workers: int, started: list[_Worker]) -> None:
    """Start processes that no ^C reaches: the parent gets it and ends them."""
    resource_tracker.ensure_running()  # its own start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(workers):
            started.append(_Worker(function))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_order[Task, Result](
    threads: ThreadPoolExecutor,
    run: Callable[[Task], Result],
    tasks: Iterable[tuple[int, Task]],
    max_pending: int,
    max_pending_bytes: int,
) -> Iterator[Result]:
    pending: deque[tuple[int, Future[Result]]] = deque()
    pending_bytes = 0
    for size_bytes, task in tasks:
        while pending and (len(pending) >= max_pending or pending_bytes + size_bytes > max_pending_bytes):
            done_bytes, future = pending.popleft()
            pending_bytes -= done_bytes
            yield future.result()
        pending.append((size_bytes, threads.submit(run, task)))
        pending_bytes += size_bytes
    while pending:
        yield pending.popleft()[1].result()


def _serve(connection: Connection, function: Callable[[Any, Any], Any]) -> None:
    """Main loop of a worker: ends when the parent closes its end or dies."""
    try:
        shared = connection.recv()
        while True:
            task = connection.recv()
            connection.send(_attempt(function, shared, task))
    except (EOFError, OSError):
        return


def _attempt(function: Callable[[Any, Any], Any], shared: Any, task: Any) -> tuple[Exception | None, Any]:
    try:
        return None, function(shared, task)
    except ValueError as error:
        return ValueError(str(error)), None
    except Exception:
        return RuntimeError(f"in a worker process:\n{traceback.format_exc()}"), None
