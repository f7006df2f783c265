"""Packing holds a few numbers a document, not the plan: how many bytes depends on its options."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_exact.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION

ROOT = Path(__file__).parents[3]
FEW, MANY = 2_200_000, 5_000_000  # few is enough for a scratch file, see `scratch_array`


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
    """Peak of the anonymous memory of `pack_corpus.py` with these arguments, in bytes.

    Sampled from outside. The kernel's own peak (`VmHWM`) also counts pages of the index, 20 bytes a
    document, which stay or go as the kernel likes.
    """
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "pack_corpus.py"), *map(str, arguments)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            held = re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.MULTILINE)
            if held is not None:  # a process that has just ended has no memory
                peak = max(peak, int(held[1]) * 1024)
            time.sleep(0.002)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    return peak


@pytest.mark.parametrize(
    ("policy", "fraction", "weights", "most"),
    [
        ("concat", "0.01", ("",), 10),
        ("best-fit", "0.01", ("",), 12),
        pytest.param("concat", "0", ("",), 10, marks=pytest.mark.slow),
        pytest.param("best-fit", "0", ("",), 12, marks=pytest.mark.slow),
        pytest.param("concat", "0.01", ("1:", "1:"), 22, marks=pytest.mark.slow),
        pytest.param("best-fit", "0.01", ("1:", "1:"), 22, marks=pytest.mark.slow),
    ],
)
def test_memory_grows_by_a_few_bytes_a_document(
    tmp_path: Path, policy: str, fraction: str, weights: tuple[str, ...], most: float
) -> None:
    """Lengths take two bytes a document, temporaries the rest; the choice of a blend takes more.

    Seen are 5 to 8 bytes (concat) and 5 to 9 (best-fit): samples meet more or fewer of the temporaries.
    Pieces in memory, 4 bytes each, exceed the bound of best-fit.
    """
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
    assert growth < most
