"""Write the text of the small real model: the language reference of Python, which every interpreter has."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from megatron_exact.command_line import command_parser, run_tool
from megatron_exact.files import write_text

EXAMPLES = """example:
  python -m examples.real_model.write_text --output texts
"""


def main() -> None:
    """Write DIR/corpus.jsonl, one document for each topic of Python's language reference."""
    parser = command_parser(main, None, EXAMPLES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder, made if missing")
    path = parser.parse_args().output / "corpus.jsonl"
    write_text(path, "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    print(f"{path}: {len(topics)} documents")


if __name__ == "__main__":
    run_tool(main)
