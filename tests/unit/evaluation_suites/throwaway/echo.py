"""A throw-away suite in one file: say a word again that a text of numbers hides."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from megatron_exact.command_line import positive_int
from megatron_exact.evaluation.prompts import Document, Prompts, cell_seed
from megatron_exact.evaluation.suites.suite import GeneratedSuite, SuiteOption, SuiteOptions, register

WORDS = ("anchor", "button", "candle", "drawer", "engine", "flower")


class Echo(GeneratedSuite):
    """Two tasks; each word is asked several times, and its questions belong together."""

    name = "echo"
    title = "Echo (throw-away)"
    tasks = ("repeat", "practice")
    options = (
        SuiteOption(
            flag="--echo-times", parse=positive_int, default=2, help="questions a word (%(default)s)"
        ),
    )
    default_samples = 8
    shares_units = True
    k_tokens = (1000, 1024)
    k_note = "1000 like a clerk, 1024 like an engineer"

    def record(self, options: SuiteOptions) -> dict[str, Any]:
        """Return what decides the examples."""
        return {"samples": options.effective_samples, "seed": options.seed, "times": options["echo_times"]}

    def generation_tokens(self, task: str) -> int:
        """A word has few tokens."""
        return 16

    def make_examples(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts
    ) -> list[Document]:
        """Fill a window with numbers around a word."""
        draw = Random(cell_seed(options.seed, self.name, task, length))
        made = []
        for number in range(options.effective_samples or 0):
            unit, time = divmod(number, options["echo_times"])
            word = WORDS[unit % len(WORDS)]
            text = f"The word is {word}. Which word is it?"
            while True:
                longer = f"{draw.randrange(100)} {text}"
                if prompts.count(prompts.render(longer)) + self.generation_tokens(task) > length:
                    break
                text = longer
            made.append({"id": f"{word}{unit}-{time}", "input": text, "prefix": "", "outputs": [word]})
        return made

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 for the word."""
        return float(references[0] in prediction)

    def drawn_with(self, example: str) -> str:
        """All questions about a word."""
        return example.partition("-")[0]

    def weight(self, task: str) -> float:
        """Practice counts in no average."""
        return 0.0 if task == "practice" else 1.0


register(Echo())
