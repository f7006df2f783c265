"""Who hangs, who ended first, and an end to the job in a set time.

Ranks work in step: when one hangs, all others wait for it in a collective, and after upstream's ten
minutes each of them fails with a text about sockets. Here a thread of each rank tells the others every few
seconds, through torch's own store, that it lives, what its main thread does and for how long, and where
in the code it is. The first rank that made no progress for `--rank-timeout-seconds` reads what all said and
gives a verdict that every rank obeys: the culprits are the ranks that give no sign of life, else those
that do not wait in a collective, else those that came least far.

The main thread marks its progress (`mark`): a few assignments, no communication. What may take long
(start-up, the first iteration with its compilation, a save) has `SLOW_FACTOR` times as long.

The store lives in a process that may be frozen itself: torchrun, or rank 0 without it. A second thread,
which never asks the store, sees that and judges by what the ranks of its machine wrote to their
`PhaseBoard`. Ranks that are stopped cannot obey a verdict: their neighbours kill them.

A rank that fails says so in the store first (`report_error`), so that those whose connection it breaks tell
its error instead of theirs. torchrun itself sees a process end at once, and ends the others.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from megatron_exact.folder_lock import release_all
from megatron_exact.json_input import parse_json_object
from megatron_exact.training.runtime import tell_launcher
from megatron_exact.training.watch.rank_reports import (
    Moment,
    PhaseBoard,
    Report,
    judge,
    judge_here,
    main_thread_location,
    name_silent,
)

RANK_LOST = 75
"""Exit code of a rank that ends because another hangs or is gone (EX_TEMPFAIL: start the job again)."""
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
        first = json.dumps({"rank": self.rank, "host": socket.gethostname(), "error": error})
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
            host=socket.gethostname(),
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
        tell_launcher(message)
    for child in multiprocessing.active_children():  # data workers, the writer of asynchronous saves
        child.kill()
    release_all()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    os._exit(code)
