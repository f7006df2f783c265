from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_exact.training.loss import StepTotals
from megatron_exact.training.records import RunRecords, drop_lines_after, read_lines
from megatron_exact.training.run_record import LOSSES

TOTALS = StepTotals(
    bucket_loss_sums=[1 / 3, 2.5], bucket_targets=[3, 4], weighted_loss_sum=3.1, weight_mass=7.7
)


def record(records: RunRecords, iteration: int, totals: StepTotals = TOTALS) -> None:
    records.iteration(iteration, totals, divides_by_mass=False, grad_norm=0.1, learning_rate=1e-3)


def test_a_line_reads_back_to_the_same_bits(tmp_path: Path) -> None:
    record(RunRecords(tmp_path, 0), 1)
    (line,) = read_lines(tmp_path / LOSSES)
    assert line == {
        "iteration": 1,
        "loss": (1 / 3 + 2.5) / 7,
        "weighted_loss": 3.1 / 7,
        "targets": 7,
        "grad_norm": 0.1,
        "learning_rate": 1e-3,
        "bucket_loss_sums": [1 / 3, 2.5],
        "bucket_targets": [3, 4],
    }


def test_the_objective_is_divided_as_the_rule_says() -> None:
    assert TOTALS.objective(divides_by_mass=False) == 3.1 / 7
    assert TOTALS.objective(divides_by_mass=True) == 3.1 / 7.7


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    empty = StepTotals(
        bucket_loss_sums=[math.inf, 0.0], bucket_targets=[0, 0], weighted_loss_sum=0.0, weight_mass=0.0
    )
    record(RunRecords(tmp_path, 0), 1, empty)
    line = json.loads((tmp_path / LOSSES).read_text(), parse_constant=pytest.fail)
    assert line["loss"] is line["weighted_loss"] is line["bucket_loss_sums"][0] is None


def test_a_resume_removes_later_and_torn_lines(tmp_path: Path) -> None:
    records = RunRecords(tmp_path, 0)
    for iteration in range(1, 6):
        record(records, iteration)
    with open(tmp_path / LOSSES, "a") as stream:
        stream.write('{"iteration": 6, "lo')
    resumed = RunRecords(tmp_path, 3)
    assert [line["iteration"] for line in read_lines(tmp_path / LOSSES)] == [1, 2, 3]
    record(resumed, 4)
    assert [line["iteration"] for line in read_lines(tmp_path / LOSSES)] == [1, 2, 3, 4]


def test_damaged_lines_are_kept_aside_and_the_good_ones_after_them_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = RunRecords(tmp_path, 0)
    for iteration in range(1, 6):
        record(records, iteration)
    path = tmp_path / LOSSES
    lines = path.read_bytes().splitlines()
    lines[1], lines[2] = b'{"iteration": 2, "los\xff', b"[]"
    path.write_bytes(b"\n".join(lines) + b"\n")
    RunRecords(tmp_path, 4)
    assert [line["iteration"] for line in read_lines(path)] == [1, 4]
    assert (tmp_path / "losses.jsonl.damaged").read_bytes() == lines[1] + b"\n" + lines[2] + b"\n"
    said = capsys.readouterr().out
    assert "losses.jsonl: damaged lines (2, 3) were moved to losses.jsonl.damaged" in said
    assert len(said.splitlines()) == 1


def test_a_torn_line_that_will_not_be_written_again_is_kept_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill tears a line of a later iteration, which the resumed job repeats."""
    records = RunRecords(tmp_path, 0)
    for iteration in range(1, 5):
        record(records, iteration)
    path = tmp_path / LOSSES
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\n"))  # as an editor may leave it
    RunRecords(tmp_path, 4)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-20])
    RunRecords(tmp_path, 3)
    assert capsys.readouterr().out == ""
    assert [line["iteration"] for line in read_lines(path)] == [1, 2, 3]
    path.write_bytes(whole[:-20])
    RunRecords(tmp_path, 4)
    assert "damaged lines (4) were moved to losses.jsonl.damaged" in capsys.readouterr().out
    assert [line["iteration"] for line in read_lines(path)] == [1, 2, 3]
    assert (tmp_path / "losses.jsonl.damaged").read_bytes() == whole[:-20].split(b"\n")[-1] + b"\n"


@pytest.mark.parametrize("junk", [b"[]\n", b"\x00\xff\n" * 3, b'{"loss": 1}\n', b"[" * 100_000 + b"\n"])
def test_a_file_that_holds_no_record_at_all_is_named_and_left_alone(junk: bytes, tmp_path: Path) -> None:
    (tmp_path / LOSSES).write_bytes(junk)
    with pytest.raises(ValueError, match=r"losses\.jsonl has no record of an iteration") as told:
        RunRecords(tmp_path, 4)
    assert "\n" not in str(told.value)
    assert (tmp_path / LOSSES).read_bytes() == junk


def test_a_file_without_later_lines_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / LOSSES
    record(RunRecords(tmp_path, 0), 1)
    before = path.stat().st_ino
    drop_lines_after(path, 1)
    assert path.stat().st_ino == before


def test_an_evaluation_is_recorded_once(tmp_path: Path) -> None:
    RunRecords(tmp_path, 0).evaluation(2, TOTALS)
    RunRecords(tmp_path, 2).evaluation(2, TOTALS)
    (line,) = read_lines(tmp_path / "evaluations.jsonl")
    assert line["weighted_loss"] == line["loss"]
    assert line["grad_norm"] is None
