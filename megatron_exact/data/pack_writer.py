"""Write the arrays of a pack, and read where the answers of question-answer records start.

Arrays are `.npy` files whose bytes depend on their content alone: `numpy.save` pads its header differently
from version to version, which would change the hashes in a manifest. Format 1.0: 8 bytes magic, 2 bytes
header length, the header, padded so that data starts at byte 128; then the elements, little-endian.

Of question-answer records only the answer and the EOD behind it are supervised. `PREFIX.answers.npy` beside
their corpus contains, int32 [documents], the number of the first token of each record's answer; its sha256
and the template that the records were written with stand in `PREFIX.json`, so that a pack can be verified
against the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import progress_bar
from megatron_exact.data.corpus_record import record_path
from megatron_exact.data.manifest import (
    ARRAY_DTYPES,
    FIRST_TARGET,
    FIRST_TARGET_DTYPE,
    Supervision,
)
from megatron_exact.data.plan import DocumentPool, Plan, PlanBlock, PlanMeasure
from megatron_exact.data.shards import Corpus
from megatron_exact.data.sources import Part, read_parts
from megatron_exact.files import sha256_file
from megatron_exact.json_input import build_record

MAGIC = b"\x93NUMPY\x01\x00"
DATA_OFFSET = 128  # room for any length, so that the header can be written last
HASHING_THREADS = 4  # hashing releases Python's lock
ANSWERS_DTYPE = "<i4"


class NpyWriter:
    """One file of one dtype, of a length that is known in the end.

    Args:
        path: file to write.
        dtype: numpy code with byte order, such as `<i8`.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = dtype
        self.size = 0
        self._stream: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115
        self._stream.seek(DATA_OFFSET)

    def append(self, block: NDArray[np.integer]) -> None:
        """Add elements: integers [n] that fit the dtype. OSError names the file if it cannot grow."""
        left = memoryview(np.ascontiguousarray(block, dtype=self.dtype)).cast("B")
        try:
            while left:  # one call may write less than all of a large block
                left = left[self._stream.write(left) :]
        except OSError as error:
            remedy = "make room or choose another output"
            raise OSError(error.errno, f"{error.strerror}: {remedy}", str(self.path)) from error
        self.size += block.size

    def close(self) -> None:
        """Write the header and close; the file is whole after this."""
        with self._stream:
            text = f"{{'descr': '{self.dtype}', 'fortran_order': False, 'shape': ({self.size},), }}"
            room = DATA_OFFSET - len(MAGIC) - 2
            header = text.ljust(room - 1) + "\n"
            assert len(header) == room
            self._stream.seek(0)
            self._stream.write(MAGIC + room.to_bytes(2, "little") + header.encode("latin-1"))
            if self.size == 0:
                self._stream.truncate(DATA_OFFSET)

    def abort(self) -> None:
        """Close the unfinished file without an error."""
        self._stream.close()


def write_npy(path: Path, array: NDArray[np.integer], dtype: str) -> None:
    """Write a whole array: integers [n]."""
    writer = NpyWriter(path, dtype)
    try:
        writer.append(array)
        writer.close()
    finally:
        writer.abort()


def write_plan(plan: Plan, folder: Path, name: str) -> tuple[PlanMeasure, dict[str, str]]:
    """Write the arrays of a split into a new folder.

    Args:
        plan: of the split.
        folder: to make.
        name: of the split, for the progress bar.

    Returns:
        What the plan contains; file name to sha256.
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
    paths = [writer.path for writer in writers.values()]
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return measure, dict(
            zip((path.name for path in paths), threads.map(sha256_file, paths), strict=True)
        )


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


@dataclass(frozen=True, kw_only=True)
class AnswersRecord:
    """`answers` of a corpus record."""

    sha256: str
    """Hex sha256 of `PREFIX.answers.npy`."""
    template: str
    """Jinja source of the chat template."""
    template_sha256: str
    """Hex sha256 of the template in UTF-8."""
    context_place: str
    """Where a record's context stands in the question."""
    left_out_records: int
    """Records that were longer than a row."""


def answers_path(prefix: str | Path) -> Path:
    """`PREFIX.answers.npy`."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".answers.npy")


def write_answers(prefix: str | Path, first_answer_tokens: Sequence[int]) -> str:
    """Write `PREFIX.answers.npy`; returns its sha256."""
    path = answers_path(prefix)
    write_npy(path, np.array(first_answer_tokens, dtype=np.int32), ANSWERS_DTYPE)
    return sha256_file(path)


def supervise_answers(
    pool: DocumentPool, corpora: Sequence[Corpus]
) -> tuple[DocumentPool, Supervision | None]:
    """Find out whether corpora hold question-answer records, and read where their answers start.

    Args:
        pool: lengths of all documents of the corpora.
        corpora: in the order of the pool.

    Returns:
        The pool with `first_target`, and what a manifest says of it; for other corpora the pool as it is,
        and None.

    Raises:
        ValueError: records beside other text, records of different templates, or a file that is missing,
            damaged or of another corpus.
    """
    parts = [part for corpus in corpora for part in read_parts(corpus)]
    with_answers = [part for part in parts if part.record is not None and part.record.answers is not None]
    if not with_answers:
        return pool, None
    if len(with_answers) < len(parts):
        other = next(part for part in parts if part not in with_answers)
        raise ValueError(
            f"{with_answers[0].tokens.prefix} holds question-answer records and {other.tokens.prefix} "
            "other text: pack them apart"
        )
    records = [_record_of(part) for part in parts]
    first = records[0]
    for part, record in zip(parts, records, strict=True):
        if (record.template_sha256, record.context_place) != (first.template_sha256, first.context_place):
            raise ValueError(
                f"{part.tokens.prefix} was written with another template than {parts[0].tokens.prefix}: "
                "tokenize the records again, with one template"
            )
    starts = np.concatenate(
        [_read_answers(part, record) for part, record in zip(parts, records, strict=True)]
    )
    _check_starts(starts, pool)
    supervision = Supervision(
        targets="answers",
        template=first.template,
        template_sha256=first.template_sha256,
        context_place=first.context_place,
        answers_sha256=tuple(record.sha256 for record in records),
        left_out_records=sum(record.left_out_records for record in records),
    )
    return replace(pool, first_target=starts), supervision


def require_whole_records(pool: DocumentPool, row_tokens: int, policy: str, masked: bool) -> None:
    """Refuse options under which a question-answer record could be cut, or predict the next one.

    Args:
        pool: of records.
        row_tokens: inputs of a row.
        policy: of packing.
        masked: whether the first token of a document is never a target.

    Raises:
        ValueError: policy, masking, or a record longer than a row.
    """
    if policy != "best-fit" or not masked:
        raise ValueError(
            "question-answer records are packed whole, by megatron-exact pack-qa: with --policy best-fit "
            "and --mask-cross-document-targets"
        )
    longest = int(pool.tokens.max())
    if longest > row_tokens:
        raise ValueError(
            f"the longest question-answer record has {longest} tokens and rows have {row_tokens}: "
            "megatron-exact pack-qa leaves such records out"
        )


def answer_starts(part: Part) -> NDArray[np.int32] | None:
    """Where the answers of a corpus of question-answer records begin; None for other text.

    Raises:
        ValueError: a file that is missing, damaged or of another corpus.
    """
    if part.record is None or part.record.answers is None:
        return None
    return _read_answers(part, _record_of(part))


def _record_of(part: Part) -> AnswersRecord:
    assert part.record is not None
    return build_record(AnswersRecord, part.record.answers, f"{record_path(part.tokens.prefix)}: answers")


def _read_answers(part: Part, record: AnswersRecord) -> NDArray[np.int32]:
    path = answers_path(part.tokens.prefix)
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy it beside the corpus, or make the corpus again")
    if sha256_file(path) != record.sha256:
        raise ValueError(f"{path} is not the file that the corpus record names: copy the corpus again")
    starts: NDArray[np.int32] = np.load(path, allow_pickle=False)
    if starts.dtype != np.dtype(ANSWERS_DTYPE) or starts.shape != (part.tokens.num_documents,):
        raise ValueError(
            f"{path} holds {starts.dtype} {starts.shape} for {part.tokens.num_documents} records: make the "
            "corpus again"
        )
    return starts


def _check_starts(starts: NDArray[np.int32], pool: DocumentPool) -> None:
    wrong = np.flatnonzero((starts < 1) | (starts >= pool.tokens))
    if wrong.size:
        number = int(wrong[0])
        raise ValueError(
            f"the answer of record {number} starts at token {starts[number]} of {pool.tokens[number]}: the "
            "corpus is damaged, make it again"
        )
