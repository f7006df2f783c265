"""Children end with us, whatever they do; progress is one line."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_exact.demo import processes
from megatron_exact.demo.processes import ChildFailure, ProgressLine, descendants, run_child, stoppable

# A child that starts a grandchild in a session of its own, as torchrun does, and ignores polite requests.
STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_goes_to_the_log_and_failure_has_its_code(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    run_child([sys.executable, "-c", "print('one')"], log=log)
    with pytest.raises(ChildFailure, match="exit code 3") as caught:
        run_child([sys.executable, "-c", "import sys; print('two', file=sys.stderr); sys.exit(3)"], log=log)
    assert caught.value.code == 3
    assert log.read_text() == "one\ntwo\n"


def test_variables_are_added_and_input_is_closed(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['EXTRA'], 'PATH' in os.environ, repr(sys.stdin.read()))"
    run_child([sys.executable, "-c", code], log=tmp_path / "log.txt", environment={"EXTRA": "7"})
    assert (tmp_path / "log.txt").read_text() == "7 True ''\n"


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found through /proc")
@pytest.mark.parametrize("interruptions", [1, 2])
def test_an_interrupted_child_leaves_no_descendant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptions: int
) -> None:
    monkeypatch.setattr(processes, "PATIENCE_SECONDS", 0.3 if interruptions == 1 else 60)
    log = tmp_path / "log.txt"
    family: list[int] = []
    others = set(descendants(os.getpid()))  # of tests before this one, a resource tracker for instance

    def poll() -> None:
        if log.read_text().endswith("\n"):
            family.extend([int(log.read_text()), *(set(descendants(os.getpid())) - others)])
            if interruptions == 2:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise KeyboardInterrupt

    started = time.monotonic()
    with stoppable(), pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", STUBBORN], log=log, on_poll=poll)
    assert len(set(family)) >= 2
    deadline = time.monotonic() + 10
    while any(map(is_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, family))
    assert time.monotonic() - started < 50


def test_termination_is_an_interruption() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_renews_itself() -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    line.show("iteration 1")
    line.show("iteration 2")
    line.finish("done")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert [part.strip() for part in text.split("\r")] == ["", "iteration 1", "iteration 2", "done"]


def test_elsewhere_lines_appear_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = ProgressLine(stream)
    for step in range(30):
        now[0] = 100.0 + step
        line.show(f"iteration {step}")
    line.finish("done")
    assert stream.getvalue().splitlines() == ["iteration 0", "iteration 10", "iteration 20", "done"]
