"""Logits of the model that the driver built, on any tensor and pipeline layout of up to two stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logits_of(model: Any, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Logits [tokens, vocabulary] of a packed row on the last stage, else anything; every rank calls it."""
    from megatron.core import parallel_state

    from megatron_exact.training.batch import packed_seq_params

    boundaries = torch.tensor([[0, *torch.tensor(lengths).cumsum(0).tolist()]], dtype=torch.int32)
    packing = packed_seq_params(boundaries, max(lengths), tokens.numel())
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    group = parallel_state.get_pipeline_model_parallel_group()
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(tokens.numel(), 1, model.config.hidden_size)
        torch.distributed.recv(hidden, group=group, group_src=0)
        model.set_input_tensor(hidden)
    with torch.no_grad():
        output = model(tokens[None], positions, None, packed_seq_params=packing)
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(output.contiguous(), group=group, group_dst=1)
        return output
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(output[0]) for _ in range(tensor_group.size())]
    torch.distributed.all_gather(shards, output[0].contiguous(), group=tensor_group)
    return torch.cat(shards, dim=-1)
