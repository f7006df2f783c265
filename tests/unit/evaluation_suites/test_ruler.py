"""RULER's examples by lm-eval's generators, in windows that hold them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_exact.evaluation.prompts import Document, Prompts, Template
from megatron_exact.evaluation.suites import ruler
from tests.unit.evaluation_suites.small_evaluation import BOOK, ruler_oracle, small_tokenizer, suite_options

WINDOW = 1536
SAMPLES = 6
ANSWERS = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def made(task: str, prompts: Prompts, window: int = WINDOW, samples: int = SAMPLES, seed: int = 0) -> Any:
    options = suite_options(
        "ruler", lengths=(window,), samples=samples, seed=seed, essays=BOOK, ruler_protocol="lm-eval"
    )
    return ruler.Ruler().make_examples(task, window, options, prompts)


@pytest.fixture(scope="module")
def cells(prompts: Prompts) -> dict[str, list[Document]]:
    return {task: made(task, prompts) for task in ruler.TASKS}


@pytest.mark.parametrize("task", ruler.TASKS)
def test_examples_fill_their_window_and_hold_their_answer(
    task: str, cells: dict[str, list[Document]], prompts: Prompts
) -> None:
    spec, documents = ruler.TASKS[task], cells[task]
    assert len(documents) == SAMPLES
    assert len({document["id"] for document in documents}) == SAMPLES
    assert len({document["input"] for document in documents}) == SAMPLES
    for document in documents:
        prompt = prompts.render(document["input"], document["prefix"], spec.delimiter)
        assert document["prompt_tokens"] == prompts.count(prompt)
        assert 0.45 * WINDOW < document["prompt_tokens"] + spec.generation_tokens <= WINDOW
        assert len(document["outputs"]) == ANSWERS.get(task, 1)
        assert ruler.Ruler().score(ruler_oracle(prompt), document["outputs"]) == 1
        assert ruler.Ruler().score("none of them", document["outputs"]) == 0


@pytest.mark.parametrize("task", [name for name, spec in ruler.TASKS.items() if spec.needles])
def test_needles_and_haystacks_are_those_of_the_paper(task: str, cells: dict[str, list[Document]]) -> None:
    needles = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    for document in cells[task]:
        text = document["input"]
        found = re.findall(r"One of the special magic (\S+) for (\S+) is: (\S+)\.", text)
        if task in ("niah_multikey_2", "niah_multikey_3"):
            assert len(found) > 10
        else:
            assert len(found) == needles.get(task, 1)
        assert {kind for kind, _, _ in found} == {ruler.TASKS[task].needles["type_needle_v"]}
        assert ("The grass is green." in text) == (task == "niah_single_1")
        assert document["prefix"].startswith("The special magic ")
        for key in document["prefix"].partition(" for ")[2].partition(" mentioned")[0].split(", "):
            assert key.removeprefix("and ") in {name for _, name, _ in found}


def test_common_words_come_as_often_as_upstream_counts(prompts: Prompts) -> None:
    for document in made("cwe", prompts, samples=3):
        words = re.findall(r"\d+\. (\S+)", document["input"])
        assert {words.count(word) for word in document["outputs"]} == {6}
        assert {words.count(word) for word in set(words) - set(document["outputs"])} <= {1}


def test_of_all_tasks_cwe_fills_its_window_least(
    cells: dict[str, list[Document]],
) -> None:
    """Upstream counts a worked example that it then leaves out; docs/evaluation.md says so."""
    filled = {
        task: sum(d["prompt_tokens"] + ruler.TASKS[task].generation_tokens for d in documents)
        / (SAMPLES * WINDOW)
        for task, documents in cells.items()
    }
    assert min(filled, key=lambda task: filled[task]) == "cwe"
    assert ruler.MIN_FILL <= filled["cwe"] < 0.9
    assert all(filled[task] > 0.9 for task, spec in ruler.TASKS.items() if spec.needles)


def test_needles_lie_at_all_depths(prompts: Prompts) -> None:
    tenths = set()
    for document in made("niah_single_1", prompts, window=512, samples=80):
        haystack = document["input"].partition("afterwards.\n")[2].rpartition("\nWhat is")[0]
        tenths.add(10 * haystack.index("One of the special") // len(haystack))
    assert min(tenths) == 0
    assert max(tenths) >= 8
    assert len(tenths) >= 6


def test_every_cell_has_its_own_seed(prompts: Prompts, cells: dict[str, list[Document]]) -> None:
    assert made("niah_single_1", prompts) == cells["niah_single_1"]  # whatever was made in between
    assert made("cwe", prompts) == cells["cwe"]
    assert made("vt", prompts) == cells["vt"]
    other = made("niah_single_1", prompts, seed=1)
    assert not {d["input"] for d in other} & {d["input"] for d in cells["niah_single_1"]}


@pytest.mark.parametrize("task", ["niah_multiquery", "fwe", "vt", "cwe"])
def test_a_template_counts_too(task: str) -> None:
    chat = CHAT + "{# " + "x" * 10 + " #}"
    prompts = Prompts(
        small_tokenizer(), Template(kind="file", text="<preface " + "very " * 40 + ">" + chat)
    )
    spec = ruler.TASKS[task]
    for document in made(task, prompts, window=2048, samples=2):
        prompt = prompts.render(document["input"], document["prefix"], spec.delimiter)
        assert prompt.startswith("<preface")
        assert prompt.endswith(document["prefix"])
        assert prompts.count(prompt) + spec.generation_tokens <= 2048


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_window_that_is_too_short_is_an_error(task: str, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match=r"choose longer windows"):
        made(task, prompts, window=130)


def test_vt_is_made_in_the_shortest_window_that_holds_it_with_a_template() -> None:
    """Its worked example fills part of the 500 tokens that it may have; the rest is not asked for."""
    prompts = Prompts(small_tokenizer(), Template(kind="file", text=CHAT))

    def fits(window: int) -> bool:
        try:
            return bool(made("vt", prompts, window=window))
        except ValueError:
            return False

    low, high = 300, 2048
    while high - low > 8:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    documents = made("vt", prompts, window=high)
    longest = max(document["prompt_tokens"] for document in documents) + ruler.TASKS["vt"].generation_tokens
    assert 0.9 * high < longest <= high


def test_essays_are_needed_only_where_they_are_used(prompts: Prompts, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    options = suite_options("ruler", lengths=(WINDOW,), samples=1, essays=tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="--essays"):
        ruler.Ruler().make_examples("niah_single_2", WINDOW, options, prompts)
    assert ruler.Ruler().make_examples("niah_single_1", 512, options, prompts)
    missing = suite_options("ruler", lengths=(WINDOW,), essays=tmp_path / "missing.txt")
    with pytest.raises(ValueError, match=r"--essays .*missing\.txt: no such file"):
        ruler.Ruler().sources("niah_single_2", missing)
    assert ruler.Ruler().sources("niah_single_1", missing) == {}
    assert len(ruler.essay_words("a few words", 5000)) > 5000


def test_tasks_are_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks.ruler import niah_utils

    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    monkeypatch.setattr(niah_utils, "get_tokenizer", lambda _: None)
    monkeypatch.setattr(niah_utils, "get_haystack", lambda type_haystack: type_haystack)
    monkeypatch.setattr(niah_utils, "download_dataset", lambda cells: next(iter(cells)))
    monkeypatch.setattr(niah_utils, "generate_samples", lambda haystack, **named: named)
    for name, spec in ruler.TASKS.items():
        config = load_yaml(folder / f"{name}.yaml")
        assert config["generation_kwargs"]["max_gen_toks"] == spec.generation_tokens
        assert config["target_delimiter"] == spec.delimiter
        assert config["generation_kwargs"]["until"] == []
        if spec.needles:
            passed = getattr(niah_utils, name)()
            assert {key: passed[key] for key in spec.needles} == spec.needles
            known = {"max_seq_length", "template", "num_samples", "TOKENIZER", *spec.needles}
            assert set(passed) == known
