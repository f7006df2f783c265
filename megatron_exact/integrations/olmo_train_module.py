"""EXACT in OLMo-core: a train module whose loss is weighted by the document lengths of each instance.

Instances need `doc_lens`: packed or concatenated datasets give them with `generate_doc_lengths=True`.
OLMo-core divides the summed loss by the supervised tokens of a rank's own batch and averages over ranks.
Here the tokens of all ranks are averaged first, so that a target counts the same on every rank, as in
Megatron. Checked with ai2-olmo-core 3.0.0.
"""

from __future__ import annotations

from typing import Any

import torch
from olmo_core.distributed.utils import is_distributed
from olmo_core.nn.lm_head import LMOutputWithLoss
from olmo_core.train.train_module import TransformerTrainModule
from torch import Tensor

from megatron_exact.integrations.target_weights import TargetWeights


class ExactTransformerTrainModule(TransformerTrainModule):  # type: ignore[misc]
    """`TransformerTrainModule` with weights in its training loss; z-loss and evaluation are unchanged.

    Args:
        args: positional arguments of the train module.
        target_weights: the rule, with `labels="row"`: OLMo-core shifts labels over the whole row.
        kwargs: keyword arguments of the train module.

    Raises:
        ValueError: at its start, another convention of labels, a rule that divides by the sum of weights,
            or tensor or context parallelism; at a batch, no `doc_lens`.
    """

    def __init__(self, *args: Any, target_weights: TargetWeights, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if target_weights.labels != "row":
            raise ValueError('OLMo-core shifts labels over the whole row: TargetWeights(labels="row")')
        if target_weights.divides_by_mass:
            raise ValueError(
                "exact-normalized divides by the sum of weights, and OLMo-core divides by the number of "
                "targets: use exact, of which it is a near twin"
            )
        if self.tp_enabled or self.cp_enabled:
            raise ValueError("weights need whole rows on a rank: tensor and context parallelism must be 1")
        self.target_weights = target_weights

    def model_forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the model on a micro-batch; in training, weigh its token losses."""
        if labels is None or not torch.is_grad_enabled() or kwargs.get("loss_reduction") != "sum":
            return super().model_forward(input_ids, labels=labels, **kwargs)
        if (lengths := kwargs.get("doc_lens")) is None:
            raise ValueError(
                "the batch has no doc_lens, from which weights are made: set generate_doc_lengths=True in "
                "the dataset"
            )
        weights = self.target_weights.of_lengths(lengths.to(input_ids.device))
        kwargs["loss_div_factor"] = self._mean_over_ranks(kwargs["loss_div_factor"])
        z_multiplier = kwargs.pop("z_loss_multiplier", None)
        # The losses of tokens, each divided by loss_div_factor; z-loss apart, because it has no weights
        output = super().model_forward(
            input_ids,
            labels=labels,
            **{**kwargs, "loss_reduction": "none", "return_logits": z_multiplier is not None},
        )
        if output.loss.shape != weights.shape:
            raise ValueError(
                f"instances of {output.loss.shape[-1]} tokens, the exposure table is of rows of "
                f"{weights.shape[-1]}: count one for this window"
            )
        weighted = (output.loss * weights).sum()
        z_loss = None
        if z_multiplier is not None:
            squares = output.logits.float().logsumexp(-1).pow(2) * (labels != kwargs["ignore_index"])
            z_loss = z_multiplier * squares.sum() / kwargs["loss_div_factor"]
        return LMOutputWithLoss(
            logits=None,
            loss=weighted if z_loss is None else weighted + z_loss,
            ce_loss=weighted.detach(),
            z_loss=None if z_loss is None else z_loss.detach(),
        )

    def _mean_over_ranks(self, targets: Tensor) -> Tensor:
        if not is_distributed():
            return targets
        mean = targets.detach().float().clone()
        torch.distributed.all_reduce(mean, group=self.dp_process_group)
        return mean / torch.distributed.get_world_size(self.dp_process_group)
