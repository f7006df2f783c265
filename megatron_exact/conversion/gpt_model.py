"""Megatron's GPTModel with the weights of a checkpoint: one process, local layer spec, float32, no GPU.

Used to prove a conversion, never to convert. The checkpoint is read by our own reader, not by Megatron's.
Megatron numbers the tokens of a row without gaps; here its own table of rotary frequencies is computed to
the last position and the rows of the wanted positions are taken out of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from megatron_exact.conversion.layout import row_blocks
from megatron_exact.conversion.names import LAYERS
from megatron_exact.conversion.tensors import as_tensor
from megatron_exact.conversion.torch_dist_reader import TorchDistCheckpoint
from megatron_exact.model.shapes import ModelShape

LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Key of a layer in a checkpoint -> parameter of the local layer spec, where they differ."""


@torch.no_grad()
def megatron_logits(
    stored: TorchDistCheckpoint, shape: ModelShape, tokens: Tensor, positions: Tensor, rounding: torch.dtype
) -> Tensor:
    """Logits [T, V] of a GPTModel in float32 with the weights of a checkpoint, rounded before.

    Args:
        stored: the checkpoint.
        shape: of the model.
        tokens: int64 [T].
        positions: int64 [T], ascending.
        rounding: type to which they are rounded; float32 for the weights as they are.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron compiles small functions when imported
    with _quiet(), _one_process_group():
        from megatron.core.packed_seq_params import PackedSeqParams

        model = build_model(shape)
        load_weights(model, stored)
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.to(rounding))
        model.rotary_pos_emb = _RowsOfTable(model.rotary_pos_emb, positions)
        boundaries = torch.tensor([0, len(tokens)], dtype=torch.int32)
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=len(tokens),
            max_seqlen_kv=len(tokens),
        )
        logits: Tensor = model(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=None,
            packed_seq_params=packing,
        )
    return logits[0]


class _RowsOfTable(torch.nn.Module):
    """Upstream's rotary embedding at chosen positions."""

    def __init__(self, rotary: Any, positions: Tensor) -> None:
        super().__init__()
        self._rotary = rotary
        with _cpu_as_device():
            self._rows: Tensor = rotary.get_emb(int(positions.max()) + 1).cpu()[positions]

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """As upstream's."""
        length: int = self._rotary.get_rotary_seq_len(*args, **kwargs)
        return length

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """[T, 1, 1, head_dim]."""
        return self._rows


def build_model(shape: ModelShape) -> Any:
    """A GPTModel of a shape with the local layer spec, float32, in evaluation mode."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_exact.model.layer_specs import packed_block_spec

    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        params_dtype=torch.float32,
    )
    scaling = shape.rope_scaling
    model = GPTModel(
        config=config,
        transformer_layer_spec=packed_block_spec(SimpleNamespace(transformer=config)),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
        rope_scaling=scaling is not None,
        **({"rope_scaling_factor": scaling.factor} if scaling is not None else {}),
    )
    return model.eval()


def load_weights(model: Any, stored: TorchDistCheckpoint) -> None:
    """Fill every parameter of a GPTModel (local spec, one process) from a checkpoint, in blocks."""
    for key, tensor in stored.tensors.items():
        layers: list[int | None] = list(range(tensor.shape[0])) if key.startswith(LAYERS) else [None]
        for layer in layers:
            name = key
            if layer is not None:
                inner = key.removeprefix(LAYERS)
                name = f"{LAYERS}{layer}.{LOCAL_NAMES.get(inner, inner)}"
            parameter = model.get_parameter(name).data
            row_bytes = parameter[:1].numel() * tensor.dtype.itemsize
            for start, stop in row_blocks(parameter.shape[0], row_bytes):
                rows = np.empty((stop - start) * row_bytes, np.uint8)
                stored.read_rows(key, layer, start, stop - start, rows)
                parameter[start:stop] = as_tensor(rows, tensor.dtype).view(parameter[start:stop].shape)


@contextlib.contextmanager
def _cpu_as_device() -> Iterator[None]:
    """RotaryEmbedding.get_emb moves its frequencies to the current CUDA device; here there may be none."""
    stock = torch.cuda.current_device
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = stock


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without upstream's remarks on kernels that a float32 comparison on the CPU does not need."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _one_process_group() -> Iterator[None]:
    """Megatron's groups for a world of this process alone, unless a caller has made some already.

    torch's fake backend: groups of one never communicate, and gloo's threads do not survive a later fork.
    """
    import torch.testing._internal.distributed.fake_pg  # registers the backend
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("fake", store=HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
