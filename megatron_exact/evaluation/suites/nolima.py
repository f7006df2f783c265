"""NoLiMa (arXiv 2502.05167): needles that share no words with their questions, by one of two protocols.

`official`, the default, sends what the authors' code sends (adobe-research/NoLiMa, commit 7532e4e). There a
length is that of the haystack, and K means 1,000 tokens. The needle ends the line before its place, at an
exact token depth. Every question is asked at 26 depths in every book, from its beginning. Names are drawn
by numpy's generator from the seed 42 + id + number of the book, and a system message stands before the
user's text. `window` is this project's own. There a length is the whole prompt with what is generated, the
needle stands on a line of its own, and each example has a random piece of a random book.

The data may be used for research only, so none of it is included: users name their own copy, a folder

    DIR/needlesets/needle_set.json            the six needle sets, see `TASKS`
    DIR/haystack/rand_shuffle/*.txt           books

as `data/download_NoLiMa_data.sh` of the authors leaves it. A needle set is a list of objects with `id`,
`needle`, `questions` (kind -> text), `tests` (name -> {`input_args`, maybe `gold_answers`}), and maybe
`system_prompt`, `task_template`, `character_set`, `distractors` (kind -> text). `{1}`, `{2}`, ... stand for
the input arguments and `{CHAR}` for a name drawn from the character set, which then is the answer.
`examples/needles` is a small set of our own in the same form, for tests and demonstrations.

The authors' template for sets that bring none is not here either: it is read, not run, from
`evaluation/run_tests.py` beside their data folder, or from `--nolima-template`.
"""

from __future__ import annotations

import ast
import bisect
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.command_line import ArgumentError, positive_int
from megatron_exact.evaluation.needle_sets import Needle, doubts_about, read_needles
from megatron_exact.evaluation.prompts import Document, Prompts, cell_seed, read_text_file
from megatron_exact.evaluation.result_folders import Cell, CellExamples, text_sha256
from megatron_exact.evaluation.suites.suite import (
    K_TOKENS,
    GeneratedSuite,
    SuiteOption,
    SuiteOptions,
    protocol_parser,
    register,
)
from megatron_exact.files import sha256_file

TASKS = (
    "needle_set",
    "needle_set_hard",
    "needle_set_w_Distractor",
    "needle_set_MC",
    "needle_set_ONLYDirect",
    "needle_set_w_CoT",
)
NEEDLE_FILE = "needlesets/{}.json"
OFFICIAL, WINDOW = "official", "window"
PROTOCOLS = (OFFICIAL, WINDOW)
OFFICIAL_K_TOKENS = 1000
SYSTEM = "You are a helpful assistant"
"""System message of the official protocol, whatever `system_prompt` of a set says."""
BASE_SEED = 42
PLACEMENTS = 26
GENERATION_TOKENS = 192
PROMPT_TOKENS = 512
"""Room of the official protocol for all that is neither haystack nor generated."""
METRICS = ("EM", "contains", "lastline_EM", "lastline_contains")
TASK_METRICS = {"needle_set_w_CoT": "lastline_contains"}
"""Of the official protocol (the paper's appendix C); the other sets have `contains`, as in its configs."""
BASE_LENGTHS = (250, 500, 1000)
EFFECTIVE_SHARE = 0.85
FREE_ZONE = 0.2
"""Share of the haystack that a distractor keeps from the needle at least, and officially from both ends."""
SHORT_HAYSTACK = 500
"""Below this many tokens the official distractor has one of three fixed depths."""
TEMPLATE_SHA256 = "e6167bd1232798601988f4b53017a78414023cccd07b1c136c4415b087ea6754"
TEMPLATE_FILE, TEMPLATE_NAME = "evaluation/run_tests.py", "DEFAULT_TASK_TEMPLATE"
MAX_CORRECTIONS = 12
"""Cuts of the book that are tried until a prompt fills its window."""
CORRECTION_TOKENS = 24
"""Tokens of the book that are left for a cut that has to be longer than the first one."""
TASK_TEMPLATE = (
    "Read this part of a book and answer the question about it.\n\n{haystack}\n\n"
    "Question: {question}\nAnswer in a few words, without an explanation."
)
"""Of the window protocol, for needle sets that bring no `task_template`."""


def book_files(folder: Path) -> list[Path]:
    """The books of the user's copy, in order.

    Raises:
        ValueError: none there.
    """
    found = sorted((folder / "haystack" / "rand_shuffle").glob("*.txt"))
    if not found:
        raise ValueError(f"{folder} has no haystack/rand_shuffle/*.txt: name the folder of NoLiMa's data")
    return found


def published_template(folder: Path, named: Path | None) -> str:
    """The authors' template for sets without one, from a file or from their code beside the data.

    Raises:
        ValueError: not there, or another text.
    """
    if named is not None:
        text = read_text_file(named, "--nolima-template")
    else:
        code = folder.resolve().parent / TEMPLATE_FILE
        if not code.is_file():
            raise ValueError(
                f"a needle set has no task_template and {code} is not there: put {folder} into a copy of "
                f"the authors' repository, or give their {TEMPLATE_NAME} as a file with --nolima-template"
            )
        text = _assigned_text(code, TEMPLATE_NAME)
    if text_sha256(text) != TEMPLATE_SHA256:
        raise ValueError(
            f"{named or code}: this is not the template that NoLiMa was published with (commit 7532e4e): "
            f"give that one, a task_template in each set, or --nolima-protocol {WINDOW}"
        )
    return text


def _assigned_text(code: Path, name: str) -> str:
    """The text that a Python file assigns to a name; the file is parsed and never run."""
    try:
        tree = ast.parse(read_text_file(code, "--nolima-data"))
    except SyntaxError as error:
        raise ValueError(f"{code} is not a Python file ({error}): give --nolima-template") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == [
            name
        ]:
            value = node.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    raise ValueError(f"{code} assigns no text to {name}: give --nolima-template")


def spread(depths: int, questions: int, books: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Every (depth, question, book) once, such that the first N of any number are spread over all three.

    Depths come in van der Corput's order (0, 1/2, 1/4, 3/4, ...), so that each run of `depths` examples has
    every depth once. Questions, in an order drawn from the seed, and books go round at the same time; a
    round that would repeat an earlier one is shifted by one.
    """
    depth_order = sorted(range(depths), key=lambda depth: _reversed_bits(depth, depths))
    question_order = random.Random(cell_seed(seed, "questions")).sample(range(questions), questions)
    pairs = depths * questions
    for number in range(pairs * books):
        turn, place = divmod(number, pairs)
        depth = depth_order[place % depths]
        question = question_order[(place + place // math.lcm(depths, questions)) % questions]
        book = (place + place // math.lcm(depths, books) + turn) % books
        yield depth, question, book


def _reversed_bits(number: int, count: int) -> int:
    width = max(1, (count - 1).bit_length())
    return int(f"{number:0{width}b}"[::-1], 2)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A haystack with its needle."""

    text: str
    """All of it."""
    tokens_before: int
    """Tokens of the haystack before the needle."""


class TokenBook:
    """A book as its tokens, and the tokens after which a needle may stand: those with a line end."""

    def __init__(self, name: str, text: str, tokenizer: Any) -> None:
        """`tokenizer` of transformers; the book is encoded once, without special tokens."""
        self.name = name
        self.tokenizer = tokenizer
        self.ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ends_a_line = {token: "\n" in tokenizer.decode([token]) for token in set(self.ids)}
        ends = [place for place, token in enumerate(self.ids) if ends_a_line[token]]
        self.places = np.array([0, *ends])
        """[line ends + 1], int64: positions of tokens; the beginning counts as one."""

    def place(self, sentence: str, depth: float, tokens: int) -> Placement:
        """A sentence at the end of a line, after exactly `round(depth * tokens)` of `tokens` tokens.

        The line end is the first one that is deep enough; the window of `tokens` tokens is moved until the
        depth is right. Text after the last newline inside the line end's token is dropped.

        Raises:
            ValueError: the book is too short.
        """
        beyond = self.places / (tokens + 1) - depth
        beyond[beyond < 0] = np.inf
        end = int(self.places[int(np.argmin(beyond))])
        before = int(np.round(tokens * depth))
        start = end - before
        if start < 0 or start + tokens > len(self.ids):
            raise ValueError(
                f"{self.name} has {len(self.ids):,} tokens, {tokens:,} with the needle at "
                f"{100 * depth:g} % do not fit: choose shorter --lengths or longer books"
            )
        above = self.tokenizer.decode(self.ids[start : end + 1])
        below = self.tokenizer.decode(self.ids[end + 1 : start + tokens])
        above = above[: max(above.rfind("\n"), 0)]
        return Placement(text=f"{above} {sentence}\n{below}", tokens_before=before)

    def place_both(self, needle: str, distractor: str, depth: float, far: float, tokens: int) -> Placement:
        """A needle, and a distractor at the depth `far`, found again by the letters that stand before it.

        Raises:
            ValueError: the book is too short, or these letters do not stand once in the needle's haystack.
        """
        reach, offset = (50, 49) if tokens >= SHORT_HAYSTACK else (25, 23)
        other = self.place(distractor, far, tokens).text
        found = other.index(distractor)
        letters = other[max(found - reach, 0) : found - 1]
        placed = self.place(needle, depth, tokens)
        if placed.text.count(letters) != 1:
            raise ValueError(
                f"{self.name}: what stands before the distractor at {100 * far:.1f} % stands "
                f"{placed.text.count(letters)} times around the needle at {100 * depth:g} %: "
                "the official protocol needs another book or length"
            )
        cut = placed.text.index(letters) + offset
        text = f"{placed.text[:cut]} {distractor}\n{placed.text[cut:]}"
        return Placement(text=text, tokens_before=placed.tokens_before)


def official_distractor_depth(depth: float, draw: np.random.RandomState, tokens: int) -> float:
    """Return the depth of the distractor: uniform outside the free zones of the needle and of both ends.

    In haystacks shorter than `SHORT_HAYSTACK` it is one of three fixed depths; one number is drawn anyway.
    """
    left = max(0, depth - 2 * FREE_ZONE)
    right = max(0, 1 - (depth + 2 * FREE_ZONE))
    drawn = float(draw.uniform(0, left + right))
    if tokens < SHORT_HAYSTACK:
        return 0.7 if depth < 0.6 else 0.6 if depth > 0.75 else 0.5
    return depth + FREE_ZONE + (drawn - left) if drawn > left else drawn + FREE_ZONE


@dataclass(frozen=True, kw_only=True)
class OfficialDraw:
    """What the authors' code draws for one question at one depth in one book."""

    depth: float
    """0..1, nominal."""
    name: str
    """From the character set; empty where answers are given."""
    distractor: float | None
    """Depth of the distractor, 0..1."""


def official_draws(needle: Needle, book: int, placements: int, tokens: int) -> list[OfficialDraw]:
    """All draws of one question in one book, in the order of the depths: they share one generator."""
    draw = np.random.RandomState(BASE_SEED + _seed_of(needle) + book)
    found = []
    for percent in np.linspace(0, 100, placements):
        depth = percent / 100
        name = str(draw.choice(list(needle.characters))) if needle.draws_a_name else ""
        far = (
            None if needle.published_distractor is None else official_distractor_depth(depth, draw, tokens)
        )
        found.append(OfficialDraw(depth=float(depth), name=name, distractor=far))
    return found


def _seed_of(needle: Needle) -> int:
    return int(needle.name[:4])


def _distractor_depth(needle: float, draw: float) -> float:
    """Uniform over the depths that keep their distance from the needle."""
    low = max(0.0, needle - FREE_ZONE)
    high = min(1.0, needle + FREE_ZONE)
    place = draw * (low + 1 - high)
    return place if place < low else place - low + high


def _own_document(
    needle: Needle, depth: float, book: Book, length: int, draw: random.Random, prompts: Prompts
) -> Document:
    name = draw.choice(needle.characters) if needle.draws_a_name else ""
    start, distractor_draw = draw.random(), draw.random()
    sentence = needle.needle.replace("{CHAR}", name)
    insertions = [Insertion(text=sentence, depth=depth / 100)]
    if needle.distractor is not None:
        text = needle.distractor.replace("{CHAR}", name)
        insertions.append(Insertion(text=text, depth=_distractor_depth(depth / 100, distractor_draw)))
    question = needle.question.replace("{CHAR}", name)
    template = needle.template or TASK_TEMPLATE
    before = f"{needle.system}\n\n" if needle.system else ""

    def text_with(haystack: str) -> str:
        return before + template.format(haystack=haystack, question=question)

    haystack, prompt_tokens = fill(
        book,
        insertions,
        start=start,
        budget=length - GENERATION_TOKENS,
        measure=lambda text: prompts.count(prompts.render(text_with(text))),
    )
    encode = prompts.tokenizer.encode
    above, _, below = haystack.partition(sentence)
    above_tokens = len(encode(above, add_special_tokens=False))
    all_tokens = above_tokens + len(encode(below, add_special_tokens=False))
    found = _document(
        needle,
        name,
        example=f"{needle.name}@{depth:g}",
        text=text_with(haystack),
        depth=100 * above_tokens / all_tokens if all_tokens else depth,
        book=book.name,
    )
    return {**found, "prompt_tokens": prompt_tokens}


def _document(needle: Needle, name: str, *, example: str, text: str, depth: float, book: str) -> Document:
    """Return an example of either protocol; `depth` of the needle in percent of the haystack's tokens."""
    return {
        "id": example,
        "input": text,
        "prefix": "",
        "outputs": [name] if needle.draws_a_name else list(needle.answers),
        "depth": depth,
        "question": needle.name,
        "book": book,
    }


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
        """Number of tokens of the text."""
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
) -> tuple[str, int]:
    """Return a haystack with its insertions for which `measure` gives `budget` tokens, or barely less.

    The second value is what `measure` gives for it.

    Args:
        book: where the text comes from.
        insertions: needle and distractors.
        start: 0..1, where in the book to begin, as a share of the places where it can.
        budget: tokens that the whole prompt may have.
        measure: tokens of the whole prompt with a given haystack.

    Raises:
        ValueError: a book that is too short, a budget that the prompt without a book exceeds, or one into
            which no cut of the book fits.
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
    first = int(start * max(0, book.tokens - wanted - CORRECTION_TOKENS))
    best, best_count = insert("", insertions), empty
    has_fitted = False
    for _ in range(MAX_CORRECTIONS):
        candidate = insert(book.cut(first, wanted), insertions)
        count = measure(candidate)
        has_fitted |= count <= budget
        if best_count < count <= budget:
            best, best_count = candidate, count
        if count == budget:
            break
        wanted = max(0, wanted + budget - count)
    if not has_fitted:
        raise ValueError(
            f"{book.name}: none of {MAX_CORRECTIONS} cuts fits into a prompt of {budget:,} tokens: choose "
            "another window"
        )
    return best, best_count


def metric_name(text: str) -> str:
    """argparse type: one of METRICS."""
    if text not in METRICS:
        raise ArgumentError(f"{text!r} is not a metric: choose one of {', '.join(METRICS)}")
    return text


def doubt_name(text: str) -> str:
    """argparse type: `refuse` or `allow`."""
    if text not in ("refuse", "allow"):
        raise ArgumentError(f"{text!r}: choose refuse or allow")
    return text


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
            flag="--nolima-protocol",
            parse=protocol_parser(PROTOCOLS),
            default=OFFICIAL,
            metavar="P",
            help="NoLiMa: official, as published, or window: lengths are of the whole prompt (%(default)s)",
        ),
        SuiteOption(
            flag="--nolima-template",
            parse=Path,
            metavar="FILE",
            help="NoLiMa: the authors' template for sets without one (from their code beside the data)",
        ),
        SuiteOption(
            flag="--nolima-metric",
            parse=metric_name,
            metavar="M",
            help=f"NoLiMa: {', '.join(METRICS)} (official: contains, of the CoT set the last line)",
        ),
        SuiteOption(
            flag="--doubtful-needles",
            parse=doubt_name,
            default="refuse",
            metavar="refuse|allow",
            help="NoLiMa: sets with answers that no needle has, or names that a book has (%(default)s)",
        ),
        SuiteOption(
            flag="--placements",
            parse=positive_int,
            default=PLACEMENTS,
            help="NoLiMa: depths of the needle (%(default)s)",
        ),
    )
    shares_units = True
    k_tokens = (OFFICIAL_K_TOKENS, K_TOKENS)
    k_note = "the official protocol counts 1000, the other 1024"

    def check(self, options: SuiteOptions) -> None:
        """Raise ValueError without data or depths, or for a template that has no meaning."""
        if options["nolima_data"] is None:
            raise ValueError(
                "--nolima-data is needed: the folder of your copy of NoLiMa (docs/evaluation.md)"
            )
        if options["placements"] < 1:
            raise ValueError(f"{options['placements']} placements: give 1 or more")
        if options["nolima_template"] is not None and options["nolima_protocol"] != OFFICIAL:
            raise ValueError("--nolima-template is for --nolima-protocol official: leave it out")

    def k_of_options(self, own: Mapping[str, Any]) -> int:
        """1,000 under the official protocol, which is the default."""
        return OFFICIAL_K_TOKENS if own.get("nolima_protocol", OFFICIAL) == OFFICIAL else K_TOKENS

    def k_of_record(self, record: Mapping[str, Any]) -> int:
        """As the protocol of the results says; those of older versions have none and counted 1,024."""
        return OFFICIAL_K_TOKENS if record.get("protocol") == OFFICIAL else K_TOKENS

    def record(self, options: SuiteOptions) -> dict[str, Any]:
        """Protocol, samples, seed, depths, generated tokens, metric of each task."""
        usual = TASK_METRICS if options["nolima_protocol"] == OFFICIAL else {}
        metric = options["nolima_metric"]
        return {
            "protocol": options["nolima_protocol"],
            "samples": options.effective_samples,
            "seed": options.seed,
            "placements": options["placements"],
            "generation_tokens": GENERATION_TOKENS,
            "metrics": {task: metric or usual.get(task, "contains") for task in TASKS},
        }

    def sources(self, task: str, options: SuiteOptions) -> dict[str, str]:
        """The needle set, the books and the authors' template, all checked before a model is loaded."""
        folder: Path = options["nolima_data"]
        path = folder / NEEDLE_FILE.format(task)
        if not path.is_file():
            raise ValueError(f"{path} does not exist: name the folder of NoLiMa's data, or other --tasks")
        books = book_files(folder)
        needles = read_needles(path)
        texts = {book.name: self._text(book, options) for book in books}
        doubts = doubts_about(needles, texts)
        if doubts:
            more = f" and {len(doubts) - 1} more" if len(doubts) > 1 else ""
            words = f"{path}: {doubts[0]}{more}: scores would not mean what they say"
            if options["doubtful_needles"] == "refuse":
                raise ValueError(f"{words}; mend the set, or --doubtful-needles allow")
            warnings.warn(words, stacklevel=2)
        found = {str(file.relative_to(folder)): sha256_file(file) for file in [path, *books]}
        if options["nolima_protocol"] == OFFICIAL:
            unlike = next((needle for needle in needles if needle.unlike_published), None)
            if unlike is not None:
                raise ValueError(
                    f"{path}: {unlike.unlike_published}: mend the set, or --nolima-protocol {WINDOW}"
                )
            if any(not needle.template for needle in needles):
                found["template of the authors"] = text_sha256(self._template(options))
        return found

    def drawn_with(self, example: str) -> str:
        """The question, at whatever depth, length, in whatever book and set: its id without these."""
        return example.partition("@")[0] if "@" in example else example.rpartition("-")[0] or example

    def generation_tokens(self, task: str) -> int:
        """As many as the authors let a model write."""
        return GENERATION_TOKENS

    def window(self, length: int, options: SuiteOptions) -> int:
        """Officially the haystack and room for what stands around it, else the length."""
        if options["nolima_protocol"] == OFFICIAL:
            return length + PROMPT_TOKENS + GENERATION_TOKENS
        return length

    def system(self, options: SuiteOptions) -> str:
        """The system message of the official protocol."""
        return SYSTEM if options["nolima_protocol"] == OFFICIAL else ""

    def make_examples(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts
    ) -> list[Document]:
        """Make the examples of one cell: everything, or the first --samples of a spread order."""
        needles = read_needles(options["nolima_data"] / NEEDLE_FILE.format(task))
        files = book_files(options["nolima_data"])
        is_official = options["nolima_protocol"] == OFFICIAL
        placements = options["placements"]
        most = len(needles) * placements * (len(files) if is_official else 1)
        count = most if options.samples is None else options.samples
        if count > most:
            books = f" in {len(files)} books" if is_official else ""
            raise ValueError(
                f"{task} has {len(needles):,} questions at {placements} depths{books}, "
                f"fewer than {count:,} samples"
            )
        order = spread(placements, len(needles), len(files) if is_official else 1, options.seed)
        chosen = [next(order) for _ in range(count)]
        make = self._official if is_official else self._own
        return make(task, length, options, prompts, needles, chosen)

    def _official(
        self,
        task: str,
        length: int,
        options: SuiteOptions,
        prompts: Prompts,
        needles: Sequence[Needle],
        chosen: Sequence[tuple[int, int, int]],
    ) -> list[Document]:
        files = book_files(options["nolima_data"])
        draws: dict[tuple[int, int], list[OfficialDraw]] = {}
        documents = []
        for depth, question, book in chosen:
            needle = needles[question]
            if (question, book) not in draws:
                draws[question, book] = official_draws(needle, book, options["placements"], length)
            draw = draws[question, book][depth]
            tokens: TokenBook = self._book(files[book], options, prompts, TokenBook)
            sentence = needle.needle.replace("{CHAR}", draw.name)
            if needle.published_distractor is None or draw.distractor is None:
                placed = tokens.place(sentence, draw.depth, length)
            else:
                placed = tokens.place_both(
                    sentence, needle.published_distractor, draw.depth, draw.distractor, length
                )
            template = needle.template or self._template(options)
            asked = needle.question.replace("{CHAR}", draw.name)
            documents.append(
                _document(
                    needle,
                    draw.name,
                    example=f"{needle.name}@{files[book].stem}@{100 * draw.depth:g}",
                    text=template.format(haystack=placed.text, question=asked),
                    depth=100 * placed.tokens_before / length,
                    book=files[book].name,
                )
            )
        return documents

    def _own(
        self,
        task: str,
        length: int,
        options: SuiteOptions,
        prompts: Prompts,
        needles: Sequence[Needle],
        chosen: Sequence[tuple[int, int, int]],
    ) -> list[Document]:
        files = book_files(options["nolima_data"])
        placements = options["placements"]
        documents = []
        for place, question, _ in chosen:
            needle = needles[question]
            depth = 100 * place / (placements - 1) if placements > 1 else 50.0
            # names, books and places are those of the question at every length: lengths are comparable
            draw = random.Random(cell_seed(options.seed, self.name, task, needle.name, place))
            book: Book = self._book(files[draw.randrange(len(files))], options, prompts, Book)
            documents.append(_own_document(needle, depth, book, length, draw, prompts))
        return documents

    def _text(self, path: Path, options: SuiteOptions) -> str:
        text: str = options.once(f"text of {path}", lambda: read_text_file(path, "--nolima-data"))
        return text

    def _book(self, path: Path, options: SuiteOptions, prompts: Prompts, kind: Any) -> Any:
        """A book as its tokens: made once a call, since a call has one tokenizer."""
        made, tokenizer = options.once(
            f"{kind.__name__} {path}",
            lambda: (kind(path.name, self._text(path, options), prompts.tokenizer), prompts.tokenizer),
        )
        if tokenizer is not prompts.tokenizer:
            made = kind(path.name, self._text(path, options), prompts.tokenizer)
        return made

    def _template(self, options: SuiteOptions) -> str:
        text: str = options.once(
            "template", lambda: published_template(options["nolima_data"], options["nolima_template"])
        )
        return text

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """`contains`: 1 if one of the answers stands in the prediction, letter for letter."""
        return score_answer("contains", prediction, references)

    def score_by_record(
        self, task: str, prediction: str, references: Sequence[str], record: Mapping[str, Any]
    ) -> float:
        """By the metric of the record."""
        metrics = record.get("metrics") or {}
        return score_answer(str(metrics.get(task, "contains")), prediction, references)

    def digest(self, cells: Mapping[Cell, CellExamples], record: Mapping[str, Any]) -> dict[str, Any]:
        """Base score and effective length of each task, which the official protocol alone defines."""
        if record.get("protocol") != OFFICIAL:
            return {}
        by_task: dict[str, dict[int, CellExamples]] = {}
        for cell, examples in cells.items():
            by_task.setdefault(cell.task, {})[cell.length] = examples
        return {
            task: found
            for task, lengths in sorted(by_task.items())
            if (found := effective_length(lengths, self.drawn_with)) is not None
        }


def score_answer(metric: str, prediction: str, references: Sequence[str]) -> float:
    """What an answer is worth by one of METRICS: equal to, or holding, one of the references."""
    text = prediction.strip()
    if metric.startswith("lastline_"):
        text = text.split("\n")[-1]
    elif metric == "contains":
        text = prediction
    if metric.endswith("EM"):
        return float(text in references)
    return float(any(reference in text for reference in references))


def effective_length(
    lengths: Mapping[int, CellExamples], question_of: Callable[[str], str]
) -> dict[str, Any] | None:
    """Base score and effective length of one task, as the paper defines them.

    The base score is the mean over questions of the best of their mean scores at 250, 500 and 1,000 tokens;
    the effective length is the longest one with at least 85 % of it.

    Returns:
        Scores in points; None where no base length was evaluated. `base_score_mean` takes the mean over the
        base lengths in the place of the best.
    """
    base = [length for length in BASE_LENGTHS if length in lengths]
    if not base:
        return None
    by_question: dict[str, list[float]] = {}
    for length in base:
        found: dict[str, list[float]] = {}
        examples = lengths[length]
        for name, score in zip(examples.ids, examples.scores, strict=True):
            found.setdefault(question_of(name), []).append(float(score))
        for question, scores in found.items():
            by_question.setdefault(question, []).append(sum(scores) / len(scores))
    best = 100 * sum(map(max, by_question.values())) / len(by_question)
    means = {length: 100 * float(examples.scores.mean()) for length, examples in sorted(lengths.items())}
    enough = [length for length, mean in means.items() if mean >= EFFECTIVE_SHARE * best]
    return {
        "base_lengths": base,
        "base_score": best,
        "base_score_mean": sum(means[length] for length in base) / len(base),
        "threshold": EFFECTIVE_SHARE * best,
        "scores": {str(length): mean for length, mean in means.items()},
        "effective_length": max(enough, default=None),
    }


register(NoLiMa())
