"""Hang detection: a watch that names the rank which hangs or is gone, and ends the job in a set time.

Ranks work in step: when one hangs, all others wait for it in a collective, and after Megatron's ten minutes
each of them fails with a text about sockets. Here a thread of each rank reports every few seconds, through
torch's own store, that the rank lives, what its main thread does and for how long, and where in the code it
is (`Report`). The first rank without progress for `--rank-timeout-seconds` reads all reports and gives a
verdict that every rank obeys. It blames the ranks that give no sign of life, else those not waiting in a
collective, else those that got least far.

The main thread marks its progress (`RankWatch.mark`) with a few assignments and no communication. A phase
that may take long (start-up, the first iteration with its compilation, a save) gets `SLOW_FACTOR` times as
long.

The store lives in a process that may be frozen itself: torchrun, or rank 0 without it. Each rank therefore
also writes what it begins to do to a small file on its own machine (`PhaseBoard`), which takes some
microseconds. The file outlives a rank that is killed and can be read while the store is frozen: a second
thread, which never asks the store, judges by these files. A stopped rank cannot obey a verdict, so its
neighbors kill it.

A rank that fails writes its error to the store first (`RankWatch.report_error`), so that ranks whose
connection it breaks report that error instead of their own. torchrun itself sees a process end at once and
ends the others.
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
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from megatron_exact.folder_lock import process_start, process_state
from megatron_exact.json_input import parse_json_object
from megatron_exact.training.runtime import end_process, node_name

DAY_SECONDS = 86_400
WAITING_FILES = ("p2p_communication.py", "param_and_grad_buffer.py")
"""Files of Megatron that wait for communication started earlier."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank reports about itself."""

    rank: int
    """Rank of the world."""
    host: str
    """Name of its machine."""
    beat: int
    """Number of this report."""
    marks: int
    """Number of times that its main thread has marked progress."""
    iteration: int | None
    """The iteration under way; None before the first."""
    phase: str
    """What the main thread does."""
    seconds: float
    """How long it has done that, by its own clock."""
    location: str
    """Innermost line of the main thread outside of torch."""
    waits: bool
    """Whether the main thread is inside torch.distributed."""

    def doing(self) -> str:
        """Describe what the rank was doing."""
        when = "" if self.iteration is None else f"iteration {self.iteration}, "
        return f"{when}{self.phase} for {self.seconds:.0f} s, at {self.location}"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The last progress that a rank of this machine wrote down."""

    pid: int
    """Process id of the rank."""
    started: int
    """Start time of the process, see `folder_lock.process_start`."""
    marks: int
    """As in `Report`."""
    iteration: int | None
    """As in `Report`."""
    phase: str
    """As in `Report`."""

    @property
    def state(self) -> str | None:
        """State of the process now, from `folder_lock.process_state`."""
        return process_state(self.pid, self.started)

    def doing(self) -> str:
        """Describe what the rank was doing, and whether its process still runs."""
        when = "" if self.iteration is None else f"iteration {self.iteration}, "
        state = self.state
        fate = "has ended" if state is None else "is stopped" if state == "T" else "runs"
        return f"{when}{self.phase} (process {self.pid} {fate})"


class PhaseBoard:
    """One small file a rank, for the ranks of one job on this machine.

    Ranks find each other by their parent (torchrun, srun, mpirun) and the address of the job; a rank that
    has another parent, as in containers of one rank each, is not on the board.

    Args:
        rank: rank of the world.
    """

    BYTES = 512

    def __init__(self, rank: int) -> None:
        self._is_usable = False
        self._pid, self._started = os.getpid(), process_start(os.getpid())
        parent = os.getppid()
        words = [str(parent), str(process_start(parent))]
        words += [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
        words.append(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._prefix = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
        self._folder = Path(tempfile.gettempdir()) / f"megatron_exact-{os.getuid()}"
        self._rank = rank
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):  # a full or read-only disk: only the store is left
            self._folder.mkdir(mode=0o700, exist_ok=True)
            about = os.lstat(self._folder)
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                return
            self._is_usable = True
            self._remove_old_files()
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(self._path(rank), flags, 0o600)

    def _path(self, name: int | str) -> Path:
        return self._folder / f"{self._prefix}-{name}"

    def _remove_old_files(self) -> None:
        """Remove files of ranks, of any job, that were killed so long ago that nobody reads them."""
        for path in self._folder.iterdir():
            if path.name.startswith(f"{self._prefix}-"):
                continue
            with contextlib.suppress(OSError):
                moment = _read_moment(path)
                is_old = time.time() - path.stat().st_mtime > DAY_SECONDS
                if is_old and (moment is None or moment.state is None):
                    path.unlink()

    def write(self, marks: int, iteration: int | None, phase: str) -> None:
        """Write what this rank begins to do; a failing disk does not stop the job."""
        if self._descriptor is None or os.getpid() != self._pid:
            return
        moment = Moment(pid=self._pid, started=self._started, marks=marks, iteration=iteration, phase=phase)
        text = json.dumps(asdict(moment)).encode()[: self.BYTES].ljust(self.BYTES)
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, text, 0)

    def read(self, world_size: int) -> dict[int, Moment]:
        """Return the last progress of every rank of this machine; nothing from a folder of another user."""
        if not self._is_usable:
            return {}
        found = {rank: _read_moment(self._path(rank)) for rank in range(world_size)}
        return {rank: moment for rank, moment in found.items() if moment is not None}

    def is_first(self) -> bool:
        """Return whether this rank of the machine asks first, so that one prints for all."""
        if not self._is_usable:
            return True
        try:
            os.close(os.open(self._path("verdict"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def end_stopped(self, world_size: int) -> None:
        """Kill the ranks of this machine that are stopped, since they cannot obey a verdict."""
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
    """Return the main thread's innermost line outside of torch, and whether it waits for other ranks."""
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
    seconds: float,
    moments: Mapping[int, Moment] | None = None,
) -> str:
    """Name the ranks that keep the others waiting, in one line.

    Args:
        before: last report of each rank, a few beats ago.
        after: last report of each rank now.
        world_size: number of ranks.
        seconds: without progress, for the message.
        moments: last progress of the ranks of this machine.
    """
    cause = _no_progress(seconds)
    if _silent(before, after, world_size):
        return f"{name_silent(before, after, world_size, moments)}; {cause}"
    reports = list(after.values())
    suspects = [report for report in reports if not report.waits]
    if not suspects or len(suspects) == len(reports):
        fewest = min(report.marks for report in reports)
        suspects = [report for report in reports if report.marks == fewest]
    named = "; ".join(_name(report) for report in suspects[:3])
    if len(suspects) > 3:
        more = f" and {len(suspects) - 20} more" if len(suspects) > 20 else ""
        named += f"; and ranks {', '.join(str(report.rank) for report in suspects[3:20])}{more}"
    if len(suspects) == len(reports):
        return f"all ranks hang and none is behind: {named}; {cause}"
    return f"{named}; the other ranks wait; {cause}"


def _no_progress(seconds: float) -> str:
    return f"no progress in {seconds:.0f} s (--rank-timeout-seconds)"


def _silent(before: dict[int, Report], after: dict[int, Report], world_size: int) -> list[int]:
    """Return the ranks that reported nothing new."""
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
    """Name the ranks that give no sign of life, and what they did last; see `judge`."""
    silent = _silent(before, after, world_size)
    if not silent:
        return "a connection between ranks broke, but all of them live"
    return _no_sign_of_life([_last_seen(rank, after.get(rank), moments or {}) for rank in silent])


def judge_here(moments: Mapping[int, Moment], seconds: float, *, has_met: bool) -> str:
    """Name the rank that keeps the others waiting, from the files of this machine, without the store.

    Args:
        moments: last progress of the ranks of this machine.
        seconds: without progress, for the message.
        has_met: whether the ranks have met; before that there is no store to ask.
    """
    cause = _no_progress(seconds)
    gone = [rank for rank, moment in moments.items() if moment.state in (None, "T")]
    if gone:
        return f"{_no_sign_of_life([_last_seen(rank, None, moments) for rank in gone])}; {cause}"
    if has_met:
        return (
            "no sign of life from the process that holds the ranks' store (torchrun, or rank 0 without "
            f"it), on {os.environ.get('MASTER_ADDR', 'the first machine')}: killed, frozen, or its machine "
            f"is gone; {cause}"
        )
    here = "; ".join(f"rank {rank} in {moment.doing()}" for rank, moment in list(moments.items())[:3])
    here += f" and {len(moments) - 3} more" if len(moments) > 3 else ""
    return f"the ranks have not met: here {here or 'none is known'}; look for one that is missing; {cause}"


def _no_sign_of_life(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"no sign of life from {'; '.join(names[:3])}{more}: killed, frozen, or its machine is gone"


def _last_seen(rank: int, report: Report | None, moments: Mapping[int, Moment]) -> str:
    """Name a rank without a sign of life, and what it did last; its file is newer than its report."""
    moment = moments.get(rank)
    if moment is not None and (report is None or moment.marks >= report.marks):
        host = node_name() if report is None else report.host
        return f"rank {rank} ({host}) in {moment.doing()}"
    return f"rank {rank}" if report is None else f"rank {rank} ({report.host}) in {report.doing()}"


def _name(report: Report) -> str:
    return f"rank {report.rank} ({report.host}) hangs: {report.doing()}"


SLOW_FACTOR = 6
"""How many times longer a phase may take that is known to be slow."""
MOST_BEAT_SECONDS = 5.0
FIRST_BEAT_SECONDS = 0.2
"""The shortest beat, and the time until the first report."""
BEATS_OF_SILENCE = 3
"""After this many beats without a report a rank gives no sign of life."""
LAST_WORD_SECONDS = 3.0
"""Beside some beats, the time that the main thread has to print by itself that the store is gone."""
VERDICT, EXAMINER, FIRST_ERROR = "verdict", "examiner", "first_error"


class RankWatch:
    """The watch of one rank.

    Args:
        timeout_seconds: longest time without progress; 0 means no limit, but ranks still report.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        wanted = timeout_seconds / 10 if timeout_seconds else MOST_BEAT_SECONDS
        self.beat_seconds = min(MOST_BEAT_SECONDS, max(FIRST_BEAT_SECONDS, wanted))
        self._progress: tuple[int, int | None, str, float, bool] = (
            0,
            None,
            "start-up",
            time.monotonic(),
            True,
        )
        self._beat = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stopped = threading.Event()
        self._board: PhaseBoard | None = None
        self._answered = time.monotonic()
        self._store: Any = None

    def mark(self, phase: str, *, iteration: int | None = None, is_slow: bool = False) -> None:
        """Mark that the main thread has made progress.

        Args:
            phase: what it begins to do.
            iteration: the iteration under way; None for the last one marked.
            is_slow: whether the phase may take `SLOW_FACTOR` times as long.
        """
        marks, last, *_ = self._progress
        self._progress = (
            marks + 1,
            last if iteration is None else iteration,
            phase,
            time.monotonic(),
            is_slow,
        )
        if self._board is not None:
            self._board.write(*self._progress[:3])

    def start(self) -> None:
        """Start the threads of the watch, which end with the process; a lone rank watches its launcher."""
        if self.world_size > 1:
            self._board = PhaseBoard(self.rank)
            self._board.write(*self._progress[:3])
            threading.Thread(target=self._run, name="rank watch", daemon=True).start()
        if self.world_size > 1 or self._launcher is not None:
            threading.Thread(target=self._guard, name="rank guard", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: the job is over, and ranks may end at different times."""
        self._stopped.set()
        if self._board is not None:
            self._board.close()

    def report_error(self, error: str) -> None:
        """Report to the other ranks that this one fails first, unless another has."""
        first = json.dumps({"rank": self.rank, "host": node_name(), "error": error})
        with contextlib.suppress(Exception):
            self._connected().compare_set(FIRST_ERROR, "", first)

    def explain_lost_contact(self) -> str:
        """Return why a collective broke: the error of the rank that ended first, or the silent rank.

        This takes a few beats. torchrun, which sees the cause by itself, may end this process meanwhile.
        """
        try:
            store = self._connected()
            before = self._read_reports(store)
            deadline = time.monotonic() + (BEATS_OF_SILENCE + 1) * self.beat_seconds
            while time.monotonic() < deadline:
                if store.check([FIRST_ERROR]):
                    first = parse_json_object(store.get(FIRST_ERROR), "the first error", "see the logs")
                    return f"rank {first['rank']} ({first['host']}) ended first: {first['error']}"
                time.sleep(self.beat_seconds / 2)
            return name_silent(before, self._read_reports(store), self.world_size, self._moments())
        except Exception:  # the store is gone, with its rank or launcher
            moments = self._moments()
            if moments and 0 in moments and moments[0].state is None:
                return f"rank 0 ended first without a word, in {moments[0].doing()}"
            return "rank 0, or the launcher on its machine, ended first without a word"

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self.beat_seconds if self._beat else FIRST_BEAT_SECONDS):
                if not dist.is_initialized():
                    continue
                self._send_report(self._connected())
                self._obey_verdict()
                if self._is_stuck():
                    self._examine()
        except Exception:  # the store is gone: main thread and launcher see that, too
            self._end_without_launcher()
            if not self._stopped.wait(2 * BEATS_OF_SILENCE * self.beat_seconds + LAST_WORD_SECONDS):
                end_process(self.explain_lost_contact(), is_teller=self.is_teller())

    def _guard(self) -> None:
        """End the process if its launcher is gone, or if it is stuck and the store does not answer."""
        while not self._stopped.wait(self.beat_seconds):
            self._end_without_launcher()
            silence = time.monotonic() - self._answered
            if self.world_size == 1 or silence < 3 * BEATS_OF_SILENCE * self.beat_seconds:
                continue
            if not self._is_stuck():
                continue
            verdict = judge_here(
                self._moments(), self._seconds_without_progress(), has_met=dist.is_initialized()
            )
            is_teller = self._board is None or self._board.is_first()
            if is_teller:
                print(f"error: {verdict}", file=sys.stderr, flush=True)
            self._end(verdict)

    def _end(self, verdict: str) -> None:
        """End this process, and stopped ranks of this machine; the verdict has been printed."""
        if self._board is not None:
            self._board.end_stopped(self.world_size)
            self._board.close()
        end_process(verdict, is_teller=False)

    def _moments(self) -> dict[int, Moment]:
        return {} if self._board is None else self._board.read(self.world_size)

    def _end_without_launcher(self) -> None:
        """End the process if torchrun was killed, which then cannot do so."""
        if self._launcher is not None and os.getppid() != self._launcher:
            end_process("the launcher is gone", is_teller=self.is_teller())

    def _connected(self) -> Any:
        """Return our own connection to the store, since the main thread may block in its own."""
        if self._store is None:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = PrefixStore(f"megatron_exact/rank watch/{attempt}", store.clone())
        return self._store

    def _send_report(self, store: Any) -> None:
        self._beat += 1
        store.set(f"report/{self.rank}", json.dumps(asdict(self._report())))
        self._answered = time.monotonic()

    def _report(self) -> Report:
        marks, iteration, phase, since, _ = self._progress
        location, waits = main_thread_location()
        return Report(
            rank=self.rank,
            host=node_name(),
            beat=self._beat,
            marks=marks,
            iteration=iteration,
            phase=phase,
            seconds=round(time.monotonic() - since, 1),
            location=location,
            waits=waits,
        )

    def _is_stuck(self) -> bool:
        *_, since, is_slow = self._progress
        allowed = self.timeout_seconds * (SLOW_FACTOR if is_slow else 1)
        return 0 < allowed < time.monotonic() - since

    def _seconds_without_progress(self) -> float:
        return time.monotonic() - self._progress[3]

    def _examine(self) -> None:
        """Give the verdict, from one rank of the job."""
        store = self._connected()
        if store.compare_set(EXAMINER, "", str(self.rank)) != str(self.rank).encode():
            return  # another rank does; its verdict comes
        seconds = self._seconds_without_progress()
        before = self._read_reports(store)
        for _ in range(BEATS_OF_SILENCE):
            time.sleep(self.beat_seconds)
            self._send_report(store)
        after = self._read_reports(store)
        verdict = judge(before, after, self.world_size, seconds, self._moments())
        store.set(VERDICT, verdict)
        print(f"error: {verdict}", file=sys.stderr, flush=True)
        time.sleep((1 + BEATS_OF_SILENCE) * self.beat_seconds)  # gives the other ranks time to read it
        self._end(verdict)

    def _obey_verdict(self) -> None:
        store = self._connected()
        if not store.check([VERDICT]):
            return
        verdict = store.get(VERDICT).decode()
        if self.rank == 0:  # the store may live in this process
            time.sleep(2 * BEATS_OF_SILENCE * self.beat_seconds)
        self._end(verdict)

    def _read_reports(self, store: Any) -> dict[int, Report]:
        keys = {rank: f"report/{rank}" for rank in range(self.world_size)}
        there = {rank: key for rank, key in keys.items() if store.check([key])}
        texts = store.multi_get(list(there.values())) if there else []
        return {
            rank: Report(**parse_json_object(text, "a report", "see the logs"))
            for rank, text in zip(there, texts, strict=True)
        }

    def is_teller(self) -> bool:
        """Return whether this rank prints for its machine."""
        return os.environ.get("LOCAL_RANK", "0") == "0"
