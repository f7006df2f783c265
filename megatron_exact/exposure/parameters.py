"""Parameters of the weighting rules, all in one record; each rule says which of them it reads."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_exact.exposure.confidence import ConfidenceParameters
from megatron_exact.exposure.weights import DEFAULT_ALPHA, DEFAULT_GAMMA


@dataclass(frozen=True, kw_only=True)
class RuleParameters:
    """What a user may choose about a rule."""

    alpha: float = DEFAULT_ALPHA
    """EXACT: mean extra weight of the tail, >= 0."""
    gamma: float = DEFAULT_GAMMA
    """EXACT: exponent of inverse frequency in the tail, >= 0."""
    tau: float | None = None
    """EXACT: first effective context of the tail, tokens; None means a quarter of the row."""
    cap: float | None = None
    """EXACT: largest weight that the formula may give, >= 1; None means no cap (the paper has none)."""
    bucket_weights: tuple[tuple[int, float], ...] = ()
    """EXACT: (lower edge, weight) of buckets whose weight is set by hand, after the cap."""
    confidence_lambda: float = ConfidenceParameters.lam
    """Confidence rules: `ConfidenceParameters.lam`."""
    confidence_kappa: float | None = ConfidenceParameters.kappa
    """Confidence rules: `ConfidenceParameters.kappa`."""
    confidence_cap: float = ConfidenceParameters.cap
    """Confidence rules: `ConfidenceParameters.cap`."""
    confidence_s: float = ConfidenceParameters.s
    """Confidence rules: `ConfidenceParameters.s`."""
    short_window: int | None = None
    """Confidence rules: tokens of a short window; None means `default_windows`."""
    short_stride: int | None = None
    """Confidence rules: tokens from one short window to the next; None means `default_windows`."""

    def of(self, names: tuple[str, ...]) -> dict[str, float]:
        """The named parameters as run.json records them: numbers alone, nothing that was not chosen.

        A weight set by hand is recorded as `weight_from_<lower edge>`.
        """
        found: dict[str, float] = {}
        for name in names:
            value = getattr(self, name)
            if name == "bucket_weights":
                found |= {f"weight_from_{lower}": float(weight) for lower, weight in value}
            elif value is not None:
                found[name] = value
        return found
