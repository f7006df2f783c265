"""Real processes under a real torchrun: a killed rank, and a launcher that is told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import jobs, ranks

pytestmark = pytest.mark.slow
ITERATIONS = 40
KILLED_AFTER = 6


def command(pack: Path, run: Path, checkpoint: Path, *extra: Any) -> list[str]:
    start = ("--load", run, "--save", run, "--pretrained-checkpoint", checkpoint)
    flags = ("--save-interval", 5, "--log-row-ids", "--exit-signal-handler", *extra)
    return [str(word) for word in jobs.command(pack, "exact", ITERATIONS, *start, *flags)]


@contextlib.contextmanager
def torchrun(argv: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks in a process group of their own; none of it outlives the block."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*launcher, "-m", "megatron_exact.training.pretrain", *argv]
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ranks_of(launcher: int) -> dict[int, int]:
    """Process id of each rank below a launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in children:
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                found[int(entry.removeprefix(b"RANK="))] = int(child)
    return found


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + ranks.TIMEOUT_SECONDS
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_equal_after_resume(
    pack: Path, run: Path, checkpoint: Path, tmp_path: Path, argv: list[str]
) -> None:
    ranks.train(2, argv, tmp_path / "resumed").check()
    whole = tmp_path / "whole"
    ranks.train(2, command(pack, whole, checkpoint), tmp_path / "output").check()
    for name in ("losses.jsonl", "rows.jsonl"):
        assert (run / name).read_text() == (whole / name).read_text()


def test_a_killed_rank_is_named_and_leaves_no_orphans(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    argv = command(pack, run, checkpoint)
    with torchrun(argv, log) as process:
        wait_for_lines(run / "losses.jsonl", KILLED_AFTER, process, log)
        workers = ranks_of(process.pid)
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(timeout=ranks.TIMEOUT_SECONDS) != 0
        assert not any(is_running(pid) for pid in workers.values())
    text = log.read_text()
    cause = text.rpartition("Root Cause")[2]
    assert f"Signal 9 (SIGKILL) received by PID {workers[1]}" in cause
    job = text.partition("Root Cause")[0].partition("torch.distributed.elastic")[0]
    assert "Connection closed by peer" not in job  # the noise of the other rank
    check_equal_after_resume(pack, run, checkpoint, tmp_path, argv)


def test_a_launcher_told_to_stop_waits_for_the_save(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    argv = command(pack, run, checkpoint, "--save-interval", 1000)
    with torchrun(argv, log) as process:
        wait_for_lines(run / "losses.jsonl", KILLED_AFTER, process, log)
        workers = ranks_of(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=ranks.TIMEOUT_SECONDS)
        assert not any(is_running(pid) for pid in workers.values())
    saved = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert KILLED_AFTER <= saved < ITERATIONS
    assert len(ranks.read_jsonl(run / "losses.jsonl")) == saved
    check_equal_after_resume(pack, run, checkpoint, tmp_path, argv)


def test_ranks_end_when_their_launcher_is_killed(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    """torchrun killed with -9 can end nobody; the watch of each rank sees that it is gone."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    argv = command(pack, run, checkpoint, "--train-iters", 100_000, "--rank-timeout-seconds", 5)
    with torchrun(argv, log) as process:
        wait_for_lines(run / "losses.jsonl", KILLED_AFTER, process, log)
        workers = ranks_of(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(is_running(pid) for pid in workers.values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not any(is_running(pid) for pid in workers.values())
    assert "error: the launcher is gone" in log.read_text()
