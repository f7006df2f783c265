"""All ranks hash together and agree, whatever is wrong with the files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.files import sha256_file
from megatron_exact.integrity import content_digest, read_integrity, write_integrity
from megatron_exact.training.checkpoint_integrity import (
    empty_folder,
    seal_together,
    settle_start,
)
from megatron_exact.training.checkpoint_start import Start, choose_start
from megatron_exact.training.job_endings import AgreedError
from tests.distributed import ranks

WORLD = 2


def write_checkpoint(folder: Path, iteration: int) -> Path:
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(b"index")
    (path / "metadata.json").write_text("{}")
    for rank in range(3):
        (path / f"__{rank}_0.distcp").write_bytes(bytes([rank, iteration]) * (1000 + rank))
    write_integrity(path, {file.name: sha256_file(file) for file in path.iterdir()})
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


def on_ranks(function: Callable[[], Any], folder: Path) -> list[Any]:
    """What `function` returns on each rank of a gloo group, as JSON."""

    def job() -> None:
        torch.distributed.init_process_group("gloo")
        result = function()
        (folder / f"result{torch.distributed.get_rank()}.json").write_text(json.dumps(result))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    ranks.run_ranks(WORLD, job, folder).check()
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(WORLD)]


def settled(run: Path, *, is_checked: bool = True) -> dict[str, Any]:
    try:
        start, identity = settle_start(choose_start(str(run), str(run)), is_checked=is_checked)
    except AgreedError as error:
        return {"error": str(error)}
    return {"iteration": start.iteration, "message": start.message, "identity": identity}


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def put_in_place(path: Path, make: Callable[[Path], object]) -> None:
    """Something else than the file that was saved, under its name."""
    path.rename(path.parent.parent / "elsewhere")
    make(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "flipped": (
        lambda path: flip_last_byte(path / "__1_0.distcp"),
        "is damaged: the sha256 of __1_0.distcp differs",
    ),
    "truncated": (
        lambda path: truncate(path / "__2_0.distcp"),
        "is damaged: the sha256 of __2_0.distcp differs",
    ),
    "index": (
        lambda path: flip_last_byte(path / ".metadata"),
        "is damaged: the sha256 of .metadata differs",
    ),
    "missing": (lambda path: (path / "__0_0.distcp").unlink(), "lacks __0_0.distcp"),
    "unsealed": (lambda path: (path / "integrity.json").unlink(), "lacks integrity.json"),
    "garbage": (lambda path: (path / "integrity.json").write_text("{"), "has a damaged integrity.json"),
    "outside": (
        lambda path: write_integrity(path, {"../iter_0000002/.metadata": "0" * 64}),
        "has a damaged integrity.json",
    ),
    "extra": (
        lambda path: (path / "__9_0.distcp").write_bytes(b"not listed"),
        "contains __9_0.distcp, which its integrity.json does not list",
    ),
    "unlisted": (
        lambda path: write_integrity(path, {".metadata": sha256_file(path / ".metadata")}),
        "contains __0_0.distcp, which its integrity.json does not list",
    ),
    "left by NFS": (lambda path: (path / ".nfs0000001").write_bytes(b"not listed"), None),
    "link": (
        lambda path: put_in_place(path / "__1_0.distcp", lambda there: there.symlink_to("../elsewhere")),
        "contains __1_0.distcp, which is a link",
    ),
    "fifo": (
        lambda path: put_in_place(path / "__1_0.distcp", os.mkfifo),
        "contains __1_0.distcp, which is a FIFO",
    ),
    "folder": (
        lambda path: put_in_place(path / "__1_0.distcp", os.mkdir),
        "contains __1_0.distcp, which is a folder",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_all_ranks_take_the_same_checkpoint(damage: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    two, four = write_checkpoint(run, 2), write_checkpoint(run, 4)
    harm, words = DAMAGE[damage]
    harm(four)
    results = on_ranks(lambda: settled(run), tmp_path)
    assert results[0] == results[1]
    chosen = four if words is None else two
    assert results[0]["iteration"] == int(chosen.name[5:])
    assert (f"not taken: iter_0000004 {words}" if words else "resuming") in results[0]["message"]
    files = {file.name: sha256_file(file) for file in two.iterdir() if file.name != "integrity.json"}
    if words is not None:
        identity = {"path": str(two), "iteration": 2, "sha256": content_digest(files), "verified": True}
        identity["run"] = None  # these files were not made by a run
        assert results[0]["identity"] == identity


def test_faults_of_every_checkpoint_are_named_when_none_is_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    two, three, four = (write_checkpoint(run, iteration) for iteration in (2, 3, 4))
    flip_last_byte(four / "__0_0.distcp")
    (three / "integrity.json").unlink()
    truncate(two / "metadata.json")
    for result in on_ranks(lambda: settled(run), tmp_path):
        assert "iter_0000004 is damaged: the sha256 of __0_0.distcp differs" in result["error"]
        assert "; iter_0000003 lacks integrity.json; " in result["error"]
        assert "; iter_0000002 is damaged: the sha256 of metadata.json differs" in result["error"]
        assert "megatron-exact seal-checkpoint" in result["error"]


def test_without_the_check_nothing_is_hashed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flip_last_byte(write_checkpoint(run, 2) / "__0_0.distcp")
    results = on_ranks(lambda: settled(run, is_checked=False), tmp_path)
    assert [result["iteration"] for result in results] == [2, 2]
    assert results[0]["identity"]["verified"] is False


def test_ranks_that_see_different_folders_are_told_apart(tmp_path: Path) -> None:
    """As on two nodes without a shared file system."""
    write_checkpoint(tmp_path / "run", 2)

    def here() -> dict[str, Any]:
        if torch.distributed.get_rank() == 0:
            return settled(tmp_path / "run")
        fresh = Start(
            load=None, checkpoint=None, iteration=None, is_resume=False, weights_only=False, message=""
        )
        with pytest.raises(AgreedError) as refused:
            settle_start(fresh, is_checked=True)
        return {"error": str(refused.value)}

    for result in on_ranks(here, tmp_path):
        assert "rank 1 would load nothing, rank 0 " in result["error"]
        assert "shared file system" in result["error"]


def test_each_rank_seals_what_it_wrote(tmp_path: Path) -> None:
    """Also after a save that was cut off on more ranks."""
    folder = write_checkpoint(tmp_path / "run", 2)

    def save() -> bool:
        rank = torch.distributed.get_rank()
        if rank == 0:
            empty_folder(folder)
        torch.distributed.barrier()
        (folder / f"__{rank}_0.distcp").write_bytes(b"of rank %d" % rank)
        if rank == 0:
            (folder / ".metadata").write_bytes(b"new index")
            (folder / "metadata.json").write_text("{}")
        torch.distributed.barrier()
        seal_together(folder)
        return True

    on_ranks(save, tmp_path)
    there = {file.name: sha256_file(file) for file in folder.iterdir() if file.name != "integrity.json"}
    assert sorted(there) == [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]
    assert read_integrity(folder) == there


def test_a_list_that_cannot_be_written_stops_all_ranks(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", 2)
    (folder / "integrity.json").unlink()

    def save() -> str:
        from megatron_exact.training import checkpoint_integrity

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device", "integrity.json")

        checkpoint_integrity.write_integrity = fail
        with pytest.raises(AgreedError) as refused:
            seal_together(folder)
        return str(refused.value)

    for message in on_ranks(save, tmp_path):
        assert "integrity.json: No space left on device" in message
    assert not (folder / "integrity.json").exists()
