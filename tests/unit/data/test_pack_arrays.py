"""Our `.npy` bytes are fixed, and numpy reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_exact.data.pack_arrays import ARRAY_DTYPES, NpyWriter, write_npy


@pytest.mark.parametrize("dtype", sorted(set(ARRAY_DTYPES.values())))
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_numpy_reads_it(tmp_path: Path, dtype: str, size: int) -> None:
    array = np.arange(size, dtype=np.int64) * 7
    path = tmp_path / "a.npy"
    writer = NpyWriter(path, dtype)
    for first in range(0, size, 300):
        writer.append(array[first : first + 300])
    writer.close()
    loaded = np.load(path, allow_pickle=False)
    assert loaded.dtype == np.dtype(dtype)
    assert (loaded == array.astype(dtype)).all()
    assert path.stat().st_size - size * loaded.itemsize == 128


def test_bytes_are_frozen(tmp_path: Path) -> None:
    write_npy(tmp_path / "a.npy", np.array([1, 258]), "<i4")
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }"
    expected = b"\x93NUMPY\x01\x00v\x00" + header.ljust(117) + b"\n" + b"\x01\0\0\0\x02\x01\0\0"
    assert (tmp_path / "a.npy").read_bytes() == expected
