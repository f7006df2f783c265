"""EXACT in Megatron-Bridge, NeMo, or any loop on Megatron-Core's forward steps: wrap the forward step.

```python
pretrain(config, exact_forward_step(forward_step, TargetWeights("exposure_table.json")))
```

The step's own loss function runs on `w_i CE_i` in place of `CE_i`, so its mask, its number of targets, its
checks and the division by the global number of targets stay what they are. The `position_ids` of the batch
must restart in every document (`reset_position_ids`, or packed sequences). No import of Megatron.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_exact.integrations.target_weights import TargetWeights

ForwardStep = Callable[..., tuple[Any, Any]]


def exact_forward_step(forward_step: ForwardStep, target_weights: TargetWeights) -> ForwardStep:
    """Return a forward step whose loss is weighted.

    What the step logs as its loss is then the weighted one. Without gradients (evaluation) the step is
    unchanged.

    Args:
        forward_step: Megatron's: `(state, data_iterator, model, ...)` or `(data_iterator, model, ...)`,
            which returns the losses of all tokens and a loss function of them that returns
            `(sum of losses, number of targets, report)`. The job needs `calculate_per_token_loss`, so
            that Megatron divides by the number of targets of the global batch.
        target_weights: the rule.

    Raises:
        ValueError: at once, a step without `data_iterator`, or a rule that divides by the sum of weights;
            at a batch, no `position_ids`, losses of another shape (context parallelism splits rows), or a
            loss function that returns no number of targets.
    """
    if target_weights.divides_by_mass:
        raise ValueError(
            "exact-normalized divides by the sum of weights, and Megatron divides by the number of "
            "targets: use exact, of which it is a near twin"
        )
    signature = inspect.signature(forward_step)
    if "data_iterator" not in signature.parameters:
        raise ValueError(f"the forward step has no data_iterator among its arguments {signature}")

    @functools.wraps(forward_step)
    def step(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments["data_iterator"]
        batches = None if given is None else _Remembering(given)
        bound.arguments["data_iterator"] = batches
        output, loss_function = forward_step(*bound.args, **bound.kwargs)
        # Only the last pipeline stage calls it
        return output, functools.partial(_weighted, loss_function, batches, target_weights)

    return step


class _Remembering(Iterator[dict[str, Any]]):
    """Passes batches on and keeps the last one."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches  # Megatron's RerunDataIterator has __next__ alone
        self.last: dict[str, Any] = {}

    def __next__(self) -> dict[str, Any]:
        self.last = next(self._batches)
        return self.last


def _weighted(
    loss_function: Any, batches: _Remembering | None, target_weights: TargetWeights, losses: Any
) -> Any:
    if not torch.is_grad_enabled():
        return loss_function(losses)
    positions = {} if batches is None else batches.last
    if not isinstance(losses, Tensor) or not isinstance(positions.get("position_ids"), Tensor):
        raise ValueError(
            "the weights need losses of all tokens and position_ids that restart in every document on each "
            "rank that computes a loss: use a dataset that gives them, and tensor parallelism 1 where the "
            "other ranks read no batch"
        )
    weights = target_weights(positions["position_ids"].to(losses.device))
    if weights.numel() != losses.numel():
        raise ValueError(
            f"{losses.numel()} losses for {weights.numel()} positions: weights need whole rows on a rank, "
            "so context parallelism is not supported here"
        )
    returned = loss_function(losses * weights.reshape(losses.shape))
    if len(returned) != 3:
        raise ValueError(
            f"the loss function returned {len(returned)} values: the sum of losses, the number of targets "
            "and a report are needed (calculate_per_token_loss)"
        )
    return returned
