"""What a job is: decided from its arguments, the pack and the checkpoint, before Megatron is imported.

Nothing here imports torch until the machine is chosen: what can be refused is refused in a second.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.data.manifest import Manifest, read_manifest, verify_arrays
from megatron_exact.data.score_files import check_shards
from megatron_exact.data.source_guards import check_sources
from megatron_exact.exposure import Weighting
from megatron_exact.training import arguments, refusals
from megatron_exact.training.checkpoints.start import Start, choose_start, is_own_folder, require_free_run
from megatron_exact.training.flag_classes import (
    GivenFlags,
    flags_without_effect,
    read_flags,
    refuse_flags,
)
from megatron_exact.training.job_model import JobModel, check_against_pack, choose_model
from megatron_exact.training.megatron_help import show_megatron_help
from megatron_exact.training.options import build_parser
from megatron_exact.training.recipes.expansion import expand_recipe
from megatron_exact.training.run_record import read_run_record
from megatron_exact.training.runtime import activate_runtime, rank, say
from megatron_exact.training.weighting_flags import refuse_unread


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


def prepare_job(
    argv: Sequence[str],
    *,
    choose_runtime: Callable[[argparse.Namespace], tuple[str, ...]] = activate_runtime,
    hold: Callable[[Sequence[Path]], None] = lambda _: None,
    trains: bool = True,
) -> Job:
    """Read and check all that needs neither Megatron nor torch, then choose the runtime of the machine.

    Args:
        argv: the command line of the job.
        choose_runtime: from our options, the Megatron flags that the machine dictates.
        hold: takes the leases of the folders that the job will write, before it looks at what they contain.
        trains: whether the job is going to train; then its schedule is checked.

    Raises:
        ValueError: cause, value and remedy.
    """
    words = expand_recipe(argv)
    options, megatron_argv, given = read_command_line(words)
    options.command_line = list(argv)  # for records: the same words start the job again
    if options.megatron_help:
        choose_runtime(options)
        show_megatron_help()
    refuse_flags(given)
    refuse_unread(words, [options.token_weighting])
    if options.pack is None:
        raise ValueError("--pack is missing: name a packed dataset (tools/pack_corpus.py makes one)")
    manifest = read_manifest(options.pack)
    arguments.compare_with_pack(megatron_argv, manifest)
    refusals.check_supervision(options.token_weighting, manifest)
    weighting = arguments.weighting_of(options, manifest)
    hold(_written_folders(megatron_argv, options))
    start, run_dir = _choose_start(megatron_argv, options)
    model = choose_model(options.preset, start.load, arguments.flag_value(megatron_argv, "--save"))
    model_flags = model.flags(megatron_argv)
    refusals.check_model_given(read_flags([*model_flags, *megatron_argv]), load=start.load)

    def whole_command_line(runtime_arguments: Sequence[str]) -> list[str]:
        return arguments.megatron_arguments(
            megatron_argv,
            manifest,
            runtime_arguments=runtime_arguments,
            start=start.arguments(),
            run_dir=run_dir,
            model_flags=model_flags,
            window=model.shape.max_position_embeddings if model.shape is not None else 0,
            eval_iters=_recorded_eval_iters(run_dir) if start.is_resume else None,
        )

    refusals.check_pack_has_rows(manifest)
    settled = read_flags(whole_command_line(()))
    refusals.check_combinations(settled)
    if trains:
        _check_training(settled, manifest)
    doubts = check_against_pack(model, manifest)
    for line in filter(None, (start.message, model.description, *doubts)):
        say(line)
    if rank() == 0:  # once a job; the other ranks wait for rank 0 at start-up
        verify_arrays(options.pack, manifest)
        if options.confidence_scores is not None:
            check_shards(options.confidence_scores, "train")
        notes = check_sources(
            Path(options.pack), manifest, options.source_root, verify_data=options.verify_data
        )
        for line in notes:
            say(line)
    if run_dir is None:
        say("neither --save nor --run-dir is given: no run.json and no losses.jsonl")
    runtime_arguments = choose_runtime(options)
    full_argv = whole_command_line(runtime_arguments)
    refusals.check_machine(read_flags(full_argv), is_cpu="gloo" in runtime_arguments)
    if trains:
        for line in _announcements(argv, read_flags(full_argv), manifest):
            say(line)
    return Job(
        options=options,
        manifest=manifest,
        weighting=weighting,
        start=start,
        model=model,
        run_dir=run_dir,
        argv=full_argv,
    )


def _written_folders(argv: Sequence[str], options: argparse.Namespace) -> list[Path]:
    """Folders of checkpoints and records, each once."""
    named = (arguments.flag_value(argv, "--save"), options.run_dir)
    return list({Path(name).resolve(): Path(name) for name in named if name is not None}.values())


def read_command_line(words: Sequence[str]) -> tuple[argparse.Namespace, list[str], GivenFlags]:
    """Our own options, Megatron's flags as words, and what they say.

    Args:
        words: a command line, recipes expanded.

    Raises:
        ValueError: a flag that nobody knows, or a value of another kind.
    """
    parser = build_parser()
    options, megatron_argv = parser.parse_known_args(words)
    ours = [spelling for action in parser._actions for spelling in action.option_strings]
    return options, megatron_argv, read_flags(megatron_argv, ours=ours)


def _check_training(job: GivenFlags, manifest: Manifest) -> None:
    """Schedule, checkpoints and evaluations.

    Raises:
        ValueError: cause, value and remedy.
    """
    length = refusals.check_schedule(job)
    refusals.check_saving(job)
    refusals.check_evaluation_start(job, length)
    refusals.check_evaluation_rows(
        eval_iters=job.whole("--eval-iters", 0), batch=length.batch_rows, manifest=manifest
    )


def _announcements(argv: Sequence[str], job: GivenFlags, manifest: Manifest) -> Iterator[str]:
    """What is said once at the start about the user's flags and the evaluations."""
    _, _, user = read_command_line(argv)  # without a recipe's: those are ours
    idle = flags_without_effect(user, job)
    if idle:
        yield f"without effect here: {'; '.join(idle)}"
    yield arguments.describe_evaluations(job, refusals.length_of(job), manifest)


def _recorded_eval_iters(run_dir: Path | None) -> int | None:
    """Iterations of an evaluation when the run began: every evaluation of a run reads the same rows."""
    record = read_run_record(run_dir) if run_dir is not None else None
    schedule = record.get("schedule") if isinstance(record, dict) else None
    recorded = schedule.get("eval_iters") if isinstance(schedule, dict) else None
    return recorded if isinstance(recorded, int) and recorded >= 0 else None


def _choose_start(argv: Sequence[str], options: argparse.Namespace) -> tuple[Start, Path | None]:
    """What the user's flags say about the beginning, and the folder of the run's records.

    Raises:
        ValueError: no intact checkpoint where there has to be one, or a run in the way.
    """
    load, save, step = (arguments.flag_value(argv, flag) for flag in ("--load", "--save", "--ckpt-step"))
    start = choose_start(
        load,
        save,
        arguments.flag_value(argv, "--pretrained-checkpoint"),
        _iteration(step),
        needs_integrity=not options.skip_integrity_check,
        run_dir=options.run_dir,
    )
    if options.carry_optimizer:
        start = start.carrying_optimizer()
    if start.is_resume and arguments.has_flag(argv, "--finetune"):
        raise ValueError(
            f"--finetune with --load equal to --save would begin the run of {save} again: drop --finetune "
            "to go on with it, or choose another --save"
        )
    folder = options.run_dir or save
    require_free_run(save, folder, start, is_own=is_own_folder(load, save))
    return start, Path(folder) if folder is not None else None


def _iteration(step: str | None) -> int | None:
    if step is not None and re.fullmatch(r"[0-9]{1,18}", step) is None:
        raise ValueError(f"--ckpt-step {step[:40]!r} is no iteration: give the number of a checkpoint")
    return None if step is None else int(step)
