from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.training.hang_detection import RankWatch
from megatron_exact.training.job_endings import ENDING_VARIABLE, end_failed_job, record_ending


@pytest.mark.parametrize("always", ["", "1"])
def test_the_traceback_of_a_fault_is_printed_once(
    always: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATRON_EXACT_TRACEBACK", always)
    assert end_failed_job(RuntimeError("a fault"), RankWatch(0)) == 1
    printed = capsys.readouterr().err
    assert printed.splitlines().count("RuntimeError: a fault") == 1
    assert "error: RuntimeError: a fault" in printed


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
