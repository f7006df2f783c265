"""Run the whole chain on real text: tokenise, pack, measure, train two arms, report."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, run_tool, use_examples

EPILOG = """\
examples:
  python tools/run_demo.py                      the sources of Python's standard library
  python tools/run_demo.py --text ~/my_texts    a folder of text files, or one file

It takes about six minutes on two quiet cores, two with --quick. Of a folder, every file that is UTF-8 text
is a document, whatever its suffix, also compressed (.md.gz, .txt.zst); .jsonl, .jsonl.gz, .jsonl.zst and
.parquet give their documents (field `text`). Hidden files are passed over; what else was left out is said.

An interrupted demo resumes where it stopped when it is called again. Steps whose options, inputs and
code did not change are reused; all others are made again.
"""


def main() -> None:
    """Run the demo."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="file or folder of text files instead of the sources")
    parser.add_argument(
        "--quick", action="store_true", help="a few iterations of a tiny model: a smoke test"
    )
    options = parser.parse_args()
    use_examples(__file__)
    from examples.demo_text import FULL, QUICK, run_demo
    from examples.miniature.pipeline import stoppable

    with stoppable():
        run_demo(options.output, text=options.text, settings=QUICK if options.quick else FULL)


if __name__ == "__main__":
    run_tool(main)
