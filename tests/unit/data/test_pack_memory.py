"""Packing holds the lengths and two numbers a document, not the plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_exact.data.indexed_format import CODE_OF_DTYPE, HEADER, MAGIC, VERSION
from megatron_exact.data.manifest import POLICIES

ROOT = Path(__file__).parents[3]
FEW, MANY = 1_000_000, 4_000_000  # few enough is many blocks already
BYTES_A_DOCUMENT = 20  # lengths 4, choice 4, order of pieces 4, held-out marks 2, and room to spare
MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:  # not getrusage: its peak is that of the parent at the start
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(int(status["VmHWM"].split()[0]) * 1024)
"""


def write_sparse_corpus(prefix: Path, documents: int) -> None:
    """An index of heavy-tailed lengths over a `.bin` that is a hole: packing never reads tokens."""
    lengths = np.random.default_rng(0).lognormal(np.log(900), 1.4, documents)
    lengths = np.clip(lengths, 1, 1 << 20).astype(np.int32)
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * 2
    with open(prefix.with_suffix(".idx"), "wb") as stream:
        code = CODE_OF_DTYPE[np.dtype(np.uint16)]
        stream.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        stream.write(lengths.tobytes() + offsets.tobytes())
        stream.write(np.arange(documents + 1, dtype=np.int64).tobytes())
    with open(prefix.with_suffix(".bin"), "wb") as stream:
        stream.truncate(2 * int(lengths.sum(dtype=np.int64)))


def peak_bytes(*arguments: str | Path) -> int:
    """Peak resident memory of `pack_corpus.py` with these arguments, in bytes."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(ROOT / "tools" / "pack_corpus.py")]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_grows_by_a_few_bytes_a_document(tmp_path: Path, policy: str) -> None:
    peaks = []
    for documents in (FEW, MANY):
        prefix = tmp_path / f"c{documents}"
        write_sparse_corpus(prefix, documents)
        options = f"--row-tokens 16K --policy {policy} --validation-fraction 0.01 --seed 1".split()
        peaks.append(peak_bytes("--source", prefix, *options, "--output", tmp_path / f"p{documents}"))
    growth = (peaks[1] - peaks[0]) / (MANY - FEW)
    assert 4 < growth < BYTES_A_DOCUMENT  # below 4 it would not even hold the lengths
