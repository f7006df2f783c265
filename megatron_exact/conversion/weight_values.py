"""A look at weights as they stream past: values that are not finite, magnitudes that no training leaves.

One NaN makes every loss NaN, hours later on a cluster. Every block that an import, an export or a
verification has in memory anyway is reduced to its smallest and largest value (`torch.aminmax`, in which a
NaN wins), so no byte is read twice: 0.06 CPU seconds a GB of bfloat16, where `torch.isfinite` takes 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PLAUSIBLE_LARGEST = (1e-8, 1e4)
"""Between these lies the largest magnitude of every tensor of a trained model; our choice.

A flipped bit among the high ones of an exponent multiplies by 2^32 or more, or divides by it.
"""
NUM_NAMED = 3


class WeightValues:
    """Collects by tensor what is wrong with its values."""

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}
        self._elements: dict[str, int] = {}
        self._not_finite: dict[str, tuple[int, int]] = {}  # NaN, infinite

    def look(self, name: str, values: Tensor) -> None:
        """Take some values of a tensor into account; every value once."""
        low, high = (float(edge) for edge in torch.aminmax(values))
        largest = max(-low, high)
        self._elements[name] = self._elements.get(name, 0) + values.numel()
        if math.isfinite(low) and math.isfinite(high):
            self._largest[name] = max(largest, self._largest.get(name, 0.0))
            return
        nan, infinite = self._not_finite.get(name, (0, 0))
        self._not_finite[name] = (
            nan + int(torch.isnan(values).sum()),
            infinite + int(torch.isinf(values).sum()),
        )

    def not_finite(self) -> str | None:
        """Tensors, counts: `x holds 1 NaN and 2 infinite of 64 values`; None if all values are finite."""
        named = [
            f"{name} holds {_counted(*counts)} of {self._elements[name]:,} values"
            for name, counts in list(self._not_finite.items())[:NUM_NAMED]
        ]
        more = len(self._not_finite) - len(named)
        return "; ".join(named) + (f"; and {more} more tensors" if more else "") if named else None

    def implausible(self) -> Iterator[str]:
        """A line for each tensor whose magnitude no training leaves."""
        low, high = PLAUSIBLE_LARGEST
        for name, largest in self._largest.items():
            if largest > high:
                yield f"{name} has values up to {largest:.3g}, more than {high:g}: is the file whole?"
            elif largest < low and not name.endswith(".bias"):  # many models have biases of 0
                found = "only zeros" if largest == 0 else f"no value above {largest:.3g}"
                yield f"{name} has {found}: was it ever trained?"


def _counted(nan: int, infinite: int) -> str:
    parts = ((nan, "NaN"), (infinite, "infinite"))
    return " and ".join(f"{count:,} {kind}" for count, kind in parts if count)
