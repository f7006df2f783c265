"""Matrix products of bfloat16 and float16 models on an x86 CPU without instructions for them.

There torch sums such products one number at a time: on an AVX2 processor the loss head takes 0.6 CPU
seconds with widened products where Megatron's takes 13 (`benchmarks/loss_head.py`). `widen_products`
replaces that sum in linear layers: it widens the operands to float32, one tile of the weight at a time, and
rounds the product once. The slow kernel sums in float32 and rounds once, too, so only the order of the sum
differs; dtype and memory of the model stay as they are. The loss head widens its tiles likewise.
"""

from __future__ import annotations

import platform
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOW_CAPABILITIES = ("NO AVX", "DEFAULT", "AVX2")
"""Values of torch.backends.cpu.get_cpu_capability(); from AVX512 on, oneDNN multiplies bfloat16 itself."""
FEWEST_ROWS = 6
"""Rows of inputs from which widening the weight costs less than it saves."""
TILE_NUMBERS = 1 << 20
"""Numbers of the weight that are widened at a time: 4 MiB, which stay in the cache."""


def is_slow() -> bool:
    """Return whether torch multiplies bfloat16 matrices number by number on this CPU."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and torch.backends.cpu.get_cpu_capability() in SLOW_CAPABILITIES


def multiplies_slowly(operand: Tensor) -> bool:
    """Return whether torch multiplies matrices of this dtype, on this device, number by number."""
    return _is_low(operand) and is_slow()


def widen_products(model: Any) -> int:
    """Make the linear layers of a model multiply in float32, where that is faster.

    Only inference takes this way: where gradients are enabled, a layer calls torch's own product.

    Args:
        model: a torch module; changed in place.

    Returns:
        Number of linear layers that were changed: 0 on a GPU, in float32 and on CPUs that multiply
        bfloat16 themselves.
    """
    if not is_slow():
        return 0
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear and _is_low(module.weight):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _is_low(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


def _forward(module: nn.Linear, inputs: Tensor) -> Tensor:
    rows = inputs.numel() // inputs.shape[-1]
    if rows < FEWEST_ROWS or torch.is_grad_enabled() or not _is_low(module.weight):
        return F.linear(inputs, module.weight, module.bias)
    return widened_linear(inputs, module.weight, module.bias)


def widened_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(inputs, weight, bias)`, summed in float32 and rounded once.

    Args:
        inputs: [..., in features], of the weight's dtype.
        weight: [out features, in features], bfloat16 or float16.
        bias: [out features].

    Returns:
        [..., out features] of the same dtype.
    """
    wide = inputs.float()
    result = inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))
    tile = max(1, TILE_NUMBERS // weight.shape[1])
    for start in range(0, weight.shape[0], tile):
        part = slice(start, start + tile)
        result[..., part] = F.linear(
            wide, weight[part].float(), None if bias is None else bias[part].float()
        )
    return result
