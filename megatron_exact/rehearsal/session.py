"""One rank of a job on the null device, observed from outside.

`pretrain.main` runs unchanged. Small operations are emulated, process groups answer for absent ranks, and
the driver's functions are wrapped to record memory and counters where phases of a step begin and end.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_exact.rehearsal.device import activate
from megatron_exact.training.memory_forecast import GIB

PHASES = ("start", "forward and backward", "optimizer", "save")
GPUS_PER_NODE = 8
FULL_SIZE_LIMIT = 1 << 20
"""Largest operation, in elements, that is computed in a model of full size. What controls a job is smaller;
what fills a card is larger."""


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What was measured on one rank, mostly in its last iteration; written as JSON."""

    rank: int
    """Rank in the world."""
    pipeline_stage: int
    """Its pipeline stage."""
    peak_allocated_gib: float
    """Peak memory of tensors, over the whole job."""
    peak_reserved_gib: float
    """Peak memory reserved by torch's allocator."""
    phase_peaks_gib: dict[str, float]
    """Peak memory of tensors in each phase."""
    kernel_launches: int
    """Kernels and matrix products in the last iteration."""
    launches_by_operation: dict[str, int]
    """The same by the torch operation that caused them."""
    host_synchronisations: int
    """How often the host waited for the device in the last iteration."""
    synchronisation_places: dict[str, int]
    """The same by call and place."""
    collectives: dict[str, list[int]]
    """`name (group)` -> [calls, bytes] in the last iteration."""
    micro_batches: int
    """Micro-batches of the last iteration; a real one may have more (`--global-batch-size` is cut)."""
    attention_plans: dict[str, int]
    """`segments x longest segment` for which cuDNN plans attention -> calls, over the whole job."""
    mixed_devices: dict[str, int]
    """Operations with tensors of both the host and the device, over the whole job."""
    not_computed: dict[str, int]
    """Small operations without values, over the whole job."""
    forecast_gib: float
    """The preflight's forecast for this pipeline stage."""
    forecast_parts_gib: dict[str, float]
    """Its parts."""


@dataclass
class Step:
    """What one iteration did, from the first forward pass to its line in the log."""

    micro_batches: int = 0
    """Forward passes."""
    seen: Any = None
    """`Records` of the step; None until it has ended."""


@dataclass
class StepWatch:
    """Measurements of a job on one rank where phases begin and end; call `install` before it starts.

    Args:
        records: of the process.
    """

    records: Any
    writes_checkpoints: bool = True
    """Whether a save writes files; otherwise it stops before the first one."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Peak bytes of tensors, by phase."""
    reserved: int = 0
    """Peak bytes reserved by torch's allocator."""
    steps: list[Step] = field(default_factory=list)
    """One for each iteration."""
    args: Any = None
    """Megatron's namespace."""
    options: Any = None
    """Our options."""
    shape: Any = None
    """The model."""

    def install(self) -> None:
        """Wrap the driver's functions where phases begin and end."""
        import megatron.training.training as driver

        from megatron_exact.training import pretrain
        from megatron_exact.training.run import TrainingRun

        stock_assemble, stock_forward_step = pretrain.assemble, TrainingRun.forward_step

        def assemble(job: Any, args: Any, *rest: Any) -> Any:
            from megatron_exact.model.families import shape_of_megatron_arguments

            self.args, self.options = args, job.options
            self.shape = job.model.shape or shape_of_megatron_arguments(args)
            run = stock_assemble(job, args, *rest)
            # around our own substitutions, which are in place now
            driver.training_log = self._ending_step(driver.training_log)
            driver.save_checkpoint_and_time = self._saving(driver.save_checkpoint_and_time)
            return run

        def forward_step(run: Any, iterator: Any, model: Any) -> Any:
            if self.steps and self.steps[-1].seen is None:
                self.steps[-1].micro_batches += 1
            return stock_forward_step(run, iterator, model)

        pretrain.assemble = assemble  # type: ignore[assignment]
        driver.train_step = self._beginning_step(driver.train_step)
        TrainingRun.forward_step = forward_step  # type: ignore[assignment, method-assign]

    def _beginning_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if not self.steps:
                self._end_phase("start")
            self.steps.append(Step())
            # the first step's peak lacks the optimizer's states, which are made at its end
            self.peaks.pop("forward and backward", None)
            self._before = self.records.copy()
            stock, *rest = args[6:]  # forward_backward_func

            def forward_backward(*args: Any, **kwargs: Any) -> Any:
                result = stock(*args, **kwargs)
                self._end_phase("forward and backward")
                return result

            result = train_step(*args[:6], forward_backward, *rest, **kwargs)
            self._end_phase("optimizer")
            return result

        return step

    def _ending_step(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        def log(*args: Any, **kwargs: Any) -> Any:
            result = training_log(*args, **kwargs)
            self.steps[-1].seen = self.records.since(self._before)
            return result

        return log

    def _saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def save_up_to_files(*args: Any, **kwargs: Any) -> None:
            if self.writes_checkpoints:
                save(*args, **kwargs)
            else:
                with contextlib.suppress(_ReadyToWrite), _stopping_before_files():
                    save(*args, **kwargs)
            self._end_phase("save")

        return save_up_to_files

    def _end_phase(self, name: str) -> None:
        import torch

        self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()


class _ReadyToWrite(Exception):  # nothing is wrong
    """The state of a checkpoint is complete on the device."""


@contextlib.contextmanager
def _stopping_before_files() -> Iterator[None]:
    """End a save once the state is complete: shards, optimizer states and our check that all is finite.

    The rest copies tensors to main memory and writes them, which needs no memory of the card and would fill
    the disk of this machine; and the plans that ranks exchange for it need all ranks.
    """
    from megatron_exact.training import substitutions

    def stop(*_: Any, **__: Any) -> None:
        raise _ReadyToWrite

    module: Any = substitutions
    stock, module._stock_dist_save = module._stock_dist_save, stop
    try:
        yield
    finally:
        module._stock_dist_save = stock


@contextlib.contextmanager
def rank_environment(rank: int, world_size: int) -> Iterator[None]:
    """The variables of torchrun on nodes of eight GPUs, for a rank of a world."""
    local_world = min(world_size, GPUS_PER_NODE)
    wanted = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank % local_world,
        "LOCAL_WORLD_SIZE": local_world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29_500,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def import_job_code() -> None:
    """Import what every rank needs, once, before ranks are forked."""
    import torch

    from megatron_exact.rehearsal.transformer_engine_kernels import use_host_kernels

    torch.set_num_threads(1)
    bindings: Any = torch._C
    stock_count, bindings._cuda_getDeviceCount = bindings._cuda_getDeviceCount, lambda: GPUS_PER_NODE
    try:  # Megatron counts the cards when it is imported, and torch refuses forks of a process that did
        use_host_kernels()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a line for each missing kernel; `rehearse` says it once
            import megatron.core.tokenizers.text
            import megatron.training.training  # noqa: F401

            import megatron_exact.model.layer_specs
            import megatron_exact.training.pretrain
            import megatron_exact.training.run
            import megatron_exact.training.substitutions  # noqa: F401
    finally:
        bindings._cuda_getDeviceCount = stock_count


def rehearse_rank(argv: Sequence[str], rank: int, world_size: int) -> RankResult:
    """Run a job of full size as one of its ranks; the others are absent. Once a process.

    Args:
        argv: of `megatron_exact.training.pretrain`.
        rank: in the world.
        world_size: of the job.

    Raises:
        RuntimeError: the job failed; its own error has been printed.
    """
    device = activate()
    import torch

    from megatron_exact.rehearsal.emulation import Emulation, FreshMemory
    from megatron_exact.rehearsal.groups import use_for_all_groups
    from megatron_exact.rehearsal.observations import Records
    from megatron_exact.training import pretrain

    records = Records()
    emulation = Emulation(device, records, limit=FULL_SIZE_LIMIT, fresh=FreshMemory.ZEROS)
    use_for_all_groups(records, are_absent=True, limit=FULL_SIZE_LIMIT)
    watch = StepWatch(records, writes_checkpoints=False)
    with rank_environment(rank, world_size):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        watch.install()
        _read_rows_on_every_rank()
        torch.distributed.broadcast_object_list = lambda *_, **__: None  # nobody sends one
        with emulation:
            code = pretrain.main(argv)
        if code or not watch.steps or watch.steps[-1].seen is None:
            raise RuntimeError(f"rank {rank} of the rehearsed job ended with exit code {code}")
        return _result(watch, rank)


def _read_rows_on_every_rank() -> None:
    """Every tensor-parallel rank reads its rows itself: the rank that would send them is absent."""
    from megatron.core import parallel_state

    import megatron_exact.training.run as training_run

    run_module: Any = training_run
    stock_next, stock_provide = run_module.next_packed_batch, run_module.TrainingRun.provide_datasets

    @contextlib.contextmanager
    def as_first_rank() -> Iterator[None]:
        stock = parallel_state.get_tensor_model_parallel_rank
        parallel_state.get_tensor_model_parallel_rank = lambda: 0
        try:
            yield
        finally:
            parallel_state.get_tensor_model_parallel_rank = stock

    def provide_datasets(self: Any, *args: Any, **kwargs: Any) -> Any:
        with as_first_rank():
            return stock_provide(self, *args, **kwargs)

    def next_packed_batch(*args: Any, **kwargs: Any) -> Any:
        with as_first_rank():
            return stock_next(*args, **kwargs)

    provide_datasets.is_distributed = True  # type: ignore[attr-defined]
    run_module.TrainingRun.provide_datasets = provide_datasets
    run_module.next_packed_batch = next_packed_batch


def _result(watch: StepWatch, rank: int) -> RankResult:
    from megatron_exact.training.layout import layout_of_arguments
    from megatron_exact.training.memory_forecast import forecast_of_arguments

    args = watch.args
    layout = layout_of_arguments(args)
    stage = rank // (args.world_size // layout.pipeline_parallel)
    forecast = forecast_of_arguments(args, watch.options, watch.shape, layout).stages()[stage]
    parts = ("weights", "gradients", "optimizer", "activations", "working")
    step = watch.steps[-1]
    return RankResult(
        rank=rank,
        pipeline_stage=stage,
        peak_allocated_gib=max(watch.peaks.values()) / GIB,
        peak_reserved_gib=watch.reserved / GIB,
        phase_peaks_gib={name: watch.peaks[name] / GIB for name in PHASES if name in watch.peaks},
        kernel_launches=step.seen.launches,
        launches_by_operation=dict(step.seen.launches_by_operation.most_common()),
        host_synchronisations=step.seen.host_synchronisations,
        synchronisation_places=_named(step.seen.synchronisations),
        collectives=step.seen.collectives(),
        micro_batches=step.micro_batches,
        attention_plans={
            f"{segments} x {longest}": calls
            for (segments, longest), calls in sorted(watch.records.attention_plans.items())
        },
        mixed_devices=_named(watch.records.mixed_devices),
        not_computed=_named(watch.records.not_computed),
        forecast_gib=forecast.total / GIB,
        forecast_parts_gib={part: getattr(forecast, part) / GIB for part in parts},
    )


def _named(counter: Any) -> dict[str, int]:
    return {f"{name} at {place}": count for (name, place), count in counter.most_common()}
