"""Every run-time substitution in Megatron, in one place, each with its reason.

`megatron.core.datasets.utils.compile_helpers`
    runs `make` in a folder that has no Makefile in the wheel, and exits; the compiled helper is in the
    wheel already. Replaced by nothing.
`megatron.training.training.training_log`
    prints a mean over several iterations; the true values of each are recorded before it runs, and printed.
    It is also given the learning rate of the next step; here it gets that of the step that was taken.
`megatron.training.training.dummy_train_step`
    reads the rows of an iteration of `--iterations-to-skip`; the iteration gets a line, too.
`megatron.training.training.evaluate_and_print_results`
    knows no buckets; their sums are recorded around it, and the last iteration, which Megatron evaluates
    twice, is evaluated once.

`megatron.training.training.get_forward_backward_func`
    only for a confidence rule without stored scores: the schedule of a training step first runs the short
    windows of its micro-batches, forward only (`short_scores.py`).

`megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb`, `..._thd`
    are Transformer Engine's, or None without it, and the code for that case reads the boundaries of packed
    rows on the host in every layer. On a GPU without it ours take their place, before the configuration is
    built (`model/packed_attention.py`, called by `runtime.py`).

`RotaryEmbedding._apply_scaling`
    is Llama 3's; for a model with YaRN it returns YaRN's frequencies (`model/yarn.py`).

`megatron.core.dist_checkpointing.validation.maybe_report_missing_and_unexpected_keys`
    `--dist-ckpt-strictness raise_all` also stops a job that loads the weights but not the optimizer of a
    checkpoint. Keys that this job does not load are left out of the comparison; all others still count.

`megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue`
    is a queue in a manager process, which the first save starts by importing the whole program again, and
    which outlives a rank that is killed. A save that is not asynchronous needs no other process: a plain
    queue takes its place. With `--async-save` it stays Megatron's, forked before any device is in use
    (`checkpoint_saving.py`).

Checkpoints:

`megatron.training.training.setup_model_and_optimizer`
    first verifies what will be loaded, on all ranks, which agree on the newest intact iteration.
`megatron.training.checkpointing.read_metadata`
    answers with that iteration. Megatron reads the tracker again, and stops with exit code 0 if that is
    empty, as a full disk leaves it.
`FileSystemReader.read_metadata`, `DefaultLoadPlanner.load_bytes`, `load_common`, `_get_filesystem_reader`
    and `_get_checkpoint_format` of torch and Megatron unpickle what a checkpoint contains; the replacements
    create only listed classes and execute nothing (`restricted_reads.py`).
`megatron.core.dist_checkpointing.save`
    begins with finite weights and states (`checkpoint_saving.py`) in an empty folder and ends with
    integrity.json, which names run and iteration; a failed write is one line. Asynchronous saves work on
    copies of what lies in main memory: Megatron's writer would see later iterations in it.
`megatron.training.training.save_checkpoint`, `megatron.training.checkpointing.schedule_async_save`
    first move aside what is in the way of the new checkpoint, and end with `--keep-last`: older ones are
    removed once the tracker names the new one and the step after it was good.
`PersistentAsyncCaller.is_current_async_call_done`
    waits forever for a writer that has died; now that is an error.
`OptimizerParamScheduler.load_state_dict`
    compares learning rate curves over what was trained, instead of every setting of the schedule.

`megatron.core.optimizer.DistributedOptimizer`
    cannot load what it saved where torch's Adam stands in for Transformer Engine's or Apex's. Only
    there `distributed_optimizer.py` takes its place, which describes the three methods that it corrects.
`megatron.core.dist_checkpointing.load_content_metadata`
    is called when the checkpoint's arguments are known and before its states are asked for. Optimizer
    states that would fail there, on keys or shapes, are an error with the reason.

`megatron.training.training.get_megatron_optimizer`, `_ParamAndGradBucketGroup.check_grads`
    let an optimizer take a step whose gradient is not finite, or raise on the one rank and wait for the
    device at each bucket of gradients. Now all ranks skip such a step alike (`numerical_watch.py`).
`megatron.training.training.get_megatron_optimizer`, `OptimizerParamScheduler`, `training_log`
    with `--qk-timing` only: parameter groups for it, their learning rate, and its log
    (`qk_groups.py`).
`Float16OptimizerWithFloat16Params.sharded_state_dict`, `load_state_dict`
    likewise: with such groups it cannot load what it saved on several pipeline stages (`qk_groups.py`).
`megatron.training.training.get_megatron_optimizer`
    only with `--optimizer sgd`: Megatron gives SGD no function that makes empty states, and so cannot load
    the momenta that it saved.
`megatron.training.training.save_checkpoint_and_time`
    marks for the rank watch that a save may last (`hang_detection.py`).

`megatron.training.training.checkpoint_and_decide_exit`
    saves each so many iterations; here also when the time of `--save-minutes` is over.
`megatron.training.training.get_signal_handler`
    knows one signal, and only once its handler is installed. Now TERM, USR1 and the signal of
    `--exit-signal` are remembered from the first line on (`stop_signals.py`).

All of this is for megatron-core 0.19.2. On a machine without a GPU `cpu_runtime.py` adds its own list.
Official hooks (layer spec, gradient finalization, dataset provider, forward step) are not substitutions;
they are in `run.py`.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core.datasets.utils
import megatron.core.dist_checkpointing as dist_checkpointing
import megatron.core.dist_checkpointing.strategies.filesystem_async as checkpoint_writer
import megatron.core.dist_checkpointing.validation as checkpoint_validation
import megatron.core.optimizer as optimizers
import megatron.training.checkpointing as checkpointing
import megatron.training.training as driver
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from torch.distributed.checkpoint.api import CheckpointException

from megatron_exact.integrity import Belonging, Previous, previous_of
from megatron_exact.training import checkpoint_integrity, checkpoint_saving, qk_groups, restricted_reads
from megatron_exact.training.checkpoint_integrity import from_rank_0, on_rank_0, say, settle_start
from megatron_exact.training.checkpoint_saving import (
    SaveClock,
    prune,
    require_finite,
    require_finite_start,
)
from megatron_exact.training.checkpoint_start import Start, resume_schedule
from megatron_exact.training.distributed_optimizer import (
    TorchAdamDistributedOptimizer,
    check_states_load,
)
from megatron_exact.training.job_endings import NonFiniteError
from megatron_exact.training.records import flush_points
from megatron_exact.training.restricted_reads import explain_read_error, require_readable_index
from megatron_exact.training.run import TrainingRun
from megatron_exact.training.run_record import identity_of, settle_identity
from megatron_exact.training.runtime import cpu_runtime_is_active

_stock_setup = driver.setup_model_and_optimizer
_stock_dist_save = dist_checkpointing.save
_stock_save_checkpoint = driver.save_checkpoint
_stock_schedule_async_save = checkpointing.schedule_async_save
_stock_load_schedule = OptimizerParamScheduler.load_state_dict


class FinishedRun(Exception):  # nothing is wrong
    """The run is finished: nothing is left to train."""


def install_checkpointing(run: TrainingRun, start: Start) -> None:
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
    checkpoint_saving.watch_writer()
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
        """Verify what will be loaded, once the process group exists and before anything is built."""
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
        """Load the position on the learning rate's curve; `--carry-optimizer` starts a new one."""
        if not self.start.carries_optimizer:
            resume_schedule(_stock_load_schedule, scheduler, state)

    def read_metadata(self, tracker: str) -> tuple[int, bool]:
        """Return (iteration, whether it is a release) of the start, whatever the tracker says meanwhile."""
        return self.start.iteration or 0, self.start.iteration is None

    def _settle_run(self) -> None:
        """Settle the id of the run, and the checkpoint that the next one continues."""
        record, start = self.run.record, self.start
        resumed = start.iteration if start.is_resume else None
        if torch.distributed.get_rank() == 0:
            settle_identity(self.run.run_dir, record, resumed)
        record.update(from_rank_0(identity_of(record)))
        if start.is_resume and start.checkpoint is not None:
            self._complete = start.iteration
            self._previous = from_rank_0(previous_of(start.checkpoint))

    def dist_save(self, state: Any, checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        """Save one iteration with Megatron into an empty folder, and seal it."""
        folder, iteration = Path(checkpoint), self._saving
        last = None if self._previous is None else f"iter_{self._previous.iteration:07d}"
        try:
            require_finite(state, iteration, last)
        except NonFiniteError:
            with contextlib.suppress(OSError):  # Megatron has made it, and nothing is to come
                folder.rmdir()
            raise
        on_rank_0(lambda: checkpoint_integrity.empty_folder(folder))
        kwargs["verify_integrity"] = False
        try:
            request = _stock_dist_save(state, checkpoint, *args, **kwargs)
        except CheckpointException as error:
            raise checkpoint_integrity.explain_write_error(error, folder) from error
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
        self._previous = from_rank_0(checkpoint_integrity.seal_together(folder, belonging))

    def save_checkpoint(self, iteration: int, *args: Any, **kwargs: Any) -> Any:
        """Save, then remove older checkpoints."""
        self._saving = iteration
        flush_points()  # a resume from this checkpoint draws none of the earlier ones again
        for line in (
            on_rank_0(lambda: checkpoint_integrity.clear_the_way(Path(self.args.save), iteration)) or ()
        ):
            say(f"{self.args.save}: {line}")
        result = _stock_save_checkpoint(iteration, *args, **kwargs)
        if not self.args.async_save:
            self._completed(iteration)
        return result

    def schedule_async_save(self, request: Any) -> None:
        """Start an asynchronous save; older checkpoints are removed once the tracker names it."""
        iteration = self._saving
        request.add_finalize_fn(lambda: self._completed(iteration))
        _stock_schedule_async_save(request)

    def _completed(self, iteration: int) -> None:
        """Note that the tracker names a checkpoint; the step after it shows that its content is good."""
        self._complete = iteration
        self._prune()

    def step_was_good(self, iteration: int) -> None:
        """Note that a step was taken with a finite loss and gradient."""
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
        every = self.args.keep_every
        removed = prune(Path(self.args.save), complete, self.args.keep_last, run_id, every)
        if removed:
            say(f"--keep-last {self.args.keep_last}: removed {', '.join(removed)}")


def _begin_anew(args: Any, scheduler: OptimizerParamScheduler) -> None:
    """Set back what loading a checkpoint with its optimizer has moved on; the states keep their steps."""
    args.iteration = 0
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    args.num_floating_point_operations_so_far = 0
    scheduler.num_steps = 0
    scheduler.step(0)  # the loaded groups have the learning rate of the stage before


def _sealed_request(request: Any, folder: Path, seal: Callable[[], None]) -> Any:
    """Return the request of an asynchronous save that hashes its files and ends with integrity.json."""

    def finish(stock: Any) -> Any:
        def call() -> None:
            try:
                stock()
            except CheckpointException as error:
                raise checkpoint_integrity.explain_write_error(error, folder) from error

        return call

    finalize = [finish(stock) for stock in request.finalize_fns]
    finalize.append(seal)
    if request.async_fn is None:  # this rank has nothing to write
        return request._replace(finalize_fns=finalize)
    rank, buckets, results = request.async_fn_args
    buckets = checkpoint_integrity.detached(buckets)
    preload = request.preload_fn
    return request._replace(
        async_fn=checkpoint_integrity.WriteThenHash(request.async_fn, folder),
        async_fn_args=[rank, buckets, results],
        preload_fn=type(preload)(preload.func, buckets, *preload.args[1:]),
        finalize_fns=finalize,
    )


_stock_get_optimizer = driver.get_megatron_optimizer
_stock_save = driver.save_checkpoint_and_time
_stock_decide = driver.checkpoint_and_decide_exit


def install_watches(run: TrainingRun) -> None:
    """Put the replacements in place for this job."""

    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = _stock_get_optimizer(*args, **kwargs)
        run.numbers.guard(optimizer)
        run.optimizer = optimizer
        return optimizer

    clock: SaveClock | None = None

    def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> Any:
        run.rank_watch.mark("saving a checkpoint", is_slow=True)
        began = time.monotonic()
        with run.throughput.aside("save"):
            result = _stock_save(iteration, *args, **kwargs)
        if clock is not None:
            clock.saved(iteration, time.monotonic() - began)
        run.rank_watch.mark("ending the save")
        return result

    def checkpoint_and_decide_exit(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal clock
        interval = run.args.save_interval
        if run.args.save:
            if clock is None:
                clock = SaveClock(
                    run.args.save_minutes, run.args.world_size, iteration - 1, agree=from_rank_0
                )
            if clock.is_due(iteration):
                run.args.save_interval = 1  # this iteration is one to save
            line = clock.news()
            if line is not None:
                say(line)
        try:
            return _stock_decide(model, optimizer, scheduler, iteration, *args, **kwargs)
        finally:
            run.args.save_interval = interval

    driver.get_megatron_optimizer = get_megatron_optimizer
    driver.save_checkpoint_and_time = save_checkpoint_and_time
    driver.checkpoint_and_decide_exit = checkpoint_and_decide_exit
    driver.get_signal_handler = lambda: run.stop_signals
    _ParamAndGradBucketGroup.check_grads = lambda group, **_: run.numbers.check_grads(group)


_stock_training_log = driver.training_log
_stock_dummy_train_step = driver.dummy_train_step
_stock_get_forward_backward_func = driver.get_forward_backward_func
_stock_evaluate_and_print_results = driver.evaluate_and_print_results
_stock_load_content_metadata = dist_checkpointing.load_content_metadata


def install(run: TrainingRun, start: Start) -> None:
    """Put the substitutions in place for this job.

    Args:
        run: the job.
        start: what `--load` means, before contents are verified.
    """
    megatron.core.datasets.utils.compile_helpers = lambda: None
    if run.args.async_save:
        checkpoint_saving.start_writer(run.args, on_cpu=cpu_runtime_is_active())
    else:
        checkpoint_writer._results_queue = queue.Queue()
    install_checkpointing(run, start)
    install_watches(run)
    if run.args.optimizer == "sgd":
        driver.get_megatron_optimizer = _with_momentum_states(driver.get_megatron_optimizer)
    if run.short_scores is not None:
        around = run.short_scores.around
        driver.get_forward_backward_func = lambda **kwargs: around(
            _stock_get_forward_backward_func(**kwargs)
        )
    if optimizers.USING_PYTORCH_OPTIMIZER:
        optimizers.DistributedOptimizer = TorchAdamDistributedOptimizer
    dist_checkpointing.load_content_metadata = _checking_states(run)
    driver.training_log = _recording_iterations(run)
    driver.dummy_train_step = _recording_left_out(run)
    driver.evaluate_and_print_results = _recording_evaluations(run)
    checkpoint_validation.maybe_report_missing_and_unexpected_keys = _compare_keys(unwanted_keys(run.args))
    qk_groups.install(run)  # around the replacements above


def _with_momentum_states(get_megatron_optimizer: Any) -> Any:
    """Wrap `get_megatron_optimizer`: give SGD states that a checkpoint can be loaded into."""

    def init_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                state = optimizer.state[parameter]
                state.setdefault("momentum_buffer", torch.zeros_like(parameter.data))

    def get(*args: Any, **kwargs: Any) -> Any:
        built = get_megatron_optimizer(*args, **kwargs)
        for optimizer in built.chained_optimizers:
            if optimizer.init_state_fn is None:
                optimizer.init_state_fn = init_state
        return built

    return get


def _recording_iterations(run: TrainingRun) -> Any:
    """Wrap `training_log`: record the true values first."""

    def training_log(
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: float | None,
        iteration: int,
        loss_scale: Any,
        report_memory_flag: Any,
        skipped_iter: Any,
        grad_norm: float | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        learning_rate = get_canonical_lr_for_logging(run.step_groups)
        run.record_iteration(
            iteration, grad_norm=grad_norm, learning_rate=learning_rate, skipped=bool(skipped_iter)
        )
        run.throughput.end_iteration(
            iteration,
            kwargs.get("seqlen_squared_sum_in_batch"),
            kwargs.get("total_real_tokens_in_batch"),
            run.records,
        )
        return _stock_training_log(
            _as_recorded(run.reported, loss_dict, total_loss_dict, was_skipped=bool(skipped_iter)),
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            grad_norm,
            *args,
            **kwargs,
        )

    return training_log


def _as_recorded(
    reported: dict[str, float],
    loss_dict: dict[str, Any],
    total_loss_dict: dict[str, Any],
    *,
    was_skipped: bool,
) -> dict[str, Any]:
    """Return the losses that `training_log` prints: those of this iteration, as in losses.jsonl.

    Megatron prints sums over the iterations since its last line, divided by their number, and its second
    line after every start counts the first iteration again. Here the sum is set to so many times this
    iteration's value that the mean is the value itself.

    Args:
        reported: losses of this iteration, by name.
        loss_dict: Megatron's own, empty but on the last pipeline stage.
        total_loss_dict: Megatron's sums, changed in place.
        was_skipped: whether no step was taken: then Megatron adds nothing.
    """
    for name in loss_dict:  # one without targets has no loss: 0/0
        total_loss_dict.pop(name, None)
    values = {
        name: torch.tensor([value], dtype=torch.float64)  # on the host, where it is printed
        for name, value in reported.items()
        if name in loss_dict
    }
    counted = total_loss_dict.get("advanced iterations", 0)
    for name, value in values.items():
        total_loss_dict[name] = value * (max(1, counted) if was_skipped else counted)
    return values


def _recording_left_out(run: TrainingRun) -> Any:
    """Wrap `dummy_train_step`: record a line."""

    def dummy_train_step(data_iterator: Any) -> None:
        _stock_dummy_train_step(data_iterator)
        run.record_left_out()

    return dummy_train_step


def _recording_evaluations(run: TrainingRun) -> Any:
    """Wrap `evaluate_and_print_results`: once an iteration, with sums by bucket."""

    def evaluate_and_print_results(
        prefix: str, forward_step: Any, iterator: Any, model: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> None:
        if run.was_evaluated(iteration):
            return
        run.begin_evaluation()
        with run.throughput.aside("evaluation"):
            _stock_evaluate_and_print_results(
                prefix, forward_step, iterator, model, iteration, *args, **kwargs
            )
        run.record_evaluation(iteration)

    return evaluate_and_print_results


def _checking_states(run: TrainingRun) -> Any:
    """Wrap `load_content_metadata`: raise with the reason if the optimizer's states cannot be loaded."""

    def load_content_metadata(*, preloaded_state_dict: dict[str, Any]) -> Any:
        content = _stock_load_content_metadata(preloaded_state_dict=preloaded_state_dict)
        check_states_load(run.args, preloaded_state_dict.get("args"), content)
        return content

    return load_content_metadata


def unwanted_keys(args: Any) -> tuple[str, ...]:
    """Return the prefixes of checkpoint keys that a job does not load.

    Args:
        args: Megatron's namespace (finetune and no_load_optim are read).
    """
    # Megatron itself leaves these out where the layout changed, and says so
    prefixes: tuple[str, ...] = ("rng_state", "rerun_state_machine_state")
    if args.finetune or args.no_load_optim:
        prefixes += ("optimizer.", "chained_")
    return prefixes


def _compare_keys(unwanted: tuple[str, ...]) -> Any:
    def compare(missing: set[str], unexpected: set[str], raise_error: bool = True) -> None:
        lacking = sorted(key for key in missing if not key.startswith(unwanted))
        if not lacking and not unexpected:
            return
        flags = "--add-qkv-bias, --untie-embeddings-and-output-weights, --num-layers, ..."
        if all(key.startswith("optimizer.") for key in (*lacking, *unexpected)):
            flags = "--bf16, --optimizer, --use-distributed-optimizer; --no-load-optim leaves its state out"
        parts = []
        if lacking:
            parts.append(f"the checkpoint contains {lacking}, which this model does not have")
        if unexpected:
            parts.append(f"this model needs {sorted(unexpected)}, which the checkpoint has not")
        raise ValueError(
            f"{'; '.join(parts)}: the flags differ from those the checkpoint was made with ({flags})"
        )

    return compare
