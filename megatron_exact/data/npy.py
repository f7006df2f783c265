"""Write one-dimensional `.npy` files whose bytes depend on nothing but their content.

`numpy.save` pads its header differently from version to version, which would change the hashes in a
manifest. Format 1.0: 8 bytes magic, 2 bytes header length, the header, padded so that data starts at a
multiple of 64 bytes; then the elements, little-endian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x93NUMPY\x01\x00"
ALIGNMENT = 64
BLOCK_BYTES = 16 << 20


def write_npy(path: Path, array: NDArray[np.integer], dtype: str) -> str:
    """Write a one-dimensional array.

    Args:
        path: file to write.
        array: [n].
        dtype: numpy code with byte order, such as `<i8`.

    Returns:
        Hex sha256 of the file.
    """
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({array.size},), }}"
    unpadded = len(MAGIC) + 2 + len(text) + 1
    header = (text + " " * (-unpadded % ALIGNMENT) + "\n").encode("latin-1")
    block = BLOCK_BYTES // np.dtype(dtype).itemsize
    digest = hashlib.sha256()
    with open(path, "wb") as stream:
        for piece in _pieces(MAGIC + len(header).to_bytes(2, "little") + header, array, dtype, block):
            digest.update(piece)
            stream.write(piece)
    return digest.hexdigest()


def _pieces(head: bytes, array: NDArray[np.integer], dtype: str, block: int) -> Iterator[bytes]:
    yield head
    for start in range(0, array.size, block):
        yield array[start : start + block].astype(dtype, copy=False).tobytes()
