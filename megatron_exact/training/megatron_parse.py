"""Megatron's parser on a job's arguments, and the printed form of a recipe."""

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
from typing import Any

from megatron_exact.command_line import describe
from megatron_exact.model.families import preset
from megatron_exact.model.shapes import megatron_flags
from megatron_exact.training import refusals
from megatron_exact.training.arguments import build_parser, flag_value, has_flag, refuse_unread
from megatron_exact.training.flag_classes import megatron_flags_by_spelling, read_flags, refuse_flags
from megatron_exact.training.job import Job, chosen_recipe, expand_recipe, flag_groups
from megatron_exact.training.layout import refuse_layout
from megatron_exact.training.qk_timing import settle_separate_qkv
from megatron_exact.training.recipes import Recipe
from megatron_exact.training.runtime import cpu_runtime_is_active, rank

# ----------------------------------------------------------------------------------------------------
# `--print-arguments`: the whole command of a job, for a shell.

MODULE = "megatron_exact.training.pretrain"


def print_arguments(argv: Sequence[str]) -> None:
    """Print the command that `argv` comes to; neither pack nor world size is looked at.

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
    """The command that runs these arguments, for a shell, one flag a line.

    With a recipe, what it cannot know (pack, folders, and with several nodes who is who) is a shell
    variable that must be set.

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
        words += megatron_flags(preset(name), without=given)
    lines = [f"torchrun {' '.join(_launcher(recipe))} -m {MODULE}"]
    lines += _placeholders(words) if recipe is not None else []
    last = {group[0]: group for group in flag_groups(words)}  # a flag given twice: the later one counts
    lines += [" ".join(map(shlex.quote, group)) for group in last.values()]
    return " \\\n    ".join(lines)


def _launcher(recipe: Recipe | None) -> list[str]:
    """torchrun's own flags."""
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
    lines = []
    if not has_flag(words, "--pack"):
        lines.append('--pack "${PACK:?packed dataset of this row length}"')
    if not (has_flag(words, "--save") or has_flag(words, "--load")):
        lines += ['--save "${RUN:?folder of this run}"', '--load "${RUN}"']
        if not has_flag(words, "--pretrained-checkpoint"):
            lines.append('--pretrained-checkpoint "${START:?checkpoint to start from}"')
    return lines


# ----------------------------------------------------------------------------------------------------
# From a job to Megatron's validated namespace and model configuration; nothing is built or written yet.
#
# The steps are those of upstream's `parse_and_validate_args`, with our checks between them.


def parse_for_megatron(job: Job) -> tuple[Any, Any]:
    """Megatron's validated namespace and model configuration.

    Raises:
        ValueError: flags that Megatron does not know, or that it or we refuse.
    """
    args = parse_flags(job.argv)
    return args, validate_flags(job, args)


def parse_flags(argv: Sequence[str]) -> Any:
    """Megatron's namespace, parsed but not validated.

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
        ValueError: what Megatron or we refuse.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    from megatron_exact.model.context_parallel import move_rope_into_attention

    refusals.check_rows_divide(args)
    with in_one_line(job.argv):
        refuse_layout(args)
        validate_args(args)
    for name, value in vars(job.options).items():
        setattr(args, name, value)
    settle_separate_qkv(args)
    refusals.check_megatron_arguments(args, job.manifest)
    job.model.check_arguments(args)
    scores_in_step = job.weighting.row_weights.in_step
    if scores_in_step:
        refusals.check_scores_in_step(args)
    if args.pipeline_model_parallel_size > 1 and (args.micro_batch_size > 1 or scores_in_step):
        # Rows of a micro-batch are flattened into one, and streams of short windows have lengths of their
        # own, so pipeline stages must announce their shapes;
        # upstream allows that with this dispatcher alone, which a model without experts never calls
        args.variable_seq_lengths = True
        args.moe_token_dispatcher_type = "alltoall"
    with in_one_line(job.argv):
        config = gpt_config_from_args(args)
    # 0.19.2 reads --use-rope-scaling but leaves the factor at 8: Llama 3.2, which has 32, would be damaged
    config.rope_scaling_factor = args.rope_scaling_factor
    if args.transformer_impl == "local":
        if args.context_parallel_size > 1:
            move_rope_into_attention(config)
        if not cpu_runtime_is_active() and not (args.bf16 or args.fp16):
            raise ValueError(
                "torch's variable-length attention kernel needs half precision: add --bf16, or install "
                "Transformer Engine"
            )
    return config


@contextlib.contextmanager
def in_one_line(argv: Sequence[str], what: str = "Megatron does not accept these flags") -> Iterator[None]:
    """Make a user's error of whatever Megatron raises about its arguments.

    Most of its checks are assertions, many without a word; others fall over an attribute that a flag left
    unset. The line names those of the given flags that the message or the failing statement speaks of.

    Args:
        argv: the whole Megatron command line.
        what: the beginning of the line.

    Raises:
        ValueError: what Megatron says, or else the statement that failed.
    """
    try:
        yield
    except ValueError as error:
        if not _is_megatrons(error):
            raise
        raise ValueError(f"{what}: {_explain(error, argv)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: {_explain(error, argv)}") from error


def _is_megatrons(error: BaseException) -> bool:
    return "/megatron/" in traceback.extract_tb(error.__traceback__)[-1].filename


def _explain(error: BaseException, argv: Sequence[str]) -> str:
    statement = _failing_statement(error)
    message = str(error).strip()
    if not message or not isinstance(error, AssertionError | ValueError | RuntimeError | ImportError):
        message = f"{describe(error)} ({statement})" if message else statement
    given = _flags_spoken_of(f"{message} {statement}", argv)
    named = f" (given: {', '.join(given)})" if given else ""
    return f"{' '.join(message.split())}{named}"


def _failing_statement(error: BaseException) -> str:
    """Source of the innermost statement, on one line: `assert args.x is not None`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = frame.lineno or 0
    lines = (
        linecache.getline(frame.filename, number)
        for number in range(first, (frame.end_lineno or first) + 1)
    )
    return " ".join(" ".join(lines).split())


def _flags_spoken_of(text: str, argv: Sequence[str]) -> list[str]:
    """Those of the given flags whose name stands in a text, as a flag or as an argument of Python."""
    words = set(re.findall(r"[a-z][a-z0-9_]+", text.replace("-", "_").lower()))
    known, given = megatron_flags_by_spelling(), read_flags(argv)
    return [
        given.text(name)
        for name in given
        if any(spelling.removeprefix("--").replace("-", "_") in words for spelling in known[name].spellings)
    ]
