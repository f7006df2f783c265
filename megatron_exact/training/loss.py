"""The weighted token loss of a micro-batch, its sums for the records, and its normalization.

The objective is `L = sum_i m_i w_i CE_i / sum_i m_i` over the supervised targets of the global batch. The
loss function returns the numerator of one micro-batch and its number of targets.
`--calculate-per-token-loss` makes Megatron divide the gradients by the number over the whole global batch,
whatever the layout. Weights never enter that count.

The normalized rules divide by the mass `sum_i m_i w_i` instead. Megatron's `finalize_model_grads` takes an
int32 count, and the mass is a float that only the last pipeline stage knows. For these rules Megatron
therefore does not divide; `finalize_divided_by_mass` sums the mass and scales the gradients once. The hook
is `config.finalize_model_grads_func` (megatron/core/pipeline_parallel/schedules.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_exact.training.batch import Targets


def finalize_divided_by_mass(model: list[Any], local_mass: Tensor, **kwargs: Any) -> None:
    """Reduce the gradients, and divide them by the sum of weights of the global batch.

    Args:
        model: this rank's model chunks (wrapped for data parallelism).
        local_mass: float64 scalar, sum of the weights of this rank's micro-batches; read on the last
            pipeline stage only.
        kwargs: further arguments that the schedule passes to Megatron's function.
    """
    mass = local_mass.clone()
    torch.distributed.broadcast(
        mass,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    torch.distributed.all_reduce(
        mass, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    finalize_model_grads(model, None, **kwargs)
    if mass > 0:  # a batch without any target has no gradient to scale
        for chunk in model:
            chunk.scale_gradients(1.0 / mass.float())


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Sums over the supervised targets of one iteration or evaluation, over all ranks."""

    bucket_loss_sums: list[float]
    """[buckets], sums of unweighted cross-entropies, nats."""
    bucket_targets: list[int]
    """[buckets], numbers of supervised targets."""
    weighted_loss_sum: float
    """Sum of weight times cross-entropy."""
    weight_mass: float
    """Sum of weights."""
    positions: int = 0
    """Number of inputs, supervised or not."""

    @property
    def targets(self) -> int:
        """Number of supervised targets."""
        return sum(self.bucket_targets)

    @property
    def loss(self) -> float:
        """Unweighted mean cross-entropy, nats; NaN without targets."""
        return sum(self.bucket_loss_sums) / self.targets if self.targets else float("nan")

    def objective(self, *, divides_by_mass: bool) -> float:
        """Return the loss that is minimised; NaN without targets."""
        divisor = self.weight_mass if divides_by_mass else float(self.targets)
        return self.weighted_loss_sum / divisor if divisor else float("nan")


WHOLE_BITS, PART_BITS = 10, 40
"""A loss is summed as two integers: multiples of 2^-10, and what is left of it in multiples of 2^-50."""
LARGEST_LOSS = 2.0**36
"""Nats; a larger loss is not finite for the statistics. Above 2^17 tokens the limit falls as the number of
tokens rises, so that their sum fits an int64."""


def sums_by_bucket(
    losses: Tensor, mask: Tensor, buckets: Tensor, num_buckets: int
) -> tuple[Tensor, Tensor]:
    """Sum losses and count targets by bucket, the same on every call and device.

    A sum of floats by `index_add_` depends on the order of a GPU's threads, and a product with one-hot rows
    needs a float64 matrix of tokens x buckets. Sums of integers are exact in any order, so each loss is cut
    into two integers.

    Args:
        losses: float32 [T], nats.
        mask: [T], 1 where a target counts, else 0.
        buckets: int64 [T].
        num_buckets: number of buckets.

    Returns:
        Sums of the masked losses, float64 [num_buckets], within 2^-50 nats a target; NaN in all buckets if
        a loss is not finite. Counts, float64 [num_buckets].
    """
    masked = losses * mask
    largest = min(LARGEST_LOSS, 2.0 ** (62 - WHOLE_BITS - losses.numel().bit_length()))
    is_sound = masked.abs() < largest  # false for NaN
    scaled = torch.where(is_sound, masked, 0.0) * 2.0**WHOLE_BITS  # a power of two: exact
    whole = scaled.trunc()
    part = (scaled - whole) * 2.0**PART_BITS  # exact, too
    columns = torch.stack([whole.long(), part.long(), mask.long()], dim=1)  # [T, 3]
    sums = columns.new_zeros((num_buckets, 3)).index_add_(0, buckets, columns).double()
    damage = torch.where(is_sound, 0.0, torch.nan).sum()
    by_bucket = sums[:, 0] * 2.0**-WHOLE_BITS + sums[:, 1] * 2.0 ** -(WHOLE_BITS + PART_BITS)
    return by_bucket + damage, sums[:, 2]


class TargetStatistics:
    """Running sums over micro-batches, float64, on the device of the losses.

    The layout of the vector is [bucket losses | bucket targets | positions, weighted loss, weight mass].
    """

    def __init__(self, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        self._sums: Tensor | None = None
        self._losses: list[Tensor] = []

    def add(self, losses: Tensor, targets: Targets) -> None:
        """Add one micro-batch: `losses` float32 [b * S], detached, kept until the sums are taken."""
        self._losses.append(losses)
        mask = targets.loss_mask.reshape(-1)
        by_bucket = sums_by_bucket(losses, mask, targets.buckets.reshape(-1), self.num_buckets)
        mass = mask.double() * targets.weights.reshape(-1).double()
        positions = mass.new_full((), mass.numel())
        totals = torch.stack([positions, (losses.double() * mass).sum(), mass.sum()])
        sums = torch.cat([*by_bucket, totals])
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> Tensor:
        """Return the sums so far, float64 [2 * buckets + 3], and reset them to zero."""
        sums, self._sums, self._losses = self._sums, None, []
        if sums is None:
            device = torch.cuda.current_device()
            sums = torch.zeros(2 * self.num_buckets + 3, dtype=torch.float64, device=device)
        return sums

    @property
    def losses(self) -> list[Tensor]:
        """Losses of the micro-batches since the sums were taken, in order; 4 bytes a token."""
        return self._losses


def totals_of(sums: Tensor) -> StepTotals:
    """Convert a (reduced) vector of `TargetStatistics`."""
    values = sums.tolist()
    num_buckets = (len(values) - 3) // 2
    return StepTotals(
        bucket_loss_sums=values[:num_buckets],
        bucket_targets=[round(value) for value in values[num_buckets:-3]],
        positions=round(values[-3]),
        weighted_loss_sum=values[-2],
        weight_mass=values[-1],
    )


def weighted_token_loss(
    token_losses: Tensor,
    targets: Targets,
    statistics: TargetStatistics,
    *,
    divides_by_mass: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute the loss of one micro-batch, with the signature that Megatron's schedules expect.

    With all weights 1 the loss and its gradient are bit-identical to the stock formula
    `sum(losses * loss_mask)`, because a product with 1.0 is exact. If any loss is not finite, supervised
    or not, neither is the sum, and its whole gradient is NaN. Otherwise an infinite cross-entropy could
    have a finite gradient and go unnoticed (`NumericalWatch` in numerical_watch.py).

    Args:
        token_losses: cross-entropies [1, b * S], nats.
        targets: mask, weights and buckets of the same micro-batch.
        statistics: receives the detached sums.
        divides_by_mass: divide the reported objective by the mass instead of the number of targets.

    Returns:
        The sum of weighted losses (scalar with gradient), the number of supervised targets (int32
        scalar), and Megatron's report: for each name [numerator, denominator].
    """
    losses = token_losses.reshape(-1).float()
    mask = targets.loss_mask.reshape(-1)
    weights = mask * targets.weights.reshape(-1)
    weighted_sum = torch.sum(losses * weights)
    weighted_sum = weighted_sum * (1 + 0 * weighted_sum.detach())  # times 1, or NaN
    detached = losses.detach()
    statistics.add(detached, targets)
    count = mask.sum()
    divisor = weights.sum() if divides_by_mass else count
    report = {
        "lm loss": torch.stack([torch.sum(detached * mask), count]),
        "weighted loss": torch.stack([weighted_sum.detach(), divisor]),
    }
    return weighted_sum, count.to(torch.int), report
