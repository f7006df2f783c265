"""Plain CPU versions of operations that torch has for CUDA only.

Each takes the arguments of the operation as CPU tensors and returns the same results.

T = tokens of all segments, H = query heads, G = key/value groups, D = head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Segment:
    """One segment's part of queries [q, H, D], keys and values [k, G, D] in float32, heads first."""

    queries: slice
    keys: slice
    query: Tensor
    key: Tensor
    value: Tensor
    heads_a_group: int

    def probabilities(self, scale: float) -> Tensor:
        """Return the causal softmax [H, q, k]; the last query is at the last key, as in flash kernels."""
        scores = self.query @ self.key.transpose(1, 2) * scale
        num_queries, num_keys = scores.shape[1:]
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        return scores.masked_fill(~allowed, -math.inf).softmax(-1)

    def by_group(self, gradient: Tensor) -> Tensor:
        """Sum [H, k, D] over the heads of each group; return [k, G, D]."""
        heads, num_keys, head_dim = gradient.shape
        grouped = gradient.view(heads // self.heads_a_group, self.heads_a_group, num_keys, head_dim)
        return grouped.sum(1).transpose(0, 1)


def _segments(
    query: Tensor, key: Tensor, value: Tensor, boundaries_q: Tensor, boundaries_k: Tensor
) -> Iterator[_Segment]:
    heads_a_group = query.shape[1] // key.shape[1]
    edges_q, edges_k = boundaries_q.tolist(), boundaries_k.tolist()
    for a, b, c, d in zip(edges_q[:-1], edges_q[1:], edges_k[:-1], edges_k[1:], strict=True):
        if b <= a:
            continue
        part = query[a:b], key[c:d], value[c:d]
        q, k, v = (tensor.float().transpose(0, 1) for tensor in part)
        k, v = (tensor.repeat_interleave(heads_a_group, 0) for tensor in (k, v))
        yield _Segment(slice(a, b), slice(c, d), q, k, v, heads_a_group)


def _scale_of(scale: float | None, query: Tensor) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _check_causal(window: list[int] | None) -> None:
    if window is None or list(window) != [-1, 0]:
        raise NotImplementedError(f"only causal attention has a CPU version here, not window {window}")


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries_q: Tensor,
    boundaries_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_attn::_varlen_attn`: output [T, H, D], log-sum-exp [H, T] (zeros), random state (zeros)."""
    _check_causal(window_size)
    if max_q < int(boundaries_q.diff().max()) or max_k < int(boundaries_k.diff().max()):
        raise ValueError(
            "max_q or max_k is shorter than the longest segment: a kernel would leave tokens out"
        )
    output = torch.zeros(query.shape)
    for part in _segments(query, key, value, boundaries_q, boundaries_k):
        probabilities = part.probabilities(_scale_of(scale, query))
        output[part.queries] = (probabilities @ part.value).transpose(0, 1)
    log_sum_exp = torch.zeros(query.shape[1], query.shape[0])
    return output.to(query.dtype), log_sum_exp, torch.zeros(2, dtype=torch.uint64)


def varlen_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    boundaries_q: Tensor,
    boundaries_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    random_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_attn::_varlen_attn_backward`: gradients of query, key and value."""
    _check_causal(window_size)
    factor = _scale_of(scale, query)
    of_query, of_key, of_value = (torch.zeros(tensor.shape) for tensor in (query, key, value))
    for part in _segments(query, key, value, boundaries_q, boundaries_k):
        p = part.probabilities(factor)
        outer = gradient[part.queries].float().transpose(0, 1)
        of_p = outer @ part.value.transpose(1, 2)
        of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * factor
        of_query[part.queries] = (of_scores @ part.key).transpose(0, 1)
        of_key[part.keys] += part.by_group(of_scores.transpose(1, 2) @ part.query)
        of_value[part.keys] += part.by_group(p.transpose(1, 2) @ outer)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def rms_norm_backward(
    gradient: Tensor,
    states: Tensor,
    shape: list[int],
    reciprocal: Tensor,
    weight: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """`aten::_fused_rms_norm_backward`; `reciprocal` is 1 / sqrt(mean(x^2) + eps) of each row."""
    g, x = gradient.float(), states.float()
    normalised = x * reciprocal
    of_normalised = g if weight is None else g * weight.float()
    inner = (of_normalised * normalised).mean(-1, keepdim=True)
    of_states = (reciprocal * (of_normalised - normalised * inner)).to(states.dtype)
    of_weight = None
    if weight is not None and wanted[1]:
        of_weight = (g * normalised).flatten(0, -len(shape) - 1).sum(0).to(weight.dtype)
    return of_states if wanted[0] else None, of_weight


def flash_inference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """`aten::_scaled_dot_product_flash_attention`, without what a backward would need."""
    output = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    rows = torch.zeros(query.shape[:-1])
    seed = torch.zeros(2, dtype=torch.uint64)
    nothing = torch.zeros(0, dtype=query.dtype)
    empty = torch.zeros((), dtype=torch.uint64)
    return output, rows, None, None, query.shape[-2], key.shape[-2], seed, empty, nothing


def efficient_inference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    needs_log_sum_exp: bool,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """`aten::_scaled_dot_product_efficient_attention`, without what a backward would need."""
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=is_causal, scale=scale
    )
    seed = torch.zeros((), dtype=torch.int64)
    return output, torch.zeros(*query.shape[:-1]), seed, seed.clone()


HOST_KERNELS: dict[str, Callable[..., Any]] = {
    "torch_attn::_varlen_attn": varlen_attention,
    "torch_attn::_varlen_attn_backward": varlen_attention_backward,
    "aten::_fused_rms_norm_backward": rms_norm_backward,
    "aten::_scaled_dot_product_flash_attention": flash_inference,
    "aten::_scaled_dot_product_efficient_attention": efficient_inference,
}
"""Name of an operation -> its CPU version."""
