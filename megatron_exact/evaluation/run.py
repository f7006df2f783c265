"""`tools/evaluate_model.py`: one suite on one model, cell by cell, into a result folder.

The folder belongs to one model, and a suite in it to one set of options: a second call goes on where the
first ended, adds suites, tasks or lengths, and refuses to mix what does not belong together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation.backend import Backend, resolve
from megatron_exact.evaluation.engine import (
    generate_answers,
    load_model,
    load_tokenizer,
    require_eos,
    require_lm_eval,
    scored_example,
)
from megatron_exact.evaluation.examples import Example, cell_path, read_scores, write_cell
from megatron_exact.evaluation.model_identity import (
    max_positions,
    model_identity,
    read_provenance,
    require_model_folder,
)
from megatron_exact.evaluation.options import SUITES, SuiteOptions
from megatron_exact.evaluation.prompts import NO_TEMPLATE, Prompts, read_template
from megatron_exact.evaluation.result_folders import Cell
from megatron_exact.evaluation.result_record import forget_cell, merged_info, record_cell, write_merged
from megatron_exact.evaluation.sample_cache import Document, cached_documents, default_cache
from megatron_exact.evaluation.sources import Sources
from megatron_exact.evaluation.suites import nolima, qa, ruler
from megatron_exact.evaluation.summary import write_summary
from megatron_exact.evaluation.training_history import is_tuned_on_answers, trained_window
from megatron_exact.files import sha256_file
from megatron_exact.folder_lock import held_output

QA_WINDOW = 4096
"""Window of QA where the config names no number of positions; its prompts are far shorter."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
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
            results: folder to write, or to go on with.
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
        self.load = load
        self.cache = cache or default_cache()
        lm_eval = require_lm_eval()
        require_model_folder(self.model)
        self.backend = resolve(backend or Backend(), self.model)
        provenance = read_provenance(self.model)
        self._check_windows()
        tokenizer = load_tokenizer(self.model)
        require_eos(tokenizer, self.model)
        self.prompts = Prompts(tokenizer, read_template(self._template_option(provenance), tokenizer))
        self.sources = Sources(options)
        self.record = {
            "options": options.record(),
            "template": self.prompts.template.record(),
            "sources": self.sources.digests,
        }
        self.about = {
            "model": model_identity(self.model),
            "lm_eval": lm_eval,
            "provenance": provenance,
            "backend": self.backend.record(),
        }
        self.info = merged_info(self.results, self.about, options.suite, self.record)

    def run(self, on_cell: Callable[[CellResult], object] = lambda _: None) -> list[CellResult]:
        """Evaluate every cell that is not there yet; `on_cell` is called after each.

        Raises:
            ValueError: examples that cannot be made, or do not fit, or another call evaluates this suite.
        """
        self.info = write_merged(self.results, self.about, self.options.suite, self.record)
        suite = self.results / self.options.suite
        with held_output(suite, "evaluating it", "choose another --output"):
            return self._run(on_cell)

    def _run(self, on_cell: Callable[[CellResult], object]) -> list[CellResult]:
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
                result = CellResult(
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
        cells = [
            Cell(suite=path.parts[-3], task=path.parts[-2], length=int(path.stem))
            for suite in SUITES
            for path in sorted((self.results / suite).glob("*/*.jsonl"))
        ]
        return write_summary(self.results, model or self.info["model"]["name"], cpt_window, cells)

    @cached_property
    def loaded(self) -> Any:
        """The model of lm-eval, loaded when the first cell needs it."""
        return self.load(self.model, self.prompts, self.backend, self.window)

    @property
    def window(self) -> int:
        """The longest window of this call."""
        return max(self.options.lengths, default=max_positions(self.model) or QA_WINDOW)

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
        options = self.options
        if cell.suite == "qa":
            return qa.evaluate_task(
                self.loaded,
                cell.task,
                samples=options.samples,
                shots=options.shots,
                data=options.qa_data,
                prompts=self.prompts,
                window=self.window,
            )
        is_ruler = cell.suite == "ruler"
        documents = self._documents(cell)
        answers = generate_answers(
            self.loaded,
            cell.task,
            documents,
            generation_tokens=(
                ruler.TASKS[cell.task].generation_tokens if is_ruler else nolima.GENERATION_TOKENS
            ),
            delimiter=ruler.TASKS[cell.task].delimiter if is_ruler else "",
            prompts=self.prompts,
            window=cell.length,
        )
        score = ruler.score_answer if is_ruler else nolima.score_answer
        return [
            scored_example(document, prompt, answer, score(answer, document["outputs"]), self.prompts)
            for document, (prompt, answer) in zip(documents, answers, strict=True)
        ]

    def _documents(self, cell: Cell) -> list[Document]:
        """The examples of a cell, from the cache where they are there."""
        key = {
            "suite": cell.suite,
            "task": cell.task,
            "length": cell.length,
            "options": self.record["options"],
            "sources": self.sources.of_cell(cell),
            "tokenizer": self.info["model"]["tokenizer_sha256"],
            "template": self.prompts.template.record()["sha256"],
            "lm_eval": self.info["lm_eval"],
        }
        return cached_documents(self.cache, key, lambda: self._make(cell))

    def _make(self, cell: Cell) -> list[Document]:
        options = self.options
        if cell.suite == "ruler":
            assert options.effective_samples is not None
            return ruler.make_examples(
                cell.task,
                cell.length,
                samples=options.effective_samples,
                seed=options.seed,
                prompts=self.prompts,
                essays=self.sources.essays if ruler.TASKS[cell.task].needs_essays else None,
            )
        assert options.nolima_data is not None
        return nolima.make_examples(
            cell.task,
            cell.length,
            folder=options.nolima_data,
            samples=options.samples,
            placements=options.placements,
            seed=options.seed,
            prompts=self.prompts,
        )
