"""The record beside a corpus (`PREFIX.json`): where its tokens come from, and how they are checked.

Megatron's `.bin` / `.idx` do not state their origin. The record names the raw files, the tokenizer and the
hashes of both files. It contains neither date nor version, so the same input gives the same bytes. Corpora
made by Megatron or datatrove lack it, so every reader must work without.

`check_corpus` verifies a corpus by one pass over its `.bin` (`scan_tokens`): its hash, whether all ids are
in the vocabulary, and where its EODs stand. Memory: a block of tokens and a block of document ends,
whatever the size of the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_guard import BLOCK_BYTES, BlockHasher, num_blocks
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.tokenizers import same_tokenizer
from megatron_exact.files import write_text
from megatron_exact.json_input import read_json_object

if TYPE_CHECKING:
    from megatron_exact.data.tokenizers import CorpusTokenizer


FORMAT_VERSION = 1
SCAN_BLOCK_BYTES = 1 << 20
CHECK_BLOCK_BYTES = 4 << 20  # a multiple of every token size
ENDS_A_BLOCK = 1 << 18
ANSWERS_DTYPE = "<i4"


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """Content of `PREFIX.json`."""

    raw_files: list[dict[str, Any]]
    """{`path`, `bytes`, `sha256`} of each input in the order given; paths from their common folder."""
    tokenizer: dict[str, Any]
    """{`path`, `kind`, `vocab_size`, `sha256`}. An absolute path, on disk relative to the record."""
    special_tokens: dict[str, Any]
    """{`prefix_ids`, `eod_id`, `eod_token`}: what every document starts and ends with."""
    documents: int
    """Documents in the corpus."""
    tokens: int
    """Tokens, special tokens included."""
    skipped: int
    """Documents left out by `--skip-invalid`."""
    dtype: str
    """numpy name of the stored ids, `uint16` or `int32`."""
    bin_sha256: str
    """Hex sha256 of `PREFIX.bin`."""
    idx_sha256: str
    """Hex sha256 of `PREFIX.idx`."""
    bin_blocks: list[str] | None = None
    """Hex sha256 of each 64 MB of `PREFIX.bin` (`corpus_guard`); None in older records."""
    empty: int = 0
    """Documents left out because they have no text, or none that gives a token; in the file only if any."""
    licence: str | None = None
    """Licence of the text, as the user stated it."""
    hub: dict[str, Any] | None = None
    """Hub data set that the text is from ({`repo`, `config`, `split`, `revision`, ...}); in the file only
    where there is one."""
    answers: dict[str, Any] | None = None
    """`AnswersRecord` of question-answer records; in the file only where there is one."""
    largest_id: int | None = None
    """Largest token id in the `.bin`; None in records made before it was kept."""
    counted_tokens: dict[str, int] = field(default_factory=dict)
    """How often text became a token that is not cut from text everywhere: an unknown word, or a piece that
    was added to the vocabulary (`CorpusTokenizer.counted_tokens`); in the file only where there is one."""


@dataclass(frozen=True, kw_only=True)
class AnswersRecord:
    """The entry `answers` in the record of a corpus of question-answer records."""

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
    """Return the path `PREFIX.answers.npy`."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".answers.npy")


def record_path(prefix: str | Path) -> Path:
    """Return the path `PREFIX.json`."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".json")


def write_corpus_record(prefix: str | Path, record: CorpusRecord) -> None:
    """Write `PREFIX.json` atomically."""
    write_text(record_path(prefix), format_corpus_record(prefix, record))


def format_corpus_record(prefix: str | Path, record: CorpusRecord) -> str:
    """Return the text of `PREFIX.json`."""
    folder = record_path(prefix).parent
    blocks = record.bin_blocks
    content = {
        "format_version": FORMAT_VERSION,
        "raw_files": record.raw_files,
        "tokenizer": {**record.tokenizer, "path": _portable(Path(record.tokenizer["path"]), folder)},
        "special_tokens": record.special_tokens,
        "counts": {
            "documents": record.documents,
            "tokens": record.tokens,
            "skipped": record.skipped,
            **({"empty": record.empty} if record.empty else {}),
        },
        **({} if record.largest_id is None else {"largest_id": record.largest_id}),
        **({"counted_tokens": record.counted_tokens} if record.counted_tokens else {}),
        "dtype": record.dtype,
        "bin_sha256": record.bin_sha256,
        "idx_sha256": record.idx_sha256,
        **({} if blocks is None else {"bin_blocks": {"block_bytes": BLOCK_BYTES, "sha256": blocks}}),
        "licence": record.licence,
        **({} if record.hub is None else {"hub": record.hub}),
        **({} if record.answers is None else {"answers": record.answers}),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_corpus_record(prefix: str | Path) -> CorpusRecord | None:
    """Read `PREFIX.json`; None where there is none.

    Raises:
        ValueError: the file is not a record of this format.
    """
    path = record_path(prefix)
    if not path.exists():
        return None
    content = read_json_object(
        path, "tokenize the corpus again, or remove this file to treat the corpus as one without a record"
    )
    if content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version")
        raise ValueError(
            f"{path} has format_version {version!r} but this program reads {FORMAT_VERSION}: "
            "tokenize the corpus again, or remove this file if it is not a corpus record"
        )
    try:
        return _parse(content, path.parent)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or was edited ({type(error).__name__}: {error}): tokenize the corpus again"
        ) from error


def check_corpus(
    prefix: str | Path,
    tokenizer: CorpusTokenizer | None = None,
    on_bytes: Callable[[int], object] | None = None,
    answer_starts: NDArray[np.integer] | None = None,
    *,
    idx_sha256: str | None = None,
    bin_sha256: str | None = None,
) -> None:
    """Verify a corpus: index, hashes, token ids, and one EOD at the end of each document.

    Hashes and the EOD are checked against `PREFIX.json`; without a record only what the index, `bin_sha256`
    and `tokenizer` say can be checked. Reads the `.bin` once. Its hash and those of its blocks are computed
    side by side, in two threads.

    Args:
        prefix: path without suffix.
        tokenizer: if given it must be the record's, and every id must be in its vocabulary too.
        on_bytes: called with the number of bytes after each block of the `.bin`.
        answer_starts: of question-answer records, see `scan_tokens`.
        idx_sha256: hash of an index that was checked already; None checks it.
        bin_sha256: hash that the `.bin` must have where there is no record.

    Raises:
        ValueError: the first mismatch, with the file and both values.
        FileNotFoundError: `.bin` or `.idx` is missing.
    """
    corpus = IndexedTokens(prefix)
    idx_sha256 = idx_sha256 or corpus.check()
    record = read_corpus_record(prefix)
    vocab_size: int | None = None
    eod_id: int | None = None
    if record is not None:
        _check_record(corpus, idx_sha256, record, tokenizer)
        vocab_size, eod_id = record.tokenizer["vocab_size"], record.special_tokens["eod_id"]
        bin_sha256 = record.bin_sha256
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size if vocab_size is None else min(vocab_size, tokenizer.vocab_size)
    digest, blocks = hashlib.sha256(), BlockHasher()
    has_blocks = record is not None and record.bin_blocks is not None
    with ThreadPoolExecutor(1) as thread:

        def on_block(data: bytes) -> None:
            other = thread.submit(blocks.update, data) if has_blocks else None
            digest.update(data)
            if other is not None:
                other.result()
            if on_bytes is not None:
                on_bytes(len(data))

        bad_token = scan_tokens(corpus, vocab_size, eod_id, on_block, answer_starts)
    # The hash first: a changed file explains a bad id, while another tokenizer does not
    if bin_sha256 is not None and digest.hexdigest() != bin_sha256:
        raise ValueError(_hash_message(corpus.bin_path, digest.hexdigest(), bin_sha256))
    if bad_token is not None:
        raise bad_token
    if record is not None and has_blocks and blocks.hexdigests() != record.bin_blocks:
        raise ValueError(
            f"{record_path(prefix)} gives hashes of blocks that are not those of {corpus.bin_path}, whose "
            "sha256 is as recorded: the record is damaged, tokenize again"
        )


def _parse(content: dict[str, Any], folder: Path) -> CorpusRecord:
    tokenizer = {key: content["tokenizer"][key] for key in ("path", "kind", "vocab_size", "sha256")}
    tokenizer["path"] = os.path.abspath(folder / tokenizer["path"])
    special = {key: content["special_tokens"][key] for key in ("prefix_ids", "eod_id", "eod_token")}
    raw_files = [{key: file[key] for key in ("path", "bytes", "sha256")} for file in content["raw_files"]]
    licence, hub = content["licence"], content.get("hub")
    answers = content.get("answers")
    for name, table in (("hub", hub), ("answers", answers)):
        if table is not None and not isinstance(table, dict):
            raise ValueError(f"{name} is {table!r}, not a table")
    return CorpusRecord(
        raw_files=raw_files,
        tokenizer={
            **tokenizer,
            "vocab_size": _count(tokenizer["vocab_size"]),
            "kind": str(tokenizer["kind"]),
            "sha256": _hex(tokenizer["sha256"]),
        },
        special_tokens={
            **special,
            "prefix_ids": [_count(one) for one in special["prefix_ids"]],
            "eod_id": _count(special["eod_id"]),
        },
        documents=_count(content["counts"]["documents"]),
        tokens=_count(content["counts"]["tokens"]),
        skipped=_count(content["counts"]["skipped"]),
        empty=_count(content["counts"].get("empty", 0)),
        dtype=str(np.dtype(content["dtype"])),
        bin_sha256=_hex(content["bin_sha256"]),
        idx_sha256=_hex(content["idx_sha256"]),
        bin_blocks=_blocks(content),
        licence=None if licence is None else str(licence),
        hub=hub,
        answers=answers,
        largest_id=None if content.get("largest_id") is None else _count(content["largest_id"]),
        counted_tokens={
            str(token): _count(times) for token, times in content.get("counted_tokens", {}).items()
        },
    )


def _blocks(content: dict[str, Any]) -> list[str] | None:
    blocks = content.get("bin_blocks")
    if blocks is None:
        return None
    if blocks["block_bytes"] != BLOCK_BYTES:
        raise ValueError(f"bin_blocks has blocks of {blocks['block_bytes']!r} bytes, not {BLOCK_BYTES}")
    size = _count(content["counts"]["tokens"]) * np.dtype(content["dtype"]).itemsize
    if not isinstance(blocks["sha256"], list) or len(blocks["sha256"]) != num_blocks(size):
        raise ValueError(f"bin_blocks has not one hash for each of {num_blocks(size)} blocks")
    return [_hex(value) for value in blocks["sha256"]]


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a whole number >= 0")
    return value


def _hex(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{value!r} is not a sha256")
    return value


def _portable(path: Path, folder: Path) -> str:
    """Return `path` relative to `folder`, so that both can move together; absolute if they share none."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    if Path(os.path.commonpath([path, folder])) == Path(path.anchor):
        return str(path)
    return os.path.relpath(path, folder)


def _check_record(
    corpus: IndexedTokens, idx_sha256: str, record: CorpusRecord, tokenizer: CorpusTokenizer | None
) -> None:
    if idx_sha256 != record.idx_sha256:
        raise ValueError(_hash_message(corpus.idx_path, idx_sha256, record.idx_sha256))
    for name, found, recorded in (
        ("documents", corpus.num_documents, record.documents),
        ("tokens", corpus.num_tokens, record.tokens),
        ("dtype", str(corpus.dtype), record.dtype),
    ):
        if found != recorded:
            raise ValueError(
                f"{corpus.idx_path} says {name} {found} but {record_path(corpus.prefix)} says {recorded}: "
                "tokenize the corpus again"
            )
    if tokenizer is not None and not same_tokenizer(
        {"path": str(tokenizer.path), "kind": tokenizer.kind, "sha256": tokenizer.sha256}, record.tokenizer
    ):
        raise ValueError(
            f"tokenizer {tokenizer.path} has sha256 {tokenizer.sha256} but {corpus.prefix} was made with "
            f"{record.tokenizer['sha256']} ({record.tokenizer['path']}): use that one or tokenize again"
        )


def _hash_message(path: Path, found: str, recorded: str) -> str:
    return (
        f"{path} has sha256 {found} but {recorded} was recorded: the file was changed or damaged "
        "after tokenizing, restore it or tokenize the corpus again"
    )


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Neighbouring tokens and the ends of documents among them."""

    ids: NDArray[np.integer]
    """[tokens], ids."""
    position: int
    """Number of the first token in the corpus."""
    first_document: int
    """Document of the first token."""
    first_start: int
    """Number of the first token of that document."""
    ends: NDArray[np.int64]
    """[documents] one past the last token of each document that ends here, counted in the corpus."""

    def document_of(self, token: int) -> int:
        """Return the number in the corpus of the document that contains a token of this block."""
        return self.first_document + int(np.searchsorted(self.ends, token, side="right"))


class _DocumentEnds:
    """Reads the ends of all documents in order, block by block."""

    def __init__(self, document_tokens: NDArray[np.integer]) -> None:
        self._lengths = document_tokens
        self._loaded = self._taken = self._total = self._last_end = 0
        self._ready: NDArray[np.int64] = np.zeros(0, np.int64)

    def take(self, limit: int) -> tuple[int, int, NDArray[np.int64]]:
        """Return (number of the next document, its first token, ends <= `limit`) after the last call's."""
        first, start, parts = self._taken, self._last_end, []
        while True:
            count = int(np.searchsorted(self._ready, limit, side="right"))
            parts.append(self._ready[:count])
            self._ready = self._ready[count:]
            if self._ready.size or self._loaded == len(self._lengths):
                break
            lengths = np.asarray(self._lengths[self._loaded : self._loaded + ENDS_A_BLOCK])
            self._loaded += len(lengths)
            self._ready = np.cumsum(lengths, dtype=np.int64) + self._total
            self._total = int(self._ready[-1])
        ends = np.concatenate(parts)
        self._taken += len(ends)
        self._last_end = int(ends[-1]) if len(ends) else start
        return first, start, ends


def scan_tokens(
    corpus: IndexedTokens,
    vocab_size: int | None,
    eod_id: int | None,
    on_block: Callable[[bytes], object] | None = None,
    answer_starts: NDArray[np.integer] | None = None,
) -> ValueError | None:
    """Read the `.bin` once and check its ids.

    Args:
        corpus: whose index is sound.
        vocab_size: every id must be below it; None: not checked.
        eod_id: every document must hold exactly one, at its end; None: not checked.
        on_block: called with the bytes of each block.
        answer_starts: [documents], of question-answer records: where each answer begins. Before it the EOD
            may close turns of the prompt.

    Returns:
        The first bad token, as an error that is not raised.
    """
    ends = _DocumentEnds(corpus.document_tokens)
    position = 0
    bad_token: ValueError | None = None
    with open(corpus.bin_path, "rb") as stream:
        while data := stream.read(CHECK_BLOCK_BYTES):
            if on_block is not None:
                on_block(data)
            if bad_token is None:
                ids = np.frombuffer(data, dtype=corpus.dtype)
                first, start, in_block = ends.take(position + ids.size)
                block = _Block(
                    ids=ids, position=position, first_document=first, first_start=start, ends=in_block
                )
                position += ids.size
                bad_token = _bad_id(corpus, block, vocab_size) or _bad_eod(
                    corpus, block, eod_id, answer_starts
                )
            elif on_block is None:
                break
    if bad_token is None and eod_id is not None and corpus.num_tokens == 0 and corpus.num_documents:
        bad_token = _no_token(corpus, 0)
    return bad_token


def largest_id(corpus: IndexedTokens, on_bytes: Callable[[int], object] | None = None) -> int:
    """The largest token id of a `.bin`, read once from end to end (gigabytes a second, unlike a hash).

    Raises:
        ValueError: a negative id.
    """
    largest = -1
    block = np.empty(SCAN_BLOCK_BYTES // corpus.dtype.itemsize, dtype=corpus.dtype)
    with open(corpus.bin_path, "rb", buffering=0) as stream:
        while size := stream.readinto(memoryview(block).cast("B")):  # one block, or packing would hold two
            ids = block[: size // corpus.dtype.itemsize]
            if int(ids.min()) < 0:
                raise ValueError(f"{corpus.bin_path} has the token id {int(ids.min())}: tokenize it again")
            largest = max(largest, int(ids.max()))
            if on_bytes is not None:
                on_bytes(size)
    return largest


def _bad_id(corpus: IndexedTokens, block: _Block, vocab_size: int | None) -> ValueError | None:
    ids = block.ids
    if vocab_size is None or (int(ids.max()) < vocab_size and int(ids.min()) >= 0):
        return None
    worst = int(np.argmax((ids >= vocab_size) | (ids < 0)))
    document = block.document_of(block.position + worst)
    return ValueError(
        f"{corpus.bin_path}: token id {int(ids[worst])} in document {document} is outside the tokenizer's "
        f"{vocab_size} ids: the corpus was made with another tokenizer, tokenize it again"
    )


def _bad_eod(
    corpus: IndexedTokens, block: _Block, eod_id: int | None, answer_starts: NDArray[np.integer] | None
) -> ValueError | None:
    if eod_id is None:
        return None
    found = np.flatnonzero(block.ids == eod_id) + block.position
    expected = block.ends - 1
    if answer_starts is not None and found.size:
        inside = np.searchsorted(block.ends, found, side="right")  # document, counted in the block
        first_tokens = np.concatenate(([block.first_start], block.ends))
        found = found[found >= (first_tokens[inside] + answer_starts[block.first_document + inside])]
    if np.array_equal(found, expected):
        return None
    empty = np.flatnonzero(np.diff(block.ends, prepend=block.first_start) == 0)
    if empty.size:
        return _no_token(corpus, block.first_document + int(empty[0]))
    token = int(np.setxor1d(found, expected)[0])
    document = block.document_of(token)
    where = "does not end with" if token in expected else "has, before its end,"
    return ValueError(
        f"{corpus.bin_path}: document {document} {where} the EOD id {eod_id}: each document must hold "
        "exactly one, as its last token; tokenize the corpus again"
    )


def _no_token(corpus: IndexedTokens, document: int) -> ValueError:
    return ValueError(f"{corpus.prefix}: document {document} has no token, not even an EOD: tokenize again")
