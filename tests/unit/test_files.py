"""Writes happen whole or leave no trace, also when the writer is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from megatron_exact.files import (
    atomic_file,
    atomic_folder,
    partial_path,
    remove_stale_partials,
    require_free_folder,
    sha256_file,
    write_json,
    write_text,
)

DEAD_PID = 2**22 + 1  # above the kernel's largest process id


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "result.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == target.parent  # a rename, never a copy
    assert target.read_text() == "half"
    assert names(target.parent) == ["result.txt"]


def test_an_exception_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.txt"
    write_text(target, "old")

    def fail_half_way() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_a_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "pack"
    with atomic_folder(target) as temporary:
        (temporary / "train").mkdir()
        (temporary / "train" / "rows").write_text("1")
        assert not target.exists()
    assert (target / "train" / "rows").read_text() == "1"
    assert names(tmp_path) == ["pack"]


def test_an_exception_leaves_no_folder(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with atomic_folder(tmp_path / "pack") as temporary:
            (temporary / "rows").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert names(tmp_path) == []


def test_an_empty_folder_is_replaced_and_a_full_one_refused(tmp_path: Path) -> None:
    target = tmp_path / "pack"
    target.mkdir()
    with atomic_folder(target) as temporary:
        (temporary / "rows").write_text("1")
    assert names(target) == ["rows"]
    with pytest.raises(ValueError, match="exists already"), atomic_folder(target):
        pytest.fail("the body must not run")
    with pytest.raises(ValueError, match="exists already"):
        require_free_folder(target / "rows")
    assert names(target) == ["rows"]


def test_a_folder_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "pack"

    def write_while_others_do() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "rows").write_text("ours")
            target.mkdir()
            (target / "rows").write_text("theirs")

    with pytest.raises(ValueError, match="created by someone else"):
        write_while_others_do()
    assert (target / "rows").read_text() == "theirs"
    assert names(tmp_path) == ["pack"]


WRITER = """
import sys, time
from megatron_exact.files import atomic_file, atomic_folder
kind, target = sys.argv[1:]
with (atomic_file if kind == "file" else atomic_folder)(target) as temporary:
    (temporary if kind == "file" else temporary / "rows").write_text("half")
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_9_leaves_no_target_and_the_next_writer_cleans_up(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "result"
    command = [sys.executable, "-c", WRITER, kind, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "inside\n"
        remove_stale_partials(target)  # what a living process builds stays
        left = names(tmp_path)
        lease = [".result.lease"] if kind == "folder" else []
        assert left[:-1] == lease
        assert left[-1].startswith(f".result.partial-{writer.pid}-")
        writer.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert names(tmp_path) == left
    write_text(target, "whole")
    assert names(tmp_path) == ["result"]


def test_stale_partials_of_others_stay(tmp_path: Path) -> None:
    for name in (f".result.partial-{DEAD_PID}", f".other.partial-{DEAD_PID}", ".result.partial-x"):
        (tmp_path / name).write_text("")
    (tmp_path / f".pack.partial-{DEAD_PID}").mkdir()
    (tmp_path / f".pack.partial-{DEAD_PID}" / "rows").write_text("")
    remove_stale_partials(tmp_path / "result")
    remove_stale_partials(tmp_path / "pack")
    assert names(tmp_path) == [f".other.partial-{DEAD_PID}", ".result.partial-x"]


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "result"
    command = [sys.executable, "-c", WRITER, "folder", str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "inside\n"
        time.sleep(0.1)
        writer.send_signal(signal.SIGINT)
    assert writer.returncode != 0
    assert names(tmp_path) == []


def test_json_is_readable_and_finite(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"name": "Übung", "share": 0.25})
    assert target.read_text(encoding="utf-8") == '{\n  "name": "Übung",\n  "share": 0.25\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        write_json(target, {"share": float("nan")})
    assert "0.25" in target.read_text()
    assert names(tmp_path) == ["a.json"]


def test_hash_of_a_file_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_exact.files.HASH_BLOCK_BYTES", 10)
    content = os.urandom(25)
    (tmp_path / "a").write_bytes(content)
    blocks: list[int] = []
    assert sha256_file(tmp_path / "a", blocks.append) == hashlib.sha256(content).hexdigest()
    assert blocks == [10, 10, 5]


def test_the_partial_name_is_hidden_and_names_its_process(tmp_path: Path) -> None:
    path = partial_path(tmp_path / "x.bin")
    assert path.parent == tmp_path
    assert path.name.startswith(f".x.bin.partial-{os.getpid()}-")
    assert path != partial_path(tmp_path / "x.bin")


def test_the_process_id_of_a_killed_writer_was_given_to_us(tmp_path: Path) -> None:
    """In a container every writer may be process 1: only the lock tells who lives."""
    (tmp_path / f".pack.partial-{os.getpid()}").mkdir()
    (tmp_path / f".pack.partial-{os.getpid()}-0badcafe").mkdir()
    (tmp_path / f".pack.partial-{os.getpid()}-0badcafe" / "rows").write_text("")
    with atomic_folder(tmp_path / "pack") as temporary:
        remove_stale_partials(tmp_path / "pack")
        assert names(tmp_path) == [".pack.lease", temporary.name]  # ours is locked
    assert names(tmp_path) == ["pack"]


def test_a_failure_removes_the_folders_it_made(tmp_path: Path) -> None:
    def fail(atomic: Callable[[Path], AbstractContextManager[Path]], beside: bool) -> None:
        with atomic(tmp_path / "new" / "deeper" / "x"):
            if beside:
                (tmp_path / "new" / "mine").write_text("")
            raise RuntimeError

    for atomic in (atomic_file, atomic_folder):
        with pytest.raises(RuntimeError):
            fail(atomic, beside=False)
        assert names(tmp_path) == []
    with pytest.raises(RuntimeError):
        fail(atomic_file, beside=True)
    assert names(tmp_path / "new") == ["mine"]


LIMITED_WRITER = """
import resource, signal, sys
from megatron_exact.command_line import describe
from megatron_exact.files import atomic_file, atomic_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
kind, target = sys.argv[1:]
try:
    with (atomic_file if kind == "file" else atomic_folder)(target) as temporary:
        inner = temporary if kind == "file" else temporary / "rows"
        if kind == "nested":
            with atomic_file(inner) as inner:
                inner.write_bytes(bytes(10_000))
        inner.write_bytes(bytes(10_000))
except OSError as error:
    print(describe(error))
"""


@pytest.mark.parametrize(
    ("kind", "named"), [("file", "result"), ("folder", "result"), ("nested", "result/rows")]
)
def test_a_write_that_finds_no_room_names_the_target(tmp_path: Path, kind: str, named: str) -> None:
    """The kernel's error of `write` has no file name. A limit on file sizes fails like a full disk."""
    command = [sys.executable, "-c", LIMITED_WRITER, kind, str(tmp_path / "result")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / named}: File too large\n"
    assert names(tmp_path) == []


def test_errors_that_may_be_an_inputs_are_left_as_they_are(tmp_path: Path) -> None:
    def fail(error: OSError) -> OSError:
        with pytest.raises(OSError, match=r"error|none|full") as raised, atomic_folder(tmp_path / "pack"):
            raise error
        return raised.value

    assert fail(OSError(errno.EIO, "Input/output error")).filename is None
    assert fail(OSError(errno.ENOENT, "none", "input.jsonl")).filename == "input.jsonl"
    assert fail(OSError(errno.ENOSPC, "full")).filename == str(tmp_path / "pack")


def test_a_link_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(ValueError, match="link is a link to empty"):
        require_free_folder(tmp_path / "link")
