"""Standard QA by lm-eval's tasks, on local copies of a few lines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.evaluation.evaluate import Evaluation, write_prompts
from megatron_exact.evaluation.result_folders import read_cell, read_result_folder, text_sha256
from megatron_exact.evaluation.suites import qa
from megatron_exact.files import sha256_file
from tests.unit.evaluation_suites.small_evaluation import AnsweringModel, suite_options


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two examples a task; the shortest choice is right in the first of them and wrong in the second."""
    folder = tmp_path / "qa"
    choices = [["a much longer text", "no"], ["no", "a much longer text"]]
    arc = [
        {
            "id": str(number),
            "question": "Which?",
            "choices": {"text": texts, "label": ["A", "B"]},
            "answerKey": "B",
        }
        for number, texts in enumerate(choices)
    ]
    write_rows(folder / "arc_challenge" / "test.jsonl", arc)
    piqa = [{"goal": "Do it.", "sol1": a, "sol2": b, "label": 1} for a, b in choices]
    write_rows(folder / "piqa" / "validation.jsonl", piqa)
    hellaswag = [
        {"ind": 1, "activity_label": "Run", "ctx_a": "He", "ctx_b": "runs", "endings": ends, "label": "1"}
        for ends in choices
    ]
    write_rows(folder / "hellaswag" / "validation.jsonl", hellaswag)
    winogrande = [
        {"sentence": "Of both, _ is big.", "option1": a, "option2": b, "answer": "2"} for a, b in choices
    ]
    write_rows(folder / "winogrande" / "validation.jsonl", winogrande)
    gsm8k = [{"question": f"1 + {n}?", "answer": f"It is.\n#### {n + 1}"} for n in range(2)]
    write_rows(folder / "gsm8k" / "test.jsonl", gsm8k)
    write_rows(folder / "gsm8k" / "train.jsonl", gsm8k * 3)
    mmlu = [
        {"question": f"Which {n}?", "choices": list("wxyz"), "answer": n, "subject": "s"} for n in (0, 3)
    ]
    for split in ("test", "dev"):
        write_rows(folder / "mmlu" / "anatomy" / f"{split}.jsonl", mmlu)
    return folder


def run(model: Path, folder: Path, tasks: tuple[str, ...], data: Path, **changes: Any) -> Evaluation:
    oracle = AnsweringModel(lambda prompt: "so #### 2" if prompt.endswith("1 + 1?\nAnswer:") else "so 7")
    evaluation = Evaluation(
        model,
        folder / "results",
        suite_options(suite="qa", tasks=tasks, qa_data=data, **changes),
        cache=folder / "cache",
        load=lambda *_: oracle,
    )
    evaluation.run()
    return evaluation


def test_every_task_scores_by_its_metric(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = qa._configs
    monkeypatch.setattr(
        qa,
        "_configs",
        lambda task, shots=None: [
            (n, c) for n, c in configs(task, shots) if task != "mmlu" or "anatomy" in n
        ],
    )
    run(model, tmp_path, qa.TASKS, data)
    folder = read_result_folder(tmp_path / "results")
    found = {}
    for cell in folder.files:
        assert cell.length == 0
        found[cell.task] = read_cell(folder, cell)
        assert len(set(found[cell.task].prompts)) == 2
    scores = {task: examples.scores.tolist() for task, examples in found.items()}
    # likelihood falls with length: choices of one length tie, and by character the longer one wins
    assert scores["winogrande"] == [0, 0]
    assert scores["arc_challenge"] == scores["piqa"] == scores["hellaswag"] == [0, 1]
    for task in ("winogrande", "arc_challenge", "piqa", "hellaswag", "mmlu"):
        lines = (tmp_path / "results" / "qa" / task / "0.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            assert (line["prediction"] == line["references"][0]) == (line["score"] == 1)
    assert scores["gsm8k"] == [0, 1]
    assert scores["mmlu"] == [1, 0]
    assert found["gsm8k"].references == [["1"], ["2"]]
    assert found["arc_challenge"].references == [["no"], ["a much longer text"]]
    assert found["mmlu"].references == [["A"], ["D"]]
    assert found["mmlu"].ids == ["mmlu_anatomy-00000", "mmlu_anatomy-00001"]
    sources = folder.info["suites"]["qa"]["sources"]
    assert sources["mmlu/anatomy/dev.jsonl"] == sha256_file(data / "mmlu" / "anatomy" / "dev.jsonl")
    assert {name.split("/")[0] for name in sources} == set(qa.TASKS)
    (data / "piqa" / "validation.jsonl").write_text("changed\n")
    with pytest.raises(ValueError, match=r"piqa/validation\.jsonl"):
        run(model, tmp_path, ("piqa",), data)


def test_all_subjects_of_mmlu_are_there() -> None:
    names = [name for name, _ in qa._configs("mmlu")]
    assert len(names) == 57
    assert "mmlu_anatomy" in names


def never(*_: Any) -> Any:
    raise AssertionError("the model was loaded")


def test_missing_local_data_is_named_before_anything_is_written(
    model: Path, data: Path, tmp_path: Path
) -> None:
    for folder, tasks, message in [
        (data, ("mmlu",), r"abstract_algebra holds no (test|dev)\.jsonl"),
        (tmp_path / "nowhere", ("piqa",), r"nowhere/piqa holds no validation\.jsonl"),
    ]:
        options = suite_options(suite="qa", tasks=tasks, qa_data=folder)
        with pytest.raises(ValueError, match=message):
            Evaluation(model, tmp_path / "results", options, cache=tmp_path / "cache", load=never)
    assert not (tmp_path / "results").exists()


def test_records_that_lm_eval_cannot_use_are_named(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gsm8k: lm-eval cannot make .*/gsm8k .*there are 9 to show"):
        run(model, tmp_path, ("gsm8k",), data, shots=9)
    write_rows(data / "piqa" / "validation.jsonl", [{"goal": "x", "sol1": "a"}])
    with pytest.raises(ValueError, match=r"piqa: lm-eval cannot make .*/piqa .*fields of the Hub's"):
        run(model, tmp_path / "piqa", ("piqa",), data)


def test_a_number_of_shots_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--shots -1: give 0 or more"):
        suite_options(suite="qa", shots=-1)


def test_too_many_shots_are_an_error(model: Path, data: Path, tmp_path: Path) -> None:
    write_rows(data / "gsm8k" / "train.jsonl", [{"question": "long " * 4000, "answer": "#### 1"}] * 2)
    with pytest.raises(ValueError, match=r"gsm8k: a prompt .* do not fit into 4,096"):
        run(model, tmp_path, ("gsm8k",), data, shots=1)


def test_rows_of_prompts_alone_are_what_a_model_is_sent(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and continuations of each id hash to what an evaluation records."""
    configs = qa._configs
    monkeypatch.setattr(
        qa,
        "_configs",
        lambda task, shots=None: [
            (n, c) for n, c in configs(task, shots) if task != "mmlu" or "anatomy" in n
        ],
    )
    path = tmp_path / "prompts.jsonl"
    count = write_prompts(model, path, suite_options("qa", qa_data=data))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sizes = Counter(row["task"] for row in rows)
    assert sum(sizes.values()) == count
    assert sizes == {**dict.fromkeys(qa.TASKS, 2), "winogrande": 4}
    assert {(row["suite"], row["length"], row["system"], row["depth"]) for row in rows} == {
        ("qa", 0, "", None)
    }
    sent: dict[tuple[str, str], list[str]] = {}
    references = {}
    for row in rows:
        name = row["task"], row["id"]
        ends = row.get("continuations", [""])
        sent.setdefault(name, []).extend(row["prompt"] + end for end in ends)
        references[name] = row["references"]
    run(model, tmp_path, qa.TASKS, data)
    folder = read_result_folder(tmp_path / "results")
    for cell in folder.files:
        examples = read_cell(folder, cell)
        for name, digest, right in zip(examples.ids, examples.prompts, examples.references, strict=True):
            assert text_sha256(*sent[cell.task, name]) == digest, (cell, name)
            assert references[cell.task, name] == right
    assert len(sent) == 12
