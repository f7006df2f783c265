"""What a comparison says about itself in words: how its numbers were made, and what they do not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_exact.evaluation.matching import backend_of, missing_from_grid
from megatron_exact.evaluation.permutation import MOST_EXACT_PAIRS
from megatron_exact.evaluation.provenance import training_record
from megatron_exact.evaluation.regimes import EXTRAPOLATED, TRAINED, Regimes
from megatron_exact.evaluation.result_folders import Cell, ResultFolder
from megatron_exact.evaluation.training_history import trained_window

FEW_EXAMPLES = 30
"""Below, an interval of percentiles is visibly too narrow: by sqrt(1 - 1/n), and more where skewed."""
FEW_PAIRS = 10
NOT_OPTIONS = ("model", "provenance", "backend", "versions")
"""Entries that notes of their own tell of."""
SHOWN = 5


def methods(num_pairs: int, num_aggregates: int, resamples: int) -> dict[str, str]:
    """How intervals and p-values were made, and how many tests the correction covers."""
    level = "examples in each cell, both sides together"
    if num_pairs > 1:
        level = f"the {num_pairs} pairs of runs, then " + level
    exchanges = 1 << num_pairs
    seeds = (
        f"two-sided, all {exchanges:,} exchanges of whole pairs of runs: {2 / exchanges:.3g} at least"
        if 2 <= num_pairs <= MOST_EXACT_PAIRS
        else f"none: it needs 2 to {MOST_EXACT_PAIRS} pairs of runs"
    )
    return {
        "average": "macro average over cells (task x length), points 0..100",
        "ci95": f"percentiles of {resamples:,} bootstrap resamples of {level}; examples count as "
        "independent, each interval stands for itself",
        "p_value": f"two-sided, {resamples:,} random exchanges of the two sides of each example",
        "pair_level_p_value": seeds,
        "p_holm": f"p_value after Holm's correction for the {num_aggregates} aggregates of this comparison",
    }


def comparison_notes(
    cells: Sequence[Cell],
    before: Sequence[ResultFolder],
    after: Sequence[ResultFolder],
    *,
    fewest_examples: int | None,
    is_shared: bool,
) -> list[str]:
    """Warnings that belong beside the numbers, one line each."""
    notes = []
    missing = missing_from_grid(cells)
    if missing:
        notes.append(
            f"{len(missing)} cells were evaluated on neither side, the first being {missing[0]}: "
            "the averages are over an incomplete grid"
        )
    notes += [
        f"{one.path} and {other.path} differ in {difference}"
        for one, other in zip(before, after, strict=True)
        if (difference := difference_of_options(one.info, other.info)) is not None
    ]
    notes += backend_notes(before, after) if cells else []
    notes += [
        f"{one.path} and {other.path} were trained by different {' and '.join(keys)}"
        for one, other in zip(before, after, strict=True)
        if (keys := difference_of_code(one, other))
    ]
    notes += [
        f"{one.path} and {other.path} are the same weights"
        for one, other in zip(before, after, strict=True)
        if one.weights is not None and one.weights == other.weights
    ]
    if len(before) == 1:
        notes.append(
            "one pair of runs: intervals and p-values are about other examples, not other training seeds"
        )
    elif len(before) < FEW_PAIRS:
        notes.append(
            f"{len(before)} pairs of runs: resampling so few makes intervals too narrow for the variation "
            "between seeds; look at pair_deltas as well"
        )
    if not is_shared:
        notes.append(
            "the pairs of runs answered different examples: they are resampled for each pair by itself"
        )
    if fewest_examples is not None and fewest_examples < FEW_EXAMPLES:
        notes.append(
            f"the smallest cell has {fewest_examples} examples: intervals of so few are too narrow"
        )
    return notes


def regime_notes(cells: Sequence[Cell], regimes: Regimes, folders: Sequence[ResultFolder]) -> list[str]:
    """Folders whose record of training contradicts the lengths that the user calls trained or not."""
    notes = []
    for folder in folders:
        window = trained_window(folder.provenance)
        for cell in cells:
            named = regimes.of(cell.suite, cell.length)
            is_within = window is None or cell.length <= window
            if (TRAINED in named and not is_within) or (EXTRAPOLATED in named and window and is_within):
                notes.append(
                    f"{cell.length:,} tokens are given as {named[0]}, but {folder.path} was trained on "
                    f"rows of up to {window:,}"
                )
                break
    return notes


def backend_notes(before: Sequence[ResultFolder], after: Sequence[ResultFolder]) -> list[str]:
    """Sides that ran under other versions, and folders that do not say how they ran."""
    pairs = list(zip(before, after, strict=True))
    unknown = [folder for pair in pairs for folder in pair if not backend_of(folder)]
    notes = [
        f"{folder.path} does not record backend and dtype of its suites: nobody can say whether both sides "
        "ran alike; evaluate it again to be sure"
        for folder in unknown
    ]
    for one, other in pairs:
        ours, theirs = versions_of(one), versions_of(other)
        if one not in unknown and other not in unknown and ours != theirs:
            notes.append(f"{one.path} ran under {ours}, {other.path} under {theirs}")
    return notes


def versions_of(folder: ResultFolder) -> str:
    """Versions of the packages that ran the suites of a folder, each different set once."""
    calls = backend_of(folder).get("calls") or []
    texts = {
        ", ".join(f"{name} {value}" for name, value in sorted((call.get("versions") or {}).items()))
        for call in calls
    }
    return " and ".join(sorted(texts))


def difference_of_code(one: ResultFolder, other: ResultFolder) -> list[str]:
    """Which of `git_commit` and `versions` differ between two trainings; empty where one is unknown."""
    before, after = training_record(one) or {}, training_record(other) or {}
    return [
        key
        for key in ("git_commit", "versions")
        if key in before and key in after and before[key] != after[key]
    ]


def difference_of_options(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Names of the entries of results.json that differ, those of the model itself left out."""
    flat, others = _leaves(one), _leaves(other)
    names = sorted(name for name in flat | others if flat.get(name) != others.get(name))
    if not names:
        return None
    shown = [f"{name} ({flat.get(name)} and {others.get(name)})" for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        found: dict[str, str] = {}
        for name, item in value.items():
            if prefix or name not in NOT_OPTIONS:
                found |= _leaves(item, f"{prefix}.{name}" if prefix else str(name))
        return found
    return {prefix: str(value)}
