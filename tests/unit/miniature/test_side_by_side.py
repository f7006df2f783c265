"""Tasks in threads: order, failure, and that nothing of a failed experiment runs on."""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from megatron_exact.demo.workspace import Workspace
from megatron_exact.miniature.chain import COMMANDS, Chain, StoppedError
from megatron_exact.miniature.experiment import Trial, side_by_side, trials
from megatron_exact.miniature.settings import ARMS, DISTANT, FULL, LONG, STANDARD, stage_options


def test_results_come_in_the_order_of_the_tasks() -> None:
    second = threading.Event()

    def first_waits() -> int:
        assert second.wait(60)
        return 1

    def second_sets() -> int:
        second.set()
        return 2

    assert side_by_side(threading.Event(), 2, [first_waits, second_sets]) == [1, 2]


def test_a_failure_stops_the_others_and_is_the_one_that_is_told(tmp_path: Path) -> None:
    chain = Chain(workspace=Workspace(tmp_path, print), stop=threading.Event(), say=print)
    started = threading.Event()
    waits = [sys.executable, "-c", "import time; time.sleep(600)"]
    fails = [sys.executable, "-c", "raise SystemExit('error: no good')"]

    def run_long() -> None:
        (tmp_path / "long").mkdir()
        started.set()
        chain.call(waits, tmp_path / "long" / "log.txt")

    def fail() -> None:
        assert started.wait(60)
        (tmp_path / "short").mkdir()
        chain.call(fails, tmp_path / "short" / "log.txt")

    never = partial(pytest.fail, "a task began after the failure")
    with pytest.raises(ValueError, match="failed \\(error: no good\\)"):
        side_by_side(chain.stop, 2, [run_long, fail, never])
    assert chain.stop.is_set()
    with pytest.raises(StoppedError):
        side_by_side(chain.stop, 2, [never])
    with pytest.raises(StoppedError):
        chain.call(fails, tmp_path / "short" / "log.txt")
    assert (tmp_path / "long" / COMMANDS).read_text().startswith("python -c")


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
