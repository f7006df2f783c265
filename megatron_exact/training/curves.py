"""The curves of `losses.jsonl` and `evaluations.jsonl` in TensorBoard."""

from __future__ import annotations

import math

from megatron.training.global_vars import get_tensorboard_writer

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
