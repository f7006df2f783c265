"""Baseline against treatment: points, intervals, counts and tests, written as `comparison.json`.

Scores are averaged over the examples of a cell (task x length), then over cells with equal weights, as in
the paper's tables, and told in points (0..100). One resample of a cell serves every average that it enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation import bootstrap, permutation
from megatron_exact.evaluation.averages import CellResult, MacroAverage, cell_result
from megatron_exact.evaluation.bootstrap import Sampling
from megatron_exact.evaluation.matching import common_cells, read_matched, require_same_backend
from megatron_exact.evaluation.notes import comparison_notes, methods, regime_notes
from megatron_exact.evaluation.probe.compare import compare_probes_within
from megatron_exact.evaluation.probe.matching import read_probe_folder
from megatron_exact.evaluation.probe.results import PROBE
from megatron_exact.evaluation.provenance import training_record
from megatron_exact.evaluation.regimes import ALL, EXTRAPOLATED, TRAINED, Regimes
from megatron_exact.evaluation.result_folders import RESULTS, ResultFolder, read_result_folder
from megatron_exact.evaluation.sides import pairing, read_sides
from megatron_exact.evaluation.training_history import training_history
from megatron_exact.files import write_json

FORMAT_VERSION = 1
COMPARISON = "comparison.json"
REGIME_ORDER = (TRAINED, EXTRAPOLATED, ALL)


@dataclass(kw_only=True)
class _Tables:
    """The averages of one comparison while cells come in."""

    weights: Any
    """[resamples, pairs], from `bootstrap.pair_weights`."""
    regimes: Regimes
    """Of the lengths."""
    aggregates: dict[tuple[str, str], MacroAverage]
    """By suite and regime."""
    lengths: dict[tuple[str, int], MacroAverage]
    """By suite and length."""
    cells: list[dict[str, Any]]
    """Finished entries, one a cell."""

    def add(self, result: CellResult) -> None:
        cell = result.cell
        for regime in self.regimes.of(cell.suite, cell.length):
            self.aggregates.setdefault((cell.suite, regime), MacroAverage()).add(result)
        self.lengths.setdefault((cell.suite, cell.length), MacroAverage()).add(result)
        alone = MacroAverage()
        alone.add(result)
        entry = alone.estimate(self.weights)
        del entry["cells"]
        self.cells.append({"suite": cell.suite, "task": cell.task, "length": cell.length, **entry})

    def finished(self) -> dict[str, list[dict[str, Any]]]:
        keys = sorted(self.aggregates, key=lambda key: (key[0], REGIME_ORDER.index(key[1])))
        averages = [self.aggregates[key] for key in keys]
        tests = [average.tests() for average in averages]
        together = permutation.holm([test["p_value"] for test in tests])
        return {
            "aggregates": [
                {
                    "suite": suite,
                    "regime": regime,
                    **average.estimate(self.weights),
                    **test,
                    "p_holm": p_holm,
                }
                for (suite, regime), average, test, p_holm in zip(
                    keys, averages, tests, together, strict=True
                )
            ],
            "lengths": [
                {"suite": suite, "length": length, **self.lengths[suite, length].estimate(self.weights)}
                for suite, length in sorted(self.lengths)
            ],
            "cells": self.cells,
        }


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
        baselines: result folders of one side, one a seed; with suites, an evidence probe, or both.
        treatments: of the other, as many.
        regimes: which lengths were trained; by default everything is in `all` only.
        sampling: resamples and seed.
        probe_ranges: (shortest, longest) distances of the evidence probe that get averages of their own.

    Returns:
        Content of comparison.json; `probe` is in it where all folders hold an evidence probe.

    Raises:
        ValueError: the sides cannot be compared; it names the first difference.
    """
    regimes, sampling = regimes or Regimes(), sampling or Sampling()
    before, after = read_sides(baselines, treatments, _read_folder)
    paired = pairing(before, after)
    cells = common_cells([*before, *after])
    require_same_backend(before, after)
    regimes.require_evaluated({(cell.suite, cell.length) for cell in cells})
    tables = _Tables(
        weights=bootstrap.pair_weights(
            len(before), sampling.resamples, bootstrap.generator(sampling.seed, "pairs of runs")
        ),
        regimes=regimes,
        aggregates={},
        lengths={},
        cells=[],
    )
    fewest, is_shared = None, True
    with progress_bar("compare", len(cells), "cells") as bar:
        for cell in cells:
            scores = read_matched(cell, before, after)
            tables.add(cell_result(scores, resamples=sampling.resamples, seed=sampling.seed))
            fewest = min(fewest or len(scores.baseline[0]), *map(len, scores.baseline))
            is_shared = is_shared and scores.is_shared
            bar.update(1)
    finished = tables.finished()
    probe, probe_notes = compare_probes_within(before, after, sampling, probe_ranges)
    return {
        "format_version": FORMAT_VERSION,
        "pairing": paired,
        "runs": [
            {"baseline": _describe(one), "treatment": _describe(other)}
            for one, other in zip(before, after, strict=True)
        ],
        "options": _options(regimes, sampling),
        "methods": methods(len(before), len(finished["aggregates"]), sampling.resamples) if cells else {},
        "notes": [
            *comparison_notes(cells, before, after, fewest_examples=fewest, is_shared=is_shared),
            *regime_notes(cells, regimes, [*before, *after]),
            *probe_notes,
        ],
        **finished,
        **({} if probe is None else {"probe": probe}),
    }


def _read_folder(path: str | Path) -> ResultFolder:
    """A folder with suites, or one with an evidence probe alone."""
    has_probe_alone = (Path(path) / PROBE).is_file() and not (Path(path) / RESULTS).is_file()
    return read_probe_folder(path) if has_probe_alone else read_result_folder(path)


def write_comparison(output: str | Path, content: dict[str, Any]) -> Path:
    """Write comparison.json into a folder, which is made if need be; returns its path."""
    path = Path(output) / COMPARISON
    write_json(path, content)
    return path


def _options(regimes: Regimes, sampling: Sampling) -> dict[str, Any]:
    return {
        "trained_lengths": [str(length) for length in regimes.trained],
        "extrapolated_lengths": [str(length) for length in regimes.extrapolated],
        "nolima_k_tokens": regimes.nolima_k_tokens,
        "resamples": sampling.resamples,
        "seed": sampling.seed,
    }


def _describe(folder: ResultFolder) -> dict[str, Any]:
    record = training_record(folder) or {}
    weighting = record.get("weighting")
    return {
        "results": str(folder.path),
        "model": folder.info.get("model"),
        "token_weighting": weighting.get("rule") if isinstance(weighting, dict) else None,
        "seed": record.get("seed"),
        "fingerprint": record.get("fingerprint"),
        "iteration": record.get("export_iteration"),
        **training_history(folder.provenance),
    }
