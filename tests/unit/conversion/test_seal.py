"""Sealing an old checkpoint, and what must not be sealed."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.seal import seal_checkpoints
from megatron_exact.integrity import Belonging, check_integrity, read_seal
from tests import forked
from tests.unit.conversion.small_models import LLAMA, flip_bit, write_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An import without its integrity.json, as an old run would be."""
    import_hf(write_model(tmp_path / "hf", LLAMA), tmp_path / "c")
    (tmp_path / "c" / "release" / "integrity.json").unlink()
    return tmp_path / "c"


def run_tool(folder: Path) -> subprocess.CompletedProcess[str]:
    return forked.run_tool("seal_checkpoint.py", folder)


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
    assert "megatron-exact verify-checkpoint" in again.detail
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
    assert "contains no checkpoint" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_seal_says_what_it_is_and_that_it_knows_no_run(checkpoint: Path) -> None:
    (sealing,) = seal_checkpoints(checkpoint)
    assert sealing.is_sealed
    seal = read_seal(checkpoint / "release")
    assert seal is not None
    assert seal.belonging == Belonging(origin="sealed", iteration=0)


def as_iteration(checkpoint: Path, stored: int, name: str) -> Path:
    """The same tensors as a training would save them at an iteration, under a name."""
    import io
    import pickle

    import torch

    from megatron_exact.conversion.torch_dist_reader import load_metadata

    folder = checkpoint / name
    (checkpoint / "release").rename(folder)
    index = load_metadata(folder / ".metadata")
    place = next(place for place in index.storage_data if place.fqn.startswith("common_state"))
    record = io.BytesIO()
    torch.save([{"args": argparse.Namespace(lr=1e-3, dtype=torch.bfloat16), "iteration": stored}], record)
    shard = folder / index.storage_data[place].relative_path
    start = shard.stat().st_size
    with open(shard, "ab") as stream:
        stream.write(record.getvalue())
    info = index.storage_data[place]
    index.storage_data[place] = dataclasses.replace(info, offset=start, length=len(record.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_a_renamed_iteration_is_not_sealed(checkpoint: Path) -> None:
    folder = as_iteration(checkpoint, 3, "iter_0000005")
    (renamed,) = seal_checkpoints(checkpoint)
    assert not renamed.is_sealed
    assert renamed.detail == "was renamed: its state says iteration 3; give the folder its name back"
    folder.rename(checkpoint / "iter_0000003")
    (right,) = seal_checkpoints(checkpoint)
    assert right.is_sealed
    seal = read_seal(checkpoint / "iter_0000003")
    assert seal is not None
    assert seal.belonging == Belonging(origin="sealed", iteration=3)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_file_is_not_sealed(make: Callable[[Path], object], checkpoint: Path) -> None:
    make(checkpoint / "release" / "__1_0.distcp")
    (sealing,) = seal_checkpoints(checkpoint)
    assert not sealing.is_sealed
    assert sealing.detail.startswith("contains __1_0.distcp, which is a ")
    assert not (checkpoint / "release" / "integrity.json").exists()
