"""The torch dataset of a packed split: an endless, seeded, resumable sequence of rows.

With R rows, item i is position p = i mod R of epoch e = i div R, and its row of the plan is
`KeyedPermutation(R, derive_key("row order", seed, e))[p]`: a function of (seed, i) alone.
Megatron counts the samples that a run has consumed, so a resumed run continues exactly where it stopped, on
any number of data-parallel ranks and data workers. There is no index array in memory or on disk.

With `balance` the rows of each optimizer step, items [b N, (b + 1) N) for N rows a step, are read in
another order within the step (`attention_work.balanced_order`), so that data-parallel ranks have nearly
equal work.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_exact.data.attention_work import StepLayout, balanced_order
from megatron_exact.data.rows import Row, RowReader
from megatron_exact.data.score_files import ScoreReader
from megatron_exact.data.shuffle import KeyedPermutation, row_permutation
from megatron_exact.data.targets import TargetOrder
from megatron_exact.exposure import RowScores, RowWeights, Weighting

KEPT_STEPS = 64
"""Steps whose balanced order is remembered: rows are asked for ahead and read in turn."""


class PackedDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of one split as tensors (S = row_tokens).

    | key | dtype, shape | content |
    |---|---|---|
    | tokens, labels | int64 [S] | inputs and the tokens they predict (0 where unsupervised) |
    | loss_mask | float32 [S] | 1 supervised, 0 not |
    | position_ids | int64 [S] | restart in every segment |
    | cu_seqlens | int32 [S + 1] | segment boundaries, padded with S |
    | max_seqlen | int32 scalar | longest segment |
    | target_buckets | int64 [S] | bucket of each target's effective context |
    | target_weights | float32 [S] | weight of each target under the rule, >= 0 |
    | row_id | int64 scalar | row of the plan |

    Args:
        pack_dir: a packed dataset.
        split: `train` or `validation`.
        num_samples: length of the dataset; None means one epoch. The next epoch follows the first.
        seed: seed of the row order.
        shuffle: False reads the rows in the order of the plan, every epoch.
        cycle: item i is item i mod `cycle`: every evaluation reads the same rows.
        balance: order the rows inside each step so that the ranks of this layout have nearly equal
            attention work; every step still has the rows that it has without. None keeps the order.
        weighting: the rule applied to the pack; None, or one that weighs inside the step, gives 1.
        scores: stored scores of the split's rows, for the rules that use them.
        source_root: where the corpora lie now, if not where the manifest says: a folder or a URL.
        read_ahead: rows after the present batch whose tokens are asked for in advance. It works where rows
            are read in batches at equal distances, as a `DataLoader` does for each of its workers.

    Raises:
        ValueError: a split of no rows that should give samples, a weighting of rows of another length, or
            a pack whose targets the rule cannot count.
    """

    def __init__(
        self,
        pack_dir: str | Path,
        split: str,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        cycle: int | None = None,
        balance: StepLayout | None = None,
        weighting: Weighting | None = None,
        scores: ScoreReader | None = None,
        source_root: str | Path | None = None,
        read_ahead: int = 0,
    ) -> None:
        self.reader = RowReader(pack_dir, split, source_root=source_root)
        self.num_samples = len(self.reader) if num_samples is None else num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.cycle = cycle
        self.balance = balance
        if self.num_samples < 0 or (cycle is not None and cycle < 1):
            raise ValueError(
                f"num_samples is {num_samples} and cycle is {cycle}: give at least 0 samples, and a cycle "
                "of at least 1 or none"
            )
        if self.num_samples and not len(self.reader):
            raise ValueError(
                f"the {split} split of {pack_dir} has no rows but {self.num_samples} samples are asked "
                "for: pack with more data, a shorter row or a larger --validation-fraction"
            )
        self._row_weights: RowWeights | None = None
        self._order: TargetOrder | None = None
        self._scores = scores
        if weighting is not None and not weighting.row_weights.in_step:
            if weighting.row_tokens != self.reader.row_tokens:
                raise ValueError(
                    f"a weighting of rows of {weighting.row_tokens} tokens for {pack_dir}, whose rows have "
                    f"{self.reader.row_tokens}: weigh the counts of this pack"
                )
            self._row_weights = weighting.row_weights
            if weighting.row_weights.uses_random_places:
                manifest = self.reader.manifest
                self._order = TargetOrder(pack_dir, manifest, split, seed=seed, source_root=source_root)
        self._epoch_order: tuple[int, KeyedPermutation] | None = None
        self._step_rows: dict[int, list[int]] = {}
        self._read_ahead = read_ahead
        self._last_batch: int | None = None  # first item of the batch before
        self._distance = 0  # from that batch to the one before it
        self._asked_up_to = -1  # items whose tokens have been asked for, at this distance

    def __len__(self) -> int:
        return self.num_samples

    def row_of(self, index: int) -> int:
        """Return the row of the plan that item `index` reads."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} is not in [0, {self.num_samples})")
        if self.cycle is not None:
            index %= self.cycle
        return self._row_at(index) if self.balance is None else self._balanced_row(index, self.balance)

    def _balanced_row(self, index: int, layout: StepLayout) -> int:
        step, sample = divmod(index, layout.rows)
        if step not in self._step_rows:
            if len(self._step_rows) == KEPT_STEPS:
                del self._step_rows[next(iter(self._step_rows))]
            first = step * layout.rows
            # Also beyond num_samples: the row of an index must not depend on the length of the job
            rows = [self._row_at(first + other) for other in range(layout.rows)]
            order = balanced_order(self.reader.attention_pairs(rows), layout)
            self._step_rows[step] = [rows[place] for place in order]
        return self._step_rows[step][sample]

    def _row_at(self, index: int) -> int:
        """Return the row at `index` of the seed's order."""
        epoch, position = divmod(index, len(self.reader))
        if not self.shuffle:
            return position
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, row_permutation(len(self.reader), self.seed, epoch))
        return self._epoch_order[1][position]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """Return a batch; a `DataLoader` calls this rather than `__getitem__`, once a batch."""
        if self._read_ahead:
            self._ask_ahead([int(index) for index in indices])
        return [self[index] for index in indices]

    def _ask_ahead(self, indices: list[int]) -> None:
        """Ask for the tokens of this batch and of those that will follow.

        Which items a worker reads next depends on data-parallel ranks, micro-batches and workers. All of it
        is in the distance between the last two batches; a guess that is wrong costs time and changes
        nothing.
        """
        distance = 0 if self._last_batch is None else indices[0] - self._last_batch
        self._last_batch = indices[0]
        if distance != self._distance:
            self._distance, self._asked_up_to = distance, -1
        batches = -(-self._read_ahead // len(indices)) if distance > 0 else 0
        coming = [index + ahead * distance for ahead in range(batches + 1) for index in indices]
        for index in coming:
            if self._asked_up_to < index < self.num_samples:
                self.reader.will_need(self.row_of(index))
        self._asked_up_to = max(self._asked_up_to, coming[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row_id = self.row_of(int(index))
        row = self.reader.read(row_id)
        size = self.reader.row_tokens
        cu_seqlens = np.full(size + 1, size, dtype=np.int32)
        cu_seqlens[: row.cu_seqlens.size] = row.cu_seqlens
        arrays: dict[str, Any] = {
            "tokens": row.tokens,
            "labels": row.labels,
            "loss_mask": row.loss_mask,
            "position_ids": row.position_ids,
            "cu_seqlens": cu_seqlens,
            "target_buckets": row.by_context(self.reader.bucket_of_context),
            "target_weights": self._weights(row, row_id),
            "max_seqlen": np.array(row.max_seqlen, dtype=np.int32),
            "row_id": np.array(row_id, dtype=np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _weights(self, row: Row, row_id: int) -> NDArray[np.float32]:
        if self._row_weights is None:
            return np.ones(self.reader.row_tokens, dtype=np.float32)
        targets = TargetsOfRow(row, row_id, order=self._order, scores=self._scores)
        return self._row_weights.weigh_row(targets)


class TargetsOfRow:
    """Targets of row `row_id` of the plan, as a weighting rule reads them (`exposure.RowTargets`)."""

    def __init__(
        self, row: Row, row_id: int, *, order: TargetOrder | None = None, scores: ScoreReader | None = None
    ) -> None:
        self.row_id = row_id
        self._row = row
        self._order = order
        self._scores = scores

    @cached_property
    def supervised(self) -> NDArray[np.bool_]:
        """[S], whether each target is supervised."""
        return self._row.loss_mask > 0

    @cached_property
    def effective_context(self) -> NDArray[np.int64]:
        """[S], effective context of each target."""
        return self._row.by_context(np.arange(self._row.tokens.size + 1))

    @property
    def random_places(self) -> NDArray[np.int64]:
        """[supervised targets], random place of each."""
        assert self._order is not None, "the dataset prepares what the rule says it uses"
        return self._order.places(self.row_id)

    @cached_property
    def scores(self) -> RowScores:
        """Stored scores of the targets."""
        if self._scores is None:
            raise ValueError("this weighting rule needs stored scores: name them with --confidence-scores")
        return self._scores.read(self.row_id)

    def by_context[T: np.generic](self, of_context: NDArray[T]) -> NDArray[T]:
        """[S], a function of the effective context of each target."""
        return self._row.by_context(of_context)
