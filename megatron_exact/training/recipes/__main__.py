"""List the recipes, or show one: every field, its value and what the paper says about it."""

from __future__ import annotations

import argparse
import shlex
import textwrap

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.training.recipes.fields import flat_fields
from megatron_exact.training.recipes.registry import RECIPES, chain_of, find_recipe

EPILOG = """\
examples:

  python -m megatron_exact.training.recipes
  python -m megatron_exact.training.recipes llama3.1_8b_16k
  python -m megatron_exact.training.pretrain --recipe llama3.1_8b_16k --print-arguments
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments."""
    parser = ToolParser(
        prog="python -m megatron_exact.training.recipes",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", metavar="NAME", help="the recipe to show (default: list all)")
    return parser


def recipe_table() -> list[str]:
    """One line a recipe."""
    lines = [f"{'recipe':<24}{'rows':>7}{'GPUs':>6}{'iterations':>12}{'tokens':>10}  layout"]
    for name in RECIPES:
        recipe = find_recipe(name)
        flags = dict(recipe.flags())
        lines.append(
            f"{name:<24}{recipe.row_tokens:>7}{recipe.world_size:>6}{flags['--train-iters']:>12}"
            f"{recipe.schedule.budget_tokens / 1e9:>9.2f}B  {recipe.layout.describe()}"
        )
    return lines


def recipe_text(name: str) -> list[str]:
    """All of one recipe.

    Raises:
        ValueError: an unknown name.
    """
    recipe = find_recipe(name)
    lines = [f"{name}: {(RECIPES[name].__doc__ or '').strip()}", f"chain: {' > '.join(chain_of(name))}", ""]
    for field, value, text in flat_fields(recipe):
        lines.append(f"{field} = {value}")
        lines += textwrap.wrap(text, width=100, initial_indent="    ", subsequent_indent="    ")
    packs = [shlex.join(find_recipe(stage).pack_command()) for stage in chain_of(name)]
    return [*lines, "", "the packs of its chain:", *(f"    {command}" for command in packs)]


def main() -> None:
    """Run the tool."""
    name = build_parser().parse_args().recipe
    print("\n".join(recipe_table() if name is None else recipe_text(name)))


if __name__ == "__main__":
    run_tool(main)
