"""Question-answer records to a packed dataset that supervises answers alone: `tools/pack_qa.py`.

    OUTPUT/manifest.json, train/, validation/    the pack, as every other
    OUTPUT/NAME.bin, .idx, .json                 the records as a corpus, one document each
    OUTPUT/NAME.answers.npy                      where each answer begins

Records are packed whole (`best-fit`), each with positions and attention of its own; one that is longer than
a row is left out and counted. A few thousand records a second in one process: Dolly-15K takes seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_exact.command_line import progress_bar
from megatron_exact.data.answers import AnswersRecord, describe_answers, write_answers
from megatron_exact.data.corpus_guard import hash_blocks
from megatron_exact.data.corpus_record import CorpusRecord, write_corpus_record
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.qa_records import QaInput, QaRecord, as_record
from megatron_exact.data.qa_template import DEFAULT_TEMPLATE, QaTemplate
from megatron_exact.data.tokenizers import CorpusTokenizer, load_tokenizer
from megatron_exact.files import atomic_folder, require_free_folder, sha256_file

RECORDS_A_CALL = 512


@dataclass(frozen=True, kw_only=True)
class QaOptions:
    """Everything that decides a pack of records besides the records and the tokenizer."""

    row_tokens: int
    """Inputs of a row."""
    seed: int
    """Of the split and of the order."""
    validation_fraction: float
    """Of the records, in [0, 1)."""
    template: str | Path = DEFAULT_TEMPLATE
    """A Jinja chat template, or `model`."""
    context_place: str = "before"
    """Where a record's context stands in the question."""
    skip_invalid: bool = False
    """Leave out invalid records instead of stopping at the first."""

    def pack_options(self) -> PackOptions:
        """What the packer is told."""
        return PackOptions(
            row_tokens=self.row_tokens,
            policy="best-fit",
            seed=self.seed,
            validation_fraction=self.validation_fraction,
            mask_cross_document_targets=True,
        )


@dataclass(kw_only=True)
class _Count:
    left_out: int = 0
    """Longer than a row."""
    invalid: int = 0
    """Skipped."""


def pack_qa(
    records: QaInput,
    tokenizer_path: str | Path,
    output: str | Path,
    options: QaOptions,
    *,
    licence: str | None = None,
    eod_token: str | None = None,
    force_eod: bool = False,
) -> Manifest:
    """Tokenize and pack records into a new folder, whole or not at all.

    Args:
        records: see `qa_records`.
        tokenizer_path: Hugging Face folder, the model's own.
        output: folder that does not exist yet, or is empty.
        options: see QaOptions.
        licence: of the records, recorded.
        eod_token: token that ends every answer; None means the tokenizer's eos.
        force_eod: see `load_tokenizer`.

    Raises:
        ValueError: an invalid record (unless skipped), none that fits into a row, or a template, tokenizer
            or option that cannot be used; nothing is written then.
    """
    output = Path(output)
    require_free_folder(output)
    pack_options = options.pack_options()
    tokenizer = load_tokenizer(tokenizer_path, eod_token=eod_token, force_eod=force_eod)
    template = QaTemplate(options.template, tokenizer, context_place=options.context_place)
    with atomic_folder(output) as folder:
        prefix = folder / records.name
        _write_corpus(prefix, records, tokenizer, template, options, licence)
        return pack_corpora([str(prefix)], folder, pack_options, in_place=True)


def _write_corpus(
    prefix: Path,
    records: QaInput,
    tokenizer: CorpusTokenizer,
    template: QaTemplate,
    options: QaOptions,
    licence: str | None,
) -> None:
    count = _Count()
    starts: list[int] = []
    largest = -1
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    writer = IndexedWriter(bin_path, idx_path, tokenizer.vocab_size)
    try:
        with progress_bar("tokenize", None, " records") as bar:
            for batch in _batches(_valid(records, template, options, count)):
                for encoded in template.encode(batch):
                    if encoded.ids.size > options.row_tokens:
                        count.left_out += 1
                        continue
                    starts.append(encoded.first_answer_token)
                    largest = max(largest, int(encoded.ids.max()))
                    writer.add(encoded.ids)
                bar.update(len(batch))
        if not starts:
            raise ValueError(
                f"no record to pack: {count.left_out} are longer than a row of {options.row_tokens} "
                f"tokens and {count.invalid} invalid"
            )
        writer.close()
    finally:
        writer.abort()
    answers = AnswersRecord(
        sha256=write_answers(prefix, starts),
        template=template.text,
        template_sha256=template.sha256,
        context_place=template.context_place,
        left_out_records=count.left_out,
    )
    record = CorpusRecord(
        raw_files=records.raw_files,
        tokenizer=tokenizer.identity(),
        special_tokens=tokenizer.special_tokens(),
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        skipped=count.invalid,
        dtype=str(np.dtype(writer.dtype)),
        bin_sha256=sha256_file(bin_path),
        idx_sha256=sha256_file(idx_path),
        bin_blocks=hash_blocks(bin_path),
        licence=licence,
        hub=records.hub,
        answers=describe_answers(answers),
        largest_id=largest,
    )
    write_corpus_record(prefix, record)


def _valid(records: QaInput, template: QaTemplate, options: QaOptions, count: _Count) -> Iterator[QaRecord]:
    """The records that can be used.

    Raises:
        ValueError: one that cannot, unless such are to be skipped.
    """
    for location, row in records.rows:
        try:
            record = as_record(location, row)
            fault = template.fault(record)
            if fault is not None:
                raise ValueError(f"{location}: {fault}")
        except ValueError as error:
            if not options.skip_invalid:
                raise ValueError(f"{error}; correct it or leave such out with --skip-invalid") from error
            count.invalid += 1
            if count.invalid == 1:
                warnings.warn(f"left out: {error}; others are counted only", stacklevel=2)
            continue
        yield record


def _batches(records: Iterator[QaRecord]) -> Iterator[list[QaRecord]]:
    batch: list[QaRecord] = []
    for record in records:
        batch.append(record)
        if len(batch) == RECORDS_A_CALL:
            yield batch
            batch = []
    if batch:
        yield batch
