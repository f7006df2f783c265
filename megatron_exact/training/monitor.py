"""Watch a job: values that are not finite, ranks that hang or fail, and how a job that fails ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from megatron_exact.command_line import describe
from megatron_exact.folder_lock import process_start, process_state, release_all
from megatron_exact.json_input import parse_json_object
from megatron_exact.training.checkpoint_integrity import AgreedError
from megatron_exact.training.runtime import NOT_FINITE, RANK_LOST, node_name, tell_launcher

# ----------------------------------------------------------------------------------------------------
# NaN and Inf in loss or gradient: found on the way, before the optimizer takes the step.
#
# Nothing is waited for while all is well. A loss that is not finite makes its own gradient NaN
# (`loss.weighted_token_loss`), backward carries that to every pipeline stage, the reduction to every
# data-parallel rank, and so the gradient's norm, which upstream computes for clipping and brings to the
# host anyway, is not finite on any rank. There all ranks refuse the step alike, without a word between
# them.
#
# What tells where it began is kept as it is until then: the losses of the step's micro-batches, and the
# norm of each gradient bucket before ranks are summed. Upstream's own check
# (`--check-for-nan-in-loss-and-grad`) takes the same norms but waits for the device at each bucket, and
# raises on the one rank.


class NonFiniteError(AgreedError):
    """A step was refused and the job is to stop; the same on every rank."""


class NumericalWatch:
    """State of one rank: what the step under way has shown so far.

    Attributes:
        losses: [b * S of this context-parallel rank] float32 for each micro-batch of the step, on the last
            pipeline stage.
        refused: whether the optimizer was kept from taking the step; the same on every rank.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.refused = False
        self._bucket_norms: list[tuple[Any, Tensor]] = []
        self._grad_norm: float | None = None

    def begin_step(self) -> None:
        """Forget the step before."""
        self.losses = []
        self.refused = False
        self._bucket_norms = []
        self._grad_norm = None

    def guard(self, optimizer: Any) -> None:
        """Keep `optimizer` from a step whose gradient is not finite.

        `step_with_ready_grads` saying False is upstream's own way to skip a step: schedule and optimizer
        stay, samples count as consumed. With fp16 the loss scale finds the overflow first, and upstream
        skips by itself.

        Args:
            optimizer: of Megatron, chained or single; two of its methods are wrapped.
        """
        for name in ("get_grad_norm", "clip_grad_norm"):
            setattr(optimizer, name, self._remembering(getattr(optimizer, name)))
        stock_step = optimizer.step_with_ready_grads

        def step_with_ready_grads() -> bool:
            if self._grad_norm is None:  # --clip-grad 0
                self._grad_norm = float(optimizer.get_grad_norm())
            self.refused = not math.isfinite(self._grad_norm)
            return False if self.refused else bool(stock_step())

        optimizer.step_with_ready_grads = step_with_ready_grads

    def _remembering(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            norm = stock(*args, **kwargs)
            self._grad_norm = float(norm)
            return norm

        return compute

    def check_grads(self, group: Any, **_: Any) -> None:
        """Keep the norms of a group's buckets; called where upstream would check them.

        Args:
            group: a `_ParamAndGradBucketGroup` whose gradients are about to be summed over ranks.
        """
        self._bucket_norms += [(bucket, bucket.grad_data.norm(p=2)) for bucket in group.buckets]

    def damaged_parameters(self, model: list[Any]) -> list[str]:
        """Names of the parameters in whose buckets this rank's own gradient is not finite.

        Args:
            model: this rank's model chunks, as upstream wraps them.
        """
        names = {
            id(parameter): name.removeprefix("module.").removeprefix("module.")
            for chunk in model
            for name, parameter in chunk.named_parameters()
        }
        return [
            names.get(id(parameter), "?")
            for bucket, norm in self._bucket_norms
            if not math.isfinite(norm.item())
            for parameter in bucket.params_list
        ]


def first_damage(losses: Tensor) -> tuple[int, float] | None:
    """Place and value of the first loss that is not finite; waits for the device.

    Args:
        losses: any shape.
    """
    damaged = (~torch.isfinite(losses.reshape(-1))).nonzero()
    if not len(damaged):
        return None
    place = int(damaged[0])
    return place, float(losses.reshape(-1)[place])


def stream_position(place: int, *, tokens: int, size: int, rank: int) -> int:
    """Where a context-parallel rank's token lies in the stream of its micro-batch.

    A rank holds spans `rank` and `2 * size - 1 - rank` of 2 * size (`model/context_parallel.py`).

    Args:
        place: in the rank's own order.
        tokens: of the stream.
        size: context-parallel ranks.
        rank: in their group.
    """
    span = tokens // (2 * size)
    index = rank if place < span else 2 * size - 1 - rank
    return index * span + place % span


# ----------------------------------------------------------------------------------------------------
# What each rank says of itself to the rank watch, and which rank is to blame when all stand still.
#
# A rank says it twice. Its `Report` goes to all machines through torch's store, every few seconds. Its
# `Moment` goes to a small file on its own machine (`PhaseBoard`) whenever it begins something else, which
# takes some microseconds; the file outlives a rank that is killed, and can be read while the store is
# frozen.

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
        host = node_name() if report is None else report.host
        return f"rank {rank} ({host}) in {moment.doing()}"
    return f"rank {rank}" if report is None else f"rank {rank} ({report.host}) in {report.doing()}"


def _name(report: Report) -> str:
    return f"rank {report.rank} ({report.host}) hangs: {report.doing()}"


# ----------------------------------------------------------------------------------------------------
# Who hangs, who ended first, and an end to the job in a set time.
#
# Ranks work in step: when one hangs, all others wait for it in a collective, and after upstream's ten
# minutes each of them fails with a text about sockets. Here a thread of each rank tells the others every
# few seconds, through torch's own store, that it lives, what its main thread does and for how long, and
# where in the code it is. The first rank that made no progress for `--rank-timeout-seconds` reads what all
# said and gives a verdict that every rank obeys: the culprits are the ranks that give no sign of life, else
# those that do not wait in a collective, else those that came least far.
#
# The main thread marks its progress (`mark`): a few assignments, no communication. What may take long
# (start-up, the first iteration with its compilation, a save) has `SLOW_FACTOR` times as long.
#
# The store lives in a process that may be frozen itself: torchrun, or rank 0 without it. A second thread,
# which never asks the store, sees that and judges by what the ranks of its machine wrote to their
# `PhaseBoard`. Ranks that are stopped cannot obey a verdict: their neighbours kill them.
#
# A rank that fails says so in the store first (`report_error`), so that those whose connection it breaks
# tell its error instead of theirs. torchrun itself sees a process end at once, and ends the others.

SLOW_FACTOR = 6
"""How many times longer a phase may take that is slow by nature."""
MOST_BEAT_SECONDS = 5.0
FIRST_BEAT_SECONDS = 0.2
BEATS_OF_SILENCE = 3
"""After so many beats without a word a rank gives no sign of life."""
VERDICT, EXAMINER, FIRST_ERROR = "verdict", "examiner", "first_error"


class RankWatch:
    """The watch of one rank.

    Args:
        timeout_seconds: longest time without progress; 0 for any, but the ranks still tell of themselves.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        wanted = timeout_seconds / 10 if timeout_seconds else MOST_BEAT_SECONDS
        self.beat_seconds = min(MOST_BEAT_SECONDS, max(0.2, wanted))
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

    # -- main thread -----------------------------------------------------------------------------

    def mark(self, phase: str, *, iteration: int | None = None, is_slow: bool = False) -> None:
        """Say that the main thread got somewhere.

        Args:
            phase: what it begins to do.
            iteration: that it works on; None for the last one told.
            is_slow: whether this may take `SLOW_FACTOR` times as long.
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
        """Begin to watch, from threads that end with the process; one rank alone watches its launcher."""
        if self.world_size > 1:
            self._board = PhaseBoard(self.rank)
            self._board.write(*self._progress[:3])
            threading.Thread(target=self._run, name="rank watch", daemon=True).start()
        if self.world_size > 1 or self._launcher is not None:
            threading.Thread(target=self._guard, name="rank guard", daemon=True).start()

    def stop(self) -> None:
        """The job is over: ranks may end at different times from here."""
        self._stopped.set()
        if self._board is not None:
            self._board.close()

    def report_error(self, error: str) -> None:
        """Tell the others that this rank fails first, unless another did before."""
        first = json.dumps({"rank": self.rank, "host": node_name(), "error": error})
        with contextlib.suppress(Exception):
            self._connected().compare_set(FIRST_ERROR, "", first)

    def explain_lost_contact(self) -> str:
        """Why a collective broke: the error of the rank that ended first, or the rank that says no more.

        Takes a few beats; torchrun may end this process meanwhile, which knows the cause by itself.
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
        except Exception:  # the store went with the rank or launcher that held it
            moments = self._moments()
            if moments and 0 in moments and moments[0].state is None:
                return f"rank 0 ended first without a word, in {moments[0].doing()}"
            return "rank 0, or the launcher on its machine, ended first without a word"

    # -- threads ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self.beat_seconds if self._beat else FIRST_BEAT_SECONDS):
                if not dist.is_initialized():
                    continue
                self._tell(self._connected())
                self._obey_verdict()
                if self._is_stuck():
                    self._examine()
        except Exception:  # the store is gone: the main thread, or the launcher, learns it too
            self._end_without_launcher()
            if not self._stopped.wait(SLOW_FACTOR * self.beat_seconds + BEATS_OF_SILENCE):
                end_process(self.explain_lost_contact(), is_teller=self._is_teller())

    def _guard(self) -> None:
        """End the process without its launcher, and where the store does not answer those who wait."""
        while not self._stopped.wait(self.beat_seconds):
            self._end_without_launcher()
            silence = time.monotonic() - self._answered
            if self.world_size == 1 or silence < 3 * BEATS_OF_SILENCE * self.beat_seconds:
                continue
            if not self._is_stuck():
                continue
            verdict = judge_here(self._moments(), self.timeout_seconds, has_met=dist.is_initialized())
            is_teller = self._board is None or self._board.is_first()
            if is_teller:
                print(f"error: {verdict}", file=sys.stderr, flush=True)
            self._end(verdict)

    def _end(self, verdict: str) -> None:
        """End this process, and the neighbours that cannot; the verdict has been told."""
        if self._board is not None:
            self._board.end_stopped(self.world_size)
            self._board.close()
        end_process(verdict, is_teller=False)

    def _moments(self) -> dict[int, Moment]:
        return {} if self._board is None else self._board.read(self.world_size)

    def _end_without_launcher(self) -> None:
        """A torchrun that was killed can end nobody."""
        if self._launcher is not None and os.getppid() != self._launcher:
            end_process("the launcher is gone", is_teller=self._is_teller())

    def _connected(self) -> Any:
        """A connection of our own: the main thread may block in its one."""
        if self._store is None:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = PrefixStore(f"megatron_exact/rank watch/{attempt}", store.clone())
        return self._store

    def _tell(self, store: Any) -> None:
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

    def _examine(self) -> None:
        """Give the verdict, once in the job."""
        store = self._connected()
        if store.compare_set(EXAMINER, "", str(self.rank)) != str(self.rank).encode():
            return  # another does; its verdict comes
        before = self._read_reports(store)
        for _ in range(BEATS_OF_SILENCE):
            time.sleep(self.beat_seconds)
            self._tell(store)
        after = self._read_reports(store)
        verdict = judge(before, after, self.world_size, self.timeout_seconds, self._moments())
        store.set(VERDICT, verdict)
        print(f"error: {verdict}", file=sys.stderr, flush=True)
        time.sleep((1 + BEATS_OF_SILENCE) * self.beat_seconds)  # for the others to read it
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

    def _is_teller(self) -> bool:
        """One rank a machine speaks for it."""
        return os.environ.get("LOCAL_RANK", "0") == "0"


def end_process(message: str, *, is_teller: bool, code: int = RANK_LOST) -> None:
    """End this process at once, and what it started; the main thread may be blocked for good."""
    if is_teller:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if message:
        tell_launcher(message, "user")  # a lease that is lost; RANK_LOST speaks for itself
    for child in multiprocessing.active_children():  # data workers, the writer of asynchronous saves
        child.kill()
    release_all()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    os._exit(code)


# ----------------------------------------------------------------------------------------------------
# How a job that fails ends: one line that names the first cause, and an exit code.
#
# Three kinds. A user's error (`ValueError`, `OSError`: cause, value, remedy) is told without a traceback.
# An error of a collective means that another rank is gone: what that rank said is told, not the noise of
# the connection that it broke. Anything else is a fault of ours or of upstream and keeps its traceback.

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
    tell_launcher(line, "user")
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
    tell_launcher(named, "user" if is_users else "fault")
    return 1


def leave(code: int) -> NoReturn:
    """End the process; a failed one at once, since its process groups may wait for ranks that are gone."""
    if code and torch.distributed.is_initialized():
        end_process("", is_teller=False, code=code)
    sys.exit(code)


def _tell(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
