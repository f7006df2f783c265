"""What a benchmark is to this package: tasks, examples, scores, options, and how its cells are averaged.

A suite is one file of this folder. Its last line registers it:

    register(Ruler())

Nothing else names it. `evaluate_model.py` takes its name and its options from here, and the evaluation its
tasks and examples. The comparison asks which examples were drawn together and how much a task counts, and
the report asks for the title. docs/extending.md shows a whole suite.

Result folders may hold suites that are not registered here, because somebody else made them. They are
compared and reported under the name of their folder, each example by itself and all tasks alike.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar

from megatron_exact.command_line import ArgumentError
from megatron_exact.evaluation import suites
from megatron_exact.evaluation.engine import Engine
from megatron_exact.evaluation.prompts import Document, Prompts, plain_prompt
from megatron_exact.evaluation.result_folders import Cell, CellExamples, Example, text_sha256

K_TOKENS = 1024
"""What K means, as in the paper's windows."""


@dataclass(frozen=True, kw_only=True)
class TokenLength:
    """A length as a user writes it: `1536`, `1.5K`."""

    number: Fraction
    """Without its unit."""
    is_in_k: bool
    """Whether K follows."""

    def __str__(self) -> str:
        return f"{float(self.number):g}K" if self.is_in_k else str(self.number)

    def tokens(self, k_tokens: int) -> int:
        """The length in tokens. Raises ValueError if that is not a whole number."""
        value = self.number * (k_tokens if self.is_in_k else 1)
        if value.denominator != 1:
            raise ValueError(f"{self} is not a whole number of tokens where K means {k_tokens:,}")
        return int(value)


def token_lengths(text: str) -> tuple[TokenLength, ...]:
    """argparse type: `512,1K,1.5K`, each above 0 and a whole number of tokens."""
    lengths = []
    for word in text.split(","):
        is_in_k = word.strip().upper().endswith("K")
        try:
            length = TokenLength(number=Fraction(word.strip().rstrip("kK")), is_in_k=is_in_k)
            if length.number <= 0 or not _is_whole(length):
                raise ValueError("not above 0, or not a whole number of tokens")
        except (ValueError, ZeroDivisionError):
            raise ArgumentError(f"{word!r} is not a length such as 1024 or 1.5K") from None
        lengths.append(length)
    return tuple(lengths)


def protocol_parser(protocols: Sequence[str]) -> Callable[[str], str]:
    """Return an argparse type that takes one of these names."""

    def parse(text: str) -> str:
        if text not in protocols:
            raise ArgumentError(f"{text!r} is not a protocol: choose {' or '.join(protocols)}")
        return text

    return parse


def _is_whole(length: TokenLength) -> bool:
    """Whether a length is a whole number of tokens for a meaning of K; `tokens` checks a suite's."""
    meanings = {k_tokens for suite in registered().values() for k_tokens in suite.k_tokens}
    return any(
        (length.number * k_tokens).denominator == 1 for k_tokens in (meanings if length.is_in_k else (1,))
    )


@dataclass(frozen=True, kw_only=True)
class SuiteOption:
    """An option of the command line that some suites read and the others refuse."""

    flag: str
    """Such as `--essays`."""
    help: str
    """For `--help`."""
    parse: Callable[[str], Any] = str
    """Like argparse's `type`."""
    default: Any = None
    """Value where a user says nothing."""
    metavar: str | None = None
    """Like argparse's."""

    @property
    def name(self) -> str:
        """Key of the value, such as `essays`."""
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """One suite as a user asks for it: what decides the examples and what counts as right."""

    suite: str
    """Name of a registered suite."""
    lengths: tuple[int, ...] = ()
    """Windows in tokens, prompt and generation together; empty for a suite without lengths."""
    tasks: tuple[str, ...] = ()
    """Some of the suite's tasks; empty: all."""
    samples: int | None = None
    """Examples a cell; None: the suite's own number, or all that there are."""
    seed: int = 0
    """Seed of the generated examples."""
    template: str | None = None
    """`none`, `model` or a file, see `prompts.read_template`; None: not said."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Values of the suite's own options by name; those of other suites may stand here at their defaults."""
    allow_beyond_positions: bool = False
    """Whether a window may exceed the model's max_position_embeddings."""
    _made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        suite = registered().get(self.suite)
        if suite is None:
            raise ValueError(f"{self.suite!r} is not a suite: choose one of {', '.join(registered())}")
        unknown = set(self.tasks) - set(suite.tasks)
        if unknown:
            raise ValueError(
                f"{self.suite} has no task {min(unknown)!r}: choose from {', '.join(suite.tasks)}"
            )
        if self.lengths and not suite.has_lengths:
            raise ValueError(f"--lengths has no meaning for {self.suite}: leave it out")
        known = {option.name: option for option in all_options()}
        for name, value in self.own.items():
            if name not in known:
                raise ValueError(f"no suite has the option {name!r}: choose from {', '.join(known)}")
            if known[name] not in suite.options and value != known[name].default:
                readers = [other.name for other in registered().values() if known[name] in other.options]
                raise ValueError(
                    f"{known[name].flag} has no meaning for {self.suite}, only for "
                    f"{' and '.join(readers)}: leave it out"
                )
        if suite.has_lengths and not self.lengths:
            raise ValueError(f"--lengths is needed for {self.suite}, such as 1K,2K")
        if len(set(self.lengths)) != len(self.lengths):
            raise ValueError(f"--lengths {self.lengths}: give each length once")
        suite.check(self)

    def __getitem__(self, name: str) -> Any:
        """The value of one of the suite's own options."""
        defaults = {option.name: option.default for option in registered()[self.suite].options}
        return self.own.get(name, defaults[name])

    @property
    def chosen_tasks(self) -> tuple[str, ...]:
        """The tasks to run, in the suite's order."""
        return tuple(
            task for task in registered()[self.suite].tasks if not self.tasks or task in self.tasks
        )

    @property
    def effective_samples(self) -> int | None:
        """`samples`, with the suite's own number where a user says nothing."""
        return registered()[self.suite].default_samples if self.samples is None else self.samples

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Make something at the first call and return it at every one: a file is read and hashed once."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class Suite(ABC):
    """One benchmark. `GeneratedSuite` is the base of those whose examples are made here."""

    name: str
    """Folder of its results, and value of `--suite`."""
    title: str
    """Name in tables."""
    tasks: tuple[str, ...] = ()
    """Its tasks, in order; with its lengths they span the cells."""
    options: tuple[SuiteOption, ...] = ()
    """Options that it reads besides those of every suite."""
    has_lengths: ClassVar[bool] = True
    """Whether its examples come at several lengths. Cells without one have length 0 and no regime."""
    default_samples: ClassVar[int | None] = None
    """Examples a cell where a user says nothing; None: all that there are."""
    shares_units: ClassVar[bool] = False
    """Whether a unit of `drawn_with` is the same in every cell, as a question at several lengths is."""
    k_tokens: ClassVar[tuple[int, ...]] = (K_TOKENS,)
    """What K may mean in its lengths; the first unless compare_runs.py is told another one."""
    k_note: ClassVar[str] = ""
    """Why there is a choice, for `--help`."""

    @abstractmethod
    def record(self, options: SuiteOptions) -> dict[str, Any]:
        """Return what decides the examples of a cell, for results.json; no tasks, lengths or paths."""

    @abstractmethod
    def evaluate(
        self, task: str, length: int, options: SuiteOptions, engine: Engine, documents: Documents
    ) -> list[Example]:
        """Evaluate one cell: the examples of `engine.share`, in the order of the cell.

        Args:
            task: one of `tasks`.
            length: tokens of the window; 0 for a suite without lengths.
            options: of the user.
            engine: model and prompts.
            documents: returns generated examples, from the cache where they are there.

        Raises:
            ValueError: examples that cannot be made, or do not fit their window.
        """

    def check(self, options: SuiteOptions) -> None:  # noqa: B027
        """Raise ValueError for values of its own options that cannot be, or do not go together."""

    def sources(self, task: str, options: SuiteOptions) -> dict[str, str]:
        """Name -> sha256 of what the examples of a task are made from; a name is a file's path.

        Raises:
            ValueError: data that is not there.
        """
        return {}

    def k_of_options(self, own: Mapping[str, Any]) -> int:
        """What K means in --lengths, given the values of the suite's own options."""
        return self.k_tokens[0]

    def k_of_record(self, record: Mapping[str, Any]) -> int:
        """What K means in lengths of results with this record (`record`; empty in older folders)."""
        return self.k_tokens[0]

    def window(self, length: int, options: SuiteOptions) -> int:
        """Tokens that the model must take for examples of a length, generated ones included."""
        return length

    def system(self, options: SuiteOptions) -> str:
        """System message before the user's text, for models with a chat template; empty for none."""
        return ""

    def prompt_rows(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts, documents: Documents
    ) -> list[dict[str, Any]]:
        """What would be sent for one cell, without a model: rows of `--prompts-only`.

        Returns:
            Objects with `id`, `prompt` (the user's text, with the start of the answer), `references`, and
            maybe `depth`, `book`, `question`, `prefix`.
        """
        raise NotImplementedError(f"{self.name} has no prompts without a model")

    def score_by_record(
        self, task: str, prediction: str, references: Sequence[str], record: Mapping[str, Any]
    ) -> float | None:
        """The score that an answer had, recomputed; None for a suite that scores more than answers."""
        return None

    def digest(self, cells: Mapping[Cell, CellExamples], record: Mapping[str, Any]) -> dict[str, Any]:
        """What the suite's authors report over all cells, for `<suite>/digest.json`; empty for nothing."""
        return {}

    def drawn_with(self, example: str) -> str:
        """The unit that an example (its id) was drawn with; examples of one unit vary together."""
        return example

    def weight(self, task: str) -> float:
        """How much a task's cells count in averages over cells, relative to the others; 0: not at all."""
        return 1.0


Documents = Callable[[Callable[[], list[Document]]], list[Document]]
"""Returns what its argument makes, from the cache of examples where it is there."""


class GeneratedSuite(Suite):
    """A suite whose prompts are made here and answered by greedy generation."""

    @abstractmethod
    def generation_tokens(self, task: str) -> int:
        """Tokens that the model may write."""

    @abstractmethod
    def make_examples(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts
    ) -> list[Document]:
        """Make the examples of one cell.

        Returns:
            Objects with `id` (unique in the cell), `input`, `prefix` (start of the answer, maybe empty),
            `outputs` (the references), and maybe `depth` (percent of the haystack's tokens before the
            needle), `question` and `book` (names).

        Raises:
            ValueError: a window that is too short, or data that is missing or damaged.
        """

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return what an answer is worth, 0..1."""

    def delimiter(self, task: str) -> str:
        """What stands between an example's text and the start of its answer."""
        return ""

    def starts_are_raw(self, options: SuiteOptions) -> bool:
        """Whether starts of answers follow the rendered prompt as they are, with no delimiter.

        Otherwise a chat template gets them as the beginning of the assistant's message, and may strip them.
        """
        return False

    def score_by_record(
        self, task: str, prediction: str, references: Sequence[str], record: Mapping[str, Any]
    ) -> float | None:
        """`score`, unless a suite's record names another metric."""
        return self.score(prediction, references)

    def prompt_rows(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts, documents: Documents
    ) -> list[dict[str, Any]]:
        """Make the examples; the user's text is what a model without a template is given."""
        made = documents(lambda: self.make_examples(task, length, options, prompts))
        delimiter = "" if self.starts_are_raw(options) else self.delimiter(task)
        return [
            {
                "id": document["id"],
                "prompt": plain_prompt(document["input"], document["prefix"], delimiter),
                "prefix": document["prefix"],
                "depth": document.get("depth"),
                "book": document.get("book"),
                "question": document.get("question"),
                "references": document["outputs"],
            }
            for document in made
        ]

    def evaluate(
        self, task: str, length: int, options: SuiteOptions, engine: Engine, documents: Documents
    ) -> list[Example]:
        """Make the examples, let the model answer, score the answers."""
        made = documents(lambda: self.make_examples(task, length, options, engine.prompts))
        own = [
            document for number, document in enumerate(made) if engine.share.has(engine.examples + number)
        ]
        record = self.record(options)
        answers = engine.answers(
            task,
            made,
            generation_tokens=self.generation_tokens(task),
            delimiter=self.delimiter(task),
            window=self.window(length, options),
            system=self.system(options),
            starts_are_raw=self.starts_are_raw(options),
        )
        return [
            Example(
                id=document["id"],
                prompt_sha256=text_sha256(prompt),
                prompt_tokens=engine.prompts.count(prompt),
                prediction=answer,
                references=tuple(document["outputs"]),
                score=self.score_by_record(task, answer, document["outputs"], record) or 0.0,
                depth=document.get("depth"),
                question=document.get("question"),
                book=document.get("book"),
                prompts=(prompt,) if engine.keep_prompts else None,
            )
            for document, (prompt, answer) in zip(own, answers, strict=True)
        ]


class _Unregistered(Suite):
    """A suite that is known by the name of its folder only: its results are read, it is never run."""

    def __init__(self, name: str) -> None:
        self.name = self.title = name

    def record(self, options: SuiteOptions) -> dict[str, Any]:
        raise AssertionError("SuiteOptions refuses suites that are not registered")

    def evaluate(self, *_: Any) -> list[Example]:
        raise AssertionError("SuiteOptions refuses suites that are not registered")


_REGISTERED: dict[str, Suite] = {}


def register(suite: Suite) -> None:
    """Let a suite be evaluated, compared and reported: the last line of its file."""
    other = _REGISTERED.setdefault(suite.name, suite)
    if type(other) is not type(suite):
        raise ValueError(
            f"the suites {type(other).__name__} and {type(suite).__name__} are both called {suite.name!r}: "
            "rename one of them"
        )


def registered() -> Mapping[str, Suite]:
    """All suites by name, in alphabetical order: those of every file of this folder."""
    _import_files(tuple(suites.__path__))
    return dict(sorted(_REGISTERED.items()))


@cache
def _import_files(folders: tuple[str, ...]) -> None:
    for module in pkgutil.iter_modules(folders):
        importlib.import_module(f"{suites.__name__}.{module.name}")


def find_suite(name: str) -> Suite:
    """The suite of a folder of results, whether it is registered or not."""
    return registered().get(name) or _Unregistered(name)


def all_options() -> list[SuiteOption]:
    """The options of all suites, each once."""
    return list(dict.fromkeys(option for suite in registered().values() for option in suite.options))
