"""Arms, seeds and schedules of the miniature."""

from __future__ import annotations

import pytest

from examples.miniature.experiment import (
    ARMS,
    DISTANT,
    FULL,
    STANDARD,
    Trial,
    choose_arms,
    stage_options,
    trials,
)

LONG = FULL.long


def test_a_longer_schedule_is_the_same_one_stretched() -> None:
    longer = LONG.of_length(2 * LONG.iterations)
    assert (longer.iterations, longer.warmup_iterations) == (320, 16)
    options = stage_options(longer)
    assert options[options.index("--train-iters") + 1] == "320"
    assert options[options.index("--eval-interval") + 1] == "320"
    assert longer.of_length(LONG.iterations) == LONG
    assert LONG.of_length(4).warmup_iterations == 1


def test_trials_go_seed_by_seed() -> None:
    wanted = trials(FULL)
    assert len(wanted) == len(set(wanted)) == FULL.seeds * sum(map(len, ARMS.values()))
    assert [trial.seed for trial in wanted] == sorted(trial.seed for trial in wanted)
    assert wanted[0] == Trial(design=DISTANT, seed=1, arm=STANDARD)
    assert len({trial.name for trial in wanted}) == len(wanted)


def test_choice_of_arms() -> None:
    chosen = choose_arms(ARMS, designs=DISTANT, names="exact-1")
    assert {design: [arm.name for arm in arms] for design, arms in chosen.items()} == {
        DISTANT: ["standard", "exact-1"]
    }
    assert choose_arms(ARMS, designs=None, names=None) == ARMS
    with pytest.raises(ValueError, match="no arm exact-2: there are"):
        choose_arms(ARMS, designs=None, names="exact-2")
    with pytest.raises(ValueError, match="no design far: there are distant, near"):
        choose_arms(ARMS, designs="far", names=None)
