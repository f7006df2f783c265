"""The same examples on both sides, in whatever order the files have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from written_results import example_lines, write_lines, write_results

from megatron_exact.evaluation.pairing import common_cells, missing_from_grid, read_matched
from megatron_exact.evaluation.result_folders import Cell, read_result_folder

CELL = Cell(suite="ruler", task="vt", length=1024)
NAME = ("ruler", "vt", 1024)


def test_examples_are_matched_by_id(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {NAME: [0, 0.25, 1]})
    after = write_results(tmp_path / "b", {NAME: []})
    write_lines(after / "ruler/vt/1024.jsonl", example_lines("vt", 1024, [1, 0.5, 0])[::-1])
    scores = read_matched(CELL, [read_result_folder(before)], [read_result_folder(after)])
    assert scores.is_shared
    assert [values.tolist() for values in scores.differences] == [[1, 0.25, -1]]


def test_a_second_pair_follows_the_order_of_the_first(tmp_path: Path) -> None:
    names = ("a1", "b1", "a2", "b2")
    one, other, again, last = (write_results(tmp_path / name, {NAME: [0, 0.5]}) for name in names)
    write_lines(again / "ruler/vt/1024.jsonl", example_lines("vt", 1024, [0, 1])[::-1])
    before = [read_result_folder(one), read_result_folder(again)]
    after = [read_result_folder(other), read_result_folder(last)]
    scores = read_matched(CELL, before, after)
    assert scores.is_shared
    assert [values.tolist() for values in scores.baseline] == [[0, 0.5], [0, 1]]
    assert [values.tolist() for values in scores.differences] == [[0, 0], [0, -0.5]]


def test_pairs_may_have_examples_of_their_own(tmp_path: Path) -> None:
    before = [write_results(tmp_path / f"a{salt}", {NAME: [0, 1]}, salt=salt) for salt in "xy"]
    after = [write_results(tmp_path / f"b{salt}", {NAME: [1, 1]}, salt=salt) for salt in "xy"]
    scores = read_matched(CELL, list(map(read_result_folder, before)), list(map(read_result_folder, after)))
    assert not scores.is_shared
    assert [values.tolist() for values in scores.differences] == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_sha256": "0"}, "the prompt of id '1' differs"),
        ({"id": "one"}, "id '1' is in the first only"),
        ({"references": ["8"]}, "the references of id '1' differ"),
        (None, "2 and 1 examples"),
    ],
)
def test_other_examples_are_refused(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    before = read_result_folder(write_results(tmp_path / "a", {NAME: [0, 1]}))
    lines = example_lines("vt", 1024, [0, 1])
    lines = lines[:1] if change is None else [lines[0], {**lines[1], **change}]
    after = write_results(tmp_path / "b", {NAME: [0, 1]})
    write_lines(after / "ruler/vt/1024.jsonl", lines)
    with pytest.raises(ValueError, match="are not the same examples") as error:
        read_matched(CELL, [before], [read_result_folder(after)])
    assert message in str(error.value)
    assert "evaluate both models with the same options" in str(error.value)


def test_a_cell_on_one_side_only_is_refused(tmp_path: Path) -> None:
    rich = read_result_folder(write_results(tmp_path / "a", {NAME: [0], ("qa", "piqa", 0): [1]}))
    poor = read_result_folder(write_results(tmp_path / "b", {NAME: [0]}))
    for folders in ([rich, poor], [poor, rich], [rich, rich, poor]):
        with pytest.raises(ValueError, match=r"b lacks 1 of the 2 cells of .*a, the first being qa/piqa/0"):
            common_cells(folders)
    assert common_cells([poor, poor]) == [CELL]


def test_holes_of_the_grid_are_found() -> None:
    names = [("vt", 1024), ("vt", 2048), ("cwe", 2048)]
    cells = [Cell(suite="ruler", task=task, length=length) for task, length in names]
    cells.append(Cell(suite="qa", task="piqa", length=0))
    assert missing_from_grid(cells) == [Cell(suite="ruler", task="cwe", length=1024)]
    assert missing_from_grid(cells[1:]) == []
