"""What every benchmark shares: interleaved timing, the machine, results as JSON lines, tables.

A result is one JSON object on a line: `benchmark`, `title`, `command`, `commit`, `date`, `machine`,
`notes` (sentences) and `rows` (one object a table row, its keys are the columns).
`benchmarks/write_page.py` turns files of results into `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.command_line import ArgumentError
from megatron_exact.report.page import markdown_table

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "numpy",
    "torch",
    "megatron-core",
    "transformers",
    "ai2-olmo-core",
    "trl",
    "datasets",
    "datatrove",
    "tokenizers",
)

LOAD_AT_START = os.getloadavg()[
    0
]  # near 0 where nothing else ran, whatever the benchmark itself adds later

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians over the rounds of one contender."""

    wall_seconds: float
    """Elapsed time."""
    cpu_seconds: float
    """User and system time, children included; on a busy machine the steadier of the two."""


def time_interleaved(
    work: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    inspect: Callable[[str, Any], None] | None = None,
    ends_with_first: bool = False,
) -> dict[str, Timing]:
    """Run every contender once a round, A B A B ..., so that a slow spell of the machine hits all.

    The result of a call is dropped before the next call begins; Python's collector runs between calls.

    Args:
        work: what to time, by name.
        rounds: calls of each.
        inspect: gets name and result of each call of the first round, outside the measured time.
        ends_with_first: after the last round, call the first once more: A B A, where B takes long.

    Returns:
        Medians over the rounds by name.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for turn in range(rounds + ends_with_first):
        for name, function in list(work.items())[: None if turn < rounds else 1]:
            print(f"  round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            gc.collect()
            started = time.perf_counter(), _cpu_seconds()
            result = function()
            times[name].append((time.perf_counter() - started[0], _cpu_seconds() - started[1]))
            if inspect is not None and turn == 0:
                inspect(name, result)
            del result
    return {
        name: Timing(
            wall_seconds=statistics.median(wall for wall, _ in pairs),
            cpu_seconds=statistics.median(cpu for _, cpu in pairs),
        )
        for name, pairs in times.items()
    }


def _cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def commit() -> str:
    """Commit of this checkout, with "dirty" when tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory and versions."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(LOAD_AT_START, 1),
        "versions": versions,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def command() -> str:
    """The command line of this process as typed from the root of the repository, without `--json`.

    The folder of an absolute path is left out: it says something about a machine, not about the run.
    """
    words = []
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word == "--json":
            next(arguments, None)
        elif not word.startswith("--json="):
            words.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def provenance() -> list[str]:
    """Return command, commit and machine of a page that a tool writes whole, as a Markdown list."""
    here = machine()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return [
        f"- command: `{command()}`",
        f"- commit: {commit()}",
        f"- machine: {here['cpu']}, {here['cores']} cores, no GPU; {versions}",
    ]


def publish(
    benchmark: str, rows: Sequence[Row], *, title: str, notes: Sequence[str] = (), file: str | None
) -> None:
    """Print a table and, with `file`, append the result as one line of JSON."""
    print(f"\n{title}\n\n{render(rows)}\n")
    for note in notes:
        print(note)
    if file is None:
        return
    result = {
        "benchmark": benchmark,
        "title": title,
        "command": command(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "notes": list(notes),
        "rows": list(rows),
    }
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(result, allow_nan=False, ensure_ascii=False) + "\n")


def render(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; columns in the order of their first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return markdown_table(columns, [[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def whole_number(text: str) -> int:
    """argparse type: a decimal number above 0; `5e6` and `5_000_000` are understood."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentError(f"{text!r} is not a number") from None
    if not value.is_integer() or value < 1:
        raise ArgumentError(f"{text!r} is not a whole number above 0")
    return int(value)


def whole_numbers(text: str) -> tuple[int, ...]:
    """argparse type: several of them, `1e6,1e7`."""
    return tuple(whole_number(part) for part in text.split(","))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """`--rounds`, `--seed` and `--json`."""
    parser.add_argument("--rounds", type=whole_number, default=3, help="of A B A B; default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the synthetic lengths; default: %(default)s"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="append the result to FILE, for benchmarks/write_page.py"
    )
