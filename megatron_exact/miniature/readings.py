"""Numbers of `results.json` by arm, and the words that an interval deserves."""

from __future__ import annotations

from typing import Any

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
    """1 or -1 where the interval lies above or below 0, 0 where it holds it."""
    low, high = measure.get("ci95") or measure["interval"]
    return 1 if low > 0 else -1 if high < 0 else 0


def verdict(measure: Entry) -> str:
    """What the interval says of the compared arm."""
    words = {1: "above standard", -1: "below standard", 0: "not told apart from standard"}
    return words[direction(measure)]


def weighted_shares(shares: list[float], weights: list[float]) -> list[float]:
    """Shares after weighting, sum 1."""
    masses = [share * weight for share, weight in zip(shares, weights, strict=True)]
    return [mass / sum(masses) for mass in masses]
