#!/usr/bin/env python3
"""Rehearse a training run at full size without a GPU: does it start, fit, and where does it wait?

Takes the very arguments of the run. A CUDA device that computes nothing stands in for the card: torch's
CUDA code, its caching allocator, Megatron and this package run as on a GPU, as one rank of the world,
whose other ranks are absent. Reported are the peaks of memory by torch's own allocator, kernel launches,
waits of the host for the device and collectives of an iteration, beside the preflight's formula. Nothing
is said about speed, about the numbers of a kernel, or about NCCL. A machine that has an NVIDIA driver is
refused: run the job there.

Needs a C compiler (the device is compiled on first use) and torch's build for CUDA. Takes about a minute
a rank, and little memory. Without --pack a pack of random documents of the right shape is made.

Exit code 0 if the job ran on every rehearsed rank and fits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, run_tool

EPILOG = """\
examples:

  rehearse.py --recipe llama3.1_8b_16k_2nodes --stages --json rehearsal.json

  rehearse.py --world-size 16 --rank 9 --stock --preset llama-3.1-8b --seq-length 16384 --bf16 \\
      --tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer --token-weighting exact
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool; all others are the run's."""
    parser = ToolParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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


def main() -> int:
    """Run the tool."""
    arguments, run = build_parser().parse_known_args()
    from megatron_exact.files import write_json
    from megatron_exact.rehearsal.rehearse import format_rehearsal, rehearse
    from megatron_exact.training.job import chosen_recipe

    recipe = chosen_recipe(run)
    if arguments.world_size is None and recipe is None:
        raise ValueError("--world-size is missing: say on how many GPUs the run will be")
    found = rehearse(
        run,
        world_size=arguments.world_size or recipe.world_size,
        ranks=None if arguments.stages else [arguments.rank],
        iterations=arguments.iterations,
        with_stock=arguments.stock,
        log_folder=arguments.logs,
    )
    memory = arguments.gpu_memory_gib - arguments.reserve_gib
    print(format_rehearsal(found, memory_gib=memory))
    if arguments.json is not None:
        write_json(arguments.json, found.as_json())
    return 0 if not found.failures and found.largest_gib() <= memory else 1


if __name__ == "__main__":
    run_tool(main)
