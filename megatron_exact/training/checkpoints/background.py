"""The processes behind `--async-save`: started before any device is in use, watched, ended with their rank.

Upstream's trainer waits for its writer twice, for the copies of the tensors and for the files, and each
time without end if the writer is gone: killed for want of memory, or ended by an error of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import util
from typing import Any

import megatron.core.dist_checkpointing.strategies.filesystem_async as checkpoint_writer
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_exact.command_line import describe

PR_SET_PDEATHSIG = 1
_stock_schedule = PersistentAsyncCaller.schedule_async_call
_stock_is_done = PersistentAsyncCaller.is_current_async_call_done


def start_writer(args: Any, *, on_cpu: bool) -> None:
    """Start the queue of results, and on the CPU the writer itself.

    Where there is a GPU, upstream starts the writer through a server process, because a forked one could
    not use CUDA; that server would know nothing of the CPU runtime.

    Args:
        args: Megatron's namespace.
        on_cpu: whether the CPU runtime answers for CUDA.
    """
    with _ending_with_this_process():
        checkpoint_writer.get_write_results_queue("fork")
        if on_cpu:
            PersistentAsyncCaller._get_process(
                args.rank, "fork", args.async_ckpt_cpu_priority, args.async_ckpt_io_priority
            )


def watch_writer() -> None:
    """Replace upstream's two waits by ones that end with an error where the writer has ended."""
    PersistentAsyncCaller.schedule_async_call = _schedule
    PersistentAsyncCaller.is_current_async_call_done = _is_done


def _schedule(caller: Any, request: Any) -> None:
    """Hand over a request and wait until its tensors are copied."""
    if request.async_fn is None:  # this rank has nothing to write
        return
    if caller.process is None:
        caller.process = PersistentAsyncCaller._get_process(int(os.environ.get("RANK", "0")))
    failures: list[BaseException] = []
    requests, copies = caller._persistent_queue, caller._persistent_preload_q
    # Called by the thread that pickles the request; multiprocessing would print the error and go on.
    requests._on_queue_feeder_error = lambda error, _: failures.append(error)
    copies.join = lambda: _wait_for_copies(caller.process, copies, failures)
    _stock_schedule(caller, request)


def _wait_for_copies(process: Any, copies: Any, failures: list[BaseException]) -> None:
    """`copies.join()`, without its lock, which a writer that dies may hold."""
    while not copies._unfinished_tasks._semlock._is_zero():
        if failures:
            raise OSError(
                "the checkpoint could not be handed to the process that writes it: "
                f"{describe(failures[0])}; start the same command again, without --async-save if it recurs"
            ) from failures[0]
        if not process.is_alive():
            raise OSError(_writer_has_ended(process))
        time.sleep(0.005)


def _is_done(caller: Any, blocking: bool = False, no_dist: bool = False) -> bool:
    """Whether the writer has written its request."""
    while True:
        process = caller.process
        if process is not None and not process.is_alive() and caller._persistent_comp_q.empty():
            raise OSError(_writer_has_ended(process))
        done = bool(_stock_is_done(caller, False, no_dist))
        if done or not blocking:
            return done
        time.sleep(0.05)


def _writer_has_ended(process: Any) -> str:
    return (
        f"the process that writes the checkpoints of rank {os.environ.get('RANK', '0')} has ended "
        f"(exit code {process.exitcode}): its last checkpoint is not complete; start the same "
        "command again, without --async-save if memory was short"
    )


@contextlib.contextmanager
def _ending_with_this_process() -> Iterator[None]:
    """Processes forked meanwhile are killed with the main thread of this one, however that ends."""

    class Marker:
        """As long as it lives, multiprocessing calls what is registered with it in each child."""

    marker = Marker()
    util.register_after_fork(marker, _end_with_parent)
    yield
    del marker


def _end_with_parent(_: object) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
