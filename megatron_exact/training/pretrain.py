"""Entry point of a training job: `torchrun -m megatron_exact.training.pretrain --pack DIR ...`.

Upstream's `megatron.training.pretrain`, unforked, runs the job. This file decides, before Megatron is
imported, what the job is (pack, weights, start, machine), so that bad input costs a second, not a start-up.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_exact.command_line import describe
from megatron_exact.data.manifest import Manifest, read_manifest, verify_arrays
from megatron_exact.data.verify_sources import check_indices
from megatron_exact.exposure import Weighting
from megatron_exact.training import arguments, refusals
from megatron_exact.training.job_model import JobModel, check_against_pack, choose_model
from megatron_exact.training.megatron_help import show_megatron_help
from megatron_exact.training.start import (
    Start,
    checkpoint_identity,
    choose_start,
    is_own_folder,
    require_free_run,
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is decided before Megatron is imported."""

    options: argparse.Namespace
    """Our own options."""
    manifest: Manifest
    """Of the pack."""
    weighting: Weighting
    """The rule applied to the pack."""
    start: Start
    """What `--load` means."""
    model: JobModel
    """What the model is."""
    run_dir: Path | None
    """Where records go."""
    argv: list[str]
    """The whole Megatron command line."""


def prepare_job(argv: Sequence[str]) -> Job:
    """Read and check all that needs no Megatron; activate the CPU runtime where there is no GPU.

    Raises:
        ValueError: cause, value and remedy.
    """
    options, megatron_argv = arguments.build_parser().parse_known_args(list(argv))
    if options.megatron_help:
        _activate_runtime(options)
        show_megatron_help()
    if options.pack is None:
        raise ValueError("--pack is missing: name a packed dataset (tools/pack_corpus.py makes one)")
    manifest = read_manifest(options.pack)
    arguments.compare_with_pack(megatron_argv, manifest)
    weighting = arguments.weighting_of(options, manifest)
    start, run_dir = _choose_start(megatron_argv, options.run_dir)
    model = choose_model(options.preset, start.load, arguments.flag_value(megatron_argv, "--save"))
    model_flags = model.flags(megatron_argv)
    doubts = check_against_pack(model, manifest)
    for line in filter(None, (start.message, model.description, *doubts)):
        _say(line)
    if _rank() == 0:  # once a job; the other ranks wait for rank 0 at start-up
        verify_arrays(options.pack, manifest)
        check_indices(Path(options.pack), manifest, options.source_root)
    if run_dir is None:
        _say("neither --save nor --run-dir is given: no run.json and no losses.jsonl")
    full_argv = arguments.megatron_arguments(
        megatron_argv,
        manifest,
        runtime_arguments=_activate_runtime(options),
        start=start.arguments(),
        run_dir=run_dir,
        model_flags=model_flags,
        window=model.shape.max_position_embeddings if model.shape is not None else 0,
    )
    return Job(
        options=options,
        manifest=manifest,
        weighting=weighting,
        start=start,
        model=model,
        run_dir=run_dir,
        argv=full_argv,
    )


def _choose_start(argv: Sequence[str], run_dir: str | None) -> tuple[Start, Path | None]:
    """What the user's flags say about the beginning, and the folder of the run's records.

    Raises:
        ValueError: no intact checkpoint where there has to be one, or a run in the way.
    """
    load, save, step = (arguments.flag_value(argv, flag) for flag in ("--load", "--save", "--ckpt-step"))
    start = choose_start(
        load,
        save,
        arguments.flag_value(argv, "--pretrained-checkpoint"),
        int(step) if step is not None else None,
    )
    if start.is_resume and arguments.has_flag(argv, "--finetune"):
        raise ValueError(
            f"--finetune with --load equal to --save would begin the run of {save} again: drop --finetune "
            "to go on with it, or choose another --save"
        )
    folder = run_dir or save
    require_free_run(save, folder, start, is_own=is_own_folder(load, save))
    return start, Path(folder) if folder is not None else None


def _activate_runtime(options: argparse.Namespace) -> tuple[str, ...]:
    """Megatron flags of the machine: the CPU runtime's where there is no GPU, else none.

    Raises:
        ValueError: no GPU answers where one should, which must not turn a cluster job into a CPU job.
    """
    if torch.cuda.is_available() and not options.cpu and "cpu_runtime" not in _loaded_runtimes():
        return ()
    world, local_world = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if not options.cpu and (Path("/dev/nvidia0").exists() or world > local_world):
        where = "on this machine although it has one" if world == local_world else "on one of the nodes"
        raise ValueError(
            f"no GPU answers {where}: repair its driver (nvidia-smi), or run on the CPU with --cpu"
        )
    from megatron_exact.training import cpu_runtime

    cpu_runtime.install()
    reason = "--cpu was given" if options.cpu else "no GPU was found"
    _say(f"CPU runtime: {reason}; CUDA calls are answered on the CPU, communication is gloo")
    return cpu_runtime.CPU_ARGUMENTS


def _loaded_runtimes() -> set[str]:
    """Once installed, the CPU runtime makes torch claim a GPU: remember which one it is."""
    prefix = "megatron_exact.training."
    return {name.removeprefix(prefix) for name in sys.modules if name.startswith(prefix)}


def run_job(job: Job) -> None:
    """Hand the job to upstream's driver."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables

    from megatron_exact.model.layer_specs import layer_spec
    from megatron_exact.training import substitutions
    from megatron_exact.training.run import TrainingRun
    from megatron_exact.training.run_record import check_same_run, describe_run

    args, config = _parse_for_megatron(job)
    if (
        job.start.is_resume
        and args.train_iters is not None
        and args.train_iters <= (job.start.iteration or 0)
    ):
        _say(f"the run is finished: iteration {job.start.iteration} of {args.train_iters}")
        return
    identity = None
    if _rank() == args.world_size - 1 and not job.start.is_resume:  # the rank that writes run.json
        identity = checkpoint_identity(job.start)
    record = describe_run(args, job.weighting, job.manifest.fingerprint, identity)
    if job.run_dir is not None:
        check_same_run(job.run_dir, record)
    set_global_variables(args)
    run = TrainingRun(
        args,
        job.manifest,
        job.weighting,
        job.model,
        job.run_dir,
        record,
        is_resume=job.start.is_resume,
    )
    config.transformer_layer_spec = layer_spec
    config.finalize_model_grads_func = run.finalize_grads
    substitutions.install(run)
    _say(f"token weighting {job.weighting.rule}, pack {job.manifest.fingerprint[:16]}")
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        run.provide_datasets,
        ModelType.encoder_or_decoder,
        run.forward_step,
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _parse_for_megatron(job: Job) -> tuple[Any, Any]:
    """Megatron's validated namespace and model configuration; nothing is written or started yet.

    The steps are those of upstream's `parse_and_validate_args`, with our checks between them.

    Raises:
        ValueError: flags that Megatron does not know, or that it or we refuse.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from megatron_exact.model.layer_specs import check_packed_attention_supports
    from megatron_exact.model.loss_head import check_tiled_head_supports

    sys.argv = [sys.argv[0], *job.argv]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = parse_args()
    except SystemExit as error:  # argparse, after hundreds of lines of usage
        last = complaint.getvalue().strip().rpartition("error: ")[2]
        raise ValueError(f"{last}: --help shows our options, --megatron-help Megatron's") from error
    refusals.refuse_flags(args)
    try:
        validate_args(args)
    except AssertionError as error:
        asserted = traceback.extract_tb(error.__traceback__)[-1].line  # many of upstream's say no more
        raise ValueError(f"Megatron refuses these flags: {str(error) or asserted}") from error
    for name, value in vars(job.options).items():
        setattr(args, name, value)
    refusals.check_megatron_arguments(args, job.manifest)
    job.model.check_arguments(args)
    if args.pipeline_model_parallel_size > 1 and args.micro_batch_size > 1:
        # Rows of a micro-batch are flattened into one, so pipeline stages must announce their shapes;
        # upstream allows that with this dispatcher alone, which a model without experts never calls
        args.variable_seq_lengths = True
        args.moe_token_dispatcher_type = "alltoall"
    config = gpt_config_from_args(args)
    # 0.19.2 reads --use-rope-scaling but leaves the factor at 8: Llama 3.2, which has 32, would be damaged
    config.rope_scaling_factor = args.rope_scaling_factor
    if args.loss_head == "tiled":
        check_tiled_head_supports(config.transformer)
    if args.transformer_impl == "local":
        check_packed_attention_supports(config.transformer)
        if "cpu_runtime" not in _loaded_runtimes() and not (args.bf16 or args.fp16):
            raise ValueError(
                "torch's variable-length attention kernel needs half precision: add --bf16, or install "
                "Transformer Engine"
            )
    return args, config


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(message: str) -> None:
    if _rank() == 0:
        print(f"megatron_exact: {message}", flush=True)


def _fail(error: Exception) -> int:
    """One line for the user.

    Before the ranks have met, most errors are seen by all of them: rank 0 tells at once and torchrun ends
    the others while they wait here; one that fails alone, on another node perhaps, tells a little later.
    """
    if _rank() == 0 and not torch.distributed.is_initialized():
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
    else:
        if not torch.distributed.is_initialized():
            time.sleep(3)
        print(f"error: rank {_rank()}: {describe(error)}", file=sys.stderr, flush=True)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code."""
    try:
        run_job(prepare_job(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        if os.environ.get("MEGATRON_EXACT_TRACEBACK") == "1":
            traceback.print_exc()
        return _fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
