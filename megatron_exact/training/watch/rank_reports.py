"""What each rank says of itself to the rank watch, and which rank is to blame when all stand still.

A rank says it twice. Its `Report` goes to all machines through torch's store, every few seconds. Its
`Moment` goes to a small file on its own machine (`PhaseBoard`) whenever it begins something else, which
takes some microseconds; the file outlives a rank that is killed, and can be read while the store is frozen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_exact.folder_lock import process_start, process_state
from megatron_exact.json_input import parse_json_object

DAY_SECONDS = 86_400
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


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a rank of this machine did last."""

    pid: int
    """Its process."""
    started: int
    """When that began, see `folder_lock.process_start`."""
    marks: int
    """As in `Report`."""
    iteration: int | None
    """As in `Report`."""
    phase: str
    """As in `Report`."""

    @property
    def state(self) -> str | None:
        """`folder_lock.process_state` now."""
        return process_state(self.pid, self.started)

    def doing(self) -> str:
        """What the rank was doing, and what became of its process, for people."""
        when = "" if self.iteration is None else f"iteration {self.iteration}, "
        state = self.state
        fate = "has ended" if state is None else "is stopped" if state == "T" else "runs"
        return f"{when}{self.phase} (process {self.pid} {fate})"


class PhaseBoard:
    """One small file a rank, for the ranks of one job on this machine.

    They find each other by their parent (torchrun, srun, mpirun) and the address of the job; a rank that
    has another parent, as in containers of one rank each, is not on the board.

    Args:
        rank: of the world.
    """

    BYTES = 512

    def __init__(self, rank: int) -> None:
        self._pid, self._started = os.getpid(), process_start(os.getpid())
        parent = os.getppid()
        words = [str(parent), str(process_start(parent))]
        words += [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
        words.append(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._prefix = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
        self._folder = Path(tempfile.gettempdir()) / f"megatron_exact-{os.getuid()}"
        self._rank = rank
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):  # a full or read-only disk: the store alone is left
            self._folder.mkdir(mode=0o700, exist_ok=True)
            about = os.lstat(self._folder)
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                return
            self._remove_of_the_dead()
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(self._path(rank), flags, 0o600)

    def _path(self, name: int | str) -> Path:
        return self._folder / f"{self._prefix}-{name}"

    def _remove_of_the_dead(self) -> None:
        """Files of ranks that were killed long ago, of any job; the others of their job have read them."""
        for path in self._folder.iterdir():
            if path.name.startswith(f"{self._prefix}-"):
                continue
            with contextlib.suppress(OSError):
                moment = _read_moment(path)
                is_old = time.time() - path.stat().st_mtime > DAY_SECONDS
                if is_old and (moment is None or moment.state is None):
                    path.unlink()

    def write(self, marks: int, iteration: int | None, phase: str) -> None:
        """Say what this rank begins to do; a disk that fails is no reason to stop."""
        if self._descriptor is None or os.getpid() != self._pid:
            return
        moment = Moment(pid=self._pid, started=self._started, marks=marks, iteration=iteration, phase=phase)
        text = json.dumps(asdict(moment)).encode()[: self.BYTES].ljust(self.BYTES)
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, text, 0)

    def read(self, world_size: int) -> dict[int, Moment]:
        """What every rank of this machine did last."""
        found = {rank: _read_moment(self._path(rank)) for rank in range(world_size)}
        return {rank: moment for rank, moment in found.items() if moment is not None}

    def is_first(self) -> bool:
        """Whether no other rank of this machine has asked this before: one speaks for all."""
        try:
            os.close(os.open(self._path("verdict"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def end_stopped(self, world_size: int) -> None:
        """Kill the ranks of this machine that are stopped: they can obey no verdict."""
        for moment in self.read(world_size).values():
            if moment.state == "T":
                with contextlib.suppress(OSError):
                    os.kill(moment.pid, signal.SIGKILL)

    def close(self) -> None:
        """Remove this rank's file."""
        if self._descriptor is None or os.getpid() != self._pid:
            return
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
            os.unlink(self._path(self._rank))
        self._descriptor = None


def _read_moment(path: Path) -> Moment | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Moment(**parse_json_object(path.read_bytes()[: PhaseBoard.BYTES], str(path), "see the logs"))
    return None


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


def judge(
    before: dict[int, Report],
    after: dict[int, Report],
    world_size: int,
    timeout: float,
    moments: Mapping[int, Moment] | None = None,
) -> str:
    """Which ranks keep the others waiting, in one line.

    Args:
        before: what each rank said last, a few beats ago.
        after: what each said last now.
        world_size: ranks.
        timeout: seconds that were allowed, for the message.
        moments: of the ranks of this machine.
    """
    remedy = f"no progress in {timeout:g} s (--rank-timeout-seconds)"
    if _silent(before, after, world_size):
        return f"{name_silent(before, after, world_size, moments)}; {remedy}"
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


def name_silent(
    before: dict[int, Report],
    after: dict[int, Report],
    world_size: int,
    moments: Mapping[int, Moment] | None = None,
) -> str:
    """The ranks that give no sign of life, and what they did last; see `judge`."""
    silent = _silent(before, after, world_size)
    if not silent:
        return "a connection between ranks broke, but all of them live"
    return _no_sign_of_life([_last_seen(rank, after.get(rank), moments or {}) for rank in silent])


def judge_here(moments: Mapping[int, Moment], timeout: float, *, has_met: bool) -> str:
    """Which rank keeps the others waiting, as far as this machine knows: the store does not answer.

    Args:
        moments: of the ranks of this machine.
        timeout: seconds that were allowed, for the message.
        has_met: whether the ranks have met; before that there is no store to ask.
    """
    remedy = f"no progress in {timeout:g} s (--rank-timeout-seconds)"
    gone = [rank for rank, moment in moments.items() if moment.state in (None, "T")]
    if gone:
        return f"{_no_sign_of_life([_last_seen(rank, None, moments) for rank in gone])}; {remedy}"
    if has_met:
        return (
            "no sign of life from the process that holds the ranks' store (torchrun, or rank 0 without "
            f"it), on {os.environ.get('MASTER_ADDR', 'the first machine')}: killed, frozen, or its machine "
            f"is gone; {remedy}"
        )
    told = "; ".join(f"rank {rank} in {moment.doing()}" for rank, moment in list(moments.items())[:3])
    return f"the ranks have not met: here {told or 'none is known'}; look for one that is missing; {remedy}"


def _no_sign_of_life(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"no sign of life from {'; '.join(names[:3])}{more}: killed, frozen, or its machine is gone"


def _last_seen(rank: int, report: Report | None, moments: Mapping[int, Moment]) -> str:
    """A rank that gives no sign of life, and what it did last; its board is newer than its report."""
    moment = moments.get(rank)
    if moment is not None and (report is None or moment.marks >= report.marks):
        host = os.uname().nodename if report is None else report.host
        return f"rank {rank} ({host}) in {moment.doing()}"
    return f"rank {rank}" if report is None else f"rank {rank} ({report.host}) in {report.doing()}"


def _name(report: Report) -> str:
    return f"rank {report.rank} ({report.host}) hangs: {report.doing()}"
