"""Corpora at a URL: the `.bin` is read by byte ranges, through a cache on the disk of each node.

`--source-root s3://bucket/corpora` (or `gs://`, `https://`: any URL of fsspec) makes a stand-in of each
corpus in the cache: the `.idx` and the record, fetched once per node, and in place of the `.bin` a small
file `NAME.bin.url` with its URL, size and identity. From there on a remote corpus is a folder like any
other, and only `open_bin` knows the difference.

    CACHE/corpora/<key>/web.idx, web.json, web.bin.url       a stand-in
    CACHE/chunks/<key of the object>/<n // 1024>/<n>         256 KiB of a .bin and a sha256 behind them

A request to an object store takes about 20 ms whatever its size up to a megabyte, so what counts is how
many are in flight. `RemoteFile.will_need` queues the chunks of whole rows, `read` waits for those it needs:

* Adjacent chunks are one request. IN_FLIGHT requests run at a time in each process.
* A chunk is looked for in memory, then on the node's disk, where every process of the node finds it.
* An object is read as it was when the stand-in was made. After a range has arrived, a request that begins
  later must still find the same size and ETag before its bytes are used, so a row never mixes two versions
  of an object. One such request answers for all ranges that arrived before it.
* A request that fails is repeated for about a minute. No process asks for metadata when it opens a corpus
  whose stand-in was compared with the store in the last FRESH_SECONDS.

Megatron-Core reads `s3://` in chunks of 256 MiB, one at a time and one in memory
(megatron/core/datasets/indexed_dataset.py), which suits documents in the order of the file. The rows of a
pack take documents from all over a corpus.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import queue
import random
import socket
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_exact.command_line import progress_bar
from megatron_exact.data.corpus_guard import Stamp, WatchedFile
from megatron_exact.files import FULL, atomic_file, write_json
from megatron_exact.json_input import read_json_object

CHUNK_BYTES = 256 << 10
REQUEST_BYTES = 8 << 20  # the most that one request asks for
IN_FLIGHT = 32
READ_AHEAD_FROM_URL = 16  # rows, by default
MEMORY_CHUNKS = 512
"""Chunks in the memory of a process, 128 MiB: those that were read ahead, until their row is read."""
ATTEMPTS = 8
FIRST_DELAY = 0.5  # seconds; doubled after each attempt, 63 in all
REQUEST_SECONDS = 60.0  # the longest that one request may take
FRESH_SECONDS = 600
FOLDER_VARIABLE, SIZE_VARIABLE = "MEGATRON_EXACT_CACHE", "MEGATRON_EXACT_CACHE_GIB"
DEFAULT_CACHE_GIB = 50.0
SWEEP_SHARE, KEPT_SHARE = 0.02, 0.7
"""A process looks at the size of the cache whenever it has written 2% of the limit, and then leaves 70%:
fifteen processes that write at the same time stay below the limit."""
STAND_IN_SUFFIX = ".url"
DRIVERS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""Protocol -> the extra of this package that installs its driver."""
IDENTITY_FIELDS = (
    *("ETag", "etag", "VersionId", "version_id", "generation", "md5Hash", "crc32c", "Content-MD5"),
    *("content_md5", "Digest", "blob_id", "LastModified", "last_modified", "Last-Modified", "mtime"),
    *("modified", "updated", "created"),
)
"""What drivers of fsspec say about an object that changes with its content; each says some of it."""


def is_url(place: str | Path) -> bool:
    """Return whether a place is a URL."""
    return isinstance(place, str) and "://" in place


def require_plain_url(url: str) -> None:
    """Check that a URL can stand in records and logs.

    Raises:
        ValueError: it contains a password or a query, such as the signature of a presigned URL.
    """
    parts = urlsplit(url)
    has_password = "@" in parts.netloc and (
        parts.scheme in ("http", "https") or ":" in parts.netloc.rpartition("@")[0]
    )
    if has_password or parts.query or parts.fragment or "::" in url:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ValueError(
            f"the URL of {shown} contains a user, a query or a chain of protocols, which would be "
            "written to records: give the plain URL, and credentials as its driver reads them "
            "(AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ~/.netrc or fsspec's configuration files)"
        )


_file_systems: dict[tuple[int, str], Any] = {}
"""By process and root, because connections and event loops do not survive a fork. A child keeps those
of its parent without using them: closing them would remove the parent's sockets from the epoll that both
share."""


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path in it."""
    import fsspec

    parts = urlsplit(url)
    key = (os.getpid(), f"{parts.scheme}://{parts.netloc}")
    try:
        if key not in _file_systems:
            kind = fsspec.get_filesystem_class(parts.scheme)
            options = kind._get_kwargs_from_urls(url)
            # A listing that was cached would answer later questions about an object
            options |= {"use_listings_cache": False, "skip_instance_cache": True}
            if parts.scheme in ("s3", "s3a"):  # botocore opens 10 connections by default
                configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
                options["config_kwargs"] = {"max_pool_connections": IN_FLIGHT, **configured}
            _file_systems.setdefault(key, kind(**options))
        file_system = _file_systems[key]
        return file_system, file_system._strip_protocol(url)
    except (ImportError, ValueError) as error:
        extra = DRIVERS.get(parts.scheme)
        remedy = f"pip install 'megatron-exact[{extra}]'" if extra else "install its driver for fsspec"
        raise ValueError(
            f"{url} cannot be read ({error}): {remedy}, or copy the corpus to a disk"
        ) from error


def _time_limit(file_system: Any) -> dict[str, float]:
    """Return the argument that ends a request that hangs; drivers without a loop have other limits."""
    return {"timeout": REQUEST_SECONDS} if getattr(file_system, "async_impl", False) else {}


class _PermanentError(ValueError):
    """An error that another attempt would not change."""


class _ForbiddenError(ValueError):
    """The store does not let these credentials read an object."""


def _is_gone(error: FileNotFoundError) -> bool:
    """Return whether an object does not exist; fsspec says so also where a server cannot be reached."""
    cause = error.__cause__
    is_http = type(cause).__module__.partition(".")[0] in ("aiohttp", "asyncio", "builtins")
    return cause is None or not is_http or getattr(cause, "status", 0) in (404, 410)


def _repeat[T](what: str, request: Callable[[], T]) -> T:
    """Make a request, again and again for about a minute.

    Raises:
        FileNotFoundError: the object does not exist.
        ValueError: it cannot be read; names what was asked for.
    """
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except _PermanentError:
            raise
        except Exception as error:  # errors of the drivers' HTTP libraries have no common base
            if isinstance(error, FileNotFoundError) and _is_gone(error):
                raise
            # fsspec says of a server's 403 that the file is not found
            status = getattr(error.__cause__, "status", getattr(error, "status", 0))
            if isinstance(error, PermissionError) or status in (401, 403):
                raise _ForbiddenError(
                    f"{what} may not be read ({error.__cause__ or error}): give the job credentials that "
                    "may, as the driver of fsspec reads them, then start again"
                ) from error
            failed = error
        if attempt == ATTEMPTS - 1:
            said = f"{type(failed).__name__}: {failed}".removesuffix(": ")
            raise ValueError(
                f"{what} could not be read in {ATTEMPTS} attempts ({said}): check that the store can be "
                f"reached from {socket.gethostname()} and allows so many requests, then start the job "
                "again, which resumes"
            ) from failed
        time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.5))  # ranks must not return in step
    raise AssertionError("unreachable")


@dataclass(frozen=True, kw_only=True)
class RemoteObject:
    """One object, as it is or as it was when it was described."""

    url: str
    """Its URL, without credentials."""
    size: int
    """Its size in bytes."""
    identity: dict[str, str]
    """What the store says that changes with its content, such as the ETag."""

    @classmethod
    def at(cls, url: str) -> RemoteObject:
        """Describe an object by one request.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: it cannot be read, or the store does not say its size and when it changes.
        """
        require_plain_url(url)
        file_system, path = _file_system(url)
        info = _repeat(url, lambda: file_system.info(path, **_time_limit(file_system)))
        identity = {name: str(info[name]) for name in IDENTITY_FIELDS if info.get(name) is not None}
        size = info.get("size")
        if not isinstance(size, int) or not identity or info.get("partial") is False:
            lacks = "byte ranges" if info.get("partial") is False else "size and ETag or time of change"
            raise ValueError(
                f"{url} is served without {lacks}: use a server that supports them, or copy the corpus to "
                "a disk"
            )
        return cls(url=url, size=size, identity=identity)

    @cached_property
    def key(self) -> str:
        """Name of this version of the object in the cache."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    def require_unchanged(self) -> None:
        """Raise ValueError if the store has another version by now."""
        try:
            now: RemoteObject | None = RemoteObject.at(self.url)
        except FileNotFoundError:
            now = None
        if now != self:
            found = "does not exist any more" if now is None else f"has {now.size:,} bytes, {now.identity}"
            raise ValueError(
                f"{self.url} was replaced while a job read it: it had {self.size:,} bytes, "
                f"{self.identity}, and now {found}; put the object that was packed back, then start again"
            )

    def read(self, begin: int, stop: int) -> bytes:
        """Read the bytes [begin, stop) by one request, repeated where it fails."""
        file_system, path = _file_system(self.url)

        def request() -> bytes:
            content: bytes = file_system.cat_file(path, start=begin, end=stop, **_time_limit(file_system))
            if len(content) == self.size > stop - begin:
                raise _PermanentError(
                    f"{self.url} is served whole where a range is asked for: use a server that supports "
                    "byte ranges, or copy the corpus to a disk"
                )
            if len(content) != stop - begin:
                raise OSError(f"{len(content):,} bytes came where {stop - begin:,} were asked for")
            return content

        try:
            return _repeat(f"{self.url}, bytes {begin:,} to {stop:,},", request)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.url} was removed while it was read: put it back, then start again"
            ) from error


class NodeCache:
    """Chunks on the disk of a node, bounded, written and read by all its processes.

    A file is renamed into place whole, without a flush: one that a power failure left incomplete does not
    have the sha256 behind it, and is fetched again. The oldest files are removed first. A disk that is full
    or fails costs requests, never a run.

    Args:
        folder: the cache.
        limit: bytes of all chunks.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / "chunks"
        self.limit = limit
        self._unseen = 0  # bytes written since this process looked at the size of the cache
        self._has_warned = False
        self._lock = threading.Lock()

    def _path(self, key: str, number: int) -> Path:
        return self.folder / key / str(number // 1024) / str(number)

    @staticmethod
    def _digest(key: str, number: int, content: bytes) -> bytes:
        digest = hashlib.sha256(f"{key} {number} ".encode())  # a chunk in another's place is not valid
        digest.update(content)
        return digest.digest()

    def read(self, key: str, number: int) -> bytes | None:
        """Return a chunk; None where it is missing or damaged."""
        try:
            stored = self._path(key, number).read_bytes()
        except OSError:
            return None
        content, digest = stored[:-32], stored[-32:]
        return content if digest == self._digest(key, number, content) else None

    def write(self, key: str, number: int, content: bytes) -> None:
        """Keep a chunk, if there is room."""
        path = self._path(key, number)
        temporary = path.with_name(f".{number}-{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content + self._digest(key, number, content))
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not self._has_warned:
                self._has_warned = True
                print(
                    f"warning: the cache {self.folder} cannot be written ({error}): what is read from URLs "
                    f"is fetched again by each process; free space, or set {FOLDER_VARIABLE} or "
                    f"{SIZE_VARIABLE}",
                    file=sys.stderr,
                    flush=True,
                )
            return
        with self._lock:
            self._unseen += len(content)
            is_due = self._unseen > SWEEP_SHARE * self.limit
            if is_due:
                self._unseen = 0
        if is_due:
            self.sweep()

    def sweep(self) -> None:
        """Remove the oldest chunks beyond KEPT_SHARE of the limit; one process of a node at a time."""
        with contextlib.suppress(OSError), open(self.folder / ".sweep", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files: list[tuple[float, int, str]] = []
            for folder, _, names in os.walk(self.folder):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        status = os.stat(os.path.join(folder, name))
                        files.append((status.st_mtime, status.st_size, os.path.join(folder, name)))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= KEPT_SHARE * self.limit:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size


def cache_folder() -> Path:
    """Return the cache of this node, made at first use.

    Raises:
        ValueError: it cannot be made or written, or belongs to another user.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    folder = Path(named or Path(tempfile.gettempdir()) / f"megatron_exact-{os.getuid()}").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_own = folder.stat().st_uid == os.getuid() or named is not None
        if not is_own or not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it belongs to another user or cannot be written")
    except OSError as error:
        raise ValueError(
            f"the cache of remote corpora {folder} cannot be used ({error}): set {FOLDER_VARIABLE} to a "
            "folder on a disk of this node"
        ) from error
    return folder


def cache_bytes() -> int:
    """Return the limit of the cache's chunks, from the environment.

    Raises:
        ValueError: not a positive number.
    """
    text = os.environ.get(SIZE_VARIABLE, str(DEFAULT_CACHE_GIB))
    try:
        size = float(text)
        if not 0 < size < 1e9:
            raise ValueError
    except ValueError:
        raise ValueError(f"{SIZE_VARIABLE}={text!r}: give the size of the cache in GiB, above 0") from None
    return int(size * (1 << 30))


class ChunkReader:
    """Chunks of remote objects in one process: queued, arriving, or in memory.

    Its threads are daemons: requests for rows that nobody reads do not hold up the end of a process.
    """

    def __init__(self, cache: NodeCache) -> None:
        self.requests = 0
        """Ranges that were asked for, for benchmarks and tests."""
        self.comparisons = 0
        """Comparisons of an object with the store."""
        self._cache = cache
        self._lock = threading.Lock()
        self._chunks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._queue: queue.SimpleQueue[tuple[RemoteObject, dict[int, Future[bytes]]]] = queue.SimpleQueue()
        self._comparing: dict[str, threading.Lock] = {}
        self._compared: dict[str, float] = {}  # when the last comparison of an object that succeeded began
        self._threads = 0

    def want(self, what: RemoteObject, ranges: Iterable[tuple[int, int]]) -> None:
        """Queue those chunks of byte ranges that are neither here nor queued; adjacent ones together."""
        numbers = sorted({n for begin, size in ranges for n in chunks_of(begin, size)})
        with self._lock:
            missing = []
            for number in numbers:
                known = self._chunks.get((what.key, number))
                if known is None or (known.done() and known.exception() is not None):
                    missing.append(number)
                else:
                    self._chunks.move_to_end((what.key, number))
            for run in consecutive(missing, REQUEST_BYTES // CHUNK_BYTES):
                futures: dict[int, Future[bytes]] = {number: Future() for number in run}
                for number, future in futures.items():
                    self._chunks[what.key, number] = future
                self._queue.put((what, futures))
                if self._threads < IN_FLIGHT:
                    self._threads += 1
                    threading.Thread(target=self._work, name="remote reader", daemon=True).start()
            while len(self._chunks) > max(MEMORY_CHUNKS, len(numbers)):
                self._chunks.popitem(last=False)

    def take(self, what: RemoteObject, begin: int, size: int) -> bytes:
        """Return the bytes of a range, waiting for the chunks that are not here.

        Raises:
            ValueError: they cannot be read, or the object was replaced.
        """
        self.want(what, [(begin, size)])
        pieces = []
        for number in chunks_of(begin, size):
            with self._lock:
                future = self._chunks.get((what.key, number))
            while future is None:  # displaced by other threads' chunks
                self.want(what, [(number * CHUNK_BYTES, 1)])
                with self._lock:
                    future = self._chunks.get((what.key, number))
            first = number * CHUNK_BYTES
            pieces.append(future.result()[max(0, begin - first) : begin + size - first])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _work(self) -> None:
        while True:
            what, futures = self._queue.get()
            try:
                found = self._load(what, list(futures))
            except BaseException as error:
                for future in futures.values():
                    future.set_exception(error)
            else:
                for number, future in futures.items():
                    future.set_result(found[number])
                del found
            del futures, future  # an idle thread must not keep the last chunks in memory

    def _load(self, what: RemoteObject, run: list[int]) -> dict[int, bytes]:
        found = {}
        for number in run:
            if (content := self._cache.read(what.key, number)) is not None:
                found[number] = content
        fetched = {}
        for missing in consecutive([number for number in run if number not in found], len(run)):
            first = missing.start * CHUNK_BYTES
            content = what.read(first, min(missing.stop * CHUNK_BYTES, what.size))
            with self._lock:
                self.requests += 1
            for number in missing:
                at = number * CHUNK_BYTES - first
                fetched[number] = content[at : at + CHUNK_BYTES]
        if fetched:
            self.require_unchanged(what)
            for number, content in fetched.items():
                self._cache.write(what.key, number, content)
        return found | fetched

    def require_unchanged(self, what: RemoteObject) -> None:
        """Compare an object with the store by a request that begins after this call.

        Ranges that arrive while a comparison runs wait for the next one, which answers for all of them.
        """
        arrived = time.monotonic()
        with self._lock:
            lock = self._comparing.setdefault(what.key, threading.Lock())
        with lock:
            if self._compared.get(what.key, 0.0) > arrived:
                return
            begun = time.monotonic()
            what.require_unchanged()
            self._compared[what.key] = begun
            self.comparisons += 1


_readers: dict[int, ChunkReader] = {}  # by process: threads and locks do not survive a fork


def chunk_reader() -> ChunkReader:
    """Return the reader of this process."""
    process = os.getpid()
    reader = _readers.get(process)
    if reader is None:
        for other in [key for key in _readers if key != process]:
            _readers.pop(other, None)  # a parent's chunks
        reader = _readers.setdefault(process, ChunkReader(NodeCache(cache_folder(), cache_bytes())))
    return reader


def chunks_of(begin: int, size: int) -> range:
    """Return the numbers of the chunks that contain a byte range."""
    return range(begin // CHUNK_BYTES, -(-(begin + size) // CHUNK_BYTES) if size else begin // CHUNK_BYTES)


def consecutive(numbers: Sequence[int], most: int) -> Iterator[range]:
    """Yield the runs of consecutive numbers in an ascending sequence, of at most `most` numbers each."""
    first = 0
    for index in range(1, len(numbers) + 1):
        is_end = index == len(numbers) or numbers[index] != numbers[index - 1] + 1 or index - first == most
        if is_end:
            yield range(numbers[first], numbers[index - 1] + 1)
            first = index


class RemoteFile(WatchedFile):
    """Random access to an object, with the methods of an open file.

    Args:
        path: the `.bin` that the stand-in stands for; it names the file where errors name no URL.
        what: the object.
        is_random: whether rows are read. Who compares a whole object reads the store, not the cache, and
            leaves nothing there: each byte is read once.
    """

    def __init__(self, path: Path, what: RemoteObject, *, is_random: bool) -> None:
        self.path = path
        self.name = what.url
        self.stamp = (what.size, 0)
        self._descriptor = -1
        self._what = what
        self._is_random = is_random

    def read(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes at `offset`, see `ChunkReader.take`."""
        assert 0 <= offset <= offset + size <= self._what.size
        if self._is_random:
            return chunk_reader().take(self._what, offset, size)
        content = self._what.read(offset, offset + size) if size else b""
        chunk_reader().require_unchanged(self._what)
        return content

    def will_need(self, *ranges: tuple[int, int]) -> None:
        """Queue the chunks of (offset, bytes) pairs without waiting for them."""
        if self._is_random:
            chunk_reader().want(self._what, ranges)

    def has_changed(self) -> bool:
        """Return False: what is read is compared with the store as it arrives."""
        return False

    def _now(self) -> Stamp:
        return self.stamp


def stand_in(bin_path: Path) -> Path:
    """Return the path of the file that stands for a remote `.bin`."""
    return bin_path.with_name(bin_path.name + STAND_IN_SUFFIX)


def remote_bin(bin_path: Path) -> RemoteObject | None:
    """Return the object that a `.bin` stands for, or None for a file on disk."""
    path = stand_in(bin_path)
    if not path.is_file():
        return None
    content = read_json_object(path, "remove its folder, which is fetched again")
    return RemoteObject(**{name: content[name] for name in ("url", "size", "identity")})


def open_bin(path: Path, stamp: Stamp | None = None, *, is_random: bool = True) -> WatchedFile:
    """Open a `.bin`, whether it lies on disk or at a URL."""
    what = remote_bin(path)
    return (
        WatchedFile(path, stamp, is_random=is_random)
        if what is None
        else RemoteFile(path, what, is_random=is_random)
    )


def bin_bytes(path: Path) -> int:
    """Return the size of a `.bin` on disk or at a URL."""
    what = remote_bin(path)
    return path.stat().st_size if what is None else what.size


_stand_ins: dict[tuple[str, ...], Path] = {}  # found by this process


def local_corpus(candidates: Sequence[str], idx_sha256: Mapping[str, str], *, is_folder: bool) -> Path:
    """Return the stand-in of a remote corpus, made or compared with the store once per node.

    Args:
        candidates: URLs at which the corpus may lie, without suffix; the first that exists is taken.
        idx_sha256: sha256 of the `.idx` of each pair of files, by name.
        is_folder: whether the corpus is a folder of pairs.

    Returns:
        Path without suffix, or folder.

    Raises:
        FileNotFoundError: it lies at none of the URLs.
        ValueError: it cannot be read, or an index is not the one that was packed.
    """
    for url in candidates:
        require_plain_url(url)
    cache = cache_folder()
    names = (str(cache), *candidates)
    if names in _stand_ins:
        return _stand_ins[names]
    key = hashlib.sha256("\n".join(candidates).encode()).hexdigest()[:32]
    folder = cache / "corpora" / key
    local = folder / names[-1].rpartition("/")[2]
    described = folder / ".corpus.json"
    with _only_one(folder):
        if not _is_fresh(described, idx_sha256):
            found = _fetch_pairs(
                candidates, local if is_folder else folder, idx_sha256, is_folder=is_folder
            )
            write_json(described, {"url": found, "idx_sha256": dict(idx_sha256)})
    _stand_ins[names] = local
    return local


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one process of the node fill a folder of the cache; the others wait for it.

    Raises:
        ValueError: the disk is full, or has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno not in (*FULL, errno.ENOLCK, errno.EROFS, errno.ENOTSUP):
            raise
        raise ValueError(
            f"the cache {folder} cannot be filled ({error.strerror}): set {FOLDER_VARIABLE} to a folder on "
            "a disk of this node with room for the indices"
        ) from error


def _is_fresh(described: Path, idx_sha256: Mapping[str, str]) -> bool:
    with contextlib.suppress(OSError, ValueError):
        is_recent = time.time() - described.stat().st_mtime < FRESH_SECONDS
        return is_recent and read_json_object(described, "")["idx_sha256"] == dict(idx_sha256)
    return False


def _fetch_pairs(
    candidates: Sequence[str], folder: Path, idx_sha256: Mapping[str, str], *, is_folder: bool
) -> str:
    """Fetch the small files of a corpus, write the stand-ins, and return the URL that was found."""
    first = next(iter(idx_sha256))
    forbidden: _ForbiddenError | None = None
    for url in candidates:
        pairs = {name: f"{url}/{name}" if is_folder else url for name in idx_sha256}
        try:
            RemoteObject.at(pairs[first] + ".idx")
            break
        except FileNotFoundError:
            pass
        except _ForbiddenError as error:  # S3 says so of missing objects where a bucket may not be listed
            forbidden = error
    else:
        if forbidden is not None:
            raise forbidden
        raise FileNotFoundError(f"{candidates[0]}.idx and {len(candidates) - 1} shorter URLs do not exist")
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(f"fetching the index of {url}", None, "B") as bar, ThreadPoolExecutor(8) as threads:
        done = threads.map(
            lambda name: _fetch_pair(pairs[name], folder / name, idx_sha256[name], bar.update), pairs
        )
        list(done)
    return url


def _fetch_pair(url: str, prefix: Path, idx_sha256: str, on_bytes: Callable[[int], object]) -> None:
    """Fetch `.idx` and record of one pair and write the stand-in of its `.bin`, where they have changed."""
    idx_path, bin_path = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    index, tokens = RemoteObject.at(url + ".idx"), RemoteObject.at(url + ".bin")
    record: RemoteObject | None = None
    with contextlib.suppress(FileNotFoundError):
        record = RemoteObject.at(url + ".json")
    content = {
        **asdict(tokens),
        "index": {**asdict(index), "sha256": idx_sha256},
        "record": None if record is None else asdict(record),
    }
    path = stand_in(bin_path)
    with contextlib.suppress(OSError, ValueError):
        if read_json_object(path, "") == content and idx_path.stat().st_size == index.size:
            return
    if index.size > 1:
        index.read(0, 1)  # a server without ranges would send a whole .bin into memory: ask it here first
    digest = hashlib.sha256()
    with atomic_file(idx_path) as temporary:
        with open(temporary, "wb") as stream:
            for piece in _stream(index):
                digest.update(piece)
                stream.write(piece)
                on_bytes(len(piece))
        index.require_unchanged()
        if digest.hexdigest() != idx_sha256:
            raise ValueError(
                f"{index.url} has sha256 {digest.hexdigest()[:16]}... but {idx_sha256[:16]}... was "
                "packed: it was tokenized again or is another corpus, pack it again"
            )
    record_path = prefix.with_name(prefix.name + ".json")
    record_path.unlink(missing_ok=True)
    if record is not None:
        with atomic_file(record_path) as temporary:
            temporary.write_bytes(record.read(0, record.size) if record.size else b"")
        record.require_unchanged()
    write_json(path, content)


def _stream(what: RemoteObject) -> Iterator[bytes]:
    """Yield an object in pieces, several requests at a time."""
    places = range(0, what.size, REQUEST_BYTES)
    with ThreadPoolExecutor(4) as threads:
        for first in range(0, len(places), 16):  # bounded memory: 128 MiB
            mine = places[first : first + 16]
            yield from threads.map(lambda at: what.read(at, min(at + REQUEST_BYTES, what.size)), mine)
