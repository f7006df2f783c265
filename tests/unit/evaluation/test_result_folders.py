"""Result folders: what is read, written, merged, and refused with file and line."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from written_results import example_lines, write_lines, write_results

from megatron_exact.evaluation import result_folders
from megatron_exact.evaluation.result_folders import (
    Cell,
    forget_cell,
    read_cell,
    read_result_folder,
    read_scores,
    record_cell,
    write_merged,
)

CELL = Cell(suite="ruler", task="vt", length=1024)

COUNTED: Any = {"examples": 1, "code": "0+abc"}


def test_cells_are_found_in_order_and_nothing_else_is(tmp_path: Path) -> None:
    folder = write_results(
        tmp_path,
        {("ruler", "vt", 1024): [1], ("qa", "piqa", 0): [0, 1], ("ruler", "cwe", 2048): [0.5]},
        provenance={"run": {"seed": 1}},
    )
    for other in ("ruler/vt/.2048.jsonl.partial-7-ab", "ruler/vt/notes.jsonl", ".cache/vt/1024.jsonl"):
        write_lines(folder / other, [])
    (folder / "summary.csv").write_text("")
    found = read_result_folder(folder)
    assert [str(cell) for cell in found.files] == ["qa/piqa/0", "ruler/cwe/2048", "ruler/vt/1024"]
    assert found.provenance == {"run": {"seed": 1}}
    examples = read_cell(found, CELL)
    assert (examples.ids, examples.scores.tolist()) == (["0"], [1.0])


@pytest.mark.parametrize("value", [None, {}, "text"])
def test_a_model_without_a_record_has_no_provenance(tmp_path: Path, value: Any) -> None:
    folder = write_results(tmp_path, {("ruler", "vt", 1024): [1]}, provenance=value)
    assert read_result_folder(folder).provenance is None


def test_folders_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no results.json: give a folder that megatron-exact evaluate"
    ):
        read_result_folder(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_result_folder(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="contains a list, not an object"):
        read_result_folder(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="has no <suite>/<task>/<length>"):
        read_result_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": 1.5}, "score 1.5 is not in 0..1"),
        ({"score": "1"}, "score '1' is not in 0..1"),
        ({"task": "cwe"}, "it says task 'cwe', length 1024"),
        ({"length": 2048}, "it says task 'vt', length 2048"),
        ({"id": "0"}, "id '0' comes twice"),
        ({"id": None}, "id None"),
        ({"prompt_sha256": ""}, "prompt_sha256 ''"),
    ],
)
def test_a_bad_example_is_named_by_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_results(tmp_path, {("ruler", "vt", 1024): [1]})
    lines = example_lines("vt", 1024, [1, 0])
    write_lines(folder / "ruler/vt/1024.jsonl", [lines[0], {**lines[1], **change}])
    with pytest.raises(ValueError, match="line 2 is not an example of this cell") as error:
        read_cell(read_result_folder(folder), CELL)
    assert f"1024.jsonl, line 2 is not an example of this cell ({message})" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"1024\.jsonl is empty"),
        ("[1]\n", "not an object"),
        ("{\n", "line 1"),
        ('{"id": "0"}\n', "no 'task'"),
    ],
)
def test_damaged_files_are_named_by_every_reader(tmp_path: Path, text: str, message: str) -> None:
    folder = write_results(tmp_path, {("ruler", "vt", 1024): [1]})
    (folder / "ruler/vt/1024.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cell(read_result_folder(folder), CELL)
    with pytest.raises(ValueError, match=message) as error:
        read_scores(folder, CELL)
    assert "ruler/vt/1024.jsonl" in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {("ruler", "vt", 1024): [1]})
    (folder / "ruler/vt/1024.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"1024\.jsonl, line 1 is not UTF-8"):
        read_scores(folder, CELL)


def test_whole_numbers_are_names_too(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {("ruler", "vt", 1024): [1]})
    line = {**example_lines("vt", 1024, [1])[0], "id": 7}
    (folder / "ruler/vt/1024.jsonl").write_text(json.dumps(line))
    assert read_cell(read_result_folder(folder), CELL).ids == ["7"]


ABOUT: dict[str, Any] = {
    "model": {"name": "a"},
    "backend": {"name": "hf", "dtype": "float32", "calls": [{"device": "cpu"}]},
}
RECORD: dict[str, Any] = {"options": {}, "template": None, "sources": {}}


def test_no_writer_loses_what_another_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = result_folders.write_json

    def slowly(path: Path, value: Any) -> None:
        time.sleep(0.05)  # everybody has read by now, unless they wait for each other
        write(path, value)

    monkeypatch.setattr(result_folders, "write_json", slowly)
    names = [f"suite{number}" for number in range(5)]
    threads = [
        threading.Thread(target=write_merged, args=(tmp_path / "r", ABOUT, name, RECORD)) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = json.loads((tmp_path / "r" / "results.json").read_text())
    assert sorted(content["suites"]) == names
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["results.json"]


@pytest.mark.parametrize("before", [{}, {"generation": {"repetition_penalty": 1.1}}])
def test_answers_that_were_generated_in_other_ways_do_not_mix(
    before: dict[str, Any], tmp_path: Path
) -> None:
    def about(call: dict[str, Any]) -> dict[str, Any]:
        return {**ABOUT, "backend": {**ABOUT["backend"], "calls": [call]}}

    greedy = about({"device": "cpu", "generation": {"repetition_penalty": 1.0}})
    write_merged(tmp_path, about(before), "ruler", RECORD)
    write_merged(tmp_path, about({**before, "device": "cuda"}), "ruler", RECORD)
    with pytest.raises(ValueError, match=r"another backend: generation: .*choose another --output"):
        write_merged(tmp_path, greedy, "ruler", RECORD)


def test_a_folder_that_another_model_has_filled_meanwhile_is_refused(tmp_path: Path) -> None:
    write_merged(tmp_path, ABOUT, "ruler", RECORD)
    with pytest.raises(ValueError, match="another model: name 'a' there, 'b' now"):
        write_merged(tmp_path, {**ABOUT, "model": {"name": "b"}}, "nolima", RECORD)


def test_the_hash_of_a_cell_stays_until_its_file_is_removed(tmp_path: Path) -> None:
    write_merged(tmp_path, ABOUT, "ruler", RECORD)
    cell = Cell(suite="ruler", task="vt", length=1024)

    def cells() -> dict[str, str]:
        return dict(json.loads((tmp_path / "results.json").read_text())["cells"])

    record_cell(tmp_path, cell, "a" * 64, **COUNTED)
    record_cell(tmp_path, cell, "a" * 64, **COUNTED)
    write_merged(tmp_path, ABOUT, "nolima", RECORD)
    assert cells() == {"ruler/vt/1024": "a" * 64}
    with pytest.raises(ValueError, match=r"ruler/vt/1024\.jsonl has changed since it was written"):
        record_cell(tmp_path, cell, "b" * 64, **COUNTED)
    forget_cell(tmp_path, cell)
    assert cells() == {}
    record_cell(tmp_path, cell, "b" * 64, **COUNTED)
    assert cells() == {"ruler/vt/1024": "b" * 64}


def test_a_folder_of_an_older_version_stays_without_hashes(tmp_path: Path) -> None:
    content = write_merged(tmp_path, ABOUT, "ruler", RECORD)
    del content["cells"], content["bindings"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    record_cell(tmp_path, Cell(suite="ruler", task="vt", length=1024), "a" * 64, **COUNTED)
    assert "cells" not in write_merged(tmp_path, ABOUT, "nolima", RECORD)
