"""`megatron-exact status`: what it reads from the files of runs, whole, running, torn and damaged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.commands.runs import status
from megatron_exact.folder_lock import EXPIRY_SECONDS, LEASE, Lease
from megatron_exact.training.run_status import (
    SUBMITTED,
    duration,
    find_runs,
    last_record,
    read_status,
    record_submission,
)


def make_run(folder: Path, *, iterations: int = 100, saved: int | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    record = {
        "row_tokens": 16384,
        "weighting": {"rule": "exact"},
        "schedule": {"train_iters": iterations},
        "resumes": [],
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(record))
    if saved is not None:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(saved))
    return folder


def add_iterations(folder: Path, last: int) -> None:
    lines = [json.dumps({"iteration": n, "loss": 1.0}) for n in range(1, last + 1)]
    (folder / "losses.jsonl").write_text("\n".join(lines) + "\n")
    speed = {"iteration": last, "iterations": 2, "seconds": 30.0, "tokens_per_second": 12345.6}
    (folder / "throughput.jsonl").write_text(json.dumps(speed) + "\n")


def add_start(folder: Path, name: str, line: str | None, log: str = "") -> None:
    logs = folder / "logs" / name
    logs.mkdir(parents=True)
    (logs / "rank-00000.log").write_text("first\n")
    (logs / "rank-00001.log").write_text(log)
    if line is not None:
        (logs / "last_line").write_text(line + "\n")


def test_a_run_that_trains(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", saved=8, restarts=[{"when": "x"}])
    add_iterations(run, 10)
    add_start(run, "9-0", "preempted: requeued")
    add_start(run, "9-1", None, "noise\n iteration 10/100\n\n")
    with Lease(run / LEASE, folder=run, purpose="training", remedy="wait"):
        found = read_status(run)
        (line, last) = found.describe()
    assert (found.stage, found.arm, found.state) == ("16k", "exact", "running")
    assert (found.iteration, found.iterations, found.saved, found.restarts) == (10, 100, 8, 1)
    assert found.seconds_left == 90 * 15
    assert line == (
        f"{run}: 16k exact; running; iteration 10 of 100; 12,346 tokens/s; 23 min left; 1 restart"
    )
    assert last.strip() == "iteration 10/100"
    assert read_status(run).state == "not running"  # the lease is given back


def test_a_lease_of_another_machine_counts_while_it_is_renewed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lease = Lease(run / LEASE, folder=run, purpose="training", remedy="wait")
    text = (run / LEASE).read_text()
    lease.release()
    (run / LEASE).write_text(text.replace(lease.holder.machine, "0" * 16))
    assert read_status(run).state == "running"
    old = time.time() - EXPIRY_SECONDS - 1
    os.utime(run / LEASE, (old, old))
    assert read_status(run).state == "not running"


def test_what_ended_the_newest_start(tmp_path: Path) -> None:
    """Job numbers are compared as numbers; a start whose script was killed has its log alone."""
    run = make_run(tmp_path / "run", saved=4)
    add_start(run, "99-1", "not restarted: NaN")
    add_start(run, "100-0", "cancelled: the job does not come back")
    assert read_status(run).last_line == "cancelled: the job does not come back"
    assert read_status(run).seconds_left is None
    add_start(run, "100-1", None, "iteration 7\nlast words\x1b[2J\n")
    line = read_status(run).last_line
    assert line is not None
    assert line.startswith("last words")
    assert "\x1b" not in line


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", saved=100)
    add_iterations(run, 100)
    add_start(run, "9-0", "finished at iteration 100")
    assert read_status(run).state == "finished"


def test_a_finished_run_that_saves_elsewhere_or_nothing(tmp_path: Path) -> None:
    """The folders in the record are relative to that in which the job was started."""
    places = {"run_dir": "records/a", "save": "weights/a"}
    run = make_run(tmp_path / "records" / "a", places=places)
    add_iterations(run, 100)
    assert read_status(run).state == "not running"  # the last save failed
    weights = tmp_path / "weights" / "a"
    weights.mkdir(parents=True)
    (weights / "latest_checkpointed_iteration.txt").write_text("100")
    assert read_status(run).state == "finished"
    assert read_status(run).saved == 100
    unsaved = make_run(tmp_path / "records" / "b", places={"run_dir": "records/b"})
    add_iterations(unsaved, 99)
    assert read_status(unsaved).state == "not running"
    add_iterations(unsaved, 100)
    assert read_status(unsaved).state == "finished"


def test_a_speed_of_no_iterations_is_unreadable(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    speed = {"iteration": 1, "iterations": 0, "seconds": 1.0, "tokens_per_second": 1.0}
    (run / "throughput.jsonl").write_text(json.dumps(speed) + "\n")
    with Lease(run / LEASE, folder=run, purpose="training", remedy="wait"):
        found = read_status(run)
    assert found.state == "unreadable"
    assert found.last_line is not None
    assert found.last_line.startswith("ZeroDivisionError")


def test_runs_that_wait_for_each_other_are_shown(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    about = {"stage": "16k", "arm": "exact", "iterations": 50}
    record_submission(first, "1", second, about)
    record_submission(second, "2", first, about)
    assert read_status(first).last_line == f"job 1 waits for {second}, which is not begun"


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    assert last_record(path) is None
    path.write_text("")
    assert last_record(path) is None
    long = json.dumps({"iteration": 1, "x": "y" * 100_000})
    path.write_text(long + '\n{"iteration": 2}\n{"iteration": 3, "lo')
    assert last_record(path) == {"iteration": 2}


def test_a_stage_that_never_began_says_what_ended_the_one_before(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "out" / "exact" / "8k"), tmp_path / "out" / "exact" / "16k"
    add_start(first, "9-0", "not restarted: NaN on n2")
    record_submission(second, "10", first, {"stage": "16k", "arm": "exact", "iterations": 50})
    found = read_status(second)
    assert (found.stage, found.arm, found.state, found.iterations) == ("16k", "exact", "not begun", 50)
    assert found.last_line == f"job 10 waits for {first}, or ended with it: not restarted: NaN on n2"
    assert find_runs(tmp_path) == [second, first]
    (first / "run.json").unlink()  # it was refused before it wrote one
    assert read_status(first).state == "not running"
    line = read_status(second).last_line
    assert line is not None
    assert "not restarted: NaN on n2" in line
    (tmp_path / "out").rename(tmp_path / "moved")  # the folders stay together
    line = read_status(tmp_path / "moved" / "exact" / "16k").last_line
    assert line is not None
    assert str(tmp_path / "moved") in line


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_iterations(make_run(tmp_path / "out" / "none" / "16k", weighting={"rule": "none"}), 3)
    make_run(tmp_path / "out" / "exact" / "16k")
    assert status([str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2].partition(";")[0] for line in lines] == ["16k exact", "16k none"]
    assert status([str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["arm"], run["iteration"], run["state"]) for run in found] == [
        ("exact", 0, "not running"),
        ("none", 3, "not running"),
    ]
    with pytest.raises(ValueError, match=r"has no run\.json and no run below it"):
        status([str(tmp_path / "elsewhere")])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{"),
        ("run.json", '{"resumes": []}'),
        ("run.json", "[]"),
        ("latest_checkpointed_iteration.txt", "x"),
        (str(SUBMITTED), "[1]"),
    ],
)
def test_a_damaged_file_is_said_and_the_others_are_shown(
    tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, whole = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (damaged / name).parent.mkdir(exist_ok=True)
    (damaged / name).write_text(text)
    assert status([str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert f"{damaged}: unreadable" in output
    assert f"{whole}: 16k exact; not running" in output


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 1, 3600, 3661, 90_000)] == [
        *("0 min", "1 min", "1 h 0 min", "1 h 2 min", "1 d 1 h"),
    ]
