"""The modules of a transformer layer on each backend, and an RMSNorm for sequence parallelism."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.training.models.gpt import default_layer_spec
from torch import Tensor

from megatron_exact.model import cpu_kernels
from megatron_exact.model.context_parallel import context_parallel_attention
from megatron_exact.model.packed_attention import PackedAttention
from megatron_exact.model.separate_qkv import SeparateQkvLinear

# --------------------------------------------------------------------------------------------------
# RMSNorm that sequence parallelism may shard.
#
# Upstream's local spec falls back to a norm that refuses sequence parallelism without Apex or Transformer
# Engine; this one only marks its weight, whose gradient `finalize_model_grads` then sums over the
# tensor-parallel group. Statistics in float32, then the weight in the input's dtype, as Llama and Qwen2
# do.


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


class StandaloneRMSNorm(RMSNorm):
    """The norm after the last layer, and of query and key heads: it has an empty extra state.

    Transformer Engine's norm has one, so checkpoints of both specs contain the same keys. The norms before
    attention and MLP have none: Transformer Engine fuses them into the linear layers that follow.
    """

    def get_extra_state(self) -> None:
        """Nothing: extra states hold fp8 scales."""

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set."""


# --------------------------------------------------------------------------------------------------
# Which modules a transformer layer is made of, on each backend.
#
# With `--transformer-impl transformer_engine` upstream's own spec is used unchanged: its core attention
# takes document boundaries from PackedSeqParams. With `local` two modules are exchanged: the core
# attention (stock refuses packed rows; over context-parallel ranks it is another one of ours) and the
# norms (stock refuses sequence parallelism without Apex). `--separate-qkv` exchanges the projection of
# queries, keys and values on either backend. The hook is `GPTModelConfig.transformer_layer_spec`
# (megatron/training/models/gpt.py).


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The layer spec of a GPTModelConfig, for one virtual pipeline stage."""
    if config.transformer.transformer_impl == "transformer_engine":
        return default_layer_spec(config, vp_stage)
    return packed_block_spec(config, vp_stage)


def packed_block_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The local spec with packed attention and our norm, in the layers and after the last one.

    Queries and keys are normalised by head, before they are rotated, where `qk_layernorm` asks for it. Each
    tensor-parallel rank sees its own heads only; `finalize_model_grads` sums the gradients of these norms
    over the ranks, which it recognises by their names.

    A plain ModuleSpec would keep upstream's final norm, hence the whole block.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    is_split = config.transformer.context_parallel_size > 1
    core_attention = context_parallel_attention(config) if is_split else PackedAttention
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = core_attention
    if config.transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = StandaloneRMSNorm
    num_layers = get_num_layers_to_build(config.transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=StandaloneRMSNorm)


def separate_qkv_spec(config: Any, vp_stage: int | None = None) -> Any:
    """`layer_spec` with a projection each for query, key and value (`--separate-qkv`).

    Transformer Engine's fused norm and projection becomes its norm and its three projections; the norm's
    weight keeps the checkpoint key of the fused one, as in upstream's local spec.
    """
    spec = layer_spec(config, vp_stage)
    if config.transformer.transformer_impl != "transformer_engine":
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.linear_qkv = SeparateQkvLinear
        return spec
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer = spec.submodules
    layer.input_layernorm = TENorm
    layer.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    layer.self_attention.submodules.linear_qkv = partial(
        SeparateQkvLinear, projection=TEColumnParallelLinear
    )
    return spec
