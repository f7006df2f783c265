"""The loss head: from hidden states to the cross-entropy of every target, without the logits.

Upstream's head holds `[tokens, vocabulary]` logits in the model's dtype and in float32: at 16,384 tokens
and 151,936 columns 15 GB, the peak of the last pipeline stage. This one holds a tile of them at a time
(`loss_head_tiles.py`) and computes it again in backward. It returns losses token by token as upstream does,
so weights, mask and division stay where they are. The hook is `GPTModel.forward(output_processor=...)`
(megatron/core/models/gpt/gpt_model.py).

Only the true columns of the vocabulary are computed: rows that pad the output weight, whose number depends
on tensor parallelism, neither enter the softmax nor get a gradient. Tensor parallelism costs two
all-reduces in forward ([N] and [2, N]) and one of the hidden states' gradient in backward; sequence
parallelism gathers the hidden states in both directions and reduces and scatters their gradient, as
upstream's output layer does.

b = micro-batch size, S = tokens of a row on this context-parallel rank, N = b * S, h = hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_exact.model.loss_head_tiles import Tiles, accumulate_gradients, softmax_statistics

UNSUPPORTED_BY_TILED_HEAD: tuple[tuple[str, Any, str], ...] = (
    ("mtp_num_layers", None, "drop --mtp-num-layers"),
    ("mup_output_mult", 1.0, "drop --use-mup"),
    ("label_smoothing", 0.0, "drop the label smoothing"),
    ("defer_embedding_wgrad_compute", False, "drop --defer-embedding-wgrad-compute"),
    ("fp8_output_proj", False, "drop --fp8-output-proj"),
)
"""TransformerConfig field, the only supported value (a field that this version lacks has it), remedy."""


def check_tiled_head_supports(transformer: Any) -> None:
    """Refuse a TransformerConfig under which the tiled head would compute something else than upstream's.

    Raises:
        ValueError: names the option, its value and the remedy.
    """
    for field, supported, remedy in UNSUPPORTED_BY_TILED_HEAD:
        value = getattr(transformer, field, supported)
        if value != supported and (value or supported):
            raise ValueError(
                f"{field} = {value} is not supported by the tiled loss head: {remedy}, or use "
                "--loss-head stock"
            )


class TiledLossHead:
    """What `GPTModel.forward` takes as `output_processor`: it returns the losses [b, S], float32.

    Args:
        vocabulary: true columns; the output layer may have more, to divide by its ranks.
        tiles: sizes.
    """

    def __init__(self, *, vocabulary: int, tiles: Tiles | None = None) -> None:
        self.vocabulary = vocabulary
        self.tiles = tiles or Tiles()

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor | None,
        config: Any,
        **_: Any,
    ) -> Tensor:
        """The arguments are those that upstream passes on the last pipeline stage.

        Raises:
            ValueError: no labels, or an output layer or configuration that this head does not support.
        """
        check_tiled_head_supports(config)
        if labels is None:
            raise ValueError(
                "the tiled loss head was called without labels: it never holds the logits; call the "
                "model without output_processor to get them"
            )
        if output_layer.bias is not None:
            raise ValueError(
                "an output layer with bias is not supported by the tiled loss head: build it without, "
                "or use --loss-head stock"
            )
        return tiled_token_losses(
            hidden_states,
            output_layer.weight if output_weight is None else output_weight,  # tied: the embedding's
            labels,
            vocabulary=self.vocabulary,
            tiles=self.tiles,
            group=output_layer.tp_group,
            sequence_parallel=output_layer.sequence_parallel,
        )


def tiled_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    tiles: Tiles,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Cross-entropy of every target over a vocabulary that is split over a group of ranks.

    The gradient of the weight goes straight into `weight.main_grad` where upstream's data-parallel wrapper
    has put one, in its dtype, without being rounded to the model's first.

    Args:
        hidden: [S, b, h]; with sequence parallelism this rank's share of S.
        weight: this rank's rows of the output weight, equally many on every rank, same dtype.
        labels: int64 [b, S], the same on all ranks of the group.
        vocabulary: true columns over all ranks.
        tiles: sizes.
        group: the tensor-parallel ranks; None for one.
        sequence_parallel: whether `hidden` is split along S.

    Returns:
        Losses in nats, float32 [b, S]; NaN for a label outside the vocabulary.

    Raises:
        ValueError: shapes that do not fit.
    """
    num_ranks = 1 if group is None else group.size()
    sequence_parallel = sequence_parallel and num_ranks > 1
    tokens = hidden.shape[0] * (num_ranks if sequence_parallel else 1)
    if (hidden.shape[1], tokens) != tuple(labels.shape) or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"hidden states {list(hidden.shape)} fit neither labels {list(labels.shape)} nor the output "
            f"weight {list(weight.shape)}, or not both, on {num_ranks} ranks: [S, b, h] for [b, S], [V, h]"
        )
    if not 0 < vocabulary <= weight.shape[0] * num_ranks:
        raise ValueError(
            f"a vocabulary of {vocabulary} needs as many rows of the output weight, which has "
            f"{weight.shape[0]} on each of {num_ranks} ranks: give the model's own size"
        )
    losses: Tensor = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, vocabulary, tiles, group if num_ranks > 1 else None, sequence_parallel
    )
    return losses


class _TiledCrossEntropy(torch.autograd.Function):
    """Saves its inputs and one number a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocabulary: int,
        tiles: Tiles,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        gathered = _gather(hidden, group) if sequence_parallel else hidden
        first = weight.shape[0] * (0 if group is None else group.rank())
        num_columns = max(0, min(weight.shape[0], vocabulary - first))
        targets = labels.t().reshape(-1)  # in the order of hidden [S, b]
        largest, total, target_logit = softmax_statistics(
            gathered.reshape(-1, hidden.shape[2]), weight[:num_columns], targets - first, tiles
        )
        if group is not None:
            local = largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([total * torch.exp(local - largest), target_logit])
            dist.all_reduce(sums, group=group)
            total, target_logit = sums
        log_sums = largest + total.log()
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.first, ctx.num_columns = first, num_columns
        ctx.tiles, ctx.group, ctx.sequence_parallel = tiles, group, sequence_parallel
        # Such a target has no logit on any rank: its loss would look like any other
        is_unknown = (targets < 0) | (targets >= vocabulary)
        losses = (log_sums - target_logit).masked_fill(is_unknown, torch.nan)
        return losses.view(labels.shape[1], labels.shape[0]).t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        gathered = _gather(hidden, ctx.group) if ctx.sequence_parallel else hidden
        into, returned = None, None
        if ctx.needs_input_grad[1]:
            into, returned = _weight_gradient(weight)
        hidden_gradient = accumulate_gradients(
            gathered.reshape(-1, hidden.shape[2]),
            weight[: ctx.num_columns],
            targets - ctx.first,
            log_sums,
            grad_losses.t().reshape(-1).float(),
            ctx.tiles,
            weight_gradient=None if into is None else into[: ctx.num_columns],
        )
        # Rounded before it is summed over ranks, as upstream's output layer does
        reduced = hidden_gradient.to(hidden.dtype).view(gathered.shape)
        del hidden_gradient, gathered
        if ctx.sequence_parallel:
            share = torch.empty_like(hidden)
            dist.reduce_scatter_tensor(share, reduced, group=ctx.group)
            reduced = share
        elif ctx.group is not None:
            dist.all_reduce(reduced, group=ctx.group)
        return (reduced, returned, None, None, None, None, None)


def _gather(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' shares of [S, b, h], in order."""
    assert group is not None, "sequence parallelism has a group"
    whole = hidden.new_empty((hidden.shape[0] * group.size(), *hidden.shape[1:]))
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def _weight_gradient(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where the gradient of the weight is added, and what autograd is given for it.

    Upstream's hook (megatron/core/distributed/distributed_data_parallel.py) adds what autograd gives to
    `main_grad`, unless `grad_added_to_main_grad` says that it is there already. It still needs a tensor,
    whose content it reads only for a weight that is used twice (`zero_out_wgrad`).
    """
    if not hasattr(weight, "main_grad") or not hasattr(weight, "grad_added_to_main_grad"):
        gradient = torch.zeros_like(weight)
        return gradient, gradient
    weight.grad_added_to_main_grad = True
    is_read = getattr(weight, "zero_out_wgrad", False)
    return weight.main_grad, torch.zeros_like(weight) if is_read else torch.empty_like(weight)
