"""Numbers of `results.json` by arm, and the words that an interval deserves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_exact.miniature.losses import student_interval
from megatron_exact.miniature.settings import FAR, NEARBY

Entry = dict[str, Any]


def arms_of(results: Entry, design: str) -> dict[str, Entry]:
    """Arms of a design by name, without the one that they are compared with."""
    return {arm["name"]: arm for arm in results["designs"][design]["arms"]}


def over_range(arm: Entry, span: tuple[int, int]) -> Entry:
    """Measures of an arm's probe over a range of distances."""
    found: Entry = next(entry for entry in arm["probe"]["ranges"] if tuple(entry["distances"]) == span)
    return found


def far(arm: Entry) -> Entry:
    """Measures at distances that the base model was not trained on."""
    return over_range(arm, FAR)


def nearby(arm: Entry) -> Entry:
    """Measures at distances that the base model knows."""
    return over_range(arm, NEARBY)


def signed(measure: Entry, decimals: int = 2) -> str:
    """`+1.23 [+0.80, +1.66]`, the difference with its interval."""
    interval = measure.get("ci95") or measure.get("interval")
    text = f"{measure['delta']:+.{decimals}f}"
    return (
        text if interval is None else f"{text} [{interval[0]:+.{decimals}f}, {interval[1]:+.{decimals}f}]"
    )


def direction(measure: Entry) -> int:
    """1 or -1 where all intervals lie above or below 0, 0 where one of them holds it.

    A bootstrap over few seeds gives intervals that are too narrow, so Student's t over the seeds has to
    agree with it.
    """
    over_seeds = student_interval(np.array(measure.get("pair_deltas", ())))
    intervals = [measure.get("ci95") or measure["interval"], *([over_seeds] if over_seeds else [])]
    if all(low > 0 for low, _ in intervals):
        return 1
    return -1 if all(high < 0 for _, high in intervals) else 0


def over_seeds(deltas: Sequence[float]) -> Entry:
    """Mean of one difference a seed, with Student's 95 % interval."""
    values = np.array(deltas, dtype=np.float64)
    return {"delta": float(values.mean()), "interval": student_interval(values)}


def between_arms(before: Entry, after: Entry) -> Entry:
    """Difference of two arms in a measure, seed by seed, with Student's 95 % interval.

    Args:
        before: a measure against standard.
        after: the same measure of another arm against the same standard.
    """
    pairs = zip(before["pair_deltas"], after["pair_deltas"], strict=True)
    return over_seeds([other - one for one, other in pairs])


def verdict(measure: Entry) -> str:
    """What the interval says of the compared arm."""
    words = {1: "above standard", -1: "below standard", 0: "not told apart from standard"}
    return words[direction(measure)]


def weighted_shares(shares: list[float], weights: list[float]) -> list[float]:
    """Shares after weighting, sum 1."""
    masses = [share * weight for share, weight in zip(shares, weights, strict=True)]
    return [mass / sum(masses) for mass in masses]
