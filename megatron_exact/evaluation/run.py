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
from megatron_exact.evaluation.engine import (
    Backend,
    generate_answers,
    load_model,
    load_tokenizer,
    require_lm_eval,
    scored_example,
)
from megatron_exact.evaluation.examples import Example, cell_path, read_scores, text_sha256, write_cell
from megatron_exact.evaluation.model_identity import max_positions, model_identity, read_provenance
from megatron_exact.evaluation.options import SUITES, SuiteOptions
from megatron_exact.evaluation.prompts import Prompts, read_template
from megatron_exact.evaluation.result_folders import RESULTS, Cell
from megatron_exact.evaluation.result_record import merged_info
from megatron_exact.evaluation.sample_cache import Document, cached_documents, default_cache
from megatron_exact.evaluation.suites import nolima, qa, ruler
from megatron_exact.evaluation.summary import write_summary
from megatron_exact.files import write_json

QA_WINDOW = 4096
"""Window of QA where the config names no number of positions; its prompts are far shorter."""
ESSAYS_DATASET = "baber/paul_graham_essays"


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
            ValueError: lm-eval is missing, no model, a window that the model cannot take, or a result
                folder of another model or other options.
        """
        self.model, self.results, self.options = Path(model), Path(results), options
        self.backend, self.load = backend or Backend(), load
        self.cache = cache or default_cache()
        lm_eval = require_lm_eval()
        identity = model_identity(self.model)
        self._check_windows()
        tokenizer = load_tokenizer(self.model)
        self.prompts = Prompts(tokenizer, read_template(options.template, tokenizer))
        self.record = {
            "options": options.record(),
            "template": self.prompts.template.record(),
            "sources": self._sources(),
        }
        self.info = merged_info(
            self.results,
            {"model": identity, "lm_eval": lm_eval, "provenance": read_provenance(self.model)},
            options.suite,
            self.record,
        )

    def run(self, on_cell: Callable[[CellResult], object] = lambda _: None) -> list[CellResult]:
        """Evaluate every cell that is not there yet; `on_cell` is called after each.

        Raises:
            ValueError: examples that cannot be made, or do not fit.
        """
        options = self.options
        cells = [
            Cell(suite=options.suite, task=task, length=length)
            for length in options.lengths or (0,)
            for task in options.chosen_tasks
        ]
        write_json(self.results / RESULTS, self.info)
        found = []
        with progress_bar(options.suite, len(cells), "cell") as bar:
            for cell in cells:
                is_new = not cell_path(self.results, cell).is_file()
                if is_new:
                    write_cell(self.results, cell, self._evaluate(cell))
                scores = read_scores(self.results, cell)
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
            run = (self.info["provenance"] or {}).get("run") or {}
            cpt_window = run.get("row_tokens") if isinstance(run.get("row_tokens"), int) else None
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

    @cached_property
    def _essays(self) -> str:
        """The essays of RULER."""
        if self.options.essays is not None:
            return self.options.essays.read_text(encoding="utf-8")
        import datasets

        try:
            return " ".join(datasets.load_dataset(ESSAYS_DATASET, split="train")["text"])
        except Exception as error:  # whatever the Hub's client raises without a network
            raise ValueError(
                f"RULER's essays cannot be downloaded ({type(error).__name__}): name a text with --essays"
            ) from error

    def _sources(self) -> dict[str, str]:
        """What the examples of this call are made from: name -> sha256."""
        options = self.options
        if options.suite == "ruler":
            needs = any(ruler.TASKS[task].needs_essays for task in options.chosen_tasks)
            return {"essays": text_sha256(self._essays)} if needs else {}
        if options.suite == "nolima":
            assert options.nolima_data is not None
            files = [nolima.data_sha256(options.nolima_data, task) for task in options.chosen_tasks]
        elif options.qa_data is not None:
            files = [qa.data_sha256(options.qa_data, task) for task in options.chosen_tasks]
        else:
            files = []  # the Hub's data sets: the hash of each prompt tells them apart
        return {name: digest for group in files for name, digest in group.items()}

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
            "sources": self._sources_of(cell),
            "tokenizer": self.info["model"]["tokenizer_sha256"],
            "template": self.prompts.template.record()["sha256"],
            "lm_eval": self.info["lm_eval"],
        }
        return cached_documents(self.cache, key, lambda: self._make(cell))

    def _sources_of(self, cell: Cell) -> dict[str, str]:
        """The part of the sources that one cell is made from."""
        if cell.suite == "nolima":
            assert self.options.nolima_data is not None
            return nolima.data_sha256(self.options.nolima_data, cell.task)
        return self.record["sources"] if ruler.TASKS[cell.task].needs_essays else {}

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
                essays=self._essays if ruler.TASKS[cell.task].needs_essays else None,
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
