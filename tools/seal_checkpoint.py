"""Give checkpoints that were saved without one their integrity.json, after a check of their structure.

Training loads sealed checkpoints only: it compares the sha256 of every file with integrity.json. Saves of
megatron_exact end with one; checkpoints of stock Megatron, or of older versions, need this tool once.

Checked first: the index can be read, every tensor is covered by its chunks, every record that the index
names is there, whole, and agrees with its CRC-32. What a seal cannot prove: that the records hold what the
run computed, or that all files belong to one save. From now on, no byte changes unnoticed.

A folder with integrity.json is left as it is: sealing again would hide damage. Exit code 0 if every
checkpoint of the folder holds one in the end.
"""

from __future__ import annotations

import argparse

from megatron_exact.command_line import ToolParser, printable, run_tool

EPILOG = """\
example:

  seal_checkpoint.py runs/old                  # every iteration of a run
  seal_checkpoint.py runs/old/iter_0000500     # one
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a run, an import or one iteration")
    return parser


def main() -> int:
    """Run the tool."""
    arguments = build_parser().parse_args()
    from megatron_exact.conversion.seal import seal_checkpoints

    failures = 0
    for sealing in seal_checkpoints(arguments.folder):
        print(printable(f"{sealing.name}: {sealing.detail}"), flush=True)
        failures += not sealing.is_sealed
    return 1 if failures else 0


if __name__ == "__main__":
    run_tool(main)
