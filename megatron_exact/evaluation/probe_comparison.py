"""Probes of two sides, item by item: means, differences and their intervals.

Measures are averaged over the items of a cell (kind, distance, context), then over cells with equal
weights. Intervals are those of `statistics`, over units and the pairs of runs (seeds). Items with the same
form (wording) are one unit in all cells of their kind: they vary between forms, and within them between
items, and the spread of the forms' means has both. An item without a form is a unit of its cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation import statistics
from megatron_exact.evaluation.engine import AUTO
from megatron_exact.evaluation.pairing import CellScores, match_examples, pairing, read_sides
from megatron_exact.evaluation.result_folders import (
    PROBE,
    CellExamples,
    ProbeCell,
    ResultFolder,
    cell_of,
    read_probe_folder,
    read_probe_results,
)
from megatron_exact.evaluation.statistics import CELLS, Sampling, Units

MEASURES = ("margin", "margin_ablated", "effect", "correct", "correct_ablated", "answer_effect")
"""Measures of an item; the first three are in nats, the others in points."""
POINTS = 100
REMEDY = "probe both models with the same options"
FORMS, ITEMS = "sentence forms", "items"
"""What the units of a probe are: forms where several items share one, else items."""
Values = NDArray[np.float64]


def match_probes(
    before: Sequence[ResultFolder], after: Sequence[ResultFolder]
) -> dict[ProbeCell, CellScores]:
    """Return the measures by cell, in order; pair number i is `before[i]` with `after[i]`.

    Raises:
        ValueError: folders with different cells, or a pair with different items or dtypes; it names the
            first difference.
    """
    for one, other in zip(before, after, strict=True):
        ours, theirs = one.info.get("dtype"), other.info.get("dtype")
        if ours != theirs:
            raise ValueError(f"{one.path} was probed in dtype {ours}, {other.path} in {theirs}: {REMEDY}")
    sides = [[_read(folder) for folder in side] for side in (before, after)]
    cells = sides[0][0]
    for folder, others in zip([*before, *after], [*sides[0], *sides[1]], strict=True):
        different = sorted(set(cells) ^ set(others))
        if different:
            has, lacks = (before[0], folder) if different[0] in cells else (folder, before[0])
            raise ValueError(f"{has.path} has the cell {different[0]} and {lacks.path} does not: {REMEDY}")
    return {
        cell: match_examples(
            [(ours[cell], theirs[cell]) for ours, theirs in zip(*sides, strict=True)],
            what=f"items of {cell}",
            remedy=REMEDY,
        )
        for cell in sorted(cells)
    }


def _read(folder: ResultFolder) -> dict[ProbeCell, CellExamples]:
    """Read the items of a folder by cell, sorted by id; equal `item_sha256` mean the same item."""
    cells: dict[ProbeCell, list[dict[str, Any]]] = {}
    for kind, number in folder.info["items"]["kinds"].items():
        results = read_probe_results(folder.path, kind)
        if len(results) != number:
            raise ValueError(
                f"{folder.path} has {len(results):,} results of {kind}, its probe.json says {number:,}: "
                "probe the model again"
            )
        for result in sorted(results, key=lambda result: str(result["id"])):
            cells.setdefault(cell_of(result), []).append(result)
    return {
        cell: CellExamples(
            path=folder.path,
            ids=[result["id"] for result in results],
            prompts=[result["item_sha256"] for result in results],
            references=[None] * len(results),
            scores=np.array([_measures(result) for result in results], dtype=np.float64),
            units=[str(result.get("form") or result["id"]) for result in results],
        )
        for cell, results in cells.items()
    }


def _measures(result: dict[str, Any]) -> list[float]:
    margins = [result["margin"], result["margin_ablated"]]
    answers = [POINTS * result["correct"], POINTS * result["correct_ablated"]]
    return [*margins, margins[0] - margins[1], *answers, answers[0] - answers[1]]


@dataclass(kw_only=True)
class ProbeAverage:
    """Mean over cells with equal weights."""

    cells: int = 0
    """Number of cells."""
    items: int = 0
    """Items of one run in all cells."""
    baseline: Any = 0.0
    """[pairs, measures], sum of the cells' means; `treatment` and `resampled` are sums too."""
    treatment: Any = 0.0
    """[pairs, measures]."""
    units: list[tuple[Units, ...]] = field(default_factory=list)
    """Differences in each measure, for each cell."""
    resampled: Any = 0.0
    """[resamples, pairs, measures], of differences; made for `Sampling.kind` cells."""
    has_forms: bool = False
    """Whether several items of a cell have the same sentence form."""

    def add(self, scores: CellScores, units: tuple[Units, ...], resampled: Values | float) -> None:
        """Add a cell."""
        self.units.append(units)
        self.has_forms = self.has_forms or scores.has_larger_units
        self.cells += 1
        self.items += scores.examples
        self.baseline = self.baseline + np.array([values.mean(axis=0) for values in scores.baseline])
        self.treatment = self.treatment + np.array([values.mean(axis=0) for values in scores.treatment])
        self.resampled = self.resampled + resampled

    def estimate(self, sampling: Sampling) -> dict[str, Any]:
        """Return means and differences with intervals."""
        baseline, treatment = self.baseline / self.cells, self.treatment / self.cells
        measures = {}
        for column, name in enumerate(MEASURES):
            before, after = baseline[:, column], treatment[:, column]
            measures[name] = {
                "baseline": float(before.mean()),
                "treatment": float(after.mean()),
                "delta": float(after.mean() - before.mean()),
                **self._interval(column, sampling),
                "pair_deltas": (after - before).tolist(),
            }
        return {"cells": self.cells, "items": self.items, "measures": measures}

    def _interval(self, column: int, sampling: Sampling) -> dict[str, Any]:
        if sampling.kind == CELLS:
            draws = statistics.mean_over_pairs(self.resampled[:, :, column] / self.cells, sampling)
            return {"ci95": list(statistics.percentiles(draws))}
        return statistics.interval_record(self.as_units(column), 1.0)

    def as_units(self, column: int) -> Units:
        """Return the average of a measure as a sum over forms, or items without one."""
        cells = [(1.0, units[column]) for units in self.units]
        names = [name for _, units in cells for name in units.names]
        has_shared = len(set(names)) < len(names)  # forms; the ids of items are unique in their kind
        joined = statistics.average_units(cells, across_cells=has_shared)
        return replace(joined, kind=FORMS if has_shared or self.has_forms else ITEMS)


def compare_probes(
    baselines: Sequence[str | Path],
    treatments: Sequence[str | Path],
    *,
    sampling: Sampling | None = None,
    ranges: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """Compare probed models that pair in order: the first baseline with the first treatment, and so on.

    Args:
        baselines: result folders of one side, one for each seed.
        treatments: result folders of the other side, as many.
        sampling: resamples and seed.
        ranges: (shortest, longest) distances that get an average of their own, beside all distances.

    Returns:
        `pairing`, `items_shared`, `cells`, `distances`, `kinds`, `methods`; see docs/evaluation.md.

    Raises:
        ValueError: probes that are unfinished, of different items, or of trainings that are not a pair.
    """
    sampling = sampling or Sampling()
    before, after = read_sides(baselines, treatments, read_probe_folder)
    return {"pairing": pairing(before, after), **compare_folders(before, after, sampling, ranges)}


def compare_folders(
    before: Sequence[ResultFolder],
    after: Sequence[ResultFolder],
    sampling: Sampling,
    ranges: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """Compare folders that have been read; `compare_probes` without `pairing`."""
    matched = match_probes(before, after)
    for low, high in ranges:
        if not any(low <= cell.distance <= high for cell in matched):
            raise ValueError(f"the probe has no distance from {low:,} to {high:,} tokens")
    groups: dict[tuple[Any, ...], ProbeAverage] = {}
    cells = []
    with progress_bar("compare probes", len(matched), "cell") as bar:
        for cell, scores in matched.items():
            units = _units(scores)
            resampled = _resampled(cell, scores, sampling) if sampling.kind == CELLS else 0.0
            alone = ProbeAverage()
            for average in [
                alone,
                *(groups.setdefault(key, ProbeAverage()) for key in _keys(cell, ranges)),
            ]:
                average.add(scores, units, resampled)
            entry = {"kind": cell.kind, "distance": cell.distance, "context": cell.context}
            cells.append({**entry, **alone.estimate(sampling)})
            del cells[-1]["cells"]
            bar.update()
    return {
        "items_shared": all(scores.is_shared for scores in matched.values()),
        "cells": cells,
        "distances": [
            {"kind": key[1], "distance": key[2], **groups[key].estimate(sampling)}
            for key in sorted(key for key in groups if key[0] == "distance")
        ],
        "kinds": [
            {
                "kind": kind,
                "distances": list(span or _span(matched, kind)),
                **groups[key].estimate(sampling),
            }
            for kind in sorted({cell.kind for cell in matched})
            for span in (None, *dict.fromkeys(ranges))
            if (key := ("kind", kind, span)) in groups
        ],
        "methods": _methods(len(before), sampling),
    }


def units_by_kind(
    baselines: Sequence[str | Path], treatments: Sequence[str | Path], *, ranges: Sequence[tuple[int, int]]
) -> dict[tuple[str, tuple[int, int], str], Units]:
    """Return the units of the probe's averages by kind, range of distances and measure.

    Raises:
        ValueError: probes that do not fit each other.
    """
    before, after = read_sides(baselines, treatments, read_probe_folder)
    groups: dict[tuple[str, tuple[int, int]], ProbeAverage] = {}
    for cell, scores in match_probes(before, after).items():
        units = _units(scores)
        for low, high in dict.fromkeys(ranges):
            if low <= cell.distance <= high:
                groups.setdefault((cell.kind, (low, high)), ProbeAverage()).add(scores, units, 0.0)
    return {
        (kind, span, name): average.as_units(column)
        for (kind, span), average in groups.items()
        for column, name in enumerate(MEASURES)
    }


def _methods(num_pairs: int, sampling: Sampling) -> dict[str, str]:
    """Describe how the numbers were made."""
    return {
        "measures": "margin, margin_ablated and effect in nats; correct, correct_ablated and answer_effect "
        "in points 0..100; effects are with minus without the evidence",
        "average": "over the items of a cell (kind, distance, context), then over cells, equal weights",
        **statistics.interval_methods(
            num_pairs, sampling, "sentence form (an item without one by itself)", units="sentence forms"
        ),
    }


def compare_probes_within(
    before: Sequence[ResultFolder],
    after: Sequence[ResultFolder],
    sampling: Sampling,
    ranges: Sequence[tuple[int, int]],
) -> tuple[dict[str, Any] | None, list[str]]:
    """Compare the probes that evaluated folders contain besides their suites.

    Returns:
        `compare_probes` without `pairing`, None unless all folders have a probe; and notes.

    Raises:
        ValueError: a probe that is not finished, of another model than the suites, or of other items.
    """
    folders = [*before, *after]
    without = [str(folder.path) for folder in folders if not (folder.path / PROBE).is_file()]
    if without:
        some = len(without) < len(folders)
        if ranges and not some:
            raise ValueError("distances of the evidence probe are given, but no folder has a probe")
        return None, [f"{', '.join(without)} without an evidence probe: it is left out"] if some else []
    probed, others = [[_probe_beside(folder) for folder in side] for side in (before, after)]
    compared = compare_folders(probed, others, sampling, ranges)
    return compared, _backend_notes(probed, others)


def _backend_notes(before: Sequence[ResultFolder], after: Sequence[ResultFolder]) -> list[str]:
    """Return notes about pairs that were probed under other versions or in an unknown dtype."""
    notes = []
    for one, other in zip(before, after, strict=True):
        if one.info.get("dtype") == AUTO:
            notes.append(
                f"the probes of {one.path} and {other.path} ran in the types of their exports and do not "
                "record which: probe both models again to be sure that it was one"
            )
        ours, theirs = (folder.info.get("versions") for folder in (one, other))
        if ours != theirs:
            notes.append(f"the probes of {one.path} and {other.path} ran under {ours} and {theirs}")
    return notes


def _probe_beside(folder: ResultFolder) -> ResultFolder:
    probe = read_probe_folder(folder.path)
    if probe.weights != folder.weights:
        raise ValueError(
            f"{folder.path} contains the probe of one model and the suites of another: evaluate both again"
        )
    return probe


def _keys(cell: ProbeCell, ranges: Sequence[tuple[int, int]]) -> list[tuple[Any, ...]]:
    """Return the averages to which a cell belongs."""
    spans = [span for span in dict.fromkeys(ranges) if span[0] <= cell.distance <= span[1]]
    kinds: list[tuple[Any, ...]] = [("kind", cell.kind, span) for span in (None, *spans)]
    return [("distance", cell.kind, cell.distance), *kinds]


def _span(cells: dict[ProbeCell, CellScores], kind: str) -> tuple[int, int]:
    distances = [cell.distance for cell in cells if cell.kind == kind]
    return min(distances), max(distances)


def _units(scores: CellScores) -> tuple[Units, ...]:
    """Return the differences of a cell in each measure; each form, or item without one, is a unit."""
    return tuple(
        statistics.cell_units(
            [values[:, column] for values in scores.differences], scores.units, is_shared=scores.is_shared
        )
        for column in range(len(MEASURES))
    )


def _resampled(cell: ProbeCell, scores: CellScores, sampling: Sampling) -> Values:
    """Resample the items of a cell and return mean differences [resamples, pairs, measures]."""
    rng = statistics.generator(sampling.seed, "probe", str(cell))
    differences = scores.differences
    # Measures of an item are drawn together, like the pairs of runs of an example
    together = [differences] if scores.is_shared else [(values,) for values in differences]
    drawn = [
        statistics.resampled_means(
            [column for values in group for column in values.T],
            is_shared=True,
            resamples=sampling.resamples,
            rng=rng,
        )
        for group in together
    ]
    return np.hstack(drawn).reshape(sampling.resamples, len(differences), len(MEASURES))
