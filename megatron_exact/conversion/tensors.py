"""Convert tensors between the two layouts, and find values that no weight should have.

Fusing and splitting are lists of row copies; the same list serves import, export and verification, and a
fused tensor is never built whole. `row_runs` maps rows of each part to rows of the fused tensor, and
callers copy as many at a time as their buffer has room for. With g = query heads a group, D = head_dim:

    linear_qkv   for each group j: rows [j g D, (j+1) g D) of q, rows [j D, (j+1) D) of k, the same of v
    linear_fc1   all rows of gate, then all rows of up
    the others   the one part as it is

`WeightValues` checks weights as they stream past: one NaN makes every loss NaN, hours later on a cluster.
Every block that an import, an export or a verification has in memory anyway is reduced to its smallest and
largest value (`torch.aminmax`, in which a NaN wins), so no byte is read twice: 0.06 CPU seconds a GB of
bfloat16, where `torch.isfinite` takes 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_exact.model.family import TensorName
from megatron_exact.model.shapes import ModelShape

PLAUSIBLE_LARGEST = (1e-8, 1e4)
"""Bounds of the largest magnitude of each tensor of a trained model; our choice.

A flipped bit among the high ones of an exponent multiplies by 2^32 or more, or divides by it.
"""
NUM_NAMED = 3


class WeightValues:
    """Collects what is wrong with the values of each tensor."""

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}
        self._elements: dict[str, int] = {}
        self._not_finite: dict[str, tuple[int, int]] = {}  # NaN, infinite

    def look(self, name: str, values: Tensor) -> None:
        """Add some values of a tensor; every value must be added once."""
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
        """Return `x contains 1 NaN and 2 infinite of 64 values` by tensor, or None if all are finite."""
        named = [
            f"{name} contains {_counted(*counts)} of {self._elements[name]:,} values"
            for name, counts in list(self._not_finite.items())[:NUM_NAMED]
        ]
        more = len(self._not_finite) - len(named)
        return "; ".join(named) + (f"; and {more} more tensors" if more else "") if named else None

    def implausible(self) -> Iterator[str]:
        """Yield a line for each tensor whose magnitude does not look trained."""
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


@dataclass(frozen=True, kw_only=True)
class RowRun:
    """Rows that are contiguous in a part and in the fused tensor."""

    part: int
    """Index into `TensorName.parts`."""
    part_row: int
    """First row in the part."""
    row: int
    """First row in the fused tensor."""
    rows: int
    """Number of rows."""


def row_runs(name: TensorName, shape: ModelShape) -> tuple[RowRun, ...]:
    """Return all runs of one layer of a tensor, in the order of the fused rows."""
    sections = []  # number of the part, first row in it, rows
    for number, part in enumerate(name.parts):
        first = 0
        for length in part.sections or part.lengths[:1]:
            sections.append((number, first, length))
            first += length
    groups = shape.num_query_groups if name.fusion == "by_group" else 1
    runs = []
    row = 0
    for group in range(groups):
        for number, first, length in sections:
            rows = length // groups
            runs.append(RowRun(part=number, part_row=first + group * rows, row=row, rows=rows))
            row += rows
    return tuple(runs)


def runs_of_rows(runs: Sequence[RowRun], start: int, stop: int) -> Iterator[RowRun]:
    """Yield the runs inside rows [start, stop) of the fused tensor, cut at both ends."""
    for run in runs:
        low, high = max(start, run.row), min(stop, run.row + run.rows)
        if low < high:
            yield RowRun(part=run.part, part_row=run.part_row + low - run.row, row=low, rows=high - low)


def runs_of_part(runs: Sequence[RowRun], part: int, start: int, stop: int) -> Iterator[RowRun]:
    """Yield the runs inside rows [start, stop) of one part, cut at both ends."""
    for run in runs:
        low, high = max(start, run.part_row), min(stop, run.part_row + run.rows)
        if run.part == part and low < high:
            yield RowRun(part=part, part_row=low, row=run.row + low - run.part_row, rows=high - low)


def as_tensor(data: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """Return bytes as a flat tensor that shares their memory."""
    return torch.frombuffer(data, dtype=dtype) if data.size else torch.empty(0, dtype=dtype)
