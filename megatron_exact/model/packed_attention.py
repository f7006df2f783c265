"""Causal attention and rotary embedding inside the segments of packed rows, without Transformer Engine.

Megatron's `DotProductAttention` does not support packed rows, and a dense mask is quadratic in the row.
Here attention runs segment by segment: on a GPU one variable-length flash kernel of torch takes all
segments, on a CPU each is a call of torch's scaled_dot_product_attention. The cost is
sum(segment_tokens^2), and there is no mask that could be wrong.

T = tokens of all rows of the micro-batch, H = query heads, G = key/value groups, D = head dimension, R =
values of a head that rotate, R <= D (H and G on this tensor-parallel rank).
"""

from __future__ import annotations

import math
import weakref
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """Attend segment by segment: query [T, H, D], key and value [T, G, D] -> [T, H, D]."""
    boundaries: list[int] = packing.cu_seqlens_q.tolist()
    lengths = [stop - start for start, stop in pairwise(boundaries)]
    outputs = []
    # One split, whose backward is one concatenation. Backward of a slice for each segment would add up
    # whole rows of zeros.
    for segment in zip(*(part.split_with_sizes(lengths) for part in (query, key, value)), strict=True):
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in segment)  # [1, heads, tokens, D]
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output.squeeze(0).transpose(0, 1))  # not [0], whose backward fills in zeros
    return torch.cat(outputs)


def attend_with_flash(
    query: Tensor, key: Tensor, value: Tensor, packing: PackedSeqParams, scale: float
) -> Tensor:
    """Attend with torch's variable-length flash kernel, same shapes; half precision, CUDA devices only.

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


def use_packed_rope() -> None:
    """Put `rotate_tokens` and `rotate_packed` where Megatron looks for Transformer Engine's functions.

    Megatron's own code without Transformer Engine reads the boundaries on the host in every layer and
    rotates one segment after the other. Here the angle of every token is looked up once a micro-batch,
    without waiting for the device, and every layer rotates all tokens in one fused kernel
    (`torch.compile`). Su et al. 2021, arXiv 2104.09864, in the form of Llama: the first half of a head
    rotates with the second.
    """
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    if rope_utils.fused_apply_rotary_pos_emb_thd is None:
        rope_utils.fused_apply_rotary_pos_emb = rotate_tokens
        rope_utils.fused_apply_rotary_pos_emb_thd = rotate_packed


def rotate_packed(
    values: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    *,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """Rotate every token by its position inside its segment.

    Args:
        values: [T, H, D].
        cu_seqlens: int [segments + 1], boundaries from 0 to T.
        freqs: [longest segment or more, 1, 1, R], angles, the second half of R repeating the first.
        cp_size: must be 1: with context parallelism our attention rotates its own tokens.
        cp_rank: not read.
        interleaved: must be False.

    Returns:
        [T, H, D], same dtype.

    Raises:
        ValueError: interleaved pairs, or context parallelism.
    """
    if cp_size != 1:
        raise ValueError(f"a context-parallel size of {cp_size} is not supported by this rotary embedding")
    _require_halves(interleaved)
    cosines, sines = _tables(cu_seqlens, freqs, values)
    rotated: Tensor = _Rotation.apply(values, cosines, sines)  # type: ignore[no-untyped-call]
    return rotated


def rotate_tokens(values: Tensor, freqs: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate tokens whose angles are given one by one.

    Args:
        values: [T, 1, H, D].
        freqs: [T, 1, 1, R].
        interleaved: must be False.

    Raises:
        ValueError: interleaved pairs.
    """
    _require_halves(interleaved)
    angles = freqs[:, 0, :, : freqs.shape[-1] // 2]
    tables = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    rotated: Tensor = _Rotation.apply(values.squeeze(1), *tables)  # type: ignore[no-untyped-call]
    return rotated.unsqueeze(1)


def _require_halves(interleaved: bool) -> None:
    if interleaved:
        raise ValueError(
            "--rotary-interleaved is not supported without Transformer Engine: add --no-rope-fusion, or "
            "install Transformer Engine"
        )


_latest: tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[Tensor, Tensor]] | None = None


def _tables(cu_seqlens: Tensor, freqs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, 1, R / 2] of each token's angles, shared by all layers of a
    micro-batch."""
    global _latest
    if _latest is not None and _latest[0]() is cu_seqlens and _latest[1]() is freqs:
        tables = _latest[2]
        if tables[0].dtype == values.dtype:
            return tables
    num_tokens = values.shape[0]
    # with the size given, the host does not wait for the device
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=num_tokens)
    positions = torch.arange(num_tokens, device=values.device) - starts
    angles = freqs[:, 0, :, : freqs.shape[-1] // 2][positions]
    tables = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    _latest = weakref.ref(cu_seqlens), weakref.ref(freqs), tables
    return tables


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.tables = cosines, sines  # of the micro-batch, not of this layer
        return _turn(values, cosines, sines)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.tables
        return _turn(gradient, cosines, -sines), None, None


@jit_fuser  # type: ignore[untyped-decorator]
def _turn(values: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate each pair of the first and the second half by its angle; values beyond R are unchanged."""
    half = cosines.shape[-1]
    first, second, rest = values[..., :half], values[..., half : 2 * half], values[..., 2 * half :]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], dim=-1)
