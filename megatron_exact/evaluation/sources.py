"""What the examples of a suite are made from: essays, needle sets, data sets, and their hashes."""

from __future__ import annotations

from functools import cached_property

from megatron_exact.evaluation.examples import text_sha256
from megatron_exact.evaluation.options import SuiteOptions
from megatron_exact.evaluation.result_folders import Cell
from megatron_exact.evaluation.suites import nolima, qa, ruler
from megatron_exact.evaluation.text_files import read_text_file

ESSAYS_DATASET = "baber/paul_graham_essays"


class Sources:
    """Of one suite as a user asks for it."""

    def __init__(self, options: SuiteOptions) -> None:
        """`options` of the suite; nothing is read yet."""
        self.options = options

    @cached_property
    def essays(self) -> str:
        """Of RULER.

        Raises:
            ValueError: a file that cannot be read, or no network.
        """
        if self.options.essays is not None:
            return read_text_file(self.options.essays, "--essays")
        import datasets

        try:
            return " ".join(datasets.load_dataset(ESSAYS_DATASET, split="train")["text"])
        except Exception as error:  # whatever the Hub's client raises without a network
            raise ValueError(
                f"RULER's essays cannot be downloaded ({type(error).__name__}): name a text with --essays"
            ) from error

    @cached_property
    def digests(self) -> dict[str, str]:
        """Name -> sha256 of everything that the chosen tasks are made from; a name is a file's path.

        Raises:
            ValueError: data of a chosen task that is not there.
        """
        options = self.options
        if options.suite == "ruler":
            needs = any(ruler.TASKS[task].needs_essays for task in options.chosen_tasks)
            return {"essays": text_sha256(self.essays)} if needs else {}
        if options.suite == "nolima":
            assert options.nolima_data is not None
            files = [nolima.data_sha256(options.nolima_data, task) for task in options.chosen_tasks]
        elif options.qa_data is not None:
            files = [qa.data_sha256(options.qa_data, task, options.shots) for task in options.chosen_tasks]
        else:
            files = []  # the Hub's data sets: the hash of each prompt tells them apart
        return {name: digest for group in files for name, digest in group.items()}

    def of_cell(self, cell: Cell) -> dict[str, str]:
        """The part of `digests` that one cell of RULER or NoLiMa is made from."""
        if cell.suite == "nolima":
            assert self.options.nolima_data is not None
            return nolima.data_sha256(self.options.nolima_data, cell.task)
        return self.digests if ruler.TASKS[cell.task].needs_essays else {}
