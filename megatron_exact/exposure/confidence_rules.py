"""The confidence rules (`confidence.py`) as rows of the table of rules.

With stored scores (*frozen*) the dataset weighs a row as for any other rule. Without them (*unfrozen*) the
scores are those of the model in training, which only the training step knows (`training/short_scores.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_exact.exposure.confidence import CONFIDENCE_RULES, ConfidenceParameters, confidence_weights
from megatron_exact.exposure.parameters import RuleParameters
from megatron_exact.exposure.row_targets import RowTargets
from megatron_exact.exposure.row_weights import RowWeights
from megatron_exact.exposure.short_windows import ShortWindows, default_windows
from megatron_exact.exposure.split_targets import SplitTargets


@dataclass(frozen=True, kw_only=True)
class ConfidenceWeights(RowWeights):
    """Weights from the scores of a row."""

    by = "confidence"
    rule: str
    """A name in CONFIDENCE_RULES."""
    parameters: ConfidenceParameters
    """Of the rule."""
    windows: ShortWindows
    """The short context."""
    in_step: bool
    """Whether the model in training scores, not files."""

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        weights = confidence_weights(self.rule, row.scores.difference, row.supervised, self.parameters)
        return weights.astype(np.float32)


def confidence_rule(rule: str) -> Callable[[SplitTargets, RuleParameters], ConfidenceWeights]:
    """The function of a row of RULES."""

    def weigh(split: SplitTargets, parameters: RuleParameters) -> ConfidenceWeights:
        return ConfidenceWeights(
            rule=rule,
            parameters=ConfidenceParameters(
                lam=parameters.confidence_lambda,
                kappa=parameters.confidence_kappa,
                cap=parameters.confidence_cap,
                s=parameters.confidence_s,
            ),
            windows=default_windows(
                split.row_tokens, window=parameters.short_window, stride=parameters.short_stride
            ),
            in_step=not split.has_scores,
        )

    return weigh


def parameters_of(rule: str) -> tuple[str, ...]:
    """Fields of RuleParameters that a confidence rule reads."""
    own = {"lam": "lambda"}
    names = (f"confidence_{own.get(name, name)}" for name in CONFIDENCE_RULES[rule].parameters)
    return (*names, "short_window", "short_stride")
