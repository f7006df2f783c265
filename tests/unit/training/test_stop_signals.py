"""Signals that ask a job to stop are kept from the first line of Python on, in all that a job starts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_exact.training import stop_signals

ROOT = Path(__file__).resolve().parents[3]
HOLD = "from megatron_exact.training import stop_signals\nstop_signals.hold(['--exit-signal-handler'])\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", HOLD + code]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--lr 1", ()),
        ("--exit-signal SIGUSR2", ()),  # Megatron wants the handler for it
        ("--exit-signal-handler", ("SIGTERM", "SIGUSR1")),
        ("--exit-signal-handler --exit-signal SIGUSR2", ("SIGTERM", "SIGUSR1", "SIGUSR2")),
        ("--exit-signal-handler --exit-signal=SIGINT", ("SIGTERM", "SIGUSR1", "SIGINT")),
        ("--exit-signal-handler --exit-signal FOO", ("SIGTERM", "SIGUSR1")),  # refused elsewhere
    ],
)
def test_which_signals(words: str, names: tuple[str, ...]) -> None:
    assert stop_signals.signals_of(words.split()) == {signal.Signals[name] for name in names}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_pending_and_kills_nobody(name: str) -> None:
    done = run(
        f"import os, signal\nassert not stop_signals.pending(stop_signals.ASKING)\n"
        f"os.kill(os.getpid(), signal.{name})\nprint(stop_signals.pending(stop_signals.ASKING))"
    )
    assert (done.returncode, done.stdout) == (0, f"{signal.Signals[name].value}\n"), done.stderr


def test_what_a_job_starts_survives_too_and_can_be_ended() -> None:
    """Slurm signals every process of a step; Python's own way to end a worker still ends it."""
    done = run(
        "import multiprocessing, os, signal, subprocess, sys, time\n"
        "other = subprocess.Popen(['sleep', '60'])\n"
        "worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,), daemon=True)\n"
        "worker.start()\n"
        "for pid in (other.pid, worker.pid):\n"
        "    os.kill(pid, signal.SIGTERM)\n"
        "time.sleep(0.5)\n"
        "print(other.poll(), worker.is_alive())\n"
        "other.kill()\n"
        "worker.terminate()\n"
        "worker.join(10)\n"
        "print(worker.is_alive())\n"
    )
    assert done.stdout == "None True\nFalse\n", done.stderr


def started(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_exact.training.pretrain", *words]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def blocks(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", sorted(stop_signals.ASKING))
def test_the_entry_point_remembers_before_it_imports(number: signal.Signals) -> None:
    with started("--exit-signal-handler") as process:
        deadline = time.monotonic() + 60
        while not blocks(process.pid, number):
            assert time.monotonic() < deadline
        opened = {path.resolve().name for path in Path(f"/proc/{process.pid}/fd").iterdir()}
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert opened  # it ran when the signal came
    assert process.returncode == 1
    assert "--pack is missing" in errors


def test_without_the_handler_a_signal_ends_the_job_at_once() -> None:
    with started() as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
