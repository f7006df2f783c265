"""Train the base model of the miniature from random weights and write it as a Hugging Face folder.

The folder that is shipped, examples/miniature/base, was made by this command. It takes a few minutes on one
core; an interrupted call goes on at the stage where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, run_tool, use_examples

EPILOG = """\
example:

  train_miniature_base.py --output my_base
  run_miniature.py --base my_base --output miniature
"""


def main() -> None:
    """Run the tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="model folder to make")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".cache/miniature-base"),
        metavar="DIR",
        help="folder of the stages (default: %(default)s)",
    )
    arguments = parser.parse_args()
    use_examples(__file__)
    from examples.miniature.base_model import make_base
    from examples.miniature.pipeline import stoppable

    with stoppable():
        make_base(arguments.output, arguments.work)


if __name__ == "__main__":
    run_tool(main)
