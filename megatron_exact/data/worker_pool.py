"""A pool of processes that yields results in the order of its tasks and never hangs.

`concurrent.futures` and `multiprocessing.Pool` can wait forever for a worker that was killed in the middle
of a result (out of memory), and leave idle workers behind when the parent is killed. Here each worker has a
pipe of its own, whose other end only the parent has: the death of either side is an end of file for the
other. One thread per worker talks to it in lockstep, so neither side can block the other.

joblib's loky survives a killed worker too, but it limits the tasks that are read ahead by their number,
while inputs of a few bytes and of gigabytes must be limited by their size, and its workers outlive the
block that used them.

Processes are spawned, not forked: tokenizer libraries have threads and locks that do not survive a fork. As
always with spawn, a script that uses this needs `if __name__ == "__main__":`.
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
from typing import Any, Self

PENDING_TASKS_PER_WORKER = 3


class _Worker:
    """One process and the parent's end of its pipe."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, function), daemon=True)
        self.process.start()
        far_end.close()  # only the worker has it now
        self._is_ready = False

    def call(self, shared: Any, task: Any) -> Any:
        """Return the worker's result of one task; what all tasks share is sent before the first one."""
        try:
            if not self._is_ready:
                self._connection.send(shared)
                self._is_ready = True
            self._connection.send(task)
            error, result = self._connection.recv()
        except (EOFError, OSError) as end:
            self.process.join(timeout=5)
            raise ValueError(
                f"a worker process died (exit code {self.process.exitcode}), perhaps out of memory: "
                "run with fewer --workers"
            ) from end
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        """Kill the process, whatever it is doing; a `call` that waits for it fails."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Close the pipe; call this when no `call` uses it any more."""
        self._connection.close()


class WorkerPool[Shared, Task, Result]:
    """Worker processes that start when the `with` block is entered and are killed at its end.

    They start while the caller still prepares what it will send to them.

    Args:
        function: function at the top level of a module. Its ValueErrors are raised here unchanged.
        workers: number of processes; 1 runs everything in this process.
    """

    def __init__(self, function: Callable[[Shared, Task], Result], workers: int) -> None:
        self._function = function
        self._workers = workers
        self._started: list[_Worker] = []
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> Self:
        if self._workers > 1:
            try:
                _start_workers(self._function, self._workers, self._started)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._started:
            worker.kill()  # this also ends the thread that waits for it
        self._threads.shutdown(wait=True)
        for worker in self._started:
            worker.close()

    def map_in_order(
        self, shared: Shared, tasks: Iterable[tuple[int, Task]], *, max_pending_bytes: int
    ) -> Generator[Result]:
        """Yield `function(shared, task)` for every task, in order.

        Args:
            shared: sent once to each worker; the same object in every call.
            tasks: (size in bytes, task), consumed lazily.
            max_pending_bytes: tasks are read ahead until their sizes exceed this; one task always fits.

        Raises:
            ValueError: `function` raised it, or a worker process died.
            RuntimeError: another error in `function`, with the worker's traceback.
        """
        if self._workers == 1:
            for _, task in tasks:
                yield self._function(shared, task)
            return
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._started:
            idle.put(worker)

        def run(task: Task) -> Result:
            worker = idle.get()
            try:
                result: Result = worker.call(shared, task)
                return result
            finally:
                idle.put(worker)

        max_pending = self._workers * PENDING_TASKS_PER_WORKER
        yield from _in_order(self._threads, run, tasks, max_pending, max_pending_bytes)


def _start_workers(function: Callable[[Any, Any], Any], workers: int, started: list[_Worker]) -> None:
    """Start processes that block SIGINT and SIGTERM; the parent receives these signals and ends them.

    Both signals often go to a whole process group, and a worker that dies first looks like a failure.
    """
    resource_tracker.ensure_running()  # its own start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
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
    """Run the main loop of a worker until the parent closes its end of the pipe or dies."""
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
