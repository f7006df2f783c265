"""How much a job differs from itself on one process, on every layout of tests/distributed/layout_matrix.py.

Runs whole jobs of a model of four layers over gloo, here, and writes docs/exactness.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import REPOSITORY

from megatron_exact.command_line import ToolParser, progress_bar, run_tool
from megatron_exact.files import write_text

sys.path.insert(0, str(REPOSITORY))  # the table of layouts and the forked ranks belong to the tests
from layouts_page import Measured, page

from tests.distributed import jobs, ranks
from tests.distributed import layout_matrix as matrix

EPILOG = """examples:
  python benchmarks/layouts.py                           # the whole matrix, many minutes on two cores
  python benchmarks/layouts.py --only CP2 --only TP2 --output cp.md
"""
Records = list[dict[str, Any]]


class Measurement:
    """Runs jobs in a folder of their own and compares each with its reference.

    Args:
        folder: scratch, made here.
        jobs_to_run: for the progress bar.
    """

    def __init__(self, folder: Path, jobs_to_run: int) -> None:
        self.folder = folder
        self.pack = jobs.make_pack(jobs.make_corpus(folder / "docs"), "concat")
        self.start = matrix.make_start(self.pack, folder / "start")
        self.progress = progress_bar("jobs", jobs_to_run, "job")
        self.references: dict[tuple[Any, ...], Records] = {}
        self.runs = 0

    def run(self, layout: matrix.Layout, rule: str, *more: Any, fault: Any = None) -> Records:
        """Records of one job."""
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        records = matrix.run(layout, rule, self.pack, self.start, folder, *more, fault=fault)
        self.progress.update()
        return records

    def reference(self, rule: str, *more: Any) -> Records:
        """Records on one process; each is run once."""
        key = (rule, *more)
        if key not in self.references:
            self.references[key] = self.run(matrix.REFERENCE, rule, *more)
        return self.references[key]

    def difference(
        self, layout: matrix.Layout, rule: str, *more: Any, fault: Any = None
    ) -> dict[str, float]:
        """Largest relative differences of six iterations from the reference.

        Raises:
            ValueError: other targets were counted.
        """
        theirs = self.reference(rule, *more)
        ours = self.run(layout, rule, *more, fault=fault)
        if not matrix.same_targets(ours, theirs):
            raise ValueError(f"{layout.flags}: other targets were counted than on one process")
        return matrix.largest_differences(ours, theirs)


def measure(names: Sequence[str]) -> Measured:
    """All differences of the layouts named."""
    in_bf16 = [name for name in names if name in matrix.BF16_LAYOUTS]
    rules = matrix.RULES
    total = len(names) * len(rules) + len(in_bf16) + len(matrix.FAULTS) + len(rules) + bool(in_bf16)
    with tempfile.TemporaryDirectory() as scratch:
        measurement = Measurement(Path(scratch), total)
        return Measured(
            float32={
                name: {rule: measurement.difference(matrix.LAYOUTS[name], rule) for rule in rules}
                for name in names
            },
            bfloat16={
                name: measurement.difference(matrix.LAYOUTS[name], "exact", *matrix.BF16)
                for name in in_bf16
            },
            faults={
                name: measurement.difference(matrix.LAYOUTS["CP2"], "exact", fault=fault)
                for name, fault in matrix.FAULTS.items()
            },
            rules={
                f"{one} against {other}": matrix.largest_differences(
                    measurement.reference(one), measurement.reference(other)
                )
                for one, other in (("exact", "none"), ("exact-normalized", "exact"))
            },
        )


def main() -> int:
    """Measure and write the page; 1 if a layout is outside the bounds."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=tuple(matrix.LAYOUTS),
        metavar="LAYOUT",
        help="one layout of the table, can be given again (default: all of them)",
    )
    parser.add_argument(
        "--output",
        default=str(REPOSITORY / "docs" / "exactness.md"),
        metavar="FILE",
        help="default: docs/exactness.md",
    )
    options = parser.parse_args()
    ranks.import_megatron_once()
    ranks.TIMEOUT_SECONDS = 1800  # a machine may be busy: what counts here is not time
    measured = measure(options.only or tuple(matrix.LAYOUTS))
    write_text(options.output, page(measured))
    outside = measured.outside_bounds()
    for line in outside:
        print(line, file=sys.stderr)
    print(f"{options.output}: {len(measured.float32)} layouts, {len(outside)} outside the bounds")
    return 1 if outside else 0


if __name__ == "__main__":
    run_tool(main)
