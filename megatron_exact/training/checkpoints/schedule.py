"""What becomes of the learning rate when a run goes on with another length.

Upstream compares the schedule's settings one by one and stops with a traceback, also where they mean the
same: a constant rate has no length. Here the two curves are compared over what was already trained. Where
they agree, the flags decide how it goes on; where the new one would have been different from the start, the
job is refused unless `--override-opt-param-scheduler` asks for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

MOST_POINTS = 1000


def resume_schedule(
    stock_load: Callable[[Any, dict[str, Any]], None], scheduler: Any, state: dict[str, Any]
) -> None:
    """Set a scheduler to a checkpoint's position, on the curve that this job's flags describe.

    Args:
        stock_load: upstream's `load_state_dict`.
        scheduler: upstream's OptimizerParamScheduler, made from this job's flags.
        state: what the run's checkpoint says.

    Raises:
        ValueError: the flags describe another curve than the one the run has followed so far.
    """
    if not (scheduler.override_opt_param_scheduler or scheduler.use_checkpoint_opt_param_scheduler):
        _require_same_past(scheduler, state)
    scheduler.override_opt_param_scheduler = not scheduler.use_checkpoint_opt_param_scheduler
    stock_load(scheduler, state)


def _require_same_past(scheduler: Any, state: dict[str, Any]) -> None:
    past = copy.copy(scheduler)
    for name in set(state) & set(vars(scheduler)) - {"num_steps"}:
        setattr(past, name, state[name])
    trained = state["num_steps"]
    for step in range(0, trained + 1, max(1, trained // MOST_POINTS)):
        before, now = (_values_at(curve, step) for curve in (past, scheduler))
        if before.timed != now.timed and before.rate == now.rate:
            raise ValueError(
                "the run has followed another --qk-timing window over the samples trained so far "
                f"({past.qk_window}, now {scheduler.qk_window}), as the window is a part of the length of "
                "the training: give the length of the beginning, or --override-opt-param-scheduler to go "
                "on with this job's window at this point"
            )
        if before != now:
            raise ValueError(
                f"the run has followed a {state['lr_decay_style']} learning rate over "
                f"{state['lr_decay_steps']:,} samples; this job's flags make it "
                f"{scheduler.lr_decay_steps:,} and another curve from the start (at sample {step:,}: "
                f"{before.rate:.6g}, now {now.rate:.6g}): give the --lr-decay-iters of the beginning, or "
                "--override-opt-param-scheduler to change over at this point"
            )


class _Values(NamedTuple):
    """What a scheduler sets at one position."""

    rate: float
    """Learning rate."""
    timed: float
    """Learning rate of the groups that `--qk-timing` holds back; without it the same."""
    weight_decay: float
    """Before the multiplier of a group."""


def _values_at(scheduler: Any, step: int) -> _Values:
    """Values at a position, counted in samples."""
    curve = copy.copy(scheduler)
    curve.num_steps = step
    return _Values(curve.get_lr({}), curve.get_lr({"lr_mult": 0.0}), curve.get_wd())
