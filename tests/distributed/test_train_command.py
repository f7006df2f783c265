"""`megatron-exact train` with real ranks: exit codes, signals, and one line where a rank ends the job."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import jobs, ranks
from tests.distributed.test_torchrun import command, is_running, ranks_of, wait_for_lines

pytestmark = pytest.mark.slow
ITERATIONS = 12


@contextlib.contextmanager
def train(argv: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks in a process group of their own; none of it outlives the block."""
    words = [sys.executable, "-m", "megatron_exact", "train", "--nproc-per-node", "2", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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


def errors(log: Path) -> list[str]:
    text = log.read_text()
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_job_runs_as_under_torchrun(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    argv = command(pack, tmp_path / "run", checkpoint, "--train-iters", ITERATIONS)
    log = tmp_path / "log.txt"
    with train(argv, log) as process:
        assert process.wait(timeout=ranks.TIMEOUT_SECONDS) == 0, log.read_text()[-3000:]
    assert errors(log) == []
    text = log.read_text()
    assert text.count("megatron_exact: token weighting exact") == 1  # rank 0 says it, the launcher does not
    other = command(pack, tmp_path / "other", checkpoint, "--train-iters", ITERATIONS)
    ranks.train(2, other, tmp_path / "output").check()
    losses = [(tmp_path / name / "losses.jsonl").read_text() for name in ("run", "other")]
    assert losses[0] == losses[1]
    assert losses[0].count("\n") == ITERATIONS


def test_a_killed_rank_ends_the_job_with_its_signal(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    with train(command(pack, run, checkpoint, "--train-iters", 100_000), log) as process:
        wait_for_lines(run / "losses.jsonl", 2, process, log)
        workers = ranks_of(process.pid)
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(timeout=ranks.TIMEOUT_SECONDS) == 128 + signal.SIGKILL
        assert not any(is_running(pid) for pid in workers.values())
    assert errors(log)[-1] == "error: rank 1 was ended by SIGKILL"


def test_a_signal_reaches_the_ranks_and_they_save(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    argv = command(pack, run, checkpoint, "--train-iters", 100_000, "--save-interval", 100_000)
    with train(argv, log) as process:
        wait_for_lines(run / "losses.jsonl", 2, process, log)
        workers = ranks_of(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=ranks.TIMEOUT_SECONDS) == 128 + signal.SIGTERM
        assert not any(is_running(pid) for pid in workers.values())
    assert errors(log) == []
    assert log.read_text().splitlines()[-1] == "the ranks were ended after SIGTERM"
    saved = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert len(ranks.read_jsonl(run / "losses.jsonl")) == saved


def test_what_a_rank_refuses_is_repeated_in_one_line(tmp_path: Path, checkpoint: Path) -> None:
    """The corpus is gone: the launcher does not read data, rank 0 does."""
    pack = jobs.make_pack(jobs.make_corpus(tmp_path / "docs"), "concat")
    (tmp_path / "docs.bin").unlink()
    log = tmp_path / "log.txt"
    with train(command(pack, tmp_path / "run", checkpoint), log) as process:
        assert process.wait(timeout=ranks.TIMEOUT_SECONDS) == 1
    first, last = errors(log)
    assert "docs.bin" in first
    assert last == f"error: rank 0 ended with exit code 1: {first.removeprefix('error: ')}"
