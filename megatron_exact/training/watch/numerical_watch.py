"""NaN and Inf in loss or gradient: found on the way, before the optimizer takes the step.

Nothing is waited for while all is well. A loss that is not finite makes its own gradient NaN
(`loss.weighted_token_loss`), backward carries that to every pipeline stage, the reduction to every
data-parallel rank, and so the gradient's norm, which upstream computes for clipping and brings to the host
anyway, is not finite on any rank. There all ranks refuse the step alike, without a word between them.

What tells where it began is kept as it is until then: the losses of the step's micro-batches, and the norm
of each gradient bucket before ranks are summed. Upstream's own check (`--check-for-nan-in-loss-and-grad`)
takes the same norms but waits for the device at each bucket, and raises on the one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_exact.training.checkpoints.verification import AgreedError


class NonFiniteError(AgreedError):
    """A step was refused and the job is to stop; the same on every rank."""


class NumericalWatch:
    """State of one rank: what the step under way has shown so far.

    Attributes:
        losses: [b * S of this context-parallel rank] float32 for each micro-batch of the step, on the last
            pipeline stage.
        refused: whether the optimizer was kept from taking the step; the same on every rank.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.refused = False
        self._bucket_norms: list[tuple[Any, Tensor]] = []
        self._grad_norm: float | None = None

    def begin_step(self) -> None:
        """Forget the step before."""
        self.losses = []
        self.refused = False
        self._bucket_norms = []
        self._grad_norm = None

    def guard(self, optimizer: Any) -> None:
        """Keep `optimizer` from a step whose gradient is not finite.

        `step_with_ready_grads` saying False is upstream's own way to skip a step: schedule and optimizer
        stay, samples count as consumed. With fp16 the loss scale finds the overflow first, and upstream
        skips by itself.

        Args:
            optimizer: of Megatron, chained or single; two of its methods are wrapped.
        """
        for name in ("get_grad_norm", "clip_grad_norm"):
            setattr(optimizer, name, self._remembering(getattr(optimizer, name)))
        stock_step = optimizer.step_with_ready_grads

        def step_with_ready_grads() -> bool:
            if self._grad_norm is None:  # --clip-grad 0
                self._grad_norm = float(optimizer.get_grad_norm())
            self.refused = not math.isfinite(self._grad_norm)
            return False if self.refused else bool(stock_step())

        optimizer.step_with_ready_grads = step_with_ready_grads

    def _remembering(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            norm = stock(*args, **kwargs)
            self._grad_norm = float(norm)
            return norm

        return compute

    def check_grads(self, group: Any, **_: Any) -> None:
        """Keep the norms of a group's buckets; called where upstream would check them.

        Args:
            group: a `_ParamAndGradBucketGroup` whose gradients are about to be summed over ranks.
        """
        self._bucket_norms += [(bucket, bucket.grad_data.norm(p=2)) for bucket in group.buckets]

    def damaged_parameters(self, model: list[Any]) -> list[str]:
        """Names of the parameters in whose buckets this rank's own gradient is not finite.

        Args:
            model: this rank's model chunks, as upstream wraps them.
        """
        names = {
            id(parameter): name.removeprefix("module.").removeprefix("module.")
            for chunk in model
            for name, parameter in chunk.named_parameters()
        }
        return [
            names.get(id(parameter), "?")
            for bucket, norm in self._bucket_norms
            if not math.isfinite(norm.item())
            for parameter in bucket.params_list
        ]


def first_damage(losses: Tensor) -> tuple[int, float] | None:
    """Place and value of the first loss that is not finite; waits for the device.

    Args:
        losses: any shape.
    """
    damaged = (~torch.isfinite(losses.reshape(-1))).nonzero()
    if not len(damaged):
        return None
    place = int(damaged[0])
    return place, float(losses.reshape(-1)[place])


def stream_position(place: int, *, tokens: int, size: int, rank: int) -> int:
    """Where a context-parallel rank's token lies in the stream of its micro-batch.

    A rank holds spans `rank` and `2 * size - 1 - rank` of 2 * size (`model/context_parallel.py`).

    Args:
        place: in the rank's own order.
        tokens: of the stream.
        size: context-parallel ranks.
        rank: in their group.
    """
    span = tokens // (2 * size)
    index = rank if place < span else 2 * size - 1 - rank
    return index * span + place % span
