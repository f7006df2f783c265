"""The start that all ranks agree on, its files hashed by all of them together.

The choice by names and sizes was made by every rank for itself; on a file system that is not shared, or
that shows its nodes different states, they differ. What rank 0 chose is compared, then verified against
integrity.json; where contents are damaged, all ranks alike go back to the next older checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_exact.command_line import describe, one_line
from megatron_exact.integrity import content_digest, read_integrity, unlisted_files
from megatron_exact.training.checkpoints.hashing import (
    UNREADABLE,
    from_rank_0,
    gather,
    hash_together,
    share_out,
)
from megatron_exact.training.checkpoints.start import Start
from megatron_exact.training.run_record import read_run_record


class AgreedError(ValueError):
    """An error that every rank raises alike, so that one of them has to tell it."""


def settle_start(start: Start, *, is_checked: bool) -> tuple[Start, dict[str, Any] | None]:
    """The start of all ranks, verified; called by every rank once the process group stands.

    Args:
        start: what this rank chose by names and sizes.
        is_checked: whether contents are hashed (False: `--skip-integrity-check`).

    Returns:
        The start, and its identity for run.json: {"path", "iteration", "sha256", "verified", "run"}, None
        for a fresh start. The path is for humans; `run` is the run.json of the run that made it, if any, so
        that a pair can be followed back over several stages.

    Raises:
        AgreedError: ranks that see different folders, or no intact checkpoint.
    """
    _require_one_view(start)
    start = from_rank_0(start)
    if start.checkpoint is None:
        return start, None
    while is_checked:
        assert start.checkpoint is not None
        fault = verify_together(start.checkpoint)
        if fault is None:
            break
        try:
            start = start.fall_back(fault)
        except ValueError as error:
            raise AgreedError(str(error)) from None
        say(start.message)
    if not is_checked:
        say(f"--skip-integrity-check: the contents of {start.checkpoint} are not verified")
    return start, from_rank_0(_identity(start, is_checked))


def verify_together(checkpoint: Path) -> str | None:
    """Hash a checkpoint on all ranks and compare with its integrity.json.

    Args:
        checkpoint: folder of one iteration.

    Returns:
        The first fault, to follow the checkpoint's name; None if every listed file is as it was written.
    """
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    listed, sizes, unlisted = from_rank_0(_listing(checkpoint) if rank == 0 else None)
    if listed is None:
        return "has no readable integrity.json"
    began = time.monotonic()
    mine = [checkpoint / name for name in share_out(sizes, world)[rank]]
    found = hash_together(mine, f"verify {checkpoint.name}")
    for name, expected in listed.items():
        digest = found.get(name, UNREADABLE + "missing")
        if digest.startswith(UNREADABLE):
            return f"has no readable {name} ({digest.removeprefix(UNREADABLE)})"
        if digest != expected:
            return f"is damaged: the sha256 of {name} differs from integrity.json"
    if unlisted:
        return f"holds {unlisted[0]}, which its integrity.json does not list: remove it"
    total = sum(sizes.values())
    say(
        f"{checkpoint.name} is intact: {len(listed)} files, {total / 1e9:,.3f} GB, verified by {world} "
        f"rank{'s' if world > 1 else ''} in {time.monotonic() - began:.1f} s"
    )
    return None


def _listing(checkpoint: Path) -> tuple[dict[str, str] | None, dict[str, int], list[str]]:
    """Hashes of integrity.json, sizes of the files that are there, and files that it does not list."""
    try:
        listed = read_integrity(checkpoint)
        if listed is None:
            return None, {}, []
        sizes = {
            name: (checkpoint / name).stat().st_size for name in listed if (checkpoint / name).is_file()
        }
        return listed, sizes, unlisted_files(checkpoint, listed)
    except (ValueError, OSError):
        return None, {}, []


def _identity(start: Start, is_checked: bool) -> dict[str, Any]:
    assert start.checkpoint is not None
    try:
        files = read_integrity(start.checkpoint)
    except ValueError:
        files = None
    return {
        "path": str(start.checkpoint),
        "iteration": start.iteration,
        "sha256": content_digest(files) if files is not None else None,
        "verified": is_checked,
        "run": read_run_record(start.load) if start.load is not None else None,
    }


def _require_one_view(start: Start) -> None:
    views = gather((str(start.load), start.is_resume, start.weights_only))
    other = next((rank for rank, view in enumerate(views) if view != views[0]), None)
    if other is not None:
        raise AgreedError(
            f"rank {other} would load {_in_words(views[other])}, rank 0 {_in_words(views[0])}: every node "
            "has to see the same checkpoints; put --load and --save on a shared file system"
        )


def _in_words(view: tuple[str, bool, bool]) -> str:
    return "nothing" if view[0] == "None" else view[0]


def on_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank, or its error on every rank; nobody goes ahead of it.

    Raises:
        AgreedError: it raised an OSError or ValueError.
    """
    result: tuple[Any, str | None] = (None, None)
    if torch.distributed.get_rank() == 0:
        try:
            result = (work(), None)
        except (OSError, ValueError) as error:
            result = (None, describe(error))
    value, fault = from_rank_0(result)
    if fault is not None:
        raise AgreedError(fault)
    return value


def say(message: str) -> None:
    """A line for the log, from rank 0."""
    if torch.distributed.get_rank() == 0:
        print(f"megatron_exact: {one_line(message)}", flush=True)
