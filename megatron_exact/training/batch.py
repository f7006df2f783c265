"""One micro-batch of packed rows on this rank: from the data iterator to the model's arguments.

Megatron's steps are used unchanged (broadcast over the tensor-parallel group, flatten the rows of a
micro-batch into one, take the tokens of this context-parallel rank, `PackedSeqParams`). The broadcast moves
a fixed list of keys and drops any other, so weight and bucket of each target follow in a broadcast of their
own on the last pipeline stage. Both were computed for the whole row: a target's weight does not depend on
how the row is split over ranks.

b = micro-batch size, S = row tokens, N = context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from torch import Tensor

from megatron_exact.model.context_parallel import know_boundaries

UPSTREAM_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen")
UPSTREAM_ABSENT_KEYS = ("attention_mask", "cu_seqlens_padded", "local_cp_size", "hybrid_cp_group")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of a micro-batch on the last pipeline stage; each tensor is [1, b * S / N]."""

    loss_mask: Tensor
    """float32, 1 where the target is supervised, else 0."""
    weights: Tensor
    """float32, >= 0."""
    buckets: Tensor
    """int64, bucket of effective context; any value where unsupervised."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A micro-batch on this rank; tensors that only another pipeline stage needs are None."""

    tokens: Tensor | None
    """int64 [1, b * S / N], first pipeline stage."""
    position_ids: Tensor | None
    """int64 [1, b * S / N], restarting with each segment, first pipeline stage."""
    labels: Tensor | None
    """int64 [1, b * S / N], last pipeline stage."""
    targets: Targets | None
    """On the last pipeline stage."""
    packing: PackedSeqParams
    """Segment boundaries in the whole flattened micro-batch, every stage."""


def next_packed_batch(
    iterator: Iterator[dict[str, Tensor]] | None,
    *,
    micro_batch_size: int,
    row_tokens: int,
    rounds_boundaries: bool = False,
) -> PackedBatch:
    """Read the next micro-batch on tensor-parallel rank 0 and give every rank of the group its part.

    Args:
        iterator: yields collated samples of `PackedDataset`; None on other tensor-parallel ranks.
        micro_batch_size: rows.
        row_tokens: inputs of a row.
        rounds_boundaries: whether to round the number of segments and the longest one (`rounded`), for
            Transformer Engine.
    """
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    is_last_stage = parallel_state.is_pipeline_last_stage()
    is_split = parallel_state.get_context_parallel_world_size() > 1
    sample: dict[str, Tensor] = {}
    longest: Tensor | None = None
    boundaries: Tensor | None = None
    if tp_rank == 0:
        assert iterator is not None
        read = next(iterator)
        longest, boundaries = read["max_seqlen"], read["cu_seqlens"]  # needed on the host
        sample = {key: value.cuda(non_blocking=True) for key, value in read.items()}
    batch: dict[str, Any] = get_batch_on_this_tp_rank(
        {key: sample.get(key) for key in (*UPSTREAM_KEYS, *UPSTREAM_ABSENT_KEYS)},
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        has_cu_seqlens=True,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        cp_size=parallel_state.get_context_parallel_world_size(),
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=row_tokens,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=is_last_stage,
    )
    longest = _on_its_way(batch["max_seqlen"]) if longest is None else longest
    if is_split and boundaries is None:
        boundaries = _on_its_way(batch["cu_seqlens"])
    batch = flatten_batch_for_packed_sequences(batch)  # waits for the device anyway
    if is_last_stage:
        shape = (micro_batch_size, row_tokens)
        batch["weights"] = _broadcast(sample.get("target_weights"), shape, torch.float32)
        batch["buckets"] = _broadcast(sample.get("target_buckets"), shape, torch.int64)
    batch = tokens_of_this_rank(batch)
    targets = None
    if is_last_stage:
        targets = Targets(loss_mask=batch["loss_mask"], weights=batch["weights"], buckets=batch["buckets"])
    packing = packed_seq_params(batch["cu_seqlens"], _arrived(longest, batch["max_seqlen"]), row_tokens)
    if is_split and boundaries is not None:
        known = flat_boundaries(boundaries)
        if known is not None:
            know_boundaries(packing.cu_seqlens_q, known)
    if rounds_boundaries:
        packing = rounded(packing, micro_batch_size * row_tokens)
    return PackedBatch(
        tokens=batch["tokens"],
        position_ids=batch["position_ids"],
        labels=batch["labels"],
        targets=targets,
        packing=packing,
    )


def flat_boundaries(rows: Tensor) -> list[int] | None:
    """Return the boundaries of a flattened micro-batch, or None where they have not arrived yet.

    Args:
        rows: int32 [b, S + 1] on the host, from 0 to S in each row and S to its end.
    """
    if int(rows[-1, -1]) == 0:  # `_on_its_way`
        return None
    size = int(rows[0, -1])
    flat = [0]
    for number, row in enumerate(rows.tolist()):
        flat += [number * size + place for place in row[1 : row.index(size) + 1]]
    return flat


def tokens_of_this_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the part of each [1, b * S] tensor that belongs to this context-parallel rank, [1, b * S / N].

    The 2 N spans are cut through documents, as `model/context_parallel.py` expects; boundaries
    (`cu_seqlens`, `max_seqlen`) and None stay as they are.
    """
    sliced: dict[str, Any] = get_batch_on_this_cp_rank(
        dict(batch),
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
        use_per_sequence_balancing=True,  # Transformer Engine's way would cut every document
    )
    return sliced


def packed_seq_params(cu_seqlens: Tensor, longest: int, row_tokens: int) -> PackedSeqParams:
    """Return segment boundaries as Megatron's attention takes them.

    Args:
        cu_seqlens: int32 [1, segments + 1], without padding.
        longest: tokens of the longest segment.
        row_tokens: inputs of a row.
    """
    boundaries = cu_seqlens.squeeze(0)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=row_tokens,
    )


FEWEST_SEGMENTS = 16


def rounded(packing: PackedSeqParams, num_tokens: int) -> PackedSeqParams:
    """Round the number of segments and the longest one up to powers of two.

    cuDNN plans its attention kernel for each new pair of them, in milliseconds to seconds, and almost every
    micro-batch of packed rows would have a new pair. Empty segments are appended, which change nothing.

    Args:
        packing: of a micro-batch.
        num_tokens: of the micro-batch, where the last segment ends.
    """
    boundaries: Tensor = packing.cu_seqlens_q
    segments = boundaries.numel() - 1
    missing = max(FEWEST_SEGMENTS, 1 << (segments - 1).bit_length()) - segments
    boundaries = F.pad(boundaries, (0, missing), value=num_tokens)
    longest = min(1 << (packing.max_seqlen_q - 1).bit_length(), packing.tokens_per_sample)
    return replace(
        packing,
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _on_its_way(numbers: Tensor) -> Tensor:
    """Copy numbers from the device to the host without waiting; the result is 0 until they arrive.

    Only tensor-parallel rank 0 has read them. The others receive them by a broadcast on the device.
    """
    if not numbers.is_cuda:
        return numbers
    arriving = torch.zeros(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return arriving.copy_(numbers, non_blocking=True)


def _arrived(longest: Tensor, max_seqlen: Tensor) -> int:
    """Return the longest segment of the micro-batch; wait for the device only if it has not arrived."""
    return int(longest.max()) or int(max_seqlen.max())


def _broadcast(value: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Send `value` from tensor-parallel rank 0 to its group, flattened to [1, b * S]."""
    if value is None:
        value = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            value,
            parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    return value.reshape(1, -1)
