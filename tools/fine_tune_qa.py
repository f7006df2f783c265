#!/usr/bin/env python3
"""Tune the arms of an experiment on question-answer records, alike, with one command.

Each arm starts from the last intact checkpoint of its own continued pretraining and is trained on one pack
of tools/pack_qa.py, with one seed, schedule and layout, loss on the answers alone and no token weighting:
600 steps as in the paper, everything else as the defaults below say or any Megatron flag that is added.
Starts that are no pair (their run.json differ in more than the weighting) are refused. The runs lie in
OUTPUT/<arm>; called again, the tool skips what is finished and goes on with what is not.

tools/export_hf.py makes a Hugging Face folder of each, with the template of the records; evaluate it with
tools/evaluate_model.py --template model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, run_tool

EPILOG = """\
examples:

  fine_tune_qa.py --pack packs/dolly --arm standard=runs/none/16k --arm exact=runs/exact/16k \\
      --output runs/qa --layout-of llama3.1_8b_16k

  fine_tune_qa.py --pack packs/qa-256 --arm standard=runs/none/512 --arm exact=runs/exact/512 \\
      --output runs/qa --nproc-per-node 2 --train-iters 60 --lr 1e-4 --dry-run

default schedule; a flag of the same meaning replaces a line:
"""


def build_parser(schedule: str = "") -> argparse.ArgumentParser:
    """Arguments of this tool; all others go to the runs."""
    parser = ToolParser(
        description=__doc__,
        epilog=EPILOG + schedule,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--pack", required=True, metavar="DIR", help="records packed by tools/pack_qa.py")
    parser.add_argument(
        "--arm",
        action="append",
        required=True,
        metavar="NAME=CKPT",
        help="an arm and the run that it starts from; once for each",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all runs")
    parser.add_argument(
        "--layout-of",
        metavar="RECIPE",
        help="take layout, bf16 and number of GPUs from this recipe "
        "(list: python -m megatron_exact.training.recipes)",
    )
    parser.add_argument(
        "--nproc-per-node", type=positive_int, metavar="N", help="ranks of a run (default: the recipe's)"
    )
    parser.add_argument(
        "--sbatch",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="submit the runs to SLURM (examples/slurm/train.sbatch), with these options for every sbatch",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    return parser


def main() -> None:
    """Run the tool."""
    from megatron_exact.training.recipes import QaSchedule, flat_fields

    lines = [f"  {name} = {value}: {text}" for name, value, text in flat_fields(QaSchedule())]
    options, arguments = build_parser("\n".join(lines)).parse_known_args()
    from megatron_exact.training.fine_tuning import parse_arm, plan_fine_tuning
    from megatron_exact.training.stages import carry_out

    runs = plan_fine_tuning(
        options.pack,
        [parse_arm(text) for text in options.arm],
        options.output,
        layout_of=options.layout_of,
        arguments=arguments,
    )
    carry_out(runs, processes=options.nproc_per_node, sbatch=options.sbatch, dry_run=options.dry_run)


if __name__ == "__main__":
    run_tool(main)
