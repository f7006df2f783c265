"""`--recipe NAME` on a command line: the recipe's flags, then the user's, which win.

A recipe's flag is left out where the user gives it, or another flag that decides the same thing, and where
the weighting rule does not read it; what is left holds each of them once.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_exact.command_line import positive_int
from megatron_exact.training.arguments import flag_value
from megatron_exact.training.options import build_parser
from megatron_exact.training.recipes.fields import change_fields
from megatron_exact.training.recipes.recipe import Flag, Recipe
from megatron_exact.training.recipes.registry import find_recipe
from megatron_exact.training.weighting_flags import unread_flags

RECOMPUTE = ("granularity", "method", "num-layers", "modules")
INTERLEAVING = ("num-virtual-stages-per-pipeline-rank", "num-layers-per-virtual-pipeline-stage")
ALTERNATIVES: tuple[frozenset[str], ...] = (
    frozenset(("--train-iters", "--train-samples")),
    frozenset(("--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction")),
    frozenset(("--bf16", "--fp16")),
    frozenset(("--recompute-activations", *(f"--recompute-{word}" for word in RECOMPUTE))),
    frozenset(("--pipeline-model-parallel-layout", *(f"--{word}" for word in INTERLEAVING))),
)
"""Flags of which the user's one replaces all of the recipe's."""
OWN_OPTIONS = frozenset(("--recipe", "--recipe-set"))


def chosen_recipe(argv: Sequence[str]) -> Recipe | None:
    """The recipe that a command line names, with its `--recipe-set` changes; None if it names none.

    Raises:
        ValueError: an unknown recipe or field, or changes without a recipe.
    """
    options, _ = build_parser().parse_known_args(list(argv))
    if options.recipe is None:
        if options.recipe_set:
            raise ValueError("--recipe-set changes a field of a recipe: name one with --recipe")
        return None
    return change_fields(find_recipe(options.recipe), options.recipe_set)


def expand_recipe(argv: Sequence[str]) -> list[str]:
    """The command line without `--recipe`; itself where there is none.

    Raises:
        ValueError: an unknown recipe, field or rule.
    """
    recipe = chosen_recipe(argv)
    if recipe is None:
        return list(argv)
    user = [word for group in flag_groups(argv) if group[0] not in OWN_OPTIONS for word in group]
    batch = flag_value(user, "--global-batch-size")
    flags = recipe.flags(batch_rows=positive_int(batch) if batch is not None else None)
    unread = unread_flags(flag_value(user, "--token-weighting") or dict(flags)["--token-weighting"] or "")
    return with_defaults([flag for flag in flags if flag[0] not in unread], user)


def with_defaults(defaults: Sequence[Flag], user: Sequence[str]) -> list[str]:
    """The user's words behind those defaults that they do not decide themselves."""
    given = {group[0] for group in flag_groups(user)}
    for flags in ALTERNATIVES:
        if given & flags:
            given |= flags
    words = []
    for flag, value in defaults:
        if flag not in given:
            words += [flag] if value is None else [flag, value]
    return [*words, *user]


def flag_groups(argv: Sequence[str]) -> list[list[str]]:
    """A flag and its values, one list each; `--flag=value` is taken apart."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append([flag, value] if equals else [flag])
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(f"{word!r} is no flag: flags begin with --")
    return groups
