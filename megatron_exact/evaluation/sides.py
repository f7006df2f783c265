"""The two sides of a comparison: folders that pair in order, and what is known of their trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.provenance import check_training_pair, training_record
from megatron_exact.evaluation.result_folders import ResultFolder, read_result_folder
from megatron_exact.lineage import compares_whole_configuration

PAIRED = "training verified as paired"
NOT_PAIRED = "training not verifiably paired"


def read_sides(
    baselines: Sequence[str | Path],
    treatments: Sequence[str | Path],
    read: Callable[[str | Path], ResultFolder] = read_result_folder,
) -> tuple[list[ResultFolder], list[ResultFolder]]:
    """Read the folders of both sides.

    Args:
        baselines: of one side, one a seed.
        treatments: of the other, as many.
        read: reads one folder.

    Raises:
        ValueError: not as many on each side, or a model twice on one side.
    """
    if len(baselines) != len(treatments) or not baselines:
        raise ValueError(
            f"{len(baselines)} baseline and {len(treatments)} treatment runs: runs pair in order, "
            "give as many on each side"
        )
    for side in (baselines, treatments):
        places = [Path(path).resolve() for path in side]
        twice = next(
            (path for path, place in zip(side, places, strict=True) if places.count(place) > 1), None
        )
        if twice is not None:
            raise ValueError(f"{twice} is given twice on one side: several runs are several seeds")
    before, after = [[read(path) for path in side] for side in (baselines, treatments)]
    for folders in (before, after):
        for one, other in combinations(folders, 2):
            if one.weights is not None and one.weights == other.weights:
                raise ValueError(
                    f"{one.path} and {other.path} are the same weights: several runs on one side are "
                    "several seeds, give each model once"
                )
    return before, after


def pairing(before: Sequence[ResultFolder], after: Sequence[ResultFolder]) -> dict[str, Any]:
    """Whether all pairs of trainings are verified as paired, and the statement that says so.

    Raises:
        ValueError: both sides of a pair carry a record and the records disagree.
    """
    reasons = [
        reason
        for one, other in zip(before, after, strict=True)
        if (reason := check_training_pair(one, other)) is not None
    ]
    if reasons:
        return {"verified": False, "statement": f"{NOT_PAIRED}: {'; '.join(reasons)}"}
    records = [
        (training_record(one), training_record(other)) for one, other in zip(before, after, strict=True)
    ]
    agree = "pack, start checkpoint, seed and configuration agree"
    if not all(one and other and compares_whole_configuration(one, other) for one, other in records):
        agree = (
            "pack, start checkpoint, seed, schedule and layout agree; a record of an earlier version names "
            "no other flags"
        )
    return {"verified": True, "statement": f"{PAIRED}: {agree}"}
