"""integrity.json of a checkpoint: hashed by all ranks together, written last, verified at the start.

A checkpoint of an 8B model with optimizer is about 110 GB (14 bytes a parameter), minutes for one thread,
so each rank hashes its share. While threads hash, the ranks meet twice a second to add up their progress:
the bar of rank 0 shows all of them, and no rank waits in a collective for longer than its time limit.

**At the start** every rank has chosen a checkpoint by names and sizes. On a file system that is not shared,
or that shows its nodes different states, the choices differ, so they are compared first. Then rank 0's
choice is verified against integrity.json; where contents are damaged, all ranks alike fall back to the next
older checkpoint.

**Every save** ends with integrity.json. Megatron's own `--verify-integrity` hashes the whole folder on rank
0, in one thread, while all ranks wait, and writes without fsync or rename. Here each rank hashes the files
that it wrote, while they are still in the memory of its node; with `--async-save` the process that wrote
them does, in the background. The order on disk is *.distcp (fsync), .metadata, metadata.json,
integrity.json (atomic), tracker. A folder that was cut off before its integrity.json does not count as a
checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_exact.command_line import describe, one_line, progress_bar
from megatron_exact.files import fsync_path, kind_of_file, sha256_file, write_json
from megatron_exact.integrity import (
    INTEGRITY_FILE,
    Belonging,
    Previous,
    content_digest,
    previous_of,
    read_integrity,
    unlisted_files,
    write_integrity,
)
from megatron_exact.json_input import read_json_object
from megatron_exact.training.checkpoint_start import TRACKER, Start
from megatron_exact.training.job_endings import AgreedError
from megatron_exact.training.run_record import read_run_record

MEETING_SECONDS = 0.5
MOST_THREADS = 8
UNREADABLE = "unreadable: "
"""Stands in place of a hash, followed by the reason."""


def share_out(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Share files out to ranks: largest first, each to the rank with the fewest bytes so far.

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
        description: label of the bar that rank 0 shows on a terminal.

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
    """Return the bytes of a file, 0 if it is gone."""
    return path.stat().st_size if path.is_file() else 0


def _num_threads() -> int:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // local_ranks))


def _sum_over_ranks(*numbers: int) -> list[int]:
    total = torch.tensor(numbers, dtype=torch.int64, device="cuda")  # the CPU runtime answers on the CPU
    torch.distributed.all_reduce(total)
    return [int(number) for number in total.tolist()]


def gather(value: Any) -> list[Any]:
    """Return the value of every rank, on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Return the value of rank 0, on every rank."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def settle_start(start: Start, *, is_checked: bool) -> tuple[Start, dict[str, Any] | None]:
    """Agree on one start and verify it; called by every rank once the process group exists.

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
        The first fault, in words that follow the checkpoint's name; None if every listed file is intact.
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
        return f"contains {unlisted[0]}, which its integrity.json does not list: remove it"
    total = sum(sizes.values())
    say(
        f"{checkpoint.name} is intact: {len(listed)} files, {total / 1e9:,.3f} GB, verified by {world} "
        f"rank{'s' if world > 1 else ''} in {time.monotonic() - began:.1f} s"
    )
    return None


def _listing(checkpoint: Path) -> tuple[dict[str, str] | None, dict[str, int], list[str]]:
    """Return the hashes of integrity.json, the sizes of the files, and the files that it does not list."""
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
    """Do `work` on rank 0 and return its result, or raise its error, on every rank.

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
    """Log a line from rank 0."""
    if torch.distributed.get_rank() == 0:
        print(f"megatron_exact: {one_line(message)}", flush=True)


Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""Work of Megatron's writer for one file: path, key, and (objects, tensors) to write."""


def clear_the_way(folder: Path, iteration: int) -> list[str]:
    """Move aside what would keep a save from writing an iteration or the tracker (rank 0).

    A link, a FIFO, a device or a file in the place of the iteration's folder, and anything but a file in
    the place of the tracker, is renamed: it may be somebody's, and a write through it would go elsewhere
    or wait forever.

    Args:
        folder: folder to which the run saves.
        iteration: the iteration about to be written.

    Returns:
        What was moved, in words.
    """
    done = []
    for path, is_right in (
        (folder / f"iter_{iteration:07d}", stat.S_ISDIR),
        (folder / TRACKER, stat.S_ISREG),
    ):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if not is_right(mode):
            aside = path.with_name(f".{path.name}.set-aside-{secrets.token_hex(4)}")
            os.rename(path, aside)
            done.append(f"{path.name} was {kind_of_file(mode)} and is now {aside.name}")
    return done


def empty_folder(checkpoint: Path) -> None:
    """Remove what an older save left in a folder about to be written, integrity.json first (rank 0)."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        os.unlink(checkpoint / INTEGRITY_FILE)
        fsync_path(checkpoint)
    for left in list(checkpoint.iterdir()):
        if stat.S_ISDIR(left.lstat().st_mode):
            shutil.rmtree(left)
        else:
            left.unlink()


def seal_together(checkpoint: Path, belonging: Belonging | None = None) -> Previous | None:
    """Write integrity.json; called by every rank once all other files are written.

    Args:
        checkpoint: folder of one iteration.
        belonging: run and position of the checkpoint; rank 0's counts.

    Returns:
        On rank 0, what the next checkpoint names as the one before it.

    Raises:
        AgreedError: a file that cannot be read back, or a list that cannot be written.
    """
    rank = torch.distributed.get_rank()
    hashed = _take_note(checkpoint, rank)
    own = _own_files(checkpoint, rank)
    hashes = hash_together([path for path in own if path.name not in hashed], f"hash {checkpoint.name}")
    sizes: dict[str, int] = {}
    for noted, lengths in gather((hashed, {path.name: size_of(path) for path in own})):
        hashes.update(noted)
        sizes.update(lengths)
    fault = None
    if rank == 0:
        unreadable = [f"{name}: {text}" for name, text in hashes.items() if text.startswith(UNREADABLE)]
        try:
            if unreadable:
                raise OSError(unreadable[0])
            write_integrity(checkpoint, hashes, belonging, sizes)
        except OSError as error:
            fault = describe(error)
    fault = from_rank_0(fault)
    if fault is not None:
        raise AgreedError(f"{checkpoint} could not be completed: {fault}; {GO_ON}")
    return previous_of(checkpoint) if rank == 0 else None


GO_ON = "the last complete checkpoint is untouched: make room, then start the same command again"


def _own_files(checkpoint: Path, rank: int) -> list[Path]:
    """Return the files that this rank wrote; rank 0 wrote those without a rank in their name."""
    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != INTEGRITY_FILE]
    own = [path for path in files if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        own += [path for path in files if not path.name.startswith("__") and not _is_note(path)]
    return sorted(own)


def explain_write_error(error: BaseException, checkpoint: Path) -> AgreedError:
    """Return one line for torch's CheckpointException, which has the ranks, rarely the reason."""
    ranks = ", ".join(map(str, sorted(getattr(error, "failures", {})))) or "another rank"
    free = shutil.disk_usage(checkpoint).free
    return AgreedError(
        f"{checkpoint} could not be written (rank {ranks}; {free / 1e6:,.1f} MB are free there, the lines "
        f"above say more); {GO_ON}"
    )


@dataclass(frozen=True)
class WriteThenHash:
    """The work of the background process for an asynchronous save; it is pickled to get there."""

    write: Callable[..., None]
    """Megatron's writer."""
    checkpoint: Path
    """Folder of the iteration."""

    def __call__(self, rank: int, buckets: list[Bucket], results: Any) -> None:
        """Write the files of a rank, then leave their hashes in a note for `seal_together`."""
        self.write(rank, buckets, results)
        with contextlib.suppress(
            OSError
        ):  # the writer reports it, or the file is hashed again when sealing
            hashes = {Path(bucket[0]).name: sha256_file(bucket[0]) for bucket in buckets}
            write_json(_note(self.checkpoint, rank), hashes)


def detached(buckets: list[Bucket]) -> list[Bucket]:
    """Return the same work on copies of tensors in main memory.

    Megatron hands such tensors to the background process as they are ("For persistent worker, this work
    should be changed", filesystem_async.py), while the optimizer keeps changing them.
    """
    return [
        (path, key, (objects, [(item, _copy(tensor)) for item, tensor in tensors]))
        for path, key, (objects, tensors) in buckets
    ]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.device.type == "cpu" else tensor


def _note(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f".hashes-of-rank-{rank}.json"


def _is_note(path: Path) -> bool:
    return path.name.startswith(".hashes-of-rank-") or ".partial-" in path.name


def _take_note(checkpoint: Path, rank: int) -> dict[str, str]:
    """Return the hashes in the note of this rank's background process, and remove the note."""
    note = _note(checkpoint, rank)
    if not note.is_file():
        return {}
    hashes: dict[str, str] = read_json_object(note, "remove it")
    note.unlink()
    return hashes
