"""Causal attention inside the segments of packed rows, without Transformer Engine.

Stock `DotProductAttention` refuses packed rows, and a dense mask is quadratic in the row. Here every
segment is a call of its own: on a GPU one variable-length flash kernel of torch's takes all of them, on
a CPU torch's scaled_dot_product_attention runs segment by segment, so that the cost is
sum(segment_tokens^2) and no mask exists that could be wrong.

T = tokens of all rows of the micro-batch, H = query heads, G = key/value groups, D = head dimension
(H and G on this tensor-parallel rank).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Core attention for Megatron's local layer spec; RoPE has been applied already.

    Constructor arguments are those with which `megatron.core.transformer.attention` builds any core
    attention; only `config` and `softmax_scale` matter here.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

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
        """query [T, H, D], key and value [T, G, D] -> [T, H * D].

        Raises:
            ValueError: no document boundaries, or a dense mask or bias beside them.
        """
        if packed_seq_params is None:
            raise ValueError(
                "attention was called without packed_seq_params: document boundaries would be "
                "ignored; pass PackedSeqParams with cu_seqlens"
            )
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "a dense attention mask or bias was given beside cu_seqlens: the packed attention "
                "takes boundaries from cu_seqlens alone, pass attention_mask=None"
            )
        output = _attend(query, key, value, packed_seq_params, self.softmax_scale)
        return output.reshape(output.shape[0], -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, packing: PackedSeqParams, scale: float) -> Tensor:
    kernel = attend_with_flash if query.is_cuda else attend_by_segment
    return kernel(query, key, value, packing, scale)


def attend_by_segment(
    query: Tensor, key: Tensor, value: Tensor, packing: PackedSeqParams, scale: float
) -> Tensor:
    """One scaled_dot_product_attention a segment: [T, H, D] and twice [T, G, D] -> [T, H, D]."""
    boundaries: list[int] = packing.cu_seqlens_q.tolist()
    lengths = [stop - start for start, stop in pairwise(boundaries)]
    outputs = []
    # One split, whose backward is one concatenation: a slice a segment would add up whole rows of zeros
    for segment in zip(*(part.split_with_sizes(lengths) for part in (query, key, value)), strict=True):
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in segment)  # [1, heads, tokens, D]
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def attend_with_flash(
    query: Tensor, key: Tensor, value: Tensor, packing: PackedSeqParams, scale: float
) -> Tensor:
    """torch's variable-length flash kernel, same shapes; half precision on a CUDA device only.

    Not run where this was written: there was no GPU. `tests/gpu` compares it with `attend_by_segment`.
    """
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        packing.cu_seqlens_q,
        packing.cu_seqlens_kv,
        packing.max_seqlen_q,
        packing.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=True,
    )
    assert isinstance(output, Tensor)  # a tuple only where the log-sum-exp is asked for too
    return output
