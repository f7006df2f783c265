"""Fork work from the test process, with its output in a file and an end that is waited for.

torch and Megatron take 4 to 10 CPU seconds to import; work that is forked from a process that has imported
them starts at once. No child outlives the test process, and each leads a process group of its own, so that
whatever it started can be ended with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
TOOLS = Path(__file__).resolve().parents[1] / "tools"


def start(work: Callable[[], int | None], output: Path, errors: Path | None = None) -> int:
    """Fork a child that does some work and exits; returns its process id.

    Args:
        work: called in the child; its value, or that of SystemExit, is the exit code.
        output: file that receives the child's stdout.
        errors: file that receives its stderr; None takes that of stdout.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # of threads that wait for work: torch runs on one here, and the child begins with none of them
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)
        os.setpgid(0, 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(output, flags), 1)
        os.dup2(1 if errors is None else os.open(errors, flags), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        code = int(work() or 0)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_tool(
    tool: str, *arguments: object, environment: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool of `tools/` to its end in a forked process.

    Args:
        tool: name of the file.
        arguments: command line, converted to text.
        environment: variables to set.
        cwd: folder to run in.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        child = start(tool_work(tool, *arguments, environment=environment, cwd=cwd), output, errors)
        code = wait(child)
        return subprocess.CompletedProcess([tool, *arguments], code, output.read_text(), errors.read_text())


def tool_work(
    tool: str, *arguments: object, environment: dict[str, str] | None = None, cwd: Path | None = None
) -> Callable[[], None]:
    """Return what `start` needs to run a tool of `tools/`; the arguments are those of `run_tool`."""

    def work() -> None:
        os.environ.update(environment or {})
        if cwd is not None:
            os.chdir(cwd)
        warnings.resetwarnings()  # pytest's filters would show what an interpreter of its own does not
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        sys.argv = [tool, *map(str, arguments)]
        runpy.run_path(str(TOOLS / tool), run_name="__main__")

    return work


def wait(child: int, seconds: float = 240) -> int:
    """Exit code of a child, negative for a signal.

    Raises:
        AssertionError: it has not ended in time, and was killed with its process group.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        code = exit_code(child)
        if code is not None:
            return code
        time.sleep(0.005)
    kill(child)
    os.waitpid(child, 0)
    raise AssertionError(f"hangs: not ended after {seconds} s")


def exit_code(child: int) -> int | None:
    """Exit code of a child, negative for a signal; None while it runs."""
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def kill(child: int) -> None:
    """Kill a child's process group: the child, or processes that outlived it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
