"""Leases of folders: one holder at a time, taken over from the dead, kept by the living."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_exact import folder_lock
from megatron_exact.folder_lock import LEASE, Lease, held_output, output_lease, remove_dead_lease

WRITER = """
import sys, time
from pathlib import Path
from megatron_exact.folder_lock import Lease
folder = Path(sys.argv[1])
with Lease(folder / ".lease", folder=folder, purpose="training", remedy="choose another --save"):
    print("held", flush=True)
    time.sleep(60)
"""


def take(folder: Path, **options: Any) -> Lease:
    settings: dict[str, Any] = {"purpose": "a test", "remedy": "choose another", **options}
    return Lease(folder / LEASE, folder=folder, **settings)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_is_refused_while_the_first_lives_and_starts_at_once_after_its_kill(
    tmp_path: Path,
) -> None:
    with holding(tmp_path) as first:
        with pytest.raises(ValueError, match=rf"in use by process {first.pid} on .*training, since"):
            take(tmp_path)
        first.send_signal(signal.SIGSTOP)
        while folder_lock.process_state(first.pid, folder_lock.process_start(first.pid)) != "T":
            time.sleep(0.01)
        with pytest.raises(ValueError, match=rf"which is stopped \(kill -CONT or kill -KILL {first.pid}\)"):
            take(tmp_path)
        first.kill()
        first.wait()
        assert names(tmp_path) == [LEASE]
        before = time.monotonic()
        with take(tmp_path):
            assert time.monotonic() - before < 1
            assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()
        assert names(tmp_path) == []


def test_a_dead_lease_is_removed_and_a_living_one_stays(tmp_path: Path) -> None:
    with take(tmp_path):
        remove_dead_lease(tmp_path / LEASE)
        assert names(tmp_path) == [LEASE]
    with holding(tmp_path) as first:
        first.kill()
    remove_dead_lease(tmp_path / LEASE)
    assert names(tmp_path) == []


def test_a_process_id_that_is_used_again_is_not_the_holder(tmp_path: Path) -> None:
    with take(tmp_path) as lease:
        content = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**content, "started": content["started"] - 1}))
    take(tmp_path).release()


def from_elsewhere(folder: Path) -> Path:
    """A lease of another machine."""
    with take(folder) as lease:
        content = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**content, "machine": "0" * 16, "host": "node7", "token": "f" * 16}))
    return lease.path


def test_from_another_machine_a_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "EXPIRY_SECONDS", 3)
    path = from_elsewhere(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(ValueError, match="on node7"):
            take(tmp_path)
    finally:
        ended.set()
        heart.join()
    before = time.monotonic()
    take(tmp_path).release()  # the heart stands still
    assert 2.5 < time.monotonic() - before < 10
    assert names(tmp_path) == []


def test_who_waits_takes_over_from_a_second_holder_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine holds the lease; while we wait, a third one takes it and dies."""
    monkeypatch.setattr(folder_lock, "EXPIRY_SECONDS", 2)
    path = from_elsewhere(tmp_path)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(clock[0])
        clock[0] += seconds
        assert clock[0] < 30, "the dead holder is never taken over"
        if len(looks) == 1:
            path.write_text(path.read_text().replace("f" * 16, "e" * 16))

    clock = [0.0]
    monkeypatch.setattr(folder_lock.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(folder_lock.time, "sleep", sleep)
    take(tmp_path, wait_seconds=600).release()
    assert clock[0] == 3  # a second of the first holder, two of the second
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\x00", b'{"pid": "1"}', b"[" * 4000])
def test_a_file_that_is_no_lease_expires(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "EXPIRY_SECONDS", 0)
    (tmp_path / LEASE).write_bytes(content)
    take(tmp_path).release()
    assert names(tmp_path) == []


def test_who_slept_too_long_learns_it_and_leaves_the_lease_of_the_next_alone(tmp_path: Path) -> None:
    lost: list[str] = []
    with take(tmp_path, on_lost=lost.append) as lease:
        lease.beat()
        assert lost == []
        from_there = json.loads(lease.path.read_text())
        lease.path.write_text(json.dumps({**from_there, "token": "e" * 16, "host": "node8"}))
        lease.beat()
        lease.beat()
        assert len(lost) == 1
        assert "held by process" in lost[0]
        assert "node8" in lost[0]
    assert names(tmp_path) == [LEASE]


def test_a_take_over_that_comes_late_leaves_the_next_lease_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no hard links, a lease that was moved away could not be given back."""

    def no_link(*_: object) -> None:
        raise PermissionError(1, "no links here")

    with take(tmp_path) as lease:
        monkeypatch.setattr(os, "link", no_link)
        written = lease.path.read_bytes()
        lease._take_over("d" * 16)
        assert lease.path.read_bytes() == written
        lease._take_over(lease.holder.token)  # the control: its own token is taken away
        assert names(tmp_path) == []


def in_children(number: int, work: Callable[[], int]) -> list[int]:
    children = []
    for _ in range(number):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = work()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("left_by_the_dead", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_gets_it(
    left_by_the_dead: bool, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve processes race for a free lease, and for that of a dead one; with and without hard links."""
    if left_by_the_dead:
        with holding(tmp_path) as first:
            first.kill()
    if not links:

        def no_link(*_: object) -> None:
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(os, "link", no_link)
    begin, ended = time.monotonic() + 0.3, tmp_path.with_suffix(".ended")
    ended.mkdir()

    def work() -> int:
        while time.monotonic() < begin:
            pass
        try:
            take(tmp_path)
        except ValueError:
            (ended / str(os.getpid())).touch()
            return 1
        while len(names(ended)) < 11:  # alive until the last has tried
            time.sleep(0.01)
        return 0  # without a release: dead from here

    assert sorted(in_children(12, work)) == [0] + [1] * 11
    take(tmp_path).release()
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_neither_holds_nor_releases(tmp_path: Path) -> None:
    with take(tmp_path) as lease:

        def work() -> int:
            lease.release()
            folder_lock.release_all()
            lease.beat()
            return 0

        assert in_children(1, work) == [0]
        assert names(tmp_path) == [LEASE]


def test_an_output_has_its_lease_beside_it(tmp_path: Path) -> None:
    output = tmp_path / "pack"
    with held_output(output, "writing it"):
        assert names(tmp_path) == [".pack.lease"]
        assert output_lease(output).is_file()
        with (
            pytest.raises(ValueError, match=r"pack is in use by .*choose another output"),
            held_output(output, "x"),
        ):
            pytest.fail("the body must not run")
    assert names(tmp_path) == []


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / LEASE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link, not the lease"):
        take(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "precious"
