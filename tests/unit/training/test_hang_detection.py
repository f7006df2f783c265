from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_exact.training.hang_detection import (
    PhaseBoard,
    RankWatch,
    Report,
    judge,
    judge_here,
    main_thread_location,
    name_silent,
)


def report(rank: int, *, beat: int, marks: int = 7, waits: bool = True, phase: str = "computing") -> Report:
    return Report(
        rank=rank,
        host=f"node{rank // 2}",
        beat=beat,
        marks=marks,
        iteration=12,
        phase=phase,
        seconds=301.0,
        location="dataset.py:99 __getitem__",
        waits=waits,
    )


def told(*reports: Report) -> str:
    """The verdict on ranks that all told something new."""
    after = {item.rank: item for item in reports}
    before = {rank: dataclasses.replace(item, beat=item.beat - 1) for rank, item in after.items()}
    return judge(before, after, len(reports), 300)


def test_a_rank_outside_of_communication_keeps_the_others_waiting() -> None:
    verdict = told(*(report(rank, beat=5, waits=rank != 2) for rank in range(4)))
    assert verdict == (
        "rank 2 (node1) hangs: iteration 12, computing for 301 s, at dataset.py:99 __getitem__; the other "
        "ranks wait; no progress in 300 s (--rank-timeout-seconds)"
    )


def test_a_rank_without_a_sign_of_life_comes_first() -> None:
    before = {rank: report(rank, beat=3) for rank in range(4)}
    after = {rank: report(rank, beat=3 if rank == 3 else 6, waits=rank != 1) for rank in range(4)}
    assert "no sign of life from rank 3 (node1) in iteration 12, computing" in judge(before, after, 4, 9)
    del after[0], before[0]  # it never said a word
    assert "no sign of life from rank 0; rank 3 (node1)" in judge(before, after, 4, 9)


def test_where_all_wait_the_one_that_is_behind_is_named() -> None:
    verdict = told(*(report(rank, beat=5, marks=6 if rank == 1 else 7) for rank in range(3)))
    assert verdict.startswith("rank 1 (node0) hangs")
    assert "all ranks hang and none is behind" in told(*(report(rank, beat=5) for rank in range(2)))


def test_many_are_not_listed_one_by_one() -> None:
    verdict = told(*(report(rank, beat=5, waits=rank > 9) for rank in range(2000)))
    assert "and ranks 3, 4, 5, 6, 7, 8, 9;" in verdict
    assert len(verdict) < 500
    assert "18, 19 and 10 more; " in told(*(report(rank, beat=5, waits=rank > 29) for rank in range(99)))


def test_all_alive_means_a_broken_connection() -> None:
    before = {rank: report(rank, beat=1) for rank in range(2)}
    after = {rank: report(rank, beat=2) for rank in range(2)}
    assert name_silent(before, after, 2) == "a connection between ranks broke, but all of them live"


def test_the_location_is_that_of_the_main_thread() -> None:
    location, waits = main_thread_location()
    assert location.endswith("main_thread_location")
    assert not waits
    assert time.monotonic()


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PhaseBoard:
    """The board of rank 0, this process, whose children are the other ranks."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setenv("MASTER_PORT", "29999")
    found = PhaseBoard(0)
    found.write(3, 12, "computing")
    return found


def as_rank_1(work: Callable[[PhaseBoard], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work(PhaseBoard(1))
        finally:
            os._exit(0)
    return child


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_phase_of_a_killed_rank_is_that_of_the_moment(board: PhaseBoard) -> None:
    def work(mine: PhaseBoard) -> None:
        mine.write(6, 11, "reducing gradients")
        mine.write(7, 12, "taking the step")
        os.kill(os.getpid(), signal.SIGKILL)

    child = as_rank_1(work)
    os.waitpid(child, 0)
    moments = board.read(3)
    assert sorted(moments) == [0, 1]
    assert moments[0].state == "R"
    before = {0: report(0, beat=1), 1: report(1, beat=1, marks=5, phase="start-up"), 2: report(2, beat=1)}
    after = {**before, 0: report(0, beat=2), 2: report(2, beat=2)}
    told = name_silent(before, after, 3, moments)
    assert f"rank 1 (node0) in iteration 12, taking the step (process {child} has ended)" in told
    ahead = {**after, 1: report(1, beat=1, marks=8, phase="saving")}  # the board's is older
    assert "in iteration 12, saving" in name_silent(before, ahead, 3, moments)
    assert f"(process {child} has ended)" in judge_here(moments, 9, has_met=True)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_stopped_rank_is_named_without_the_store_and_killed(board: PhaseBoard) -> None:
    def work(mine: PhaseBoard) -> None:
        mine.write(1, 4, "computing")
        os.kill(os.getpid(), signal.SIGSTOP)

    child = as_rank_1(work)
    os.waitpid(child, os.WUNTRACED)
    verdict = judge_here(board.read(2), 9, has_met=False)
    assert f"no sign of life from rank 1 ({os.uname().nodename}) in iteration 4, computing" in verdict
    assert f"(process {child} is stopped)" in verdict
    board.end_stopped(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_who_is_to_blame_is_not_guessed(board: PhaseBoard) -> None:
    alive = board.read(2)
    assert "the process that holds the ranks' store" in judge_here(alive, 9, has_met=True)
    assert "the ranks have not met: here rank 0 in iteration 12" in judge_here(alive, 9, has_met=False)
    assert "here none is known" in judge_here({}, 9, has_met=False)


def test_one_rank_speaks_and_a_board_goes_with_its_rank(board: PhaseBoard, tmp_path: Path) -> None:
    assert [board.is_first(), board.is_first()] == [True, False]
    board.close()
    board.write(9, 9, "after")
    assert board.read(1) == {}
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"megatron_exact-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    PhaseBoard(0).write(1, 1, "computing")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_of_somebody_else_is_not_read(
    tmp_path: Path, board: PhaseBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files could name any process, which `end_stopped` would kill."""
    (folder,) = tmp_path.iterdir()
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    folder.rename(tmp_path / f"megatron_exact-{os.getuid()}")
    other = PhaseBoard(1)
    assert other.read(2) == {}
    assert [other.is_first(), other.is_first()] == [True, True]


def test_the_seconds_are_those_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow phase is allowed several times as long."""
    watch = RankWatch(10.0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61.0)
    watch.world_size = 2
    said: list[str] = []
    monkeypatch.setattr(watch, "_end", said.append)
    monkeypatch.setattr(watch._stopped, "wait", lambda seconds: bool(said))
    watch._guard()
    assert said[0].endswith("no progress in 61 s (--rank-timeout-seconds)")
