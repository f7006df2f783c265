"""How often a job saves: Young's interval against a search, and the iterations that are saved."""

from __future__ import annotations

import math

import pytest

from megatron_exact.training.checkpoint_saving import (
    GPU_HOURS_BETWEEN_FAILURES,
    SaveClock,
    young_seconds,
)


def lost_share(interval: float, save: float, failure: float) -> float:
    """Share of the time that saves and failures cost: exponential failures, half an interval each."""
    return save / interval + interval / 2 / failure


@pytest.mark.parametrize(("save", "failure"), [(5.0, 86_400.0), (60.0, 3_600.0 * 49), (0.2, 1e8)])
def test_youngs_interval_loses_least(save: float, failure: float) -> None:
    best = young_seconds(save, failure)
    tried = [best * 1.01**step for step in range(-300, 301)]
    assert min(tried, key=lambda each: lost_share(each, save, failure)) == pytest.approx(best)
    assert lost_share(best * 2, save, failure) > 1.2 * lost_share(best, save, failure)  # it is a minimum


class Job:
    """A job whose iterations and saves take a set time."""

    def __init__(self, minutes: float | None, iteration_seconds: float, save_seconds: float) -> None:
        self.time, self.iteration_seconds, self.save_seconds = 0.0, iteration_seconds, save_seconds
        self.agreed: list[int] = []
        self.clock = SaveClock(minutes, 1024, 100, now=lambda: self.time, agree=self.agree)

    def agree(self, value: int) -> int:
        self.agreed.append(value)
        return value

    def run(self, iterations: int, interval: int = 10**9) -> list[int]:
        """Iterations that were saved."""
        saved = []
        for iteration in range(101, 101 + iterations):
            self.time += self.iteration_seconds
            if self.clock.is_due(iteration) or iteration % interval == 0:
                self.time += self.save_seconds
                self.clock.saved(iteration, self.save_seconds)
                saved.append(iteration)
        return saved


def test_the_minutes_given() -> None:
    job = Job(5, iteration_seconds=10, save_seconds=7)
    assert job.run(100) == [130, 160, 190]  # the save's own time is none of an iteration's
    assert job.clock.news() == "a save every 5 minutes besides --save-interval (--save-minutes)"


def test_a_regular_save_begins_the_time_again() -> None:
    assert Job(5, 10, 7).run(100, interval=50) == [130, 150, 180, 200]


def test_no_minutes_are_no_saves_and_no_word_between_ranks() -> None:
    job = Job(0, 10, 7)
    assert job.run(500) == []
    assert job.agreed == []
    assert job.clock.news() is None


def test_by_default_the_time_follows_from_what_a_save_took() -> None:
    job = Job(None, iteration_seconds=20, save_seconds=15)
    failure = GPU_HOURS_BETWEEN_FAILURES * 3600 / 1024
    first, then = (round(math.sqrt(2 * cost * failure) / 20) for cost in (60, 15))
    assert job.run(first + then + 1) == [100 + first, 100 + first + then]
    line = job.clock.news()
    assert line is not None
    assert "a save takes 15.0 s, and 1024 GPUs fail once in 49 hours (Young's formula" in line
    assert job.clock.news() is None


def test_ranks_save_what_rank_0_says() -> None:
    """Another rank's clock runs differently; it still saves the same iterations."""
    leader = Job(5, 10, 7)
    saved = leader.run(100)
    follower = Job(5, 13, 9)
    answers = iter(leader.agreed)
    follower.clock._agree = lambda _: next(answers)
    assert follower.run(100) == saved
