"""Interleaving, command lines, results, and the page that is made of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
from measure import command, publish, render, time_interleaved, whole_number, whole_numbers
from packing_scale import extrapolate
from tool_runs import run_tool_process
from write_page import latest, page, read_results


def test_contenders_take_turns_and_medians_are_taken() -> None:
    order: list[str] = []
    naps = iter([0.0, 0.05, 0.0])

    def first() -> str:
        order.append("a")
        time.sleep(next(naps))
        return "result"

    inspected: list[tuple[str, object]] = []
    timings = time_interleaved(
        {"a": first, "b": lambda: order.append("b")},
        3,
        inspect=lambda name, got: inspected.append((name, got)),
    )
    assert order == ["a", "b"] * 3
    assert inspected == [("a", "result"), ("b", None)]
    assert timings["a"].wall_seconds < 0.04, "the median leaves the one slow round out"
    assert timings["a"].cpu_seconds < 0.04


def test_the_first_contender_may_end() -> None:
    order: list[str] = []
    work = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    time_interleaved(work, 1, ends_with_first=True)
    assert order == ["a", "b", "a"]


def test_cpu_time_of_children_counts() -> None:
    busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    timing = time_interleaved({"it": lambda: run_tool_process(["-c", busy], Path.cwd())}, 1)["it"]
    assert timing.cpu_seconds >= 0.2


def test_tool_run_measures_private_memory_and_failure(tmp_path: Path) -> None:
    hold = "import time\nblock = b'x' * (64 << 20)\ntime.sleep(0.3)"
    run = run_tool_process(["-c", hold], tmp_path)
    assert 64 << 20 < run.peak_anonymous_bytes < 110 << 20
    assert run.peak_resident_bytes >= run.peak_anonymous_bytes
    assert run.wall_seconds >= 0.3
    nothing = run_tool_process(["-c", "import time; time.sleep(0.3)"], tmp_path)
    assert nothing.peak_anonymous_bytes < 40 << 20, "negative control"
    with pytest.raises(ValueError, match="ended with 3: no space"):
        run_tool_process(["-c", "import sys; print('no space'); sys.exit(3)"], tmp_path)


def test_whole_numbers() -> None:
    assert whole_number("5e6") == 5_000_000
    assert whole_numbers("1e2,1_000") == (100, 1000)
    for bad in ("x", "1.5", "0", "-1", "inf", "nan", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="number"):
            whole_number(bad)


def test_command_names_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/some/where/packing.py", "--json", "out.jsonl", "--text", "/data/text.jsonl", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", words)
    assert command() == "python benchmarks/packing.py --text text.jsonl --rounds 1"


def test_table_cells() -> None:
    table = render([{"name": "a", "x": 12345, "y": 0.12345}, {"name": "b", "z": None}])
    assert "| a    | 12,345 | 0.123 |" in table
    assert table.splitlines()[0].split() == ["|", "name", "|", "x", "|", "y", "|", "z", "|"]


def test_published_results_become_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/counting.py"])
    file = tmp_path / "results" / "all.jsonl"
    for value in (111, 222):
        publish("counting", [{"way": "it", "seconds": value}], title="Old and new", file=str(file))
    publish("packing", [{"way": "it"}], title="First in the page", notes=["A note."], file=str(file))
    assert "222" in capsys.readouterr().out
    results = read_results([file])
    assert len(results) == 3
    assert [result["title"] for result in latest(results)] == ["First in the page", "Old and new"]
    text = page(results)
    assert "222" in text
    assert "111" not in text, "the last result of a title counts"
    assert "A note." in text
    assert "- command: `python benchmarks/counting.py`" in text
    assert "Time the exposure counts" in text, "the method is the script's docstring"
    assert str(tmp_path) not in text


@pytest.mark.parametrize("line", ["{", "[]", '{"benchmark": "packing"}'])
def test_damaged_results_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({"benchmark": "packing", "rows": []}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_results([file])


def test_extrapolation_is_the_line_through_the_last_two() -> None:
    columns = (
        "CPU seconds",
        "reading the index, CPU s",
        "peak anonymous GiB",
        "peak resident GiB",
        "pack GiB",
        "index GiB",
        "written GiB",
    )

    def row(documents: int, seconds: float) -> dict[str, object]:
        return {"documents": f"{documents:,}", "seconds": seconds, **dict.fromkeys(columns, 2 * seconds)}

    found = extrapolate([row(10, 99.0), row(1_000, 3.0), row(2_000, 5.0)], 10_000)
    assert found["seconds"] == pytest.approx(21.0)
    assert found["peak anonymous GiB"] == pytest.approx(42.0)
    assert found["documents"] == "10,000 (extrapolated)"
