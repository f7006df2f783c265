"""Time packing: against the packers of OLMo-core and TRL, or the whole tool at several sizes.

Document lengths are lognormal (median 900 tokens, sigma 1.4: heavy-tailed, as web text), the same
generator for all. Contenders run in turn, A B A B, and the table has medians. Ours is timed three ways:
the histogram planner alone; planning with every piece assigned to a row, in memory, shuffles included;
and `tools/pack_corpus.py` as a process, from starting Python to the pack on disk: reading the index (from
the page cache), assignment, hashing and writing included.

The others are timed at their packing function alone, in a warm process, on pieces cut for them
beforehand, which is generous to them. TRL also moves all tokens into rows, which takes most of its time
and far more memory than tokens; its "planning loop alone" runs the same function without that, over all
documents at once. "As called" is its default of batches of 1,000 documents, tokens of no size. TRL counts
with the faster of the two.

Every packer's rows are checked in the first round: each piece once, no row too full. Ratios are of
documents a second, wall time.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import (
    REPOSITORY,
    Row,
    Timing,
    add_common_arguments,
    publish,
    time_interleaved,
    whole_number,
    whole_numbers,
)
from numpy.typing import NDArray
from pack_check import check_pack
from packers import Packer, available_packers, check_rows
from packing_scale import measure_scale
from synthetic import document_lengths, pieces_of, write_corpus
from tool_runs import run_tool_process

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.data.document_pool import ChosenDocuments, DocumentPool
from megatron_exact.data.plan import BestFitPlan, ConcatPlan, PlanBlock, best_fit_patterns
from megatron_exact.data.shuffle import derive_key

EPILOG = """examples:
  python benchmarks/packing.py --documents 1e6 --competitor-documents 2e5
  python benchmarks/packing.py --full --rounds 1            # the others at all 5e6 documents too: minutes
  python benchmarks/packing.py --policy concat
  python benchmarks/packing.py --scale 1e6,1e7,1e8          # the whole tool: time, memory, bytes
"""
PATTERNS = "this project: histogram planner alone"
PLAN = "this project: planning and assignment, in memory"
TOOL = "this project: pack_corpus.py, whole process"
OTHER_PROJECTS = ("OLMo-core", "TRL")  # names of packers begin so


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One line of the table."""

    name: str
    """As printed."""
    documents: int
    """How many it packs."""
    work: Callable[[], Any]
    """What is timed."""
    check: Callable[[Any], float | None]
    """Result of `work` -> share of padding (None: it makes no rows); raises where it is wrong."""


@dataclass(frozen=True, kw_only=True)
class PlannedRows:
    """A plan read to its end: every segment of every row, in memory."""

    blocks: list[PlanBlock]
    """Row after row."""
    left_out_tokens: int
    """In no row."""


def plan_in_memory(lengths: NDArray[np.int32], row_tokens: int, policy: str, seed: int) -> PlannedRows:
    """Shuffle all documents, plan rows, assign pieces: all that comes before writing."""
    pool = DocumentPool(tokens=lengths, first=np.array([0, lengths.size]))
    chosen = ChosenDocuments(pool=pool, numbers=None, key=derive_key("benchmark", seed))
    plan: ConcatPlan | BestFitPlan
    if policy == "concat":
        plan = ConcatPlan(chosen, row_tokens)
    else:
        plan = BestFitPlan(chosen, row_tokens, seed=seed, split="train")
    return PlannedRows(blocks=list(plan.blocks()), left_out_tokens=plan.left_out_tokens)


def our_contenders(options: argparse.Namespace, folder: Path) -> list[Contender]:
    """The planner alone (best-fit only), planning in memory, and the tool on a corpus made in `folder`."""
    row_tokens, policy = options.row_tokens, options.policy
    lengths = document_lengths(options.documents, options.seed)
    pieces = pieces_of(lengths, row_tokens)
    write_corpus(folder / "corpus", options.documents, options.seed)

    def run_planner() -> list[tuple[list[int], int]]:
        histogram = np.bincount(lengths % row_tokens, minlength=row_tokens + 1)
        histogram[0] = 0  # a document of whole rows leaves no piece
        return best_fit_patterns(histogram, row_tokens)

    def check_plan(plan: PlannedRows) -> float:
        placed = np.concatenate([block.tokens for block in plan.blocks]).astype(np.int64)
        ends = np.flatnonzero(np.concatenate([block.ends_row for block in plan.blocks]))
        if int(placed.sum()) + plan.left_out_tokens != int(lengths.sum(dtype=np.int64)):
            raise ValueError("planning lost tokens: its time is not comparable")
        if policy == "concat":
            return float(1 - placed.sum() / (ends.size * row_tokens))
        return check_rows(placed, np.diff(ends, prepend=-1), pieces, row_tokens, name=PLAN)

    def run_plan() -> PlannedRows:
        return plan_in_memory(lengths, row_tokens, policy, options.seed)

    def run_pack_corpus() -> Path:
        output = folder / "pack"
        shutil.rmtree(output, ignore_errors=True)
        # The others hold nothing out: every document goes into the train split here, too.
        words = pack_corpus_words(options, folder / "corpus", output, validation_fraction="0")
        run_tool_process(words, cwd=folder)
        return output

    def check_folder(pack: Path) -> float:
        return check_pack(pack, lengths, row_tokens)

    contenders = [
        Contender(name=PLAN, documents=lengths.size, work=run_plan, check=check_plan),
        Contender(name=TOOL, documents=lengths.size, work=run_pack_corpus, check=check_folder),
    ]
    if policy == "best-fit":
        planner = Contender(name=PATTERNS, documents=lengths.size, work=run_planner, check=lambda _: None)
        contenders.insert(0, planner)
    return contenders


def pack_corpus_words(
    options: argparse.Namespace, corpus: Path, output: Path, *, validation_fraction: str
) -> list[str]:
    """Arguments of Python that pack `corpus` with the options of this run."""
    return [
        *(str(REPOSITORY / "tools" / "pack_corpus.py"), "--source", str(corpus)),
        *("--row-tokens", str(options.row_tokens), "--policy", options.policy),
        *("--validation-fraction", validation_fraction, "--seed", str(options.seed)),
        *("--output", str(output)),
    ]


def other_contenders(packers: list[Packer], documents: int, options: argparse.Namespace) -> list[Contender]:
    """The packers of other projects on the first `documents` documents, or on as many as one needs."""
    contenders = []
    for packer in packers:
        count = min(documents, packer.most_documents or documents)
        pieces = pieces_of(document_lengths(count, options.seed), options.row_tokens)
        packer.pack(packer.prepare(pieces[:1000], options.row_tokens), options.row_tokens)  # warm
        contenders.append(
            Contender(
                name=packer.name,
                documents=count,
                work=partial(packer.pack, packer.prepare(pieces, options.row_tokens), options.row_tokens),
                check=partial(_padding_of, packer, pieces, options.row_tokens),
            )
        )
    return contenders


def _padding_of(packer: Packer, pieces: NDArray[np.int64], row_tokens: int, result: Any) -> float:
    return check_rows(*packer.row_lengths(result), pieces, row_tokens, name=packer.name)


def table(
    contenders: list[Contender], timings: dict[str, Timing], paddings: dict[str, float | None]
) -> list[Row]:
    """One row a contender; ours with how many times as many documents a second as each other project."""
    speed = {each.name: each.documents / timings[each.name].wall_seconds for each in contenders}
    rows = []
    for each in contenders:
        timing, padding = timings[each.name], paddings[each.name]
        row: Row = {
            "packer": each.name,
            "documents": each.documents,
            "seconds": timing.wall_seconds,
            "CPU seconds": timing.cpu_seconds,
            "documents/s": speed[each.name],
            "padding": None if padding is None else f"{padding:.4%}",
        }
        for project in OTHER_PROJECTS:
            best = max((rate for name, rate in speed.items() if name.startswith(project)), default=None)
            ours = each.name in (PATTERNS, PLAN, TOOL)
            if best is not None:
                row[f"x {project}"] = round(speed[each.name] / best, 1) if ours else None
        rows.append(row)
    return rows


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Time all contenders and publish the table."""
    packers, missing = available_packers() if options.policy == "best-fit" else ([], [])
    competitor_documents = options.documents if options.full else options.competitor_documents
    contenders = our_contenders(options, folder)
    contenders += other_contenders(packers, min(options.documents, competitor_documents), options)
    paddings: dict[str, float | None] = {}
    checks = {each.name: each.check for each in contenders}

    def inspect(name: str, result: Any) -> None:
        paddings[name] = checks[name](result)

    timings = time_interleaved(
        {each.name: each.work for each in contenders}, options.rounds, inspect=inspect
    )
    tokens = int(document_lengths(options.documents, options.seed).sum(dtype=np.int64))
    publish(
        "packing",
        table(contenders, timings, paddings),
        title=f"Packing {options.documents:,} documents, {options.policy}, rows of {options.row_tokens:,}"
        + (", others at this size too" if options.full and packers else ""),
        notes=[
            f"{options.documents:,} documents are {tokens:,} tokens; medians of {options.rounds} rounds. "
            "pack_corpus.py runs with `--validation-fraction 0`, one source and no weights: all documents "
            "go into one split, as with the others.",
            *missing,
        ],
        file=options.json,
    )


def build_parser() -> ToolParser:
    """Arguments of this benchmark."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=whole_number, default=5_000_000, help="default: 5e6")
    parser.add_argument(
        "--competitor-documents",
        type=whole_number,
        default=500_000,
        help="the others pack so many and are compared by documents a second (default: 5e5: their time "
        "grows in proportion, see --full)",
    )
    parser.add_argument("--full", action="store_true", help="the others pack all --documents too")
    parser.add_argument(
        "--row-tokens", type=positive_int, default=16_384, help="a power of 2; default: %(default)s"
    )
    parser.add_argument("--policy", choices=("best-fit", "concat"), default="best-fit")
    parser.add_argument(
        "--scale",
        type=whole_numbers,
        metavar="N,N,...",
        help="instead: the whole tool at these sizes, and what a straight line gives at 1e9 documents",
    )
    parser.add_argument(
        "--work-folder",
        default=str(REPOSITORY / ".cache" / "bench"),
        metavar="DIR",
        help="where corpora and packs are made, and removed again; not in memory (default: .cache/bench)",
    )
    add_common_arguments(parser)
    return parser


def main() -> int:
    """Run the benchmark."""
    options = build_parser().parse_args()
    if options.row_tokens & (options.row_tokens - 1):
        raise ValueError(f"--row-tokens {options.row_tokens}: OLMo-core's packer takes powers of 2 only")
    Path(options.work_folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work_folder) as folder:
        if options.scale:
            measure_scale(options, Path(folder), pack_corpus_words)
        else:
            compare(options, Path(folder))
    return 0


if __name__ == "__main__":
    run_tool(main)
