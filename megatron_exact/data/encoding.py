"""What a tokenizing worker does: a batch of documents to token ids, each document checked.

Apart from `tokenize.py` so that worker processes import only this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.tokenizers import CorpusTokenizer


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What a worker needs to know."""

    tokenizer: CorpusTokenizer
    dtype: np.dtype[np.integer]
    skip_invalid: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Documents of one task."""

    texts: list[str]
    locations: list[str]
    progress_bytes: int
    """Bytes of all inputs that are read once this batch is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Result of one task."""

    ids: NDArray[np.integer]
    """Tokens of the documents that were kept, back to back."""
    lengths: list[int]
    """Tokens of each of them."""
    invalid: list[str]
    """Messages of those that were not."""
    progress_bytes: int


def encode_documents(options: EncodingOptions, batch: Batch) -> EncodedBatch:
    """Tokenize one batch; runs in a worker.

    Raises:
        ValueError: a document without a token, with the EOD inside its text, or on which the tokenizer
            fails; the first two are reported in the result under `skip_invalid`.
    """
    kept: list[NDArray[np.int32]] = []
    invalid: list[str] = []
    encoded = _encode_texts(options.tokenizer, batch)
    for ids, location in zip(encoded, batch.locations, strict=True):
        reason = _fault(options.tokenizer, ids)
        if reason is None:
            kept.append(ids)
        elif options.skip_invalid:
            invalid.append(f"{location}: {reason}")
        else:
            raise ValueError(f"{location}: {reason}; correct it or leave such out with --skip-invalid")
    return EncodedBatch(
        ids=np.concatenate([*kept, np.zeros(0, np.int32)]).astype(options.dtype),
        lengths=[len(ids) for ids in kept],
        invalid=invalid,
        progress_bytes=batch.progress_bytes,
    )


def _encode_texts(tokenizer: CorpusTokenizer, batch: Batch) -> list[NDArray[np.int32]]:
    """`encode_batch`; where the library fails, the error names the document."""
    try:
        return tokenizer.encode_batch(batch.texts)
    except Exception as of_batch:
        for text, location in zip(batch.texts, batch.locations, strict=True):
            try:
                tokenizer.encode_batch([text])
            except Exception as error:
                raise ValueError(
                    f"{location}: the tokenizer failed on this document ({type(error).__name__}: {error})"
                ) from error
        raise ValueError(
            f"{batch.locations[0]} and what follows: the tokenizer failed on this batch "
            f"({type(of_batch).__name__}: {of_batch})"
        ) from of_batch


def _fault(tokenizer: CorpusTokenizer, ids: NDArray[np.int32]) -> str | None:
    """Why a document cannot be used, or None."""
    if ids.size == tokenizer.num_added_tokens:
        return "the document has no token: its text becomes nothing in this tokenizer"
    if int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0:
        return f"token id {int(ids.max())} is outside the tokenizer's {tokenizer.vocab_size} ids"
    if np.count_nonzero(ids == tokenizer.eod_id) > 1:
        return (
            f"the text contains the EOD token {tokenizer.eod_token!r} itself, which would end the "
            "document early; choose another by --eod-token"
        )
    return None
