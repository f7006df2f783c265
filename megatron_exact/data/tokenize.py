"""Tokenize raw text into a Megatron corpus: `PREFIX.bin`, `PREFIX.idx` and the record `PREFIX.json`.

Worker processes decode and tokenize batches of about a megabyte of raw records (`encode_documents`); the
main process reads ahead, writes in the order of the input and hashes what it writes (`tokenize_corpus`).
The bytes are the same for any number of workers and however often the run was killed and resumed
(`tokenize_journal`). Memory holds a few batches a worker, whatever the size of the corpus. How fast that
is: `benchmarks/tokenising.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import describe, printable, progress_bar
from megatron_exact.data.corpus_record import CorpusRecord, format_corpus_record, read_corpus_record
from megatron_exact.data.documents import (
    DEFAULT_TEXT_KEY,
    CorpusInputs,
    Cursor,
    FileInputs,
    RawPart,
    decode_part,
)
from megatron_exact.data.encoding_engine import (
    CHECK_EVERY,
    FIRST_DOCUMENTS,
    CheckedEngine,
    EngineDifferenceError,
    choose_engine,
)
from megatron_exact.data.indexed import GrowingCorpus, token_dtype
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
DOCUMENTS_A_CALL = 1024  # the library keeps about a kilobyte a document until they are fetched


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What a worker needs to know."""

    tokenizer: CorpusTokenizer
    """Tokenizer of the corpus."""
    dtype: np.dtype[np.integer]
    """dtype of the stored token ids."""
    text_key: str
    """Field or column that contains the text."""
    skip_invalid: bool
    """Whether invalid documents are left out and counted."""
    engine: CheckedEngine | None = None
    """Engine that encodes in place of the tokenizer's own library, with the same result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Records of one task, in the order of the corpus."""

    parts: list[RawPart]
    """Neighbouring records, not decoded yet."""
    input: int
    """Number of the input that the last part belongs to."""
    cursor: Cursor
    """How far that input is read with this batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Result of one task."""

    ids: NDArray[np.integer]
    """[tokens], ids of the documents that were kept, back to back."""
    lengths: NDArray[np.int32]
    """[documents], tokens of each of them."""
    invalid: list[str]
    """Messages about documents that could not be used."""
    empty: int
    """Documents without text, or whose text gives no token."""
    counted: dict[str, int]
    """How often the text of a kept document became each of the tokenizer's `counted_tokens`."""
    input: int
    """As in the batch."""
    cursor: Cursor
    """As in the batch."""
    difference: str = ""
    """Why the tokens of the engine cannot be trusted; empty, and with tokens, where they can."""


@dataclass(kw_only=True)
class _Encoded:
    """The result of a batch while it is encoded."""

    ids: list[NDArray[np.int32]] = field(default_factory=list)
    lengths: list[NDArray[np.int32]] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    empty: int = 0


def encode_documents(options: EncodingOptions, batch: Batch) -> EncodedBatch:
    """Decode and tokenize one batch; runs in a worker.

    Raises:
        ValueError: an invalid record or a document with the EOD inside its text, both reported in the
            result under `skip_invalid`; or one on which the tokenizer fails.
    """
    try:
        return _encode_batch(options, batch)
    except EngineDifferenceError as error:  # returned, not raised: errors raised here keep the work done
        return _joined(options, batch, _Encoded(), str(error))


def _encode_batch(options: EncodingOptions, batch: Batch) -> EncodedBatch:
    encoded = _Encoded()
    texts: list[str] = []
    locations: list[str] = []
    for part in batch.parts:
        for location, text, reason in decode_part(part, options.text_key):
            if text == "":
                encoded.empty += 1
                continue
            if text is not None:
                texts.append(text)
                locations.append(location)
            if texts and (text is None or len(texts) == DOCUMENTS_A_CALL):
                _encode(options, texts, locations, encoded)
                texts, locations = [], []
            if text is None:  # after the documents before it, so that the first fault is the one named
                _reject(options, location, reason, encoded.invalid)
    if texts:
        _encode(options, texts, locations, encoded)
    return _joined(options, batch, encoded)


def _joined(
    options: EncodingOptions, batch: Batch, encoded: _Encoded, difference: str = ""
) -> EncodedBatch:
    ids = np.concatenate([*encoded.ids, np.zeros(0, np.int32)])
    lengths = np.concatenate([*encoded.lengths, np.zeros(0, np.int32)])
    return EncodedBatch(
        ids=ids.astype(options.dtype, copy=False),
        lengths=lengths,
        invalid=encoded.invalid,
        empty=encoded.empty,
        counted=_count(options.tokenizer, ids, len(lengths)),
        input=batch.input,
        cursor=batch.cursor,
        difference=difference,
    )


def _encode(options: EncodingOptions, texts: list[str], locations: list[str], encoded: _Encoded) -> None:
    """Tokenize neighbouring documents; check them together and, where that finds a fault, one by one."""
    tokenizer = options.tokenizer
    flat, lengths = tokenizer.documents_of(
        _encode_texts(tokenizer, texts, locations)
        if options.engine is None
        else options.engine.encode(texts, locations)
    )
    ends = np.cumsum(lengths)
    is_sound = (
        int(lengths.min()) > tokenizer.num_added_tokens
        and int(flat.max()) < tokenizer.vocab_size
        and int(flat.min()) >= 0
        and np.array_equal(np.flatnonzero(flat == tokenizer.eod_id), ends - 1)
    )
    if not is_sound:
        documents = np.split(flat, ends[:-1])
        kept = []
        for location, ids, text in zip(locations, documents, texts, strict=True):
            if ids.size == tokenizer.num_added_tokens:  # the tokenizer makes nothing of white space
                encoded.empty += 1
                continue
            reason = _fault(tokenizer, ids, text)
            if reason is None:
                kept.append(ids)
            else:
                _reject(options, location, reason, encoded.invalid)
        flat = np.concatenate([*kept, np.zeros(0, np.int32)])
        lengths = np.array([ids.size for ids in kept], np.int32)
    encoded.ids.append(flat)
    encoded.lengths.append(lengths)


def _encode_texts(tokenizer: CorpusTokenizer, texts: list[str], locations: list[str]) -> list[list[int]]:
    """Return the ids of each text; where the library fails, the error names the document."""
    try:
        return tokenizer.backend.encode_batch(texts)
    except Exception as of_batch:
        for text, location in zip(texts, locations, strict=True):
            try:
                tokenizer.backend.encode_batch([text])
            except Exception as error:
                raise ValueError(
                    f"{location}: the tokenizer failed on this document ({type(error).__name__}: {error})"
                ) from error
        raise ValueError(
            f"{locations[0]} and what follows: the tokenizer failed on this batch "
            f"({type(of_batch).__name__}: {of_batch})"
        ) from of_batch


def _count(tokenizer: CorpusTokenizer, ids: NDArray[np.int32], documents: int) -> dict[str, int]:
    """Count how often text became one of the counted tokens."""
    if not tokenizer.counted_tokens or not ids.size:
        return {}
    is_counted = np.zeros(tokenizer.vocab_size, np.bool_)
    is_counted[[token_id for token_id, _ in tokenizer.counted_tokens]] = True
    found = np.bincount(ids[is_counted[ids]], minlength=tokenizer.vocab_size)
    for token_id in tokenizer.prefix_ids:
        found[token_id] -= documents if is_counted[token_id] else 0
    return {text: int(found[token_id]) for token_id, text in tokenizer.counted_tokens if found[token_id]}


def _reject(options: EncodingOptions, location: str, reason: str, invalid: list[str]) -> None:
    if not options.skip_invalid:
        raise ValueError(f"{location}: {reason}; correct it or leave such out with --skip-invalid")
    invalid.append(f"{location}: {reason}")


def _fault(tokenizer: CorpusTokenizer, ids: NDArray[np.int32], text: str) -> str | None:
    """Say why a document cannot be used; None where it can."""
    if int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0:
        return f"token id {int(ids.max())} is outside the tokenizer's {tokenizer.vocab_size} ids"
    if np.count_nonzero(ids == tokenizer.eod_id) > 1:
        return eod_in_text(tokenizer, text)
    return None


def eod_in_text(tokenizer: CorpusTokenizer, text: str) -> str:
    """Say why a text has the EOD among its tokens: it spells the EOD, or contains an unknown word."""
    part = tokenizer.backend.text_of(text, tokenizer.eod_id) or ""
    if tokenizer.eod_id == tokenizer.unknown_id and part.strip() != tokenizer.eod_token.strip():
        return (
            f"the tokenizer does not know {part!r} and writes its unknown token {tokenizer.eod_token!r}, "
            "which is also the EOD and would end the document early; choose another by --eod-token"
        )
    return (
        f"the text contains the EOD token {tokenizer.eod_token!r} itself (as {part!r}), which would end "
        "the document early; choose another by --eod-token"
    )


Pool = WorkerPool[EncodingOptions, Batch, EncodedBatch]


@dataclass(frozen=True, kw_only=True)
class TokenizeSummary:
    """What `tokenize_corpus` wrote."""

    prefix: Path
    """Common path of the three files, without suffix."""
    record: CorpusRecord
    """Content of the record."""
    skipped_examples: tuple[str, ...]
    """File, line and reason of the first skipped documents."""
    resumed_documents: int
    """Documents that an earlier, interrupted run had written."""


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
    engine: str = "auto",
    check_every: int = CHECK_EVERY,
    batch_bytes: int = BATCH_BYTES,
    journal_bytes: int = JOURNAL_BYTES,
    journal_seconds: float = JOURNAL_SECONDS,
) -> TokenizeSummary:
    """Tokenize text into one corpus: all three files appear, the `.idx` last, or no file does.

    A run that is interrupted after its first journal entry leaves a hidden folder, from which the same call
    resumes. One that is interrupted earlier leaves nothing, or, if killed, a folder that the next run
    removes.

    Args:
        inputs: `.jsonl[.gz|.zst]`, `.parquet` and `.txt` files, in the order of the corpus.
        tokenizer_path: see `load_tokenizer`.
        output_prefix: path without suffix; none of the three files may exist.
        workers: processes that tokenize; 1 starts none. More need an importable `__main__`.
        text_key: field or column that contains the text of files.
        skip_invalid: leave out invalid documents and count them, instead of stopping at the first.
        add_bos: see `load_tokenizer`.
        eod_token: see `load_tokenizer`.
        force_eod: see `load_tokenizer`.
        licence: licence of the text, recorded as it is.
        engine: one of `encoding_engine.ENGINES`; the result does not depend on it, and a run may resume
            with another one.
        check_every: one document in so many is also encoded by the tokenizer's own library.
        batch_bytes: text of one task of a worker; the result does not depend on it.
        journal_bytes, journal_seconds: a journal entry is due after this much of the `.bin`, or this time.

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
                    run.tokenize(pool, workers, batch_bytes, engine, check_every)
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
    """The work of one process, from start or resume to the end or an interruption."""

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

    def tokenize(self, pool: Pool, workers: int, batch_bytes: int, engine: str, check_every: int) -> None:
        """Append all documents that are not in the corpus yet."""
        batches = _batches(self._inputs, self._entry, batch_bytes)
        options, batches = self._with_engine(batches, engine, check_every)
        results = pool.map_in_order(
            options,
            batches,
            max_pending_bytes=workers * PENDING_TASKS_PER_WORKER * batch_bytes,
        )
        try:
            with contextlib.closing(results):
                self._write_tokens(results)
        except EngineDifferenceError:  # documents that are already written may be wrong, too
            self._work.discard()
            raise
        except BaseException:
            if self._work.entry is not None:  # keep what was done since, if the disk still takes it
                with contextlib.suppress(OSError):
                    self._journal()
            raise

    def _with_engine(
        self, batches: Iterator[tuple[int, Batch]], engine: str, check_every: int
    ) -> tuple[EncodingOptions, Iterator[tuple[int, Batch]]]:
        """Choose the engine by the first batch; return the options with it, and all batches."""
        first = next(batches, None)
        if first is None:
            return self._options, iter(())
        parts, text_key = first[1].parts, self._options.text_key
        documents = (text for part in parts for _, text, _ in decode_part(part, text_key) if text)
        chosen, line = choose_engine(
            engine,
            self._options.tokenizer.backend,
            list(itertools.islice(documents, FIRST_DOCUMENTS)),
            sum(self._inputs.sizes()),
            check_every,
        )
        if line:
            print(printable(line), file=sys.stderr, flush=True)
        return replace(self._options, engine=chosen), itertools.chain([first], batches)

    def _write_tokens(self, results: Iterator[EncodedBatch]) -> None:
        sizes = self._inputs.sizes()
        before = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        start = int(before[self._entry.input]) + self._entry.cursor.progress_bytes
        journal_tokens, journal_time = self._entry.tokens, time.monotonic()
        with progress_bar("tokenize", sum(sizes) or None, "B") as bar:
            bar.update(start)
            for result in results:
                if result.difference:
                    raise EngineDifferenceError(result.difference)
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
        """Write index and record beside the tokens; everything is then on disk and in the journal."""
        if self._entry.documents == 0:
            raise ValueError(_no_document_message(self._inputs.names(), self._entry))
        try:
            raw_files = self._inputs.raw_files()
        except ValueError:  # an input has changed, so what was made from it cannot be used
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
    """Describe everything that the bytes of a corpus depend on, as JSON values."""
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
    """Yield (bytes, batch) from where the journal stands, in the order of the corpus."""
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
    """Turn a failure into one line that also says what was kept."""
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
