"""`--print-arguments`: the whole command of a job, for a shell."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from megatron_exact.model.presets import megatron_flags, preset
from megatron_exact.training.arguments import flag_value, has_flag
from megatron_exact.training.flag_classes import read_flags, refuse_flags
from megatron_exact.training.options import build_parser
from megatron_exact.training.recipes.expansion import chosen_recipe, expand_recipe, flag_groups
from megatron_exact.training.recipes.recipe import Recipe
from megatron_exact.training.runtime import rank
from megatron_exact.training.weighting_flags import refuse_unread

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
