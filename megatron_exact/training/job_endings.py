"""How a job ends: the errors that all ranks share, one line that names the first cause, an exit code.

A job that is refused at its start, and one that fails later, prints one line, from one rank where all know
it. There are three kinds of failure. A user's error (`ValueError`, `OSError`: cause, value, remedy) is
printed without a traceback. An error of a collective means that another rank is gone: the line names what
that rank reported, not the noise of the broken connection. Anything else is a fault of ours or of Megatron
and keeps its traceback. `runtime.py` has the exit codes, `stop_signals.py` the signals that ask a job to
stop, `hang_detection.py` the watch that ends a job whose ranks hang.

torch is imported inside functions: a job is refused before that import.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_exact.command_line import describe
from megatron_exact.training.runtime import NOT_FINITE, RANK_LOST, end_process, rank, tell_launcher

if TYPE_CHECKING:
    from megatron_exact.training.hang_detection import RankWatch

LONGEST_WAIT = 3.0
"""Seconds that a rank waits for rank 0, which prints the same error: torchrun then ends the others."""
MOST_TELLERS = 8
"""Ranks of a job in which each prints that it lost contact; in a larger job one prints for its machine."""
CONNECTION_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
ENDING_VARIABLE = "MEGATRON_EXACT_ENDING"
"""Names a file for `record_ending`, which the script that started the job reads."""


class AgreedError(ValueError):
    """An error that every rank raises alike, so that one of them prints it for all."""


class NonFiniteError(AgreedError):
    """A loss, gradient or weight that is not finite stops the job."""


def record_ending(how: str, iteration: int) -> None:
    """Record how the job ended, as one word and the iteration, for the script that started it.

    Args:
        how: `finished`, `stopped` (a signal asked for it) or `paused` (`--exit-interval` and the like).
        iteration: the last one.
    """
    path = os.environ.get(ENDING_VARIABLE)
    if path is None or rank() != 0:
        return
    with contextlib.suppress(OSError):  # the disk is full: the checkpoint counts, not this
        building = Path(f"{path}.new")
        building.write_text(f"{how} {iteration}\n", encoding="utf-8")
        building.rename(path)


def end_refused_job(error: ValueError | OSError) -> int:
    """Print in one line, from one rank, why a job is not started, and return the exit code."""
    if os.environ.get("MEGATRON_EXACT_TRACEBACK") == "1":
        raise error
    if rank():  # every rank has found the same, but for a file that one node lacks
        time.sleep(LONGEST_WAIT)
    line = describe(error) if rank() == 0 else f"rank {rank()}: {describe(error)}"
    _print_error(line)
    tell_launcher(line, "user")
    return 1


def end_failed_job(error: Exception, watch: RankWatch) -> int:
    """Print why this rank fails, and return its exit code."""
    import torch

    has_met = torch.distributed.is_initialized()
    always = os.environ.get("MEGATRON_EXACT_TRACEBACK") == "1"
    if always:
        traceback.print_exception(error)
    if isinstance(error, AgreedError):
        if watch.rank == 0:
            _print_error(str(error))
        tell_launcher(str(error), "user")
        with contextlib.suppress(RuntimeError):  # no rank ends before the line is printed
            torch.distributed.barrier()
        return NOT_FINITE if isinstance(error, NonFiniteError) else 1
    if has_met and is_lost_contact(error):
        cause = watch.explain_lost_contact()
        if watch.is_teller() or watch.world_size <= MOST_TELLERS:
            _print_error(f"rank {watch.rank}: {cause}")
        tell_launcher(cause)
        return RANK_LOST
    return _end_by_own_error(error, watch, has_met=has_met, is_traced=always)


def is_lost_contact(error: BaseException) -> bool:
    """Return whether a collective failed because a rank on its other end is gone."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION_WORDS)


def _end_by_own_error(error: Exception, watch: RankWatch, *, has_met: bool, is_traced: bool) -> int:
    """Print the error of this rank itself, and return the exit code.

    Before the ranks have met, most errors occur on all of them: rank 0 prints at once and torchrun ends
    the others while they wait here; a rank that fails alone, on another node perhaps, prints after a wait.
    """
    line = describe(error)
    is_users = isinstance(error, ValueError | OSError)
    if has_met:
        watch.report_error(line if is_users else f"{type(error).__name__}: {line}")
    elif watch.rank:
        time.sleep(LONGEST_WAIT)
    if not is_users:
        if not is_traced:
            traceback.print_exception(error)
        line = f"{type(error).__name__}: {line}"
    named = line if watch.rank == 0 and not has_met else f"rank {watch.rank}: {line}"
    _print_error(named)
    tell_launcher(named, "user" if is_users else "fault")
    return 1


def exit_process(code: int) -> NoReturn:
    """Exit; with an error at once, since process groups may wait for ranks that are gone."""
    import torch

    if code and torch.distributed.is_initialized():
        end_process("", is_teller=False, code=code)
    sys.exit(code)


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
