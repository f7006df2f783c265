"""Options that trade memory for time, on the null device: what each makes of a recipe's peak.

Rehearses the first rank of a recipe at full size with each option, on this machine without a GPU, and
writes docs/memory_options.md. Where Transformer Engine is installed (`make te-setup`), the recipes run on
its layers, as on a cluster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import REPOSITORY, provenance

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.files import write_text
from megatron_exact.rehearsal.rehearse import rehearse
from megatron_exact.training.layout import Layout
from megatron_exact.training.memory_forecast import GIB, Cluster, relative_cost
from megatron_exact.training.recipes import Recipe, find_recipe

EPILOG = """examples:
  python benchmarks/memory_options.py --results options.jsonl   # a few minutes a recipe
  python benchmarks/memory_options.py --results one.jsonl --only llama3.1_8b_16k --output one.md
"""
RECIPES = ("llama3.1_8b_16k", "qwen2.5_3b_8k", "llama3.1_8b_64k")
"""The paper's largest stage, and those that need the most memory with and without tensor parallelism."""
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "core_attn": (*SELECTIVE, "core_attn"),
    "mlp": (*SELECTIVE, "mlp"),
    "full": FULL,
    "half TP": (),
    "half TP, full": FULL,
    "fp8 tensorwise": ("--recipe-set", "eight_bit=tensorwise"),
}
"""Name of an option -> its flags, added to the recipe's; "half TP" also halves tensor parallelism."""
HALF = "half TP"
OUT_OF_MEMORY = "OutOfMemoryError"
LABELS = {
    "none": "the recipe",
    "core_attn": "recompute selective, core_attn",
    "mlp": "recompute selective, mlp",
    "full": "recompute full",
    "half TP": "half the tensor parallelism",
    "half TP, full": "half the tensor parallelism, recompute full",
    "fp8 tensorwise": "8 bits, tensorwise scales",
}
"""Name of an option -> its words on the page."""


def option_flags(recipe: Recipe, option: str) -> list[str] | None:
    """Return the flags of an option, or None where the recipe cannot have it."""
    flags = list(OPTIONS[option])
    if option.startswith(HALF):
        half, rest = divmod(recipe.layout.tensor_parallel, 2)
        if rest or not half:
            return None
        flags += ["--recipe-set", f"tensor_parallel={half}"]
        if half == 1:
            flags += ["--recipe-set", "sequence_parallel=false"]
    return flags


def step_cost(recipe: Recipe, option: str) -> float:
    """Return the forecast's time of a step relative to the recipe's own."""
    own = recipe.layout
    kind = "full" if option.endswith("full") else "selective" if option in ("core_attn", "mlp") else "none"
    tensor = own.tensor_parallel // 2 if option.startswith(HALF) else own.tensor_parallel
    other = Layout(
        tensor_parallel=tensor,
        pipeline_parallel=own.pipeline_parallel,
        context_parallel=own.context_parallel,
        sequence_parallel=tensor > 1,
        recompute=kind,  # type: ignore[arg-type]
    )

    def cost(layout: Layout) -> float:
        rows = recipe.schedule.global_batch_tokens // recipe.row_tokens
        return relative_cost(layout, max(1, rows * layout.model_parallel // recipe.world_size))

    return cost(other) / cost(own)


def measure(names: Sequence[str], options: Sequence[str], results: Path) -> list[dict[str, Any]]:
    """Rehearse; a pair that is in `results` already is not repeated.

    Raises:
        ValueError: a job failed.
    """
    rows: list[dict[str, Any]] = []
    failures = []
    if results.is_file():
        rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    for name in names:
        recipe = find_recipe(name)
        for option in options:
            flags = option_flags(recipe, option)
            if flags is None or any((row["recipe"], row["option"]) == (name, option) for row in rows):
                continue
            found = rehearse(["--recipe", name, *flags], world_size=recipe.world_size, ranks=[0])
            key = {"recipe": name, "option": option, "cost": step_cost(recipe, option)}
            if any(OUT_OF_MEMORY in failure for failure in found.failures):
                rows.append({**key, "layers": found.layers, "allocated": None})
                _append(rows[-1], results)
                print(f"{name}, {option}: out of memory", flush=True)
                continue
            if found.failures:
                failures.append(f"{name}, {option}: {'; '.join(found.failures)}")
                print(failures[-1], flush=True)
                continue
            rank = found.ranks[0]
            rows.append(
                {
                    **key,
                    "layers": found.layers,
                    "allocated": rank.peak_allocated_gib,
                    "reserved": rank.peak_reserved_gib,
                    "formula": rank.forecast_gib,
                    "launches": rank.kernel_launches,
                }
            )
            _append(rows[-1], results)
            print(f"{name}, {option}: {rank.peak_allocated_gib:.2f} GiB", flush=True)
    if failures:
        raise ValueError("; ".join(failures))
    return rows


def _append(row: dict[str, Any], results: Path) -> None:
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the text of docs/memory_options.md."""
    usable = Cluster(world_size=8).usable_bytes / GIB
    lines = [
        "# Memory options of the recipes",
        "",
        "What recomputation, half the tensor parallelism and 8-bit products make of a recipe's peak.",
        "Each line is a [rehearsal](rehearsal.md) of the first rank at full size, on a CUDA device that",
        "computes nothing: the memory is that of torch's allocator, and nothing is said about speed or",
        "numbers: **no GPU kernel has run**. *Formula* is the forecast of `megatron-exact preflight`.",
        "*Relative cost* is the forecast's time of a step, the recipe as it is being 1: recomputing whole",
        "layers adds a third, parts of them 5 %; doubling the tensor parallelism is assumed to cost 5 %.",
        "What 8-bit products save in time was not measured.",
        "",
        f"Of a card's 80 GiB a job may fill {usable:.0f}, 6 are in reserve.",
        "",
        f"Layers: {rows[0]['layers']}.",
    ]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        recipe = find_recipe(name)
        lines += [
            "",
            f"## {name}",
            "",
            f"{recipe.layout.describe()}; {recipe.world_size} GPUs.",
            "",
            "| option | allocated | reserved | formula | difference | launches | fits | relative cost |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["recipe"] != name:
                continue
            cost = "" if row["option"].startswith("fp8") else f"{row['cost']:.2f}"
            if row["allocated"] is None:
                lines.append(f"| {LABELS[row['option']]} | out of memory | | | | | no | {cost} |")
                continue
            error = row["formula"] / row["allocated"] - 1
            lines.append(
                f"| {LABELS[row['option']]} | {row['allocated']:.2f} | {row['reserved']:.2f} | "
                f"{row['formula']:.2f} | {error:+.1%} | {row['launches']:,} | "
                f"{'yes' if row['reserved'] <= usable else 'no'} | {cost} |"
            )
    lines += [
        "",
        *provenance(),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="RECIPE", help="this one; repeatable")
    parser.add_argument("--option", action="append", choices=list(OPTIONS), help="this one; repeatable")
    parser.add_argument(
        "--results",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="a line for each rehearsal; those that are there are not repeated",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "docs" / "memory_options.md",
        help="the page (default: %(default)s)",
    )
    arguments = parser.parse_args()
    rows = measure(arguments.only or RECIPES, arguments.option or list(OPTIONS), arguments.results)
    write_text(arguments.output, page(rows))


if __name__ == "__main__":
    run_tool(main)
