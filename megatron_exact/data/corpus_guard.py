"""Files of a corpus that are read while a job runs: watched for change, compared with what was packed.

Files are read by `pread`, never through a mapping. Where a mapped file is truncated while a job reads it,
the process dies by SIGBUS, or reads zeros up to the end of the page; `pread` returns fewer bytes, which
becomes an error with the file's name. The descriptor stays open, so a file that is replaced under its name
is still the old one. A file that was overwritten in place has another time, which one `fstat` shows. A read
costs about a microsecond more than a slice of a mapping, and no memory: the pages belong to the kernel's
cache.

Three things bind the files of a corpus to the pack that was made from them, the weakest last:

* **blocks**: the corpus record has the sha256 of every 64 MB of the `.bin`, the manifest the hash of these
  hashes. A block is compared in full, before a job reads its first token, at every start with
  `--verify-data`, and for a sample of blocks at every start.
* **the whole file**: `bin_sha256` of the record, for corpora that were tokenized before records had blocks.
  Only `--verify-data` and `pack_corpus.py --verify` can compare it.
* **a sample**: 64 pieces of 64 KB, hashed when the pack is made. A corpus without a record has only this.
  It shows that the file is not another one, but not that every byte is unchanged.

The index is compared in full at every start (`idx_sha256`). After the start, size and time of every open
file are compared after each row (`WatchedFile.has_changed`); a file that was written to is compared again.
On a network file system they are compared every LOOK_SECONDS: one `fstat` per file and row on each of
thousands of ranks would ask its servers whenever the client's cache of attributes expires, and between two
expiries sees nothing new. What is read in between may be what the overwritten file contains.

Comparing a block at first touch costs 64 MB of reading and hashing (0.04 CPU-seconds with SHA instructions)
for a piece of a few KB. Over time every rank reads nearly all blocks, so each start costs every rank one
pass over the corpora: 20 CPU-seconds in data workers for TOUCHED_BYTES, below one percent of the first
hour. Larger corpora are not compared as they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from megatron_exact.data.shuffle import derive_key, random_bits

Stamp = tuple[int, int]
"""Size of a file, and when it was last written, in nanoseconds."""
BLOCK_BYTES = 64 << 20
TOUCHED_BYTES = 32 << 30
"""Total size of a pack's corpora up to which blocks are compared as they are read."""
SAMPLED_BLOCKS = 16
"""Most blocks of a pack that are compared at the start of a job."""
SAMPLE_PIECES = 64
PIECE_BYTES = 64 << 10
READ_BYTES = 4 << 20
HASHING_THREADS = 4  # hashing releases Python's lock
LOOK_SECONDS = 30.0
NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "cifs", "smb3", "ceph", "wekafs", "pvfs2"),
    *("afs", "9p", "virtiofs", "fuse"),
)
"""Types as in /proc/self/mountinfo, where FUSE has `fuse.NAME`."""


def stamp_of(path: Path) -> Stamp | None:
    """Return size and time of a file now; None where it does not exist."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return None


@cache
def is_on_network(device: int) -> bool:
    """Return whether the file system with this device number (`st_dev`) lies on other machines."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with (
        contextlib.suppress(OSError),
        open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts,
    ):
        for line in mounts:
            about, _, kind = line.partition(" - ")
            if about.split()[2] == number:
                return kind.split()[0].partition(".")[0] in NETWORK_FILE_SYSTEMS
    return False


class WatchedFile:
    """Random access to one open file.

    Attributes:
        path: path of the file.
        name: what messages call it: the path, or a URL.
        stamp: size and time that the file should have; by default those at opening.
    """

    def __init__(self, path: Path, stamp: Stamp | None = None, *, is_random: bool = False) -> None:
        self.path = path
        self.name = str(path)
        self._descriptor = -1
        self._descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # opening a FIFO must not hang
        self.stamp = stamp or self._now()
        self._is_on_network = is_on_network(os.fstat(self._descriptor).st_dev)
        self._look_at = 0.0  # when to compare size and time again; on a local disk always
        if is_random:
            # Otherwise each first read of a page reads up to megabytes around it, for a few hundred tokens
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes at `offset`.

        Raises:
            ValueError: the file ends earlier.
            OSError: the disk fails; it names the file.
        """
        try:
            content = os.pread(self._descriptor, size, offset)
            if len(content) == size:  # nearly always: one call reads at most 2 GB
                return content
            while more := os.pread(self._descriptor, size - len(content), offset + len(content)):
                content += more
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if len(content) < size:
            raise ValueError(
                f"{self.name} ends at byte {offset + len(content):,} but had {self.stamp[0]:,} bytes: it "
                "was truncated while it was read; restore it, then start again"
            )
        return content

    def will_need(self, *ranges: tuple[int, int]) -> None:
        """Ask the kernel to fetch these (offset, bytes), without waiting for them."""
        try:
            for offset, size in ranges:
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        except OSError:  # only advice, which some file systems do not support
            pass

    def has_changed(self) -> bool:
        """Return whether size or time are not as they should be.

        On a network file system this looks every LOOK_SECONDS, and returns False in between.
        """
        if self._is_on_network:
            now = time.monotonic()
            if now < self._look_at:
                return False
            self._look_at = now + LOOK_SECONDS
        if self._now() == self.stamp:
            return False
        self._look_at = 0.0  # nothing is as it was opened until the change is accepted
        return True

    def accept_change(self) -> None:
        """Accept the file as it is now, after its content was compared."""
        self.stamp = self._now()

    def require_size(self) -> None:
        """Raise ValueError if the file has another size than it should."""
        size = self._now()[0]
        if size != self.stamp[0]:
            raise ValueError(
                f"{self.path} has {size:,} bytes but had {self.stamp[0]:,}: it was truncated or replaced "
                "while it was read; restore it, then start again"
            )

    def close(self) -> None:
        """Close the file; it cannot be read any more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _now(self) -> Stamp:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def __del__(self) -> None:
        self.close()


class BlockHasher:
    """Hashes a file of any length, block by block, while it is written."""

    def __init__(self) -> None:
        self._finished: list[str] = []
        self._digest = hashlib.sha256()
        self._room = BLOCK_BYTES

    def update(self, data: memoryview | bytes) -> None:
        """Add bytes."""
        if not memoryview(data).nbytes:  # an empty view cannot be cast
            return
        left = memoryview(data).cast("B")
        while left:
            part, left = left[: self._room], left[self._room :]
            self._digest.update(part)
            self._room -= len(part)
            if not self._room:
                self._finished.append(self._digest.hexdigest())
                self._digest, self._room = hashlib.sha256(), BLOCK_BYTES

    def copy(self) -> BlockHasher:
        """Return another hasher in the same state."""
        other = BlockHasher()
        other._finished, other._digest = self._finished.copy(), self._digest.copy()
        other._room = self._room
        return other

    def hexdigests(self) -> list[str]:
        """Return the hex sha256 of each block so far; the last may be shorter."""
        return self._finished + ([self._digest.hexdigest()] if self._room < BLOCK_BYTES else [])


def hash_blocks(path: Path) -> list[str]:
    """Return the hex sha256 of each block of a file, hashed in parallel."""
    size = path.stat().st_size
    file = WatchedFile(path)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return list(threads.map(lambda number: hash_block(file, number, size), range(num_blocks(size))))


def num_blocks(size: int) -> int:
    """Return the number of blocks of a file of this size."""
    return -(-size // BLOCK_BYTES)


def hash_block(
    file: WatchedFile, number: int, size: int, on_bytes: Callable[[int], object] | None = None
) -> str:
    """Return the hex sha256 of one block of a file of `size` bytes, in bounded memory.

    Raises:
        ValueError: the file ends earlier.
    """
    digest = hashlib.sha256()
    stop = min((number + 1) * BLOCK_BYTES, size)
    for offset in range(number * BLOCK_BYTES, stop, READ_BYTES):
        content = file.read(offset, min(READ_BYTES, stop - offset))
        digest.update(content)
        if on_bytes is not None:
            on_bytes(len(content))
    return digest.hexdigest()


def hash_whole(file: WatchedFile, on_bytes: Callable[[int], object]) -> str:
    """Return the hex sha256 of a whole file, read in pieces; `on_bytes` is called with the size of each."""
    digest, size = hashlib.sha256(), file.stamp[0]
    for offset in range(0, size, READ_BYTES):
        content = file.read(offset, min(READ_BYTES, size - offset))
        digest.update(content)
        on_bytes(len(content))
    return digest.hexdigest()


def join_blocks(blocks: Sequence[str]) -> str:
    """Join the hashes of blocks into the one that a manifest contains."""
    return hashlib.sha256("\n".join((f"{BLOCK_BYTES}", *blocks)).encode()).hexdigest()


def sample_places(size: int, idx_sha256: str) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of the pieces of a sample: a small file whole, else both ends and 62 others."""
    if size <= SAMPLE_PIECES * PIECE_BYTES:
        yield 0, size
        return
    yield 0, PIECE_BYTES
    bits = random_bits(derive_key("sample of a .bin", idx_sha256), np.arange(SAMPLE_PIECES - 2))
    for place in sorted(int(one) % (size - PIECE_BYTES) for one in bits):
        yield place, PIECE_BYTES
    yield size - PIECE_BYTES, PIECE_BYTES


def hash_sample(file: WatchedFile, idx_sha256: str) -> str:
    """Return the hex sha256 of the sample of a `.bin`.

    Args:
        file: the open file.
        idx_sha256: hash of its index, which determines the places.
    """
    places = list(sample_places(file.stamp[0], idx_sha256))
    file.will_need(*places)
    digest = hashlib.sha256()
    for place in places:
        digest.update(file.read(*place))
    return digest.hexdigest()


def changed_while_read(path: Path) -> ValueError:
    """Make the error of a file that was written to and whose content cannot be compared."""
    return ValueError(
        f"{path} was written to while it was read, and without hashes it is unknown whether it still "
        "contains what was packed: leave the files of a pack alone while a job runs, then start again"
    )


@dataclass(kw_only=True)
class PartGuard:
    """What one pair of files must contain while a job reads it."""

    idx_sha256: str
    """Hex sha256 that the `.idx` must have."""
    idx_stamp: Stamp | None
    """Size and time of the `.idx` when the job began."""
    bin_stamp: Stamp | None
    """Size and time of the `.bin` when the job began."""
    blocks: Sequence[str] | None = None
    """Hex sha256 of each block of the `.bin`; None where they are not compared as they are read."""
    compared: memoryview | None = None
    """[blocks], 1 where a block has been compared; forked workers share it."""

    @property
    def stamps(self) -> tuple[Stamp | None, Stamp | None]:
        """Size and time of the `.idx` and of the `.bin` when the job began."""
        return self.idx_stamp, self.bin_stamp

    def require_blocks(self, file: WatchedFile, begin: int, size: int) -> None:
        """Compare those blocks of [begin, begin + size) that have not been compared yet.

        Raises:
            ValueError: a block that is not what was packed.
        """
        if self.blocks is None or self.compared is None:
            return
        for number in range(begin // BLOCK_BYTES, num_blocks(begin + size)):
            if not self.compared[number]:
                require_block(file, number, self.blocks)
                self.compared[number] = 1

    def compare_again(self, file: WatchedFile, check_index: Callable[[], str]) -> None:
        """Compare a file of the expected size that was written to: the index now, tokens as they are read.

        Args:
            file: `.idx` or `.bin`.
            check_index: verifies the index and returns its sha256.

        Raises:
            ValueError: the index is another one, or there are no hashes of blocks.
        """
        status = os.stat(file.path)
        stamp = (status.st_size, status.st_mtime_ns)
        if file.path.suffix == ".idx":
            if check_index() != self.idx_sha256:
                raise ValueError(
                    f"{file.path} was overwritten while a job read it: restore the file, then start again"
                )
            self.idx_stamp = stamp
        elif self.blocks is None or self.compared is None:
            raise changed_while_read(file.path)
        else:
            self.compared[:] = bytes(len(self.compared))
            self.bin_stamp = stamp


def require_block(file: WatchedFile, number: int, blocks: Sequence[str]) -> None:
    """Compare one block of a `.bin` with its hash.

    Raises:
        ValueError: the block is not what was packed.
    """
    found = hash_block(file, number, file.stamp[0])
    if found != blocks[number]:
        raise ValueError(
            f"{file.name} is not the file that was packed: bytes {number * BLOCK_BYTES:,} to "
            f"{min((number + 1) * BLOCK_BYTES, file.stamp[0]):,} have sha256 {found[:16]}..., its record "
            f"says {blocks[number][:16]}...; restore the file, or tokenize and pack again"
        )
