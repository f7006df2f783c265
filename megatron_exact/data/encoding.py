"""What a tokenizing worker does: a batch of raw records to token ids, each document checked.

Apart from `tokenize.py` so that worker processes import only this.
"""

from __future__ import annotations

import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.documents import decode_part
from megatron_exact.data.raw_parts import Cursor, RawPart
from megatron_exact.data.tokenizers import CorpusTokenizer

DOCUMENTS_A_CALL = 1024  # the library keeps about a kilobyte a document until they are fetched


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What a worker needs to know."""

    tokenizer: CorpusTokenizer
    dtype: np.dtype[np.integer]
    text_key: str
    skip_invalid: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Records of one task, in the order of the corpus."""

    parts: list[RawPart]
    input: int
    """Number of the input that the last part is of."""
    cursor: Cursor
    """How far that input is read with this batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Result of one task."""

    ids: NDArray[np.integer]
    """[tokens] of the documents that were kept, back to back."""
    lengths: NDArray[np.int32]
    """[documents] tokens of each of them."""
    invalid: list[str]
    """Messages of those that could not be used."""
    empty: int
    """How many have no text, or none that gives a token."""
    counted: dict[str, int]
    """Of `counted_tokens`, how often the text of a kept document became one."""
    input: int
    """As in the batch."""
    cursor: Cursor
    """As in the batch."""


@dataclass(kw_only=True)
class _Encoded:
    """What grows while a batch is encoded."""

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
                _refuse(options, location, reason, encoded.invalid)
    if texts:
        _encode(options, texts, locations, encoded)
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
    )


def _encode(options: EncodingOptions, texts: list[str], locations: list[str], encoded: _Encoded) -> None:
    """Tokens of neighbouring documents, checked together and, where that finds a fault, one by one."""
    tokenizer = options.tokenizer
    flat, lengths = _flatten(tokenizer, _encode_texts(tokenizer, texts, locations))
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
                _refuse(options, location, reason, encoded.invalid)
        flat = np.concatenate([*kept, np.zeros(0, np.int32)])
        lengths = np.array([ids.size for ids in kept], np.int32)
    encoded.ids.append(flat)
    encoded.lengths.append(lengths)


def _flatten(
    tokenizer: CorpusTokenizer, encoded: list[list[int]]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Prefix, text and EOD of all documents back to back, int32 [tokens], and int32 [documents] lengths."""
    prefix = list(tokenizer.prefix_ids)
    flat = array.array("i")
    for ids in encoded:
        flat.fromlist(prefix)
        flat.fromlist(ids)
        flat.append(tokenizer.eod_id)
    lengths = np.array([len(ids) for ids in encoded], np.int32) + tokenizer.num_added_tokens
    return np.frombuffer(flat, np.int32), lengths.astype(np.int32, copy=False)


def _encode_texts(tokenizer: CorpusTokenizer, texts: list[str], locations: list[str]) -> list[list[int]]:
    """Ids of each text; where the library fails, the error names the document."""
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
    """How often text became one of the tokens that are counted."""
    if not tokenizer.counted_tokens or not ids.size:
        return {}
    is_counted = np.zeros(tokenizer.vocab_size, np.bool_)
    is_counted[[token_id for token_id, _ in tokenizer.counted_tokens]] = True
    found = np.bincount(ids[is_counted[ids]], minlength=tokenizer.vocab_size)
    for token_id in tokenizer.prefix_ids:
        found[token_id] -= documents if is_counted[token_id] else 0
    return {text: int(found[token_id]) for token_id, text in tokenizer.counted_tokens if found[token_id]}


def _refuse(options: EncodingOptions, location: str, reason: str, invalid: list[str]) -> None:
    if not options.skip_invalid:
        raise ValueError(f"{location}: {reason}; correct it or leave such out with --skip-invalid")
    invalid.append(f"{location}: {reason}")


def _fault(tokenizer: CorpusTokenizer, ids: NDArray[np.int32], text: str) -> str | None:
    """Why a document cannot be used, or None."""
    if int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0:
        return f"token id {int(ids.max())} is outside the tokenizer's {tokenizer.vocab_size} ids"
    if np.count_nonzero(ids == tokenizer.eod_id) > 1:
        return eod_in_text(tokenizer, text)
    return None


def eod_in_text(tokenizer: CorpusTokenizer, text: str) -> str:
    """Why a text has the EOD among its tokens: it spells it, or has a word that is unknown."""
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
