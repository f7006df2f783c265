"""What each rank says of itself to the rank watch, and which rank is to blame when all stand still."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass

WAITING_FILES = ("p2p_communication.py", "param_and_grad_buffer.py")
"""Where upstream waits for communication that it started before."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank says of itself."""

    rank: int
    """Of the world."""
    host: str
    """Its machine."""
    beat: int
    """Counts its reports."""
    marks: int
    """Counts the steps of its progress."""
    iteration: int | None
    """That it works on; None before the first."""
    phase: str
    """What the main thread does."""
    seconds: float
    """For how long, by its own clock."""
    location: str
    """Innermost line of the main thread outside of torch."""
    waits: bool
    """Whether the main thread is inside torch.distributed."""

    def doing(self) -> str:
        """What the rank was doing, for people."""
        when = "" if self.iteration is None else f"iteration {self.iteration}, "
        return f"{when}{self.phase} for {self.seconds:.0f} s, at {self.location}"


def main_thread_location() -> tuple[str, bool]:
    """Innermost line of the main thread outside of torch, and whether it is inside torch.distributed."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or name.endswith(WAITING_FILES) or f"torch{os.sep}distributed{os.sep}" in name
        if f"{os.sep}torch{os.sep}" not in name:
            return f"{os.path.basename(name)}:{frame.f_lineno} {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "unknown", waits


def judge(before: dict[int, Report], after: dict[int, Report], world_size: int, timeout: float) -> str:
    """Which ranks keep the others waiting, in one line.

    Args:
        before: what each rank said last, a few beats ago.
        after: what each said last now.
        world_size: ranks.
        timeout: seconds that were allowed, for the message.
    """
    remedy = f"no progress in {timeout:g} s (--rank-timeout-seconds)"
    if _silent(before, after, world_size):
        return f"{name_silent(before, after, world_size)}; {remedy}"
    reports = list(after.values())
    suspects = [report for report in reports if not report.waits]
    if not suspects or len(suspects) == len(reports):
        fewest = min(report.marks for report in reports)
        suspects = [report for report in reports if report.marks == fewest]
    told = "; ".join(_name(report) for report in suspects[:3])
    if len(suspects) > 3:
        told += f"; and ranks {', '.join(str(report.rank) for report in suspects[3:20])}"
    if len(suspects) == len(reports):
        return f"all ranks hang and none is behind: {told}; {remedy}"
    return f"{told}; the other ranks wait; {remedy}"


def _silent(before: dict[int, Report], after: dict[int, Report], world_size: int) -> list[int]:
    """Ranks that reported nothing new."""
    return [
        rank
        for rank in range(world_size)
        if rank not in after or (rank in before and before[rank].beat == after[rank].beat)
    ]


def name_silent(before: dict[int, Report], after: dict[int, Report], world_size: int) -> str:
    """The ranks that give no sign of life, and what they did last; see `judge`."""
    silent = _silent(before, after, world_size)
    if not silent:
        return "a connection between ranks broke, but all of them live"
    names = [
        f"rank {rank} ({after[rank].host}) in {after[rank].doing()}" if rank in after else f"rank {rank}"
        for rank in silent[:3]
    ]
    more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
    return f"no sign of life from {'; '.join(names)}{more}: killed, frozen, or its machine is gone"


def _name(report: Report) -> str:
    return f"rank {report.rank} ({report.host}) hangs: {report.doing()}"
