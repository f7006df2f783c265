#!/usr/bin/env python3
"""Train a chain of stages, 4K > 8K > 16K, in both arms from one start, with one command.

Each stage starts from the last intact checkpoint of the stage before (weights, with a fresh optimizer, or
with --carry-optimizer its states too) and trains on its own pack, whose row length sets tau; the rotary
embedding stays what the model's config says. The runs lie in OUTPUT/<arm>/<stage>. Called again, it skips
what is finished and goes on with what is not.

With --recipe the stages are those of the paper that lead to it. Without, each pack is a stage and the flags
after the options are the same for all. Any further flag goes to every run, but a parameter of weighting
(--exact-alpha, --confidence-kappa, ...) to the arms whose rule reads it. With --sbatch the runs become jobs
of SLURM, each after the one it starts from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, run_tool

EPILOG = """\
examples:

  run_stages.py --recipe llama3.1_8b_16k --start checkpoints/llama-3.1-8b \\
      --pack packs/4k packs/8k packs/16k --output runs/llama

  run_stages.py --recipe llama3.1_8b_16k_4nodes --start checkpoints/llama-3.1-8b \\
      --pack packs/4k packs/8k packs/16k --output runs/llama --sbatch="--partition=gpu --time=12:00:00"

  run_stages.py --pack packs/256 packs/512 --start base --output runs/small --nproc-per-node 2 --dry-run \\
      --global-batch-size 8 --train-iters 100 --lr 1e-4 --lr-decay-style constant --save-interval 50
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool; all others go to the runs."""
    parser = ToolParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--pack", nargs="+", required=True, metavar="DIR", help="a packed dataset a stage")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all runs")
    parser.add_argument(
        "--start", metavar="CKPT", help="checkpoint of the first stage (tools/import_hf.py)"
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
        help="scores of each pack (tools/score_tokens.py), for arms that weigh by confidence "
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


def main() -> None:
    """Run the tool."""
    options, arguments = build_parser().parse_known_args()
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


if __name__ == "__main__":
    run_tool(main)
