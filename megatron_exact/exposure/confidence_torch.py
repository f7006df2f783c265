"""The formulas of `confidence.py` for the rows of a micro-batch, on the device of the training step.

They stand apart from `confidence.py` because the rest of this folder works without torch. Nothing is read
back to the host, so a step does not wait for them. float64, as in `confidence.py`;
`tests/unit/exposure/test_confidence.py` compares the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_exact.exposure.confidence import DEFAULT_SPARSE_KAPPA, ConfidenceParameters


def confidence_weights_of_rows(
    rule: str, differences: Tensor, supervised: Tensor, parameters: ConfidenceParameters
) -> Tensor:
    """Compute the weights of the targets of several rows.

    Args:
        rule: a name in CONFIDENCE_RULES.
        differences: floats [b, S], `CE_long - CE_short` in nats; read where supervised.
        supervised: booleans [b, S].
        parameters: of the rule.

    Returns:
        float64 [b, S], >= 0, and 1 where unsupervised; NaN in a row that has a supervised score of NaN, so
        that the step stops as not finite.
    """
    d = torch.where(supervised, differences.double(), 0.0)
    beyond = -d if rule.startswith("ppmi") else d
    if rule == "dense":
        weights = parameters.lam + (1 - parameters.lam) * _mean_one(d.abs(), supervised)
    elif rule == "sparse":
        kappa = DEFAULT_SPARSE_KAPPA if parameters.kappa is None else parameters.kappa
        weights = _mean_one(_top_share(d.abs(), supervised, kappa), supervised)
    elif rule == "longce":
        weights = (-d).clamp(max=math.log(parameters.cap)).exp()
    else:
        assert rule in ("ppmi", "npmi", "ppmi-values", "npmi-values"), rule
        values = torch.where(supervised, (beyond - math.log(parameters.s)).clamp(min=0), 0.0)
        if parameters.kappa is not None:
            share = _top_share(values, supervised, parameters.kappa)
            # a row of zeros stays one: all its weights are 1
            values = values * share if rule.endswith("-values") else share * values.any(dim=1, keepdim=True)
        weights = _mean_one(values, supervised)
    weights = torch.where(supervised, weights, 1.0)
    return torch.where(d.isfinite().all(dim=1, keepdim=True), weights, torch.nan)


def _top_share(values: Tensor, mask: Tensor, kappa: float) -> Tensor:
    targets = mask.sum(dim=1, keepdim=True)
    kept = (kappa * targets.double()).floor().long().clamp(min=1)  # .double(): float times int is float32
    ranked = torch.where(mask, values, -1.0).sort(dim=1, descending=True).values
    edge = ranked.gather(1, kept - 1)
    above, ties = mask & (values > edge), mask & (values == edge)
    room = kept - above.sum(dim=1, keepdim=True)
    share = room.double() / ties.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(ties, share, above.double())


def _mean_one(values: Tensor, mask: Tensor) -> Tensor:
    total = torch.where(mask, values, 0.0).sum(dim=1, keepdim=True)
    targets = mask.sum(dim=1, keepdim=True)
    return torch.where(total > 0, values / total * targets, 1.0)
