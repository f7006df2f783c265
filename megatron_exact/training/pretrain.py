"""Entry point of a training job: `torchrun -m megatron_exact.training.pretrain --pack DIR ...`.

Megatron's own `megatron.training.pretrain` runs the job. Pack, weights, start and machine are decided
before Megatron and torch are imported: bad input costs a second, not a start-up.
"""

from __future__ import annotations

import sys

from megatron_exact.training import stop_signals

if __name__ == "__main__":  # before anything that takes time is imported
    stop_signals.hold(sys.argv)

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_exact.files import parent_folders
from megatron_exact.folder_lock import LEASE, Lease
from megatron_exact.lineage import has_whole_configuration
from megatron_exact.training.job import Job, prepare_job
from megatron_exact.training.job_endings import (
    end_failed_job,
    end_refused_job,
    exit_process,
    record_ending,
)
from megatron_exact.training.megatron_parse import print_arguments
from megatron_exact.training.runtime import end_process, rank, say

if TYPE_CHECKING:  # they import torch, and a job with wrong arguments ends before that
    from megatron_exact.training.hang_detection import RankWatch
    from megatron_exact.training.run import TrainingRun


def run_job(job: Job, watch: RankWatch) -> None:
    """Run the job in Megatron's driver, with the rank watch."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_exact.training.megatron_parse import parse_for_megatron
    from megatron_exact.training.records import join_wandb_run
    from megatron_exact.training.run_record import check_same_run, describe_run
    from megatron_exact.training.substitutions import FinishedRun

    args, config = parse_for_megatron(job)
    record = describe_run(args, job.weighting, job.manifest, model_changes=job.model.changes)
    first = None
    if job.run_dir is not None:
        first = check_same_run(job.run_dir, record, is_resume=job.start.is_resume)
        if first is not None and not has_whole_configuration(first):
            say(
                f"run.json of {job.run_dir} is of an earlier version, which did not record every flag: "
                "model, schedule, seed and weighting are compared, other flags are not"
            )
    join_wandb_run(args, first)
    run = assemble(job, args, config, record, watch)
    say(f"token weighting {job.weighting.rule}, pack {job.manifest.fingerprint[:16]}")
    watch.start()
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            run.provide_datasets,
            ModelType.encoder_or_decoder,
            run.forward_step,
        )
    except FinishedRun as finished:
        say(str(finished))
        record_ending("finished", args.ckpt_step)
    except SystemExit:  # Megatron's way to end before the last iteration
        _say_why_it_stops(run)
        raise
    else:
        record_ending("finished", run.last_iteration)
    torch.distributed.barrier()
    watch.stop()
    torch.distributed.destroy_process_group()


def _say_why_it_stops(run: TrainingRun) -> None:
    """Log why a job ends before its last iteration, as asked."""
    received, iteration = run.stop_signals.received, run.last_iteration
    if received is None:
        record_ending("paused", iteration)
        return
    saved = (
        f"saved iteration {iteration}; the same command resumes from it"
        if run.args.save
        else (f"nothing is saved without --save; iteration {iteration} was the last")
    )
    say(f"{received.name} asked the job to stop: {saved}")
    record_ending("stopped", iteration)


def assemble(job: Job, args: Any, config: Any, record: dict[str, Any], watch: RankWatch) -> TrainingRun:
    """Put the callbacks of a job into Megatron's configuration and driver.

    Args:
        job: the job.
        args: Megatron's validated namespace, which becomes Megatron's global one.
        config: the model configuration, which gets the layers and the finalization of gradients.
        record: content of run.json.
        watch: the rank watch.
    """
    from megatron.training.global_vars import set_global_variables

    from megatron_exact.model.layer_specs import layer_spec, separate_qkv_spec
    from megatron_exact.training import substitutions
    from megatron_exact.training.megatron_parse import in_one_line
    from megatron_exact.training.run import TrainingRun

    # among other things it starts the writers of TensorBoard and Weights & Biases
    with in_one_line(job.argv, "Megatron cannot set the job up"):
        set_global_variables(args)
    run = TrainingRun(
        args,
        job.manifest,
        job.weighting,
        job.model,
        job.run_dir,
        record,
        is_resume=job.start.is_resume,
        rank_watch=watch,
    )
    spec = separate_qkv_spec if args.separate_qkv else layer_spec
    config.transformer_layer_spec = partial(spec, post_norm=True) if args.post_norm else spec
    config.finalize_model_grads_func = run.finalize_grads
    substitutions.install(run, job.start)
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    stop_signals.hold(argv)
    watch = None
    try:
        if "--print-arguments" in argv:
            print_arguments(argv)
            return 0
        with contextlib.ExitStack() as leases:
            job = prepare_job(argv, hold=partial(hold_folders, leases))
            watch = _watch_of(job)
            run_job(job, watch)
    except Exception as error:
        if watch is None and isinstance(error, ValueError | OSError):
            return end_refused_job(error)
        from megatron_exact.training.hang_detection import RankWatch

        return end_failed_job(error, watch or RankWatch(0))
    finally:
        if watch is not None:
            watch.stop()
    return 0


def hold_folders(leases: contextlib.ExitStack, folders: Sequence[Path]) -> None:
    """Take the leases of the folders that this job writes; rank 0 does it for all.

    Missing folders are created, and removed with the leases if an error leaves them empty.

    Raises:
        ValueError: another job has the lease of one.
    """
    if rank() != 0:
        return
    for folder in folders:
        leases.enter_context(parent_folders(folder / LEASE))
        lease = Lease(
            folder / LEASE,
            folder=folder,
            purpose="training",
            remedy="choose another --save",
            on_lost=_end_without_lease,
        )
        leases.enter_context(lease)


def _end_without_lease(line: str) -> None:
    end_process(line, is_teller=True, code=1)


def _watch_of(job: Job) -> RankWatch:
    from megatron_exact.training.hang_detection import RankWatch

    return RankWatch(job.options.rank_timeout_seconds)


if __name__ == "__main__":
    code = main()
    if "torch" in sys.modules:
        exit_process(code)
    sys.exit(code)
