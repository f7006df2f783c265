"""Several processes evaluate one folder: together they write what one process writes, byte by byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.evaluation.evaluate import Evaluation
from megatron_exact.evaluation.result_folders import Cell
from megatron_exact.evaluation.shard_files import FOLDER, shard_path
from megatron_exact.evaluation.suites import nolima as nolima_suite
from megatron_exact.evaluation.suites import qa
from megatron_exact.evaluation.suites.suite import SuiteOptions
from megatron_exact.shares import Share
from tests.unit.evaluation_suites.small_evaluation import (
    BOOK,
    NEEDLES,
    ROOT,
    AnsweringModel,
    needle_oracle,
    ruler_oracle,
    suite_options,
)

CELL = Cell(suite="nolima", task="needle_set", length=512)


def nolima(**changes: Any) -> SuiteOptions:
    return suite_options(
        **{
            "suite": "nolima",
            "lengths": (512, 640),
            "tasks": ("needle_set",),
            "samples": 5,
            "nolima_data": NEEDLES,
            **changes,
        }
    )


class Processes:
    """One process after the other, each with an oracle of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.oracle = AnsweringModel(needle_oracle)

    def evaluation(self, name: str, options: SuiteOptions, share: Share | None = None) -> Evaluation:
        def load(_: Path, prompts: Any, *__: object) -> AnsweringModel:
            self.oracle.tokenizer = prompts.tokenizer
            return self.oracle

        answer = ruler_oracle if options.suite == "ruler" else needle_oracle
        self.oracle = AnsweringModel(answer)
        return Evaluation(
            self.model, self.folder / name, options, cache=self.folder / "cache", share=share, load=load
        )

    def run(self, name: str, options: SuiteOptions, share: Share | None = None) -> Evaluation:
        evaluation = self.evaluation(name, options, share)
        evaluation.run()
        return evaluation

    def files(self, name: str) -> dict[str, bytes]:
        found = (path for path in (self.folder / name).rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder / name)): path.read_bytes() for path in found}


@pytest.fixture
def processes(model: Path, tmp_path: Path) -> Processes:
    return Processes(model, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        nolima(),
        suite_options(
            suite="ruler", lengths=(1536,), tasks=("niah_single_1", "vt"), samples=4, essays=BOOK
        ),
        nolima(lengths=(512,), samples=2),  # fewer examples than processes
    ],
    ids=["nolima", "ruler", "few"],
)
def test_the_shares_together_are_what_one_process_writes(
    processes: Processes, options: SuiteOptions
) -> None:
    processes.run("whole", options)
    asked = set(processes.oracle.prompts)
    shared: list[str] = []
    for index in (2, 0, 1):
        evaluation = processes.run("shared", options, Share(index=index, of=3))
        shared += processes.oracle.prompts
        assert bool(evaluation.waiting()) == (index != 1)
    assert set(shared) == asked
    assert len(shared) == len(asked)  # nothing was answered twice
    assert processes.files("shared") == processes.files("whole")
    assert not (processes.folder / "shared" / FOLDER).exists()


@pytest.mark.parametrize("suite", ["nolima", "qa"])
def test_shares_of_a_real_model_read_beginnings_as_one_process_does(
    suite: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with a common beginning are in different shares; answers and likelihoods stay the same."""
    monkeypatch.setattr(nolima_suite, "GENERATION_TOKENS", 8)
    rows = [{"goal": "Do it. " * 20 + str(n), "sol1": "no", "sol2": "a text", "label": 1} for n in range(6)]
    (tmp_path / "qa" / "piqa").mkdir(parents=True)
    (tmp_path / "qa" / "piqa" / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = (
        nolima(lengths=(512,), samples=12, placements=3)
        if suite == "nolima"
        else suite_options(suite="qa", tasks=("piqa",), qa_data=tmp_path / "qa")
    )

    def run(name: str, share: Share | None = None) -> Evaluation:
        evaluation = Evaluation(model, tmp_path / name, options, cache=tmp_path / "cache", share=share)
        evaluation.run()
        assert evaluation.engine.loaded.tokens_saved > 100
        return evaluation

    run("whole")
    for index in (1, 0, 2):
        run("shared", Share(index=index, of=3))
    whole, shared = ((tmp_path / name / suite) for name in ("whole", "shared"))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.jsonl"))
    assert files
    for file in files:
        assert (shared / file).read_bytes() == (whole / file).read_bytes()


def test_subjects_of_a_cell_are_shared_as_one_list(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of MMLU has many tasks of lm-eval, whose examples follow each other; GSM8K draws its shots."""
    configs, data = qa._configs, tmp_path / "qa"
    names = ("anatomy", "virology")

    def write(path: Path, rows: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name in names:
        rows = [
            {"question": f"{name} {n}?", "choices": list("wxyz"), "answer": n, "subject": "s"}
            for n in range(3)
        ]
        for split in ("test", "dev"):
            write(data / "mmlu" / name / f"{split}.jsonl", rows)
    for split in ("test", "train"):
        rows = [{"question": f"1 + {n}?", "answer": f"It is.\n#### {n + 1}"} for n in range(7)]
        write(data / "gsm8k" / f"{split}.jsonl", rows)

    def some(task: str, shots: int | None = None) -> list[Any]:
        return [
            (name, config)
            for name, config in configs(task, shots)
            if task != "mmlu" or name.removeprefix("mmlu_") in names
        ]

    monkeypatch.setattr(qa, "_configs", some)
    options = suite_options(suite="qa", tasks=("mmlu", "gsm8k"), qa_data=data)
    processes.run("whole", options)
    for index in range(4):
        processes.run("shared", options, Share(index=index, of=4))
    assert processes.files("shared") == processes.files("whole")
    assert len(processes.files("whole")["qa/mmlu/0.jsonl"].splitlines()) == 6


def test_a_missing_share_is_named_and_made_alone(processes: Processes) -> None:
    processes.run("whole", nolima())
    for index in (0, 2):
        processes.run("shared", nolima(), Share(index=index, of=3))
    again = processes.run("shared", nolima(), Share(index=0, of=3))
    assert processes.oracle.prompts == []  # its own are there
    assert again.waiting()[CELL] == [Share(index=1, of=3)]
    assert not (processes.folder / "shared" / "nolima").exists()
    assert processes.run("shared", nolima(), Share(index=1, of=3)).waiting() == {}
    assert processes.files("shared") == processes.files("whole")


@pytest.mark.parametrize("damage", ["torn", "edited", "head", "moved"])
def test_a_damaged_share_is_named_and_made_again(processes: Processes, damage: str) -> None:
    options = nolima(lengths=(512,))
    processes.run("whole", options)
    processes.run("shared", options, Share(index=0, of=2))
    path = shard_path(processes.folder / "shared", CELL, Share(index=0, of=2))
    text = path.read_text()
    if damage == "torn":
        path.write_text(text[:-30])
    elif damage == "edited":
        path.write_text(text.replace('"score": 1.0', '"score": 0.0', 1))
    elif damage == "head":
        path.write_text("{\n")
    else:
        path.write_text(text.replace('"0/2"', '"1/2"'))
    with pytest.raises(ValueError, match=r"0-of-2\.jsonl .*run --shard 0/2 again"):
        processes.run("shared", options, Share(index=1, of=2))
    with pytest.warns(UserWarning, match=r"0-of-2\.jsonl is damaged: evaluated again"):
        processes.run("shared", options, Share(index=0, of=2))
    assert len(processes.oracle.prompts) == 3
    assert processes.files("shared") == processes.files("whole")


def test_shares_of_another_number_of_processes_are_not_mixed(processes: Processes) -> None:
    processes.run("shared", nolima(), Share(index=0, of=2))
    evaluation = processes.run("shared", nolima(), Share(index=1, of=3))
    assert evaluation.waiting()[CELL] == [Share(index=0, of=3), Share(index=2, of=3)]


def test_shares_that_another_model_or_other_data_left_are_not_merged(
    processes: Processes, tmp_path: Path
) -> None:
    """`rm -rf results/*` leaves the hidden folder of the shares."""
    options, results = nolima(lengths=(512,)), processes.folder / "shared"
    for index, of in ((0, 2), (0, 3)):
        processes.run("shared", options, Share(index=index, of=of))
    (results / "results.json").unlink()
    other = tmp_path / "other"
    shutil.copytree(processes.model, other)
    config = other / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": "another model"}))
    processes.model = other
    with pytest.warns(UserWarning, match=r"0-of-2\.jsonl was made by another model, .*--shard 0/2 makes"):
        evaluation = processes.run("shared", options, Share(index=1, of=2))
    with pytest.warns(UserWarning, match="was made by another model"):
        assert evaluation.waiting()[CELL] == [Share(index=0, of=2)]
    with pytest.warns(UserWarning, match="was made by another model"):
        processes.run("shared", options, Share(index=0, of=2))
    assert len(processes.oracle.prompts) == 3
    processes.run("whole", options)
    assert processes.files("shared") == processes.files("whole")  # no share of three is left either


def test_shares_of_fewer_books_are_not_merged(processes: Processes, tmp_path: Path) -> None:
    """results.json compares the books that both calls read; the shares must agree in all of them."""
    options = nolima(lengths=(512,))
    processes.run("shared", options, Share(index=0, of=2))
    evaluation = processes.evaluation("shared", options, Share(index=1, of=2))
    evaluation.sources = {task: {**part, "one more": "0"} for task, part in evaluation.sources.items()}
    with pytest.warns(UserWarning, match=r"0-of-2\.jsonl was made by another model"):
        evaluation.run()
    assert not (processes.folder / "shared" / "nolima").exists()


def test_shares_of_another_version_of_the_code_are_not_merged(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The binding of the cell names one version."""
    options = nolima(lengths=(512,))
    processes.run("shared", options, Share(index=0, of=2))
    monkeypatch.setattr("megatron_exact.evaluation.evaluate.code_version", lambda: "0.0+another")
    with pytest.warns(UserWarning, match=r"0-of-2\.jsonl was made by another model, .*an older version"):
        processes.run("shared", options, Share(index=1, of=2))
    assert not (processes.folder / "shared" / "nolima").exists()


@pytest.mark.slow
def test_processes_of_the_command_line(model: Path, tmp_path: Path) -> None:
    """The real model and lm-eval, in one process, in two that are started together, and with one lost."""

    def evaluate(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [
            *(sys.executable, "tools/evaluate_model.py", "--model", model, "--suite", "nolima"),
            *("--nolima-data", NEEDLES, "--tasks", "needle_set", "--lengths", "512,640", "--samples", "3"),
            *("--device", "cpu", "--example-cache", tmp_path / "cache", "--output", tmp_path / name),
        ]
        return subprocess.run(
            [*map(str, command), *words], cwd=ROOT, env=os.environ, capture_output=True, text=True
        )

    assert evaluate("whole").returncode == 0
    done = evaluate("two", "--processes", "2")
    assert done.returncode == 0, done.stderr
    first = evaluate("alone", "--shard", "1/2")
    assert first.returncode == 0, first.stderr
    assert "--shard 1/2 is finished; 2 cells wait for others" in first.stdout
    assert "for --shard 0/2" in first.stdout
    assert evaluate("alone", "--shard", "0/2").returncode == 0
    for name in ("two", "alone"):
        for path in sorted((tmp_path / "whole").rglob("*.*")):
            if path.name != "summary.csv":
                other = tmp_path / name / path.relative_to(tmp_path / "whole")
                assert other.read_bytes() == path.read_bytes()
        assert (tmp_path / name / "summary.csv").is_file()
    shutil.rmtree(tmp_path / "two" / "nolima")
    both = evaluate("two", "--processes", "2", "--shard", "0/2")
    assert both.returncode != 0
    assert "not allowed with" in both.stderr
