"""The fault matrix: what is done, what must hold, what was seen; and the page that is made from it.

A row is one fault. Its `run` does the fault and fails unless the words of the row come true, so the column
"seen" of docs/fault_matrix.md is what the tests of this folder have seen. `python -m tests.faults.matrix`
writes the table into the page.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import runpy
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import forked

if TYPE_CHECKING:
    from tests.faults.kit import Kit

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "fault_matrix.md"
BEGIN, END = "<!-- fault matrix: begin -->", "<!-- fault matrix: end -->"
MOST_SECONDS = 60
AREAS = ("training", "data", "conversion", "evaluation_report")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault."""

    name: str
    """Of the test; unique in its area."""
    fault: str
    """What is done."""
    holds: str
    """What must hold."""
    seen: str
    """What was seen."""
    run: Callable[[Kit, Path], None]
    """Does it, in an empty folder; fails unless `seen` comes true."""
    is_quick: bool = False
    """Whether `make test` runs it, too."""


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    """Exit code, negative for a signal."""
    output: str
    """stdout and stderr."""

    @property
    def errors(self) -> list[str]:
        """Lines for users."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


FAILED = "FAILED"
"""How a check that fails begins in the tools that make many."""
REFUSED = "error in one line, exit code 1, nothing written or lost"


def refused(
    name: str,
    fault: str,
    words: str,
    command: Callable[[Kit, Path], Sequence[Any]],
    *,
    damage: Callable[[Path], object] | None = None,
    material: Callable[[Kit], Path] | None = None,
    sign: str = "error: ",
) -> Row:
    """A fault that a tool must refuse.

    Args:
        name: see `Row`.
        fault: see `Row`.
        words: that the line must contain.
        command: name of the tool and its arguments, from the material's copy.
        damage: does the fault to the material's copy.
        material: what is copied, a folder.
        sign: how the line begins.
    """

    def run(kit: Kit, folder: Path) -> None:
        copy = folder / "material"
        if material is not None:
            kit.copy(material(kit), copy)
        else:
            copy.mkdir()
        if damage is not None:
            damage(copy)
        before = contents(folder)
        tool, *arguments = command(kit, copy)
        ended = run_tool(tool, arguments, folder)
        check_refusal(ended, words, sign)
        assert contents(folder) == before, f"written or lost: {set(contents(folder)) ^ set(before)}"

    return Row(name=name, fault=fault, holds=REFUSED, seen=f"exit 1: `{words}`", run=run)


def check_refusal(ended: Ended, words: str, sign: str = "error: ") -> None:
    """One line that has the words, and no traceback."""
    told = ended.output[-3000:]
    assert ended.code == 1, f"exit code {ended.code}: {told}"
    assert "Traceback" not in ended.output, told
    lines = [line for line in ended.output.splitlines() if line.startswith(sign)]
    assert len(lines) == 1 or (lines and sign == FAILED), told
    assert words in lines[0], told
    assert all(line.isprintable() for line in ended.output.splitlines()), ascii(told)


def contents(folder: Path) -> dict[str, str]:
    """What every file below a folder is, by a hash; special files are not opened, output is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) and name != "output.txt":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not stat.S_ISREG(mode):
            found[name] = oct(stat.S_IFMT(mode))
    return found


def run_tool(
    tool: str,
    arguments: Sequence[Any],
    folder: Path,
    *,
    first: Callable[[], object] = lambda: None,
    **options: Any,
) -> Ended:
    """Run a tool of tools/ in a forked process, after `first`; see `run_forked`."""

    def work() -> int:
        first()
        sys.argv = [tool, *map(str, arguments)]
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
        return 0

    return run_forked(work, folder, **options)


def run_forked(
    work: Callable[[], int | None],
    folder: Path,
    *,
    while_running: Callable[[int], object] | None = None,
) -> Ended:
    """Run a function in a forked process, which must end within MOST_SECONDS.

    Args:
        work: called in the child; its value or SystemExit is the exit code.
        folder: the child's output goes to output.txt in it.
        while_running: called here with the child's id once it was started.
    """
    output = folder / "output.txt"
    child = forked.start(work, output)
    try:
        if while_running is not None:
            while_running(child)
        return Ended(forked.wait(child, MOST_SECONDS), output.read_text(errors="replace"))
    finally:
        forked.kill(child)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own in a new folder; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount_read_only(folder: Path) -> None:
    """Let nobody write into a file system of `mounted` any more."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond a size, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def quick(rows: Sequence[Row]) -> list[Row]:
    """The same rows, for `make test` too."""
    return [replace(row, is_quick=True) for row in rows]


def as_parameters(rows: Sequence[Row]) -> list[Any]:
    """For `pytest.mark.parametrize`; rows that are not quick are marked."""
    return [
        pytest.param(row, id=row.name, marks=() if row.is_quick else pytest.mark.faults) for row in rows
    ]


def all_rows() -> dict[str, list[Row]]:
    """The rows of every area."""
    from tests.faults import conversion, data, evaluation_report, training

    rows = {
        "training": training.ROWS,
        "data": data.ROWS,
        "conversion": conversion.ROWS,
        "evaluation_report": evaluation_report.ROWS,
    }
    assert tuple(rows) == AREAS
    return rows


def table() -> str:
    """The matrix as Markdown."""
    parts = []
    for area, rows in all_rows().items():
        title = area.replace("_", " and ").capitalize()
        parts.append(f"### {title} ({len(rows)} rows)\n\n| fault | must hold | seen |\n|---|---|---|")
        parts[-1] += "".join(
            f"\n| {_cell(row.fault)} | {_cell(row.holds)} | {_cell(row.seen)} |" for row in rows
        )
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def page_with(table_text: str, page: str) -> str:
    """The page with this table in place of its own."""
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n\n{table_text}\n\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page_with(table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
