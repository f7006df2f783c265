from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_exact.training.run_record import (
    check_same_run,
    describe_restarts,
    end_restart,
    restart_row,
    supervision_of,
    write_run_record,
)


def record(**changes: Any) -> dict[str, Any]:
    return {
        "fingerprint": "f",
        "weighting": {"rule": "exact"},
        "seed": 1,
        "model": {"num_layers": 4},
        "schedule": {"lr": 1e-3, "clip_grad": 1.0, "train_iters": 10},
        "layout": {"world_size": 1},
        "versions": {"torch": "2"},
        "git_commit": "abc",
        "resumes": [],
        **changes,
    }


def test_a_resume_is_added_and_the_beginning_kept(tmp_path: Path) -> None:
    write_run_record(tmp_path, record(), None)
    longer = record(layout={"world_size": 2}, schedule={"lr": 1e-3, "clip_grad": 1.0, "train_iters": 20})
    write_run_record(tmp_path, longer, 5)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["layout"] == {"world_size": 1}
    (resume,) = content["resumes"]
    assert (resume["iteration"], resume["layout"]) == (5, {"world_size": 2})
    assert resume["schedule"]["train_iters"] == 20


@pytest.mark.parametrize("key", ["fingerprint", "weighting", "seed", "model"])
def test_another_run_is_refused(key: str, tmp_path: Path) -> None:
    write_run_record(tmp_path, record(), None)
    before = (tmp_path / "run.json").read_bytes()
    for resumed in (None, 5):
        with pytest.raises(ValueError, match=f"belongs to another run: its {key} is"):
            write_run_record(tmp_path, record(**{key: "other"}), resumed)
    assert (tmp_path / "run.json").read_bytes() == before


def test_another_schedule_of_an_earlier_version_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_exact.training.run_record._flags", dict)  # without Megatron
    write_run_record(tmp_path, record(), None)
    other = record(schedule={"lr": 1e-3, "clip_grad": 0.1, "train_iters": 10})
    with pytest.raises(ValueError, match=r"--clip-grad 1.0 \(now 0.1\): a run keeps its configuration"):
        check_same_run(tmp_path, other)


def test_no_record_is_no_other_run(tmp_path: Path) -> None:
    assert check_same_run(tmp_path, record()) is None


def test_a_record_says_what_question_answer_records_supervised() -> None:
    entry = SimpleNamespace(targets="answers", template="{{ messages }}", template_sha256="0a")
    manifest: Any = SimpleNamespace(supervision=entry)
    assert supervision_of(manifest) == {"targets": "answers", "template_sha256": "0a"}
    manifest.supervision = None
    assert supervision_of(manifest) is None


@pytest.mark.parametrize("resumed", [None, 8])
def test_a_restart_is_a_row_with_what_it_cost(resumed: int | None, tmp_path: Path) -> None:
    write_run_record(tmp_path, record(), None)
    row = restart_row("1000000000\tn2\trank 1 was ended by SIGKILL", resumed or 0, 11)
    write_run_record(tmp_path, record(), resumed, row)
    end_restart(tmp_path, 1000000000 + 150)
    end_restart(tmp_path, 1000000000 + 900)  # only the first iteration counts
    write_run_record(tmp_path, record(), 11)  # a start by hand
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["restarts"] == [
        {
            "when": "2001-09-09T01:46:40+00:00",
            "why": "rank 1 was ended by SIGKILL",
            "node": "n2",
            "iteration": resumed or 0,
            "lost_iterations": 11 - (resumed or 0),
            "minutes": 2.5,
        }
    ]


def test_restarts_in_one_line() -> None:
    rows = [
        {"lost_iterations": 3, "minutes": 2.5, "why": "x"},
        {"lost_iterations": 4, "minutes": None, "why": "rank 1 was ended by SIGKILL"},
    ]
    assert describe_restarts(rows) == (
        "started again 2 times so far: 7 iterations repeated, 2.5 minutes until the next iteration; "
        "the last time since rank 1 was ended by SIGKILL"
    )


def test_no_restart_without_a_script_that_tells_of_it() -> None:
    assert restart_row(None, 3, 4) is None
    assert restart_row("1\t-\tx", 3, 4)["node"] is None  # type: ignore[index]
    with pytest.raises(ValueError, match="MEGATRON_EXACT_RESTART is 'yes': unset it, or give seconds"):
        restart_row("yes", 3, 4)
