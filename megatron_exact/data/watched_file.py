"""A file that is read while others might change it: by `pread`, and never by a mapping.

Where a mapped file is cut while a job reads it, the process dies by SIGBUS, or reads zeros up to the end of
the page. `pread` returns fewer bytes, which becomes an error with the file's name. The descriptor stays
open, so a file that is replaced under its name goes on as it was. What cannot be seen in a read, a file
that was overwritten in place, changes its time: `has_changed` compares size and time by one `fstat`.

A read costs about a microsecond more than a slice of a mapping, and nothing in memory: the pages that are
read belong to the kernel's cache alone.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

Stamp = tuple[int, int]
"""Size of a file, and when it was last written, in nanoseconds."""


def stamp_of(path: Path) -> Stamp | None:
    """Size and time of a file now; None where it is not there."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return None


class WatchedFile:
    """Random access to one open file.

    Attributes:
        path: of the file.
        stamp: size and time that the file should have; by default those at opening.
    """

    def __init__(self, path: Path, stamp: Stamp | None = None, *, is_random: bool = False) -> None:
        self.path = path
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang
        self.stamp = stamp or self._now()
        if is_random:
            # Or each first read of a page fetches all around it, up to megabytes, for a few hundred tokens.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes at `offset`.

        Raises:
            ValueError: the file ends before.
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
                f"{self.path} ends at byte {offset + len(content):,} but had {self.stamp[0]:,} bytes: it "
                "was cut while it was read; restore it, then start again"
            )
        return content

    def will_need(self, offset: int, size: int) -> None:
        """Ask the kernel to fetch these bytes, without waiting for them."""
        try:  # noqa: SIM105  (contextlib.suppress costs as much as the call)
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        except OSError:  # advice alone: some file systems take none
            pass

    def has_changed(self) -> bool:
        """Whether size or time are not as they should be."""
        return self._now() != self.stamp

    def accept_change(self) -> None:
        """Take the file as it is now: its content was compared."""
        self.stamp = self._now()

    def require_size(self) -> None:
        """Raise ValueError if the file has another size than it should."""
        size = self._now()[0]
        if size != self.stamp[0]:
            raise ValueError(
                f"{self.path} has {size:,} bytes but had {self.stamp[0]:,}: it was cut or replaced while "
                "it was read; restore it, then start again"
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
