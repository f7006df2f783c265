"""NoLiMa as published: prompts recorded from the authors' code, few samples, base and effective length.

`tests/recorded/record_nolima_prompts.py` recorded them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.evaluation.needle_sets import read_needles
from megatron_exact.evaluation.prompts import Document, Prompts, Template
from megatron_exact.evaluation.result_folders import CellExamples, text_sha256
from megatron_exact.evaluation.suites import nolima
from megatron_exact.evaluation.suites.suite import SuiteOptions
from tests.recorded.made_up_nolima import TEMPLATE, tokenizer, write_data
from tests.recorded.record_nolima_prompts import OUTPUT, SHOWN, hash_of
from tests.unit.evaluation_suites.small_evaluation import suite_options

RECORDED = json.loads(OUTPUT.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("nolima") / "data")


@pytest.fixture(scope="module")
def plain() -> Prompts:
    return Prompts(tokenizer(), Template(kind="none", text=None))


def options_of(data: Path, length: int, **changes: Any) -> SuiteOptions:
    changes = {"nolima_data": data, "nolima_protocol": "official", **changes}
    return suite_options("nolima", lengths=(length,), **changes)


def made(task: str, data: Path, prompts: Prompts, length: int = 250, **changes: Any) -> list[Document]:
    return nolima.NoLiMa().make_examples(task, length, options_of(data, length, **changes), prompts)


def by_depth(documents: list[Document], question: str, book: str) -> list[Document]:
    return sorted(
        (
            document
            for document in documents
            if (document["question"], document["book"]) == (question, book)
        ),
        key=lambda document: float(document["id"].rpartition("@")[2]),
    )


@pytest.mark.parametrize("length", sorted({group["length"] for group in RECORDED["groups"]}))
@pytest.mark.parametrize("task", nolima.TASKS)
def test_every_prompt_and_answer_is_the_authors(task: str, length: int, data: Path, plain: Prompts) -> None:
    documents = made(task, data, plain, length)
    groups = [group for group in RECORDED["groups"] if (group["task"], group["length"]) == (task, length)]
    assert len(documents) == 26 * len(groups) > 0
    for group in groups:
        found = by_depth(documents, group["question"], group["book"])
        for shown in RECORDED["shown"]:
            if {**group, **shown} == {**shown, **group}:
                assert found[shown["depth"] // 4]["input"] == shown["prompt"]
        assert hash_of([document["input"] for document in found]) == group["prompts_sha256"]
        assert hash_of([document["outputs"] for document in found]) == group["answers_sha256"]
        assert group["system"] == [nolima.NoLiMa().system(options_of(data, length))]
        assert (group["roles"], group["max_tokens"]) == (["system", "user"], [nolima.GENERATION_TOKENS])
        assert [document["depth"] for document in found] == [
            100 * round(length * percent / 100) / length for percent in np.linspace(0, 100, 26)
        ]


def test_the_comparison_would_notice(data: Path, plain: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one letter of the seed's rule, of the join or of the depth changes the hashes."""
    (group, *_) = [g for g in RECORDED["groups"] if g["task"] == "needle_set" and g["length"] == 250]
    for name, value in (("BASE_SEED", 43), ("PLACEMENTS", 25)):
        changes = {"placements": value} if name == "PLACEMENTS" else {}
        with monkeypatch.context() as patch:
            patch.setattr(nolima, name, value)
            found = by_depth(made("needle_set", data, plain, **changes), group["question"], group["book"])
        assert hash_of([document["input"] for document in found]) != group["prompts_sha256"]


def test_recorded_prompts_are_of_the_published_code() -> None:
    assert RECORDED["commit"].startswith("7532e4e")
    assert RECORDED["template_sha256"] == nolima.TEMPLATE_SHA256
    assert len(RECORDED["shown"]) == len(SHOWN) * len(nolima.TASKS)


def test_the_window_protocol_sends_something_else(data: Path, plain: Prompts) -> None:
    official = made("needle_set", data, plain, 600, samples=26)
    own = made("needle_set", data, plain, 600, samples=26, nolima_protocol="window")
    assert not {document["input"] for document in official} & {document["input"] for document in own}
    assert nolima.NoLiMa().system(options_of(data, 600, nolima_protocol="window")) == ""


@pytest.mark.parametrize(("depths", "questions", "books"), [(26, 58, 5), (26, 8, 1), (4, 6, 2), (1, 3, 3)])
def test_few_samples_spread_and_more_contain_them(depths: int, questions: int, books: int) -> None:
    order = list(nolima.spread(depths, questions, books, 0))
    assert len(order) == len(set(order)) == depths * questions * books
    for count in (depths, 2 * depths, 32, 64, 130, len(order) // 2):
        for axis, most in enumerate((depths, questions, books)):
            seen = Counter(item[axis] for item in order[:count])
            assert max(seen.values()) - min(seen.get(value, 0) for value in range(most)) <= max(
                1, -(-count // most) - count // most + (2 if axis else 0)
            )
    assert order != list(nolima.spread(depths, questions, books, 1)) or questions == 1


def test_eight_samples_reach_all_depths_and_32_of_64_are_the_32(data: Path, plain: Prompts) -> None:
    eight = made("needle_set", data, plain, samples=8)
    depths = sorted(document["depth"] for document in eight)
    assert depths[0] < 15
    assert depths[-1] > 85
    assert max(np.diff(depths)) < 25
    assert len({document["book"] for document in eight}) == 2
    assert len({document["question"] for document in eight}) == 5
    some, more = made("needle_set", data, plain, samples=32), made("needle_set", data, plain, samples=64)
    assert some == more[:32]


def test_the_authors_template_is_read_and_not_run(
    data: Path, plain: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = write_data(tmp_path / "copy" / "data")
    path = copied / "needlesets" / "needle_set.json"
    content = json.loads(path.read_text())
    for item in content:
        del item["task_template"]
    path.write_text(json.dumps(content))
    suite, options = nolima.NoLiMa(), options_of(copied, 250)
    with pytest.raises(ValueError, match=r"run_tests.py is not there.*--nolima-template"):
        suite.sources("needle_set", options)
    code = tmp_path / "copy" / nolima.TEMPLATE_FILE
    code.parent.mkdir()
    code.write_text(f"raise SystemExit('was run')\nDEFAULT_TASK_TEMPLATE = {TEMPLATE!r}\n")
    with pytest.raises(ValueError, match="not the template that NoLiMa was published with"):
        suite.sources("needle_set", options_of(copied, 250))
    monkeypatch.setattr(nolima, "TEMPLATE_SHA256", text_sha256(TEMPLATE))
    options = options_of(copied, 250, samples=26)
    assert "template of the authors" in suite.sources("needle_set", options)
    found = suite.make_examples("needle_set", 250, options, plain)
    assert found == made("needle_set", data, plain, samples=26)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests": {"T": {"input_args": ["a", "b", "c"], "gold_answers": ["", "x"]}}}, "or is empty"),
        ({"tests": {"T": {"input_args": ["a", "b", "c"], "gold_answers": [7]}}}, "7, which is not text"),
        ({"tests": {"T": {"input_args": ["a", "b", "c"], "gold_answers": "abc"}}}, "str, not a list"),
        ({"tests": {"T": {"input_args": "abc"}}}, "input_args of 0401_T_onehop is str, not a list"),
        ({"tests": {"T": {"input_args": ["a", "b"]}}}, r"0401_T_twohop leaves \{3\} open"),
        ({"character_set": "Ada"}, "character_set of 0401 is str, not a list"),
        ({"character_set": ["Ada", " "]}, "not text or is empty"),
        ({"needle": 3}, "a sentence of 0401_T1_onehop is 3"),
        ({"needle": "Nobody lives in {1}."}, "neither gold_answers nor characters"),
        ({"questions": {"q": "Where is {CHAR}, {1}?"}, "needle": "{1}.", "tests": {
            "T": {"input_args": ["a"], "gold_answers": ["a"]}}}, "CHAR"),
        ({"id": 401}, "id 401 is not text"),
        ({"task_template": "{haystack} {question} {answer}"}, "has other fields"),
        ({"system_prompt": ["a"]}, "system_prompt of 0401 is not text"),
    ],
)  # fmt: skip
def test_needle_sets_that_would_spoil_scores_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data")
    path = data / "needlesets" / "needle_set.json"
    content = json.loads(path.read_text())[:1]
    assert len(read_needles(path)) == 5
    path.write_text(json.dumps([{**content[0], **change}]))
    with pytest.raises(ValueError, match=message):
        nolima.NoLiMa().sources("needle_set", options_of(data, 250))


@pytest.mark.parametrize(
    ("change", "book", "message"),
    [
        ({}, "So Fenella came.\n", "the name 'Fenella' stands in rand_book_1.txt"),
        (
            {"needle": "A {1}.", "tests": {"T": {"input_args": ["x", "y", "z"], "gold_answers": ["q"]}}},
            None,
            r"no answer of 0401_T_onehop stands in its needle",
        ),
    ],
)
def test_doubtful_sets_need_a_word(
    change: dict[str, Any], book: str | None, message: str, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data")
    path = data / "needlesets" / "needle_set.json"
    path.write_text(json.dumps([{**json.loads(path.read_text())[0], **change}]))
    if book is not None:
        with open(data / "haystack" / "rand_shuffle" / "rand_book_1.txt", "a", encoding="utf-8") as stream:
            stream.write(book)
    with pytest.raises(ValueError, match=f"{message}.*--doubtful-needles allow"):
        nolima.NoLiMa().sources("needle_set", options_of(data, 250))
    with pytest.warns(UserWarning, match=message):
        nolima.NoLiMa().sources("needle_set", options_of(data, 250, doubtful_needles="allow"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "ab"}, "does not begin with four digits"),
        ({"questions": {"q": "Who went from {1} to {2}?"}}, "two arguments"),
    ],
)
def test_what_the_authors_code_asks_otherwise_is_for_the_other_protocol(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data")
    path = data / "needlesets" / "needle_set.json"
    path.write_text(json.dumps([{**json.loads(path.read_text())[0], **change}]))
    with pytest.raises(ValueError, match=f"{message}.*--nolima-protocol window"):
        nolima.NoLiMa().sources("needle_set", options_of(data, 250))
    nolima.NoLiMa().sources("needle_set", options_of(data, 250, nolima_protocol="window"))


@pytest.mark.parametrize(
    ("metric", "right", "wrong"),
    [
        ("EM", " Ada\n", "It is Ada"),
        ("contains", "It is\nAda\nor so", "ada"),
        ("lastline_EM", "Let me think.\nAda \n", "It is Ada"),
        ("lastline_contains", "Let me think.\nIt is Ada\n", "Ada\nis it"),
    ],
)
def test_metrics(metric: str, right: str, wrong: str) -> None:
    assert nolima.score_answer(metric, right, ["Ada"]) == 1
    assert nolima.score_answer(metric, wrong, ["Ada"]) == 0


def test_the_set_with_chain_of_thought_is_scored_by_its_last_line(data: Path) -> None:
    suite = nolima.NoLiMa()
    official = suite.record(options_of(data, 250))
    reply = "Perhaps Ada.\nI cannot say."
    assert suite.score_by_record("needle_set", reply, ["Ada"], official) == 1
    assert suite.score_by_record("needle_set_w_CoT", reply, ["Ada"], official) == 0
    own = suite.record(options_of(data, 600, nolima_protocol="window"))
    assert suite.score_by_record("needle_set_w_CoT", reply, ["Ada"], own) == 1


def cell(scores: dict[str, list[float]]) -> CellExamples:
    ids = [f"{name}@book@{place}" for name, values in scores.items() for place in range(len(values))]
    values = np.array([value for values in scores.values() for value in values])
    return CellExamples(path=Path(), ids=ids, prompts=ids, references=[], scores=values)


def test_base_score_and_effective_length() -> None:
    lengths = {
        250: cell({"a": [1, 1], "b": [0, 0]}),
        1000: cell({"a": [1, 0], "b": [1, 1]}),
        2000: cell({"a": [1, 1], "b": [1, 0.5]}),
        4000: cell({"a": [1, 0], "b": [1, 1]}),
    }
    found = nolima.effective_length(lengths, nolima.NoLiMa().drawn_with)
    assert found is not None
    assert found["base_lengths"] == [250, 1000]
    assert found["base_score"] == 100  # of a 100 at 250, of b 100 at 1,000
    assert found["base_score_mean"] == 62.5
    assert (found["threshold"], found["effective_length"]) == (85, 2000)
    assert nolima.effective_length({2000: lengths[2000]}, str) is None
