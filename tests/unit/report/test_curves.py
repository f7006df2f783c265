"""Curves: the running mean against a loop, and figures that refuse unpaired runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.report.results import read_run
from megatron_exact.report.training_pair import plot_pair, plot_run, running_mean
from tests.unit.report.small_runs import write_run

NAMES = {"baseline_name": "standard", "treatment_name": "EXACT"}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), max_size=30), st.integers(1, 40))
def test_running_mean_equals_a_loop(values: list[float], span: int) -> None:
    expected = [np.mean(values[max(0, end - span) : end]) for end in range(1, len(values) + 1)]
    np.testing.assert_allclose(running_mean(values, span), expected, atol=1e-8)


def test_figures_are_written(tmp_path: Path) -> None:
    one = read_run(write_run(tmp_path / "one", iterations=30))
    other = read_run(write_run(tmp_path / "other", shift=0.01, iterations=30))
    plot_run(tmp_path / "run.png", one, name="base")
    plot_pair(tmp_path / "pair.png", one, other, **NAMES)
    for name in ("run.png", "pair.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_runs_of_other_lengths_are_no_pair(tmp_path: Path) -> None:
    one = read_run(write_run(tmp_path / "one", iterations=4))
    other = read_run(write_run(tmp_path / "other", iterations=6))
    with pytest.raises(ValueError, match="4 and 6 iterations"):
        plot_pair(tmp_path / "pair.png", one, other, **NAMES)
    assert not (tmp_path / "pair.png").exists()
