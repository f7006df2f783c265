"""`--qk-timing` on top of upstream's own scheduler."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_exact.training.checkpoint_start import resume_schedule
from megatron_exact.training.qk_timing import QkTiming

STYLES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "inverse-square-root": {},
    "WSD": {"wsd_decay_steps": 20, "lr_wsd_decay_style": "minus_sqrt"},
}
TIMING = QkTiming(factor=0.25, fraction=0.2, return_fraction=0.1)
BATCH = 4


def scheduler(samples: int, style: str, timing: QkTiming | None = TIMING, **changes: Any) -> Any:
    """Upstream's scheduler, or ours, over a plain and a timed group."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_exact.training.qk_groups import TimedScheduler

    settings = {
        "optimizer": SimpleNamespace(param_groups=[{"lr_mult": 1.0}, {"lr_mult": TIMING.factor}]),
        "init_lr": 1e-5,
        "max_lr": 1e-3,
        "min_lr": 1e-4,
        "lr_warmup_steps": 24,
        "lr_decay_steps": samples,
        "lr_decay_style": style,
        "start_wd": 0.01,
        "end_wd": 0.01,
        "wd_incr_steps": samples,
        "wd_incr_style": "constant",
        "use_checkpoint_opt_param_scheduler": False,
        **STYLES[style],
        **changes,
    }
    if timing is None:
        return OptimizerParamScheduler(**settings)
    return TimedScheduler(window=timing.window(samples), **settings)


def rates(made: Any, iterations: int) -> list[tuple[float, float]]:
    """(plain, timed) of the coming iterations."""
    found = []
    for _ in range(iterations):
        found.append(tuple(group["lr"] for group in made.optimizer.param_groups))
        made.step(BATCH)
    return found


@pytest.mark.parametrize("style", STYLES)
def test_the_rate_of_any_schedule_is_multiplied(style: str) -> None:
    """In 30 iterations: 6 held back, 3 of the way back, the rest as upstream's."""
    stock, timed = (rates(scheduler(120, style, timing), 30) for timing in (None, TIMING))
    multipliers = [0.25] * 6 + [0.25, 0.5, 0.75] + [1.0] * 21
    for multiplier, (base, unmarked), (plain, held) in zip(multipliers, stock, timed, strict=True):
        assert plain == base == unmarked  # upstream itself makes nothing of lr_mult
        assert held == pytest.approx(multiplier * base, rel=1e-12)
    assert timed[-1][0] == timed[-1][1]


def resumed(first: Any, second: Any) -> Any:
    """`second` after loading what `first` saves; through JSON, so that only plain values may be in it."""
    state = json.loads(json.dumps(first.state_dict()))
    stock = type(second).__mro__[1].load_state_dict
    resume_schedule(lambda made, loaded: stock(made, loaded), second, state)
    return second


@pytest.mark.parametrize("iterations", [3, 7, 12])
def test_a_resume_goes_on_in_the_window(iterations: int) -> None:
    whole, first = scheduler(120, "cosine"), scheduler(120, "cosine")
    past = rates(first, iterations)
    assert past + rates(resumed(first, scheduler(120, "cosine")), 30 - iterations) == rates(whole, 30)


def test_a_longer_run_goes_on_only_once_both_windows_are_over() -> None:
    """The longer one's is over at 18 of its 60 iterations, and was another from iteration 6 on."""
    first = scheduler(120, "constant")
    rates(first, 20)
    with pytest.raises(ValueError, match="followed another --qk-timing window over the samples"):
        resumed(first, scheduler(240, "constant"))
    early = scheduler(120, "constant")
    rates(early, 5)
    resumed(early, scheduler(240, "constant"))  # so far they agree
    asked = scheduler(240, "constant", override_opt_param_scheduler=True)
    resumed(first, asked)
    shorter = QkTiming(factor=0.25, fraction=0.1, return_fraction=0.05)
    resumed(first, scheduler(240, "constant", shorter))  # the same samples of a longer run
