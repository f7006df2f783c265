"""Child processes that never outlive the demo, and one line that shows how far they are."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

POLL_SECONDS = 0.5
QUIET_LINE_SECONDS = 10.0
"""How often a line of progress appears where the output is no terminal."""
PATIENCE_SECONDS = 10.0
"""How long a child may take to end after each of SIGINT and SIGTERM before SIGKILL."""


class ChildFailure(ValueError):
    """A child process ended with an exit code other than 0."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"exit code {code} of: {shlex.join(command)}")
        self.code = code


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, even where a shell had them ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_child(
    command: Sequence[str],
    *,
    log: Path | None = None,
    environment: dict[str, str] | None = None,
    on_poll: Callable[[], None] | None = None,
) -> None:
    """Run a command to its end; if anything interrupts us, end it and all its descendants first.

    Args:
        command: program and arguments.
        log: receives stdout and stderr, appended; None lets them through.
        environment: variables to add to ours.
        on_poll: called about twice a second.

    Raises:
        ChildFailure: the command failed.
    """
    with contextlib.ExitStack() as stack:
        output: IO[bytes] | None = stack.enter_context(open(log, "ab")) if log is not None else None
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_SECONDS)
                if on_poll is not None:
                    on_poll()
                if child.returncode is not None:
                    break
        finally:
            end_child(child)
        if child.returncode != 0:
            raise ChildFailure(command, child.returncode)


def end_child(child: subprocess.Popen[bytes]) -> None:
    """End a child with all its descendants, gently first; nothing happens if it has ended by itself.

    A second interruption while it takes its time ends everything at once.
    """
    if child.poll() is not None:
        return
    # Handles, not numbers: torchrun's workers have sessions of their own and may end at any moment.
    family = [handle for pid in [child.pid, *descendants(child.pid)] if (handle := _open_process(pid))]
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            child.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE_SECONDS)
                break
    except KeyboardInterrupt:
        pass
    for handle in family:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    child.kill()
    child.wait()


def _open_process(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`, from Linux's /proc; empty elsewhere."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


class ProgressLine:
    """One line that renews itself on a terminal; elsewhere a new line now and then."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        if stream is None:
            # On a terminal the stream below that of a tool, which would escape the carriage return.
            below = sys.__stdout__
            stream = below if below is not None and below.isatty() else sys.stdout
        self._stream = stream
        self._terminal = stream.isatty()
        self._written_at = 0.0
        self._shown = ""

    def show(self, text: str) -> None:
        """Show the present state."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + text[:width].ljust(width))
            self._stream.flush()
        elif text != self._shown and time.monotonic() - self._written_at >= QUIET_LINE_SECONDS:
            self._write(text)
        self._shown = text

    def finish(self, text: str) -> None:
        """Replace the line by its last state."""
        if self._terminal:
            self._stream.write("\r" + text.ljust(shutil.get_terminal_size().columns - 1) + "\n")
            self._stream.flush()
        else:
            self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()
        self._written_at = time.monotonic()
