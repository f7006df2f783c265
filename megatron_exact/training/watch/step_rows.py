"""Which rows of the pack the micro-batches of a step hold.

Row numbers do not travel with the batch, since upstream moves a fixed list of keys. They need not: the row
of a sample is a function of the seed and the sample's index, and upstream's sampler deals the samples of a
step out in order, a micro-batch to each data-parallel rank in turn
(megatron/training/datasets/data_samplers.py, `MegatronPretrainingSampler`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state

from megatron_exact.data.dataset import PackedDataset


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The rows of one step."""

    order: PackedDataset
    """Knows the row of each sample."""
    first_sample: int
    """Of the step."""
    micro_batch_size: int
    """Rows of a micro-batch."""
    micro_batches: int
    """Of a rank in this step."""
    ranks: int
    """Data-parallel ranks."""

    @property
    def epoch(self) -> int:
        """Of the step's first row."""
        return self.first_sample // len(self.order.reader)

    def all(self) -> list[int]:
        """In the order of the samples."""
        samples = range(self.micro_batches * self.ranks * self.micro_batch_size)
        return [self.order.row_of(self.first_sample + sample) for sample in samples]

    def of(self, rank: int, micro_batch: int) -> list[int]:
        """Rows of one micro-batch of one data-parallel rank."""
        first = self.first_sample + (micro_batch * self.ranks + rank) * self.micro_batch_size
        return [self.order.row_of(first + index) for index in range(self.micro_batch_size)]

    def of_rank(self, rank: int) -> list[int]:
        """Rows of all micro-batches of one data-parallel rank."""
        return [row for index in range(self.micro_batches) for row in self.of(rank, index)]


class RowOrder:
    """Rows of the training steps of a job; opens the pack at the first question, and no corpus.

    Args:
        args: Megatron's validated namespace, with our options.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self._order: PackedDataset | None = None

    def last_step(self) -> StepRows:
        """Of the step whose samples were counted last."""
        args, ranks = self._args, parallel_state.get_data_parallel_world_size()
        if self._order is None:
            self._order = PackedDataset(
                args.pack,
                "train",
                num_samples=max(args.train_iters * args.global_batch_size, args.consumed_train_samples),
                seed=args.seed,
                source_root=args.source_root,
            )
        return StepRows(
            order=self._order,
            first_sample=args.consumed_train_samples - args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            micro_batches=args.global_batch_size // (args.micro_batch_size * ranks),
            ranks=ranks,
        )
