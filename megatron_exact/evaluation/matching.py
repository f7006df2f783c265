"""The same examples on both sides: what may be compared at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.evaluation.result_folders import Cell, CellExamples, ResultFolder, read_cell

REMEDY = "evaluate both models with the same options"


@dataclass(frozen=True, kw_only=True)
class CellScores:
    """Scores of one cell, matched example by example."""

    cell: Cell
    """Which."""
    baseline: tuple[NDArray[np.float64], ...]
    """One array [examples] a pair of runs, scores 0..1."""
    treatment: tuple[NDArray[np.float64], ...]
    """The same examples in the same order."""
    is_shared: bool
    """Whether the examples are the same in all pairs, too, and in the same order."""

    @property
    def differences(self) -> tuple[NDArray[np.float64], ...]:
        """One array [examples] a pair: treatment minus baseline."""
        return tuple(after - before for before, after in zip(self.baseline, self.treatment, strict=True))


def common_cells(folders: Sequence[ResultFolder]) -> list[Cell]:
    """The cells of all folders, in order.

    Raises:
        ValueError: a cell that one folder has and another has not.
    """
    first, *others = folders
    for other in others:
        for rich, poor in ((first, other), (other, first)):
            missing = [cell for cell in rich.files if cell not in poor.files]
            if missing:
                raise ValueError(
                    f"{poor.path} lacks {len(missing)} of the {len(rich.files)} cells of {rich.path}, the "
                    f"first being {missing[0]}: finish its evaluation, or compare without that suite"
                )
    return list(first.files)


def backend_of(folder: ResultFolder) -> dict[str, Any]:
    """What a folder records of how its suites ran; empty for a folder of an earlier version."""
    backend = folder.info.get("backend")
    return backend if isinstance(backend, dict) and "calls" in backend else {}


def require_same_backend(before: Sequence[ResultFolder], after: Sequence[ResultFolder]) -> None:
    """Refuse pairs that ran on other engines or in other number types, where both sides record it.

    Raises:
        ValueError: names both folders and what differs.
    """
    for one, other in zip(before, after, strict=True):
        ours, theirs = backend_of(one), backend_of(other)
        for name, words in (("name", "on the backend"), ("dtype", "in dtype")):
            if ours and theirs and ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{one.path} was evaluated {words} {ours.get(name)}, {other.path} {words} "
                    f"{theirs.get(name)}: {REMEDY}"
                )


def missing_from_grid(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that no folder has, though their suite has both the task and the length."""
    missing = []
    for suite in sorted({cell.suite for cell in cells}):
        inside = {(cell.task, cell.length) for cell in cells if cell.suite == suite}
        lengths = sorted({length for _, length in inside if length > 0})
        for task in sorted({task for task, length in inside if length > 0}):
            missing += [
                Cell(suite=suite, task=task, length=length)
                for length in lengths
                if (task, length) not in inside
            ]
    return missing


def read_matched(
    cell: Cell, baselines: Sequence[ResultFolder], treatments: Sequence[ResultFolder]
) -> CellScores:
    """Read one cell of all runs; pair number i is `baselines[i]` with `treatments[i]`.

    Raises:
        ValueError: the sides of a pair differ in an id, a prompt or a reference; it names the first one.
    """
    first: CellExamples | None = None
    before: list[NDArray[np.float64]] = []
    after: list[NDArray[np.float64]] = []
    is_shared = True
    for baseline, treatment in zip(baselines, treatments, strict=True):
        ours, theirs = read_cell(baseline, cell), read_cell(treatment, cell)
        difference = first_difference(ours, theirs)
        if difference is not None:
            raise ValueError(
                f"{ours.path} and {theirs.path} are not the same examples: {difference}; {REMEDY}"
            )
        first = first or ours
        order = ours
        if first_difference(first, ours) is None:
            order = first
        else:
            is_shared = False
        before.append(_in_order_of(order, ours))
        after.append(_in_order_of(order, theirs))
    return CellScores(cell=cell, baseline=tuple(before), treatment=tuple(after), is_shared=is_shared)


def first_difference(one: CellExamples, other: CellExamples) -> str | None:
    """What differs between the examples of two files in whatever order, in words; None if nothing."""
    if one is other:
        return None
    if len(one.ids) != len(other.ids):
        return f"{len(one.ids):,} and {len(other.ids):,} examples"
    place = {name: position for position, name in enumerate(other.ids)}
    for position, name in enumerate(one.ids):
        if name not in place:
            return f"id {name!r} is in the first only"
        there = place[name]
        if one.prompts[position] != other.prompts[there]:
            return f"the prompt of id {name!r} differs ({one.prompts[position]} and {other.prompts[there]})"
        if one.references[position] != other.references[there]:
            return f"the references of id {name!r} differ"
    return None


def _in_order_of(order: CellExamples, examples: CellExamples) -> NDArray[np.float64]:
    if order.ids == examples.ids:
        return examples.scores
    place = {name: position for position, name in enumerate(examples.ids)}
    return examples.scores[[place[name] for name in order.ids]]
