"""Write one-dimensional `.npy` files, block by block, whose bytes depend on nothing but their content.

`numpy.save` pads its header differently from version to version, which would change the hashes in a
manifest. Format 1.0: 8 bytes magic, 2 bytes header length, the header, padded so that data starts at
byte 128; then the elements, little-endian.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x93NUMPY\x01\x00"
DATA_OFFSET = 128  # room for any length, so that the header can be written last


class NpyWriter:
    """One file of one dtype, of a length that is known in the end.

    Args:
        path: file to write.
        dtype: numpy code with byte order, such as `<i8`.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = dtype
        self.size = 0
        self._stream: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115
        self._stream.seek(DATA_OFFSET)

    def append(self, block: NDArray[np.integer]) -> None:
        """Add elements: integers [n] that fit the dtype. OSError names the file if it cannot grow."""
        left = memoryview(np.ascontiguousarray(block, dtype=self.dtype)).cast("B")
        try:
            while left:  # one call may write less than all of a large block
                left = left[self._stream.write(left) :]
        except OSError as error:
            remedy = "make room or choose another output"
            raise OSError(error.errno, f"{error.strerror}: {remedy}", str(self.path)) from error
        self.size += block.size

    def close(self) -> None:
        """Write the header and close; the file is whole after this."""
        with self._stream:
            text = f"{{'descr': '{self.dtype}', 'fortran_order': False, 'shape': ({self.size},), }}"
            room = DATA_OFFSET - len(MAGIC) - 2
            header = text.ljust(room - 1) + "\n"
            assert len(header) == room
            self._stream.seek(0)
            self._stream.write(MAGIC + room.to_bytes(2, "little") + header.encode("latin-1"))
            if self.size == 0:
                self._stream.truncate(DATA_OFFSET)

    def abort(self) -> None:
        """Close the unfinished file without an error."""
        self._stream.close()


def write_npy(path: Path, array: NDArray[np.integer], dtype: str) -> None:
    """Write a whole array: integers [n]."""
    writer = NpyWriter(path, dtype)
    try:
        writer.append(array)
        writer.close()
    finally:
        writer.abort()
