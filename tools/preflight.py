#!/usr/bin/env python3
"""Examine a training run before it costs anything: will it start, fit, and find its checkpoints?

Takes the very arguments of the run. Needs no GPU and no process group, builds no model, and takes about as
long as importing Megatron. What it looks at: the arguments (by Megatron's own validation), the layout
against the number of GPUs and the model, pack, tokenizer and checkpoint against each other, what a restart
would find, memory of each pipeline stage, room on disk, tokens and hours. Where the layout does not divide
or does not fit, one that does is proposed. Memory is a forecast by formula; its reserve covers what the
formulas do not know: CUDA's own, NCCL's buffers, fragmentation.

Exit code 0 if no line says FAILED.
"""

from __future__ import annotations

import argparse

from megatron_exact.command_line import ToolParser, positive_int, run_tool

EPILOG = """\
examples:

  preflight.py --recipe llama3.1_8b_16k --pack packs/16k --save runs/exact --load runs/exact \\
      --pretrained-checkpoint runs/8k --token-weighting exact

  preflight.py --world-size 16 --gpu-memory-gib 40 --pack packs/16k --preset llama-3.1-8b \\
      --tensor-model-parallel-size 4 --bf16 --global-batch-size 32 --train-iters 2048 --lr 1e-5
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
    parser.add_argument("--gpus-per-node", type=positive_int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--gpu-memory-gib", type=float, default=80.0, help="GiB of a card (default: %(default)s)"
    )
    parser.add_argument(
        "--reserve-gib",
        type=float,
        default=6.0,
        help="GiB of each card that a run may not fill (default: %(default)s, assumed)",
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
    return parser


def main() -> int:
    """Run the tool."""
    arguments, run = build_parser().parse_known_args()
    from megatron_exact.training.job import chosen_recipe
    from megatron_exact.training.memory_forecast import Cluster
    from megatron_exact.training.preflight import examine, format_examination

    recipe = chosen_recipe(run)
    if arguments.world_size is None and recipe is None:
        raise ValueError("--world-size is missing: say on how many GPUs the run will be")
    cluster = Cluster(
        world_size=arguments.world_size or recipe.world_size,
        gpus_per_node=arguments.gpus_per_node,
        gpu_memory_gib=arguments.gpu_memory_gib,
        reserve_gib=arguments.reserve_gib,
        peak_tflops=arguments.peak_tflops,
        assumed_mfu=arguments.assumed_mfu,
    )
    found = examine(run, cluster)
    print(format_examination(found))
    return 0 if found.passed else 1


if __name__ == "__main__":
    run_tool(main)
