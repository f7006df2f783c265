"""Per-bucket comparisons against plain sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_exact.report.results import (
    bucket_labels,
    compare_buckets,
    compare_group,
    format_comparisons,
    parse_record,
    plot_comparisons,
)
from tests.unit.report.small_runs import LOWER_BOUNDS, ROW_TOKENS, record

BASELINE = parse_record(record(4, [4.0, 3.0, 2.0, 1.0]))
TREATMENT = parse_record(record(4, [4.5, 3.0, 1.75, 0.5]))


def test_labels_cover_every_context_once() -> None:
    assert bucket_labels(LOWER_BOUNDS, ROW_TOKENS) == ["0-7", "8-15", "16-31", "32-64"]
    assert bucket_labels([0, 8], 1_500) == ["0-7", "8-1,500"]


def test_means_and_differences() -> None:
    rows = compare_buckets(BASELINE, TREATMENT, LOWER_BOUNDS, ROW_TOKENS)
    assert [row.targets for row in rows] == [10, 20, 30, 40]
    assert [row.baseline for row in rows] == pytest.approx([4.0, 3.0, 2.0, 1.0])
    assert [row.difference for row in rows] == pytest.approx([0.5, 0.0, -0.25, -0.5])


def test_groups_weigh_by_targets_not_by_buckets() -> None:
    tail = compare_group("tail", BASELINE, TREATMENT, [False, False, True, True])
    assert tail.targets == 70
    assert tail.difference == pytest.approx((30 * -0.25 + 40 * -0.5) / 70)
    everything = compare_group("all", BASELINE, TREATMENT, [True] * 4)
    assert everything.baseline == pytest.approx(BASELINE.loss)


def test_a_bucket_without_targets_has_no_mean() -> None:
    empty = parse_record(record(1, [1.0, 1.0, 1.0, 1.0], [5, 0, 5, 5]))
    rows = compare_buckets(empty, empty, LOWER_BOUNDS, ROW_TOKENS)
    assert np.isnan(rows[1].baseline)
    line = format_comparisons(rows, baseline_name="a", treatment_name="b").splitlines()[3]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["8-15", "0", "-", "-", "-"]


def test_unpaired_evaluations_and_foreign_packs_are_refused() -> None:
    other = parse_record(record(4, [1.0, 1.0, 1.0, 1.0], [11, 19, 30, 40]))
    with pytest.raises(ValueError, match="did not see the same rows"):
        compare_buckets(BASELINE, other, LOWER_BOUNDS, ROW_TOKENS)
    with pytest.raises(ValueError, match="4 buckets, the pack has 5"):
        compare_buckets(BASELINE, TREATMENT, [*LOWER_BOUNDS, 64], 128)


def test_the_table_is_aligned_markdown() -> None:
    rows = compare_buckets(BASELINE, TREATMENT, LOWER_BOUNDS, ROW_TOKENS)
    lines = format_comparisons(rows, baseline_name="standard", treatment_name="EXACT").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split() == ["|", "32-64", "|", "40", "|", "1.0000", "|", "0.5000", "|", "-0.5000", "|"]


def test_the_figure_is_written_and_repeats_byte_for_byte(tmp_path: Path) -> None:
    rows = compare_buckets(BASELINE, TREATMENT, LOWER_BOUNDS, ROW_TOKENS)
    for name in ("one.png", "two.png"):
        plot_comparisons(
            tmp_path / name, rows, first_tail_bucket=2, baseline_name="standard", treatment_name="EXACT"
        )
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]
