"""SIGTERM, SIGUSR1 and other stop signals: remembered from the first line on, obeyed after an iteration.

A handler would be too late and not enough. Importing and building take minutes on a cluster, and a batch
system sends its signal to every process of a step, to data workers and checkpoint writers too, which have
handlers of their own or none. So the signals are blocked: the kernel keeps one that arrives, children
inherit the mask, and after each iteration the ranks look at what is pending and agree.

`pretrain.py` imports this module before all others: it uses the standard library alone.
"""

from __future__ import annotations

import multiprocessing.popen_fork
import signal
from collections.abc import Sequence
from typing import Any

FLAG, OTHER_SIGNAL = "--exit-signal-handler", "--exit-signal"
ASKING = frozenset({signal.SIGTERM, signal.SIGUSR1})
"""Signals of batch systems: TERM at a preemption or cancellation, USR1 by the usual `--signal`."""


def signals_of(words: Sequence[str]) -> frozenset[signal.Signals]:
    """Return the signals that ask a job to stop; none if its arguments lack `--exit-signal-handler`."""
    if FLAG not in words:
        return frozenset()
    named = set()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        name = value if equals else following
        if flag == OTHER_SIGNAL and name in signal.Signals.__members__:
            named.add(signal.Signals[name])
    return ASKING | named


def hold(words: Sequence[str]) -> None:
    """Block the signals that ask this process to stop; what it starts inherits that.

    Args:
        words: the arguments of the job.
    """
    hold_back(signals_of(words))


def hold_back(signals: frozenset[signal.Signals]) -> None:
    """Block these signals in the calling thread, and in the threads and processes that it starts."""
    if not signals:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in signals:
        # the script before us may have ignored it; a pending signal survives this
        signal.signal(number, signal.SIG_DFL)
    # Python ends the workers that are left at its exit by TERM, which they inherit blocked
    multiprocessing.popen_fork.Popen.terminate = multiprocessing.popen_fork.Popen.kill  # type: ignore[method-assign]


def pending(signals: frozenset[signal.Signals]) -> int:
    """Return the number of a signal that has asked this process to stop, 0 if none has."""
    return max((int(number) for number in signal.sigpending() & signals), default=0)


class StopSignals:
    """Answers Megatron's driver after each iteration, in place of its `DistributedSignalHandler`.

    Args:
        words: the arguments of the job.

    Attributes:
        received: a signal that a rank has received, once the ranks have agreed to stop.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._signals = signals_of(words)
        self.received: signal.Signals | None = None

    def signals_received(self) -> list[Any]:
        """Return the signal of each rank, 0 where none came; called by all ranks."""
        import torch
        from megatron.training.dist_signal_handler import all_gather_item

        numbers: list[Any] = all_gather_item(pending(self._signals), dtype=torch.int32)
        if any(numbers):
            self.received = signal.Signals(max(numbers))
        return numbers
