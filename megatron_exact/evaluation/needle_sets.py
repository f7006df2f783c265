"""Needle sets in NoLiMa's form: sentences, questions about them, and the checks before anything is asked.

A set is a JSON list of experiments; see `suites/nolima.py` for its keys. What can be wrong with one shows
late, and in scores alone: an empty answer stands in every reply, a text in the place of a list is a list of
its letters, an open placeholder asks about `{2}`. All that is an error here, with the name of the question.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.json_input import read_json

REMEDY = "download NoLiMa's needle sets again, or mend this one"


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
    """Prompt with `{haystack}` and `{question}`; empty where the set has none."""
    system: str = ""
    """The set's own system message."""
    published_distractor: str | None = None
    """The distractor that the authors' code takes: none where no argument stands in it."""
    unlike_published: str = ""
    """Why the authors' code cannot ask this question, or asks another one; empty where it asks the same."""

    @property
    def draws_a_name(self) -> bool:
        """Whether the answer is a name drawn from the character set."""
        return "{CHAR}" in self.needle


def read_needles(path: Path) -> list[Needle]:
    """All questions of a needle set, in the order of the file.

    Raises:
        ValueError: a file that is not a needle set, or whose questions cannot be asked or scored; it says
            what is wrong where.
    """
    content = read_json(path, REMEDY)
    try:
        needles = [needle for experiment in content for needle in _needles_of(experiment)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a needle set ({error}): {REMEDY}") from error
    except KeyError as error:
        raise ValueError(f"{path} is not a needle set: an entry has no {error}: {REMEDY}") from error
    if not needles:
        raise ValueError(f"{path} holds no question: {REMEDY}")
    names = [needle.name for needle in needles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} has the question {twice} twice: give each experiment an id of its own")
    return needles


def _needles_of(experiment: dict[str, Any]) -> Iterator[Needle]:
    place = experiment["id"]
    if not isinstance(place, str):
        raise ValueError(f"id {place!r} is not text")
    template = _text_or_none(experiment, "task_template", place) or ""
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if template and set(fields) != {"haystack", "question"}:
        raise ValueError(
            f"task_template of {place} lacks {{haystack}} or {{question}}, or has other fields"
        )
    distractors = experiment.get("distractors") or {}
    characters = _texts(experiment.get("character_set") or [], f"character_set of {place}")
    for kind, question in experiment["questions"].items():
        for name, test in experiment["tests"].items():
            where = f"{place}_{name}_{kind}"
            arguments = _texts(test["input_args"], f"input_args of {where}")
            answers = _texts(test.get("gold_answers") or [], f"gold_answers of {where}")
            distractor = distractors.get(kind)
            filled = None if distractor is None else _filled(distractor, arguments, where)
            needle = Needle(
                name=where,
                group=f"{place}_{kind}",
                needle=_filled(experiment["needle"], arguments, where),
                question=_filled(question, arguments, where),
                distractor=filled,
                characters=characters,
                answers=answers,
                template=template,
                system=_text_or_none(experiment, "system_prompt", place) or "",
                published_distractor=None if distractor is None or not _open(distractor) else filled,
                unlike_published=_unlike_published(place, question, distractor),
            )
            if not answers and not (needle.draws_a_name and characters):
                raise ValueError(f"{where} has neither gold_answers nor characters")
            if "{CHAR}" in f"{needle.question}{needle.distractor}" and not needle.draws_a_name:
                raise ValueError(f"{where} has {{CHAR}} outside its needle only")
            yield needle


def _texts(value: Any, what: str) -> tuple[str, ...]:
    """A list of texts that are not blank. A text would be taken for the list of its letters."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is {type(value).__name__}, not a list of texts")
    for item in value:
        if not isinstance(item, str) or not item.strip():
            raise ValueError(f"{what} has {item!r}, which is not text or is empty")
    return tuple(value)


def _text_or_none(experiment: Mapping[str, Any], key: str, place: str) -> str | None:
    value = experiment.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} of {place} is not text: {value!r}")
    return value


def _open(text: str) -> set[str]:
    """The placeholders of arguments in a sentence."""
    return set(re.findall(r"\{\d+\}", text))


def _unlike_published(place: str, question: str, distractor: str | None) -> str:
    if not re.match(r"\d{4}", place):
        return f"the id {place!r} does not begin with four digits, which seed the authors' draws"
    if len(_open(question)) > 1 or len(_open(distractor or "")) > 1:
        return f"a sentence of {place} has two arguments, of which the authors' code fills only one"
    return ""


def _filled(text: Any, arguments: Sequence[str], where: str) -> str:
    """A sentence with its arguments. Raises ValueError where a placeholder stays open."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a sentence of {where} is {text!r}")
    for number, argument in enumerate(arguments, 1):
        text = text.replace(f"{{{number}}}", argument)
    still_open = _open(text)
    if still_open:
        raise ValueError(f"{where} leaves {min(still_open)} open: input_args has {len(arguments)}")
    return str(text)


def doubts_about(needles: Sequence[Needle], books: Mapping[str, str]) -> list[str]:
    """What makes a right answer worth nothing or a wrong one right, in words.

    Args:
        needles: of a set.
        books: text by name.
    """
    found = []
    for needle in needles:
        if not needle.draws_a_name and not any(answer in needle.needle for answer in needle.answers):
            found.append(f"no answer of {needle.name} stands in its needle ({needle.answers[0]!r})")
    names = sorted({name for needle in needles if needle.draws_a_name for name in needle.characters})
    if names:
        words = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")
        for book, text in books.items():
            hit = words.search(text)
            if hit is not None:
                found.append(f"the name {hit.group()!r} stands in {book}, too")
    return found
