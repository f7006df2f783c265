"""The report of the experiment: the paper's tables and figures beside one's own, from result files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.report.compared import Compared, read_compared
from megatron_exact.report.control_table import control_blocks
from megatron_exact.report.exposure_section import (
    PackExposure,
    as_trained,
    exposure_blocks,
    read_exposure,
    read_pack,
)
from megatron_exact.report.lift import lift_blocks
from megatron_exact.report.main_table import main_blocks
from megatron_exact.report.page import Block, Page, Paragraph
from megatron_exact.report.page_files import write_page
from megatron_exact.report.paper_numbers import SOURCE
from megatron_exact.report.probe import field_blocks, probe_blocks
from megatron_exact.report.provenance_section import comparison_blocks, licence_blocks
from megatron_exact.report.qa_table import qa_blocks

TITLE = "EXACT: the paper's results and ours"


@dataclass(frozen=True, kw_only=True)
class ExperimentFiles:
    """What a report is made from."""

    comparisons: Sequence[Compared]
    """From `read_compared`."""
    packs: Sequence[PackExposure]
    """From `read_pack` and `as_trained`, and from `read_exposure`."""


def read_experiment(
    comparisons: Sequence[str], packs: Sequence[str], exposures: Sequence[str]
) -> ExperimentFiles:
    """Read everything before anything is written.

    Args:
        comparisons: `DIR` or `LABEL=DIR`, folders of compare_runs.py.
        packs: folders of pack_corpus.py.
        exposures: files that inspect_pack.py --json printed.

    Raises:
        ValueError: something is missing or damaged; it names the file.
    """
    compared = read_compared(comparisons)
    weighted = [shown for folder in packs for shown in as_trained(read_pack(folder), compared)]
    return ExperimentFiles(comparisons=compared, packs=[*weighted, *map(read_exposure, exposures)])


def write_experiment_report(output: str | Path, files: ExperimentFiles) -> tuple[Path, Path]:
    """Write `report.md`, `report.html` and the figures into a folder, which is made if need be.

    Returns:
        Paths of the Markdown and of the HTML file.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(title=TITLE, blocks=experiment_blocks(folder, files))
    return write_page(folder, page)


def experiment_blocks(folder: Path, files: ExperimentFiles) -> list[Block]:
    """All sections; their figures are written into `folder`."""
    comparisons = files.comparisons
    introduction = Paragraph(
        text="EXACT weights the targets of continued pretraining by their effective context "
        f"({SOURCE}). This page shows the paper's tables and figures with its numbers beside those of the "
        "comparisons that it was made from. What was not run says so. Points are 0 to 100; intervals are "
        "95 % and paired, each stands for itself."
    )
    return [
        introduction,
        *comparison_blocks(comparisons),
        *main_blocks(comparisons),
        *qa_blocks(comparisons),
        *control_blocks(comparisons),
        *exposure_blocks(folder, files.packs),
        *field_blocks(folder, comparisons),
        *lift_blocks(folder, comparisons),
        *probe_blocks(folder, comparisons),
        *licence_blocks(comparisons, files.packs),
    ]
