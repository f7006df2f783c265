"""Code shared by all tools: one-line errors with an exit code, progress bars, argument types."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from tqdm import tqdm

FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")
RESUMED_SECONDS = 1.0
MEASURED_SECONDS = 5.0
"""Work is measured for this long before the time that is left is estimated."""
SHORTEST_TOLD_SECONDS = 60.0
LAST_ERROR = re.compile(r"^[\w.]+(?:Error|Exception): (.*)", re.MULTILINE)
"""The error of a data worker arrives inside its traceback, with the message at the end."""


class ArgumentError(argparse.ArgumentTypeError, ValueError):
    """A bad value on the command line; argparse prints the message of this class and of no other."""


class TerminatedError(BaseException):
    """SIGTERM arrived; raised where the main thread is, so that `finally` blocks clean up."""


class ToolParser(argparse.ArgumentParser):
    """A parser whose errors are one line through `run_tool`, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def command_parser(
    command: Callable[..., object], prog: str | None, examples: str, *, allow_abbrev: bool = True
) -> ToolParser:
    """Return the parser of a command, whose help is the command's docstring followed by examples.

    Args:
        command: the function that runs it.
        prog: what the user typed to get here; None takes the name of the script.
        examples: end of the help; `%(prog)s` stands for what the user typed.
        allow_abbrev: whether an option may be shortened; not where unknown options are passed on.
    """
    return ToolParser(
        prog=prog,
        description=inspect.getdoc(command),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit.

    0 or its own code, 1 with one line for a user's error, 130 on ^C, 143 on SIGTERM.

    ValueError and OSError are for users (cause, value, remedy) and are printed without a traceback;
    anything else is a fault of ours and keeps its traceback. MEGATRON_EXACT_TRACEBACK=1 shows all.
    """
    warnings.showwarning = _print_warning
    try:
        with _sigterm_raises(), contextlib.redirect_stdout(cast("TextIO", PrintableOutput(sys.stdout))):
            code = main() or 0
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except TerminatedError:
        print("terminated", file=sys.stderr)
        sys.exit(143)
    except BrokenPipeError:  # the reader of our output has closed it (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        if os.environ.get("MEGATRON_EXACT_TRACEBACK") == "1":
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise TerminatedError on the first SIGTERM, in this process only; later ones are ignored."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # somebody has decided already what happens
        return
    owner = os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() != owner:  # a forked child: die as if nothing had been installed
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise TerminatedError

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) in (stop, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def describe(error: BaseException) -> str:
    """Return an error as one line for a user: its message, or file and reason of an OSError."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}")
    text = str(error)
    if FROM_WORKER.match(text) and (found := LAST_ERROR.findall(text)):
        text = found[-1]
    return one_line(text) or type(error).__name__


def one_line(text: str) -> str:
    """Return a message as one printable line.

    Names of files and tensors come from others, and a control character could rewrite the terminal.
    """
    return printable(" ".join(text.split()))


def printable(text: str, but: str = "") -> str:
    """Return a text with every character escaped that a terminal would obey instead of showing it.

    Args:
        text: contains names or messages from outside.
        but: control characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in but else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class PrintableOutput:
    """Standard output of a tool: whatever name it prints, no control character reaches the terminal.

    Lines and tabs are the tool's own; a name in a line of its own goes through `printable`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text with control characters escaped; returns its length."""
        self._stream.write(printable(text, but="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {one_line(str(message))}", file=sys.stderr)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: `2 d 3 h`, `3 h 12 min`, `12 min`."""
    minutes = int(seconds + 59) // 60
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class TimeLeft:
    """Prints once, from the rate of the first seconds, how long work will take that has no visible bar.

    Args:
        description: what the work is.
        total: how much there is of it; None for work of unknown size, which has no estimate.
    """

    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total = description, total
        self._began = self._from = time.monotonic()
        self._done = self._before = 0.0
        self._is_said = False
        self._stream = sys.stderr  # which lm-eval's calls are redirected from

    def add(self, amount: float) -> None:
        """Count finished work. What is counted at the very start was there before this run."""
        now = time.monotonic()
        self._done += amount
        if now - self._began < RESUMED_SECONDS:
            self._from, self._before = now, self._done
        elif not self._is_said and self.total and now - self._from >= MEASURED_SECONDS:
            rate = (self._done - self._before) / (now - self._from)
            left = (self.total - self._done) / rate if rate > 0 else 0.0
            self._is_said = True
            if left >= SHORTEST_TOLD_SECONDS:
                share = f"{self._done / self.total:.0%} of the work is done"
                line = f"{self.description}: about {duration(left)} left, {share}"
                print(one_line(line), file=self._stream, flush=True)


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that prints the time left once where it is not shown."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._time_left = TimeLeft(named["desc"], named["total"])

    def update(self, n: float | None = 1) -> bool | None:
        """Add work."""
        if self.disable and n is not None:
            self.n += n
            self._time_left.add(n)
        return super().update(n)


def progress_bar(description: str, total: int | None, unit: str) -> tqdm[Any]:
    """Return a tqdm bar on stderr.

    Where stderr is not a terminal there is no bar, but one line with the time that is left, as soon as it
    can be told.
    """
    return _Bar(
        total=total,
        desc=one_line(description),
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
    )


def positive_int(text: str) -> int:
    """Parse a whole number above 0 for argparse, also `1_000`, `4K` and `2M` (x 1,024)."""
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    number = text[:-1] if scale > 1 else text
    try:
        value = int(number) * scale
    except ValueError:
        raise ArgumentError(f"{text!r} is not a whole number") from None
    if value <= 0:
        raise ArgumentError(f"{text!r} is not above 0")
    return value


def png_path(text: str) -> Path:
    """Parse the path of a PNG figure for argparse."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise ArgumentError(f"{text!r} does not end in .png: figures are PNG files")
    return path


def non_negative(text: str) -> float:
    """Parse a number of 0 or above for argparse."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{text!r} is not 0 or above")
    return value


def positive_number(text: str) -> float:
    """Parse a number above 0 for argparse."""
    value = non_negative(text)
    if value == 0:
        raise ArgumentError(f"{text!r} is not above 0")
    return value


def fraction(text: str) -> float:
    """Parse a number from 0 up to, but not including, 1 for argparse."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and 0 <= value < 1):
        raise ArgumentError(f"{text!r} is not in [0, 1)")
    return value


def use_examples(tool: str) -> None:
    """Make the package `examples` importable for a tool that lies in the same checkout.

    Args:
        tool: the tool's `__file__`.

    Raises:
        ValueError: the tool does not lie in a checkout; an installed package contains no examples.
    """
    checkout = Path(tool).resolve().parents[1]
    if not (checkout / "examples" / "miniature" / "pipeline.py").is_file():
        raise ValueError(
            f"{checkout} contains no examples/miniature, which this tool runs and installed packages do "
            "not have: run the tool in a checkout of the sources"
        )
    sys.path.insert(0, str(checkout))  # before site-packages, where others may have put their examples
