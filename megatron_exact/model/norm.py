"""RMSNorm that sequence parallelism may shard.

Upstream's local spec falls back to a norm that refuses sequence parallelism without Apex or Transformer
Engine; this one only marks its weight, whose gradient `finalize_model_grads` then sums over the
tensor-parallel group. Statistics in float32, then the weight in the input's dtype, as Llama and Qwen2 do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_exact.model import cpu_kernels


class RMSNorm(torch.nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Args:
        config: a Megatron TransformerConfig (params_dtype and sequence_parallel are read).
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        if not hidden.is_cuda:
            return cpu_kernels.rms_norm(hidden, self.weight, self.eps)
        normalised = F.rms_norm(hidden.float(), self.weight.shape, eps=self.eps)
        return normalised.to(hidden.dtype) * self.weight


class FinalRMSNorm(RMSNorm):
    """The norm after the last layer, with the empty extra state of Transformer Engine's.

    Checkpoints of the local spec and of Transformer Engine's then hold the same keys. The norms inside a
    layer have none: there Transformer Engine fuses them into the linear layers that follow.
    """

    def get_extra_state(self) -> None:
        """Nothing: extra states hold fp8 scales."""

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set."""
