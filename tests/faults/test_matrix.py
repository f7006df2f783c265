"""The page has the table of the matrix, and the harness would see what it looks for."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.faults import matrix
from tests.faults.matrix import PAGE, Ended, all_rows, check_refusal, contents, page_with, run_forked, table


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with(table(), page), "run: python -m tests.faults.matrix"


def test_there_are_150_rows_and_names_are_unique() -> None:
    rows = all_rows()
    for area in rows.values():
        names = [row.name for row in area]
        assert sorted(set(names)) == sorted(names)
    assert sum(map(len, rows.values())) >= 150
    quick = sum(row.is_quick for area in rows.values() for row in area)
    assert quick > 50


@pytest.mark.parametrize(
    "ended",
    [
        Ended(0, "error: no room\n"),
        Ended(1, "error: no room\nerror: again no room\n"),
        Ended(1, "Traceback (most recent call last):\nerror: no room\n"),
        Ended(1, "error: no \x1b[31mroom\n"),
        Ended(1, "error: something else\n"),
        Ended(1, "no room\n"),
    ],
)
def test_what_is_no_refusal_is_seen(ended: Ended) -> None:
    with pytest.raises(AssertionError):
        check_refusal(ended, "no room")


def test_what_is_written_or_lost_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    os.mkfifo(tmp_path / "fifo")
    before = contents(tmp_path)
    (tmp_path / "a").write_text("2")
    assert contents(tmp_path) != before
    (tmp_path / "a").write_text("1")
    assert contents(tmp_path) == before
    (tmp_path / ".hidden").touch()
    assert contents(tmp_path) != before


def test_a_hang_is_ended_and_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "MOST_SECONDS", 0.5)
    children = []
    with pytest.raises(AssertionError, match="hangs"):
        run_forked(lambda: time.sleep(60), tmp_path, while_running=children.append)
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def test_codes_and_output_of_a_forked_process(tmp_path: Path) -> None:
    def work() -> int:
        print("said")
        sys.exit(7)

    assert run_forked(work, tmp_path) == Ended(7, "said\n")
    assert run_forked(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path).code == -9
