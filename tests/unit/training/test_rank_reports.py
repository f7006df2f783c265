from __future__ import annotations

import dataclasses
import time

from megatron_exact.training.watch.rank_reports import Report, judge, main_thread_location, name_silent


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
    assert "and ranks 3, 4, 5, 6, 7, 8, 9" in verdict
    assert len(verdict) < 500


def test_all_alive_means_a_broken_connection() -> None:
    before = {rank: report(rank, beat=1) for rank in range(2)}
    after = {rank: report(rank, beat=2) for rank in range(2)}
    assert name_silent(before, after, 2) == "a connection between ranks broke, but all of them live"


def test_the_location_is_that_of_the_main_thread() -> None:
    location, waits = main_thread_location()
    assert location.endswith("main_thread_location")
    assert not waits
    assert time.monotonic()
