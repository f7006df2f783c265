"""Weights and optimizer states are finite before they are saved.

A checkpoint with a NaN is worse than none: with `--keep-last` it pushes out the last good one, and every
start from it ends at the first step. The loss does not show all of it: a row of the embedding that no
document uses, or a state that the next step will read, may be NaN while loss and gradient are fine.

Each rank adds up every tensor that it is about to save; the sum is NaN or Inf where the tensor holds one.
That is one pass over the local shards without a copy, then one all-reduce of one number. The cost is in
docs/benchmarks.md (`benchmarks/finite_check.py`): 10 % of the hashing that a save does anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_exact.training.checkpoints.hashing import gather
from megatron_exact.training.watch.numerical_watch import NonFiniteError

MOST_NAMES = 3


def require_finite(state: Any, iteration: int, last: str | None) -> None:
    """Check what is about to be saved; called by every rank.

    Args:
        state: sharded state dict, as Megatron hands it to its save.
        iteration: to be saved.
        last: name of the last good checkpoint, None if there is none yet.

    Raises:
        NonFiniteError: on every rank alike, if a weight or a state of any rank is not finite.
    """
    tensors = list(_tensors(state))
    bad = damaged(tensor for _, tensor in tensors)
    total = torch.tensor([len(bad)], dtype=torch.int64, device="cuda")  # the CPU runtime answers on the CPU
    torch.distributed.all_reduce(total)
    if not int(total):
        return
    here = [_in_words(*tensors[place]) for place in bad[:MOST_NAMES]]
    names = [f"rank {rank}: {text}" for rank, texts in enumerate(gather(here)) for text in texts]
    remedy = (
        f"{last} is the last good checkpoint, and the same command goes on from it"
        if last is not None
        else "there is no checkpoint yet: begin again"
    )
    raise NonFiniteError(
        f"iteration {iteration} is not saved, since {int(total)} of its weights and optimizer states hold "
        f"NaN or Inf ({'; '.join(names[:MOST_NAMES])}); {remedy}; if it recurs, lower --lr or look at the "
        "memory of that machine"
    )


def damaged(tensors: Iterable[Tensor]) -> list[int]:
    """Places of the tensors that hold NaN or Inf; waits once for each device unless there are some.

    A sum is as fast as memory, and NaN or Inf comes through it; finite values too may overflow it, so
    tensors whose sum is not finite are looked at value by value.
    """
    known = list(tensors)
    sums: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for place, tensor in enumerate(known):
        # in the type itself: torch's sum of bfloat16 in float32 is 25 times slower on a CPU
        sums[tensor.device].append((place, tensor.sum().float()))
    suspects: list[int] = []
    for members in sums.values():
        finite = torch.isfinite(torch.stack([total for _, total in members])).tolist()
        suspects += [place for (place, _), is_finite in zip(members, finite, strict=True) if not is_finite]
    return sorted(place for place in suspects if not bool(torch.isfinite(known[place]).all()))


def _tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Key and local shard of everything with a floating point in a sharded state dict."""
    for value in nested_values(state):
        if not isinstance(value, ShardedTensor | ShardedTensorFactory):
            continue
        tensor = value.data
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
            continue
        if hasattr(tensor, "dequantize") and type(tensor) not in (Tensor, torch.nn.Parameter):
            tensor = tensor.dequantize()  # FP8 of Transformer Engine
        yield value.key, tensor.detach()


def _in_words(key: str, tensor: Tensor) -> str:
    num_bad = int((~torch.isfinite(tensor)).sum())
    return f"{key}, {num_bad:,} of {tensor.numel():,} values"
