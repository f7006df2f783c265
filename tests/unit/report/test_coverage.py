"""Averages over other windows or tasks than the paper's are told apart where they stand beside its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_exact.evaluation.suites import nolima, qa, ruler
from megatron_exact.report.experiment import lift_blocks
from megatron_exact.report.paper_numbers import SUITE_TASKS, main_results
from megatron_exact.report.paper_tables import QA_TASKS, control_blocks, main_blocks
from tests.unit.report.small_comparisons import LONG, QA, comparison, estimate, long_cells
from tests.unit.report.test_paper_tables import coverage, notes, read

WARNING = "These averages are over other windows or tasks than the paper's: they are not the same quantity."


def as_in_the_paper(model: str) -> dict[str, Any]:
    """A comparison of EXACT at all windows and on all tasks of the paper's rows of a model."""
    content = comparison(preset=model.lower())
    chosen = [row for row in main_results() if row.model == model]
    for regime in ("trained", "extrapolated"):
        names = {name for row in chosen if row.regime == regime for name in row.windows}
        content["options"][f"{regime}_lengths"] = sorted(names)
    content["lengths"] = [
        {"suite": row.suite, "length": int(1024 * float(name[:-1])), **estimate(10, 1)}
        for row in chosen
        for name in row.windows
    ]
    content["cells"] = long_cells(
        (row.suite, task, int(1024 * float(name[:-1])))
        for row in chosen
        for name in row.windows
        for task in LONG[row.suite]
    )
    return content


def test_the_paper_s_own_windows_and_tasks_need_no_warning(tmp_path: Path) -> None:
    compared = read(tmp_path, as_in_the_paper("Qwen2.5-0.5B"))
    blocks = main_blocks(compared)
    assert notes(blocks) == []
    assert coverage(blocks)["Qwen2.5-0.5B", "RULER trained"] == ["the same", "all 11", "500"]
    assert coverage(blocks)["Qwen2.5-0.5B", "NoLiMa extrapolated"] == ["the same", "all 6", "500"]
    (tmp_path / "lift").mkdir()
    assert notes(lift_blocks(tmp_path / "lift", compared)) == []
    control = read(tmp_path / "control", as_in_the_paper("LLaMA-3.1-8B"))
    assert notes(control_blocks(control)) == []


def test_averages_over_some_tasks_are_not_the_paper_s_quantity(tmp_path: Path) -> None:
    content = as_in_the_paper("LLaMA-3.1-8B")
    kept = {"niah_single_1", "vt"}
    content["cells"] = [
        cell
        for cell in content["cells"]
        if cell["suite"] == "nolima"
        or (cell["task"] in kept and (cell["task"], cell["length"]) != ("vt", 2048))
    ]
    blocks = main_blocks(read(tmp_path, content))
    left_out = ", ".join(task for task in LONG["ruler"] if task not in kept)
    trained = f"Without {left_out.replace('niah_multiquery,', 'niah_multiquery, vt at 2K,')}: RULER trained"
    beyond = f"Without {left_out}: RULER extrapolated"
    assert notes(blocks) == [f"{WARNING} {trained} (LLaMA-3.1-8B). {beyond} (LLaMA-3.1-8B)."]
    found = coverage(blocks)
    assert found["LLaMA-3.1-8B", "RULER trained"] == ["the same", "1 of 11", "500"]
    assert found["LLaMA-3.1-8B", "RULER extrapolated"] == ["the same", "2 of 11", "500"]
    assert found["LLaMA-3.1-8B", "NoLiMa trained"] == ["the same", "all 6", "500"]
    (tmp_path / "lift").mkdir()
    assert notes(lift_blocks(tmp_path / "lift", read(tmp_path, content))) == notes(blocks)
    assert notes(control_blocks(read(tmp_path, content))) == [
        f"{WARNING} {trained} (EXACT). {beyond} (EXACT)."
    ]


def test_a_task_that_the_paper_does_not_have_and_unknown_tasks_are_told(tmp_path: Path) -> None:
    content = as_in_the_paper("Qwen2.5-0.5B")
    content["cells"] += long_cells([("ruler", "qa_1", 1024)])
    blocks = main_blocks(read(tmp_path / "more", content))
    assert notes(blocks) == [f"{WARNING} With qa_1 as well: RULER trained (Qwen2.5-0.5B)."]
    assert coverage(blocks)["Qwen2.5-0.5B", "RULER trained"][1] == "all 11 and 1 more"
    content["cells"] = []
    blocks = main_blocks(read(tmp_path / "none", content))
    assert "Tasks unknown: NoLiMa trained, NoLiMa extrapolated, RULER trained" in notes(blocks)[0]
    assert coverage(blocks)["Qwen2.5-0.5B", "RULER trained"] == ["the same", "unknown", "unknown"]


def test_fewer_examples_than_the_paper_s_are_told(tmp_path: Path) -> None:
    content = as_in_the_paper("Qwen2.5-0.5B")
    content["cells"][0]["examples"] = 26  # NoLiMa: the paper states no number
    next(cell for cell in content["cells"] if cell["suite"] == "ruler")["examples"] = 4
    blocks = main_blocks(read(tmp_path, content))
    assert notes(blocks) == [
        "Fewer examples a cell than the paper's 500, so that less is known: "
        "RULER trained (Qwen2.5-0.5B: 4 to 500)."
    ]
    assert coverage(blocks)["Qwen2.5-0.5B", "NoLiMa trained"][2] == "26 to 500"
    assert coverage(blocks)["Qwen2.5-0.5B", "RULER trained"][2] == "4 to 500"


def test_table_3_is_beside_the_windows_of_its_own_model(tmp_path: Path) -> None:
    told = notes(
        control_blocks(
            read(tmp_path, comparison("exact"), comparison("packed-position"), comparison("dense"))
        )
    )
    assert told == [
        f"{WARNING} At 1K, 2K: NoLiMa trained, RULER trained (EXACT, Packed-position, dense). "
        "At 4K: NoLiMa extrapolated, RULER extrapolated (EXACT, Packed-position, dense)."
    ]


def test_the_tasks_are_those_of_the_suites() -> None:
    assert set(SUITE_TASKS["ruler"]) == set(ruler.TASKS) == set(LONG["ruler"])
    assert set(SUITE_TASKS["nolima"]) == set(nolima.TASKS) == set(LONG["nolima"])
    assert {task for task in QA_TASKS.values() if task is not None} == set(qa.TASKS) == set(QA)
