"""Continue a trained model on real long documents in both arms, and show what the tools measure on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, run_tool, use_examples

EPILOG = """\
examples:
  python tools/run_real_demo.py                      four documentation packages of Debian
  python tools/run_real_demo.py --text ~/my_texts    a folder of text files, or one file

It takes about 25 minutes on two quiet cores, eight with --quick, and needs the model of `make real-model`,
SmolLM2-135M-Instruct. An interrupted demo resumes where it stopped when it is called again. Steps whose
options, inputs and code did not change are reused; all others are made again.
"""


def main() -> None:
    """Run the demo."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-real"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--text", type=Path, help="file or folder of text files instead of Debian's documents"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps, items and examples: a smoke test"
    )
    options = parser.parse_args()
    use_examples(__file__)
    from examples.miniature.pipeline import stoppable
    from examples.real_model.demo import FULL, QUICK, run_demo

    with stoppable():
        run_demo(options.output, text=options.text, settings=QUICK if options.quick else FULL)


if __name__ == "__main__":
    run_tool(main)
