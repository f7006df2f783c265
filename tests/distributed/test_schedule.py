"""Against upstream's own scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_exact.training.checkpoint_start import resume_schedule


def stock_load(made: Any, state: dict[str, Any]) -> None:
    type(made).load_state_dict(made, state)


def scheduler(steps: int, style: str = "constant", **changes: Any) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = {
        "optimizer": SimpleNamespace(param_groups=[{}]),
        "init_lr": 0.0,
        "max_lr": 1e-3,
        "min_lr": 1e-4,
        "lr_warmup_steps": 8,
        "lr_decay_steps": steps,
        "lr_decay_style": style,
        "start_wd": 0.01,
        "end_wd": 0.01,
        "wd_incr_steps": steps,
        "wd_incr_style": "constant",
        "use_checkpoint_opt_param_scheduler": False,
        **changes,
    }
    return OptimizerParamScheduler(**settings)


def rates(made: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        made.step(1)
        found.append(made.optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    ("style", "more"),
    [
        ("constant", {}),
        ("inverse-square-root", {}),
        ("WSD", {"wsd_decay_steps": 20, "lr_wsd_decay_style": "linear"}),
    ],
)
def test_a_longer_run_goes_on_where_the_past_stays_the_same(style: str, more: dict[str, Any]) -> None:
    first = scheduler(60, style, **more)
    past = rates(first, 40)
    longer = scheduler(100, style, **more)
    with pytest.raises(AssertionError, match="do not match"):
        stock_load(scheduler(100, style, **more), first.state_dict())
    resume_schedule(stock_load, longer, first.state_dict())
    assert past + rates(longer, 60) == rates(scheduler(100, style, **more), 100)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_curve_that_would_have_been_another_is_refused(style: str) -> None:
    first = scheduler(60, style)
    rates(first, 40)
    state = first.state_dict()
    with pytest.raises(ValueError, match=f"followed a {style} learning rate over 60 samples") as refused:
        resume_schedule(stock_load, scheduler(100, style), state)
    assert "--lr-decay-iters" in str(refused.value)
    kept = scheduler(60, style)
    resume_schedule(stock_load, kept, state)
    assert rates(kept, 40) == rates(first, 40)
    asked = scheduler(100, style, override_opt_param_scheduler=True)
    resume_schedule(stock_load, asked, state)
    assert (asked.num_steps, asked.lr_decay_steps) == (40, 100)
    obeyed = scheduler(100, style, use_checkpoint_opt_param_scheduler=True)
    resume_schedule(stock_load, obeyed, state)
    assert obeyed.lr_decay_steps == 60


def test_weight_decay_counts_too() -> None:
    ramp = {"start_wd": 0.0, "end_wd": 0.1, "wd_incr_style": "linear"}
    first = scheduler(60, **ramp)
    rates(first, 40)
    with pytest.raises(ValueError, match="another curve"):
        resume_schedule(stock_load, scheduler(100, **ramp), first.state_dict())
