"""Entry point of a training job: `torchrun -m megatron_exact.training.pretrain --pack DIR ...`.

Upstream's `megatron.training.pretrain`, unforked, runs the job. This file decides, before Megatron is
imported, what the job is (pack, weights, start, machine), so that bad input costs a second, not a start-up.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_exact.command_line import describe
from megatron_exact.data.manifest import Manifest, read_manifest, verify_arrays
from megatron_exact.exposure import Weighting
from megatron_exact.training import arguments
from megatron_exact.training.start import Start, checkpoint_identity, choose_start


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
        _show_megatron_help()
    if options.pack is None:
        raise ValueError("--pack is missing: name a packed dataset (tools/pack_corpus.py makes one)")
    manifest = read_manifest(options.pack)
    arguments.compare_with_pack(megatron_argv, manifest)
    weighting = arguments.weighting_of(options, manifest)
    save = arguments.flag_value(megatron_argv, "--save")
    step = arguments.flag_value(megatron_argv, "--ckpt-step")
    start = choose_start(
        arguments.flag_value(megatron_argv, "--load"),
        save,
        arguments.flag_value(megatron_argv, "--pretrained-checkpoint"),
        int(step) if step is not None else None,
    )
    _say(start.message)
    if _rank() == 0:
        verify_arrays(options.pack, manifest)  # once a job; the other ranks wait for rank 0 at start-up
    run_dir = options.run_dir or save
    if run_dir is None:
        _say("neither --save nor --run-dir is given: no run.json and no losses.jsonl")
    folder = Path(run_dir) if run_dir is not None else None
    full_argv = arguments.megatron_arguments(
        megatron_argv,
        manifest,
        runtime_arguments=_activate_runtime(options),
        start=start.arguments(),
        run_dir=folder,
    )
    return Job(
        options=options,
        manifest=manifest,
        weighting=weighting,
        start=start,
        run_dir=folder,
        argv=full_argv,
    )


def _activate_runtime(options: argparse.Namespace) -> tuple[str, ...]:
    if torch.cuda.is_available() and not options.cpu and "cpu_runtime" not in _loaded_runtimes():
        return ()
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
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args, parse_args

    from megatron_exact.model.layer_specs import check_packed_attention_supports, layer_spec
    from megatron_exact.training import substitutions
    from megatron_exact.training.run import TrainingRun
    from megatron_exact.training.run_record import describe_run

    sys.argv = [sys.argv[0], *job.argv]
    arguments.refuse_flags(parse_args())
    try:
        args = parse_and_validate_args()
    except AssertionError as error:
        asserted = traceback.extract_tb(error.__traceback__)[-1].line  # many of upstream's say no more
        raise ValueError(f"Megatron refuses these flags: {str(error) or asserted}") from error
    for name, value in vars(job.options).items():
        setattr(args, name, value)
    arguments.check_megatron_arguments(args, job.manifest)
    # Rows of a micro-batch are flattened into one, so pipeline stages must announce their shapes
    args.variable_seq_lengths = args.pipeline_model_parallel_size > 1 and args.micro_batch_size > 1
    args.moe_token_dispatcher_type = "alltoall"  # upstream's condition for variable lengths
    config = gpt_config_from_args(args)
    if args.transformer_impl == "local":
        check_packed_attention_supports(config.transformer)
    identity = None
    if _rank() == args.world_size - 1:  # the rank that writes run.json
        identity = checkpoint_identity(job.start)
    record = describe_run(args, job.weighting, job.manifest.fingerprint, identity)
    run = TrainingRun(args, job.manifest, job.weighting, job.run_dir, record, is_resume=job.start.is_resume)
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


def _show_megatron_help() -> None:
    from megatron.training.arguments import parse_args

    sys.argv = [sys.argv[0], "--help"]
    parse_args()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(message: str) -> None:
    if _rank() == 0:
        print(f"megatron_exact: {message}", flush=True)


def _fail(error: Exception) -> int:
    """One line for the user. Before the ranks have met, all of them see the same: rank 0 tells."""
    if torch.distributed.is_initialized():
        print(f"error: rank {_rank()}: {describe(error)}", file=sys.stderr, flush=True)
    elif _rank() == 0:
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when the first one fails: let rank 0 speak
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
