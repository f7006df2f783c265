"""Numbers of `results.json` by arm, and the words that an interval deserves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_exact.miniature.losses import student_interval
from megatron_exact.miniature.settings import FAR, NEARBY, PAPER_ALPHA

Entry = dict[str, Any]
DOUBT = "?"
"""Behind a difference that is not told apart from 0."""
CAUTION = f'"{DOUBT}": not told apart from standard: the bootstrap or Student\'s t holds 0'
"""Below tables of such differences."""


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


def marked(measure: Entry, decimals: int = 2) -> str:
    """`signed`, with the mark `DOUBT` where the difference is not told apart from 0."""
    return signed(measure, decimals) + ("" if direction(measure) else f" {DOUBT}")


def row_title(arm: Entry) -> str:
    """An arm's title; alphas that are not the paper's are called exaggerated."""
    is_exaggerated = arm["alpha"] is not None and arm["alpha"] > PAPER_ALPHA
    return f"{arm['title']} (exaggerated)" if is_exaggerated else str(arm["title"])


def intervals_of(measure: Entry) -> list[list[float]]:
    """The interval of the measure and, where there are several seeds, Student's over them."""
    over_seeds = student_interval(np.array(measure.get("pair_deltas", ())))
    return [measure.get("ci95") or measure["interval"], *([over_seeds] if over_seeds else [])]


def hull(measure: Entry) -> tuple[float, float]:
    """Lowest and highest end of all intervals; 0 lies between them exactly where `direction` is 0."""
    intervals = intervals_of(measure)
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def direction(measure: Entry) -> int:
    """1 or -1 where all intervals lie above or below 0, 0 where one of them holds it.

    A bootstrap over few seeds gives intervals that are too narrow, so Student's t over the seeds has to
    agree with it.
    """
    intervals = intervals_of(measure)
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


def thousandths(entry: Entry) -> Entry:
    """A difference of losses in thousandths of a nat, with its interval; has no values by seed."""
    interval = entry["interval"]
    return {
        "delta": 1000 * entry["delta"],
        "interval": None if interval is None else [1000 * end for end in interval],
    }


def cells(arm: Entry) -> list[str]:
    """An arm's row of a table against standard: name, far margin, effect and answers, near margin, loss."""
    return [
        row_title(arm),
        marked(far(arm)["margin"]),
        marked(far(arm)["effect"]),
        marked(far(arm)["correct"], 1),
        marked(nearby(arm)["margin"]),
        marked(thousandths(arm["losses"]["all"]), 1),
    ]
