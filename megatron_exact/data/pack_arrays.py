"""The arrays of a pack: their files, opened, written and compared with the hashes in the manifest.

Each split has one `.npy` file for each entry of ARRAY_DTYPES: `row_offsets` [rows + 1] says which segments
fill a row, and the others [segments] say which tokens of which document a segment is.

The bytes of these files depend on their content alone. `numpy.save` pads its header differently from
version to version, which would change the hashes in a manifest, so `NpyWriter` writes format 1.0 itself:
8 bytes magic, 2 bytes header length, the header, padded so that data starts at byte 128; then the
elements, little-endian.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.manifest import FIRST_TARGET, Manifest, Split, read_manifest
from megatron_exact.files import sha256_file

ARRAY_DTYPES = {
    "row_offsets": "<i8",
    "segment_source": "<u2",
    "segment_document": "<i8",
    "segment_start": "<i8",
    "segment_tokens": "<i4",
}
FIRST_TARGET_DTYPE = "<i4"
MAGIC = b"\x93NUMPY\x01\x00"
DATA_OFFSET = 128  # room for any length, so that the header can be written last


class NpyWriter:
    """Writer of a `.npy` file whose length is known only at its end.

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
        """Append integers [n] that fit the dtype.

        Raises:
            OSError: the file cannot grow; names it.
        """
        left = memoryview(np.ascontiguousarray(block, dtype=self.dtype)).cast("B")
        try:
            while left:  # one call may write less than all of a large block
                left = left[self._stream.write(left) :]
        except OSError as error:
            remedy = "make room or choose another output"
            raise OSError(error.errno, f"{error.strerror}: {remedy}", str(self.path)) from error
        self.size += block.size

    def close(self) -> None:
        """Write the header and close; only now is the file valid."""
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
    """Write an array of integers [n] as one file."""
    writer = NpyWriter(path, dtype)
    try:
        writer.append(array)
        writer.close()
    finally:
        writer.abort()


def open_arrays(split_dir: Path, split: Split) -> dict[str, NDArray[np.integer]]:
    """Map the arrays of one split, checked for dtype and shape.

    Raises:
        ValueError: an array is missing, damaged or of another shape than the manifest says.
    """
    arrays = {}
    for name, dtype in array_dtypes(split).items():
        path = split_dir / f"{name}.npy"
        expected = (split.rows + 1 if name == "row_offsets" else split.segments,)
        try:
            # A file without elements cannot be mapped
            array = np.load(path, mmap_mode="r" if expected[0] else None, allow_pickle=False)
        except (OSError, ValueError, EOFError, OverflowError) as error:  # the last: 2^60 elements
            raise ValueError(
                f"{path} cannot be read ({error}): copy the pack again or pack again"
            ) from error
        if array.dtype != np.dtype(dtype) or array.shape != expected:
            raise ValueError(
                f"{path} contains {array.dtype} {array.shape} where {np.dtype(dtype)} {expected} is "
                "expected: copy the pack again or pack again"
            )
        arrays[name] = array.view(np.ndarray)  # slicing a memmap takes ten times as long
    return arrays


def array_dtypes(split: Split) -> dict[str, str]:
    """Return the dtypes of the arrays of a split by name."""
    if f"{FIRST_TARGET}.npy" not in split.arrays:
        return ARRAY_DTYPES
    return {**ARRAY_DTYPES, FIRST_TARGET: FIRST_TARGET_DTYPE}


def verify_arrays(pack_dir: str | Path, manifest: Manifest | None = None) -> int:
    """Hash every array of a pack and compare with its manifest; a training job does this once.

    Returns:
        Bytes read.

    Raises:
        ValueError: a missing, unexpected or damaged array.
    """
    manifest = manifest or read_manifest(pack_dir)
    return sum(verify_split_arrays(pack_dir, name, split) for name, split in manifest.splits.items())


def verify_split_arrays(pack_dir: str | Path, name: str, split: Split) -> int:
    """Hash every array of one split and return the bytes read, see `verify_arrays`."""
    expected = sorted(f"{array}.npy" for array in array_dtypes(split))
    if sorted(split.arrays) != expected:
        raise ValueError(
            f"the manifest of {pack_dir} lists arrays {sorted(split.arrays)}, not {expected}: pack again"
        )
    total = 0
    for file, sha256 in split.arrays.items():
        path = Path(pack_dir) / name / file
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy the pack again or pack again")
        found = sha256_file(path)
        if found != sha256:
            raise ValueError(
                f"{path} has sha256 {found[:16]}... but the manifest says {sha256[:16]}...: "
                "the array is damaged, copy the pack again or pack again"
            )
        total += path.stat().st_size
    return total
