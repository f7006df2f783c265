"""How a job that fails ends: one line that names the first cause, and an exit code.

Three kinds. A user's error (`ValueError`, `OSError`: cause, value, remedy) is told without a traceback. An
error of a collective means that another rank is gone: what that rank said is told, not the noise of the
connection that it broke. Anything else is a fault of ours or of upstream and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from typing import NoReturn

import torch

from megatron_exact.command_line import describe
from megatron_exact.training.checkpoints.verification import AgreedError
from megatron_exact.training.runtime import tell_launcher
from megatron_exact.training.watch.numerical_watch import NonFiniteError
from megatron_exact.training.watch.rank_watch import RANK_LOST, RankWatch, end_process

NOT_FINITE = 65
"""Exit code of a job that stopped at a loss or gradient that is not finite (EX_DATAERR)."""
CONNECTION_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because a rank on its other end is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION_WORDS)


def end_job(error: Exception, watch: RankWatch) -> int:
    """Tell why this rank fails; returns its exit code."""
    from_start = torch.distributed.is_initialized()
    if os.environ.get("MEGATRON_EXACT_TRACEBACK") == "1":
        traceback.print_exception(error)
    if isinstance(error, AgreedError):
        _tell_together(str(error), watch)
        return NOT_FINITE if isinstance(error, NonFiniteError) else 1
    if from_start and is_lost_contact(error):
        cause = watch.explain_lost_contact()
        if os.environ.get("LOCAL_RANK", "0") == "0" or watch.world_size <= 8:
            _tell(f"rank {watch.rank}: {cause}")
        tell_launcher(cause)
        return RANK_LOST
    return _tell_own(error, watch, has_met=from_start)


def _tell_together(line: str, watch: RankWatch) -> None:
    """What every rank knows is told by one, before any of them ends."""
    if watch.rank == 0:
        _tell(line)
    tell_launcher(line)
    with contextlib.suppress(RuntimeError):
        torch.distributed.barrier()


def _tell_own(error: Exception, watch: RankWatch, *, has_met: bool) -> int:
    """The error of this rank itself.

    Before the ranks have met, most errors are seen by all of them: rank 0 tells at once and torchrun ends
    the others while they wait here; one that fails alone, on another node perhaps, tells a little later.
    """
    line = describe(error)
    is_users = isinstance(error, ValueError | OSError)
    if has_met:
        watch.report_error(line if is_users else f"{type(error).__name__}: {line}")
    elif watch.rank:
        time.sleep(3)
    if not is_users:
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {line}"
    named = line if watch.rank == 0 and not has_met else f"rank {watch.rank}: {line}"
    _tell(named)
    tell_launcher(named)
    return 1


def leave(code: int) -> NoReturn:
    """End the process; a failed one at once, since its process groups may wait for ranks that are gone."""
    if code and torch.distributed.is_initialized():
        end_process("", is_teller=False, code=code)
    sys.exit(code)


def _tell(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
