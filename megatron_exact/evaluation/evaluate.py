"""`tools/evaluate_model.py`: one suite on one model, cell by cell, into a result folder.

The folder belongs to one model, and a suite in it to one set of options. A second call resumes where the
first ended, or adds suites, tasks or lengths; other models or options are an error. Several processes can
share the examples of every cell (`shard_files.py`); the last one puts the cells together.

`summary.csv` is one model's part of Table 1, in the layout of that table. Its score is the macro average
over cells (task x window) in points; windows up to the training window are `trained`, longer ones
`extrapolated`. Without a training window there is one row a benchmark, regime `all`.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_exact import __version__
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
    require_system,
)
from megatron_exact.evaluation.result_folders import (
    RESULTS,
    Cell,
    Example,
    cell_files,
    cell_path,
    forget_cell,
    is_recorded,
    merged_info,
    read_cell_file,
    read_scores,
    record_cell,
    text_sha256,
    write_cell,
    write_merged,
)
from megatron_exact.evaluation.shard_files import (
    fingerprint,
    merge_cell,
    missing_shards,
    read_shard,
    remove_shards,
    shard_path,
    write_shard,
)
from megatron_exact.evaluation.suites.suite import K_TOKENS, SuiteOptions, find_suite
from megatron_exact.files import atomic_file, sha256_file, write_json, write_text
from megatron_exact.folder_lock import held_output
from megatron_exact.shares import Share

SUMMARY_COLUMNS = (
    *("model", "cpt_window", "benchmark", "regime", "evaluation_windows", "score", "cells", "examples"),
)
MERGE_SECONDS = 600
"""How long a process waits for another that puts cells together."""
SYSTEM_REMEDY = "give a --template with a system role, or choose another protocol"
DIGEST = "digest.json"
EMPTY_ROW = dict.fromkeys(("id", "prompt", "prefix", "depth", "book", "question", "references"))
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
        share: Share | None = None,
        keep_prompts: bool = False,
        load: Callable[..., Any] = load_model,
    ) -> None:
        """Check everything that can be checked before the model is loaded.

        Args:
            model: Hugging Face folder.
            results: folder to write, or to resume.
            options: what to evaluate.
            backend: how to run the model.
            cache: where generated examples are kept.
            share: the examples of each cell that this process evaluates; None: all.
            keep_prompts: whether the examples contain their prompts besides the hashes.
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
        self.suite = find_suite(options.suite)
        self._check_windows()
        self.prompts = _prompts_of(self.model, options, provenance)
        require_eos(self.prompts.tokenizer, self.model)
        self.engine = Engine(
            load=lambda: load(self.model, self.prompts, self.backend, self.window),
            prompts=self.prompts,
            window=self.window,
            share=share or Share(),
            keep_prompts=keep_prompts,
        )
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

        Returns:
            The finished cells; without those that lack a share of another process.

        Raises:
            ValueError: examples that cannot be made, or do not fit, a damaged share, or another call
                evaluates this suite, or this share of it.
        """
        self.info = write_merged(self.results, self.about, self.options.suite, self.record)
        suite, share = self.results / self.options.suite, self.engine.share
        remedy = "choose another --output"
        if share.is_whole:
            with held_output(suite, "evaluating it", remedy):
                return self._finish(self.cells(), self._evaluate_whole, on_cell)
        own = suite.with_name(f"{suite.name}-{share.index}-of-{share.of}")
        with held_output(own, "evaluating this share", remedy):
            self._evaluate_share()
            with held_output(suite, "putting it together", remedy, wait_seconds=MERGE_SECONDS):
                waiting = self.waiting()
                there = [cell for cell in self.cells() if cell not in waiting]
                return self._finish(there, self._merge, on_cell)

    def cells(self) -> list[Cell]:
        """Return the cells that the options name, in the order in which they are evaluated."""
        options = self.options
        return [
            Cell(suite=options.suite, task=task, length=length)
            for length in options.lengths or (0,)
            for task in options.chosen_tasks
        ]

    def waiting(self) -> dict[Cell, list[Share]]:
        """Return the cells that cannot be put together yet, with the shares that they lack."""
        of = self.engine.share.of
        missing = {
            cell: missing_shards(self.results, cell, of, self._made_of(cell))
            for cell in self.cells()
            if not self._is_finished(cell)
        }
        return {cell: shares for cell, shares in missing.items() if shares}

    def _finish(
        self,
        cells: Sequence[Cell],
        make: Callable[[Cell], None],
        on_cell: Callable[[EvaluatedCell], object],
    ) -> list[EvaluatedCell]:
        """Make the files of cells that have none, and record all of them."""
        found = []
        new = {cell for cell in cells if not self._is_finished(cell)}
        with progress_bar(f"{self.options.suite}, {len(new)} cells", _work(new), " tokens") as bar:
            for cell in cells:
                is_new = cell in new
                if is_new:
                    if (path := cell_path(self.results, cell)).is_file():
                        warnings.warn(
                            f"{path} is not in {RESULTS}: it is of another folder, or the call that wrote "
                            "it was killed; evaluated again",
                            stacklevel=2,
                        )
                    forget_cell(self.results, cell)
                    make(cell)
                scores = read_scores(self.results, cell)
                record_cell(
                    self.results,
                    cell,
                    sha256_file(cell_path(self.results, cell)),
                    examples=len(scores),
                    code=code_version(),
                )
                remove_shards(self.results, cell)
                result = EvaluatedCell(
                    cell=cell, score=sum(scores) / len(scores), examples=len(scores), is_new=is_new
                )
                found.append(result)
                bar.update(_work([cell] if is_new else []))
                on_cell(result)
        return found

    def _is_finished(self, cell: Cell) -> bool:
        """Return whether the file of a cell is there and recorded: another one may be another model's."""
        return cell_path(self.results, cell).is_file() and is_recorded(self.results, cell)

    def _evaluate_whole(self, cell: Cell) -> None:
        write_cell(self.results, cell, self._evaluate(cell))

    def _merge(self, cell: Cell) -> None:
        merge_cell(self.results, cell, self.engine.share.of, self._made_of(cell))

    def _made_of(self, cell: Cell) -> str:
        """Return the fingerprint of what the answers of a cell depend on; its shares must agree in it."""
        backend = self.backend.record()
        return fingerprint(
            {
                **self.about,
                **self.record,
                "backend": {name: backend[name] for name in ("name", "dtype")},
                "generation": [call["generation"] for call in backend["calls"]],
                "sources": self.sources[cell.task],
                "code": code_version(),  # the cell's binding names one version
            }
        )

    def _evaluate_share(self) -> None:
        """Evaluate this process's share of each cell; a share that is there is skipped, if it is intact."""
        share, cells = self.engine.share, self.cells()
        missing = [cell for cell in cells if not self._is_finished(cell) and not self._has_share(cell)]
        name = f"{self.options.suite} {share}, {len(missing)} cells"
        with progress_bar(name, _work(missing), " tokens") as bar:
            for cell in missing:
                own = self._evaluate(cell)
                write_shard(self.results, cell, share, self._made_of(cell), own, self.engine.examples)
                bar.update(_work([cell]))

    def _has_share(self, cell: Cell) -> bool:
        """Return whether the share of a cell is there; a damaged one is evaluated again."""
        try:
            return read_shard(self.results, cell, self.engine.share, self._made_of(cell)) is not None
        except ValueError:
            path = shard_path(self.results, cell, self.engine.share)
            warnings.warn(f"{path} is damaged: evaluated again", stacklevel=2)
            return False

    def write_digest(self) -> Path | None:
        """Write what the suite's authors report over all cells, `<suite>/digest.json`; None for nothing."""
        cells = {
            cell: read_cell_file(path, cell)
            for cell, path in cell_files(self.results).items()
            if cell.suite == self.options.suite
        }
        content = self.suite.digest(cells, self.record["options"])
        if not content:
            return None
        path = self.results / self.options.suite / DIGEST
        write_json(path, content)
        return path

    def write_summary(self, model: str | None, cpt_window: int | None) -> Path:
        """Write `summary.csv` over all finished cells of the folder."""
        if cpt_window is None:
            cpt_window = trained_window(self.info["provenance"])
        rows = summary_rows(
            model or self.info["model"]["name"],
            cpt_window,
            {cell: read_scores(self.results, cell) for cell in cell_files(self.results)},
            {
                name: find_suite(name).k_of_record(one["options"])
                for name, one in self.info["suites"].items()
            },
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
        windows = [self.suite.window(length, self.options) for length in self.options.lengths]
        return max(windows, default=max_positions(self.model) or WINDOW)

    def _check_windows(self) -> None:
        positions, window = max_positions(self.model), self.window
        # the last generated token takes no position
        if positions is not None and window - 1 > positions and not self.options.allow_beyond_positions:
            raise ValueError(
                f"a window of {window:,} tokens exceeds the model's max_position_embeddings {positions:,}: "
                "choose shorter --lengths, or --allow-beyond-positions to extrapolate"
            )

    def _evaluate(self, cell: Cell) -> list[Example]:
        """Evaluate this process's share of a cell; examples come from the cache where they are there."""
        key = {
            "suite": cell.suite,
            "task": cell.task,
            "length": cell.length,
            "options": self.record["options"],
            "sources": self.sources[cell.task],
            "tokenizer": self.info["model"]["tokenizer_sha256"],
            "template": self.prompts.template.record()["sha256"],
            "lm_eval": self.info["lm_eval"],
            "code": code_version(),
        }

        def documents(make: Callable[[], list[Document]]) -> list[Document]:
            return cached_documents(self.cache, key, make)

        self.engine.begin_cell()
        return self.suite.evaluate(cell.task, cell.length, self.options, self.engine, documents)


def _work(cells: Iterable[Cell]) -> int:
    """Return what cells cost beside each other: their windows, in tokens; 1 for a cell without a window."""
    return sum(cell.length or 1 for cell in cells)


def _prompts_of(model: Path, options: SuiteOptions, provenance: dict[str, Any] | None) -> Prompts:
    """Tokenizer and template, with room for the suite's system message."""
    tokenizer = load_tokenizer(model)
    prompts = Prompts(tokenizer, read_template(_template_option(model, options, provenance), tokenizer))
    require_system(prompts, find_suite(options.suite).system(options), SYSTEM_REMEDY)
    return prompts


def _template_option(model: Path, options: SuiteOptions, provenance: dict[str, Any] | None) -> str:
    """What --template says; where it says nothing, `none` for models that nobody tuned on answers."""
    if options.template is not None:
        return options.template
    if is_tuned_on_answers(provenance):
        raise ValueError(
            f"{model} was tuned on questions and answers, so its prompts need a template: give "
            "--template model for the one of its tuning, another as a file, or --template none for none"
        )
    return NO_TEMPLATE


def write_prompts(model: str | Path, path: str | Path, options: SuiteOptions) -> int:
    """Write what would be sent to a model as JSON lines, with its tokenizer and without its weights.

    Args:
        model: folder with a tokenizer.
        path: file to write: `id`, `prompt` (the user's text, with the start of the answer), `prefix` (that
            start), `system`, `suite`, `task`, `length`, `depth` (percent of the haystack's tokens before
            the needle), `book`, `question`, `references`; null where a suite has none.
        options: what to evaluate.

    Returns:
        How many prompts were written.

    Raises:
        ValueError: no tokenizer, data that is missing, or examples that cannot be made.
    """
    require_lm_eval()
    model, suite = Path(model), find_suite(options.suite)
    if not model.is_dir():
        raise ValueError(f"{model} is not a folder: name a folder with the model's tokenizer")
    prompts = _prompts_of(model, options, read_provenance(model))
    for task in options.chosen_tasks:
        suite.sources(task, options)
    count = 0
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for length in options.lengths or (0,):
            for task in options.chosen_tasks:
                for row in suite.prompt_rows(task, length, options, prompts, lambda make: make()):
                    place = {"suite": suite.name, "task": task, "length": length}
                    system = suite.system(options)
                    stream.write(json.dumps({**EMPTY_ROW, **row, "system": system, **place}) + "\n")
                    count += 1
    return count


@cache
def code_version() -> str:
    """Return the version of the package and a hash of the code that makes prompts and scores."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    text = "\n".join(f"{path.name} {sha256_file(path)}" for path in files)
    return f"{__version__}+{text_sha256(text)[:12]}"


def window_label(tokens: int, k_tokens: int = K_TOKENS) -> str:
    """`1.5K` for 1,536 where K is 1,024; lengths that are no multiple of K / 4 are written out."""
    quarter = k_tokens // 4
    return f"{tokens / k_tokens:g}K" if tokens >= quarter and tokens % quarter == 0 else str(tokens)


def regime_of(length: int, cpt_window: int | None) -> str:
    """Where a window belongs."""
    if cpt_window is None or length == 0:
        return ALL
    return TRAINED if length <= cpt_window else EXTRAPOLATED


def summary_rows(
    model: str,
    cpt_window: int | None,
    cells: Mapping[Cell, list[float]],
    k_tokens: Mapping[str, int],
) -> list[dict[str, str]]:
    """One row a benchmark and regime, in the order of the table; `k_tokens`: what K means in a suite."""
    weights = {cell: find_suite(cell.suite).weight(cell.task) for cell in cells}
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in sorted(cell for cell, weight in weights.items() if weight):
        place = REGIMES.index(regime_of(cell.length, cpt_window))
        groups.setdefault((cell.suite, place), []).append(cell)
    rows = []
    for (suite, place), members in sorted(groups.items()):
        score = sum(weights[cell] * sum(cells[cell]) / len(cells[cell]) for cell in members)
        lengths = sorted({cell.length for cell in members} - {0})
        windows = [window_label(length, k_tokens.get(suite, K_TOKENS)) for length in lengths]
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
