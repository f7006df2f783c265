"""Transformer Engine on the null device: its own Python and C++, with values from plain CPU versions.

Its kernels are reached through the functions of one C++ extension, `transformer_engine_torch`. Each of them
is wrapped, before anybody imports it: the CPU version writes the values, the function itself runs as it is.
So allocations, workspaces, launches and its checks of shapes and dtypes are Transformer Engine's.

The attention of packed rows is the exception. It plans a kernel with cuDNN, which needs a real card; here
the choice of a backend always falls on cuDNN's, and its two calls get what they would allocate for their
results. Its workspace, which cuDNN alone knows, is missing in the memory of a rehearsal.

T = tokens, H = query heads, G = key/value groups, D = head dimension, R = values of a head that turn.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_exact.rehearsal.build import transformer_engine_libraries
from megatron_exact.rehearsal.emulation import entered
from megatron_exact.rehearsal.host_kernels import (
    rms_norm_backward,
    varlen_attention,
    varlen_attention_backward,
)

PREFIX = "te::"
"""Of its functions in records."""
PYTHON, EXTENSION = "transformer_engine.pytorch", "transformer_engine_torch"
CAUSAL_IN_SEGMENTS = "NVTE_PADDING_CAUSAL_MASK"
PACKED, ROWS = "NVTE_THD", "NVTE_SBHD"


def use_host_kernels() -> bool:
    """Wrap the functions of Transformer Engine's extension; before Megatron imports it.

    Returns:
        Whether Transformer Engine is installed.
    """
    if not transformer_engine_libraries():
        return False
    absent: Any = None
    sys.modules[PYTHON] = absent  # the package imports it, and it copies functions of the extension
    try:
        import transformer_engine.common as common
    finally:
        del sys.modules[PYTHON]
    load = common.load_framework_extension

    def load_and_wrap(framework: str) -> None:
        load(framework)
        _wrap(sys.modules[EXTENSION])

    common.load_framework_extension = load_and_wrap
    try:
        importlib.import_module(PYTHON)
    finally:
        common.load_framework_extension = load
    return True


def _wrap(extension: Any) -> None:
    for name in dir(extension):
        function = getattr(extension, name)
        if isinstance(function, types.BuiltinFunctionType):
            setattr(extension, name, _wrapped(name, function))
    backend = extension.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    extension.get_fused_attn_backend = lambda _: (backend, "")


def _wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    host_kernel = HOST_KERNELS.get(name)
    real = WITHOUT_CUDNN.get(name, function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        emulation = entered()
        if emulation is None:
            return function(*args, **kwargs)
        return emulation.call_extension(PREFIX + name, real, host_kernel, args, kwargs)

    return call


# --------------------------------------------------------------------------------------------------
# Matrix products and norms.


def gemm(
    a: Tensor,
    transposes_a: bool,
    b: Tensor,
    transposes_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_input: Tensor | None,
    is_gradient: bool,
    workspace: Tensor,
    workspace_bytes: int,
    accumulates: bool,
    *_: Any,
    comm_overlap: Any = None,
    alpha: float = 1.0,
    beta: float | None = None,
    **__: Any,
) -> list[Tensor | None]:
    """`generic_gemm`: op(b) @ op(a), all dimensions but the last as one.

    With a bias it is added, or its gradient, the sum over the rows of b, is the second result.
    """
    if quantizer is not None or gelu or comm_overlap is not None:
        raise NotImplementedError("FP8, fused GELU and overlapped communication have no CPU version here")
    left, right = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (b, a))
    product = alpha * (left.t() if transposes_b else left) @ (right.t() if transposes_a else right)
    if not transposes_b:
        product = product.view(*b.shape[:-1], product.shape[-1])
    if bias is not None and not is_gradient:
        product += bias.float()
    if accumulates:
        assert out is not None
        product += (1.0 if beta is None else beta) * out.float()
    return [product, left.sum(0) if bias is not None and is_gradient else None, None, None]


def rms_norm(
    states: Tensor,
    weight: Tensor,
    epsilon: float,
    out: Any,
    quantizer: Any,
    out_dtype: Any,
    spared_multiprocessors: int,
    is_zero_centred: bool,
) -> list[Tensor | None]:
    """`rmsnorm_fwd`: the norm, nothing, and 1 / sqrt(mean(x^2) + eps) of each row."""
    if quantizer is not None:
        raise NotImplementedError("FP8 has no CPU version here")
    x = states.float()
    reciprocal = (x.square().mean(-1) + epsilon).rsqrt()
    return [x * reciprocal[..., None] * _scale(weight, is_zero_centred), None, reciprocal.flatten()]


def rms_norm_gradients(
    gradient: Tensor,
    states: Tensor,
    reciprocal: Tensor,
    weight: Tensor,
    spared_multiprocessors: int,
    is_zero_centred: bool,
) -> list[Tensor | None]:
    """`rmsnorm_bwd`: gradients of states and weight."""
    by_row = reciprocal.view(*states.shape[:-1], 1)
    scale = _scale(weight, is_zero_centred)
    return list(rms_norm_backward(gradient, states, [states.shape[-1]], by_row, scale, wanted=[True, True]))


def _scale(weight: Tensor, is_zero_centred: bool) -> Tensor:
    return weight.float() + 1 if is_zero_centred else weight.float()


# --------------------------------------------------------------------------------------------------
# Rotary embedding: Su et al. 2021, arXiv 2104.09864, the first half of R turning with the second.


def rotate(
    values: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    layout: Any,
    is_interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    *,
    direction: float = 1.0,
) -> Tensor:
    """`fused_rope_forward`: [T, H, D], each token by its position in its segment, or [S, b, H, D]."""
    if is_interleaved or cp_size != 1 or start_positions is not None:
        raise NotImplementedError("this kind of rotary embedding has no CPU version here")
    if layout.name == PACKED:
        assert cu_seqlens is not None
        lengths = cu_seqlens.diff()
        if int(lengths.max()) > len(freqs) or int(cu_seqlens[-1]) != len(values):
            raise ValueError("angles or boundaries do not cover all tokens: a kernel would leave some out")
        starts = cu_seqlens[:-1].repeat_interleave(lengths)
        angles = freqs[torch.arange(len(values)) - starts, 0]  # [T, 1, R]
    elif layout.name == ROWS:
        angles = freqs[: len(values)]  # [S, 1, 1, R]
    else:
        raise NotImplementedError(f"{layout} has no CPU version here")
    width = angles.shape[-1]
    turning, rest = values[..., :width].float(), values[..., width:].float()
    first, second = turning.chunk(2, -1)
    quarter_turned = torch.cat([-second, first], -1)
    turned = turning * angles.cos() + direction * quarter_turned * angles.sin()
    return torch.cat([turned, rest], -1)


# --------------------------------------------------------------------------------------------------
# Attention inside segments, instead of cuDNN's.


def _check_attention(
    mask: Any, window: Sequence[int], dropout: float, boundaries: Tensor, padded: Tensor | None
) -> None:
    if mask.name != CAUSAL_IN_SEGMENTS or tuple(window) not in ((-1, 0), (-1, -1)):
        raise NotImplementedError(f"mask {mask.name} with window {window} has no CPU version here")
    if dropout or (padded is not None and not torch.equal(padded, boundaries)):
        raise NotImplementedError("dropout and padding between segments have no CPU version here")


def attention(
    max_q: int,
    max_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    fills_with_zeros: bool,
    layout: Any,
    output_format: Any,
    scale_format: Any,
    bias_kind: Any,
    mask: Any,
    softmax: Any,
    window: Sequence[int],
    is_bottom_right: bool,
    boundaries_q: Tensor,
    boundaries_kv: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    padded_q: Tensor | None,
    *_: Any,
) -> list[Tensor | None]:
    """`fused_attn_fwd`: output [T, H, D]; statistics and random state stay as they are."""
    _check_attention(mask, window, dropout, boundaries_q, padded_q)
    states = query, key, value, boundaries_q, boundaries_kv
    found = varlen_attention(*states, max_q, max_kv, scale=scale, window_size=[-1, 0])
    return [found[0], None, None]


def attention_results(*args: Any) -> list[Tensor]:
    """Allocate what `fused_attn_fwd` does for its results, and count the plan."""
    max_q, boundaries, query = args[0], args[14], args[16]
    emulation = entered()
    assert emulation is not None
    emulation.records.attention_plans[boundaries.numel() - 1, max_q] += 1
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    statistics = torch.empty(*query.shape[:2], 1, dtype=torch.float32, device=query.device)
    return [output, statistics, torch.empty(2, dtype=torch.int64, device=query.device)]


def attention_gradients(
    max_q: int,
    max_kv: int,
    scale: float,
    dropout: float,
    fills_with_zeros: bool,
    layout: Any,
    output_format: Any,
    gradient_format: Any,
    gradients_layout: Any,
    scale_format: Any,
    gradient_scale_format: Any,
    bias_kind: Any,
    mask: Any,
    softmax: Any,
    window: Sequence[int],
    is_bottom_right: bool,
    is_deterministic: bool,
    boundaries_q: Tensor,
    boundaries_kv: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    gradient: Tensor,
    dtype: torch.dtype,
    auxiliary: Sequence[Tensor],
    padded_q: Tensor | None,
    *_: Any,
) -> list[Tensor | None]:
    """`fused_attn_bwd`: gradients of query, key and value."""
    _check_attention(mask, window, dropout, boundaries_q, padded_q)
    states = gradient, query, key, value, output, auxiliary[0], boundaries_q, boundaries_kv
    found = varlen_attention_backward(
        *states, max_q, max_kv, True, auxiliary[-1], scale=scale, window_size=[-1, 0]
    )
    return [*found, None, None]


def attention_gradient_results(*args: Any) -> list[Tensor | None]:
    """Allocate what `fused_attn_bwd` does for separate query, key and value."""
    states = args[19:22]
    return [*(torch.zeros_like(s, memory_format=torch.contiguous_format) for s in states), None, None]


# --------------------------------------------------------------------------------------------------
# The optimizer and the norm of the gradients: functions of lists of tensors, in place.


def adam(
    chunk: int,
    skips: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    corrects_bias: int,
    weight_decay: float,
) -> None:
    """`multi_tensor_adam`: Kingma and Ba 2014, arXiv 1412.6980; mode 1 decouples the weight decay."""
    if len(lists) != 4 or mode != 1:
        raise NotImplementedError("Adam with master weights of its own, or L2, has no CPU version here")
    first, second = (1 - beta**step if corrects_bias else 1.0 for beta in (beta1, beta2))
    for gradient, weight, mean, square in zip(*lists, strict=True):
        g = gradient.float()
        mean.copy_(beta1 * mean.float() + (1 - beta1) * g)
        square.copy_(beta2 * square.float() + (1 - beta2) * g * g)
        update = mean.float() / first / ((square.float() / second).sqrt() + epsilon)
        weight.copy_(weight.float() - lr * (update + weight_decay * weight.float()))


def l2_norm(
    chunk: int, skips: Tensor, lists: Sequence[Sequence[Tensor]], by_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    """`multi_tensor_l2norm`: of all tensors, and of each where that is asked for."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm()[None], norms if by_tensor else torch.zeros(0)


def scale_all(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], factor: float | Tensor
) -> None:
    """`multi_tensor_scale` and `multi_tensor_scale_tensor`: second list = first list * factor."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * factor)
        if not bool(target.isfinite().all()):
            overflow.fill_(1)


HOST_KERNELS: dict[str, Callable[..., Any]] = {
    "generic_gemm": gemm,
    "rmsnorm_fwd": rms_norm,
    "rmsnorm_bwd": rms_norm_gradients,
    "fused_rope_forward": rotate,
    "fused_rope_backward": functools.partial(rotate, direction=-1.0),
    "fused_attn_fwd": attention,
    "fused_attn_bwd": attention_gradients,
    "multi_tensor_adam": adam,
    "multi_tensor_l2norm": l2_norm,
    "multi_tensor_scale": scale_all,
    "multi_tensor_scale_tensor": scale_all,
}
"""Function of the extension -> its CPU version."""
WITHOUT_CUDNN: dict[str, Callable[..., Any]] = {
    "fused_attn_fwd": attention_results,
    "fused_attn_bwd": attention_gradient_results,
}
"""Function of the extension -> what runs on the null device in its place."""
