"""Write the arrays of one split while its plan goes by."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_exact.command_line import progress_bar
from megatron_exact.data.manifest import ARRAY_DTYPES
from megatron_exact.data.manifest_entries import FIRST_TARGET, FIRST_TARGET_DTYPE
from megatron_exact.data.npy import NpyWriter
from megatron_exact.data.plan import DocumentPool, Plan, PlanBlock
from megatron_exact.data.plan_measure import PlanMeasure
from megatron_exact.files import sha256_file

HASHING_THREADS = 4  # hashing releases Python's lock


def write_plan(plan: Plan, folder: Path, name: str) -> tuple[PlanMeasure, dict[str, str]]:
    """Write the arrays of a split into a new folder.

    Args:
        plan: of the split.
        folder: to make.
        name: of the split, for the progress bar.

    Returns:
        What the plan holds; file name to sha256.
    """
    folder.mkdir()
    measure = PlanMeasure(row_tokens=plan.row_tokens, first_target=plan.pool.first_target)
    answers = {} if plan.pool.first_target is None else {FIRST_TARGET: FIRST_TARGET_DTYPE}
    dtypes = {**ARRAY_DTYPES, **answers}
    writers = {array: NpyWriter(folder / f"{array}.npy", dtype) for array, dtype in dtypes.items()}
    try:
        writers["row_offsets"].append(np.zeros(1, dtype=np.int64))
        with progress_bar(f"packing {name}", plan.rows, " rows") as bar:
            for block in plan.blocks():
                for array, values in block_arrays(block, plan.pool, measure.segments).items():
                    writers[array].append(values)
                measure.add(block)
                bar.update(measure.rows - bar.n)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abort()
    return measure, hash_files([writer.path for writer in writers.values()])


def block_arrays(block: PlanBlock, pool: DocumentPool, segments_before: int) -> dict[str, np.ndarray]:
    """The stored arrays of one block, by name: of `row_offsets` the ends of the rows that end in it."""
    source, document = pool.locate(block.number)
    answers = {} if pool.first_target is None else {FIRST_TARGET: pool.first_target[block.number]}
    return {
        **answers,
        "row_offsets": np.flatnonzero(block.ends_row) + (segments_before + 1),
        "segment_source": source,
        "segment_document": document,
        "segment_start": block.start,
        "segment_tokens": block.tokens,
    }


def hash_files(paths: Sequence[Path]) -> dict[str, str]:
    """File name to sha256, several files at once."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return dict(zip((path.name for path in paths), threads.map(sha256_file, paths), strict=True))
