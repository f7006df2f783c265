"""Sealing an old checkpoint, and what must not be sealed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.seal import seal_checkpoints
from megatron_exact.integrity import check_integrity
from tests.unit.conversion.small_models import LLAMA, flip_bit, write_model

TOOL = Path(__file__).resolve().parents[3] / "tools" / "seal_checkpoint.py"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An import without its integrity.json, as an old run would be."""
    import_hf(write_model(tmp_path / "hf", LLAMA), tmp_path / "c")
    (tmp_path / "c" / "release" / "integrity.json").unlink()
    return tmp_path / "c"


def run_tool(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, folder], capture_output=True, text=True)


def test_a_whole_checkpoint_is_sealed_once(checkpoint: Path) -> None:
    done = run_tool(checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("release: sealed: 3 files, ")
    sealed = (checkpoint / "release" / "integrity.json").read_bytes()
    results = check_integrity(checkpoint / "release") or []
    assert len(results) == 3
    assert all(fault is None for _, fault in results)
    flip_bit(checkpoint / "release" / "__0_0.distcp", 5000)
    (again,) = seal_checkpoints(checkpoint / "release")
    assert again.is_sealed
    assert "verify_checkpoint.py" in again.detail
    assert (checkpoint / "release" / "integrity.json").read_bytes() == sealed


def test_damage_is_not_sealed_in(checkpoint: Path) -> None:
    release = checkpoint / "release"
    shard = release / "__0_0.distcp"
    whole = shard.read_bytes()
    flip_bit(shard, len(whole) // 2)
    (flipped,) = seal_checkpoints(checkpoint)
    assert not flipped.is_sealed
    assert "is damaged" in flipped.detail
    shard.write_bytes(whole[:-1])
    (truncated,) = seal_checkpoints(checkpoint)
    assert not truncated.is_sealed
    shard.write_bytes(whole)
    index = release / ".metadata"
    index.write_bytes(index.read_bytes()[:-20])
    done = run_tool(checkpoint)
    assert done.returncode == 1
    assert "release: " in done.stdout
    assert "cannot be read" in done.stdout
    assert not (release / "integrity.json").exists()


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    done = run_tool(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "holds no checkpoint" in done.stderr
    assert len(done.stderr.splitlines()) == 1
