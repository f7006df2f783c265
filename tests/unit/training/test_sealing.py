"""What is in the way of a save."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_exact.training.checkpoint_integrity import clear_the_way, empty_folder
from megatron_exact.training.checkpoint_start import TRACKER

SPECIAL: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a link": lambda path: path.symlink_to("/dev/null"),
    "a file": lambda path: path.write_text("mine"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_folder_is_set_aside(kind: str, tmp_path: Path) -> None:
    SPECIAL[kind](tmp_path / "iter_0000004")
    (line,) = clear_the_way(tmp_path, 4)
    assert line.startswith(f"iter_0000004 was {kind} and is now .iter_0000004.set-aside-")
    (left,) = tmp_path.iterdir()
    assert line.endswith(left.name)


def test_a_tracker_that_is_no_file_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / TRACKER).symlink_to("/dev/null")
    (line,) = clear_the_way(tmp_path, 4)
    assert line.startswith(f"{TRACKER} was a link and is now .{TRACKER}.set-aside-")


def test_nothing_is_set_aside_without_need(tmp_path: Path) -> None:
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / TRACKER).write_text("2")
    assert clear_the_way(tmp_path, 4) == []
    assert clear_the_way(tmp_path, 6) == []


def test_a_folder_is_emptied_of_everything_but_what_links_lead_to(tmp_path: Path) -> None:
    folder, precious = tmp_path / "iter_0000004", tmp_path / "precious"
    folder.mkdir()
    precious.mkdir()
    (precious / "file").write_text("mine")
    (folder / "integrity.json").mkdir()
    (folder / "__0_0.distcp").write_text("old")
    os.mkfifo(folder / "__1_0.distcp")
    (folder / "__2_0.distcp").symlink_to(precious)
    (folder / "sub").mkdir()
    (folder / "sub" / "__3_0.distcp").symlink_to(precious / "file")
    empty_folder(folder)
    assert list(folder.iterdir()) == []
    assert (precious / "file").read_text() == "mine"
