"""Tables 1, 2 and 3: every row of the paper, what was run beside it, and `not run` elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.report.compared import Compared, read_compared
from megatron_exact.report.page import Block, Details, Note, Table, plain_text
from megatron_exact.report.paper_numbers import QA_MODELS
from megatron_exact.report.paper_tables import control_blocks, main_blocks, qa_blocks
from tests.unit.report.small_comparisons import QA, comparison, estimate, write_comparison


def read(folder: Path, *contents: dict[str, Any]) -> list[Compared]:
    return read_compared(
        [str(write_comparison(folder / str(number), content)) for number, content in enumerate(contents)]
    )


def tables(blocks: Sequence[Block]) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


def folded(blocks: Sequence[Block], summary: str) -> list[Table]:
    """The tables below a folded line that begins with `summary`."""
    (details,) = [
        block
        for block in blocks
        if isinstance(block, Details) and plain_text(block.summary).startswith(summary)
    ]
    return tables(details.blocks)


def rows(table: Table) -> list[list[str]]:
    return [[plain_text(cell) for cell in cells] for cells in table.body]


def notes(blocks: Sequence[Block]) -> list[str]:
    return [plain_text(block.text) for block in blocks if isinstance(block, Note)]


def test_without_results_every_row_of_table_1_says_not_run() -> None:
    (table,) = tables(main_blocks([]))
    found = rows(table)
    assert len(found) == 28
    assert all(row[6:] == ["not run"] * 3 for row in found)
    assert [row[5].endswith("includes 0") for row in found].count(True) == 2
    assert found[0] == [
        *("Qwen2.5-0.5B", "4K", "NoLiMa trained", "9.04", "19.13", "+10.09 [+8.42, +11.66]"),
        *["not run"] * 3,
    ]


def test_a_model_of_the_paper_fills_its_rows_and_no_other(tmp_path: Path) -> None:
    blocks = main_blocks(read(tmp_path, comparison(preset="qwen2.5-7b", gain=2)))
    (table,) = tables(blocks)
    assert [row[0] for row in rows(table)] == ["Qwen2.5-7B"] * 4
    (others,) = folded(blocks, "The paper's rows of the other models")
    found = {(row[0], row[2]): row[6:] for row in (*rows(table), *rows(others))}
    assert len(found) == 28
    assert found.pop(("Qwen2.5-7B", "NoLiMa trained")) == ["20.00", "22.00", "+2.00 [+1.00, +3.00]"]
    assert found.pop(("Qwen2.5-7B", "NoLiMa extrapolated")) == ["20.00", "23.00", "+3.00 [+2.00, +4.00]"]
    assert found.pop(("Qwen2.5-7B", "RULER trained"))[2] == "+1.00 [+0.00, +2.00] includes 0"
    found.pop(("Qwen2.5-7B", "RULER extrapolated"))
    assert all(cells == ["not run"] * 3 for cells in found.values())
    assert notes(blocks) == [
        "These averages are over other windows or tasks than the paper's: they are not the same quantity. "
        "At 1K, 2K: NoLiMa trained, RULER trained (Qwen2.5-7B). "
        "At 4K: NoLiMa extrapolated, RULER extrapolated (Qwen2.5-7B)."
    ]
    assert coverage(blocks)["Qwen2.5-7B", "RULER trained"] == ["1K, 2K", "all 11", "500"]
    assert {model for model, _ in coverage(blocks)} == {"Qwen2.5-7B"}


def coverage(blocks: Sequence[Block]) -> dict[tuple[str, str], list[str]]:
    """(model, evaluation) -> windows, tasks and examples here."""
    (table,) = folded(blocks, "Windows, tasks and examples")
    return {(row[0], row[1]): row[3:] for row in rows(table)}


def test_other_models_and_other_parameters_do_not_enter_the_paper_s_rows(tmp_path: Path) -> None:
    loud = comparison(parameters={"alpha": 1.0, "gamma": 0.5, "tau": 1024.0})
    own = comparison(preset=None, name="tiny")
    blocks = main_blocks(read(tmp_path, loud, own))
    (others,) = tables(blocks)
    (table,) = folded(blocks, "The paper's rows of all models; none of them was run")
    assert all(row[6:] == ["not run"] * 3 for row in rows(table))
    assert {row[0] for row in rows(others)} == {"tiny"}
    assert [row[1] for row in rows(others)][:3] == ["NoLiMa trained", "NoLiMa extrapolated", "NoLiMa all"]
    assert rows(others)[0][5:] == ["300", "1K, 2K", "all 6"]
    assert rows(others)[2][6] == "1K, 2K, 4K"


def test_a_comparison_without_regimes_is_explained(tmp_path: Path) -> None:
    blocks = main_blocks(read(tmp_path, comparison(has_regimes=False)))
    assert all(row[6:] == ["not run"] * 3 for row in rows(tables(blocks)[0]))
    assert notes(blocks) == [
        "Qwen2.5-0.5B: compared without trained and extrapolated windows, so no row of table 1 is filled; "
        "give megatron-exact compare --trained-lengths and --extrapolated-lengths."
    ]


def test_table_2(tmp_path: Path) -> None:
    (empty,) = tables(qa_blocks([]))
    assert rows(empty)[0] == ["ARC-C", "45.37", "45.37", "+0.00", *["not run"] * 3]
    partial = comparison(preset=QA_MODELS[0].lower())
    partial["cells"] = partial["cells"][:3]
    (table,) = tables(qa_blocks(read(tmp_path / "a", partial)))
    found = {row[0]: row[4:] for row in rows(table)}
    assert found["GSM8K"] == ["50.00", "50.10", "+0.10 [-0.90, +1.10] includes 0"]
    assert found["MMLU"] == ["not run"] * 3
    assert found["Macro"] == ["not run"] * 3  # a mean of three benchmarks is not that of six
    (table,) = tables(qa_blocks(read(tmp_path / "b", comparison(preset=QA_MODELS[0].lower()))))
    assert rows(table)[-1][4:] == ["50.00", "50.25", "+0.25 [-0.75, +1.25] includes 0"]


def test_table_2_says_on_how_many_examples_it_rests(tmp_path: Path) -> None:
    content = comparison(preset=QA_MODELS[0].lower())
    content["cells"] = [
        {**cell, "examples": 50 + number} for number, cell in enumerate(content["cells"][:2])
    ]
    (details,) = [block for block in qa_blocks(read(tmp_path, content)) if isinstance(block, Details)]
    (table,) = tables(details.blocks)
    assert rows(table)[:3] == [["ARC-C", "50"], ["GSM8K", "51"], ["HellaSwag", "not run"]]


def test_table_2_takes_the_mean_of_the_paper_s_three_models(tmp_path: Path) -> None:
    contents = [comparison(preset=model.lower()) for model in QA_MODELS]
    contents[0]["cells"][QA.index("mmlu")].update(estimate(53, 3.3))
    (two,) = tables(qa_blocks(read(tmp_path / "two", *contents[:2])))
    (three,) = tables(qa_blocks(read(tmp_path / "three", *contents)))
    assert not any("mean of three" in name for name in two.head)
    assert three.head[-3:] == ["mean of three: standard", "mean of three: EXACT", "mean of three: delta"]
    mean = {row[0]: row[-3:] for row in rows(three)}
    assert mean["MMLU"] == ["51.00", "52.30", "+1.30"]  # (53 + 50 + 50) / 3, (3.3 + 0.3 + 0.3) / 3


def test_table_3(tmp_path: Path) -> None:
    (empty,) = tables(control_blocks([]))
    assert [row[0] for row in rows(empty)] == [
        *("Standard CPT", "Random same-mass", "Packed-position", "Uniform effective-context boost"),
        *("Normalized EXACT", "EXACT"),
    ]
    assert rows(empty)[1][1:3] == ["-0.41 [-0.92, +0.06] includes 0", "not run"]
    compared = read(
        tmp_path,
        comparison("exact", preset="llama-3.1-8b"),
        comparison("random-same-mass", preset="llama-3.1-8b", gain=-3),
        comparison("constant", preset="llama-3.1-8b", gain=-2),
        comparison("exact", preset="qwen2.5-3b"),
    )
    (table,) = tables(control_blocks(compared))
    assert table.caption == "Table 3, paper (LLaMA-3.1-8B) and here (LLaMA-3.1-8B)"
    found = {row[0]: row[1:] for row in rows(table)}
    assert found["Random same-mass"][1] == "-3.00 [-4.00, -2.00]"
    assert found["EXACT"][:2] == ["+5.73 [+4.91, +6.48]", "+2.00 [+1.00, +3.00]"]
    assert found["Packed-position"][1::2] == ["not run"] * 4
    assert found["Constant, same mean"][:2] == ["not in the paper", "-2.00 [-3.00, -1.00]"]


def test_exact_of_the_paper_s_control_model_needs_no_other_control(tmp_path: Path) -> None:
    (table,) = tables(control_blocks(read(tmp_path, comparison("exact", preset="llama-3.1-8b"))))
    found = {row[0]: row[1:] for row in rows(table)}
    assert found["EXACT"][:2] == ["+5.73 [+4.91, +6.48]", "+2.00 [+1.00, +3.00]"]
    assert found["Random same-mass"][1::2] == ["not run"] * 4


def test_a_rule_that_no_file_names_is_no_control(tmp_path: Path) -> None:
    (table,) = folded(control_blocks(read(tmp_path, comparison(None))), "The paper's rows")
    assert all(set(row[2::2]) <= {"not run", "0.00"} for row in rows(table))


@pytest.mark.parametrize("function", [main_blocks, qa_blocks, control_blocks])
def test_rows_are_as_wide_as_their_head(function: Any, tmp_path: Path) -> None:
    for table in tables(function(read(tmp_path, comparison()))):
        assert all(len(row) == len(table.head) for row in table.body)


def test_a_treatment_that_no_file_names_is_said_to_be_unknown(tmp_path: Path) -> None:
    told = notes(main_blocks(read(tmp_path, comparison(None))))
    assert any(note.startswith("Qwen2.5-0.5B: no file says with which token weighting") for note in told)
    assert not any("no file says" in note for note in notes(main_blocks(read(tmp_path, comparison()))))
