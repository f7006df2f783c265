"""A folder belongs to one job at a time: leases, which survive NFS and die with their job.

A lease is a small JSON file: host, process, job, what it does and since when. It is put in place by
link(), which is atomic on NFS too, where flock often is not. Its modification time is its heartbeat: a
thread of the holder sets it every `BEAT_SECONDS`.

A lease whose holder is dead is taken over. On the holder's own machine that is known at once, from the
process and its start time. From another machine, or another container, nobody can see processes: there a
lease is dead once no heartbeat came for `EXPIRY_SECONDS`, watched on the reader's own clock, so that clocks
need not agree. A holder that slept for so long finds its lease taken and must end (`Lease.on_lost`).

The package filelock locks by flock, which says neither who holds a folder nor since when, and which other
machines of an NFS may not see.

    R/.lease      in the folder of a training run or of results
    .NAME.lease   beside an output that is put in place whole (packs, exports, corpora)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
LEASE = ".lease"
MOST_BYTES = 4096
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
"""Errors of link() on file systems without hard links."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The holder of a lease, as its file names it."""

    host: str
    """Name of its machine, for messages."""
    machine: str
    """Hash of host, boot and process namespace: only inside of them a process id means something."""
    pid: int
    """Id of its process."""
    started: int
    """Start time of that process in the kernel's ticks, since process ids are reused."""
    purpose: str
    """Purpose of the lease, such as `training`."""
    job: str
    """The scheduler's or launcher's number; empty without one."""
    since: str
    """Local time at which it took the lease."""
    token: str
    """Random token that distinguishes one lease from the next."""
    format_version: int = 1

    def is_here(self) -> bool:
        """Return whether this process can see the holder's."""
        return self.machine == _machine()

    def is_alive(self) -> bool:
        """Return whether the holder's process lives; meaningful where `is_here`."""
        return process_state(self.pid, self.started) is not None

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        state = process_state(self.pid, self.started) if self.is_here() else None
        stopped = f", which is stopped (kill -CONT or kill -KILL {self.pid})" if state in ("T", "t") else ""
        return f"process {self.pid} on {self.host}{job} ({self.purpose}, since {self.since}){stopped}"


def process_state(pid: int, started: int) -> str | None:
    """Return the kernel's letter for a process (R, S, D, T: stopped), or None if it has ended."""
    fields = _stat_fields(pid)
    if fields is None or fields[0] in ("Z", "X") or int(fields[19]) != started:
        return None
    return fields[0]


def process_start(pid: int) -> int:
    """Return when a living process started, in the kernel's ticks, or 0 if there is none."""
    fields = _stat_fields(pid)
    return 0 if fields is None else int(fields[19])


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; the name before them may contain anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _machine() -> str:
    """Return the identity of this machine, see `Holder.machine`."""
    words = [socket.gethostname()]
    with contextlib.suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        words.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def _job() -> str:
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        value = os.environ.get(name, "none")
        if value != "none":
            return value[:64]
    return ""


class Lease:
    """The right to write into one folder, held by this process.

    Args:
        path: of the lease file, whose folder exists.
        folder: what the lease is for, in messages.
        purpose: what the holder does.
        remedy: what a user may do other than wait, in messages.
        wait_seconds: how long to wait for a living holder.
        on_lost: called from the heartbeat's thread, with a line, once another job has taken the lease.

    Raises:
        ValueError: another job holds it.
        OSError: the lease cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        folder: Path,
        purpose: str,
        remedy: str,
        wait_seconds: float = 0,
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.path, self.folder, self._on_lost = path, folder, on_lost
        self._remedy = remedy
        pid = os.getpid()
        self.holder = Holder(
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            started=process_start(pid),
            purpose=purpose,
            job=_job(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=secrets.token_hex(8),
        )
        self._is_held = False
        self._acquire(wait_seconds)
        self._is_held = True
        _heart.add(self)

    def _acquire(self, wait_seconds: float) -> None:
        self._remove_leftovers()
        begun = time.monotonic()
        watched: tuple[str, int] | None = None  # token and heartbeat of another machine's lease
        watched_since = begun
        told = False
        while not self._put():
            seen = _read(self.path)
            if seen is None:  # released meanwhile
                continue
            holder, beat_ns = seen
            if holder is not None and holder.is_here():
                if not holder.is_alive():
                    self._take_over(holder.token)
                    continue
                if time.monotonic() - begun >= wait_seconds:
                    raise ValueError(self._refusal(str(holder)))
                time.sleep(0.05)
                continue
            token = "" if holder is None else holder.token
            if watched != (token, beat_ns):  # a sign of life, from the second look on
                if watched is not None and time.monotonic() - begun >= wait_seconds:
                    raise ValueError(self._refusal("another process" if holder is None else str(holder)))
                watched, watched_since = (token, beat_ns), time.monotonic()
            if time.monotonic() - watched_since >= EXPIRY_SECONDS:
                self._take_over(token)
                watched = None
                continue
            if not told:
                told = True
                print(
                    f"megatron_exact: {self.path} names {holder or 'nobody'}, on another machine: watching "
                    f"for a sign of life, {EXPIRY_SECONDS:.0f} s at most",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(1)

    def _put(self) -> bool:
        """Put our lease in place; False if there is one."""
        text = json.dumps(asdict(self.holder), indent=1).encode() + b"\n"
        temporary = self._hidden(self.holder.token)
        try:
            _create(temporary, text)
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return os.stat(temporary).st_nlink == 2  # NFS: done, but the answer was lost
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                try:
                    _create(self.path, text)
                except FileExistsError:
                    return False
            return True
        except OSError as error:
            error.filename = str(self.folder)  # a user knows this one
            raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _take_over(self, token: str) -> None:
        """Put a dead job's lease away, if it is still the one with this token."""
        with _folder_flock(self.path.parent):
            # Others may take over the same lease: what is put away must still be the dead job's. Where the
            # lock of the folder works, this look decides; elsewhere the name that was moved does.
            if _token_at(self.path) != token:
                return
            aside = self._hidden(secrets.token_hex(8))
            try:
                os.rename(self.path, aside)
            except FileNotFoundError:
                return
            if _token_at(aside) not in (token, None):
                with contextlib.suppress(OSError):  # somebody was faster: give theirs back
                    os.link(aside, self.path)
            aside.unlink()

    def _hidden(self, token: str) -> Path:
        """Return a path beside the lease whose name has the process, for `_remove_leftovers`."""
        holder = self.holder
        name = f"{self.path.name}-{holder.machine}-{holder.pid}-{holder.started}-{token}"
        return self.path.with_name(name)

    def _remove_leftovers(self) -> None:
        """Remove files of processes that were killed while taking the lease; names contain the process."""
        pattern = re.compile(re.escape(self.path.name) + r"-([0-9a-f]{16})-(\d+)-(\d+)-[0-9a-f]{16}")
        for entry in os.listdir(self.path.parent):
            match = pattern.fullmatch(entry)
            if match is None or match[1] != self.holder.machine:
                continue
            if process_state(int(match[2]), int(match[3])) is None:
                with contextlib.suppress(OSError):
                    self.path.with_name(entry).unlink()

    def _refusal(self, holder: str) -> str:
        return (
            f"{self.folder} is in use by {holder}: wait until it ends, stop it, or {self._remedy}; the "
            "lease of a job that died is taken over by itself, on its own machine at once and from another "
            f"after {EXPIRY_SECONDS:.0f} s"
        )

    def beat(self) -> None:
        """Renew the heartbeat; call `on_lost` if another job has taken the lease."""
        if not self._is_held or os.getpid() != self.holder.pid:
            return
        try:
            seen = _read(self.path)
            if seen is not None and seen[0] is not None and seen[0].token == self.holder.token:
                os.utime(self.path)
                return
        except OSError:  # a file system that does not answer now says nothing about the lease
            return
        if not self._is_held:
            return
        self._is_held = False
        now = "gone" if seen is None else f"held by {seen[0] or 'another job'}"
        self._on_lost(
            f"{self.path} is {now}: this job slept for over {EXPIRY_SECONDS:.0f} s, or somebody removed "
            f"the file, and another job may write into {self.folder}"
        )

    def release(self) -> None:
        """Give the folder back; nothing in a forked child, or for a lease that was lost."""
        if not self._is_held or os.getpid() != self.holder.pid:
            return
        self._is_held = False
        _heart.drop(self)
        with contextlib.suppress(OSError), _folder_flock(self.path.parent):
            seen = _read(self.path)
            if seen is not None and seen[0] is not None and seen[0].token == self.holder.token:
                self.path.unlink()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Heart:
    """The thread that renews the leases of this process."""

    def __init__(self) -> None:
        self._leases: list[Lease] = []
        self._pid = 0

    def add(self, lease: Lease) -> None:
        if self._pid != os.getpid():  # none yet, or a forked child, which has no threads
            self._pid = os.getpid()
            self._leases = []
            threading.Thread(target=self._run, args=(self._pid,), name="leases", daemon=True).start()
        self._leases.append(lease)

    def drop(self, lease: Lease) -> None:
        with contextlib.suppress(ValueError):
            self._leases.remove(lease)

    def all(self) -> list[Lease]:
        return list(self._leases)

    def _run(self, pid: int) -> None:
        while os.getpid() == pid:
            time.sleep(BEAT_SECONDS)
            for lease in self.all():
                lease.beat()


_heart = _Heart()


def release_all() -> None:
    """Give back every lease of this process, for exits that run no `finally`."""
    for lease in _heart.all():
        lease.release()


@contextlib.contextmanager
def held_output(
    output: Path, purpose: str, remedy: str = "choose another output", *, wait_seconds: float = 0
) -> Iterator[None]:
    """Hold the lease beside an output that is put in place whole; its parent folder exists.

    Args:
        output: what is written.
        purpose: what this process does, for the message that others get.
        remedy: what they may do other than wait.
        wait_seconds: how long to wait for a living holder.

    Raises:
        ValueError: another process is making it.
    """
    path = output_lease(output)
    with Lease(path, folder=output, purpose=purpose, remedy=remedy, wait_seconds=wait_seconds):
        yield


def is_held(path: Path) -> bool:
    """Return whether a living job holds a lease, without taking it; reads the file alone.

    Of a job of this machine the process tells; of another one the heartbeat, whose age is measured by this
    machine's clock.
    """
    seen = _read(path)
    if seen is None:
        return False
    holder, beat_ns = seen
    if holder is not None and holder.is_here():
        return holder.is_alive()
    return time.time() - beat_ns / 1e9 < EXPIRY_SECONDS


def remove_dead_lease(path: Path) -> None:
    """Remove a lease whose holder was a process of this machine and is dead."""
    with contextlib.suppress(OSError, ValueError):
        seen = _read(path)
        if seen is None or seen[0] is None or not seen[0].is_here() or seen[0].is_alive():
            return
        with _folder_flock(path.parent):
            if _read(path) == seen:
                path.unlink()


def output_lease(output: Path) -> Path:
    """Return the path of an output's lease."""
    return output.with_name(f".{output.name}{LEASE}")


def _create(path: Path, text: bytes) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[Holder | None, int] | None:
    """Return holder (None if unreadable) and heartbeat (ns) of a lease, or None without a lease.

    It is opened each time: NFS asks its server then, and answers from its cache otherwise.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link, not the lease of a job: remove it") from error
        raise
    try:
        beat_ns = os.fstat(descriptor).st_mtime_ns
        try:
            return Holder(**_checked(json.loads(os.read(descriptor, MOST_BYTES)))), beat_ns
        except (ValueError, TypeError, OSError, RecursionError):
            return None, beat_ns
    finally:
        os.close(descriptor)


def _token_at(path: Path) -> str | None:
    """Return the token of a lease, "" if the file is not a lease, None if there is no file."""
    seen = _read(path)
    if seen is None:
        return None
    return "" if seen[0] is None else seen[0].token


def _checked(content: object) -> dict[str, Any]:
    """Check the fields of a lease, which anybody may have written."""
    if not isinstance(content, dict):
        raise TypeError("not an object")
    for name, value in content.items():
        wanted = int if name in ("pid", "started", "format_version") else str
        if type(value) is not wanted or not str(value).isprintable():
            raise TypeError(name)
    return content


@contextlib.contextmanager
def _folder_flock(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock of a folder where there is such a thing: only a help against races."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
