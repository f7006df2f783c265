"""sha256 of many files, each rank its share, in step.

A checkpoint of an 8B model with optimizer is about 110 GB (14 bytes a parameter), minutes for one thread.
While threads hash, the ranks meet twice a second to add up their progress: the bar of rank 0 shows all of
them, and no rank waits in a collective for longer than its time limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_exact.command_line import describe, progress_bar
from megatron_exact.files import sha256_file

MEETING_SECONDS = 0.5
MOST_THREADS = 8
UNREADABLE = "unreadable: "
"""In the place of a hash: the reason follows."""


def share_out(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Names for each rank, largest files first, each to the rank with the fewest bytes so far.

    Args:
        sizes: name -> bytes; the same on all ranks.
        num_ranks: size of the world.
    """
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += sizes[name] + 1
    return shares


def hash_together(mine: Sequence[Path], description: str) -> dict[str, str]:
    """Hash files on all ranks; called by every rank, each with its own share.

    Args:
        mine: the files of this rank.
        description: of the bar that rank 0 shows on a terminal.

    Returns:
        File name -> sha256, or UNREADABLE and the reason, of all ranks' files, on every rank.
    """
    done = _Progress()
    total = int(_sum_over_ranks(sum(size_of(path) for path in mine), 0)[0])
    is_shown = torch.distributed.get_rank() == 0
    with (
        ThreadPoolExecutor(max_workers=_num_threads()) as pool,
        progress_bar(description, total if is_shown else None, "B") as bar,
    ):
        jobs = [pool.submit(_hash, path, done.add) for path in mine]
        wait = 0.01
        while True:
            unfinished = sum(not job.done() for job in jobs)
            hashed, open_everywhere = _sum_over_ranks(done.num_bytes, unfinished)
            if is_shown:
                bar.update(hashed - bar.n)
            if not open_everywhere:
                break
            time.sleep(wait)
            wait = min(2 * wait, MEETING_SECONDS)
        results = {path.name: job.result() for path, job in zip(mine, jobs, strict=True)}
    return {name: digest for part in gather(results) for name, digest in part.items()}


class _Progress:
    """Bytes hashed by the threads of this rank."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes  # a lost update would only falsify the bar for a moment


def _hash(path: Path, on_bytes: Callable[[int], object]) -> str:
    try:
        return sha256_file(path, on_bytes)
    except OSError as error:
        return UNREADABLE + describe(error)


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if it is gone."""
    return path.stat().st_size if path.is_file() else 0


def _num_threads() -> int:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // local_ranks))


def _sum_over_ranks(*numbers: int) -> list[int]:
    total = torch.tensor(numbers, dtype=torch.int64, device="cuda")  # the CPU runtime answers on the CPU
    torch.distributed.all_reduce(total)
    return [int(number) for number in total.tolist()]


def gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
