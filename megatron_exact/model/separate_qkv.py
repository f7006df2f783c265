"""Query, key and value projections as three parameters, in checkpoints of the fused layout.

Megatron's attention has one `linear_qkv`, whose rows lie by key/value group as [query heads of the group |
key | value], so that no optimizer can treat queries or keys apart. `SeparateQkvLinear` stands in its place
in the layer spec: three projections, whose outputs are put in the order that the attention expects.

The rest of Megatron sees the fused layout. `sharded_state_dict` describes each projection as heads of the
fused tensor, under the fused tensor's key, so weights, and the moments of the plain optimizer, are saved as
those of the fused layout: import, export, verification and stock Megatron read the weights as they are, and
those of either layout load into the other. The price: three smaller matrix products instead of one, a copy
of their outputs, and under tensor parallelism three times the communication of this projection.

s = tokens, b = rows (1 in packed training), h = hidden size, D = head dimension, H = query heads, G =
key/value groups, n = H / G; H and G on this tensor-parallel rank where a shape of a rank is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

PROJECTIONS = ("linear_q", "linear_k", "linear_v")
EXTRA_STATE = "_extra_state"
"""State that Transformer Engine keeps for fp8. It is empty here, but it is a key of the checkpoint."""


class SeparateQkvLinear(MegatronModule):  # type: ignore[misc]
    """Replaces the `linear_qkv` of Megatron's SelfAttention.

    Args:
        input_size: h.
        output_size: rows of the fused tensor, (H + 2 G) D over all ranks.
        config: TransformerConfig.
        tp_group: tensor-parallel group.
        projection: class of the three, Megatron's ColumnParallelLinear or Transformer Engine's.
        name: name of the module, or None.
        options: passed to each of the three projections.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        tp_group: Any,
        projection: Callable[..., Any] = ColumnParallelLinear,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config=config)
        ranks = tp_group.size()
        # A rank with only a part of a group would have a part of a key; the options are checked long before
        assert config.num_query_groups % ranks == 0
        self.groups = config.num_query_groups // ranks
        self.group_heads = config.num_attention_heads // config.num_query_groups
        self.first_group = self.groups * tp_group.rank()
        keys = config.num_query_groups * config.kv_channels
        sizes = (config.num_attention_heads * config.kv_channels, keys, keys)
        assert sum(sizes) == output_size
        for part, size in zip(PROJECTIONS, sizes, strict=True):
            part_name = f"{name}.{part}" if name is not None else None
            self.add_module(
                part,
                projection(input_size, size, config=config, tp_group=tp_group, name=part_name, **options),
            )
        self._register_load_state_dict_pre_hook(_without_extra_states)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """[s, b, h] -> [s, b, (H + 2 G) D], rows by group as in Megatron; the bias is included."""
        outputs = [getattr(self, part)(hidden_states)[0] for part in PROJECTIONS]
        by_group = [output.unflatten(-1, (self.groups, -1)) for output in outputs]
        return torch.cat(by_group, dim=-1).flatten(-2), None

    def backward_dw(self) -> None:
        """Compute the delayed weight gradients when Megatron's attention asks for them."""
        for part in PROJECTIONS:
            getattr(self, part).backward_dw()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the three projections as parts of `{prefix}weight` and `{prefix}bias`."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for part in PROJECTIONS:
            for kind in ("weight", "bias"):
                name = f"{prefix}{part}.{kind}"
                if name in state:
                    state[name] = self._as_heads(f"{prefix}{kind}", state[name], part)
            name = f"{prefix}{part}.{EXTRA_STATE}"
            if part == PROJECTIONS[0] and name in state:
                state[name] = replace(state[name], key=f"{prefix}{EXTRA_STATE}")
            else:
                state.pop(name, None)
        return state

    def heads_of(self, part: str) -> list[int]:
        """Return where the heads of a projection on this rank lie in the whole fused tensor, in heads."""
        n = self.group_heads
        inside = {"linear_q": range(n), "linear_k": range(n, n + 1), "linear_v": range(n + 1, n + 2)}[part]
        groups = range(self.first_group, self.first_group + self.groups)
        return [group * (n + 2) + head for group in groups for head in inside]

    def _as_heads(self, key: str, entry: ShardedTensor, part: str) -> ShardedTensorFactory:
        """Describe one piece of the fused tensor `key` per head, as Megatron does for the gated MLP."""
        heads = self.heads_of(part)
        num_heads = (self.group_heads + 2) * self.config.num_query_groups
        axis = entry.prepend_axis_num  # axis of the rows; before it are those of the stacked layers
        layers = [(i, entry.global_offset[i], entry.axis_fragmentations[i]) for i in range(axis)]

        @torch.no_grad()
        def split(
            key: str, tensor: Tensor, replica_id: Any, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            assert flattened_range is None  # megatron-core 0.19.2 does not use it any more
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    piece,
                    *layers,
                    (axis, head, num_heads),
                    replica_id=replica_id,
                    prepend_axis_num=axis,
                )
                for head, piece in zip(heads, tensor.chunk(len(heads)), strict=True)
            ]

        return ShardedTensorFactory(key, entry.data, split, torch.cat, entry.replica_id)


def without_extra_state(norm: Any) -> Any:
    """Keep a norm's extra state out of checkpoints: the fused norm and projection has one for both.

    Args:
        norm: of Transformer Engine; it is changed.

    Returns:
        The same norm.
    """

    def drop(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.pop(f"{prefix}{EXTRA_STATE}", None)

    def add(state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.setdefault(f"{prefix}{EXTRA_STATE}", None)

    norm._register_state_dict_hook(drop)
    norm._register_load_state_dict_pre_hook(add)
    return norm


def _without_extra_states(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the extra states that the checkpoint lacks: loading is strict, and it has one of three."""
    for part in PROJECTIONS:
        state.setdefault(f"{prefix}{part}.{EXTRA_STATE}", None)
