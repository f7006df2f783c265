"""Where saving, loading and pruning meet upstream's driver; substitutions.py lists the replacements."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron.core.dist_checkpointing as dist_checkpointing
import megatron.training.checkpointing as checkpointing
import megatron.training.training as driver
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_exact.integrity import Belonging, Previous, previous_of
from megatron_exact.training.checkpoints import background, restricted_reads, sealing
from megatron_exact.training.checkpoints.finite import require_finite, require_finite_start
from megatron_exact.training.checkpoints.hashing import from_rank_0
from megatron_exact.training.checkpoints.pruning import prune
from megatron_exact.training.checkpoints.restricted_reads import explain_read_error, require_readable_index
from megatron_exact.training.checkpoints.schedule import resume_schedule
from megatron_exact.training.checkpoints.start import Start
from megatron_exact.training.checkpoints.verification import on_rank_0, say, settle_start
from megatron_exact.training.curves import flush_points
from megatron_exact.training.run_record import identity_of, settle_identity
from megatron_exact.training.watch.numerical_watch import NonFiniteError

if TYPE_CHECKING:
    from megatron_exact.training.run import TrainingRun

_stock_setup = driver.setup_model_and_optimizer
_stock_dist_save = dist_checkpointing.save
_stock_save_checkpoint = driver.save_checkpoint
_stock_schedule_async_save = checkpointing.schedule_async_save
_stock_load_schedule = OptimizerParamScheduler.load_state_dict


class FinishedRun(Exception):  # nothing is wrong
    """There is nothing left to train."""


def install(run: TrainingRun, start: Start) -> None:
    """Put the replacements in place for this job.

    Args:
        run: the job.
        start: what was chosen by names and sizes.
    """
    hooks = _Hooks(run, start)
    run.on_good_step = hooks.step_was_good
    restricted_reads.install(only_listed=not run.args.skip_integrity_check)
    driver.setup_model_and_optimizer = hooks.setup_model_and_optimizer
    checkpointing.read_metadata = hooks.read_metadata
    dist_checkpointing.save = hooks.dist_save
    driver.save_checkpoint = hooks.save_checkpoint
    checkpointing.schedule_async_save = hooks.schedule_async_save
    background.watch_writer()
    OptimizerParamScheduler.load_state_dict = lambda scheduler, state: hooks.load_schedule(scheduler, state)


class _Hooks:
    """The replacements, and the start that they settle."""

    def __init__(self, run: TrainingRun, start: Start) -> None:
        self.run = run
        self.args = run.args
        self.start = start
        self._saving = 0
        self._previous: Previous | None = None
        self._complete: int | None = None
        self._last_good_step = 0

    def setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The process group stands and nothing is built yet: the time to verify what will be loaded."""
        self.run.rank_watch.mark("verifying the checkpoint", is_slow=True)
        start, identity = settle_start(self.start, is_checked=not self.args.skip_integrity_check)
        self.start = start
        self.args.ckpt_step = start.iteration
        self.args.verify_integrity = False  # done, by all ranks
        self._settle_run()
        if not start.is_resume:
            self.run.record["start_checkpoint"] = identity
        elif self.args.train_iters is not None and self.args.train_iters <= (start.iteration or 0):
            raise FinishedRun(
                f"the run is finished: iteration {start.iteration} of {self.args.train_iters}"
            )
        if start.checkpoint is not None:
            require_readable_index(start.checkpoint)
        try:
            built = _stock_setup(*args, **kwargs)
        except CheckpointException as error:
            raise explain_read_error(error, start.checkpoint) from error
        if start.checkpoint is not None:
            require_finite_start(built[0], built[1], start.checkpoint)
        if start.carries_optimizer:
            _begin_anew(self.args, built[2])
        return built

    def load_schedule(self, scheduler: OptimizerParamScheduler, state: dict[str, Any]) -> None:
        """The position on the learning rate's curve; a job that takes the states along starts its own."""
        if not self.start.carries_optimizer:
            resume_schedule(_stock_load_schedule, scheduler, state)

    def read_metadata(self, tracker: str) -> tuple[int, bool]:
        """(iteration, whether it is a release) of the start, whatever the tracker says meanwhile."""
        return self.start.iteration or 0, self.start.iteration is None

    def _settle_run(self) -> None:
        """The id of the run, and the checkpoint that the next one goes on from."""
        record, start = self.run.record, self.start
        resumed = start.iteration if start.is_resume else None
        if torch.distributed.get_rank() == 0:
            settle_identity(self.run.run_dir, record, resumed)
        record.update(from_rank_0(identity_of(record)))
        if start.is_resume and start.checkpoint is not None:
            self._complete = start.iteration
            self._previous = from_rank_0(previous_of(start.checkpoint))

    def dist_save(self, state: Any, checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        """Upstream's save of one iteration into a folder that is empty, sealed at the end."""
        folder, iteration = Path(checkpoint), self._saving
        last = None if self._previous is None else f"iter_{self._previous.iteration:07d}"
        try:
            require_finite(state, iteration, last)
        except NonFiniteError:
            with contextlib.suppress(OSError):  # upstream has made it, and nothing is to come
                folder.rmdir()
            raise
        on_rank_0(lambda: sealing.empty_folder(folder))
        kwargs["verify_integrity"] = False
        try:
            request = _stock_dist_save(state, checkpoint, *args, **kwargs)
        except CheckpointException as error:
            raise sealing.explain_write_error(error, folder) from error
        if request is None:
            self._seal(folder, iteration)
            return None
        return _sealed_request(request, folder, lambda: self._seal(folder, iteration))

    def _seal(self, folder: Path, iteration: int) -> None:
        record = self.run.record
        belonging = Belonging(
            origin="saved",
            iteration=iteration,
            run_id=record["run_id"],
            weighting=record["weighting"]["rule"],
            fingerprint=record["fingerprint"],
            previous=self._previous,
        )
        self._previous = from_rank_0(sealing.seal_together(folder, belonging))

    def save_checkpoint(self, iteration: int, *args: Any, **kwargs: Any) -> Any:
        """A save, and afterwards the end of older ones."""
        self._saving = iteration
        flush_points()  # a resume from this checkpoint draws none of the earlier ones again
        for line in on_rank_0(lambda: sealing.clear_the_way(Path(self.args.save), iteration)) or ():
            say(f"{self.args.save}: {line}")
        result = _stock_save_checkpoint(iteration, *args, **kwargs)
        if not self.args.async_save:
            self._completed(iteration)
        return result

    def schedule_async_save(self, request: Any) -> None:
        """An asynchronous save ends older ones once the tracker names it."""
        iteration = self._saving
        request.add_finalize_fn(lambda: self._completed(iteration))
        _stock_schedule_async_save(request)

    def _completed(self, iteration: int) -> None:
        """The tracker names a checkpoint; what it holds is shown to be good by the step after it."""
        self._complete = iteration
        self._prune()

    def step_was_good(self, iteration: int) -> None:
        """A step was taken with a finite loss and gradient."""
        self._last_good_step = iteration
        self._prune()

    def _prune(self) -> None:
        complete = self._complete
        if complete is None or self._last_good_step <= complete:
            return
        self._complete = None  # once
        if self.args.keep_last is None or torch.distributed.get_rank() != 0:
            return
        run_id = self.run.record.get("run_id")
        removed = prune(Path(self.args.save), complete, self.args.keep_last, run_id)
        if removed:
            say(f"--keep-last {self.args.keep_last}: removed {', '.join(removed)}")


def _begin_anew(args: Any, scheduler: OptimizerParamScheduler) -> None:
    """Set back what loading a checkpoint with its optimizer has moved on; the states keep their steps."""
    args.iteration = 0
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    args.num_floating_point_operations_so_far = 0
    scheduler.num_steps = 0
    scheduler.step(0)  # the loaded groups hold the learning rate of the stage before


def _sealed_request(request: Any, folder: Path, seal: Callable[[], None]) -> Any:
    """The request of an asynchronous save, which hashes what it writes and ends with integrity.json."""

    def finish(stock: Any) -> Any:
        def call() -> None:
            try:
                stock()
            except CheckpointException as error:
                raise sealing.explain_write_error(error, folder) from error

        return call

    finalize = [finish(stock) for stock in request.finalize_fns]
    finalize.append(seal)
    if request.async_fn is None:  # this rank has nothing to write
        return request._replace(finalize_fns=finalize)
    rank, buckets, results = request.async_fn_args
    buckets = sealing.detached(buckets)
    preload = request.preload_fn
    return request._replace(
        async_fn=sealing.WriteThenHash(request.async_fn, folder),
        async_fn_args=[rank, buckets, results],
        preload_fn=type(preload)(preload.func, buckets, *preload.args[1:]),
        finalize_fns=finalize,
    )
