"""Every recipe on the null device: memory by torch's allocator beside the preflight's formula.

Rehearses the first rank of every pipeline stage of every recipe, at full size, on this machine without a
GPU, and writes docs/rehearsal.md. Where Transformer Engine is installed (`make te-setup`), the recipes run
on its layers, and the page is docs/rehearsal_transformer_engine.md.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import REPOSITORY, provenance

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.files import write_text
from megatron_exact.rehearsal.rehearse import rehearse
from megatron_exact.rehearsal.session import RankResult
from megatron_exact.training.recipes import RECIPES, find_recipe

EPILOG = """examples:
  python benchmarks/rehearsals.py                                  # all recipes, about ten minutes
  python benchmarks/rehearsals.py --only llama3.2_1b_4k --output one.md
"""
PHASES = ("start", "forward and backward", "optimizer", "save")
WITH_STOCK = ("qwen2.5_0.5b_4k", "llama3.1_8b_16k", "llama3.1_8b_16k_2nodes")
"""Recipes that are also rehearsed with Megatron's own loss path."""


PAGES = {False: "rehearsal.md", True: "rehearsal_transformer_engine.md"}
TITLE = "# Rehearsals of the recipes"
LOCAL = (
    "The tables are of the local layer implementation, because Transformer Engine is not installed",
    "where they were made; the formula is evaluated for the same kernels. Functions that Megatron",
    "compiles on a GPU run uncompiled here: a step has more launches and somewhat more memory than on",
    "a cluster.",
)
TRANSFORMER_ENGINE = (
    "The tables are of Transformer Engine's layers: its Python and C++ run, with",
    "its own allocations and workspaces. Only its attention is left out, which plans a kernel with cuDNN",
    "and needs a real card for that: its results are allocated, its workspace, which cuDNN alone knows, is",
    "missing here. Apex is not installed, so weight gradients are not summed in the matrix product.",
    "Functions that Megatron compiles on a GPU run uncompiled here: a step has more launches and somewhat",
    "more memory than on a cluster.",
)


def has_transformer_engine() -> bool:
    """Whether the recipes run on Transformer Engine's layers here."""
    return importlib.util.find_spec("transformer_engine") is not None


@dataclass(frozen=True)
class Row:
    """One rank of one recipe."""

    recipe: str
    """Its name."""
    layout: str
    """How it is spread."""
    rank: RankResult
    """What it showed."""
    stock: RankResult | None
    """The same with Megatron's own loss path, for some recipes."""

    @property
    def error(self) -> float:
        """Formula against allocator, relative."""
        return self.rank.forecast_gib / self.rank.peak_allocated_gib - 1


def measure(names: Sequence[str], logs: Path | None) -> list[Row]:
    """Rehearse recipes.

    Raises:
        ValueError: a job failed.
    """
    rows = []
    for name in names:
        recipe = find_recipe(name)
        folder = None if logs is None else logs / name
        found = rehearse(
            ["--recipe", name],
            world_size=recipe.world_size,
            ranks=None,
            with_stock=name in WITH_STOCK,
            log_folder=folder,
        )
        if found.failures:
            raise ValueError(f"{name}: {'; '.join(found.failures)}")
        layout = f"{recipe.layout.describe()}; {recipe.world_size} GPUs"
        stocks = found.stock or [None] * len(found.ranks)
        for rank, stock in zip(found.ranks, stocks, strict=True):
            rows.append(Row(name, layout, rank, stock))
            print(f"{name} {rank.rank}: {rank.peak_allocated_gib:.2f} {rows[-1].error:+.1%}", flush=True)
    return rows


def page(rows: Sequence[Row]) -> str:
    """The text of docs/rehearsal.md."""
    worst = max(rows, key=lambda row: abs(row.error))
    lines = [
        TITLE + (" with Transformer Engine" if has_transformer_engine() else ""),
        "",
        "`megatron-exact rehearse` runs a job's CUDA code at full size on a machine without a GPU. A CUDA",
        "device that computes nothing stands in for the card: torch's caching allocator, launches of",
        "kernels and calls of collectives are real, the other ranks are absent, and only operations that",
        "steer the job have values. Nothing here says anything about speed, the numbers of a kernel, or",
        "NCCL.",
        "",
        *(TRANSFORMER_ENGINE if has_transformer_engine() else LOCAL),
        "A rehearsed step has as many micro-batches as fill the pipeline, at least two.",
        "",
        "## Memory",
        "",
        "GiB on one GPU. *Allocated* is the most that tensors took, *reserved* the most that torch's",
        "allocator held; *formula* is the forecast of `megatron-exact preflight`. The columns at the right",
        "are the peaks of four phases; a save is followed until its files would be written.",
        "",
        "| recipe | layout | pipeline stage | allocated | reserved | formula | difference | "
        + " | ".join(PHASES)
        + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(PHASES),
    ]
    for row in rows:
        peaks = " | ".join(f"{row.rank.phase_peaks_gib[phase]:.2f}" for phase in PHASES)
        lines.append(
            f"| {row.recipe} | {row.layout} | {row.rank.pipeline_stage} | "
            f"{row.rank.peak_allocated_gib:.2f} | {row.rank.peak_reserved_gib:.2f} | "
            f"{row.rank.forecast_gib:.2f} | {row.error:+.1%} | {peaks} |"
        )
    lines += [
        "",
        f"The largest difference is {worst.error:+.1%} ({worst.recipe}, pipeline stage "
        f"{worst.rank.pipeline_stage}).",
        "",
        "## Launches and waits of one iteration",
        "",
        "The baseline is this package's own job with Megatron's loss path (`--loss-head stock`): data,",
        "attention, statistics and records are ours in both, so it is not Megatron without this package. A",
        "*wait* is a call in which the host waits for the device; *waits of ours* are those of this",
        "package's lines.",
        "",
        "| recipe | pipeline stage | micro-batches | launches | stock launches | waits | stock waits | "
        "waits of ours | memory with the stock loss path |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.stock is None:
            continue
        ours = sum(
            times for place, times in row.rank.synchronisation_places.items() if "megatron_exact/" in place
        )
        lines.append(
            f"| {row.recipe} | {row.rank.pipeline_stage} | {row.rank.micro_batches} | "
            f"{row.rank.kernel_launches:,} | {row.stock.kernel_launches:,} | "
            f"{row.rank.host_synchronisations} | {row.stock.host_synchronisations} | {ours} | "
            f"{row.stock.peak_allocated_gib:.2f} |"
        )
    plans = [row for row in rows if row.rank.attention_plans]
    if plans:
        lines += [
            "",
            "## Attention kernels that cuDNN plans",
            "",
            "cuDNN makes a plan for each pair of a number of segments and a longest segment.",
            "Both are rounded up to powers of two, so that there are few. These are all pairs of the",
            "rehearsed micro-batches, with the calls of the forward pass.",
            "",
            "| recipe | pipeline stage | segments x longest segment: calls |",
            "|---|---|---|",
        ]
    for row in plans:
        pairs = ", ".join(f"{pair}: {calls}" for pair, calls in row.rank.attention_plans.items())
        lines.append(f"| {row.recipe} | {row.rank.pipeline_stage} | {pairs} |")
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
    parser.add_argument(
        "--only", action="append", metavar="RECIPE", help="this one; several times for more"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "docs" / PAGES[has_transformer_engine()],
        help="the page (default: %(default)s)",
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the ranks print")
    arguments = parser.parse_args()
    names = arguments.only or list(RECIPES)
    write_text(arguments.output, page(measure(names, arguments.logs)))


if __name__ == "__main__":
    run_tool(main)
