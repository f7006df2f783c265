"""`tools/evaluate_model.py`: one suite on one model, cell by cell, into a result folder.

The folder belongs to one model, and a suite in it to one set of options: a second call goes on where the
first ended, adds suites, tasks or lengths, and refuses to mix what does not belong together.

`summary.csv` is one model's part of Table 1, in the layout of that table. Its score is the macro average
over cells (task x window) in points; windows up to the training window are `trained`, longer ones
`extrapolated`. Without a training window there is one row a benchmark, regime `all`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation.engine import (
    Backend,
    Engine,
    load_model,
    load_tokenizer,
    max_positions,
    model_identity,
    read_provenance,
    require_eos,
    require_lm_eval,
    require_model_folder,
    resolve,
)
from megatron_exact.evaluation.pairing import (
    ALL,
    EXTRAPOLATED,
    REGIMES,
    TRAINED,
    is_tuned_on_answers,
    trained_window,
)
from megatron_exact.evaluation.prompts import (
    NO_TEMPLATE,
    Document,
    Prompts,
    cached_documents,
    default_cache,
    read_template,
)
from megatron_exact.evaluation.result_folders import (
    Cell,
    Example,
    cell_files,
    cell_path,
    forget_cell,
    merged_info,
    read_scores,
    record_cell,
    write_cell,
    write_merged,
)
from megatron_exact.evaluation.suites.suite import SuiteOptions, find_suite
from megatron_exact.files import sha256_file, write_text
from megatron_exact.folder_lock import held_output

SUMMARY_COLUMNS = (
    *("model", "cpt_window", "benchmark", "regime", "evaluation_windows", "score", "cells", "examples"),
)
WINDOW = 4096
"""Window of suites without lengths where the config names no number of positions."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedCell:
    """A finished cell."""

    cell: Cell
    """Which."""
    score: float
    """Mean of its examples, 0..1."""
    examples: int
    """How many."""
    is_new: bool
    """False if an earlier call had finished it."""


class Evaluation:
    """One suite on one model; `run` does the work."""

    def __init__(
        self,
        model: str | Path,
        results: str | Path,
        options: SuiteOptions,
        *,
        backend: Backend | None = None,
        cache: Path | None = None,
        load: Callable[..., Any] = load_model,
    ) -> None:
        """Check everything that can be checked before the model is loaded.

        Args:
            model: Hugging Face folder.
            results: folder to write, or to resume.
            options: what to evaluate.
            backend: how to run the model.
            cache: where generated examples are kept.
            load: like `engine.load_model`.

        Raises:
            ValueError: lm-eval is missing, no model, a window that the model cannot take, a device that is
                not there, no word about the template of a tuned model, data that is missing, or a result
                folder of another model or other options.
        """
        self.model, self.results, self.options = Path(model), Path(results), options
        self.cache = cache or default_cache()
        lm_eval = require_lm_eval()
        require_model_folder(self.model)
        self.backend = resolve(backend or Backend(), self.model)
        provenance = read_provenance(self.model)
        self._check_windows()
        tokenizer = load_tokenizer(self.model)
        require_eos(tokenizer, self.model)
        self.prompts = Prompts(tokenizer, read_template(self._template_option(provenance), tokenizer))
        self.engine = Engine(
            load=lambda: load(self.model, self.prompts, self.backend, self.window),
            prompts=self.prompts,
            window=self.window,
        )
        self.suite = find_suite(options.suite)
        self.sources = {task: self.suite.sources(task, options) for task in options.chosen_tasks}
        self.record = {
            "options": self.suite.record(options),
            "template": self.prompts.template.record(),
            "sources": {name: digest for part in self.sources.values() for name, digest in part.items()},
        }
        self.about = {
            "model": model_identity(self.model),
            "lm_eval": lm_eval,
            "provenance": provenance,
            "backend": self.backend.record(),
        }
        self.info = merged_info(self.results, self.about, options.suite, self.record)

    def run(self, on_cell: Callable[[EvaluatedCell], object] = lambda _: None) -> list[EvaluatedCell]:
        """Evaluate every cell that is not there yet; `on_cell` is called after each.

        Raises:
            ValueError: examples that cannot be made, or do not fit, or another call evaluates this suite.
        """
        self.info = write_merged(self.results, self.about, self.options.suite, self.record)
        suite = self.results / self.options.suite
        with held_output(suite, "evaluating it", "choose another --output"):
            return self._run(on_cell)

    def _run(self, on_cell: Callable[[EvaluatedCell], object]) -> list[EvaluatedCell]:
        options = self.options
        cells = [
            Cell(suite=options.suite, task=task, length=length)
            for length in options.lengths or (0,)
            for task in options.chosen_tasks
        ]
        found = []
        with progress_bar(options.suite, len(cells), "cell") as bar:
            for cell in cells:
                is_new = not cell_path(self.results, cell).is_file()
                if is_new:
                    forget_cell(self.results, cell)
                    write_cell(self.results, cell, self._evaluate(cell))
                scores = read_scores(self.results, cell)
                record_cell(self.results, cell, sha256_file(cell_path(self.results, cell)))
                result = EvaluatedCell(
                    cell=cell, score=sum(scores) / len(scores), examples=len(scores), is_new=is_new
                )
                found.append(result)
                bar.update()
                on_cell(result)
        return found

    def write_summary(self, model: str | None, cpt_window: int | None) -> Path:
        """Write `summary.csv` over all finished cells of the folder."""
        if cpt_window is None:
            cpt_window = trained_window(self.info["provenance"])
        rows = summary_rows(
            model or self.info["model"]["name"],
            cpt_window,
            {cell: read_scores(self.results, cell) for cell in cell_files(self.results)},
        )
        stream = io.StringIO()
        writer = csv.DictWriter(stream, SUMMARY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        path = self.results / "summary.csv"
        write_text(path, stream.getvalue())
        return path

    @property
    def window(self) -> int:
        """The longest window of this call."""
        return max(self.options.lengths, default=max_positions(self.model) or WINDOW)

    def _check_windows(self) -> None:
        positions, window = max_positions(self.model), self.window
        if positions is not None and window > positions and not self.options.allow_beyond_positions:
            raise ValueError(
                f"a window of {window:,} tokens exceeds the model's max_position_embeddings {positions:,}: "
                "choose shorter --lengths, or --allow-beyond-positions to extrapolate"
            )

    def _template_option(self, provenance: dict[str, Any] | None) -> str:
        """What --template says; where it says nothing, `none` for models that nobody tuned on answers."""
        if self.options.template is not None:
            return self.options.template
        if is_tuned_on_answers(provenance):
            raise ValueError(
                f"{self.model} was tuned on questions and answers, so its prompts need a template: give "
                "--template model for the one of its tuning, another as a file, or --template none for none"
            )
        return NO_TEMPLATE

    def _evaluate(self, cell: Cell) -> list[Example]:
        """Evaluate a cell; its examples come from the cache where they are there."""
        key = {
            "suite": cell.suite,
            "task": cell.task,
            "length": cell.length,
            "options": self.record["options"],
            "sources": self.sources[cell.task],
            "tokenizer": self.info["model"]["tokenizer_sha256"],
            "template": self.prompts.template.record()["sha256"],
            "lm_eval": self.info["lm_eval"],
        }

        def documents(make: Callable[[], list[Document]]) -> list[Document]:
            return cached_documents(self.cache, key, make)

        return self.suite.evaluate(cell.task, cell.length, self.options, self.engine, documents)


def window_label(tokens: int) -> str:
    """`1.5K` for 1,536: K is 1,024; lengths that are no multiple of 256 are written out."""
    return f"{tokens / 1024:g}K" if tokens >= 256 and tokens % 256 == 0 else str(tokens)


def regime_of(length: int, cpt_window: int | None) -> str:
    """Where a window belongs."""
    if cpt_window is None or length == 0:
        return ALL
    return TRAINED if length <= cpt_window else EXTRAPOLATED


def summary_rows(
    model: str, cpt_window: int | None, cells: Mapping[Cell, list[float]]
) -> list[dict[str, str]]:
    """One row a benchmark and regime, in the order of the table."""
    weights = {cell: find_suite(cell.suite).weight(cell.task) for cell in cells}
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in sorted(cell for cell, weight in weights.items() if weight):
        place = REGIMES.index(regime_of(cell.length, cpt_window))
        groups.setdefault((cell.suite, place), []).append(cell)
    rows = []
    for (suite, place), members in sorted(groups.items()):
        score = sum(weights[cell] * sum(cells[cell]) / len(cells[cell]) for cell in members)
        windows = [window_label(length) for length in sorted({cell.length for cell in members}) if length]
        rows.append(
            {
                "model": model,
                "cpt_window": "" if cpt_window is None else window_label(cpt_window),
                "benchmark": suite,
                "regime": REGIMES[place],
                "evaluation_windows": ",".join(windows),
                "score": f"{100 * score / sum(weights[cell] for cell in members):.2f}",
                "cells": str(len(members)),
                "examples": str(sum(len(cells[cell]) for cell in members)),
            }
        )
    return rows
