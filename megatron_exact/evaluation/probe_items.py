"""The items of the evidence probe: a prompt with evidence, the same prompt without it, and candidate
answers.

**Placement.** Evidence stands at an exact distance from the answer:

    prompt    start | lead filler | evidence | filler between | question      context tokens in all
    ablated   start | lead filler | filler   | filler between | question      as many

With C = context and D = distance, the first answer token has position C and the last token of the evidence
position C - D. `start` is what the tokenizer puts before a text (BOS, or nothing).

**Kinds.** The paper gives only the names of the three kinds; sentences, answers and their number are ours
(`probe_wording.py`: 24 forms a kind). The items of a cell take the forms in turn, the same order in every
cell, and the fillers in turn.

* answer position: one sentence contains the answer, and the cloze repeats its beginning. The competing
  answers do not occur in the prompt. The item tests whether the position of the answer is still reached.
* field lookup: a record of four fields, all filled with names; the cloze asks for one field. The competing
  answers are the other names of the record, so that finding the record is not enough.
* evidence field: NoLiMa-like questions on a grid of distance x context. Evidence and question share no
  content word, so the evidence has to be used and not only found. In the ablated prompt a distractor of its
  type replaces it: the same sentence with another argument and the same person. So the right name is in
  both prompts, and the effect is that of the fact, without that of merely seeing the name.

In the ablated prompts of the two cloze kinds, filler of the same length replaces the evidence.

**Filler** is a long sequence of sentences, each tokenized by itself with the space before it. A piece of N
tokens ends where a sentence ends and is cut on its left: what follows it always starts after a full stop,
and only its first word may be broken.

**Tokenizers.** A text inside a prompt has the tokens that it has after a full stop (`continuation_ids`).
Byte-level BPE (Qwen2.5, Llama 3) merges nothing across the space before a word, SentencePiece (Llama 2,
Mistral) writes that space as the first character of the word's first piece: in both, joined pieces of ids
equal the ids of the joined text, except at the cut of a filler. `Writer` checks this before it is used.

**Files of items** contain one JSON object per line. Prompts and answers are text or lists of token ids.
Only ids define exactly where a token ends, so our own items have prompts of ids. Text of a prompt is
encoded with what the tokenizer puts at a start (BOS), text of an answer alone, with its own leading space.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.evaluation.needle_sets import Needle, read_needles
from megatron_exact.evaluation.probe_wording import (
    ANSWER_FORMS,
    FILLERS,
    PEOPLE,
    PLACES,
    RECORD_FORMS,
    RELATIONS,
    Grammar,
    RecordForm,
)
from megatron_exact.evaluation.prompts import cell_seed, read_text_file, sentences
from megatron_exact.evaluation.result_folders import ProbeCell
from megatron_exact.files import sha256_file
from megatron_exact.json_input import read_json_lines

ANSWER_POSITION = "answer-position"
FIELD_LOOKUP = "field-lookup"
EVIDENCE_FIELD = "evidence-field"
KINDS = (ANSWER_POSITION, FIELD_LOOKUP, EVIDENCE_FIELD)
CANDIDATES = 4
"""Number of candidate answers, so that chance is 25 %."""
HEAD_TOKENS = 96
"""Context of a cloze item beyond its distance: BOS, a little filler and the evidence."""
SHORTEST_DISTANCE = 64
SHORTEST_CONTEXT = 256
LONGEST = 65_536
"""The paper's longest distance."""
ITEMS_PER_CELL = 96
"""Four of each form."""
KIND = re.compile(r"[a-z0-9][a-z0-9-]*")
NEEDED = ("id", "kind", "distance", "context", "prompt", "prompt_ablated", "gold", "candidates")
OPTIONAL = ("competitor", "form", "filler")
TextOrIds = str | tuple[int, ...]
Ids = tuple[int, ...]
SHORTEST_OWN_TOKENS = 20_000
"""Repeats of our own fillers, so that pieces of several items differ."""
SENTENCES_AT_A_TIME = 256
BEFORE = "Yes."
"""What continuations are tokenized behind."""


@dataclass(frozen=True, kw_only=True)
class ProbeItem:
    """One question."""

    id: str
    """Unique inside its kind, and the same for every model."""
    kind: str
    """Lower-case letters, digits and hyphens: the name of the results file."""
    distance: int
    """As in `ProbeCell`; a label that is not checked in items made elsewhere."""
    context: int
    """As in `ProbeCell`; a label that is not checked in items made elsewhere."""
    prompt: TextOrIds
    """Prompt with the evidence; it ends right before the answer."""
    prompt_ablated: TextOrIds
    """Prompt with filler, or another sentence of the kind, in place of the evidence."""
    gold: TextOrIds
    """The right answer, one of `candidates`."""
    candidates: tuple[TextOrIds, ...]
    """Two or more different answers."""
    competitor: TextOrIds
    """The answer with which the margin compares gold: another one of `candidates`."""
    form: str = ""
    """Name of the item's wording; items with the same one are drawn together. Empty: it stands alone."""
    filler: str = ""
    """Name of the text around the evidence; empty where it is not known."""

    def __post_init__(self) -> None:
        if not KIND.fullmatch(self.kind):
            raise ValueError(f"kind {self.kind!r} of item {self.id!r}: use a-z, 0-9 and hyphens")
        if min(self.distance, self.context) < 0:
            raise ValueError(f"item {self.id!r} has a distance or context below 0")
        if not all([self.prompt, self.prompt_ablated, *self.candidates]):
            raise ValueError(f"item {self.id!r} has an empty prompt or candidate")
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError(f"item {self.id!r} has a candidate twice")
        if self.gold not in self.candidates or self.competitor not in self.candidates:
            raise ValueError(f"item {self.id!r}: gold and competitor must be among the candidates")
        if self.gold == self.competitor:
            raise ValueError(f"item {self.id!r}: its competitor is gold")

    @property
    def cell(self) -> ProbeCell:
        """Cell in which the item counts."""
        return ProbeCell(kind=self.kind, distance=self.distance, context=self.context)


@dataclass(frozen=True, kw_only=True)
class EncodedItem:
    """An item in token ids."""

    prompt: tuple[int, ...]
    """Prompt with the evidence."""
    ablated: tuple[int, ...]
    """Prompt without the evidence."""
    candidates: tuple[tuple[int, ...], ...]
    """Candidates in the order of the item."""
    gold: int
    """Position among the candidates."""
    competitor: int
    """Position among the candidates."""

    @property
    def window(self) -> int:
        """Positions that a model needs; the last token of an answer is predicted and never read."""
        return max(len(self.prompt), len(self.ablated)) + max(map(len, self.candidates)) - 1

    @property
    def sha256(self) -> str:
        """Hash of everything that decides the result."""
        return ids_sha256(
            self.prompt, self.ablated, *self.candidates, (len(self.candidates), self.gold, self.competitor)
        )


def encode_item(item: ProbeItem, tokenizer: Any) -> EncodedItem:
    """Encode an item as token ids.

    Args:
        item: item of text or ids.
        tokenizer: tokenizer of transformers; may be None where everything is ids.

    Raises:
        ValueError: text without a tokenizer, or an answer without tokens or with those of another one.
    """
    candidates = tuple(_ids(answer, tokenizer, is_prompt=False) for answer in item.candidates)
    if not all(candidates) or len(set(candidates)) != len(candidates):
        raise ValueError(f"candidates of item {item.id!r} have no tokens, or the tokens of each other")
    return EncodedItem(
        prompt=_ids(item.prompt, tokenizer, is_prompt=True),
        ablated=_ids(item.prompt_ablated, tokenizer, is_prompt=True),
        candidates=candidates,
        gold=item.candidates.index(item.gold),
        competitor=item.candidates.index(item.competitor),
    )


def _ids(value: TextOrIds, tokenizer: Any, *, is_prompt: bool) -> tuple[int, ...]:
    if not isinstance(value, str):
        return value
    if tokenizer is None:
        raise ValueError("an item is text: give a tokenizer, or token ids")
    if is_prompt:
        return tuple(tokenizer.encode(value, add_special_tokens=True))
    return continuation_ids(tokenizer, [value])[0]


def continuation_ids(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Return the ids of each text as it continues a sentence; it begins with a space.

    SentencePiece puts a space before whatever it is given, so that ` Paris` alone would have two. Texts
    that do not begin with a space, and those that a tokenizer merges with a full stop, are encoded alone.
    """
    before = tokenizer.encode(BEFORE, add_special_tokens=False)
    batch = [BEFORE + text if text[:1] == " " else text for text in texts]
    ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    found = []
    for text, whole in zip(texts, ids, strict=True):
        if text[:1] != " ":
            found.append(tuple(whole))
        elif whole[: len(before)] == before:
            found.append(tuple(whole[len(before) :]))
        else:
            found.append(tuple(tokenizer.encode(text, add_special_tokens=False)))
    return found


def ids_sha256(*rows: Sequence[int]) -> str:
    """Return the hex sha256 of rows of ids: length and ids of each, 8 bytes per number, little-endian."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([len(row), *row], dtype="<i8").tobytes())
    return digest.hexdigest()


def read_items(path: str | Path) -> list[ProbeItem]:
    """Read the items of a JSONL file.

    Raises:
        ValueError: an empty file, a line that is not an item, or an id that occurs twice in its kind.
    """
    items: list[ProbeItem] = []
    seen: set[tuple[str, str]] = set()
    for place, content in read_json_lines(path, "an item of the probe is one JSON object a line"):
        try:
            item = item_from_json(content)
            if (item.kind, item.id) in seen:
                raise ValueError(f"id {item.id!r} comes twice in {item.kind}")
        except (ValueError, TypeError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{place} is not an item of the probe: {reason}") from error
        seen.add((item.kind, item.id))
        items.append(item)
    if not items:
        raise ValueError(f"{path} contains no items")
    return items


def item_from_json(content: Any) -> ProbeItem:
    """Make an item from the object of a line; the default `competitor` is the first other candidate."""
    if not isinstance(content, dict):
        raise TypeError("not an object")
    unknown = set(content) - {*NEEDED, *OPTIONAL}
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}")
    for key in ("id", "kind", *({"form", "filler"} & set(content))):
        if not isinstance(content[key], str):
            raise TypeError(f"{key} {content[key]!r} is not text")
    for key in ("distance", "context"):
        if type(content[key]) is not int:
            raise TypeError(f"{key} {content[key]!r} is not a whole number")
    if not isinstance(content["candidates"], list):
        raise TypeError("candidates is not a list")
    candidates = tuple(_text_or_ids(value, "candidate") for value in content["candidates"])
    gold = _text_or_ids(content["gold"], "gold")
    others = [candidate for candidate in candidates if candidate != gold]
    if not others:
        raise ValueError("fewer than two candidates")
    return ProbeItem(
        id=content["id"],
        kind=content["kind"],
        distance=content["distance"],
        context=content["context"],
        prompt=_text_or_ids(content["prompt"], "prompt"),
        prompt_ablated=_text_or_ids(content["prompt_ablated"], "prompt_ablated"),
        gold=gold,
        candidates=candidates,
        competitor=_text_or_ids(content.get("competitor", others[0]), "competitor"),
        form=content.get("form", ""),
        filler=content.get("filler", ""),
    )


def _text_or_ids(value: Any, name: str) -> TextOrIds:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(type(token) is int and token >= 0 for token in value):
        return tuple(value)
    raise TypeError(f"{name} is neither text nor a list of token ids")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an item asks, as text; every part except the answers begins with a space."""

    evidence: str
    """Sentences that contain the answer."""
    counterfactual: str | None
    """Replaces the evidence in the ablated prompt; None for filler of the same length."""
    cloze: str
    """Text that ends right before the answer."""
    gold: str
    """Candidate answers, each with the space before it."""
    candidates: tuple[str, ...]
    """Number of the right answer among the candidates."""
    competitor: str
    """Number of the competitor among the candidates."""


Maker = Callable[[Random], Question]


class Writer:
    """Encodes texts, and knows what the tokenizer puts at a start."""

    def __init__(self, tokenizer: Any) -> None:
        """Find the start, and check that ids of pieces may be joined.

        Args:
            tokenizer: tokenizer of transformers.

        Raises:
            ValueError: a tokenizer that writes pieces of a text otherwise than the whole text.
        """
        self.tokenizer = tokenizer
        bare, whole = (
            tuple(tokenizer.encode(BEFORE, add_special_tokens=special)) for special in (False, True)
        )
        found = [n for n in range(len(whole)) if whole[n : n + len(bare)] == bare]
        pieces = (" In record 123, the owner is Anna.", " Question: Who is it?", " The owner is", " Anna")
        joined = (*bare, *(token for piece in pieces for token in self.encode(piece)))
        if not found or joined != tuple(
            tokenizer.encode(BEFORE + "".join(pieces), add_special_tokens=False)
        ):
            raise ValueError(
                "the tokenizer gives the sentences of a text other tokens than the text as a whole: give "
                "--items of your own"
            )
        self.start: Ids = whole[: found[0]]
        """Ids at the start of a text, such as BOS; may be empty."""

    def encode(self, text: str) -> Ids:
        """Return the tokens of a piece of text, which begins with a space."""
        return continuation_ids(self.tokenizer, [text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """Return the tokens of several pieces."""
        return continuation_ids(self.tokenizer, texts)


def of_equal_length(words: Sequence[str], at_least: int, writer: Writer) -> list[str]:
    """Return words with equal numbers of tokens behind a space; of several groups the shortest words.

    Raises:
        ValueError: fewer than `at_least` words have the same length.
    """
    lengths: dict[int, list[str]] = {}
    for word in words:
        lengths.setdefault(len(writer.encode(f" {word}")), []).append(word)
    for length in sorted(lengths):
        if len(lengths[length]) >= at_least:
            return lengths[length]
    raise ValueError(
        f"the tokenizer has no {at_least} words of one length among {', '.join(words[:3])}, ...: "
        "give --items of your own"
    )


def answer_position(writer: Writer) -> dict[str, Maker]:
    """Return a function for each form that draws questions of the kind "answer position"."""
    usable = {words: of_equal_length(words, CANDIDATES, writer) for _, words in ANSWER_FORMS}

    def maker(form: str, words: list[str]) -> Maker:
        def make(draw: Random) -> Question:
            chosen = draw.sample(words, CANDIDATES)
            beginning = f" {form.format(place=draw.choice(PLACES), name=draw.choice(PEOPLE))}"
            return _question(f"{beginning} {chosen[0]}.", beginning, chosen, 0, draw)

        return make

    return {form: maker(form, usable[words]) for form, words in ANSWER_FORMS}


def field_lookup(writer: Writer) -> dict[str, Maker]:
    """Return a function for each form that draws questions of the kind "field lookup"."""
    people = of_equal_length(PEOPLE, CANDIDATES, writer)

    def maker(form: RecordForm) -> Maker:
        def make(draw: Random) -> Question:
            opening = form.opening.format(number=draw.randrange(100, 1000))
            chosen = draw.sample(people, CANDIDATES)
            order = draw.sample(form.fields, CANDIDATES)
            pairs = [
                form.pair.format(field=field, name=name) for field, name in zip(order, chosen, strict=True)
            ]
            asked = draw.randrange(CANDIDATES)
            cloze = form.pair.format(field=order[asked], name="").rstrip()
            return _question(
                f" {opening} {form.joint.join(pairs)}.", f" {opening} {cloze}", chosen, asked, draw
            )

        return make

    return {form.opening: maker(form) for form in RECORD_FORMS}


def _question(evidence: str, cloze: str, answers: list[str], gold: int, draw: Random) -> Question:
    """Draw the order of the candidates, and one of the wrong ones as the competitor."""
    words = [f" {answer}" for answer in answers]
    return Question(
        evidence=evidence,
        counterfactual=None,
        cloze=cloze,
        gold=words[gold],
        candidates=tuple(draw.sample(words, len(words))),
        competitor=draw.choice([word for place, word in enumerate(words) if place != gold]),
    )


def own_needles() -> list[Needle]:
    """Return our own needle set; a group is a form."""
    return [
        Needle(
            name=f"{evidence} {question} {place}",
            group=f"{evidence} {question}",
            needle=evidence.replace("{1}", here),
            question=question.replace("{1}", asked),
            distractor=None,
            characters=PEOPLE,
            answers=(),
            template="",
        )
        for relation in RELATIONS
        for evidence, question in relation.wordings
        for place, (here, asked) in enumerate(relation.arguments)
    ]


def read_field_needles(path: Path) -> list[Needle]:
    """Read the needles of a NoLiMa set that have a distractor of their type and a drawn name as answer.

    Raises:
        ValueError: a file that is not a needle set, or has no such needle.
    """
    needles = [needle for needle in read_needles(path) if not needle.answers]
    usable = [
        needle
        for needle in needles
        if _others(needle, needles) and len(set(needle.characters)) >= CANDIDATES
    ]
    if not usable:
        raise ValueError(
            f"{path}: no needle has another one of its kind and {CANDIDATES} names to choose from: "
            "take needle_set.json, or leave --needles out"
        )
    return usable


def _others(needle: Needle, needles: list[Needle]) -> list[Needle]:
    """Return needles of the same sentence and kind of question with other evidence and question."""
    return [
        other
        for other in needles
        if other.group == needle.group
        and other.needle != needle.needle
        and other.question != needle.question
        and "{CHAR}" not in needle.question
    ]


def evidence_field(writer: Writer, needles: list[Needle]) -> dict[str, Maker]:
    """Return a function for each group of needles that draws questions of the evidence field."""
    names = {
        needle.characters: of_equal_length(needle.characters, CANDIDATES, writer) for needle in needles
    }
    tokens = {needle.needle: len(writer.encode(f" {needle.needle}")) for needle in needles}

    def maker(group: list[Needle]) -> Maker:
        def make(draw: Random) -> Question:
            needle = draw.choice(group)
            others = _others(needle, group)
            as_long = [other for other in others if tokens[other.needle] == tokens[needle.needle]]
            distractor = draw.choice(
                as_long or others
            )  # of equal length, so that the prompts share all that stands before
            chosen = draw.sample(names[needle.characters], CANDIDATES)
            words = [f" {name}" for name in chosen]
            return Question(
                evidence=f" {needle.needle.replace('{CHAR}', chosen[0])}",
                counterfactual=f" {distractor.needle.replace('{CHAR}', chosen[0])}",
                cloze=f" Question: {needle.question} Answer:",
                gold=words[0],
                candidates=tuple(draw.sample(words, CANDIDATES)),
                competitor=words[1],
            )

        return make

    groups: dict[str, list[Needle]] = {}
    for needle in needles:
        groups.setdefault(needle.group, []).append(needle)
    return {name: maker(group) for name, group in groups.items()}


@dataclass(frozen=True, kw_only=True)
class Filler:
    """Consecutive sentences as token ids."""

    name: str
    """Name in the results."""
    tokens: tuple[int, ...]
    """All ids; pieces share these numbers, so that a thousand long prompts take little memory."""
    ends: NDArray[np.int64]
    """[sentences], ascending: a sentence ends before each of these positions."""
    sha256: str
    """Hash of the text."""

    def draw(self, lengths: Sequence[int], draw: Random) -> list[tuple[int, ...]]:
        """Return consecutive pieces of exactly these numbers of tokens, from a random sentence on.

        Raises:
            ValueError: the filler is too short.
        """
        starts = np.concatenate([[0], self.ends])
        longest = int(np.diff(starts).max())
        needed = sum(lengths) + longest * len(lengths)  # a piece reaches to the end of its sentence
        if needed > len(self.tokens):
            raise ValueError(
                f"the filler has {len(self.tokens):,} tokens and an item needs {needed:,}: give a longer "
                "--filler, or shorter distances and contexts"
            )
        choices = starts[starts <= len(self.tokens) - needed]
        place = int(choices[draw.randrange(len(choices))])
        pieces = []
        for length in lengths:
            end = int(self.ends[np.searchsorted(self.ends, place + length)]) if length else place
            pieces.append(self.tokens[end - length : end])
            place = end
        return pieces


def read_filler(path: str | Path, writer: Writer) -> Filler:
    """Read filler from a text file (UTF-8).

    Raises:
        ValueError: a file without text.
    """
    text = read_text_file(Path(path), "--filler")
    found = [" ".join(sentence.split()) for sentence in sentences(text.strip())]
    if not found:
        raise ValueError(f"{path} contains no text: name another --filler")
    return _filler(Path(path).name, found, _encoded(found, writer))


def own_fillers(tokens: int, writer: Writer) -> dict[str, Filler]:
    """Make the fillers of invented sentences, without the persons and things of the questions.

    Args:
        tokens: tokens that the longest item needs.
        writer: of the tokenizer.

    Returns:
        The fillers by name.
    """
    return {name: _own_filler(name, grammar, tokens, writer) for name, grammar in FILLERS.items()}


def _own_filler(name: str, grammar: Grammar, tokens: int, writer: Writer) -> Filler:
    every = grammar.sentences()
    Random(0).shuffle(every)
    wanted, count = max(2 * tokens, SHORTEST_OWN_TOKENS), 0
    encoded: list[Ids] = []
    while count < wanted and len(encoded) < len(every):
        encoded += _encoded(every[len(encoded) : len(encoded) + SENTENCES_AT_A_TIME], writer)
        count = sum(map(len, encoded))
    rounds = -(-wanted // count)  # the same sentences again where there are too few
    return _filler(name, every[: len(encoded)] * rounds, encoded * rounds)


def _filler(name: str, sentences: Sequence[str], encoded: Sequence[Sequence[int]]) -> Filler:
    return Filler(
        name=name,
        tokens=tuple(token for ids in encoded for token in ids),
        ends=np.cumsum([len(ids) for ids in encoded]),
        sha256=hashlib.sha256("\n".join(sentences).encode()).hexdigest(),
    )


def _encoded(sentences: Sequence[str], writer: Writer) -> list[Ids]:
    return writer.encode_all([f" {sentence}" for sentence in sentences])


def place(
    question: Question,
    cell: ProbeCell,
    name: str,
    *,
    writer: Writer,
    filler: Filler,
    draw: Random,
    form: str = "",
) -> ProbeItem:
    """Place a question, whose wording is `form`, at the distance and context of a cell.

    Raises:
        ValueError: the distance is too short for the cloze, the context for the evidence, or the filler is
            too short.
    """
    evidence, cloze = writer.encode(question.evidence), writer.encode(question.cloze)
    other = None if question.counterfactual is None else writer.encode(question.counterfactual)
    between = cell.distance - 1 - len(cloze)
    before = cell.context - cell.distance + 1 - len(writer.start)  # lead and evidence
    longest = max(len(evidence), len(other or ()))
    if between < 0 or before < longest:
        raise ValueError(
            f"{cell}: the question takes {len(cloze)} tokens and the evidence {longest}, which do not fit: "
            "choose a longer distance, or a longer context for it"
        )
    lead, instead, gap = filler.draw([before, longest, between], draw)

    def written(middle: Ids) -> Ids:
        # the lead is cut on its left: the longer of two sentences takes from the far end of the prompt
        return (*writer.start, *lead[len(middle) :], *middle, *gap, *cloze)

    return ProbeItem(
        id=name,
        kind=cell.kind,
        distance=cell.distance,
        context=cell.context,
        prompt=written(evidence),
        prompt_ablated=written(instead[longest - len(evidence) :] if other is None else other),
        gold=question.gold,
        candidates=question.candidates,
        competitor=question.competitor,
        form=form,
        filler=filler.name,
    )


def cells_of(
    kinds: Sequence[str], distances: Sequence[int], contexts: Sequence[int], window: int | None
) -> list[ProbeCell]:
    """Return the cells to fill.

    Args:
        kinds: some of `KINDS`.
        distances: in tokens; empty for powers of two from 64 up to 65,536 or what fits the window.
        contexts: contexts of the field in tokens; empty for powers of two from 256 up to the same limit.
        window: most tokens that the model reads; None for no limit.

    Returns:
        The cells, by kind, then from short to long. The context of a cloze item is its distance and 96
        tokens; cells of the field whose context is shorter than that are left out.

    Raises:
        ValueError: an unknown kind, a length given twice, or a length that gives no cell.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds {', '.join(unknown) or '(none)'}: choose from {', '.join(KINDS)}")
    for name, given in (("--distances", distances), ("--contexts", contexts)):
        if len(set(given)) != len(given):
            raise ValueError(f"{name}: give each length once")
    limit = LONGEST if window is None else min(window, LONGEST)
    wide = distances or _powers_of_two(SHORTEST_DISTANCE, limit)
    if not distances and window is not None:
        wide = [distance for distance in wide if distance + HEAD_TOKENS <= window]
    deep = contexts or _powers_of_two(SHORTEST_CONTEXT, limit)
    cells = []
    for kind in (kind for kind in KINDS if kind in kinds):
        if kind != EVIDENCE_FIELD:
            cells += [_cell(kind, distance, distance + HEAD_TOKENS) for distance in sorted(wide)]
            continue
        grid = [(distance, context) for distance in sorted(wide) for context in sorted(deep)]
        cells += [_cell(kind, *pair) for pair in grid if pair[0] + HEAD_TOKENS <= pair[1]]
        unused = (set(distances) - {cell.distance for cell in cells if cell.kind == kind}) | (
            set(contexts) - {cell.context for cell in cells if cell.kind == kind}
        )
        if unused:
            raise ValueError(
                f"{kind}: no cell has {min(unused):,} tokens, since a context holds its distance and "
                f"{HEAD_TOKENS} tokens: leave it out, or give longer --contexts or shorter --distances"
            )
    if not cells:
        raise ValueError(
            f"a window of {window} tokens is too short for a cell, which takes "
            f"{SHORTEST_DISTANCE + HEAD_TOKENS}"
        )
    return cells


def _powers_of_two(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... up to and with `last`."""
    return [first << power for power in range((last // first).bit_length())]


def _cell(kind: str, distance: int, context: int) -> ProbeCell:
    return ProbeCell(kind=kind, distance=distance, context=context)


ItemSource = dict[ProbeCell, Callable[[], list[ProbeItem]]]
"""Cells in order, and the function that makes the items of a cell, the same at every call. Only one cell is
in memory at a time, since a full grid is gigabytes of prompts."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """A probe as a user asks for it."""

    kinds: tuple[str, ...] = KINDS
    """Option of our own items."""
    distances: tuple[int, ...] = ()
    """Distances in tokens; empty for a logarithmic grid."""
    contexts: tuple[int, ...] = ()
    """Contexts of the field in tokens; empty for a logarithmic grid."""
    items_per_cell: int = ITEMS_PER_CELL
    """Option of our own items."""
    seed: int = 0
    """Option of our own items."""
    filler: tuple[Path, ...] = ()
    """Paths of texts for filler, which items take in turn; empty for our own sentences."""
    needles: Path | None = None
    """Path of a NoLiMa needle set for the field; None for our own."""
    items: Path | None = None
    """Path of items made elsewhere, which replace our own."""

    def __post_init__(self) -> None:
        if self.items_per_cell < 1 or self.seed < 0:
            raise ValueError(
                f"{self.items_per_cell} items a cell, seed {self.seed}: give at least 1, and a seed of "
                "at least 0"
            )
        other = self.distances or self.contexts or self.filler or self.needles or self.kinds != KINDS
        if self.items is not None and other:
            raise ValueError(
                "--items brings its own kinds, distances, contexts and texts: leave the other options out"
            )
        for option, value in (("--contexts", self.contexts), ("--needles", self.needles)):
            if value and EVIDENCE_FIELD not in self.kinds:
                raise ValueError(
                    f"{option} is read by {EVIDENCE_FIELD} alone: add it to --kinds, or leave {option} out"
                )

    def record(self) -> dict[str, Any]:
        """Return what decides the items, for probe.json; files are given by their hashes."""
        if self.items is not None:
            return {"items": sha256_file(self.items)}
        return {
            "kinds": list(self.kinds),
            "distances": list(self.distances),
            "contexts": list(self.contexts),
            "items_per_cell": self.items_per_cell,
            "seed": self.seed,
            "filler": [sha256_file(path) for path in self.filler],
            "needles": None if self.needles is None else sha256_file(self.needles),
        }

    def item_source(self, tokenizer: Any, window: int | None) -> ItemSource:
        """Return the source of the items, which are made when they are needed.

        Every cell draws from its own seed: its items do not depend on which other cells exist, and items of
        different cells are independent of each other.

        Args:
            tokenizer: tokenizer of transformers.
            window: most tokens that the model reads; None for no limit.

        Raises:
            ValueError: cells that cannot be filled.
        """
        if self.items is not None:
            given: dict[ProbeCell, list[ProbeItem]] = {}
            for item in read_items(self.items):
                given.setdefault(item.cell, []).append(item)
            return {cell: partial(list, given[cell]) for cell in sorted(given)}
        cells = cells_of(self.kinds, self.distances, self.contexts, window)
        writer = Writer(tokenizer)
        makers = {kind: self._makers(kind, writer) for kind in dict.fromkeys(cell.kind for cell in cells)}
        longest = max(cell.context for cell in cells)
        fillers = list(
            own_fillers(longest, writer).values()
            if not self.filler
            else [read_filler(path, writer) for path in self.filler]
        )

        def items_of(cell: ProbeCell) -> list[ProbeItem]:
            forms = sorted(makers[cell.kind])
            Random(cell_seed(self.seed, "probe", cell.kind, "forms")).shuffle(forms)
            items = []
            for number in range(self.items_per_cell):
                name = f"{cell.distance}-{cell.context}-{number}"
                draw = Random(cell_seed(self.seed, "probe", cell.kind, name))
                turn, place_in_turn = divmod(number, len(forms))
                form = forms[place_in_turn]
                items.append(
                    place(
                        makers[cell.kind][form](draw),
                        cell,
                        name,
                        writer=writer,
                        # one further in each turn, so that a form meets all fillers
                        filler=fillers[(number + turn * (len(forms) % len(fillers) == 0)) % len(fillers)],
                        draw=draw,
                        form=form,
                    )
                )
            return items

        return {cell: partial(items_of, cell) for cell in cells}

    def _makers(self, kind: str, writer: Writer) -> dict[str, Maker]:
        if kind == EVIDENCE_FIELD:
            needles = own_needles() if self.needles is None else read_field_needles(self.needles)
            return evidence_field(writer, needles)
        return {ANSWER_POSITION: answer_position, FIELD_LOOKUP: field_lookup}[kind](writer)
