"""CPU versions of what Transformer Engine fuses: parts of a Llama layer, the gradient norm, clipping, Adam.

Written as plain tensor operations, each of them makes a dozen passes over tensors that fit no cache, and
autograd saves and adds up the pieces: most of the cost of a step beside its matrix products. Here each is
one autograd function that saves only its input and works on a few rows at a time, in place, so that a pass
finds in the cache what the previous one has written (benchmarks/training_throughput.py).

The results of plain autograd are the reference (tests/unit/model/test_cpu_kernels.py); only rounding
differs.

T = tokens, h = hidden size, f = intermediate size, H = heads, D = head dimension.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED_ELEMENTS = 2**17
"""Elements of each tensor in a block: 512 KiB of float32, so that three of them fit an L2 cache."""


def _blocks(num_rows: int, columns: int) -> Iterator[slice]:
    size = max(1, CACHED_ELEMENTS // columns)
    for start in range(0, num_rows, size):
        yield slice(start, min(num_rows, start + size))


def bias_swiglu(gate_and_up: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    """Compute `silu(gate) * up`; Megatron calls this where `--bias-swiglu-fusion` is on.

    Args:
        gate_and_up: [..., 2 f].
        bias: [2 f] or None; added first.

    Returns:
        [..., f], same dtype.
    """
    output: Tensor = _SwiGLU.apply(gate_and_up if bias is None else gate_and_up + bias)  # type: ignore[no-untyped-call]
    return output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        rows = gate_and_up.reshape(-1, gate_and_up.shape[-1])
        columns = rows.shape[1] // 2
        output = rows.new_empty((rows.shape[0], columns))
        for block in _blocks(rows.shape[0], columns):
            gate, up = rows[block].chunk(2, 1)
            torch.mul(F.silu(gate), up, out=output[block])
        return output.view(*gate_and_up.shape[:-1], columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        rows = gate_and_up.reshape(-1, gate_and_up.shape[-1])
        grads = grad.reshape(rows.shape[0], -1)
        result = torch.empty_like(rows)
        for block in _blocks(*grads.shape):
            gate, up = rows[block].chunk(2, 1)
            gate_grad, up_grad = result[block].chunk(2, 1)
            here = grads[block]
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            torch.mul(here, silu, out=up_grad)
            slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)  # of silu at gate
            torch.mul(slope.mul_(here), up, out=gate_grad)
        return result.view(gate_and_up.shape)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in float32.

    Args:
        hidden: [..., h].
        weight: [h].
        eps: added to the mean square.

    Returns:
        The normalized values in the dtype of `hidden`, times the weight: [..., h].
    """
    output: Tensor = _RMSNorm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        scales = rows.new_empty((rows.shape[0], 1), dtype=torch.float32)
        output = torch.empty_like(rows, dtype=torch.result_type(rows, weight))
        for block in _blocks(*rows.shape):
            values = rows[block].float()
            mean = values.square().mean(1, keepdim=True)
            torch.rsqrt(mean.add_(eps), out=scales[block])
            normalized = (values * scales[block]).to(hidden.dtype)
            torch.mul(normalized, weight, out=output[block])
        ctx.save_for_backward(hidden, weight, scales)
        return output.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scales = ctx.saved_tensors
        rows = hidden.reshape(-1, hidden.shape[-1])
        grads = grad.reshape(rows.shape)
        result = torch.empty_like(rows)
        factor = weight.float()
        weight_grad = torch.zeros_like(factor)
        for block in _blocks(*rows.shape):
            here = grads[block].float()
            normalized = rows[block].float() * scales[block]
            product = here * normalized
            weight_grad += product.sum(0)
            projection = torch.mv(product, factor).div_(rows.shape[1])
            hidden_grad = torch.mul(here, factor, out=product)
            # not addcmul_, which is slow where a factor is broadcast
            hidden_grad.sub_(normalized.mul_(projection[:, None])).mul_(scales[block])
            result[block] = hidden_grad
        return result.view(hidden.shape), weight_grad.to(weight.dtype), None


def rotate_segments(
    values: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    *,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """Rotate the tokens of packed rows; Megatron calls this where `--rope-fusion` is on.

    The angles are those of a token's position inside its segment. Su et al. 2021, arXiv 2104.09864, in the
    form of Llama: the first half of a head rotates with the second.

    Args:
        values: [T, H, D].
        cu_seqlens: int [segments + 1], boundaries.
        freqs: [longest segment or more, 1, 1, R], angles, the second half of R repeating the first; the
            last D - R values of a head are unchanged.
        cp_size: must be 1: with context parallelism our attention rotates its own tokens.
        cp_rank: not read.
        interleaved: must be False.

    Raises:
        ValueError: interleaved pairs, or context parallelism.
    """
    if interleaved or cp_size != 1:
        raise ValueError(
            f"rotary_interleaved = {interleaved} with a context-parallel size of {cp_size} is not "
            "supported by the CPU's rotary embedding: add --no-rope-fusion"
        )
    output: Tensor = _Rotation.apply(values, cu_seqlens.tolist(), *_cosines(freqs))  # type: ignore[no-untyped-call]
    return output


def rotate_row(values: Tensor, freqs: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate tokens whose angles are given one by one.

    Args:
        values: [T, 1, H, D].
        freqs: [T, 1, 1, R].
        interleaved: must be False.

    Raises:
        ValueError: as `rotate_segments`.
    """
    whole = torch.tensor([0, values.shape[0]])
    return rotate_segments(values.squeeze(1), whole, freqs, interleaved=interleaved).unsqueeze(1)


_latest: tuple[weakref.ref[Tensor], Tensor, Tensor] | None = None


def _cosines(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [tokens, 1, R / 2], once a step: every layer passes the same tensor."""
    global _latest
    if _latest is None or _latest[0]() is not freqs:
        angles = freqs[:, 0, :, : freqs.shape[-1] // 2].float()
        _latest = (weakref.ref(freqs), angles.cos(), angles.sin())
    return _latest[1:]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, boundaries: list[int], cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.boundaries, ctx.tables = boundaries, (cosines, sines)
        return _rotate(values, boundaries, cosines, sines, sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _rotate(grad, ctx.boundaries, *ctx.tables, sign=-1), None, None, None


def _rotate(values: Tensor, boundaries: list[int], cosines: Tensor, sines: Tensor, *, sign: int) -> Tensor:
    half = cosines.shape[-1]
    output = torch.empty_like(values, memory_format=torch.contiguous_format)
    if 2 * half < values.shape[-1]:
        output[..., 2 * half :] = values[..., 2 * half :]
    for start, stop in pairwise(boundaries):
        for block in _blocks(stop - start, values.shape[1] * values.shape[2]):
            rows = slice(start + block.start, start + block.stop)
            cos, sin = (table[block].to(values.dtype) for table in (cosines, sines))
            first, second = (values[rows, :, part] for part in (slice(half), slice(half, 2 * half)))
            torch.mul(first, cos, out=output[rows, :, :half]).addcmul_(second, sin, value=-sign)
            torch.mul(second, cos, out=output[rows, :, half : 2 * half]).addcmul_(first, sin, value=sign)
    return output


NORM_BLOCK = 4096
LARGE_TENSOR = 1 << 14  # elements; torch's norm of fewer is off by two millionths at most


def l2_norm(tensor: Tensor) -> Tensor:
    """Return the Euclidean norm of a tensor, float32 scalar, also where it is large.

    torch adds the squares of a float32 tensor one after the other on a CPU: the norm of the 28 million
    elements of an embedding's gradient can be off by a thousandth, and so can the steps that are clipped by
    it. Here blocks are summed first, and then their norms.
    """
    if tensor.numel() <= LARGE_TENSOR:
        plain: Tensor = torch.norm(tensor)
        return plain
    flat = tensor.reshape(-1)
    whole = flat.numel() // NORM_BLOCK * NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([blocks, flat[whole:]]).double())
    return norm.to(tensor.dtype)


def l2_norm_of_tensors(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: object
) -> tuple[Tensor, None]:
    """Return the Euclidean norm of all tensors together, in place of `local_multi_tensor_l2_norm`.

    The arguments are those of megatron/core/utils.py, of which the tensors alone are used.

    Returns:
        The norm, float32 [1], and None, since there is no norm of each tensor.
    """
    norms = torch.tensor([[l2_norm(tensor) for tensor in tensors] for tensors in tensor_lists])
    return torch.norm(norms).float().reshape(1), None


def scale_tensors(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float | Tensor
) -> None:
    """Write tensors times a number, in place of `local_multi_tensor_scale`, which copies each product.

    The arguments are those of megatron/core/utils.py; `tensor_lists` contains sources and destinations.
    """
    for source, destination in zip(*tensor_lists, strict=True):
        if source.dtype == destination.dtype:
            torch.mul(source, scale, out=destination)
        else:
            destination.copy_(source * scale)


def fuse_adam(optimizer: Any) -> None:
    """Let torch's Adam or AdamW take its steps with torch's fused kernel, a quarter of the time on a CPU.

    The option is set during a step alone: parameter groups in checkpoints stay as other machines make them,
    and those that are loaded do not switch it off.

    Args:
        optimizer: any torch optimizer; others than Adam and AdamW stay as they are.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return

    def set_fused(value: bool | None) -> None:
        for group in optimizer.param_groups:
            group["fused"] = value

    optimizer.register_step_pre_hook(lambda *_: set_fused(True))
    optimizer.register_step_post_hook(lambda *_: set_fused(None))
