"""Baseline against treatment: points, intervals, counts, tests and notes, written as `comparison.json`.

Scores are averaged over the examples of a cell (task x length), then over cells, with equal weights as in
the paper's tables unless a suite weighs its tasks, and reported in points (0..100). Intervals and p-values
come from `statistics`: what was drawn together varies together, over all cells in which it occurs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation import statistics
from megatron_exact.evaluation.pairing import (
    EXTRAPOLATED,
    REGIMES,
    TRAINED,
    CellScores,
    Regimes,
    backend_of,
    common_cells,
    missing_from_grid,
    pairing,
    read_matched,
    read_sides,
    require_same_backend,
    require_same_protocol,
    trained_window,
    training_history,
    training_record,
    unbound,
)
from megatron_exact.evaluation.probe_comparison import compare_probes_within
from megatron_exact.evaluation.result_folders import (
    PROBE,
    PROBE_FOLDER,
    RESULTS,
    Cell,
    ResultFolder,
    read_probe_folder,
    read_result_folder,
    text_sha256,
)
from megatron_exact.evaluation.statistics import CELLS, MOST_EXACT_PAIRS, Sampling, Units
from megatron_exact.evaluation.suites.suite import find_suite
from megatron_exact.files import sha256_file, write_json

FORMAT_VERSION = 1
COMPARISON = "comparison.json"
POINTS = 100
"""Scores are 0..1 in files and 0..100 in everything that is reported."""
GROUPS = "groups of examples"
"""What the units of a suite are whose examples were drawn together, such as all those of one question."""
NOT_OPTIONS = ("model", "provenance", "backend", "versions", "cells", "bindings")
"""Entries of results.json that have notes of their own."""
SHOWN = 5


@dataclass(kw_only=True)
class MacroAverage:
    """Weighted mean over cells; a sum, so that the resamples of a cell need not be kept."""

    cells: int = 0
    """Number of cells."""
    weight: float = 0.0
    """Sum of the weights of the cells."""
    examples: int = 0
    """Examples of one run in all cells; where pairs of runs differ, a cell counts their rounded mean."""
    cell_signs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    """[3], cells whose mean over all pairs the treatment wins, loses, ties."""
    signs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    """[3], examples of all pairs that the treatment wins, loses, ties."""
    baseline: Any = 0.0
    """[pairs], weighted sum of the cells' means, 0..1, as the following ones are."""
    treatment: Any = 0.0
    """[pairs], the same of the treatments."""
    units: list[tuple[float, Units]] = field(default_factory=list)
    """Weight of each cell, and its differences as units."""
    shares_units: bool = False
    """Whether units with the same name in several cells are one unit."""
    has_larger_units: bool = False
    """Whether several examples of a cell were drawn together."""
    resampled: Any = 0.0
    """[resamples, pairs], mean differences under resampling of examples; made for `Sampling.kind` cells."""

    @classmethod
    def of_cell(cls, cell: Cell, scores: CellScores, sampling: Sampling) -> MacroAverage:
        """Make the average of one cell; its random numbers depend only on the seed and its name."""
        differences = scores.differences
        pooled = np.concatenate(differences)
        baseline = np.array([values.mean() for values in scores.baseline])
        treatment = np.array([values.mean() for values in scores.treatment])
        average = cls(
            cells=1,
            weight=1.0,
            examples=scores.examples,
            cell_signs=_counts(np.round(np.mean(treatment - baseline, keepdims=True), 12)),
            signs=_counts(pooled),
            baseline=baseline,
            treatment=treatment,
            units=[(1.0, statistics.cell_units(differences, scores.units, is_shared=scores.is_shared))],
            shares_units=find_suite(cell.suite).shares_units,
            has_larger_units=scores.has_larger_units,
        )
        if sampling.kind == CELLS:
            average.resampled = statistics.resampled_means(
                differences,
                is_shared=scores.is_shared,
                resamples=sampling.resamples,
                rng=statistics.generator(
                    sampling.seed, "examples", cell.suite, cell.task, str(cell.length)
                ),
            )
        return average

    def add(self, cell: MacroAverage, weight: float) -> None:
        """Add a cell with this weight."""
        self.cells += 1
        self.weight += weight
        self.examples += cell.examples
        self.signs = self.signs + cell.signs
        self.cell_signs = self.cell_signs + cell.cell_signs
        self.baseline = self.baseline + weight * cell.baseline
        self.treatment = self.treatment + weight * cell.treatment
        self.units += [(weight, units) for _, units in cell.units]
        self.shares_units = cell.shares_units
        self.has_larger_units = self.has_larger_units or cell.has_larger_units
        self.resampled = self.resampled + weight * cell.resampled

    def as_units(self) -> Units:
        """Return the average as a sum over the units that were drawn."""
        joined = statistics.average_units(self.units, across_cells=self.shares_units)
        is_larger = self.shares_units or self.has_larger_units
        return replace(joined, kind=GROUPS) if is_larger else joined

    def estimate(self, sampling: Sampling) -> dict[str, Any]:
        """Return the averages in points, with the interval."""
        baseline = POINTS * float(np.mean(self.baseline)) / self.weight
        treatment = POINTS * float(np.mean(self.treatment)) / self.weight
        return {
            "cells": self.cells,
            "examples": self.examples,
            "baseline": baseline,
            "treatment": treatment,
            "delta": treatment - baseline,
            **self._interval(sampling),
            "relative_lift_percent": 100 * (treatment - baseline) / baseline if baseline > 0 else None,
            "example_signs": _signs(self.signs),
        }

    def _interval(self, sampling: Sampling) -> dict[str, Any]:
        if sampling.kind == CELLS:
            draws = statistics.mean_over_pairs(self.resampled / self.weight, sampling)
            return {"ci95": [POINTS * end for end in statistics.percentiles(draws)]}
        return statistics.interval_record(self.as_units(), POINTS)

    def tests(self, sampling: Sampling, *purpose: str) -> dict[str, Any]:
        """Return counts of cells, the delta of each pair of runs, and uncorrected p-values.

        Args:
            sampling: options of the exchanges.
            purpose: purpose of their random numbers.
        """
        units = self.as_units()
        of_these_seeds = statistics.exchange_p(
            units,
            resamples=sampling.resamples,
            rng=statistics.generator(sampling.seed, "exchanges", *purpose),
        )
        pair_means = (self.treatment - self.baseline) / self.weight
        return {
            "cell_signs": _signs(self.cell_signs),
            "pair_deltas": [POINTS * float(value) for value in pair_means],
            "p_value": statistics.claimed_p(units, of_these_seeds),
            "p_value_these_seeds": of_these_seeds,
            "pair_level_p_value": statistics.pair_level_p(pair_means),
        }


def _counts(differences: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the differences above 0, below 0, and equal to 0."""
    return np.array([np.sum(differences > 0), np.sum(differences < 0), np.sum(differences == 0)])


def _signs(counts: Sequence[int] | NDArray[np.int64]) -> dict[str, int]:
    return dict(zip(("wins", "losses", "ties"), map(int, counts), strict=True))


def compare_runs(
    baselines: Sequence[str | Path],
    treatments: Sequence[str | Path],
    *,
    regimes: Regimes | None = None,
    sampling: Sampling | None = None,
    probe_ranges: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """Compare evaluated models that pair in order: the first baseline with the first treatment, and so on.

    Args:
        baselines: result folders of one side, one for each seed; with suites, an evidence probe, or both.
        treatments: result folders of the other side, as many.
        regimes: which lengths were trained; by default all cells count in `all` only.
        sampling: resamples and seed.
        probe_ranges: (shortest, longest) distances of the evidence probe that get their own averages.

    Returns:
        Content of comparison.json, with `probe` where all folders contain an evidence probe.

    Raises:
        ValueError: the sides cannot be compared; it names the first difference.
    """
    regimes, sampling = regimes or Regimes(), sampling or Sampling()
    before, after = read_sides(baselines, treatments, _read_folder)
    paired = pairing(before, after)
    cells = common_cells([*before, *after])
    require_same_backend(before, after)
    require_same_protocol([*before, *after])
    regimes = regimes.for_folders([*before, *after])
    regimes.require_evaluated({(cell.suite, cell.length) for cell in cells})
    aggregates: dict[tuple[str, str], MacroAverage] = {}
    lengths: dict[tuple[str, int], MacroAverage] = {}
    cell_entries = []
    is_shared, together = True, set()
    with progress_bar("compare", len(cells), "cells") as bar:
        for cell in cells:
            scores = read_matched(cell, before, after)
            alone = MacroAverage.of_cell(cell, scores, sampling)
            weight = find_suite(cell.suite).weight(cell.task)
            if weight:
                for regime in regimes.of(cell.suite, cell.length):
                    aggregates.setdefault((cell.suite, regime), MacroAverage()).add(alone, weight)
                lengths.setdefault((cell.suite, cell.length), MacroAverage()).add(alone, weight)
            entry = {"suite": cell.suite, "task": cell.task, "length": cell.length}
            cell_entries.append({**entry, **alone.estimate(sampling)})
            del cell_entries[-1]["cells"]
            if scores.has_larger_units or find_suite(cell.suite).shares_units:
                together.add(cell.suite)
            is_shared = is_shared and scores.is_shared
            bar.update(1)
    probe, probe_notes = compare_probes_within(before, after, sampling, probe_ranges)
    return {
        "format_version": FORMAT_VERSION,
        "pairing": paired,
        "runs": [
            {"baseline": _describe(one), "treatment": _describe(other)}
            for one, other in zip(before, after, strict=True)
        ],
        "options": {
            **regimes.record(),
            "resamples": sampling.resamples,
            "seed": sampling.seed,
            "resample": sampling.kind,
        },
        "methods": methods(len(before), len(aggregates), sampling, together=sorted(together))
        if cells
        else {},
        "notes": [
            *comparison_notes(cells, before, after, is_shared=is_shared),
            *statistics.sampling_notes(len(before), sampling),
            *regime_notes(cells, regimes, [*before, *after]),
            *probe_notes,
        ],
        "aggregates": _aggregates(aggregates, sampling),
        "lengths": [
            {"suite": suite, "length": length, **lengths[suite, length].estimate(sampling)}
            for suite, length in sorted(lengths)
        ],
        "cells": cell_entries,
        **({} if probe is None else {"probe": probe}),
    }


def units_by_regime(
    baselines: Sequence[str | Path], treatments: Sequence[str | Path], *, regimes: Regimes
) -> dict[tuple[str, str], Units]:
    """Return the units of the averages of `compare_runs` by suite and regime, scores 0..1.

    Raises:
        ValueError: results that do not fit each other.
    """
    before, after = read_sides(baselines, treatments, _read_folder)
    regimes = regimes.for_folders([*before, *after])
    found: dict[tuple[str, str], MacroAverage] = {}
    for cell in common_cells([*before, *after]):
        weight = find_suite(cell.suite).weight(cell.task)
        alone = MacroAverage.of_cell(cell, read_matched(cell, before, after), Sampling())
        for regime in regimes.of(cell.suite, cell.length) if weight else ():
            found.setdefault((cell.suite, regime), MacroAverage()).add(alone, weight)
    return {key: average.as_units() for key, average in found.items()}


def _aggregates(found: Mapping[tuple[str, str], MacroAverage], sampling: Sampling) -> list[dict[str, Any]]:
    """Return estimates and tests by suite and regime, corrected for the number of all of them."""
    keys = sorted(found, key=lambda key: (key[0], REGIMES.index(key[1])))
    tests = [found[key].tests(sampling, *key) for key in keys]
    together = statistics.holm([test["p_value"] for test in tests])
    return [
        {"suite": key[0], "regime": key[1], **found[key].estimate(sampling), **test, "p_holm": p_holm}
        for key, test, p_holm in zip(keys, tests, together, strict=True)
    ]


def _read_folder(path: str | Path) -> ResultFolder:
    """Read a folder with suites, or one with only an evidence probe."""
    has_probe_alone = (Path(path) / PROBE).is_file() and not (Path(path) / RESULTS).is_file()
    return read_probe_folder(path) if has_probe_alone else read_result_folder(path)


def write_comparison(output: str | Path, content: dict[str, Any]) -> Path:
    """Write comparison.json into a folder, which is made if missing; return its path."""
    path = Path(output) / COMPARISON
    write_json(path, {**content, "content_sha256": content_sha256(content)})
    return path


def content_sha256(content: Mapping[str, Any]) -> str:
    """Return the hash of a comparison, without the entry that contains it."""
    rest = {name: value for name, value in content.items() if name != "content_sha256"}
    return text_sha256(json.dumps(rest, sort_keys=True))


def _describe(folder: ResultFolder) -> dict[str, Any]:
    record = training_record(folder) or {}
    weighting = record.get("weighting")
    return {
        "results": str(folder.path),
        "files": _hashes(folder),
        "model": folder.info.get("model"),
        "token_weighting": weighting.get("rule") if isinstance(weighting, dict) else None,
        "seed": record.get("seed"),
        "fingerprint": record.get("fingerprint"),
        "iteration": record.get("export_iteration"),
        **training_history(folder.provenance),
    }


def _hashes(folder: ResultFolder) -> dict[str, str]:
    """Return the sha256 of every file that is compared, by its path in the folder."""
    files = [*folder.files.values(), *(folder.path / PROBE_FOLDER).glob("*.jsonl")]
    files += [folder.path / name for name in (RESULTS, PROBE) if (folder.path / name).is_file()]
    return {path.relative_to(folder.path).as_posix(): sha256_file(path) for path in sorted(files)}


def methods(
    num_pairs: int, num_aggregates: int, sampling: Sampling, *, together: Sequence[str]
) -> dict[str, str]:
    """Describe how intervals and p-values were made, and how many tests the correction covers.

    Args:
        num_pairs: pairs of runs.
        num_aggregates: aggregates of the comparison.
        sampling: options of the intervals and tests.
        together: suites in which several examples were drawn together.
    """
    unit = f"example (of {', '.join(together)}: each unit drawn together)" if together else "example"
    exchanges = 1 << num_pairs
    over_seeds = (
        f"two-sided, all {exchanges:,} exchanges of whole pairs of runs: {2 / exchanges:.3g} at least"
        if 2 <= num_pairs <= MOST_EXACT_PAIRS
        else f"none: it needs 2 to {MOST_EXACT_PAIRS} pairs of runs"
    )
    these_seeds = f"two-sided, {sampling.resamples:,} random exchanges of the two sides of each {unit}"
    about = "it holds for other examples, not for other seeds"
    claimed = (
        f"p_value_these_seeds: {about}"
        if num_pairs == 1
        else "the larger of pair_level_p_value and of Student's t (where there is an interval): it holds "
        "for other seeds"
    )
    return {
        "average": "macro average over cells (task x length), points 0..100",
        **statistics.interval_methods(num_pairs, sampling, unit),
        "p_value": claimed,
        "p_value_these_seeds": f"{these_seeds}; {about}",
        "pair_level_p_value": over_seeds,
        "p_holm": f"p_value after Holm's correction for the {num_aggregates} aggregates of this comparison",
    }


def comparison_notes(
    cells: Sequence[Cell],
    before: Sequence[ResultFolder],
    after: Sequence[ResultFolder],
    *,
    is_shared: bool,
) -> list[str]:
    """Return the warnings that belong beside the numbers, one line each."""
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
    notes += [f"{folder.path}: {why}" for folder in (*before, *after) if (why := unbound(folder))]
    if not is_shared:
        notes.append("the pairs of runs answered different examples: each pair has a sample of its own")
    return notes


def regime_notes(cells: Sequence[Cell], regimes: Regimes, folders: Sequence[ResultFolder]) -> list[str]:
    """Return a note for each folder whose training record contradicts the given regimes of lengths."""
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
    """Return notes about sides that ran under different versions, and folders that do not record it."""
    pairs = list(zip(before, after, strict=True))
    unknown = [folder for pair in pairs for folder in pair if not backend_of(folder)]
    notes = [
        f"{folder.path} does not record backend and dtype of its suites, so both sides may have run "
        "differently; evaluate it again to be sure"
        for folder in unknown
    ]
    for one, other in pairs:
        ours, theirs = versions_of(one), versions_of(other)
        if one not in unknown and other not in unknown and ours != theirs:
            notes.append(f"{one.path} ran under {ours}, {other.path} under {theirs}")
    return notes


def versions_of(folder: ResultFolder) -> str:
    """Return the versions of the packages that ran the suites of a folder, each distinct set once."""
    calls = backend_of(folder).get("calls") or []
    texts = {
        ", ".join(f"{name} {value}" for name, value in sorted((call.get("versions") or {}).items()))
        for call in calls
    }
    return " and ".join(sorted(texts))


def difference_of_code(one: ResultFolder, other: ResultFolder) -> list[str]:
    """Return which of `git_commit` and `versions` differ between two trainings, as far as both are
    known."""
    before, after = training_record(one) or {}, training_record(other) or {}
    return [
        key
        for key in ("git_commit", "versions")
        if key in before and key in after and before[key] != after[key]
    ]


def difference_of_options(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Name the entries of results.json that differ, except those of the model itself."""
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
