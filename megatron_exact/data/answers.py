"""Which targets of question-answer records are supervised: the answer and the EOD behind it.

`PREFIX.answers.npy` beside a corpus holds, int32 [documents], the number of the first token of each
record's answer. Its sha256 and the template that the records were written with stand in `PREFIX.json`, so
that a pack made of the corpus can be proved from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_record import record_path
from megatron_exact.data.fields import build_record
from megatron_exact.data.manifest_entries import Supervision
from megatron_exact.data.npy import write_npy
from megatron_exact.data.plan import DocumentPool
from megatron_exact.data.shards import Corpus
from megatron_exact.data.sources import Part, read_parts
from megatron_exact.files import sha256_file

ANSWERS_DTYPE = "<i4"


@dataclass(frozen=True, kw_only=True)
class AnswersRecord:
    """`answers` of a corpus record."""

    sha256: str
    """Of `PREFIX.answers.npy`."""
    template: str
    """Jinja source of the chat template."""
    template_sha256: str
    """Of its UTF-8 bytes."""
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


def describe_answers(record: AnswersRecord) -> dict[str, Any]:
    """The record as `CorpusRecord.answers` holds it."""
    return asdict(record)


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
            "question-answer records are packed whole, by tools/pack_qa.py: with --policy best-fit and "
            "--mask-cross-document-targets"
        )
    longest = int(pool.tokens.max())
    if longest > row_tokens:
        raise ValueError(
            f"the longest question-answer record has {longest} tokens and rows have {row_tokens}: "
            "tools/pack_qa.py leaves such records out"
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
