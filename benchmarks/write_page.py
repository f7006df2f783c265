"""Turn results of benchmarks (files of `--json`) into `docs/benchmarks.md`.

The last result of each title counts. What a benchmark measures, and how, is told by the docstring of its
script, so that the page cannot say something else than the code.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from measure import REPOSITORY, render

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.files import write_text

EPILOG = """example:
  make bench                    # measures everything into .cache/bench/results.jsonl, then calls this
  python benchmarks/write_page.py .cache/bench/results.jsonl --output docs/benchmarks.md
"""
ORDER = (
    *("packing", "counting", "reading", "remote_reading", "tokenising", "conversion"),
    *("attention", "step_cost", "finite_check", "confidence_cost", "training_throughput"),
    *("step_profile", "loss_head", "evaluation", "prompt_sharing"),
)
NEEDED = ("benchmark", "rows")
HEAD = """# Benchmarks

Made by `benchmarks/write_page.py` from results of the scripts in `benchmarks/`; `make bench` measures
again.
What carries over to other machines are the ratios: contenders run in turn in one process or as processes
of one run, on the same data, and the numbers are medians. Absolute seconds belong to the machine that the
table names. Load at start is the machine's load average before the benchmark began: near 0 means that it
was idle. On a busy machine wall time tells how busy it was; CPU time suffers too, from shared caches, and
only ratios of neighbouring measurements mean something.
"""


def read_results(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """All results of some files, one JSON object a line.

    Raises:
        ValueError: a line that is no result.
    """
    results = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                result = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}): remove it") from None
            if not isinstance(result, dict) or not all(key in result for key in NEEDED):
                raise ValueError(
                    f"{path}, line {number} is not a result of a benchmark: it needs {', '.join(NEEDED)}"
                )
            results.append(result)
    return results


def latest(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last result of each benchmark and title, in the order of ORDER, then of first appearance."""
    last = {(result["benchmark"], result.get("title", "")): result for result in results}
    known = {name: place for place, name in enumerate(ORDER)}
    return sorted(last.values(), key=lambda result: known.get(result["benchmark"], len(ORDER)))


def page(results: Iterable[dict[str, Any]]) -> str:
    """The Markdown page: a section a benchmark, a table a result."""
    parts = [HEAD]
    section = None
    for result in latest(results):
        name = result["benchmark"]
        if name != section:
            section = name
            parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n{method(name)}")
        parts.append(f"### {result.get('title', name)}\n\n{render(result['rows'])}")
        parts.extend(f"{note}\n" for note in [" ".join(result.get("notes", ()))] if note)
        parts.append(circumstances(result))
    return "\n".join(parts)


def method(benchmark: str) -> str:
    """What the script of this benchmark says of itself, in Markdown; nothing if it is not there."""
    script = REPOSITORY / "benchmarks" / f"{benchmark}.py"
    if not script.is_file():
        return ""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.rstrip() + "\n"


def circumstances(result: dict[str, Any]) -> str:
    """Command, commit and machine of a result, as a list."""
    machine = result.get("machine", {})
    versions = machine.get("versions", {})
    lines = []
    if "command" in result:
        lines.append(f"- command: `{result['command']}`")
    if "commit" in result:
        lines.append(f"- commit: {result['commit']}" + (f", {result['date']}" if "date" in result else ""))
    if machine:
        lines.append(
            f"- machine: {machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, "
            f"{machine.get('memory_gib', '?')} GiB, load at start {machine.get('load_at_start', '?')}"
        )
    if versions:
        lines.append("- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="FILE", help="results, one JSON object a line")
    parser.add_argument(
        "--output", default=str(REPOSITORY / "docs" / "benchmarks.md"), help="default: docs/benchmarks.md"
    )
    options = parser.parse_args()
    results = read_results(options.results)
    if not results:
        raise ValueError(
            f"{', '.join(options.results)}: no result in it; run the benchmarks with --json FILE"
        )
    write_text(options.output, page(results))
    print(f"{options.output}: {len(latest(results))} tables")
    return 0


if __name__ == "__main__":
    run_tool(main)
