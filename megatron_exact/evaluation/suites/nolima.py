"""NoLiMa (arXiv 2502.05167): needles that share no words with their questions.

Its data may be used for research only, so that none of it is here: users name their own copy, a folder

    DIR/needlesets/needle_set.json            the six needle sets, see `TASKS`
    DIR/haystack/rand_shuffle/*.txt           books

as `data/download_NoLiMa_data.sh` of the authors leaves it. A needle set is a list of objects with `id`,
`needle`, `questions` (kind -> text), `tests` (name -> {`input_args`, maybe `gold_answers`}), and maybe
`system_prompt`, `task_template`, `character_set`, `distractors` (kind -> text). `{1}`, `{2}`, ... stand for
the input arguments and `{CHAR}` for a name drawn from the character set, which then is the answer.

`examples/needles` is a small set of our own in the same form, for tests and demonstrations.

Every example lies at one of 26 depths from 0 to 100 %, taken in turn, so that all depths have the same
number of examples, or one more. Unlike the authors' windows, ours hold the whole prompt and what is
generated.

The haystack is a piece of a book, cut such that the prompt fills its window. Text is cut between tokens of
the book, but what counts is the number of tokens of the whole prompt after it is put together, since pieces
merge differently than they were cut: the cut is corrected until the count is right, or a token or two below
where no cut gives it exactly.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.command_line import positive_int
from megatron_exact.evaluation.prompts import Document, Prompts, cell_seed, read_text_file
from megatron_exact.evaluation.suites.suite import (
    K_TOKENS,
    GeneratedSuite,
    SuiteOption,
    SuiteOptions,
    register,
)
from megatron_exact.files import sha256_file
from megatron_exact.json_input import read_json

TASKS = (
    "needle_set",
    "needle_set_hard",
    "needle_set_w_Distractor",
    "needle_set_MC",
    "needle_set_ONLYDirect",
    "needle_set_w_CoT",
)
NEEDLE_FILE = "needlesets/{}.json"
PLACEMENTS = 26
GENERATION_TOKENS = 192
MAX_CORRECTIONS = 12
"""Cuts of the book that are tried until a prompt fills its window."""
DISTRACTOR_DISTANCE = 0.2
"""Share of the haystack that a distractor keeps from the needle at least."""
TASK_TEMPLATE = (
    "Read this part of a book and answer the question about it.\n\n{haystack}\n\n"
    "Question: {question}\nAnswer in a few words, without an explanation."
)
"""For needle sets that bring no `task_template`."""


@dataclass(frozen=True, kw_only=True)
class Needle:
    """One question of a needle set, its arguments filled in; `{CHAR}` is still open."""

    name: str
    """Experiment, test and kind of question."""
    group: str
    """Experiment and kind of question: needles of one group differ in their arguments alone."""
    needle: str
    """The sentence that holds the evidence."""
    question: str
    """What is asked."""
    distractor: str | None
    """A sentence that looks like evidence, or None."""
    characters: tuple[str, ...]
    """Names to draw from; empty where the answers are given."""
    answers: tuple[str, ...]
    """Given answers; empty where the drawn name is the answer."""
    template: str
    """Prompt with `{haystack}` and `{question}`."""


def book_files(folder: Path) -> list[Path]:
    """The books of the user's copy, in order.

    Raises:
        ValueError: none there.
    """
    found = sorted((folder / "haystack" / "rand_shuffle").glob("*.txt"))
    if not found:
        raise ValueError(f"{folder} has no haystack/rand_shuffle/*.txt: name the folder of NoLiMa's data")
    return found


def read_needles(path: Path) -> list[Needle]:
    """All questions of a needle set, in the order of the file.

    Raises:
        ValueError: a file that is no needle set; it says what is missing where.
    """
    content = read_json(path, "download NoLiMa's needle sets again")
    try:
        needles = [needle for experiment in content for needle in _needles_of(experiment)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no needle set ({error})") from error
    except KeyError as error:
        raise ValueError(f"{path} is no needle set: an entry has no {error}") from error
    if not needles:
        raise ValueError(f"{path} holds no question")
    return needles


def _needles_of(experiment: dict[str, Any]) -> Iterator[Needle]:
    system = experiment.get("system_prompt") or ""
    template = experiment.get("task_template") or TASK_TEMPLATE
    if "{haystack}" not in template or "{question}" not in template:
        raise ValueError(f"task_template of {experiment['id']} lacks {{haystack}} or {{question}}")
    for kind, question in experiment["questions"].items():
        for name, test in experiment["tests"].items():
            arguments = test["input_args"]
            distractor = (experiment.get("distractors") or {}).get(kind)
            needle = _with_arguments(experiment["needle"], arguments)
            answers = test.get("gold_answers") or ()
            answers = (answers,) if isinstance(answers, str) else tuple(answers)
            characters = tuple(experiment.get("character_set") or ())
            if not answers and ("{CHAR}" not in needle or not characters):
                raise ValueError(f"{experiment['id']}, {name} has neither gold_answers nor characters")
            yield Needle(
                name=f"{experiment['id']}_{name}_{kind}",
                group=f"{experiment['id']}_{kind}",
                needle=needle,
                question=_with_arguments(question, arguments),
                distractor=None if distractor is None else _with_arguments(distractor, arguments),
                characters=characters,
                answers=answers,
                template=f"{system}\n\n{template}" if system else template,
            )


def _with_arguments(text: str, arguments: Sequence[str]) -> str:
    for number, argument in enumerate(arguments, 1):
        text = text.replace(f"{{{number}}}", argument)
    return text


def _document(
    needle: Needle, depth: float, book: Book, length: int, draw: random.Random, prompts: Prompts
) -> Document:
    name = draw.choice(needle.characters) if needle.characters else ""
    start, distractor_draw = draw.random(), draw.random()
    insertions = [Insertion(text=needle.needle.replace("{CHAR}", name), depth=depth / 100)]
    if needle.distractor is not None:
        text = needle.distractor.replace("{CHAR}", name)
        insertions.append(Insertion(text=text, depth=_distractor_depth(depth / 100, distractor_draw)))
    question = needle.question.replace("{CHAR}", name)

    def text_with(haystack: str) -> str:
        return needle.template.replace("{question}", question).replace("{haystack}", haystack)

    haystack = fill(
        book,
        insertions,
        start=start,
        budget=length - GENERATION_TOKENS,
        measure=lambda text: prompts.count(prompts.render(text_with(text))),
    )
    text = text_with(haystack)
    return {
        "id": f"{needle.name}-{depth:g}",
        "input": text,
        "prefix": "",
        "outputs": list(needle.answers or (name,)),
        "depth": depth,
        "prompt_tokens": prompts.count(prompts.render(text)),
    }


def _distractor_depth(needle: float, draw: float) -> float:
    """Uniform over the depths that keep their distance from the needle."""
    low = max(0.0, needle - DISTRACTOR_DISTANCE)
    high = min(1.0, needle + DISTRACTOR_DISTANCE)
    place = draw * (low + 1 - high)
    return place if place < low else place - low + high


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """A sentence to put into the haystack."""

    text: str
    """The needle, or a distractor."""
    depth: float
    """Share of the haystack before it, 0..1."""


class Book:
    """A text and where its tokens begin."""

    def __init__(self, name: str, text: str, tokenizer: Any) -> None:
        """`tokenizer` of transformers, a fast one: its offsets say where tokens lie in the text."""
        if not tokenizer.is_fast:
            raise ValueError("NoLiMa needs a fast tokenizer (tokenizer.json): save one beside the model")
        self.name = name
        self.text = text
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = sorted({start for start, end in encoded["offset_mapping"] if end > start})
        self.starts = [*starts, len(text)]
        """Characters at which a token begins, and the end of the text."""

    @property
    def tokens(self) -> int:
        """How many cuts the text has."""
        return len(self.starts) - 1

    def cut(self, first: int, tokens: int) -> str:
        """`tokens` tokens of the text from token `first` on."""
        return self.text[self.starts[first] : self.starts[min(first + tokens, self.tokens)]]


def insert(haystack: str, insertions: list[Insertion]) -> str:
    """Put sentences on lines of their own at the line ends nearest to their depths.

    Depth 0 is before everything and depth 1 behind it. A text without line ends is split at white space.
    """
    ends = [i + 1 for i, character in enumerate(haystack) if character == "\n"]
    if not ends:
        ends = [i + 1 for i, character in enumerate(haystack) if character.isspace()]
    places = [0, *ends, len(haystack)]
    parts: list[str] = []
    last = 0
    for insertion in sorted(insertions, key=lambda item: item.depth):
        place = max(last, _nearest(places, insertion.depth * len(haystack)))
        before = haystack[last:place]
        parts += [before, "" if not before or before.endswith("\n") else "\n", insertion.text, "\n"]
        last = place
    return "".join([*parts, haystack[last:]])


def _nearest(places: list[int], target: float) -> int:
    right = min(bisect.bisect_left(places, target), len(places) - 1)
    left = max(0, right - 1)
    return places[left] if target - places[left] < places[right] - target else places[right]


def fill(
    book: Book,
    insertions: list[Insertion],
    *,
    start: float,
    budget: int,
    measure: Callable[[str], int],
) -> str:
    """A haystack with its insertions for which `measure` gives `budget` tokens, or barely less.

    Args:
        book: where the text comes from.
        insertions: needle and distractors.
        start: 0..1, where in the book to begin, as a share of the places where it can.
        budget: tokens that the whole prompt may have.
        measure: tokens of the whole prompt with a given haystack.

    Raises:
        ValueError: a book that is too short, or a budget that the prompt without a book exceeds.
    """
    empty = measure(insert("", insertions))
    wanted = budget - empty
    if wanted < 0:
        raise ValueError(
            f"a window leaves {budget:,} tokens for a prompt of {empty:,}: choose a longer one"
        )
    if wanted > book.tokens:
        raise ValueError(
            f"{book.name} has {book.tokens:,} tokens, this window needs {wanted:,}: choose shorter windows "
            "or a longer book"
        )
    # corrections may ask for a few tokens more than the first guess
    first = int(start * max(0, book.tokens - wanted - 2 * MAX_CORRECTIONS))
    best, best_count = insert("", insertions), empty
    for _ in range(MAX_CORRECTIONS):
        candidate = insert(book.cut(first, wanted), insertions)
        count = measure(candidate)
        if best_count < count <= budget:
            best, best_count = candidate, count
        if count == budget:
            break
        wanted = max(0, wanted + budget - count)
    return best


class NoLiMa(GeneratedSuite):
    """NoLiMa as a suite."""

    name = "nolima"
    title = "NoLiMa"
    tasks = TASKS
    options = (
        SuiteOption(
            flag="--nolima-data",
            parse=Path,
            metavar="DIR",
            help="NoLiMa: needlesets/ and haystack/rand_shuffle/",
        ),
        SuiteOption(
            flag="--placements",
            parse=positive_int,
            default=PLACEMENTS,
            help="NoLiMa: depths of the needle (%(default)s)",
        ),
    )
    shares_units = True
    k_tokens = (K_TOKENS, 1000)
    k_note = "its authors count 1000"

    def check(self, options: SuiteOptions) -> None:
        """Raise ValueError without data or depths."""
        if options["nolima_data"] is None:
            raise ValueError(
                "--nolima-data is needed: the folder of your copy of NoLiMa (docs/evaluation.md)"
            )
        if options["placements"] < 1:
            raise ValueError(f"{options['placements']} placements: give 1 or more")

    def record(self, options: SuiteOptions) -> dict[str, Any]:
        """Samples, seed, depths, generated tokens, metric."""
        return {
            "samples": options.effective_samples,
            "seed": options.seed,
            "placements": options["placements"],
            "generation_tokens": GENERATION_TOKENS,
            "metric": "contains",
        }

    def sources(self, task: str, options: SuiteOptions) -> dict[str, str]:
        """The needle set and the books."""
        folder: Path = options["nolima_data"]
        path = folder / NEEDLE_FILE.format(task)
        if not path.is_file():
            raise ValueError(f"{path} does not exist: name the folder of NoLiMa's data, or other --tasks")
        return {str(file.relative_to(folder)): sha256_file(file) for file in [path, *book_files(folder)]}

    def drawn_with(self, example: str) -> str:
        """The question, at whatever depth, length and in whatever set: its id without the depth."""
        return example.rpartition("-")[0] or example

    def generation_tokens(self, task: str) -> int:
        """As many as the authors let a model write."""
        return GENERATION_TOKENS

    def make_examples(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts
    ) -> list[Document]:
        """Make the examples of one cell: every question at every depth, unless --samples says fewer."""
        needles = read_needles(options["nolima_data"] / NEEDLE_FILE.format(task))
        books = [
            Book(path.name, read_text_file(path, "--nolima-data"), prompts.tokenizer)
            for path in book_files(options["nolima_data"])
        ]
        placements = options["placements"]
        # names, order and places are those of the set at every length, so that lengths are comparable
        draw = random.Random(cell_seed(options.seed, self.name, task))
        order = [draw.sample(range(len(needles)), len(needles)) for _ in range(placements)]
        most = len(needles) * placements
        count = most if options.samples is None else options.samples
        if count > most:
            raise ValueError(
                f"{task} has {len(needles):,} questions at {placements} depths, "
                f"fewer than {count:,} samples"
            )
        documents = []
        for number in range(count):
            placement = number % placements
            needle = needles[order[placement][number // placements]]
            depth = 100 * placement / (placements - 1) if placements > 1 else 50.0
            book = books[draw.randrange(len(books))]
            documents.append(_document(needle, depth, book, length, draw, prompts))
        return documents

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """`contains`: 1 if one of the answers stands in the prediction, letter for letter."""
        return float(any(reference in prediction for reference in references))


register(NoLiMa())
