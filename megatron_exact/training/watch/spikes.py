"""Loss spikes: iterations whose loss stands out from those before it. They are told, never acted upon.

The rule: the unweighted mean loss exceeds the median of the last `window` iterations by more than
`deviations` times their median absolute deviation, scaled by 1.4826 (so that it is a standard deviation
for Gaussian noise), and at least a thousandth of the median. Half a window must be there. A run that
resumes fills its window from `losses.jsonl`, so it finds the spikes that the unbroken run finds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

GAUSSIAN = 1.4826
"""Standard deviation of a Gaussian over its median absolute deviation."""
SMALLEST_SHARE = 1e-3
"""Of the median: what no deviation falls below, so that a still loss has no spikes of noise."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """One iteration that stands out."""

    loss: float
    """Unweighted mean loss, nats."""
    median: float
    """Of the window before it, nats."""
    deviation: float
    """The robust standard deviation that it was measured by, nats."""

    def __str__(self) -> str:
        return f"{self.loss:.4f} after a median of {self.median:.4f} (deviation {self.deviation:.4f})"


class SpikeDetector:
    """The rule, applied iteration by iteration.

    Args:
        deviations: how far above the median a spike begins; 0 finds none.
        window: iterations that are looked back upon.
        losses: of the iterations before the first, oldest first; None where a loss was not finite.
    """

    def __init__(self, deviations: float, window: int, losses: Iterable[float | None] = ()) -> None:
        self.deviations = deviations
        self.window = window
        self._recent = deque((loss for loss in losses if loss is not None), maxlen=window)

    def add(self, loss: float) -> Spike | None:
        """Judge a loss by those before it, then remember it; one that is not finite is left out."""
        if not self.deviations or not math.isfinite(loss):
            return None
        spike = self._judge(loss) if 2 * len(self._recent) >= self.window else None
        self._recent.append(loss)
        return spike

    def _judge(self, loss: float) -> Spike | None:
        middle = median(self._recent)
        spread = GAUSSIAN * median(abs(value - middle) for value in self._recent)
        deviation = max(spread, SMALLEST_SHARE * abs(middle))
        if loss <= middle + self.deviations * deviation:
            return None
        return Spike(loss=loss, median=middle, deviation=deviation)
