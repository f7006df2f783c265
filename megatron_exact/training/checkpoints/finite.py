"""Weights and optimizer states are finite before they are saved, and after they are loaded.

A checkpoint with a NaN is worse than none: with `--keep-last` it pushes out the last good one, and every
start from it ends at the first step. The loss does not show all of it: a row of the embedding that no
document uses, or a state that the next step will read, may be NaN while loss and gradient are fine.

Each rank adds up every tensor that it saves or has loaded; the sum is NaN or Inf where the tensor holds
one. That is one pass over the local shards without a copy, then one all-reduce of one number. The cost is
in docs/benchmarks.md (`benchmarks/finite_check.py`): 10 % of the hashing that a save does anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
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
    remedy = (
        f"{last} is the last good checkpoint, and the same command goes on from it"
        if last is not None
        else "there is no checkpoint yet: begin again"
    )
    _refuse(
        _saved(state),
        f"iteration {iteration} is not saved, since",
        f"{remedy}; if it recurs, lower --lr or look at the memory of that machine",
    )


def require_finite_start(model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Check what was loaded; called by every rank. An older version may have saved a NaN.

    Args:
        model: chunks of this rank, as Megatron wraps them.
        optimizer: of Megatron, chained or single; None without one.
        checkpoint: folder of the iteration.

    Raises:
        NonFiniteError: on every rank alike.
    """
    remedy = "remove it to go on from an older one, or start from another checkpoint"
    _refuse(_loaded(model, optimizer), f"nothing is trained from {checkpoint}, since", remedy)


def _refuse(found: Iterable[tuple[str, Tensor]], begin: str, remedy: str) -> None:
    """Raise the error that begins and ends so if a tensor of any rank is not finite."""
    tensors = [
        (name, _plain(tensor)) for name, tensor in found if tensor.is_floating_point() and tensor.numel()
    ]
    bad = damaged(tensor for _, tensor in tensors)
    total = torch.tensor([len(bad)], dtype=torch.int64, device="cuda")  # the CPU runtime answers on the CPU
    torch.distributed.all_reduce(total)
    if not int(total):
        return
    here = [_in_words(*tensors[place]) for place in bad[:MOST_NAMES]]
    names = [f"rank {rank}: {text}" for rank, texts in enumerate(gather(here)) for text in texts]
    raise NonFiniteError(
        f"{begin} {int(total)} of its weights and optimizer states hold NaN or Inf "
        f"({'; '.join(names[:MOST_NAMES])}); {remedy}"
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


def _saved(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Key and local shard of each tensor of a sharded state dict, without padding."""
    if isinstance(state, ShardedTensor | ShardedTensorFactory):
        if isinstance(state.data, Tensor):
            yield state.key, state.data
    elif isinstance(state, dict):
        if not _is_padding(state):
            for value in state.values():
                yield from _saved(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _saved(value)


def _is_padding(state: dict[Any, Any]) -> bool:
    """Whether these tensors fill a gap between parameters in a buffer of the distributed optimizer.

    Megatron saves them as `torch.empty` made them, whatever the memory held, and drops them on loading
    (`sharded_param_state_dp_reshardable` in megatron/core/optimizer/distrib_optimizer.py).
    """
    mark = state.get("padding")
    return isinstance(mark, LocalNonpersistentObject) and mark.unwrap() is True


def _loaded(model: Any, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight, main copy and optimizer state of this rank."""
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            yield name.removeprefix("module.").removeprefix("module."), parameter
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner: Any = getattr(part, "optimizer", None)
        for group in getattr(inner, "param_groups", ()):
            for parameter in group["params"]:
                yield "a main copy of the optimizer", parameter
                for name, value in inner.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield f"{name} of the optimizer", value


def _plain(tensor: Tensor) -> Tensor:
    """Without gradient; FP8 of Transformer Engine as the numbers that it stands for."""
    if hasattr(tensor, "dequantize") and type(tensor) not in (Tensor, torch.nn.Parameter):
        tensor = tensor.dequantize()
    return tensor.detach()


def _in_words(key: str, tensor: Tensor) -> str:
    num_bad = int((~torch.isfinite(tensor)).sum())
    return f"{key}, {num_bad:,} of {tensor.numel():,} values"
