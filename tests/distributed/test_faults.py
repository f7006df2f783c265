"""Ranks that are told to stop, die, fail or hang: what the job says, how it ends, and how it goes on."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.training.runtime import RANK_LOST
from tests.distributed import jobs, ranks

ITERATIONS = 4
ITERATION = 3


def resumable(pack: Path, run: Path, checkpoint: Path, *extra: Any) -> list[Any]:
    """The same command starts and resumes; it saves after every iteration."""
    start = ("--load", run, "--save", run, "--pretrained-checkpoint", checkpoint)
    flags = ("--save-interval", 1, "--log-row-ids", *extra)
    return jobs.command(pack, "exact", ITERATIONS, *start, *flags)


def at_iteration(action: Callable[[], None], rank: int = 1) -> Callable[[], None]:
    """A patch that calls `action` on one of two data-parallel ranks in the middle of ITERATION."""

    def patch() -> None:
        from megatron_exact.training import run as run_module

        stock, calls = run_module.next_packed_batch, [0]

        def next_packed_batch(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            is_here = calls[0] == (ITERATION - 1) * jobs.GLOBAL_BATCH // 2 + 2
            if is_here and int(os.environ["RANK"]) == rank:
                action()
            return stock(*args, **kwargs)

        run_module.next_packed_batch = next_packed_batch  # type: ignore[assignment]

    return patch


def same_records(first: Path, second: Path) -> None:
    for name in ("losses.jsonl", "rows.jsonl"):
        assert (first / name).read_text() == (second / name).read_text()


@pytest.fixture(scope="module")
def whole(pack: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    ranks.train(2, resumable(pack, folder / "run", checkpoint), folder / "output").check()
    return folder / "run"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_job_told_to_stop_saves_and_goes_on_to_the_bit(
    name: str, pack: Path, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    """One rank gets the signal; with the handler all of them end the iteration, save, and leave with 0."""
    run = tmp_path / "run"
    handler = ("--exit-signal-handler", "--exit-signal", name, "--save-interval", 100)
    argv = resumable(pack, run, checkpoint, *handler)
    tell = at_iteration(lambda: os.kill(os.getpid(), signal.Signals[name]))
    ranks.train(2, argv, tmp_path / "o1", tell).check()
    assert (run / "latest_checkpointed_iteration.txt").read_text() == str(ITERATION)
    ended = ranks.train(2, argv, tmp_path / "o2").check()
    assert f"resuming from iter_{ITERATION:07d}" in ended.outputs[0]
    same_records(run, whole)


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def assert_silent(rank: int, fate: str, error: str) -> None:
    """The rank is named with what it did at that moment, and what became of its process."""
    told = (
        rf"no sign of life from rank {rank} \({os.uname().nodename}\) in iteration {ITERATION}, "
        rf"reading a micro-batch \(process \d+ {fate}\)"
    )
    assert re.search(told, error), error


def test_a_rank_that_dies_is_named_without_the_noise_of_its_peers(
    pack: Path, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = resumable(pack, run, checkpoint, "--rank-timeout-seconds", 5)
    die = at_iteration(lambda: os.kill(os.getpid(), signal.SIGKILL))
    ended = ranks.train(2, argv, tmp_path / "o1", die)
    assert ended.codes == [RANK_LOST, -signal.SIGKILL]
    (error,) = errors(ended.outputs[0])
    assert_silent(1, "has ended", error)
    assert "Traceback" not in ended.outputs[0]
    ranks.train(2, argv, tmp_path / "o2").check()
    same_records(run, whole)


def test_the_first_error_is_told_by_all(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the disk is on fire")

    ended = ranks.train(
        2, resumable(pack, tmp_path / "run", checkpoint), tmp_path / "o1", at_iteration(fail)
    )
    assert ended.codes == [RANK_LOST, 1]
    assert errors(ended.outputs[1]) == ["error: rank 1: RuntimeError: the disk is on fire"]
    assert "in fail" in ended.outputs[1]  # the traceback of the culprit, and of nobody else
    (error,) = errors(ended.outputs[0])
    assert error.endswith(f"rank 1 ({os.uname().nodename}) ended first: RuntimeError: the disk is on fire")
    assert "Traceback" not in ended.outputs[0]


def test_a_rank_that_hangs_ends_the_job_in_time(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    def hang() -> None:
        time.sleep(3600)

    argv = resumable(pack, tmp_path / "run", checkpoint, "--rank-timeout-seconds", 4)
    before = time.monotonic()
    ended = ranks.train(2, argv, tmp_path / "o1", at_iteration(hang))
    assert time.monotonic() - before < ranks.TIMEOUT_SECONDS / 2
    assert ended.codes == [RANK_LOST, RANK_LOST]
    (error,) = errors(ended.outputs[0] + ended.outputs[1])
    assert (
        f"rank 1 ({os.uname().nodename}) hangs: iteration {ITERATION}, reading a micro-batch for" in error
    )
    assert "test_faults.py" in error
    assert "the other ranks wait" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_ends_the_job_in_time(
    rank: int, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Also rank 0, in which the ranks' store lives; the other rank kills what is stopped."""
    argv = resumable(pack, tmp_path / "run", checkpoint, "--rank-timeout-seconds", 5)
    freeze = at_iteration(lambda: os.kill(os.getpid(), signal.SIGSTOP), rank)
    before = time.monotonic()
    ended = ranks.train(2, argv, tmp_path / "o1", freeze)
    assert time.monotonic() - before < ranks.TIMEOUT_SECONDS / 2
    assert (ended.codes[rank], ended.codes[1 - rank]) == (-signal.SIGKILL, RANK_LOST)
    (error,) = errors(ended.outputs[1 - rank])
    assert_silent(rank, "is stopped", error)


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [0, 3])
def test_a_slow_save_or_no_watch_is_no_hang(
    timeout: int, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """A save of two timeouts goes through; with 0 so does a step that lasts as long."""

    def patch() -> None:
        from megatron_exact.training import substitutions as watch_hooks

        stock = watch_hooks._stock_save

        def save(*args: Any, **kwargs: Any) -> Any:
            time.sleep(6 * int(os.environ["RANK"]))
            return stock(*args, **kwargs)

        watch_hooks._stock_save = save
        if not timeout:
            at_iteration(lambda: time.sleep(6))()

    flags = ("--rank-timeout-seconds", timeout, "--save-interval", ITERATIONS)
    ranks.train(2, resumable(pack, tmp_path / "run", checkpoint, *flags), tmp_path / "o1", patch).check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_rank_killed_at_any_moment_costs_nothing_but_time(
    seed: int, pack: Path, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    """The moment falls anywhere between the first micro-batch and the end; most of that time is saving."""
    run, clock = tmp_path / "run", tmp_path / "clock"

    def patch() -> None:
        import threading

        from megatron_exact.training import run as run_module

        stock = run_module.next_packed_batch

        def next_packed_batch(*args: Any, **kwargs: Any) -> Any:
            if not clock.exists() and int(os.environ["RANK"]) == seed % 2:
                clock.touch()
                delay = random.Random(seed).uniform(0, 1.5)
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return stock(*args, **kwargs)

        run_module.next_packed_batch = next_packed_batch  # type: ignore[assignment]

    argv = resumable(pack, run, checkpoint, "--rank-timeout-seconds", 5)
    killed = ranks.train(2, argv, tmp_path / "o1", patch)
    assert clock.exists()
    if any(killed.codes):
        assert -signal.SIGKILL in killed.codes
        ranks.train(2, argv, tmp_path / "o2").check()
    same_records(run, whole)
