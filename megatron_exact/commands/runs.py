"""The verbs of training jobs: `preflight`, `rehearse`, `check-masking`, `stages`, `status` and `fine-tune`.

Each takes options of its own, and hands every other argument to the job, which knows Megatron's flags.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_exact.command_line import ToolParser, command_parser, positive_int

PREFLIGHT_RESERVE_GIB = 6.0
PREFLIGHT_EXAMPLES = """\
examples:

  %(prog)s --recipe llama3.1_8b_16k --pack packs/16k --save runs/exact --load runs/exact \\
      --pretrained-checkpoint runs/8k --token-weighting exact

  %(prog)s --world-size 16 --gpu-memory-gib 40 --pack packs/16k --preset llama-3.1-8b \\
      --tensor-model-parallel-size 4 --bf16 --global-batch-size 32 --train-iters 2048 --lr 1e-5
"""


def preflight_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `preflight`; all other arguments are the run's."""
    parser = command_parser(preflight, prog, PREFLIGHT_EXAMPLES, allow_abbrev=False)
    parser.add_argument("--world-size", type=positive_int, help="GPUs in all (default: the recipe's)")
    parser.add_argument("--gpus-per-node", type=positive_int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--gpu-memory-gib", type=float, default=80.0, help="GiB of a card (default: %(default)s)"
    )
    parser.add_argument(
        "--reserve-gib",
        type=float,
        help="GiB of each card that a run may not fill (default: 6, assumed; for --rehearse, which sees "
        "fragmentation, 3)",
    )
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of a card (default: %(default)s, H100 SXM, bf16)"
    )
    parser.add_argument(
        "--assumed-mfu",
        type=float,
        default=0.4,
        metavar="FRACTION",
        help="share of the peak that the model's own operations reach (default: %(default)s, assumed)",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="then run the job's CUDA code at full size without a GPU, a rank of each pipeline stage "
        "(`rehearse`): about a minute a stage, on a machine without an NVIDIA driver; only if no line says "
        "FAILED",
    )
    return parser


def _world_size(arguments: argparse.Namespace, run: Sequence[str]) -> int:
    from megatron_exact.training.job import chosen_recipe

    recipe = chosen_recipe(run)
    size: int | None = arguments.world_size or (recipe.world_size if recipe is not None else None)
    if size is None:
        raise ValueError("--world-size is missing: say on how many GPUs the run will be")
    return size


def preflight(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Examine a training run before it costs anything: will it start, fit, and find its checkpoints?

    Takes the arguments of the run itself. It needs no GPU and no process group, builds no model, and
    takes about as long as importing Megatron. It examines the arguments (by Megatron's own validation),
    the layout against the number of GPUs and the model, pack, tokenizer and checkpoint against each
    other, what a restart would find, memory of each pipeline stage, room on disk, tokens and hours.
    Where the layout does not divide or does not fit, it proposes one that does. Memory is a forecast by
    formula; its reserve covers what the formulas do not know: CUDA's own, NCCL's buffers,
    fragmentation.

    The exit code is 0 if no line says FAILED.
    """
    arguments, run = preflight_parser(prog).parse_known_args(words)
    from megatron_exact.training.memory_forecast import Cluster
    from megatron_exact.training.preflight import examine, format_examination

    world_size = _world_size(arguments, run)
    cluster = Cluster(
        world_size=world_size,
        gpus_per_node=arguments.gpus_per_node,
        gpu_memory_gib=arguments.gpu_memory_gib,
        reserve_gib=PREFLIGHT_RESERVE_GIB if arguments.reserve_gib is None else arguments.reserve_gib,
        peak_tflops=arguments.peak_tflops,
        assumed_mfu=arguments.assumed_mfu,
    )
    found = examine(run, cluster)
    print(format_examination(found), flush=True)
    if not arguments.rehearse:
        return 0 if found.passed else 1
    if not found.passed:
        print("not rehearsed: mend what FAILED first (`megatron-exact rehearse` itself needs no pack)")
        return 1
    # in a process of its own: the null device has to be there before torch is imported
    command = [sys.executable, "-m", "megatron_exact", "rehearse", "--stages"]
    command += ["--world-size", str(world_size), "--gpu-memory-gib", f"{cluster.gpu_memory_gib:g}"]
    if arguments.reserve_gib is not None:
        command += ["--reserve-gib", f"{arguments.reserve_gib:g}"]
    print(flush=True)
    return subprocess.run([*command, *run], check=False).returncode


REHEARSE_EXAMPLES = """\
examples:

  %(prog)s --recipe llama3.1_8b_16k_2nodes --stages --json rehearsal.json

  %(prog)s --world-size 16 --rank 9 --stock --preset llama-3.1-8b --seq-length 16384 --bf16 \\
      --tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer \\
      --token-weighting exact
"""


def rehearse_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `rehearse`; all other arguments are the run's."""
    parser = command_parser(rehearse, prog, REHEARSE_EXAMPLES, allow_abbrev=False)
    parser.add_argument("--world-size", type=positive_int, help="GPUs in all (default: the recipe's)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, default=0, help="the rank to rehearse (default: %(default)s)")
    which.add_argument("--stages", action="store_true", help="the first rank of every pipeline stage")
    parser.add_argument(
        "--iterations",
        type=positive_int,
        default=1,
        help="after one of warm-up; the last is reported (default: %(default)s)",
    )
    parser.add_argument(
        "--stock", action="store_true", help="also with Megatron's own loss path, as a baseline"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the ranks print")
    parser.add_argument(
        "--gpu-memory-gib", type=float, default=80.0, help="GiB of a card (default: %(default)s)"
    )
    parser.add_argument(
        "--reserve-gib",
        type=float,
        default=3.0,
        help="GiB of it that CUDA and NCCL take for themselves (default: %(default)s, assumed)",
    )
    return parser


def rehearse(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run a job's CUDA code at full size without a GPU: does it start, fit, and where does it wait?

    Takes the arguments of the run itself. A CUDA device that computes nothing stands in for the card:
    torch's CUDA code, its caching allocator, Megatron and this package run as on a GPU, as one rank of
    the world, whose other ranks are absent. It reports the peaks of memory by torch's own allocator,
    kernel launches, waits of the host for the device and collectives of an iteration, beside the
    preflight's formula. It says nothing about speed, the numbers of a kernel, or NCCL. It does not run
    on a machine with an NVIDIA driver: run the job there.

    It needs a C compiler (the device is compiled on first use) and torch's build for CUDA. It takes about
    a minute a rank, and little memory. Without --pack it makes a pack of random documents of the right
    shape.

    The exit code is 0 if the job ran on every rehearsed rank and fits.
    """
    arguments, run = rehearse_parser(prog).parse_known_args(words)
    from megatron_exact.files import write_json
    from megatron_exact.rehearsal.rehearse import format_rehearsal
    from megatron_exact.rehearsal.rehearse import rehearse as rehearse_job

    world_size = _world_size(arguments, run)
    found = rehearse_job(
        run,
        world_size=world_size,
        ranks=None if arguments.stages else [arguments.rank],
        iterations=arguments.iterations,
        with_stock=arguments.stock,
        log_folder=arguments.logs,
        card_gib=arguments.gpu_memory_gib,
    )
    memory = arguments.gpu_memory_gib - arguments.reserve_gib
    print(format_rehearsal(found, memory_gib=memory))
    if arguments.json is not None:
        write_json(arguments.json, found.as_json())
    return 0 if not found.failures and found.largest_gib() <= memory else 1


CHECK_MASKING_EXAMPLES = """\
all other arguments are those of the job (python -m megatron_exact.training.pretrain --help); examples:

  %(prog)s --pack packs/long --preset qwen2.5-0.5b
  torchrun --nproc-per-node 4 -m megatron_exact check-masking --pack packs/long \\
      --token-weighting exact --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \\
      --global-batch-size 8 --bf16 --pretrained-checkpoint checkpoints/qwen2.5-1.5b

Weights that were never trained mix documents less: give a checkpoint where there is one.
"""


def check_masking_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `check-masking`; all other arguments are the job's."""
    parser = command_parser(check_masking, prog, CHECK_MASKING_EXAMPLES, allow_abbrev=False)
    parser.add_argument(
        "--documents",
        type=positive_int,
        default=3,
        metavar="N",
        help="documents of a micro-batch to change and to isolate: first, longest, last, shortest, then "
        "the others; three forward passes each (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def check_masking(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Verify on a job's own arguments that no document of a packed row sees another.

    Builds the model exactly as the job would (layout, layer implementation, checkpoint, CPU or GPU),
    reads real rows of the pack, and compares the loss of every target:

      (a) one token of one document is changed: no loss of another document, and no earlier loss of the same
          one, may change by a single bit (where two equal runs differ: by more than four times as much);
      (b) each document alone gives the losses that it gave in its row (1e-4 nats in fp32, 0.03 in bf16);
      (c) controls: without the boundaries both measurements must exceed their bounds, or the check itself
          proves nothing.

    The exit code is 0 if all lines are ok, else 1. Nothing is trained or written to the run's folder.
    """
    arguments, job_argv = check_masking_parser(prog).parse_known_args(words)
    from megatron_exact.training.job_endings import exit_process
    from megatron_exact.training.masking_check import run

    sys.argv = sys.argv[:1]  # Megatron's parser reads it, and knows none of our options
    exit_process(run(job_argv, num_documents=arguments.documents, as_json=arguments.json))


STAGES_EXAMPLES = """\
examples:

  %(prog)s --recipe llama3.1_8b_16k --start checkpoints/llama-3.1-8b \\
      --pack packs/4k packs/8k packs/16k --output runs/llama

  %(prog)s --recipe llama3.1_8b_16k_4nodes --start checkpoints/llama-3.1-8b \\
      --pack packs/4k packs/8k packs/16k --output runs/llama --sbatch="--partition=gpu --time=12:00:00"

  %(prog)s --pack packs/256 packs/512 --start base --output runs/small --nproc-per-node 2 --dry-run \\
      --global-batch-size 8 --train-iters 100 --lr 1e-4 --lr-decay-style constant --save-interval 50
"""


def stages_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `stages`; all other arguments go to the runs."""
    parser = command_parser(stages, prog, STAGES_EXAMPLES, allow_abbrev=False)
    parser.add_argument("--pack", nargs="+", required=True, metavar="DIR", help="a packed dataset a stage")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all runs")
    parser.add_argument(
        "--start", metavar="CKPT", help="checkpoint of the first stage (megatron-exact import-hf)"
    )
    parser.add_argument("--recipe", metavar="NAME", help="recipe of the last stage")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["none", "exact"],
        metavar="RULE",
        help="token weighting of each arm (default: none exact)",
    )
    parser.add_argument(
        "--exact-tau",
        nargs="+",
        type=float,
        default=[],
        metavar="TOKENS",
        help="first effective context of the tail in each stage, shortest rows first, or one for all "
        "(default: a quarter of the row, the paper's)",
    )
    parser.add_argument(
        "--confidence-scores",
        nargs="+",
        default=[],
        metavar="DIR",
        help="scores of each pack (megatron-exact score), for arms that weigh by confidence "
        "(default: the model in training scores itself)",
    )
    parser.add_argument(
        "--same-documents",
        action="store_true",
        help="the stages are meant to read the same documents (default: each pack is a --corpus-slice of "
        "its own, and a warning says where it is not)",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=positive_int,
        metavar="N",
        help="ranks of a run (default: the recipe's)",
    )
    parser.add_argument(
        "--sbatch",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="submit the runs to SLURM as dependent jobs (examples/slurm/train.sbatch), with these options "
        "for every sbatch",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    return parser


def stages(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Train a chain of stages, 4K > 8K > 16K, in both arms from one start, with one command.

    Each stage starts from the last intact checkpoint of the stage before (weights with a fresh
    optimizer, or with --carry-optimizer its states too) and trains on its own pack, whose row length
    sets tau; the rotary embedding stays what the model's config says, unless --change-rotary-base
    or --change-rope-yarn changes it for every stage. The runs lie in OUTPUT/<arm>/<stage>. The same
    command again skips what is finished and resumes what is not.

    With --recipe the stages are those of the paper that lead to it. Without, each pack is a stage and
    the flags after the options are the same for all. Any further flag goes to every run, but a
    parameter of weighting (--exact-alpha, --confidence-kappa, ...) to the arms whose rule reads it.
    With --sbatch the runs become jobs of SLURM, each after the one it starts from.
    """
    options, arguments = stages_parser(prog).parse_known_args(words)
    from megatron_exact.training.stages import carry_out, plan_chain

    runs = plan_chain(
        options.pack,
        options.output,
        start=options.start,
        arms=options.arms,
        recipe=options.recipe,
        taus=options.exact_tau,
        scores=options.confidence_scores,
        arguments=arguments,
        same_documents=options.same_documents,
    )
    carry_out(runs, processes=options.nproc_per_node, sbatch=options.sbatch, dry_run=options.dry_run)


STATUS_EXAMPLES = """\
examples:

  %(prog)s runs
  %(prog)s runs/exact/16k runs/none/16k --json
"""


def status_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `status`."""
    parser = command_parser(status, prog, STATUS_EXAMPLES)
    parser.add_argument("folder", nargs="+", type=Path, metavar="FOLDER", help="of a run, or of runs")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def status(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Show how runs are doing: stage, arm, iteration, speed, time left, restarts, and the last line.

    It reads the files of the runs alone, so it works while jobs run and without SLURM. A run is a folder
    of --save, and FOLDER may contain many. The last line is that of the log while a job runs, and
    otherwise what ended it. For a stage that never began it is what ended the one before it.

    The exit code is 1 where the files of a run cannot be read.
    """
    arguments = status_parser(prog).parse_args(words)
    from megatron_exact.training.run_status import UNREADABLE, as_json, find_runs, read_status

    found = [read_status(run) for folder in arguments.folder for run in find_runs(folder)]
    if arguments.json:
        print(as_json(found))
    else:
        print("\n".join(line for one in found for line in one.describe()))
    return int(any(one.state == UNREADABLE for one in found))


FINE_TUNE_EXAMPLES = """\
examples:

  %(prog)s --pack packs/dolly --arm standard=runs/none/16k --arm exact=runs/exact/16k \\
      --output runs/qa --layout-of llama3.1_8b_16k

  %(prog)s --pack packs/qa-256 --arm standard=runs/none/512 --arm exact=runs/exact/512 \\
      --output runs/qa --nproc-per-node 2 --train-iters 60 --lr 1e-4 --dry-run

default schedule; a flag of the same meaning replaces a line:
"""


def fine_tune_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `fine-tune`, whose help ends with the schedule; others go to the runs."""
    from megatron_exact.training.recipes import QaSchedule, flat_fields

    schedule = [f"  {name} = {value}: {text}" for name, value, text in flat_fields(QaSchedule())]
    examples = FINE_TUNE_EXAMPLES + "\n".join(schedule)
    parser = command_parser(fine_tune, prog, examples, allow_abbrev=False)
    parser.add_argument(
        "--pack", required=True, metavar="DIR", help="records packed by megatron-exact pack-qa"
    )
    parser.add_argument(
        "--arm",
        action="append",
        required=True,
        metavar="NAME=CKPT",
        help="an arm and the run that it starts from; once for each",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all runs")
    parser.add_argument(
        "--layout-of",
        metavar="RECIPE",
        help="take layout, bf16 and number of GPUs from this recipe "
        "(list: python -m megatron_exact.training.recipes)",
    )
    parser.add_argument(
        "--nproc-per-node", type=positive_int, metavar="N", help="ranks of a run (default: the recipe's)"
    )
    parser.add_argument(
        "--sbatch",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="submit the runs to SLURM (examples/slurm/train.sbatch), with these options for every sbatch",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    return parser


def fine_tune(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Tune the arms of an experiment on question-answer records, alike, with one command.

    Each arm starts from the last intact checkpoint of its own continued pretraining and is trained on
    one pack of `megatron-exact pack-qa`, with one seed, schedule and layout, loss on the answers alone
    and no token weighting: 600 steps as in the paper, everything else as the defaults below say or any
    Megatron flag that is added. Starts that are not a pair (their run.json differ in more than the
    weighting) are an error. The runs lie in OUTPUT/<arm>; the same command again skips what is finished
    and resumes what is not.

    `megatron-exact export-hf` makes a Hugging Face folder of each, with the template of the records;
    evaluate it with `megatron-exact evaluate --template model`.
    """
    options, arguments = fine_tune_parser(prog).parse_known_args(words)
    from megatron_exact.training.fine_tuning import parse_arm, plan_fine_tuning
    from megatron_exact.training.stages import carry_out

    runs = plan_fine_tuning(
        options.pack,
        [parse_arm(text) for text in options.arm],
        options.output,
        layout_of=options.layout_of,
        arguments=arguments,
    )
    carry_out(runs, processes=options.nproc_per_node, sbatch=options.sbatch, dry_run=options.dry_run)
