"""An edited, thinned, copied or mixed cell is named, for each suite, by all that read results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_exact.evaluation.comparison import compare_runs, write_comparison
from megatron_exact.evaluation.evidence import verify_results
from megatron_exact.evaluation.result_folders import (
    Cell,
    Example,
    cell_files,
    record_cell,
    text_sha256,
    write_cell,
)
from megatron_exact.evaluation.suites import qa
from megatron_exact.evaluation.suites.qa import StandardQA
from megatron_exact.files import sha256_file, write_json
from megatron_exact.report.compared import read_compared
from tests.recorded.made_up_results import write_made_up_results

CELLS = ("ruler/vt/1024", "nolima/needle_set_w_CoT/250", "qa/gsm8k/0", "qa/piqa/0")
ANSWERS = {"gsm8k": ("so it is 3", "3"), "piqa": ("to the left", "to the left")}


def add_qa(folder: Path, model: str) -> None:
    """Two QA tasks whose first answer is wrong, then hashes and bindings of all cells."""
    info = json.loads((folder / "results.json").read_text())
    info["model"] = {"name": model, "weights_sha256": text_sha256(model)}
    info["suites"]["qa"] = {"options": {"metrics": qa.METRICS}}
    write_json(folder / "results.json", {**info, "cells": {}, "bindings": {}})
    for task, (answer, reference) in ANSWERS.items():
        examples = [
            Example(
                id=f"{task}-{number:05d}",
                prompt_sha256=text_sha256(task, str(number)),
                prompt_tokens=9,
                prediction=answer if number else "none of it",
                references=(reference,),
                score=float(number > 0),
            )
            for number in range(8)
        ]
        write_cell(folder, Cell(suite="qa", task=task, length=0), examples)
    for cell, path in cell_files(folder).items():
        count = len(path.read_text().splitlines())
        record_cell(folder, cell, sha256_file(path), examples=count, code="1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two models, of one RULER task and one NoLiMa set at one length, and their comparison."""
    folder = tmp_path_factory.mktemp("changed")
    for side in ("standard", "exact"):
        write_made_up_results(folder / side)
        for path in cell_files(folder / side).values():
            if not any(str(path).endswith(f"{cell}.jsonl") for cell in CELLS):
                path.unlink()
        add_qa(folder / side, side)
    return folder


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> Path:
    for side in ("standard", "exact"):
        shutil.copytree(made / side, tmp_path / side)
    compared = compare_runs([tmp_path / "standard"], [tmp_path / "exact"])
    write_comparison(tmp_path / "comparison", compared)
    return tmp_path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edited(path: Path, other: Path) -> None:
    lines = lines_of(path)
    place = next(number for number, line in enumerate(lines) if line["score"] == 0)
    lines[place]["score"] = 1.0
    write_lines(path, lines)


def thinned(path: Path, other: Path) -> None:
    write_lines(path, lines_of(path)[:-2])


def copied(path: Path, other: Path) -> None:
    lines = lines_of(other)
    lines[0] |= {"prediction": "another model's answer", "score": 0.0}
    write_lines(path, lines)


def mixed(path: Path, other: Path) -> None:
    lines = lines_of(path)
    lines[-1] |= {"prediction": "another model's answer", "score": 0.0}
    write_lines(path, lines)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("damage", [edited, thinned, copied, mixed])
def test_a_changed_cell_is_named_by_all_that_read_it(
    folders: Path, cell: str, damage: Callable[[Path, Path], None]
) -> None:
    assert read_compared([str(folders / "comparison")])
    path = folders / "standard" / f"{cell}.jsonl"
    damage(path, folders / "exact" / f"{cell}.jsonl")
    with pytest.raises(ValueError, match=rf"{path} has changed since megatron-exact evaluate wrote it"):
        compare_runs([folders / "standard"], [folders / "exact"])
    faults = {found.name: found.fault for found in verify_results(folders / "standard") if found.fault}
    assert list(faults) == [cell]
    with pytest.raises(ValueError, match=rf"{path} has changed since .*comparison\.json was made from it"):
        read_compared([str(folders / "comparison")])


@pytest.mark.parametrize("cell", CELLS)
def test_an_edited_score_is_named_without_hashes_too(folders: Path, cell: str) -> None:
    record = folders / "standard" / "results.json"
    info = json.loads(record.read_text())
    record.write_text(json.dumps({key: info[key] for key in info if key not in ("cells", "bindings")}))
    edited(folders / "standard" / f"{cell}.jsonl", folders)
    with pytest.raises(ValueError, match=r"the score is 1, but its answer .* has 0 by the metric"):
        compare_runs([folders / "standard"], [folders / "exact"])


def test_cells_that_were_evaluated_later_do_not_spoil_a_comparison(folders: Path) -> None:
    record = folders / "standard" / "results.json"
    record.write_text(record.read_text() + "\n")
    assert read_compared([str(folders / "comparison")])
    shutil.rmtree(folders / "standard")  # nor does moving the results
    assert read_compared([str(folders / "comparison")])


@pytest.mark.parametrize(
    "answer",
    [
        "So 3 + 4 = 7.", "$1,234.50 a year", "#### 12", "the answer is -5", "no number", "", "3.", "12,",
        "$", ".", "a 1,000,000 b", "1 2 3\nQuestion", "-", "--3", "..", "7 #### 8", "5.0",
    ],
)  # fmt: skip
def test_gsm8k_is_scored_as_by_lm_eval(answer: str) -> None:
    import lm_eval.tasks

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml")
    (chosen,) = [entry for entry in config["filter_list"] if entry["name"] == qa.GSM8K_FILTER]
    pattern = {name: value for name, value in chosen["filter"][0].items() if name != "function"}
    (metric,) = config["metric_list"]
    ignored = {name: metric[name] for name in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
    found = RegexFilter(**pattern).apply([[answer]], [{}])[0][0]
    for working in ("It is.\n#### 7", "#### 1,234.50", "#### 12", "#### -5", "#### 1000000", "#### 3", "8"):
        theirs = exact_match_hf_evaluate([found], [working], **ignored)["exact_match"]
        ours = StandardQA().score_by_record("gsm8k", answer, [qa.WORKING.sub("", working)], {})
        assert ours == theirs, (answer, working)
