"""Raw text to a Megatron corpus: `PREFIX.bin`, `PREFIX.idx` and the record `PREFIX.json`.

Worker processes decode and tokenize batches of about a megabyte of raw records; this process reads ahead,
writes in the order of the input and hashes what it writes. The bytes are the same for any number of
workers and however often the run was killed and went on (`tokenize_journal`). Memory holds a few batches a
worker, whatever the size of the corpus. How fast that is: `benchmarks/tokenising.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.command_line import describe, progress_bar
from megatron_exact.data.corpus_inputs import CorpusInputs, FileInputs
from megatron_exact.data.corpus_record import CorpusRecord, format_corpus_record, read_corpus_record
from megatron_exact.data.documents import DEFAULT_TEXT_KEY
from megatron_exact.data.encoding import Batch, EncodedBatch, EncodingOptions, encode_documents
from megatron_exact.data.growing_corpus import GrowingCorpus
from megatron_exact.data.indexed import token_dtype
from megatron_exact.data.raw_parts import Cursor, RawPart
from megatron_exact.data.tokenize_journal import (
    JournalEntry,
    UnfinishedCorpus,
    kept_work,
    require_free_outputs,
    unfinished_corpus,
    unfinished_folder,
)
from megatron_exact.data.tokenizers import CorpusTokenizer, load_tokenizer
from megatron_exact.data.worker_pool import PENDING_TASKS_PER_WORKER, WorkerPool
from megatron_exact.files import fsync_path

BATCH_BYTES = 1 << 20
JOURNAL_BYTES = 64 << 20  # of the .bin between two journal entries
JOURNAL_SECONDS = 30.0
MAX_SKIPPED_EXAMPLES = 10

Pool = WorkerPool[EncodingOptions, Batch, EncodedBatch]


@dataclass(frozen=True, kw_only=True)
class TokenizeSummary:
    """What was written."""

    prefix: Path
    """Common path of the three files, without suffix."""
    record: CorpusRecord
    """Content of the record."""
    skipped_examples: tuple[str, ...]
    """The first skipped documents: file, line and reason."""
    resumed_documents: int
    """Documents that an earlier, stopped run had done."""


def tokenize_corpus(
    inputs: Sequence[str | Path] | CorpusInputs,
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    *,
    workers: int = 1,
    text_key: str = DEFAULT_TEXT_KEY,
    skip_invalid: bool = False,
    add_bos: bool = True,
    eod_token: str | None = None,
    force_eod: bool = False,
    licence: str | None = None,
    batch_bytes: int = BATCH_BYTES,
    journal_bytes: int = JOURNAL_BYTES,
    journal_seconds: float = JOURNAL_SECONDS,
) -> TokenizeSummary:
    """Tokenize text into one corpus; all three files appear, the `.idx` last, or none.

    A run that is stopped after its first journal entry leaves a hidden folder, and the same call goes on
    from there; one that is stopped before leaves nothing (a kill: a folder that the next run removes).

    Args:
        inputs: `.jsonl[.gz|.zst]`, `.parquet` and `.txt` files, in the order of the corpus.
        tokenizer_path: see `load_tokenizer`.
        output_prefix: path without suffix; none of the three files may exist.
        workers: processes that tokenize; 1 starts none. More need an importable `__main__`.
        text_key: field or column that holds the text of files.
        skip_invalid: leave out invalid documents and count them, instead of stopping at the first.
        add_bos: see `load_tokenizer`.
        eod_token: see `load_tokenizer`.
        force_eod: see `load_tokenizer`.
        licence: of the text, recorded as it is.
        batch_bytes: text of one task of a worker; the result does not depend on it.
        journal_bytes, journal_seconds: a journal entry is due after so much of the `.bin`, or time.

    Raises:
        ValueError, OSError: bad input, tokenizer or output; see `check_inputs`, `decode_part`,
            `load_tokenizer`, `unfinished_corpus`.
    """
    prefix = Path(output_prefix)
    if workers < 1:
        raise ValueError(f"workers is {workers}: at least one process must tokenize")
    if isinstance(inputs, Sequence):
        inputs = FileInputs(inputs, text_key=text_key)
    if not unfinished_folder(prefix).exists():
        require_free_outputs(prefix)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core each; workers inherit it
    with WorkerPool(encode_documents, workers) as pool:
        tokenizer = load_tokenizer(
            tokenizer_path, eod_token=eod_token, add_bos=add_bos, force_eod=force_eod
        )
        options = EncodingOptions(
            tokenizer=tokenizer,
            dtype=token_dtype(tokenizer.vocab_size),
            text_key=inputs.text_key,
            skip_invalid=skip_invalid,
        )
        with unfinished_corpus(prefix, _job(options, inputs)) as work:
            resumed = 0 if work.entry is None else work.entry.documents
            if work.entry is None or not work.entry.complete:
                run = _Run(work, inputs, options, journal_bytes, journal_seconds)
                with _explained(work), contextlib.closing(run):
                    run.tokenize(pool, workers, batch_bytes)
                    run.finish(prefix, licence)
            entry = work.entry
            work.publish()
    record = read_corpus_record(prefix)
    assert record is not None
    assert entry is not None
    return TokenizeSummary(
        prefix=prefix, record=record, skipped_examples=entry.skipped_examples, resumed_documents=resumed
    )


class _Run:
    """One process's share of the work between two stops."""

    def __init__(
        self,
        work: UnfinishedCorpus,
        inputs: CorpusInputs,
        options: EncodingOptions,
        journal_bytes: int,
        journal_seconds: float,
    ) -> None:
        self._work, self._inputs, self._options = work, inputs, options
        self._journal_bytes, self._journal_seconds = journal_bytes, journal_seconds
        self._corpus = GrowingCorpus(work.folder, options.dtype)
        self._entry = work.entry or JournalEntry()
        if work.entry is not None:
            size = self._entry.tokens * options.dtype.itemsize
            with progress_bar("check what is there", size, "B") as bar:
                self._corpus.restore(
                    self._entry.documents, self._entry.tokens, self._entry.bin_sha256, bar.update
                )

    def close(self) -> None:
        """Close the unfinished files."""
        self._corpus.close()

    def tokenize(self, pool: Pool, workers: int, batch_bytes: int) -> None:
        """Append all documents that are not there yet."""
        results = pool.map_in_order(
            self._options,
            _batches(self._inputs, self._entry, batch_bytes),
            max_pending_bytes=workers * PENDING_TASKS_PER_WORKER * batch_bytes,
        )
        try:
            with contextlib.closing(results):
                self._write_tokens(results)
        except BaseException:
            if self._work.entry is not None:  # keep what was done since, if the disk still takes it
                with contextlib.suppress(OSError):
                    self._journal()
            raise

    def _write_tokens(self, results: Iterator[EncodedBatch]) -> None:
        sizes = self._inputs.sizes()
        before = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        start = int(before[self._entry.input]) + self._entry.cursor.progress_bytes
        journal_tokens, journal_time = self._entry.tokens, time.monotonic()
        with progress_bar("tokenize", sum(sizes) or None, "B") as bar:
            bar.update(start)
            for result in results:
                self._corpus.add(result.ids, result.lengths)
                self._entry = _advance(self._entry, result, self._corpus)
                bar.update(int(before[result.input]) + result.cursor.progress_bytes - bar.n)
                written = (self._entry.tokens - journal_tokens) * self._options.dtype.itemsize
                late = time.monotonic() - journal_time >= self._journal_seconds
                if written >= self._journal_bytes or late:
                    self._journal()
                    journal_tokens, journal_time = self._entry.tokens, time.monotonic()

    def _journal(self) -> None:
        entry = self._entry
        self._corpus.sync()
        self._work.write(entry)

    def finish(self, prefix: Path, licence: str | None) -> None:
        """Write index and record beside the tokens; all on disk and in the journal afterwards."""
        if self._entry.documents == 0:
            raise ValueError(_no_document_message(self._inputs.names(), self._entry))
        try:
            raw_files = self._inputs.raw_files()
        except ValueError:  # an input has changed: what was made of it is worth nothing
            self._work.discard()
            raise
        self._journal()
        tokenizer = self._options.tokenizer
        idx_sha256 = self._corpus.write_index(self._work.folder / "idx")
        record = CorpusRecord(
            raw_files=raw_files,
            tokenizer=tokenizer.identity(),
            special_tokens=tokenizer.special_tokens(),
            documents=self._entry.documents,
            tokens=self._entry.tokens,
            skipped=self._entry.skipped,
            empty=self._entry.empty,
            dtype=str(self._options.dtype),
            bin_sha256=self._entry.bin_sha256,
            idx_sha256=idx_sha256,
            bin_blocks=self._corpus.totals.bin_blocks.hexdigests(),
            licence=licence,
            hub=self._inputs.hub(),
            largest_id=self._corpus.totals.largest_id,
            counted_tokens=self._entry.counted,
        )
        path = self._work.folder / "json"
        path.write_text(format_corpus_record(prefix, record), encoding="utf-8")
        fsync_path(path)
        self._work.write(replace(self._entry, complete=True))


def _advance(entry: JournalEntry, result: EncodedBatch, corpus: GrowingCorpus) -> JournalEntry:
    totals = corpus.totals
    return JournalEntry(
        input=result.input,
        cursor=result.cursor,
        documents=totals.documents,
        tokens=totals.tokens,
        bin_sha256=totals.bin_digest.hexdigest(),
        skipped=entry.skipped + len(result.invalid),
        empty=entry.empty + result.empty,
        skipped_examples=(*entry.skipped_examples, *result.invalid)[:MAX_SKIPPED_EXAMPLES],
        counted={
            token: entry.counted.get(token, 0) + result.counted.get(token, 0)
            for token in sorted(entry.counted | result.counted)
        },
    )


def _job(options: EncodingOptions, inputs: CorpusInputs) -> dict[str, Any]:
    """Everything that the bytes of a corpus depend on."""
    tokenizer: CorpusTokenizer = options.tokenizer
    library = {"huggingface": "tokenizers", "sentencepiece": "sentencepiece"}[tokenizer.kind]
    return {
        "tokenizer": tokenizer.sha256,
        "library": f"{library} {importlib.metadata.version(library)}",
        **tokenizer.special_tokens(),
        "text_key": options.text_key,
        "skip_invalid": options.skip_invalid,
        "inputs": inputs.identity(),
    }


def _batches(inputs: CorpusInputs, entry: JournalEntry, batch_bytes: int) -> Iterator[tuple[int, Batch]]:
    """(bytes, batch) from where the journal stands, in the order of the corpus."""
    parts: list[RawPart] = []
    size = 0
    number, cursor = entry.input, entry.cursor
    readers = inputs.readers()
    for number in range(entry.input, len(readers)):
        start = entry.cursor if number == entry.input else Cursor()
        for part, cursor in readers[number].read(start, batch_bytes):
            parts.append(part)
            size += sum(len(content or b"") for content in part.contents)
            if size >= batch_bytes:
                yield size, Batch(parts=parts, input=number, cursor=cursor)
                parts, size = [], 0
    if parts:
        yield size, Batch(parts=parts, input=number, cursor=cursor)


@contextlib.contextmanager
def _explained(work: UnfinishedCorpus) -> Iterator[None]:
    """One line for a failure, which says what was kept."""
    try:
        yield
    except (ValueError, OSError) as error:
        cause = describe(error)
        if isinstance(error, OSError) and error.filename is None and error.strerror:
            cause = f"{work.folder}: {error.strerror}"
        kept = kept_work(work.prefix)
        if kept is None and isinstance(error, ValueError):
            raise
        raise ValueError(f"{cause}; {kept or 'nothing was kept'}") from error


def _no_document_message(names: list[str], entry: JournalEntry) -> str:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if entry.skipped:
        empty = f" and {entry.empty} have no text" if entry.empty else ""
        return (
            f"no document in {listed}: {entry.skipped} are invalid{empty}, "
            f"the first invalid one is {entry.skipped_examples[0]}"
        )
    if entry.empty:
        return f"no document in {listed}: all {entry.empty} have no text, or none that gives a token"
    return f"no document in {listed}: there is nothing to tokenize"
