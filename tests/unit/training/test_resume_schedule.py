"""When a run with `--qk-timing` may resume with another length: where its past stays what it was."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from megatron_exact.training.checkpoint_start import resume_schedule
from megatron_exact.training.qk_timing import QkTiming, QkWindow

RATE = 1e-3


@dataclass
class ConstantScheduler:
    """As far as a resume asks: a constant rate, and the window of a training of some length."""

    samples: int
    num_steps: int = 0
    override_opt_param_scheduler: bool = False
    use_checkpoint_opt_param_scheduler: bool = False
    lr_decay_style: str = "constant"
    qk_window: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.lr_decay_steps = self.samples
        self.qk_window = asdict(QkTiming().window(self.samples))

    def get_lr(self, group: dict[str, Any]) -> float:
        multiplier = QkWindow(**self.qk_window).multiplier(self.num_steps)
        return RATE * multiplier if group.get("lr_mult", 1.0) != 1.0 else RATE

    def get_wd(self) -> float:
        return 0.01


def load(scheduler: ConstantScheduler, state: dict[str, Any]) -> None:
    scheduler.num_steps = state["num_steps"]


def resume(begun: int, trained: int, now: int, **flags: bool) -> ConstantScheduler:
    names = ("lr_decay_style", "lr_decay_steps", "qk_window")
    past = ConstantScheduler(begun)
    state = {"num_steps": trained, **{name: getattr(past, name) for name in names}}
    scheduler = ConstantScheduler(now, **flags)
    resume_schedule(load, scheduler, state)
    return scheduler


@pytest.mark.parametrize(
    ("begun", "trained", "now"), [(1000, 1000, 1000), (1000, 40, 2000), (2000, 40, 1000)]
)
def test_the_same_past_goes_on(begun: int, trained: int, now: int) -> None:
    scheduler = resume(begun, trained, now)
    assert (scheduler.num_steps, scheduler.qk_window) == (trained, asdict(QkTiming().window(now)))


@pytest.mark.parametrize(
    ("begun", "trained", "now"), [(1000, 45, 2000), (1000, 1000, 2000), (2000, 60, 1000)]
)
def test_another_past_is_refused_until_it_is_overridden(begun: int, trained: int, now: int) -> None:
    with pytest.raises(ValueError, match=r"another --qk-timing window.*'hold_samples'.*or --override"):
        resume(begun, trained, now)
    scheduler = resume(begun, trained, now, override_opt_param_scheduler=True)
    assert scheduler.get_lr({"lr_mult": 0.25}) == RATE * QkTiming().window(now).multiplier(trained)
