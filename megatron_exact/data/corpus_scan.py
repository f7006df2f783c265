"""One pass over a `.bin`: its hash, whether all ids are in the vocabulary, and where its EODs stand.

Memory holds a block of tokens and a block of document ends, whatever the size of the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.indexed import IndexedTokens

SCAN_BLOCK_BYTES = 1 << 20
CHECK_BLOCK_BYTES = 4 << 20  # a multiple of every token size
ENDS_A_BLOCK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Neighbouring tokens and the documents that end among them."""

    ids: NDArray[np.integer]
    """[tokens]."""
    position: int
    """Number of the first token in the corpus."""
    first_document: int
    """Document that this token is of."""
    first_start: int
    """Number of that document's first token."""
    ends: NDArray[np.int64]
    """[documents] one past the last token of each document that ends here, counted in the corpus."""

    def document_of(self, token: int) -> int:
        """Number of the document that holds a token of this block, counted in the corpus."""
        return self.first_document + int(np.searchsorted(self.ends, token, side="right"))


class _DocumentEnds:
    """Ends of all documents in order, block by block."""

    def __init__(self, document_tokens: NDArray[np.integer]) -> None:
        self._lengths = document_tokens
        self._loaded = self._taken = self._total = self._last_end = 0
        self._ready: NDArray[np.int64] = np.zeros(0, np.int64)

    def take(self, limit: int) -> tuple[int, int, NDArray[np.int64]]:
        """(number of the next document, its first token, ends <= `limit`) after those of the last call."""
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
    on_bytes: Callable[[int], object] | None = None,
    answer_starts: NDArray[np.integer] | None = None,
) -> tuple[str, ValueError | None]:
    """Hash the `.bin` and check its ids on the way.

    Args:
        corpus: whose index is sound.
        vocab_size: every id must be below it; None: not checked.
        eod_id: every document must hold exactly one, at its end; None: not checked.
        on_bytes: called with the number of bytes after each block.
        answer_starts: [documents], of question-answer records: where each answer begins. Before it the EOD
            may close turns of the prompt.

    Returns:
        Hex sha256 of the `.bin`, and the first bad token as an error that is not raised.
    """
    digest = hashlib.sha256()
    ends = _DocumentEnds(corpus.document_tokens)
    position = 0
    bad_token: ValueError | None = None
    with open(corpus.bin_path, "rb") as stream:
        while data := stream.read(CHECK_BLOCK_BYTES):
            digest.update(data)
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
            if on_bytes is not None:
                on_bytes(len(data))
    if bad_token is None and eod_id is not None and corpus.num_tokens == 0 and corpus.num_documents:
        bad_token = _no_token(corpus, 0)
    return digest.hexdigest(), bad_token


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


def first_id_beyond(corpus: IndexedTokens, vocab_size: int) -> ValueError | None:
    """The first token id that a vocabulary lacks, with its document, as an error that is not raised."""
    return scan_tokens(corpus, vocab_size, None)[1]


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
