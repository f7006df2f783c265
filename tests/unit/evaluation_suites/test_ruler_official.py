"""RULER as published: prompts recorded from NVIDIA's generators, sizes of haystacks, files of prepare.py.

`tests/recorded/record_ruler_prompts.py` recorded them.
"""

from __future__ import annotations

import json
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.evaluation import ruler_questions
from megatron_exact.evaluation.prompts import Prompts, Template
from megatron_exact.evaluation.ruler_questions import (
    Essays,
    Question,
    WordPairs,
    chain_example,
    chain_question,
    coded_question,
    coded_vocabulary,
    common_words_question,
    largest_size,
    needle_question,
)
from megatron_exact.evaluation.suites import ruler
from tests.recorded.made_up_ruler import CHAT_TEMPLATE, LENGTHS, SHORT_LIST, essays, word_tokenizer
from tests.recorded.record_ruler_prompts import OUTPUT, hash_of
from tests.unit.evaluation_suites.small_evaluation import ruler_oracle, suite_options

RECORDED = json.loads(OUTPUT.read_text())
GROUPS = {(group["task"], group["length"], group["template"]): group for group in RECORDED["groups"]}
TEMPLATES = {"base": None, "meta-chat": CHAT_TEMPLATE}
MADE_UP = Essays(essays())


@pytest.fixture(autouse=True)
def short_list(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = WordPairs(*(ruler_questions._word_list(kind)[:SHORT_LIST] for kind in ("adjective", "noun")))
    monkeypatch.setattr(ruler_questions, "word_pairs", lambda: pairs)


@pytest.fixture(scope="module")
def essay_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("essays") / "PaulGrahamEssays.json"
    path.write_text(json.dumps({"text": essays()}))
    return path


def prompts_of(template: str = "base") -> Prompts:
    text = TEMPLATES[template]
    return Prompts(word_tokenizer(), Template(kind="none" if text is None else "file", text=text))


def drawn_again(group: dict[str, Any]) -> list[Question]:
    """The questions of one recorded cell, from its seeds and sizes."""
    task, length = group["task"], group["length"]
    draws = [(random.Random(seed), size) for seed, size in group["draws"]]
    if task == "vt":
        seed, size = group["example"]
        example = chain_example(size, random.Random(seed))
        return [chain_question(size, draw, example) for draw, size in draws]
    if task == "cwe":
        return [common_words_question(size, draw, length, ()) for draw, size in draws]
    if task == "fwe":
        return [coded_question(size, coded_vocabulary((length - 50) // 50, draw)) for draw, size in draws]
    return [needle_question(task, size, draw, MADE_UP) for draw, size in draws]


def made(task: str, essay_file: Path, template: str = "base", length: int = LENGTHS[0], **more: Any) -> Any:
    options = suite_options("ruler", lengths=(length,), **{"samples": 12, "essays": essay_file, **more})
    return ruler.Ruler().make_examples(task, length, options, prompts_of(template))


@pytest.mark.parametrize("group", GROUPS.values(), ids=["-".join(map(str, name)) for name in GROUPS])
def test_prompts_are_those_of_nvidias_generators(group: dict[str, Any]) -> None:
    assert version("wonderwords") == RECORDED["wonderwords"], "the lists of words are others: record again"
    prompts, questions = prompts_of(group["template"]), drawn_again(group)
    texts = [prompts.render(question.text) + question.start for question in questions]
    if "prompt" in group:
        assert texts[0] == group["prompt"]
    assert hash_of(texts) == group["prompts_sha256"]
    assert hash_of([question.answers for question in questions]) == group["answers_sha256"]
    generated = ruler.TASKS[group["task"]].generation_tokens
    assert generated == group["generation_tokens"]
    tokens = [len(prompts.tokenizer.encode(text, add_special_tokens=False)) + generated for text in texts]
    assert tokens == group["tokens"]


def test_another_draw_is_another_prompt() -> None:
    """The control: nothing but the recorded draws gives the recorded hash."""
    group = GROUPS["niah_single_1", LENGTHS[0], "base"]
    other = {**group, "draws": [[seed + 1, size] for seed, size in group["draws"]]}
    assert hash_of([q.text + q.start for q in drawn_again(other)]) != group["prompts_sha256"]


@pytest.mark.parametrize("group", GROUPS.values(), ids=["-".join(map(str, name)) for name in GROUPS])
def test_windows_are_filled_as_theirs_are(group: dict[str, Any], essay_file: Path) -> None:
    """The fullest prompts agree within 3 % of the window; what is shrunk by a step agrees in that step."""
    task, length, prompts = group["task"], group["length"], prompts_of(group["template"])
    documents = made(task, essay_file, group["template"], length)
    spec = ruler.TASKS[task]
    rendered = [prompts.render(document["input"]) + document["prefix"] for document in documents]
    totals = [len(prompts.tokenizer.encode(text)) + spec.generation_tokens for text in rendered]
    assert max(totals) <= length
    assert abs(max(totals) - max(group["tokens"])) < 0.03 * length
    assert min(totals) > min(group["tokens"]) - 0.1 * length or spec.needs_essays
    for document, text in zip(documents, rendered, strict=True):
        assert ruler.Ruler().score(ruler_oracle(text), document["outputs"]) == 1


def test_a_prompt_that_comes_out_too_long_is_drawn_again_smaller_by_a_step() -> None:
    """Sizes of essays: the one that was found and 500 less, as at 1K in NVIDIA's data."""
    draw = random.Random(0)

    def compose(size: int) -> Question:
        return Question(text="a" * size, start="b" * draw.randint(0, 40), answers=[])

    def count(question: Question) -> int:
        return len(question.text) + len(question.start)

    found = [*ruler_questions._fill("niah", 1024, compose, count, samples=50, step=500, smallest=1)]
    sizes = sorted({len(question.text) for question in found})
    assert [sizes[1] - sizes[0], len(sizes)] == [500, 2]
    assert max(map(count, found)) <= 1024 < sizes[1] + 40
    with pytest.raises(ValueError, match=r"niah does not fit into 400 tokens: choose longer windows"):
        [*ruler_questions._fill("niah", 400, compose, count, samples=1, step=500, smallest=1)]


def test_a_size_is_the_largest_that_fits() -> None:
    for largest in (4, 5, 6, 9, 10, 11, 79, 80, 81, 1000):
        assert largest_size(lambda size, largest=largest: size <= largest, 5) == max(largest, 5)
        assert largest_size(lambda size, largest=largest: size <= largest, 5, 100) == min(
            max(largest, 5), 100
        )


def test_pairs_of_words_are_in_order() -> None:
    adjectives, nouns = ["self", "self-made", "selfish", "a", "odd"], ["made-up", "up", "a", "zoo", "up"]
    pairs = WordPairs(adjectives, nouns)
    assert [*pairs] == sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_needles_lie_at_all_depths(essay_file: Path) -> None:
    """Forty depths from 0 to 100 %, each as likely: the mean of 200 is within 5 standard errors of 50 %."""
    depths = []
    for document in made("niah_single_2", essay_file, samples=200):
        text = document["input"].partition("afterwards.\n")[2].rpartition("\nWhat is")[0]
        before, _, after = text.partition("One of the special magic")
        depths.append(len(before) / (len(before) + len(after.partition(".")[2])))
    assert min(depths) < 0.001
    assert max(depths) > 0.97
    assert abs(np.mean(depths) - 0.5) < 5 * 0.296 / 200**0.5


def test_a_long_window_needs_more_words(essay_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cwe at 81,920 tokens needs more than 8,166 words.*--ruler-w"):
        made("cwe", essay_file, length=81_920)
    path = tmp_path / "english_words.json"
    path.write_text(json.dumps({str(number): f"word{number}" for number in range(9_500)}))
    (document,) = made("cwe", essay_file, length=81_920, samples=1, ruler_words=path)
    assert all(answer.startswith("word") for answer in document["outputs"])
    options = suite_options("ruler", lengths=(81_920,), ruler_words=path)
    assert set(ruler.Ruler().sources("cwe", options)) == {"more words"}
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"english_words.json.*git lfs"):
        made("cwe", essay_file, length=81_920, ruler_words=path)


def test_vt_fits_into_1k_with_a_chat_template(essay_file: Path) -> None:
    template = "{% for m in messages %}<|begin|><{{ m['role'] }}>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    prompts = Prompts(word_tokenizer(), Template(kind="file", text=template + "<assistant>\n"))
    options = suite_options("ruler", lengths=(1024,), samples=8)
    for document in ruler.Ruler().make_examples("vt", 1024, options, prompts):
        text = prompts.render(document["input"]) + document["prefix"]
        assert text.endswith(", they are: ")
        assert 850 < prompts.count(text) + 30 <= 1024


def prepared(folder: Path, task: str, count: int = 3, **changes: Any) -> Path:
    """A file as prepare.py writes it, with keys that nobody reads."""
    (folder / task).mkdir(parents=True)
    rows = [
        {
            "index": 77,
            "input": f"A text number {number}, value{number}.",
            "outputs": [f"value{number}"],
            "length": 20,
            "answer_prefix": " The value is",
            **changes,
        }
        for number in range(count)
    ]
    path = folder / task / "validation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_prepare_are_read(tmp_path: Path) -> None:
    prepared(tmp_path / "1024" / "data", "vt")
    prepared(tmp_path, "fwe")
    common: Any = {"lengths": (1024,), "ruler_data": tmp_path}
    options = suite_options("ruler", **common)
    documents = ruler.Ruler().make_examples("vt", 1024, options, prompts_of())
    assert documents[2] == {
        "id": "vt-0002",
        "input": "A text number 2, value2.",
        "prefix": " The value is",
        "outputs": ["value2"],
    }
    assert [*ruler.Ruler().sources("fwe", options)] == ["fwe/1024/validation.jsonl"]
    assert ruler.Ruler().record(options)["samples"] is None
    few = suite_options("ruler", samples=2, **common)
    assert len(ruler.Ruler().make_examples("fwe", 1024, few, prompts_of())) == 2
    (row, *_) = ruler.Ruler().prompt_rows("fwe", 1024, few, prompts_of(), lambda make: make())
    assert row["prompt"] == "A text number 0, value0. The value is"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": "one"}, r"line 1 is not an example of RULER \(outputs is 'one', not a list\): write"),
        ({"outputs": []}, "outputs is empty"),
        ({"outputs": ["a", ""]}, "an empty text in outputs"),
        ({"input": None}, "input is None"),
        ({"answer_prefix": 1}, "answer_prefix is 1"),
    ],
)
def test_damaged_files_of_prepare_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    prepared(tmp_path, "vt", **changes)
    options = suite_options("ruler", lengths=(1024,), ruler_data=tmp_path)
    with pytest.raises(ValueError, match=message):
        ruler.Ruler().make_examples("vt", 1024, options, prompts_of())


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    options = suite_options("ruler", lengths=(1024,), ruler_data=tmp_path)
    with pytest.raises(ValueError, match=r"has neither 1024/data/cwe/validation.jsonl nor cwe/validation"):
        ruler.Ruler().sources("cwe", options)
    prepared(tmp_path, "cwe")
    more = suite_options("ruler", lengths=(1024,), ruler_data=tmp_path, samples=9)
    with pytest.raises(ValueError, match="has 3 examples: give fewer --samples"):
        ruler.Ruler().make_examples("cwe", 1024, more, prompts_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ruler_protocol": "lm-eval", "ruler_data": Path()},
            "--ruler-data is for --ruler-protocol official",
        ),
        ({"ruler_protocol": "lm-eval", "ruler_words": Path()}, "--ruler-words is for --ruler-protocol"),
        ({"ruler_data": Path(), "essays": Path()}, "--essays has no effect on --ruler-data: leave it out"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite_options("ruler", lengths=(1024,), **changes)
