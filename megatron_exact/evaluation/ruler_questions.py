"""RULER's questions as NVIDIA's generators make them (NVIDIA/RULER, main, commit c3f5e3b).

What is copied besides the wording:

* A length counts the prompt without special tokens, and what is generated.
* The size of a haystack is bisected once a cell. An example that comes out too long is drawn again, smaller
  by a fixed step; for essays this is 500 words, so that at 1K prompts fill 0.5 to 1.0 of the window.
* Words in `cwe` and `fwe`, and the needles of one prompt, always get the same permutation.

Given the same draws, texts are byte-identical; `tests/recorded/record_ruler_prompts.py` recorded theirs.
Three differences remain. Essays are cut into sentences by `prompts.sentences`, not by NLTK's punkt model, a
download of its own: it decides at which full stops a needle may stand. With a chat template `cwe`'s worked
example is a part of the user's text; theirs repeats the template around it. A window that is too short for
a task is an error; theirs loops for ever.
"""

from __future__ import annotations

import bisect
import itertools
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import resources
from typing import Any

import numpy as np

from megatron_exact.evaluation.prompts import sentences

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {nouns} for {key} is: {value}."
NEEDLE_TEXT = (
    "{some} special magic {noun} {are} hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {noun} afterwards.\n{context}\nWhat {are_all} the special magic {noun} for {query} "
    "mentioned in the provided text?"
)
NEEDLE_START = " The special magic {noun} for {query} mentioned in the provided text {are}"
VT_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
VT_START = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
    "assigned the value {value}, they are: "
)
CWE_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above "
    "list?"
)
CWE_START = " Answer: The top 10 words that appear most often in the list are:"
FWE_TEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore "
    "the dots '....'. What are the three most frequently appeared words in the above coded text?"
)
FWE_START = " Answer: According to the coded text above, the three most frequently appeared words are:"
ORDER_SEED = 42
"""Of every fixed permutation: the default seed of the published data."""
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, 40))]
"""Percent of the essays' sentences before a needle."""
SHORT_WINDOW = 4096
"""Below this length lists of words and steps are smaller."""
VT_HOPS = 4
VT_EXAMPLE_TOKENS = 500
VT_EXAMPLE_VALUE = 12345
CWE_COMMON = 10
FWE_WORD_LENGTH = 6
FWE_ALPHA = 2.0
REDRAWS = 200
"""Draws at the smallest size after which a window is too short for a task."""
KEPT_SIZES = 4


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """What tells one task from another."""

    generation_tokens: int
    """Tokens that the model may write; of RULER's paper."""
    delimiter: str = " "
    """Between the text and the start of the answer, in lm-eval."""
    needles: dict[str, Any] = field(default_factory=dict)
    """Arguments of the needle generator; empty for the tasks without needles."""

    @property
    def needs_essays(self) -> bool:
        """Whether the haystack is made of essays."""
        return self.needles.get("type_haystack") == "essay"


def _niah(haystack: str, keys: str, values: str, **numbers: int) -> RulerTask:
    types = {"type_haystack": haystack, "type_needle_k": keys, "type_needle_v": values}
    return RulerTask(generation_tokens=128, needles={**types, **numbers})


TASKS: dict[str, RulerTask] = {
    "niah_single_1": _niah("repeat", "words", "numbers"),
    "niah_single_2": _niah("essay", "words", "numbers"),
    "niah_single_3": _niah("essay", "words", "uuids"),
    "niah_multikey_1": _niah("essay", "words", "numbers", num_needle_k=4),
    "niah_multikey_2": _niah("needle", "words", "numbers"),
    "niah_multikey_3": _niah("needle", "uuids", "uuids"),
    "niah_multivalue": _niah("essay", "words", "numbers", num_needle_v=4),
    "niah_multiquery": _niah("essay", "words", "numbers", num_needle_q=4),
    "vt": RulerTask(generation_tokens=30),
    "cwe": RulerTask(generation_tokens=120, delimiter="\n\n"),
    "fwe": RulerTask(generation_tokens=50),
}


# one prompt


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt in two parts, and what is right."""

    text: str
    """What the user says."""
    start: str
    """Start of the answer, with its white space."""
    answers: list[str]
    """All of them are wanted."""


class WordPairs(Sequence[str]):
    """All `adjective-noun`, in alphabetical order, without six million texts in memory."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self.nouns = sorted(set(nouns))
        # Pairs are in the order of what stands before the noun, unless one such text begins another, as
        # `self-` does `self-made-`: the pairs of these are sorted.
        groups: list[list[str]] = []
        for start in sorted({f"{adjective}-" for adjective in adjectives}):
            if groups and start.startswith(groups[-1][0]):
                groups[-1].append(start)
            else:
                groups.append([start])
        self.groups: list[str | list[str]] = [
            group[0] if len(group) == 1 else sorted({a + b for a in group for b in self.nouns})
            for group in groups
        ]
        sizes = (len(self.nouns) if isinstance(group, str) else len(group) for group in self.groups)
        self.ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        number = bisect.bisect_right(self.ends, place)
        group, inside = self.groups[number], place - (self.ends[number - 1] if number else 0)
        return group + self.nouns[inside] if isinstance(group, str) else group[inside]


def _word_list(kind: str) -> list[str]:
    """A list of the package wonderwords. Raises ValueError if it is not installed."""
    try:
        text = resources.files("wonderwords").joinpath("assets", f"{kind}list.txt").read_text("utf-8")
    except ModuleNotFoundError as error:
        raise ValueError(
            "RULER's words come from the package wonderwords, which is not installed: install the extra, "
            "pip install 'megatron-exact[eval]'"
        ) from error
    return [line.rstrip() for line in text.splitlines()]


@cache
def word_pairs() -> WordPairs:
    """Keys of needles."""
    return WordPairs(_word_list("adjective"), _word_list("noun"))


@cache
def single_words() -> list[str]:
    """Words of `cwe`, in their fixed order."""
    found = sorted({word for kind in ("noun", "adjective", "verb") for word in _word_list(kind)})
    random.Random(ORDER_SEED).shuffle(found)
    return found


class Essays:
    """The words of the essays, over again where a haystack needs more, and where sentences may end."""

    def __init__(self, text: str) -> None:
        self.words = text.split()
        self._sentences: dict[int, list[str]] = {}

    def sentences(self, size: int) -> list[str]:
        """Return the sentences of the first `size` words."""
        if size not in self._sentences:
            if len(self._sentences) >= KEPT_SIZES:
                self._sentences.clear()
            words = itertools.islice(itertools.cycle(self.words), size)
            self._sentences[size] = sentences(" ".join(words))
        return self._sentences[size]


def _drawn(kind: str, draw: random.Random) -> str:
    if kind == "numbers":
        return str(draw.randint(10**6, 10**7 - 1))
    if kind == "words":
        return str(draw.choice(word_pairs()))
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def needle_question(task: str, size: int, draw: random.Random, essays: Essays | None) -> Question:
    """Needles among `size` words of essays, sentences of noise, or other needles."""
    spec = {"num_needle_k": 1, "num_needle_v": 1, "num_needle_q": 1, **TASKS[task].needles}
    key_kind, nouns = spec["type_needle_k"], spec["type_needle_v"]

    def needle(key: str, value: str) -> str:
        return NEEDLE.format(nouns=nouns, key=key, value=value)

    facts: list[tuple[str, list[str]]] = []
    for _ in range(max(spec["num_needle_k"], spec["num_needle_q"])):
        key = _drawn(key_kind, draw)
        facts.append((key, [_drawn(nouns, draw) for _ in range(spec["num_needle_v"])]))
    needles = [needle(key, value) for key, values in facts for value in values]
    random.Random(ORDER_SEED).shuffle(needles)
    if spec["type_haystack"] == "essay":
        assert essays is not None
        context = _between_sentences(essays.sentences(size), needles, draw)
    else:
        lines = [NOISE] * size
        if spec["type_haystack"] == "needle":
            lines = [needle(_drawn(key_kind, draw), _drawn(nouns, draw)) for _ in range(size)]
        places = sorted(draw.sample(range(size), len(needles)), reverse=True)
        for place, sentence in zip(places, needles, strict=True):
            lines.insert(place, sentence)
        context = "\n".join(lines)
    asked = [facts[place] for place in draw.sample(range(len(facts)), spec["num_needle_q"])]
    names = [key for key, _ in asked]
    is_single = spec["num_needle_q"] * spec["num_needle_v"] == 1
    words = {
        "some": "A" if is_single else "Some",
        "noun": nouns[:-1] if is_single else nouns,
        "are": "is" if is_single else "are",
        "are_all": "is" if is_single else "are all",
        "query": ", ".join(names[:-1]) + f", and {names[-1]}" if len(names) > 1 else names[0],
    }
    return Question(
        text=NEEDLE_TEXT.format(context=context, **words),
        start=NEEDLE_START.format(**words),
        answers=[value for _, values in asked for value in values],
    )


def _between_sentences(parts: Sequence[str], needles: Sequence[str], draw: random.Random) -> str:
    """Needles at drawn depths; where nothing stands before one, or between two, a space is left over."""
    cuts = sorted(int(len(parts) * (depth / 100)) for depth in draw.sample(DEPTHS, len(needles)))
    pieces = []
    for start, end, sentence in zip([0, *cuts], cuts, needles, strict=False):
        pieces += [" ".join(parts[start:end]), sentence]
    return " ".join([*pieces, " ".join(parts[cuts[-1] :])])


def _chain(size: int, draw: random.Random, letters: int, value: int | None) -> Question:
    """A chain of assignments among `size` lines of noise; without `value` one is drawn."""
    names: list[str] = []
    while len(set(names)) <= VT_HOPS:
        names = ["".join(draw.choices(string.ascii_uppercase, k=letters)) for _ in range(VT_HOPS + 1)]
    value = draw.randrange(10000, 99999) if value is None else value
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
    lines = [NOISE] * size
    for number, place in enumerate(sorted(draw.sample(range(size), len(chain)))):
        lines.insert(place + number, chain[number])
    return Question(
        text=VT_TEXT.format(context="\n".join(lines), value=value),
        start=VT_START.format(count=VT_HOPS + 1, value=value),
        answers=names,
    )


def chain_example(size: int, draw: random.Random) -> Question:
    """The worked example of `vt`; its names and value are drawn again for each prompt."""
    return _chain(size, draw, letters=3, value=VT_EXAMPLE_VALUE)


def _worked(example: Question) -> str:
    return f"{example.text}{example.start} {' '.join(example.answers)}\n"


def chain_question(size: int, draw: random.Random, example: Question) -> Question:
    """`vt`: the example with other names and value, then a chain of its own."""
    question = _chain(size, draw, letters=5, value=None)
    before = _worked(example)
    for name in example.answers:
        before = before.replace(name, "".join(draw.choices(string.ascii_uppercase, k=len(name))))
    before = before.replace(str(VT_EXAMPLE_VALUE), str(draw.randrange(10000, 99999)))
    return Question(text=f"{before}\n{question.text}", start=question.start, answers=question.answers)


def _word_list_of(words: Sequence[str], common: int, others: int) -> tuple[str, list[str]]:
    """A numbered list in which the first ten words come `common` times and the rest `others` times."""
    found = [*words[:CWE_COMMON]] * common + [*words[CWE_COMMON:]] * others
    random.Random(ORDER_SEED).shuffle(found)
    return _numbered(found), [*words[:CWE_COMMON]]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def common_words_question(
    size: int, draw: random.Random, length: int, more_words: Sequence[str]
) -> Question:
    """`cwe`: a worked example, then `size` different words, of `more_words` where there are not enough."""
    is_short = length < SHORT_WINDOW
    example_size, example_counts, counts = (20, (3, 1), (6, 1)) if is_short else (40, (10, 3), (30, 3))
    words = single_words()
    context, common = _word_list_of(draw.sample(words, example_size), *example_counts)
    example = f"{CWE_TEXT.format(context=context)}{CWE_START} {_numbered(common)}\n"
    context, answers = _word_list_of(
        draw.sample(words if size <= len(words) else more_words, size), *counts
    )
    return Question(text=example + CWE_TEXT.format(context=context), start=CWE_START, answers=answers)


def coded_vocabulary(count: int, draw: random.Random) -> list[str]:
    """Made-up words of `fwe`, the most frequent first; dots are the most frequent of all."""
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(draw.choices(string.ascii_lowercase, k=FWE_WORD_LENGTH)))
    ordered = sorted(found)
    random.Random(ORDER_SEED).shuffle(ordered)
    return ["...", *ordered[1:]]


def coded_question(size: int, vocabulary: Sequence[str]) -> Question:
    """`fwe`: about `size` words whose frequencies fall with the square of their rank."""
    from scipy.special import zeta

    shares = np.arange(1, len(vocabulary) + 1, dtype=np.float64) ** -FWE_ALPHA
    counts = (size * shares / zeta(FWE_ALPHA)).astype(np.int64)
    words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    random.Random(ORDER_SEED).shuffle(words)
    return Question(
        text=FWE_TEXT.format(context=" ".join(words)), start=FWE_START, answers=[*vocabulary[1:4]]
    )


# prompts that fill a window


def _too_short(task: str, length: int) -> ValueError:
    return ValueError(f"{task} does not fit into {length:,} tokens: choose longer windows")


def largest_size(fits: Callable[[int], bool], least: int, most: int | None = None) -> int:
    """Bisect for the largest size that fits, at least `least`, whether that fits or not."""
    low, high = least, 2 * least
    while (most is None or high < most) and fits(high):
        low, high = high, 2 * high
    high = high if most is None else min(high, most + 1)
    return low + bisect.bisect_left(range(low + 1, high), True, key=lambda size: not fits(size))


def _fill(
    task: str,
    length: int,
    compose: Callable[[int], Question],
    count: Callable[[Question], int],
    *,
    samples: int,
    step: int,
    smallest: int,
    most: int | None = None,
) -> Iterator[Question]:
    """Questions of one cell: the size is bisected once, and falls by `step` where a draw is too long.

    Args:
        task: for errors.
        length: tokens of the prompt and of what is generated.
        compose: draws a question of a size.
        count: its tokens, with what is generated.
        samples: how many are wanted.
        step: of sizes; the bisection begins there, too.
        smallest: that can be composed.
        most: the largest size that can be composed.

    Raises:
        ValueError: the smallest size does not fit.
    """
    size = largest_size(lambda size: count(compose(size)) <= length, step, most)
    for _ in range(samples):
        used, misses = size, 0
        while count(question := compose(used)) > length:
            misses += used <= max(step, smallest)
            if misses > REDRAWS:
                raise _too_short(task, length)
            used = max(used - step, smallest) if used > step else used
        yield question


def official_questions(
    task: str,
    length: int,
    samples: int,
    draw: random.Random,
    count: Callable[[Question], int],
    plain: Callable[[Question], int],
    *,
    essays: Essays | None = None,
    more_words: Sequence[str] = (),
) -> list[Question]:
    """The questions of one cell as NVIDIA's generators make them.

    Args:
        task: one of `TASKS`.
        length: tokens of the prompt and of what is generated.
        samples: how many.
        draw: of everything that is random.
        count: the tokens of a question as a prompt, without special ones.
        plain: its tokens without a chat template.
        essays: for the tasks that need them.
        more_words: for `cwe` in long windows.

    Raises:
        ValueError: a window that is too short, or `cwe` in a longer one than there are words for.
    """
    generated = TASKS[task].generation_tokens

    def total(question: Question) -> int:
        return count(question) + generated

    is_short = length < SHORT_WINDOW
    fill = partial(_fill, task, length, count=total, samples=samples)
    if task == "fwe":
        return list(_coded_questions(length, samples, draw, count))
    if task == "vt":
        example = next(
            _fill(
                "vt's worked example",
                VT_EXAMPLE_TOKENS,
                lambda size: chain_example(size, draw),
                plain,
                samples=1,
                step=5,
                smallest=VT_HOPS + 1,
            )
        )
        return list(
            fill(
                compose=lambda size: chain_question(size, draw, example),
                step=5 if is_short else 10,
                smallest=VT_HOPS + 1,
            )
        )
    if task == "cwe":
        most = max(len(single_words()), len(more_words))
        compose = partial(common_words_question, draw=draw, length=length, more_words=more_words)
        if total(compose(most)) <= length:
            raise ValueError(
                f"cwe at {length:,} tokens needs more than {most:,} words: name english_words.json of "
                "NVIDIA's repository (scripts/data/synthetic/json) with --ruler-words, or shorter lengths"
            )
        return list(fill(compose=compose, step=10, smallest=CWE_COMMON, most=most))
    is_essay = TASKS[task].needs_essays
    return list(
        fill(
            compose=lambda size: needle_question(task, size, draw, essays),
            step=500 if is_essay else 5 if is_short else 25,
            smallest=1,
        )
    )


def _coded_questions(
    length: int, samples: int, draw: random.Random, count: Callable[[Question], int]
) -> Iterator[Question]:
    """`fwe`: the number of words is searched in steps once, and falls where other words are longer."""
    room = length - TASKS["fwe"].generation_tokens
    step = room // 32
    if step < 1:
        raise _too_short("fwe", length)
    words, size = coded_vocabulary(room // 50, draw), room // FWE_WORD_LENGTH
    while count(coded_question(size, words)) < room:
        size += step
    size -= step
    for _ in range(samples):
        words, used = coded_vocabulary(room // 50, draw), size
        while count(question := coded_question(used, words)) > room:
            used -= step
            if used < step:
                raise _too_short("fwe", length)
        yield question
