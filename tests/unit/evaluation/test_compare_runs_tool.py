"""`compare_runs.py` as a process: both files, and one line for whatever cannot be compared."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from written_results import provenance, write_results

from tests import forked

CELLS = {
    ("ruler", "vt", 1024): [0.0, 1.0],
    ("ruler", "vt", 2048): [0.0, 0.0],
    ("nolima", "hard", 1000): [1.0],
}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run_tool("compare_runs.py", *arguments)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    better = {**CELLS, ("ruler", "vt", 2048): [1.0, 0.0]}
    return (
        write_results(tmp_path / "standard", CELLS, provenance=provenance()),
        write_results(tmp_path / "exact", better, provenance=provenance(weighting={"rule": "exact"})),
    )


def test_a_comparison_is_written(sides: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "comparison"
    regimes = ("--trained-lengths", "1K", "--extrapolated-lengths", "2K", "--nolima-k", "1000")
    done = run(
        "--baseline", sides[0], "--treatment", sides[1], "--output", output, *regimes, "--resamples", "200"
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("training verified as paired: ")
    content = json.loads((output / "comparison.json").read_text())
    rows = [(entry["suite"], entry["regime"], entry["delta"]) for entry in content["aggregates"]]
    assert rows == [
        ("nolima", "trained", 0), ("nolima", "all", 0),
        ("ruler", "trained", 0), ("ruler", "extrapolated", 50), ("ruler", "all", 25),
    ]  # fmt: skip
    assert (content["options"]["resamples"], content["options"]["nolima_k_tokens"]) == (200, 1000)
    page = (output / "comparison.md").read_text()
    assert "| ruler  | extrapolated |     1 |        2 |     0.00 |     50.00 | +50.00 |" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--baseline", "{a}", "{b}", "--treatment", "{b}"], "error: 2 baseline and 1 treatment runs"),
        (["--baseline", "{a}", "--treatment", "{missing}"], "missing has no results.json"),
        (
            ["--trained-lengths", "1.0001K"],
            "--trained-lengths: '1.0001K' is not a length such as 1024 or 1.5K",
        ),
        (["--trained-lengths", "16K"], "no suite was evaluated at the trained length 16K"),
        (["--seed", "-1"], "a seed of at least 0"),
        (["--resamples", "0"], "'0' is not above 0"),
    ],
)
def test_bad_input_is_one_line(
    sides: tuple[Path, Path], tmp_path: Path, change: list[str], message: str
) -> None:
    places = {"a": sides[0], "b": sides[1], "missing": tmp_path / "missing"}
    output = tmp_path / "comparison"
    usual = ["--baseline", "{a}", "--treatment", "{b}", "--output", str(output)]
    done = run(*(word.format(**places) for word in usual + change))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not output.exists()


def test_training_that_disagrees_is_one_line(sides: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_results(tmp_path / "other", CELLS, provenance=provenance(seed=2))
    done = run("--baseline", sides[0], "--treatment", other, "--output", tmp_path / "comparison")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {sides[0]} and {other} were not trained as a pair: seed is 1 and 2; "
        "compare runs that differ in their token weighting alone\n"
    )


def test_without_provenance_it_goes_on(sides: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_results(tmp_path / "other", CELLS)
    done = run("--baseline", sides[0], "--treatment", other, "--output", tmp_path / "comparison")
    assert done.returncode == 0
    assert done.stdout.startswith(
        f"training not verifiably paired: {other} carries no record of a training\n"
    )


def test_the_help_teaches() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "K means 1,024 tokens" in done.stdout
    assert "compare_runs.py --baseline results/standard" in done.stdout
