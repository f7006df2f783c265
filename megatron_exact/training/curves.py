"""The curves of `losses.jsonl` and `evaluations.jsonl` in TensorBoard; one W&B run for all jobs of a run.

A killed job has drawn points beyond the checkpoint from which the next job resumes. TensorBoard leaves out
what lies behind a purge step; W&B takes a point of each step once, if the jobs name the same run. Points
are written with a delay, so they are flushed before each save: a resume then misses none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_exact.exposure import Weighting
from megatron_exact.training.loss import StepTotals


def draw_totals(name: str, iteration: int, totals: StepTotals, weighting: Weighting) -> None:
    """Add one point to each curve; nothing without a writer, or for a loss that is not finite.

    Args:
        name: `training` or `validation`, which is never weighted.
        iteration: where the point lies.
        totals: over all ranks.
        weighting: the rule of the run.
    """
    writer = get_tensorboard_writer()
    if writer is None or not math.isfinite(totals.loss):
        return
    divides_by_mass = weighting.divides_by_mass and name == "training"
    writer.add_scalar(f"{name}/loss", totals.loss, iteration)
    writer.add_scalar(f"{name}/weighted loss", totals.objective(divides_by_mass=divides_by_mass), iteration)
    buckets = zip(weighting.lower_bounds, totals.bucket_loss_sums, totals.bucket_targets, strict=True)
    for lower, loss_sum, targets in buckets:
        if targets:
            writer.add_scalar(f"{name} loss by context/{lower:06d}", loss_sum / targets, iteration)


def drop_points_after(iteration: int) -> None:
    """Make TensorBoard leave out the points that an earlier job of this run drew after an iteration."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # What torch's SummaryWriter writes for `purge_step`, which has to be known before the checkpoint is
    first = iteration + 1
    events = writer._get_file_writer()
    events.add_event(Event(step=first, file_version="brain.Event:2"))
    events.add_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))


def flush_points() -> None:
    """Write the points drawn so far to disk."""
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()


def join_wandb_run(args: Any, first: Mapping[str, Any] | None) -> None:
    """Let a resumed job log into the W&B run of its beginning; called before Megatron opens one.

    Args:
        args: Megatron's validated namespace.
        first: run.json of the run, None at its beginning.
    """
    if args.wandb_project and first is not None and "wandb_run" in first:
        os.environ.setdefault("WANDB_RUN_ID", str(first["wandb_run"]))
        os.environ.setdefault("WANDB_RESUME", "allow")


def wandb_run_id() -> str | None:
    """Id of the W&B run into which this rank logs; None without one."""
    wandb = get_wandb_writer()
    return None if wandb is None else str(wandb.run.id)
