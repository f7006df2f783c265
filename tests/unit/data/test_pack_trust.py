"""Packing under bad conditions: killed at any moment, a full disk, two writers, readers beside a writer."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_corpora import heavy_tailed_lengths, write_corpus

from megatron_exact.data import pack
from megatron_exact.data.manifest import POLICIES, read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.pack_arrays import NpyWriter, verify_arrays
from megatron_exact.data.rows import RowReader
from megatron_exact.data.verify_pack import verify_pack

pytestmark = pytest.mark.filterwarnings("ignore:no source has a corpus record")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Large enough that packing it writes for a while."""
    lengths = np.minimum(heavy_tailed_lengths(60_000, seed=3), 200)
    return write_corpus(tmp_path / "c", [[1] * int(length) for length in lengths])


def command(corpus: str, output: Path, policy: str = "best-fit") -> list[str]:
    options = f"--row-tokens 512 --policy {policy} --validation-fraction 0.1 --seed 1".split()
    tool = str(ROOT / "tools" / "pack_corpus.py")
    return [sys.executable, tool, "--source", corpus, *options, "--output", str(output)]


def test_killed_at_any_moment(tmp_path: Path, corpus: str) -> None:
    """Whenever the kill comes there is a whole pack or none, and the next run leaves no trace of it."""
    output = tmp_path / "out" / "pack"
    started = time.monotonic()
    subprocess.run(command(corpus, tmp_path / "out" / "whole"), check=True, capture_output=True)
    duration = time.monotonic() - started
    expected = read_manifest(tmp_path / "out" / "whole").fingerprint
    unfinished = 0
    for share in np.linspace(0.3, 1.0, 8):
        child = subprocess.Popen(
            command(corpus, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(share * duration)
        child.send_signal(signal.SIGKILL)
        child.wait()
        if output.exists():
            assert read_manifest(output).fingerprint == expected
            verify_arrays(output)
            break
        unfinished += 1
    assert unfinished >= 2
    if not output.exists():
        subprocess.run(command(corpus, output), check=True, capture_output=True)
    assert read_manifest(output).fingerprint == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pack", "whole"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_disk(tmp_path: Path, corpus: str, policy: str) -> None:
    """The kernel refuses to let files grow: one line that names the file, and nothing is left."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        command(corpus, tmp_path / "out" / "pack", policy),
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
    )
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "File too large" in error
    assert "segment_" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calls", [1, 5, 12])
def test_no_space_left_at_any_write(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    append = NpyWriter.append
    left = [calls]

    def fill_up(self: NpyWriter, block: np.ndarray) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        append(self, block)

    monkeypatch.setattr(NpyWriter, "append", fill_up)
    options = PackOptions(row_tokens=512, policy="concat", seed=1, validation_fraction=0.1)
    with pytest.raises(OSError, match="No space left"):
        pack_corpora([corpus], tmp_path / "pack", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_two_writers_and_a_reader(tmp_path: Path, corpus: str) -> None:
    """One of two writers of a folder wins, the other says why not; a reader never sees half a pack."""
    output = tmp_path / "pack"
    writers = [
        subprocess.Popen(command(corpus, output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    while any(writer.poll() is None for writer in writers):
        if output.exists():
            reader = RowReader(output, "train")
            assert len(reader) == reader.manifest.splits["train"].rows
            reader.read(len(reader) - 1)
        time.sleep(0.005)
    errors = [writer.communicate()[1].decode() for writer in writers]
    assert sorted(writer.returncode for writer in writers) == [0, 1]
    refused = errors[[writer.returncode for writer in writers].index(1)]
    # by when the other one is looked for: before, while or after it writes
    reasons = ("exists already", "created by someone else meanwhile", "the lease of a job that died")
    assert any(reason in refused for reason in reasons), refused
    assert [check.name for check in verify_pack(output) if not check.passed] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "pack"]


def test_a_finished_pack_is_never_replaced(tmp_path: Path, corpus: str) -> None:
    output = tmp_path / "pack"
    subprocess.run(command(corpus, output), check=True, capture_output=True)
    reader = RowReader(output, "train")
    before = (output / "manifest.json").stat().st_mtime_ns
    again = subprocess.run(command(corpus, output, "concat"), capture_output=True, text=True)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert (output / "manifest.json").stat().st_mtime_ns == before
    reader.read(0)


@pytest.mark.parametrize("policy", POLICIES)
def test_room_is_looked_for_before_rows_are_written(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """What a pack is said to need is what it takes: one byte less is an error, and nothing is written."""
    options = PackOptions(row_tokens=64, policy=policy, seed=1)
    monkeypatch.setattr(pack, "SCRATCH_BYTES", 1)
    pack_corpora([corpus], tmp_path / "whole", options)
    train = read_manifest(tmp_path / "whole").splits["train"]
    headers = 128
    written = sum(path.stat().st_size - headers for path in (tmp_path / "whole" / "train").glob("*.npy"))

    def pack_with(free: int) -> None:
        monkeypatch.setattr(pack, "free_bytes", lambda folder: free)
        pack_corpora([corpus], tmp_path / "out" / "pack", options)

    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes.*has 0 free.*give --output") as error:
        pack_with(0)
    numbers = re.findall(r"([\d,]+) bytes and ([\d,]+) for a while", str(error.value))[0]
    arrays, scratch = (int(number.replace(",", "")) for number in numbers)
    if policy == "concat":  # segments of cut documents are counted only when rows are written
        assert 0.5 * written < arrays <= written
        assert scratch == 0
    else:
        assert arrays == written
        assert scratch >= train.segments
    with pytest.raises(ValueError, match="needs"):
        pack_with(arrays + scratch - 1)
    assert not (tmp_path / "out").exists()
    pack_with(arrays + scratch)
