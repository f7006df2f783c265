"""The modules of a transformer layer on each backend, and an RMSNorm for sequence parallelism.

With `--transformer-impl transformer_engine` Megatron's own spec is used unchanged: its core attention takes
document boundaries from PackedSeqParams. With `local` two modules are exchanged: the core attention, since
the stock one does not support packed rows (context parallelism has a third one), and the norms, since the
stock ones do not support sequence parallelism without Apex. `--separate-qkv` exchanges the projection of
queries, keys and values on either backend. Models with `post_norm` have modules of their own, on `local`
only. The hook is `GPTModelConfig.transformer_layer_spec`
(megatron/training/models/gpt.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.training.models.gpt import default_layer_spec
from torch import Tensor

from megatron_exact.model import cpu_kernels
from megatron_exact.model.context_parallel import context_parallel_attention
from megatron_exact.model.packed_attention import PackedAttention
from megatron_exact.model.separate_qkv import SeparateQkvLinear, without_extra_state


class RMSNorm(torch.nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, under sequence parallelism too.

    Megatron's local spec falls back to a norm that does not support sequence parallelism without Apex or
    Transformer Engine. This one marks its weight, whose gradient `finalize_model_grads` then sums over the
    tensor-parallel group. Statistics are in float32, then the weight in the input's dtype, as in Llama and
    Qwen2.

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
        normalized = F.rms_norm(hidden.float(), self.weight.shape, eps=self.eps)
        return normalized.to(hidden.dtype) * self.weight


class StandaloneRMSNorm(RMSNorm):
    """The norm after the last layer, and of query and key heads: it has an empty extra state.

    Transformer Engine's norm has one, so checkpoints of both specs contain the same keys. The norms before
    attention and MLP have none: Transformer Engine fuses them into the linear layers that follow.
    """

    def get_extra_state(self) -> None:
        """Return None: extra states contain fp8 scales, which this norm does not have."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore the empty state."""


class _SumOverRanks(torch.autograd.Function):
    """The sum over a group, of values as of their gradients: every rank uses the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class RMSNormOverHeads(StandaloneRMSNorm):
    """One RMSNorm over all query heads, or all key heads, of a token.

    A tensor-parallel rank has some of the heads, so the squares are summed over the group. The weight is
    whole on every rank: each uses its own part, and the gradients are summed, as `finalize_model_grads`
    does for every norm of this name.

    Args:
        config: a Megatron TransformerConfig.
        hidden_size: width of a head.
        eps: added to the mean square.
        num_heads: heads of all ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, *, num_heads: int, **_: Any):
        super().__init__(config, num_heads * hidden_size, eps)
        self._group = parallel_state.get_tensor_model_parallel_group()
        width = num_heads * hidden_size // self._group.size()
        self._own = slice(width * self._group.rank(), width * (self._group.rank() + 1))

    def forward(self, heads: Tensor) -> Tensor:
        """[tokens, rows, heads of this rank, D] -> the same shape and dtype."""
        flat = heads.flatten(-2)
        if self._group.size() == 1:
            return super().forward(flat).view(heads.shape)
        values = flat.float()
        squares = _SumOverRanks.apply(values.square().sum(-1, keepdim=True), self._group)  # type: ignore[no-untyped-call]
        normalized = values * torch.rsqrt(squares / self.weight.shape[0] + self.eps)
        return (normalized.to(heads.dtype) * self.weight[self._own]).view(heads.shape)


class NormedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """The last projection of attention or MLP with an RMSNorm of what it adds to the residual stream."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.output_norm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """[s, b, input_size / TP] -> [s, b, output_size] (s / TP with sequence parallelism), no bias."""
        output, bias = super().forward(input_)
        assert bias is None
        return self.output_norm(output), None


def layer_spec(config: Any, vp_stage: int | None = None, *, post_norm: bool = False) -> Any:
    """Return the layer spec of a GPTModelConfig for one virtual pipeline stage.

    Args:
        config: a GPTModelConfig.
        vp_stage: the stage.
        post_norm: as `ModelShape.post_norm`.
    """
    if config.transformer.transformer_impl == "transformer_engine":
        assert not post_norm  # checked with the flags
        spec = default_layer_spec(config, vp_stage)
        if config.transformer.context_parallel_size > 1:
            # Transformer Engine's own would cut every document into 2 x CP equal pieces
            attention = spec.submodules.self_attention.submodules
            attention.core_attention = context_parallel_attention(config)
        return spec
    return packed_block_spec(config, vp_stage, post_norm=post_norm)


def packed_block_spec(
    config: Any, vp_stage: int | None = None, *, post_norm: bool = False
) -> TransformerBlockSubmodules:
    """Return the local spec with packed attention and our norm, in the layers and after the last one.

    Where `qk_layernorm` is set, queries and keys are normalized by head before they are rotated. Each
    tensor-parallel rank sees its own heads only; `finalize_model_grads` recognizes these norms by their
    names and sums their gradients over the ranks.

    The whole block is returned because a plain ModuleSpec would keep Megatron's final norm.
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
    if post_norm:
        transformer = config.transformer
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
        attention.linear_proj = NormedRowParallelLinear
        spec.submodules.mlp.keywords["submodules"].linear_fc2 = NormedRowParallelLinear
        attention.q_layernorm = partial(RMSNormOverHeads, num_heads=transformer.num_attention_heads)
        attention.k_layernorm = partial(RMSNormOverHeads, num_heads=transformer.num_query_groups)
    num_layers = get_num_layers_to_build(config.transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=StandaloneRMSNorm)


def separate_qkv_spec(config: Any, vp_stage: int | None = None, *, post_norm: bool = False) -> Any:
    """Return `layer_spec` with separate projections for query, key and value (`--separate-qkv`).

    Transformer Engine's fused norm and projection becomes its norm and its three projections; the norm's
    weight keeps the checkpoint key of the fused one, as in Megatron's local spec.
    """
    spec = layer_spec(config, vp_stage, post_norm=post_norm)
    if config.transformer.transformer_impl != "transformer_engine":
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.linear_qkv = SeparateQkvLinear
        return spec
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    def norm(**options: Any) -> Any:
        return without_extra_state(TENorm(**options))

    layer = spec.submodules
    layer.input_layernorm = norm
    layer.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    layer.self_attention.submodules.linear_qkv = partial(
        SeparateQkvLinear, projection=TEColumnParallelLinear
    )
    return spec
