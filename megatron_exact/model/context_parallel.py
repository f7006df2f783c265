"""Context parallelism of packed rows: each rank has a part of the tokens of every row.

Transformer Engine's attention cuts every document into 2N pieces, so each document's length has to divide
by 2N. Packed rows have documents of any length, so its layers get this attention, as the local ones do.
Here the stream of tokens is cut instead, into 2N spans of one length, wherever documents begin; rank r has
spans r and 2N - 1 - r, which balances the causal work (as Megatron's
`get_batch_on_this_cp_rank` does). Queries stay where they are; keys and values of all ranks are gathered.

A span cuts at most the segment that it begins in; all other segments of the span start inside it. So each
query of a span sees keys from the beginning of its own segment. The varlen kernel of a GPU takes a span in
one call, with separate boundaries for queries and keys; on a CPU the cut segment is attended in blocks of
queries and the rest as on one rank. A mask of the whole row is never built.

Megatron rotates packed queries and keys on the assumption that every document was cut. So here they are
rotated inside the attention, at each token's position in its segment, and GPTModel is built without RoPE
(`move_rope_into_attention`). The frequencies come from Megatron's `RotaryEmbedding`.

N = context-parallel ranks, T = tokens of all rows of the micro-batch, H = query heads, G = key/value
groups (both on this tensor-parallel rank), D = head dimension.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_exact.model.packed_attention import PackedAttention

QUERY_BLOCK = 256
"""Queries of a cut segment that a CPU attends at once: the mask of a block has 256 * keys bits."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One of this rank's two spans of the stream."""

    start: int
    """First query, as a position in the stream."""
    end: int
    """After the last query, and after the last key that any of them sees."""
    key_start: int
    """First key: the beginning of the segment that contains the first query."""
    packing: PackedSeqParams
    """Boundaries of the queries [start, end) and of the keys [key_start, end), as many segments of each.

    The last query of a segment lies at its last key in both."""

    @property
    def cut_queries(self) -> int:
        """Queries of the segment that began before the span; 0 if none did."""
        return int(self.packing.cu_seqlens_q[1]) if self.key_start < self.start else 0


@dataclass(frozen=True, kw_only=True)
class LocalTokens:
    """Which tokens of the stream this rank has, in its own order."""

    spans: tuple[Span, Span]
    """The two spans; the rank's tokens are those of the first, then those of the second."""
    positions: Tensor
    """int64 [T / N], position of each token in its segment."""


_on_host: Any = WeakTensorKeyDictionary()
"""Boundaries on a device -> the same as a list, where the data worker's have come along."""


def know_boundaries(cu_seqlens: Tensor, boundaries: list[int]) -> None:
    """Say what a tensor of boundaries contains, so that nobody has to wait for the device to read it.

    Args:
        cu_seqlens: int32 [segments + 1], on the device; attention gets this very tensor.
        boundaries: the same numbers.
    """
    assert len(boundaries) == cu_seqlens.shape[0]
    _on_host[cu_seqlens] = boundaries


@lru_cache(maxsize=8)  # a tensor is a key by identity: all layers of a micro-batch share one answer
def local_tokens(cu_seqlens: Tensor, size: int, rank: int) -> LocalTokens:
    """Return which tokens of a stream a rank has.

    Args:
        cu_seqlens: int32 [segments + 1], boundaries in the whole stream, from 0 to T.
        size: N.
        rank: rank in the context-parallel group.

    Raises:
        ValueError: T does not divide by 2 N.
    """
    boundaries = _on_host.get(cu_seqlens)
    if boundaries is None:
        boundaries = cu_seqlens.tolist()  # waits for the device
    length, rest = divmod(boundaries[-1], 2 * size)
    if rest:
        raise ValueError(f"{boundaries[-1]} tokens do not divide by 2 * {size} context-parallel spans")
    starts = [index * length for index in (rank, 2 * size - 1 - rank)]
    first, second = (_span(boundaries, start, start + length, cu_seqlens.device) for start in starts)
    # with the size given, the host does not wait for the device
    starts_of = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=boundaries[-1])
    segment_starts = starts_of.long()
    positions = torch.arange(boundaries[-1], device=cu_seqlens.device) - segment_starts
    own = torch.cat([positions[start : start + length] for start in starts])
    return LocalTokens(spans=(first, second), positions=own)


def _span(boundaries: list[int], start: int, end: int, device: torch.device) -> Span:
    inner = boundaries[bisect_right(boundaries, start) : bisect_left(boundaries, end)]
    key_start = boundaries[bisect_right(boundaries, start) - 1]
    queries, keys = (
        torch.tensor([place - origin for place in (origin, *inner, end)], dtype=torch.int32)
        for origin in (start, key_start)
    )
    both = torch.stack([queries, keys])
    if device.type == "cuda":
        both = both.pin_memory()  # else the copy waits for the device
    on_device = both.to(device, non_blocking=True)
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=on_device[0],
        cu_seqlens_kv=on_device[1],
        max_seqlen_q=int(queries.diff().max()),
        max_seqlen_kv=int(keys.diff().max()),
    )
    return Span(start=start, end=end, key_start=key_start, packing=packing)


class ContextParallelAttention(PackedAttention):
    """Core attention of a rank that has a part of the tokens; it applies RoPE itself.

    Args:
        rotary: Megatron's frequencies, shared by the layers.
        layer_number: number of the layer in the whole model, from 1; some models have layers without RoPE.
        pg_collection: contains the context-parallel group.
        kwargs: the other arguments of `PackedAttention`.
    """

    def __init__(
        self, *, rotary: RotaryEmbedding, layer_number: int, pg_collection: Any, **kwargs: Any
    ) -> None:
        super().__init__(layer_number=layer_number, pg_collection=pg_collection, **kwargs)
        self.group = pg_collection.cp
        self._rotate = partial(_rotate, rotary)  # no submodule: the layers share it
        skipped = self.config.no_rope_freq  # TransformerConfig has made it one number a layer
        self._has_rope = not (skipped and skipped[layer_number - 1])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T / N, H, D], key and value [T / N, G, D], none rotated yet -> [T / N, H * D].

        `packed_seq_params` has the boundaries of the whole stream.

        Raises:
            ValueError: no document boundaries, or a dense mask or bias beside them.
        """
        if packed_seq_params is None or attention_mask is not None or attention_bias is not None:
            # refuses
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        own = local_tokens(packed_seq_params.cu_seqlens_q, self.group.size(), self.group.rank())
        if self._has_rope:
            query, key = (
                self._rotate(part, own.positions, packed_seq_params.max_seqlen_q, self.config)
                for part in (query, key)
            )
        gathered = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self.group)
        keys, values = in_stream_order(gathered, self.group.size()).unbind(1)
        outputs = []
        for span, queries in zip(own.spans, query.chunk(2), strict=True):
            seen = slice(span.key_start, span.end)
            outputs.append(self._attend_span(span, queries, keys[seen], values[seen]))
        return torch.cat(outputs)

    def _attend_span(self, span: Span, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T / 2N, H, D], key and value [end - key_start, G, D] -> [T / 2N, H * D]."""
        if query.is_cuda:
            return super().forward(query, key, value, packed_seq_params=span.packing)
        cut = span.cut_queries
        seen = cut + span.start - span.key_start if cut else 0
        outputs = []
        if cut:
            part = attend_cut_segment(query[:cut], key[:seen], value[:seen], self.softmax_scale)
            outputs.append(part.reshape(cut, -1))
        if cut < query.shape[0]:
            boundaries = span.packing.cu_seqlens_q[1 if cut else 0 :] - cut
            longest = int(boundaries.diff().max())
            rest = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=boundaries,
                cu_seqlens_kv=boundaries,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            outputs.append(super().forward(query[cut:], key[seen:], value[seen:], packed_seq_params=rest))
        return torch.cat(outputs)


def _rotate(
    rotary: RotaryEmbedding, states: Tensor, positions: Tensor, longest_tokens: int, config: Any
) -> Tensor:
    """Rotate [T / N, heads, D] by the angles of positions [T / N], which are below `longest_tokens`."""
    angles = rotary(longest_tokens, packed_seq=True)[positions]  # [T / N, 1, 1, D]
    # one sequence of batch size 1, whose positions are what the angles say
    return apply_rotary_pos_emb(states.unsqueeze(1), angles, config).squeeze(1)  # type: ignore[no-any-return]


def in_stream_order(gathered: Tensor, size: int) -> Tensor:
    """Reorder [T, ...] from the order of ranks, two spans each, to the order of the stream."""
    spans = gathered.chunk(2 * size)
    return torch.cat([*spans[0::2], *reversed(spans[1::2])])


def attend_cut_segment(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally from the last Q positions of one segment to all K of it, K >= Q.

    Args:
        query: [Q, H, D].
        key, value: [K, G, D].
        scale: factor of the products.

    Returns:
        [Q, H, D].
    """
    before = key.shape[0] - query.shape[0]
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))  # [1, heads, tokens, D]
    outputs = []
    for first in range(0, query.shape[0], QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, query.shape[0])
        seen = before + last
        ones = torch.ones(last - first, seen, dtype=torch.bool, device=query.device)
        output = F.scaled_dot_product_attention(
            q[:, :, first:last],
            k[:, :, :seen],
            v[:, :, :seen],
            attn_mask=ones.tril(before + first),
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def context_parallel_attention(config: Any) -> Any:
    """Return the function that builds the core attention of each layer.

    Args:
        config: a GPTModelConfig, whose fields on RoPE are read.
    """
    rotary = RotaryEmbedding(
        config.transformer.kv_channels,
        rotary_percent=config.rotary_percent,
        rotary_interleaved=config.transformer.rotary_interleaved,
        seq_len_interpolation_factor=config.seq_len_interpolation_factor,
        rotary_base=config.rotary_base,
        rope_scaling=config.rope_scaling,
        rope_scaling_factor=config.rope_scaling_factor,
        use_cpu_initialization=config.transformer.use_cpu_initialization,
    )
    return partial(ContextParallelAttention, rotary=rotary)


def move_rope_into_attention(config: Any) -> None:
    """Make GPTModel leave RoPE to `ContextParallelAttention`; Megatron's arguments still say rope.

    Args:
        config: a GPTModelConfig, changed in place.

    Raises:
        ValueError: positions of another kind.
    """
    if config.position_embedding_type != "rope":
        raise ValueError(
            f"--position-embedding-type {config.position_embedding_type} is not supported with "
            "--context-parallel-size above 1: use rope, or drop context parallelism"
        )
    config.position_embedding_type = "none"
