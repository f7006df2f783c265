"""The full check of an index: what it reads, what it costs. What it finds stands in `test_indexed`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_corpora import random_documents, write_corpus

from megatron_exact.data.indexed import HEADER, MAGIC, VERSION, IndexedTokens
from megatron_exact.files import sha256_file


def test_it_reads_every_byte_once_and_hashes_it(tmp_path: Path) -> None:
    corpus = IndexedTokens(write_corpus(tmp_path / "a", random_documents([3, 1, 7] * 1000)))
    steps: list[int] = []
    assert corpus.check(steps.append) == sha256_file(corpus.idx_path)
    assert sum(steps) == corpus.idx_bytes == (tmp_path / "a.idx").stat().st_size


def test_an_index_that_changes_after_opening_is_noticed(tmp_path: Path) -> None:
    corpus = IndexedTokens(write_corpus(tmp_path / "a", random_documents([3, 1, 7])))
    os.truncate(tmp_path / "a.idx", corpus.idx_bytes - 1)
    with pytest.raises(ValueError, match="changed while it was read"):
        corpus.check()


ACT = """
import re, sys
from megatron_exact.data.indexed import IndexedTokens
corpus = IndexedTokens(sys.argv[1])
if sys.argv[2] == "check":
    corpus.check()
if sys.argv[2] == "copy":
    kept = open(corpus.idx_path, "rb").read()
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_it_takes_little_memory(tmp_path: Path) -> None:
    """The index is 40 MB; a process that checks it peaks little above one that only opens it."""
    documents = 2_000_000
    with open(tmp_path / "a.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        stream.write(np.full(documents, 3, dtype="<i4").tobytes())
        stream.write((6 * np.arange(documents)).tobytes())
        stream.write(np.arange(documents + 1).tobytes())
    with open(tmp_path / "a.bin", "wb") as stream:
        stream.truncate(6 * documents)

    def peak_kib(action: str) -> int:
        words = [sys.executable, "-c", ACT, str(tmp_path / "a"), action]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    opened = peak_kib("open")
    assert peak_kib("check") - opened < 24 * 1024
    assert peak_kib("copy") - opened > 36 * 1024  # the measure sees what it should
