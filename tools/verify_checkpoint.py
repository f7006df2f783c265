"""Prove that a checkpoint is whole, or that it holds exactly a Hugging Face model.

With --hf: config against config, every tensor bit for bit after the mapping, and the logits of Megatron's
model against transformers' in float32 at short, middle and long positions. Without: hashes of the files
against integrity.json, keys and shapes against hf/config.json, every record and every value.

Where import or export rounded the weights (--dtype bfloat16), the rounded values are compared bit for bit
and the line says "rounded" instead of "ok". An export of this checkpoint is known by its record,
megatron_exact.json. Any other folder is taken for the checkpoint's source: float32 imported from bfloat16
is compared with all its bits.

Exit code 0 if no line says FAILED. Logits take the model in float32 in memory (4 bytes a parameter), one of
the two at a time; --no-logits leaves them out.
"""

from __future__ import annotations

import argparse

from megatron_exact.command_line import ToolParser, run_tool

EPILOG = """\
example:

  verify_checkpoint.py --checkpoint checkpoints/qwen2.5-1.5b --hf models/Qwen2.5-1.5B
  verify_checkpoint.py --checkpoint runs/exact --iteration 500
  verify_checkpoint.py --checkpoint runs/exact --hf models/exact     # an export against its run
"""
NAME_WIDTH = 52


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="folder of a run or an import")
    parser.add_argument("--hf", metavar="DIR", help="the Hugging Face model that it must equal")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the one the tracker names")
    parser.add_argument("--no-logits", action="store_true", help="compare weights only")
    return parser


def main() -> int:
    """Run the tool."""
    arguments = build_parser().parse_args()
    from megatron_exact.conversion.verification import table_header, verify_checkpoint

    checks = verify_checkpoint(
        arguments.checkpoint,
        hf=arguments.hf,
        iteration=arguments.iteration,
        with_logits=not arguments.no_logits,
    )
    print(table_header(NAME_WIDTH))
    failures = rounded = count = 0
    for check in checks:
        print(check.line(NAME_WIDTH), flush=True)
        failures += not check.passed
        rounded += check.is_rounded
        count += 1
    print(
        f"{arguments.checkpoint}: "
        + (f"{failures} of {count} checks failed" if failures else f"all {count} checks passed")
        + (f", {rounded} of them on values rounded to another type" if rounded and not failures else "")
    )
    return 1 if failures else 0


if __name__ == "__main__":
    run_tool(main)
