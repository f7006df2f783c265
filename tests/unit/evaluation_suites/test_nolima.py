"""NoLiMa by our own protocol: exact windows, every depth, the needle where it should be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.evaluation.needle_sets import read_needles
from megatron_exact.evaluation.prompts import Prompts
from megatron_exact.evaluation.suites import nolima
from tests.unit.evaluation_suites.small_evaluation import CHARACTERS, NEEDLES, needle_oracle, suite_options

ROOM = nolima.GENERATION_TOKENS


def made(task: str, prompts: Prompts, window: int = 600, **changes: Any) -> list[dict[str, Any]]:
    chosen: dict[str, Any] = {"nolima_data": NEEDLES, "samples": 52, "placements": 26, **changes}
    chosen = {"nolima_protocol": "window", **chosen}
    options = suite_options("nolima", lengths=(window,), **chosen)
    return nolima.NoLiMa().make_examples(task, window, options, prompts)


@pytest.mark.parametrize("task", nolima.TASKS)
def test_windows_are_filled_exactly_at_every_depth(task: str, prompts: Prompts) -> None:
    documents = made(task, prompts)
    nominal = [float(document["id"].rpartition("@")[2]) for document in documents]
    assert Counter(nominal) == {100 * i / 25: 2 for i in range(26)}
    assert (
        max(abs(document["depth"] - depth) for document, depth in zip(documents, nominal, strict=True)) < 30
    )
    assert len({document["id"] for document in documents}) == 52
    for document in documents:
        assert document["prompt_tokens"] == prompts.count(document["input"])
        assert 600 - 3 <= document["prompt_tokens"] + ROOM <= 600
        (name,) = document["outputs"]
        assert needle_oracle(document["input"]) == name
        assert nolima.NoLiMa().score(f"It is {name}.", document["outputs"]) == 1
        assert nolima.NoLiMa().score(name.lower(), document["outputs"]) == 0
    assert sum(document["prompt_tokens"] + ROOM == 600 for document in documents) > 40


def test_the_needle_lies_where_the_depth_says(prompts: Prompts) -> None:
    for document in made("needle_set", prompts, window=2048, samples=26):
        body = document["input"].partition("chronicle.\n\n")[2].partition("\n\nAnswer from")[0]
        lines = body.split("\n")
        (line,) = [number for number, line in enumerate(lines) if document["outputs"][0] in line]
        before = sum(len(text) + 1 for text in lines[:line])
        around = len(body) - len(lines[line])
        assert before / around == pytest.approx(document["depth"] / 100, abs=0.03)


class WordBook(nolima.Book):
    """Words as tokens."""

    def __init__(self, words: int) -> None:
        self.name, self.text = "words", "word " * words
        self.starts = [5 * word for word in range(words + 1)]


def test_a_window_into_which_no_cut_fits_is_an_error() -> None:
    """A prompt without a book would be much shorter than its window."""
    needle = [nolima.Insertion(text="needle", depth=0.5)]

    def always_too_long(text: str) -> int:
        return 101 if "word" in text else 2

    with pytest.raises(ValueError, match="words: none of 12 cuts fits into a prompt of 100 tokens: choose"):
        nolima.fill(WordBook(500), needle, start=0, budget=100, measure=always_too_long)
    filled, tokens = nolima.fill(
        WordBook(500), needle, start=0, budget=100, measure=lambda text: len(text.split())
    )
    assert tokens == len(filled.split()) == 100


def test_lengths_differ_in_nothing_but_length(prompts: Prompts) -> None:
    short, long = made("needle_set", prompts), made("needle_set", prompts, window=1200)
    assert [(d["id"], d["outputs"], d["book"]) for d in short] == [
        (d["id"], d["outputs"], d["book"]) for d in long
    ]
    assert made("needle_set", prompts) == short
    assert [d["input"] for d in made("needle_set", prompts, seed=1)] != [d["input"] for d in short]


def test_a_distractor_keeps_its_distance(prompts: Prompts) -> None:
    for document in made("needle_set_w_Distractor", prompts, window=2048, samples=26):
        text = document["input"]
        distractors = ("A cousin from", "The innkeeper", "A lecture on", "There was a long debate")
        (place,) = [text.index(words) for words in distractors if words in text]
        assert abs(place - text.index(document["outputs"][0])) > 0.14 * len(text)


def test_everything_is_every_question_at_every_depth(prompts: Prompts) -> None:
    documents = made("needle_set_hard", prompts, samples=None, placements=3)
    assert len(documents) == len({document["id"] for document in documents}) == 6 * 3
    assert {document["outputs"][0] for document in documents} <= set(CHARACTERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 10_000}, "fewer than 10,000 samples"),
        ({"window": 200}, "choose a longer one"),
        ({"window": 60_000}, "a longer book"),
    ],
)
def test_what_cannot_be_made_is_an_error(changes: dict[str, Any], message: str, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match=message):
        made("needle_set", prompts, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.pop("questions"), "questions"),
        (lambda item: item.pop("character_set"), "neither gold_answers nor characters"),
        (lambda item: item.update(task_template="{haystack}"), "lacks"),
        (lambda item: item.update(tests={}), "no question"),
    ],
)
def test_a_damaged_needle_set_is_named(change: Any, message: str, tmp_path: Path) -> None:
    content = json.loads((NEEDLES / "needlesets" / "needle_set.json").read_text())[:1]
    path = tmp_path / "needle_set.json"
    path.write_text(json.dumps(content))
    assert len(read_needles(path)) == 6
    change(content[0])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_needles(path)


def test_given_answers_and_default_template(tmp_path: Path) -> None:
    item = {
        "id": "1",
        "needle": "{1} is here.",
        "system_prompt": "Be brief.",
        "questions": {"q": "Who came to {2}?"},
        "tests": {"t": {"input_args": ["Ada", "town"], "gold_answers": ["Ada", "Ada L."]}},
    }
    path = tmp_path / "needle_set.json"
    path.write_text(json.dumps([item]))
    (needle,) = read_needles(path)
    assert (needle.needle, needle.question, needle.answers) == (
        "Ada is here.",
        "Who came to town?",
        ("Ada", "Ada L."),
    )
    assert (needle.system, needle.template) == ("Be brief.", "")


def test_missing_data_is_named(tmp_path: Path) -> None:
    options = suite_options("nolima", lengths=(512,), nolima_data=tmp_path, nolima_protocol="window")
    with pytest.raises(ValueError, match=r"needle_set.json does not exist"):
        nolima.NoLiMa().sources("needle_set", options)
    (tmp_path / "needlesets").mkdir()
    (tmp_path / "needlesets" / "needle_set.json").write_text("[]")
    with pytest.raises(ValueError, match="haystack/rand_shuffle"):
        nolima.NoLiMa().sources("needle_set", options)
