from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.training.job_endings import ENDING_VARIABLE, record_ending


def test_rank_0_alone_records_how_a_job_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ending"
    record_ending("finished", 3)  # nobody asks
    monkeypatch.setenv(ENDING_VARIABLE, str(path))
    monkeypatch.setenv("RANK", "1")
    record_ending("finished", 3)
    assert not path.exists()
    monkeypatch.setenv("RANK", "0")
    record_ending("stopped", 12)
    assert path.read_text() == "stopped 12\n"
    assert list(tmp_path.iterdir()) == [path]
