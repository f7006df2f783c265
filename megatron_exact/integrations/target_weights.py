"""One weight for each target of a batch, from its position ids or document boundaries.

b = rows of a batch, T = inputs of a row or of a flattened batch, S = `row_tokens` of the exposure table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_exact.exposure import Weighting, context_of_positions
from megatron_exact.exposure.row_weights import ContextWeights, PositionWeights
from megatron_exact.integrations.exposure_table import (
    ExposureTable,
    Labels,
    read_table,
    require_labels,
    require_positions,
)

IGNORE_INDEX = -100


class TargetWeights:
    """Gives every target of a batch its weight under a rule.

    Batches are on any device. On the CPU the values of every batch are checked; elsewhere those of the
    first one, because a check waits for the device.

    Args:
        table: an exposure table, or the path of one.
        rule: a name in `exposure.RULES` whose weights depend on the position in the document or row.
        labels: which token the target of an input is, see `exposure_table.Labels`.
        padding_free: batches are whole documents of any total length instead of rows of S inputs.
        parameters: fields of `exposure.RuleParameters`: alpha, gamma, tau, cap, ...

    Attributes:
        weighting: the rule applied to the table; its `table.mean_weight` is what weights average over the
            training data.
        divides_by_mass: whether the loss is divided by the sum of weights instead of the number of targets
            (`exact-normalized`).

    Raises:
        ValueError: an unknown rule, one that needs a pack or stored scores, or parameters out of range.
        FileNotFoundError: no table at this path.
    """

    def __init__(
        self,
        table: ExposureTable | str | Path,
        rule: str = "exact",
        *,
        labels: Labels = "row",
        padding_free: bool = False,
        **parameters: Any,
    ) -> None:
        require_labels(labels)
        read = table if isinstance(table, ExposureTable) else read_table(table)
        self.row_tokens = read.row_tokens
        self.labels = labels
        self.padding_free = padding_free
        self.weighting: Weighting = read.weighting(rule, **parameters)
        self.divides_by_mass = self.weighting.divides_by_mass
        rows = self.weighting.row_weights
        if isinstance(rows, ContextWeights):
            self._table, self._by_position = torch.from_numpy(rows.of_context), False
        elif isinstance(rows, PositionWeights) and not padding_free:
            self._table, self._by_position = torch.from_numpy(rows.of_position), True
        elif isinstance(rows, PositionWeights):
            raise ValueError(f"{rule} weighs by position in a row, and padding-free batches have no rows")
        else:
            raise ValueError(
                f"{rule} weighs by {rows.by}, which position ids do not say: read the pack with PackedRows "
                "and take the target_weights of its rows"
            )
        self._tables: dict[torch.device, Tensor] = {}

    def __call__(self, position_ids: Tensor, *, last_continues: Tensor | bool = True) -> Tensor:
        """Return the weight of the target of each input.

        Args:
            position_ids: integers [..., T], from 0 in each document. T is S, or a multiple of it where rows
                are flattened into one; any length in padding-free batches.
            last_continues: whether the document of each row's last segment continues after the row, so that
                its last target has the whole segment as context; otherwise that target has none. A bool, or
                booleans of one entry for each row. It only matters where that target is supervised, and
                not with `labels="document"`.

        Returns:
            float32 [..., T] on the same device; any value where a target is unsupervised.

        Raises:
            ValueError: no position ids, floats, a T that is no multiple of S, or (see above) values that do
                not restart from 0, or reach S.
        """
        if not isinstance(position_ids, Tensor):
            raise ValueError(
                f"position_ids is {type(position_ids).__name__}: weights need the position of each token "
                "inside its document; use a collator that gives them (PaddingFreeCollator)"
            )
        table = self._table_on(position_ids)
        rows = self._rows(position_ids)
        if table is None:
            require_positions(rows, self.row_tokens)
            table = self._tables.setdefault(rows.device, self._table.to(rows.device))
        if self._by_position:
            return table.expand(rows.shape).reshape(position_ids.shape)
        if self.labels == "document":
            context = rows + 1
        else:
            if isinstance(last_continues, Tensor):
                last_continues = last_continues.to(rows.device).reshape(rows.shape[0])
            context = context_of_positions(rows, last_continues=last_continues)
        return table[context.long()].reshape(position_ids.shape)

    def of_cu_seqlens(self, cu_seqlens: Tensor, *, last_continues: Tensor | bool = True) -> Tensor:
        """Return the weights of a flattened batch from its document boundaries.

        Args:
            cu_seqlens: integers [segments + 1], from 0 to T; Megatron's padded form (the last value
                repeated) is accepted. Every row boundary is one of them.
            last_continues: as in `__call__`.

        Returns:
            float32 [T].

        Raises:
            ValueError: boundaries that do not start at 0, decrease, or do not fit rows of S.
        """
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point():
            raise ValueError("cu_seqlens must be a tensor of integers [segments + 1]")
        lengths = cu_seqlens.diff().long()
        if cu_seqlens.numel() < 2 or int(cu_seqlens[0]) != 0 or bool((lengths < 0).any()):
            raise ValueError(
                f"cu_seqlens {cu_seqlens.tolist()[:8]} must start at 0, not decrease, and name a segment"
            )
        return self(positions_of_lengths(lengths), last_continues=last_continues)

    def of_lengths(self, lengths: Tensor, *, last_continues: Tensor | bool = True) -> Tensor:
        """Return the weights of rows of S inputs from the lengths of their documents (OLMo's `doc_lens`).

        Args:
            lengths: integers [b, documents], filled up with 0. What the documents leave of a row is
                padding.
            last_continues: as in `__call__`.

        Returns:
            float32 [b, S].

        Raises:
            ValueError: another shape, a negative length, or documents that do not fit a row.
        """
        if not isinstance(lengths, Tensor) or lengths.ndim != 2 or lengths.is_floating_point():
            raise ValueError("lengths must be a tensor of integers [rows, documents]")
        rest = self.row_tokens - lengths.sum(dim=1, keepdim=True)
        if bool((lengths < 0).any()) or bool((rest < 0).any()):
            raise ValueError(
                f"document lengths sum to {int(lengths.sum(dim=1).max())} in a row, the exposure table is "
                f"of rows of {self.row_tokens} tokens: count one for this window"
            )
        positions = positions_of_lengths(torch.cat([lengths, rest], dim=1).flatten().long())
        return self(positions.view(lengths.shape[0], -1), last_continues=last_continues)

    def _table_on(self, position_ids: Tensor) -> Tensor | None:
        """Return the table on the device of a batch whose values need no check."""
        return None if position_ids.device.type == "cpu" else self._tables.get(position_ids.device)

    def _rows(self, position_ids: Tensor) -> Tensor:
        if position_ids.is_floating_point() or position_ids.ndim == 0:
            raise ValueError(f"position_ids of dtype {position_ids.dtype}: integers [..., T] are needed")
        tokens = position_ids.shape[-1]
        if self.padding_free:
            return position_ids.reshape(-1, tokens)
        if tokens == 0 or tokens % self.row_tokens:
            raise ValueError(
                f"position_ids {tuple(position_ids.shape)} do not divide into rows of {self.row_tokens} "
                "tokens, of which the exposure table is: count one for this window; "
                "padding_free=True is for batches of whole documents, without rows"
            )
        return position_ids.reshape(-1, self.row_tokens)


def positions_of_lengths(lengths: Tensor) -> Tensor:
    """Return position ids from 0 in each segment.

    Args:
        lengths: int64 [segments], tokens.

    Returns:
        int64 [sum of lengths].
    """
    starts = lengths.cumsum(0) - lengths
    tokens = torch.arange(int(lengths.sum()), device=lengths.device)
    return tokens - starts.repeat_interleave(lengths)


def weighted_loss_sum(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum weight times cross-entropy over the supervised targets of a batch.

    The caller divides by the number of supervised targets of the global batch (all micro-batches of all
    data-parallel ranks), not by that of this batch, and not by the sum of weights.

    Args:
        logits: floats [..., T, vocabulary].
        labels: int64 [..., T], the target of each input (already shifted); -100 where unsupervised.
        weights: float32 [..., T].

    Returns:
        Scalar, float32 (float64 for logits of that dtype), nats.

    Raises:
        ValueError: shapes that differ.
    """
    if logits.shape[:-1] != labels.shape or labels.shape != weights.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and weights "
            f"{tuple(weights.shape)} must agree in all but the last dimension of logits"
        )
    rows = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(rows, labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    return (losses * weights.flatten()).sum()
