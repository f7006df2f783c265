"""EXACT as a torchtitan loss: put it into a `Trainer.Config` in place of `CrossEntropyLoss`.

torchtitan divides the sum of losses by the valid tokens of the global batch, as Megatron does, and passes
the positions of each batch to the loss. Its text loader shifts labels inside each document
(`labels="document"`, the default here). Validation is not weighted. Checked with torchtitan 0.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, compute_logprobs

from megatron_exact.exposure import DEFAULT_ALPHA, DEFAULT_GAMMA
from megatron_exact.integrations.exposure_table import Labels
from megatron_exact.integrations.target_weights import TargetWeights


class ExactCrossEntropyLoss(BaseLoss):  # type: ignore[misc]
    """Sum of weighted cross-entropies over the global number of valid tokens.

    Raises:
        ValueError: at its start, a table or rule that `TargetWeights` does not accept, or
            `exact-normalized`; in training, a batch without positions (also under pipeline parallelism,
            where torchtitan passes none to the loss).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        exposure_table: str
        """Path of the exposure table of the training data."""
        rule: str = "exact"
        """Weighting rule."""
        alpha: float = DEFAULT_ALPHA
        """Mean extra weight of the tail."""
        gamma: float = DEFAULT_GAMMA
        """Exponent of inverse frequency in the tail."""
        tau: float | None = None
        """First effective context of the tail, tokens; None means a quarter of the row."""
        labels: Labels = "document"
        """Which token the target of an input is, see `exposure_table.Labels`."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.target_weights = TargetWeights(
            config.exposure_table,
            config.rule,
            labels=config.labels,
            alpha=config.alpha,
            gamma=config.gamma,
            tau=config.tau,
        )
        if self.target_weights.divides_by_mass:
            raise ValueError(
                f"{config.rule} divides by the sum of weights, and torchtitan divides by the number of "
                "valid tokens: use exact, of which it is a near twin"
            )
        self.fn = compute_logprobs
        self._maybe_compile(compile_config)

    def weigh(self, positions: Tensor | None) -> Tensor:
        """Return the weights [b, S] of a batch."""
        if positions is None:
            raise ValueError(
                "the loss was given no positions: weights need the position of each token inside its "
                "document; pipeline parallelism is not supported"
            )
        return self.target_weights(positions)

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        target_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and no metrics.

        Args:
            pred: logits [b, S, vocabulary].
            labels: int64 [b, S], -100 where unsupervised.
            global_valid_tokens: valid labels of the global batch; None returns the sum.
            positions: int64 [b, S], from 0 in each document.
            target_weights: float32 [b, S], in place of positions.
            kwargs: ignored.
        """
        losses = -self.fn(pred, labels)
        if torch.is_grad_enabled():
            losses = losses * (self.weigh(positions) if target_weights is None else target_weights)
        loss = losses.sum()
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


class ExactChunkedLoss(ChunkedLossWrapper):  # type: ignore[misc]
    """torchtitan's `ChunkedLossWrapper`, which never builds the logits of a whole row, with weights.

    The weights are those of whole rows; chunks of positions would not say where a document ends.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):  # type: ignore[misc]
        loss_fn: ExactCrossEntropyLoss.Config = field()

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics, as `ExactCrossEntropyLoss` from the hidden states `pred`."""
        if pred.requires_grad:
            loss_inputs["target_weights"] = self.loss_fn.weigh(positions)
        loss, metrics = super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
        return loss, metrics
