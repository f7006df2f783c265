"""Packing holds a few numbers a document, not the plan: how many bytes depends on its options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_exact.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION

ROOT = Path(__file__).parents[3]
FEW, MANY = 1_000_000, 4_000_000  # few enough is many blocks already
MARGIN = 4  # bytes a document: peaks of equal runs differ by up to 7 MB, seen over MANY - FEW documents
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
    """An index of heavy-tailed lengths over a `.bin` that is a hole, which packing reads once."""
    lengths = np.random.default_rng(0).lognormal(np.log(60), 1.4, documents)
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


@pytest.mark.parametrize(
    ("policy", "fraction", "weights", "measured"),
    [
        ("concat", "0.01", ("",), 11),
        ("best-fit", "0.01", ("",), 17),
        pytest.param("concat", "0", ("",), 11, marks=pytest.mark.slow),
        pytest.param("best-fit", "0", ("",), 12, marks=pytest.mark.slow),
        pytest.param("concat", "0.01", ("1:", "1:"), 16, marks=pytest.mark.slow),
        pytest.param("best-fit", "0.01", ("1:", "1:"), 17, marks=pytest.mark.slow),
    ],
)
def test_memory_grows_by_a_few_bytes_a_document(
    tmp_path: Path, policy: str, fraction: str, weights: tuple[str, ...], measured: float
) -> None:
    """Lengths, choice and order of pieces take 4 bytes a document each; README.md has the sums."""
    peaks = []
    for documents in (FEW, MANY):
        sources = []
        for number, weight in enumerate(weights):
            prefix = tmp_path / f"c{documents}-{number}"
            # One more document each: equal indices over equal holes would be one corpus under two names.
            write_sparse_corpus(prefix, documents // len(weights) + number)
            sources.append(f"{weight}{prefix}")
        options = f"--row-tokens 16K --policy {policy} --validation-fraction {fraction} --seed 1".split()
        output = tmp_path / f"p{documents}"
        peaks.append(peak_bytes("--source", *sources, *options, "--output", output))
    growth = (peaks[1] - peaks[0]) / (MANY - FEW)
    assert abs(growth - measured) < MARGIN
