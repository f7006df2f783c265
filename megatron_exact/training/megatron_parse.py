"""Megatron's validated namespace and model configuration for a job, and the command in printed form.

The steps are those of Megatron's `parse_and_validate_args`, with our checks between them. Nothing is built
or written yet.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_exact.command_line import describe
from megatron_exact.model.shapes import megatron_flags
from megatron_exact.training import refusals
from megatron_exact.training.arguments import build_parser
from megatron_exact.training.flag_classes import megatron_flags_by_spelling, read_flags, refuse_flags
from megatron_exact.training.job import Job, choose_model, chosen_recipe, expand_recipe, flag_groups
from megatron_exact.training.job_flags import flag_value, has_flag
from megatron_exact.training.layout import refuse_layout
from megatron_exact.training.qk_timing import settle_separate_qkv
from megatron_exact.training.recipes import Recipe
from megatron_exact.training.runtime import cpu_runtime_is_active, rank
from megatron_exact.training.weighting_options import refuse_unread

MODULE = "megatron_exact.training.pretrain"


def print_arguments(argv: Sequence[str]) -> None:
    """Print the whole command of a job for a shell, for `--print-arguments`.

    Neither the pack nor the world size is read.

    Raises:
        ValueError: an unknown recipe, field or preset, or flags that Megatron does not know or the rule
            does not read.
    """
    words = expand_recipe(argv)
    options, megatron_argv = build_parser().parse_known_args(words)
    refuse_unread(words, [options.token_weighting])
    refuse_flags(read_flags(megatron_argv))
    if rank() == 0:
        print(torchrun_command(argv))


def torchrun_command(argv: Sequence[str]) -> str:
    """Return the command that runs these arguments, for a shell, one flag a line.

    With a recipe, pack and folders, and the addresses of several nodes, are shell variables to set.

    Args:
        argv: the user's arguments.

    Raises:
        ValueError: an unknown recipe or field.
    """
    recipe = chosen_recipe(argv)
    words = [word for word in expand_recipe(argv) if word != "--print-arguments"]
    name = flag_value(words, "--preset")
    if name is not None:
        given = [group[0] for group in flag_groups(words)]
        options, _ = build_parser().parse_known_args(words)
        model = choose_model(
            name, None, None, rotary_base=options.change_rotary_base, yarn=options.change_rope_yarn
        )
        assert model.shape is not None
        words += megatron_flags(model.shape, without=given)
    lines = [f"torchrun {' '.join(_launcher(recipe))} -m {MODULE}"]
    lines += _placeholders(words) if recipe is not None else []
    last = {group[0]: group for group in flag_groups(words)}  # a flag given twice: the later one counts
    lines += [" ".join(map(shlex.quote, group)) for group in last.values()]
    return " \\\n    ".join(lines)


def _launcher(recipe: Recipe | None) -> list[str]:
    """Return torchrun's own flags."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // local if recipe is None else recipe.nodes
    flags = ["--nproc-per-node", str(local if recipe is None else recipe.gpus_per_node)]
    if nodes == 1:
        return ["--standalone", *flags]
    return [
        *("--nnodes", str(nodes), *flags, "--node-rank", '"${NODE_RANK:?number of this node}"'),
        *("--master-addr", '"${MASTER_ADDR:?name of node 0}"'),
        *("--master-port", '"${MASTER_PORT:-29500}"'),
    ]


def _placeholders(words: Sequence[str]) -> list[str]:
    """Return flags that a recipe cannot decide, each with a shell variable that must be set."""
    lines = []
    if not has_flag(words, "--pack"):
        lines.append('--pack "${PACK:?packed dataset of this row length}"')
    if not (has_flag(words, "--save") or has_flag(words, "--load")):
        lines += ['--save "${RUN:?folder of this run}"', '--load "${RUN}"']
        if not has_flag(words, "--pretrained-checkpoint"):
            lines.append('--pretrained-checkpoint "${START:?checkpoint to start from}"')
    return lines


def parse_for_megatron(job: Job) -> tuple[Any, Any]:
    """Return Megatron's validated namespace and model configuration of a job.

    Raises:
        ValueError: flags that Megatron does not know, or that Megatron or this package does not accept.
    """
    args = parse_flags(job.argv)
    return args, validate_flags(job, args)


def parse_flags(argv: Sequence[str]) -> Any:
    """Return Megatron's namespace, parsed but not validated.

    Raises:
        ValueError: flags that Megatron does not know.
    """
    from megatron.training.arguments import parse_args

    sys.argv = [sys.argv[0], *argv]
    complaint = io.StringIO()
    with in_one_line(argv):
        try:
            with contextlib.redirect_stderr(complaint):
                return parse_args()
        except SystemExit as error:  # argparse, after hundreds of lines of usage
            last = complaint.getvalue().strip().rpartition("error: ")[2]
            raise ValueError(f"{last}: --help shows our options, --megatron-help Megatron's") from error


def validate_flags(job: Job, args: Any) -> Any:
    """Validate Megatron's namespace, in place, and derive the model configuration.

    Args:
        job: the job.
        args: from `parse_flags`.

    Raises:
        ValueError: flags that Megatron or this package does not accept.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    from megatron_exact.model.context_parallel import move_rope_into_attention
    from megatron_exact.model.yarn import use_yarn

    refusals.check_rows_divide(args)
    refusals.check_eight_bit(args)
    with in_one_line(job.argv):
        refuse_layout(args)
        validate_args(args)
    for name, value in vars(job.options).items():
        setattr(args, name, value)
    yarn = job.model.yarn
    args.yarn = (
        None if yarn is None else asdict(yarn)
    )  # checkpoints contain the namespace, so no class of ours
    settle_separate_qkv(args)
    refusals.check_layers(args)
    refusals.check_context_parallel(args)
    refusals.check_evaluation_rows(
        eval_iters=args.eval_iters, batch=args.global_batch_size, manifest=job.manifest
    )
    job.model.check_arguments(args)
    scores_in_step = job.weighting.row_weights.in_step
    if scores_in_step:
        refusals.check_scores_in_step(args)
    if args.pipeline_model_parallel_size > 1 and (args.micro_batch_size > 1 or scores_in_step):
        # Rows of a micro-batch are flattened into one, and streams of short windows have different lengths,
        # so pipeline stages must announce their shapes. Megatron allows that with this dispatcher alone,
        # which a model without experts never calls
        args.variable_seq_lengths = True
        args.moe_token_dispatcher_type = "alltoall"
    with in_one_line(job.argv):
        config = gpt_config_from_args(args)
    # 0.19.2 reads --use-rope-scaling but leaves the factor at 8: Llama 3.2, which has 32, would be damaged
    config.rope_scaling_factor = args.rope_scaling_factor
    use_yarn(config, yarn, args.rotary_base)
    if args.context_parallel_size > 1:
        move_rope_into_attention(config)
    is_ours = args.transformer_impl == "local" or args.context_parallel_size > 1
    if is_ours and not cpu_runtime_is_active() and not (args.bf16 or args.fp16):
        raise ValueError(
            "torch's variable-length attention kernel needs half precision: add --bf16, or install "
            "Transformer Engine and drop --context-parallel-size"
        )
    return config


@contextlib.contextmanager
def in_one_line(argv: Sequence[str], what: str = "Megatron does not accept these flags") -> Iterator[None]:
    """Turn any error of Megatron about its arguments into a ValueError of one line.

    Most of Megatron's checks are assertions, many without a message; others fail on an attribute that a
    flag left unset. The line names those of the given flags that the message or the failing statement
    mentions.

    Args:
        argv: the whole Megatron command line.
        what: the beginning of the line.

    Raises:
        ValueError: Megatron's message, or else the statement that failed.
    """
    try:
        yield
    except ValueError as error:
        if "/megatron/" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise  # an error of ours has its message already
        raise ValueError(f"{what}: {_explain(error, argv)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: {_explain(error, argv)}") from error


def _explain(error: BaseException, argv: Sequence[str]) -> str:
    statement = _failing_statement(error)
    message = str(error).strip()
    if not message or not isinstance(error, AssertionError | ValueError | RuntimeError | ImportError):
        message = f"{describe(error)} ({statement})" if message else statement
    given = _mentioned_flags(f"{message} {statement}", argv)
    named = f" (given: {', '.join(given)})" if given else ""
    return f"{' '.join(message.split())}{named}"


def _failing_statement(error: BaseException) -> str:
    """Return the source of the innermost statement on one line, such as `assert args.x is not None`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = frame.lineno or 0
    lines = (
        linecache.getline(frame.filename, number)
        for number in range(first, (frame.end_lineno or first) + 1)
    )
    return " ".join(" ".join(lines).split())


def _mentioned_flags(text: str, argv: Sequence[str]) -> list[str]:
    """Return those of the given flags that a text mentions, as a flag or as a Python argument."""
    words = set(re.findall(r"[a-z][a-z0-9_]+", text.replace("-", "_").lower()))
    known, given = megatron_flags_by_spelling(), read_flags(argv)
    return [
        given.text(name)
        for name in given
        if any(spelling.removeprefix("--").replace("-", "_") in words for spelling in known[name].spellings)
    ]
