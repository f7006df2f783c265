"""Division of the gradients by the weight mass of the global batch, for the normalised rules.

Upstream's `finalize_model_grads` divides by the number of targets, an int32. The mass is a float that
only the last pipeline stage knows, so for these rules upstream is asked not to divide, the mass is sent
to all stages and summed over the data-parallel ranks, and the gradients are scaled once. The hook is
`config.finalize_model_grads_func` (megatron/core/pipeline_parallel/schedules.py).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor


def finalize_divided_by_mass(model: list[Any], local_mass: Tensor, **kwargs: Any) -> None:
    """Reduce the gradients and divide them by the sum of weights of the global batch.

    Args:
        model: this rank's model chunks (wrapped for data parallelism).
        local_mass: float64 scalar, sum of the weights of this rank's micro-batches; read on the last
            pipeline stage only.
        kwargs: what the schedule passes on to upstream's function beside `num_tokens`.
    """
    mass = local_mass.clone()
    torch.distributed.broadcast(
        mass,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    torch.distributed.all_reduce(
        mass, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    finalize_model_grads(model, None, **kwargs)
    if mass > 0:  # a batch without any target has no gradient to scale
        for chunk in model:
            chunk.scale_gradients(1.0 / mass.float())
