"""Finished probes, read and matched item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.evaluation.probe.items import ProbeCell
from megatron_exact.evaluation.probe.results import cell_of, read_probe_record, read_results
from megatron_exact.evaluation.result_folders import ResultFolder

MEASURES = ("margin", "margin_ablated", "effect", "correct", "correct_ablated", "answer_effect")
"""In nats the first three, in points the others."""
POINTS = 100
REMEDY = "probe both models with the same options"
Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """One cell of all runs, in one order of items for each pair."""

    baseline: tuple[Values, ...]
    """One array [items, measures] a pair of runs."""
    treatment: tuple[Values, ...]
    """The same items in the same order."""
    is_shared: bool
    """Whether the items are the same in all pairs, too, and in the same order."""

    @property
    def items(self) -> int:
        """Of one run; the mean over the pairs of runs, rounded, where they differ."""
        return round(sum(map(len, self.baseline)) / len(self.baseline))


@dataclass(frozen=True, kw_only=True)
class _CellItems:
    """One cell of one run, sorted by id."""

    hashes: tuple[tuple[str, str], ...]
    """(id, item_sha256)."""
    values: Values
    """[items, measures]."""


def read_probe_folder(path: str | Path) -> ResultFolder:
    """The record of a finished probe as a result folder without suites.

    Raises:
        ValueError: no probe, or one that is not finished.
    """
    path = Path(path)
    info = read_probe_record(path)
    if not info.get("finished"):
        raise ValueError(
            f"the probe in {path} is not finished: run probe_evidence.py again with its options"
        )
    return ResultFolder(path=path, info=info, files={})


def match_probes(
    before: Sequence[ResultFolder], after: Sequence[ResultFolder]
) -> dict[ProbeCell, ProbeScores]:
    """Scores by cell, in order; pair number i is `before[i]` with `after[i]`.

    Raises:
        ValueError: folders with different cells, or a pair with different items or number types; it names
            the first difference.
    """
    first: dict[ProbeCell, _CellItems] = {}
    columns: dict[ProbeCell, list[tuple[Values, Values]]] = {}
    differing: set[ProbeCell] = set()
    for baseline, treatment in zip(before, after, strict=True):
        one, other = (folder.info.get("dtype") for folder in (baseline, treatment))
        if one != other:
            raise ValueError(
                f"{baseline.path} was probed in dtype {one}, {treatment.path} in {other}: {REMEDY}"
            )
        ours, theirs = _read(baseline), _read(treatment)
        for folder, cells in ((baseline, ours), (treatment, theirs)):
            _require_same_cells(before[0], first or ours, folder, cells)
        first = first or ours
        for cell, members in ours.items():
            if members.hashes != theirs[cell].hashes:
                raise ValueError(
                    f"{baseline.path} and {treatment.path} were not asked the same in {cell}: "
                    f"{_difference(members, theirs[cell])}; {REMEDY}"
                )
            if members.hashes != first[cell].hashes:
                differing.add(cell)
            columns.setdefault(cell, []).append((members.values, theirs[cell].values))
    return {
        cell: ProbeScores(
            baseline=tuple(values for values, _ in pairs),
            treatment=tuple(values for _, values in pairs),
            is_shared=cell not in differing,
        )
        for cell, pairs in sorted(columns.items())
    }


def _read(folder: ResultFolder) -> dict[ProbeCell, _CellItems]:
    cells: dict[ProbeCell, list[dict[str, Any]]] = {}
    for kind, number in folder.info["items"]["kinds"].items():
        results = read_results(folder.path, kind)
        if len(results) != number:
            raise ValueError(
                f"{folder.path} has {len(results):,} results of {kind}, its probe.json says {number:,}: "
                "probe the model again"
            )
        for result in results:
            cells.setdefault(cell_of(result), []).append(result)
    return {
        cell: _CellItems(
            hashes=tuple((result["id"], result["item_sha256"]) for result in results),
            values=np.array([_measures(result) for result in results], dtype=np.float64),
        )
        for cell, members in cells.items()
        for results in [sorted(members, key=lambda result: str(result["id"]))]
    }


def _measures(result: dict[str, Any]) -> list[float]:
    margins = [result["margin"], result["margin_ablated"]]
    answers = [POINTS * result["correct"], POINTS * result["correct_ablated"]]
    return [*margins, margins[0] - margins[1], *answers, answers[0] - answers[1]]


def _require_same_cells(
    first: ResultFolder,
    cells: dict[ProbeCell, _CellItems],
    other: ResultFolder,
    others: dict[ProbeCell, _CellItems],
) -> None:
    different = sorted(set(cells) ^ set(others))
    if different:
        has, lacks = (first, other) if different[0] in cells else (other, first)
        raise ValueError(f"{has.path} has the cell {different[0]} and {lacks.path} has not: {REMEDY}")


def _difference(one: _CellItems, other: _CellItems) -> str:
    if len(one.hashes) != len(other.hashes):
        return f"{len(one.hashes):,} and {len(other.hashes):,} items"
    names = next((a, b) for a, b in zip(one.hashes, other.hashes, strict=True) if a != b)
    if names[0][0] != names[1][0]:
        return f"items {names[0][0]!r} and {names[1][0]!r}"
    return f"the prompts or answers of item {names[0][0]!r} differ"
