"""The processes behind `--async-save`, started before any device is in use, and ended with their rank."""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections.abc import Iterator
from multiprocessing import util
from typing import Any

import megatron.core.dist_checkpointing.strategies.filesystem_async as checkpoint_writer
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

PR_SET_PDEATHSIG = 1


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
