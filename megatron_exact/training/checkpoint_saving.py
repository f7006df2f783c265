"""Saving checkpoints: background writers, the time between saves, removal of old ones, finite states only.

**`--async-save`.** Its processes start before any device is in use, are watched, and end with their rank.
Megatron's trainer waits for its writer twice, for the copies of the tensors and for the files, and each
time forever if the writer is gone: killed for lack of memory, or ended by an error of its own.

**`--save-minutes`.** Saving often costs time, saving rarely loses iterations at a failure. J. W. Young, "A
first order approximation to the optimum checkpoint interval" (Communications of the ACM 17(9), 1974): with
C seconds a save and M seconds between failures, sqrt(2 * C * M) seconds between saves lose the least.
Minutes become a number of iterations, which rank 0 computes, again after each save, and all ranks use:
clocks differ between machines, and a rank that saves alone would wait forever.

**Finite states.** A checkpoint with a NaN is worse than none: with `--keep-last` it removes the last good
one, and every start from it ends at the first step. The loss does not show every NaN: it may be in a row of
the embedding that no document uses, or in a state that the next step will read. Each rank sums up every
tensor that it saves or has loaded; the sum is NaN or Inf if the tensor contains one. That is one pass over
the local shards without a copy, then an all-reduce of one number, and costs 10 % of the hashing that a save
does anyway (docs/benchmarks.md, `benchmarks/finite_check.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import resource
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.filesystem_async as checkpoint_writer
import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from torch import Tensor

from megatron_exact.command_line import describe
from megatron_exact.files import fsync_path
from megatron_exact.integrity import INTEGRITY_FILE, read_seal
from megatron_exact.training.checkpoint_integrity import gather
from megatron_exact.training.checkpoint_start import RELEASE, checkpoints_in, iteration_number
from megatron_exact.training.job_endings import NonFiniteError

PR_SET_PDEATHSIG = 1
_stock_schedule = PersistentAsyncCaller.schedule_async_call
_stock_is_done = PersistentAsyncCaller.is_current_async_call_done


def start_writer(args: Any, *, on_cpu: bool) -> None:
    """Start the queue of results, and on the CPU the writer itself.

    Where there is a GPU, Megatron starts the writer through a server process, because a forked one could
    not use CUDA; that server would not have the CPU runtime.

    Args:
        args: Megatron's namespace.
        on_cpu: whether the CPU runtime answers for CUDA.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # every tensor that the writer maps is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with _ending_with_this_process():
        checkpoint_writer.get_write_results_queue("fork")
        if on_cpu:
            PersistentAsyncCaller._get_process(
                args.rank, "fork", args.async_ckpt_cpu_priority, args.async_ckpt_io_priority
            )


def watch_writer() -> None:
    """Replace Megatron's two waits by ones that raise an error if the writer has ended."""
    PersistentAsyncCaller.schedule_async_call = _schedule
    PersistentAsyncCaller.is_current_async_call_done = _is_done


def _schedule(caller: Any, request: Any) -> None:
    """Hand over a request and wait until its tensors are copied."""
    if request.async_fn is None:  # this rank has nothing to write
        return
    request = with_host_copies(request)
    if caller.process is None:
        caller.process = PersistentAsyncCaller._get_process(int(os.environ.get("RANK", "0")))
    failures: list[BaseException] = []
    requests, copies = caller._persistent_queue, caller._persistent_preload_q
    # Called by the thread that pickles the request; multiprocessing would print the error and continue.
    requests._on_queue_feeder_error = lambda error, _: failures.append(error)
    copies.join = lambda: _wait_for_copies(caller.process, copies, failures)
    _stock_schedule(caller, request)


def with_host_copies(request: Any) -> Any:
    """Return a request whose tensors lie in main memory.

    Megatron hands the tensors of the device to the writer, which maps the device's memory and copies them
    itself: a second process on the card, with a context of its own, whose death can take the job along.
    Here this process copies them, into memory that the writer maps.

    Args:
        request: Megatron's `AsyncRequest`; one without tensors of a device is returned as it is.
    """
    if request.preload_fn is None:
        return request
    rank, buckets, *others = request.async_fn_args
    tensors = [tensor for *_, (_, pairs) in buckets for _, tensor in pairs]
    if not any(tensor.is_cuda for tensor in tensors):
        return request
    copies = []
    for name, key, (data, pairs) in buckets:
        copies.append((name, key, (data, [(item, _shared_copy(tensor)) for item, tensor in pairs])))
    return request._replace(
        preload_fn=functools.partial(_as_they_are, copies), async_fn_args=(rank, copies, *others)
    )


def _shared_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    try:
        copy.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise OSError(
            f"--async-save keeps a copy of weights and states in /dev/shm, which is too small ({error}): "
            "give the container more (docker: --ipc host or --shm-size), or leave out --async-save"
        ) from error
    return copy.copy_(tensor.detach())


def _as_they_are(buckets: Any) -> Any:
    return buckets


def _wait_for_copies(process: Any, copies: Any, failures: list[BaseException]) -> None:
    """Wait like `copies.join()`, but without its lock, which a dead writer may hold."""
    while not copies._unfinished_tasks._semlock._is_zero():
        if failures:
            raise OSError(
                "the checkpoint could not be handed to the process that writes it: "
                f"{describe(failures[0])}; start the same command again, without --async-save if it recurs"
            ) from failures[0]
        if not process.is_alive():
            raise OSError(_writer_has_ended(process))
        time.sleep(0.005)


def _is_done(caller: Any, blocking: bool = False, no_dist: bool = False) -> bool:
    """Return whether the writer has written its request."""
    while True:
        process = caller.process
        if process is not None and not process.is_alive() and caller._persistent_comp_q.empty():
            raise OSError(_writer_has_ended(process))
        done = bool(_stock_is_done(caller, False, no_dist))
        if done or not blocking:
            return done
        time.sleep(0.05)


def _writer_has_ended(process: Any) -> str:
    return (
        f"the process that writes the checkpoints of rank {os.environ.get('RANK', '0')} has ended "
        f"(exit code {process.exitcode}): its last checkpoint is not complete; start the same "
        "command again, without --async-save if memory was short"
    )


@contextlib.contextmanager
def _ending_with_this_process() -> Iterator[None]:
    """Kill processes that are forked inside the block with this process, however it ends."""

    class Marker:
        """As long as it lives, multiprocessing calls what is registered with it in each child."""

    marker = Marker()
    util.register_after_fork(marker, _end_with_parent)
    yield
    del marker


def _end_with_parent(_: object) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


GPU_HOURS_BETWEEN_FAILURES = 50_000
"""Mean time between failures times GPUs: 419 unexpected interruptions in 54 days on 16,384 GPUs ("The Llama
3 Herd of Models", arXiv 2407.21783, section 3.3.4)."""
ASSUMED_SAVE_SECONDS = 60.0
"""Cost of a save before the first is measured."""
FIRST_ITERATIONS = 10
"""Number of iterations after a start from which their mean time is known well enough."""


def young_seconds(save_seconds: float, failure_seconds: float) -> float:
    """Return the time between saves that loses least, to first order.

    Args:
        save_seconds: time for which a save holds up training.
        failure_seconds: mean time between failures of the whole job.
    """
    return math.sqrt(2 * save_seconds * failure_seconds)


class SaveClock:
    """Decides which iteration is saved besides those of `--save-interval`, the same on every rank.

    Args:
        minutes: value of `--save-minutes`; None for Young's formula, 0 for never.
        num_gpus: number of ranks of the job.
        iteration: the iteration from which the job resumes.
        now: a monotonic clock, in seconds.
        agree: returns rank 0's value on all ranks.
    """

    def __init__(
        self,
        minutes: float | None,
        num_gpus: int,
        iteration: int,
        *,
        now: Callable[[], float] = time.monotonic,
        agree: Callable[[int], int],
    ) -> None:
        self._minutes, self._num_gpus, self._now, self._agree = minutes, num_gpus, now, agree
        self._saved = iteration
        self._plan_at: int | None = iteration + FIRST_ITERATIONS
        self._next: int | None = None
        self._save_seconds: float | None = None
        self._spent, self._counted = 0.0, 0
        self._last: float | None = None
        self._news_stage = 0

    def is_due(self, iteration: int) -> bool:
        """Count an iteration that has ended, and return whether to save it; called by all ranks."""
        if self._minutes == 0:
            return False
        now = self._now()
        if self._last is not None:
            self._spent += now - self._last
            self._counted += 1
        self._last = now
        if self._plan_at is not None and iteration >= self._plan_at and self._counted:
            self._plan_at = None
            self._next = self._saved + self._agree(self._iterations_between())
        return self._next is not None and iteration >= self._next

    def saved(self, iteration: int, seconds: float) -> None:
        """Note that an iteration was saved, for any reason, which delayed training by `seconds`."""
        self._saved, self._next, self._plan_at = iteration, None, iteration + 1
        self._save_seconds = seconds
        self._last = None  # the save does not count as part of an iteration

    def _seconds_between(self) -> float:
        if self._minutes is not None:
            return self._minutes * 60
        failure = GPU_HOURS_BETWEEN_FAILURES * 3600 / self._num_gpus
        return young_seconds(self._save_seconds or ASSUMED_SAVE_SECONDS, failure)

    def _iterations_between(self) -> int:
        return max(1, round(self._seconds_between() / max(1e-9, self._spent / self._counted)))

    def news(self) -> str | None:
        """Return a line for the log when the interval is known, and again when a save has been measured."""
        stage = 0 if self._next is None else 1 if self._save_seconds is None else 2
        if stage <= self._news_stage:
            return None
        self._news_stage = stage
        line = f"a save every {self._seconds_between() / 60:.0f} minutes besides --save-interval"
        if self._minutes is not None:
            return f"{line} (--save-minutes)"
        cost = self._save_seconds
        takes = f"{ASSUMED_SAVE_SECONDS:.0f} s (assumed)" if cost is None else f"{cost:.1f} s"
        hours = GPU_HOURS_BETWEEN_FAILURES / self._num_gpus
        return (
            f"{line}: a save takes {takes}, and {self._num_gpus} GPUs fail once in {hours:,.0f} hours "
            "(Young's formula; --save-minutes N for another, 0 for none)"
        )


DOOMED = ".pruned-"
"""Prefix under which a checkpoint waits to be deleted; nothing looks for checkpoints there."""


def prune(
    folder: Path, saved: int, keep: int, run_id: str | None = None, every: int | None = None
) -> list[str]:
    """Remove complete checkpoints older than the newest `keep`.

    A checkpoint is renamed before it is deleted, so a kill in between cannot leave half of one that looks
    whole. These are kept: folders without integrity.json (a save in progress, or files that somebody can
    still seal), iterations above `saved` (a course that was given up), a release, and
    checkpoints of another run.

    Args:
        folder: folder to which the run saves.
        saved: iteration of the last complete save, which is always kept.
        keep: number of complete checkpoints to keep, >= 1.
        run_id: id of the run.
        every: iterations divisible by it are kept (`--keep-every`); None keeps none of them.

    Returns:
        Names of the removed checkpoints.
    """
    for left in folder.glob(f"{DOOMED}*"):
        shutil.rmtree(left, ignore_errors=True)
    complete = [
        path
        for path in checkpoints_in(folder)
        if path.name != RELEASE
        and iteration_number(path) <= saved
        and (path / INTEGRITY_FILE).is_file()
        and not path.is_symlink()
        and _may_be_of(path, run_id)
    ]
    if not complete or iteration_number(complete[0]) != saved:
        return []
    removed = [path for path in complete[keep:] if every is None or iteration_number(path) % every]
    for path in removed:
        doomed = folder / f"{DOOMED}{path.name}"
        os.rename(path, doomed)
        fsync_path(folder)
        shutil.rmtree(doomed, ignore_errors=True)
    return [path.name for path in removed]


def _may_be_of(checkpoint: Path, run_id: str | None) -> bool:
    try:
        seal = read_seal(checkpoint)
    except ValueError:  # damaged, but probably ours
        return True
    about = None if seal is None else seal.belonging
    return about is None or None in (about.run_id, run_id) or about.run_id == run_id


MOST_NAMES = 3


def require_finite(state: Any, iteration: int, last: str | None) -> None:
    """Check what is about to be saved; called by every rank.

    Args:
        state: sharded state dict, as Megatron hands it to its save.
        iteration: the iteration to save.
        last: name of the last good checkpoint, None if there is none yet.

    Raises:
        NonFiniteError: on every rank alike, if a weight or a state of any rank is not finite.
    """
    remedy = (
        f"{last} is the last good checkpoint, and the same command resumes from it"
        if last is not None
        else "there is no checkpoint yet: begin again"
    )
    _raise_if_damaged(
        _saved(state),
        f"iteration {iteration} is not saved, since",
        f"{remedy}; if it recurs, lower --lr or look at the memory of that machine",
    )


def require_finite_start(model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Check what was loaded; called by every rank. An older version may have saved a NaN.

    Args:
        model: chunks of this rank, as Megatron wraps them.
        optimizer: Megatron's optimizer, chained or single; None without one.
        checkpoint: folder of the iteration.

    Raises:
        NonFiniteError: on every rank alike.
    """
    remedy = "remove it to resume from an older one, or start from another checkpoint"
    _raise_if_damaged(_loaded(model, optimizer), f"nothing is trained from {checkpoint}, since", remedy)


def _raise_if_damaged(found: Iterable[tuple[str, Tensor]], begin: str, remedy: str) -> None:
    """Raise an error with this beginning and remedy if a tensor of any rank is not finite."""
    tensors = [
        (name, _plain(tensor)) for name, tensor in found if tensor.is_floating_point() and tensor.numel()
    ]
    bad = damaged(tensor for _, tensor in tensors)
    total = torch.tensor([len(bad)], dtype=torch.int64, device="cuda")  # the CPU runtime answers on the CPU
    torch.distributed.all_reduce(total)
    if not int(total):
        return
    here = [_in_words(*tensors[index]) for index in bad[:MOST_NAMES]]
    names = [f"rank {rank}: {text}" for rank, texts in enumerate(gather(here)) for text in texts]
    raise NonFiniteError(
        f"{begin} {int(total)} of its weights and optimizer states contain NaN or Inf "
        f"({'; '.join(names[:MOST_NAMES])}); {remedy}"
    )


def damaged(tensors: Iterable[Tensor]) -> list[int]:
    """Return the indices of tensors that contain NaN or Inf; waits once for each device if there are none.

    A sum is as fast as memory and propagates NaN and Inf. Finite values may overflow it, too, so tensors
    whose sum is not finite are checked value by value.
    """
    known = list(tensors)
    sums: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, tensor in enumerate(known):
        # in the dtype itself: torch's sum of bfloat16 in float32 is 25 times slower on a CPU
        sums[tensor.device].append((index, tensor.sum().float()))
    suspects: list[int] = []
    for members in sums.values():
        finite = torch.isfinite(torch.stack([total for _, total in members])).tolist()
        suspects += [index for (index, _), is_finite in zip(members, finite, strict=True) if not is_finite]
    return sorted(index for index in suspects if not bool(torch.isfinite(known[index]).all()))


def _saved(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield key and local shard of each tensor of a sharded state dict, without padding."""
    if isinstance(state, ShardedTensor | ShardedTensorFactory):
        if isinstance(state.data, Tensor):
            yield state.key, state.data
    elif isinstance(state, dict):
        if not _is_padding(state):
            for value in state.values():
                yield from _saved(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _saved(value)


def _is_padding(state: dict[Any, Any]) -> bool:
    """Return whether these tensors fill a gap between parameters in a buffer of the distributed optimizer.

    Megatron saves them as `torch.empty` made them, whatever the memory held, and drops them on loading
    (`sharded_param_state_dp_reshardable` in megatron/core/optimizer/distrib_optimizer.py).
    """
    mark = state.get("padding")
    return isinstance(mark, LocalNonpersistentObject) and mark.unwrap() is True


def _loaded(model: Any, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each weight, main copy and optimizer state of this rank."""
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            yield name.removeprefix("module.").removeprefix("module."), parameter
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner: Any = getattr(part, "optimizer", None)
        for group in getattr(inner, "param_groups", ()):
            for parameter in group["params"]:
                yield "a main copy of the optimizer", parameter
                for name, value in inner.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield f"{name} of the optimizer", value


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor without gradient, and Transformer Engine's FP8 as the numbers that it encodes."""
    if hasattr(tensor, "dequantize") and type(tensor) not in (Tensor, torch.nn.Parameter):
        tensor = tensor.dequantize()
    return tensor.detach()


def _in_words(key: str, tensor: Tensor) -> str:
    num_bad = int((~torch.isfinite(tensor)).sum())
    return f"{key}, {num_bad:,} of {tensor.numel():,} values"
