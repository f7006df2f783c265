"""The records that a manifest is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FIRST_TARGET = "segment_first_target"
FIRST_TARGET_DTYPE = "<i4"
"""Array of packs with supervised answers: the token of its document that is each segment's first target."""


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """Which tokenizer made the tokens."""

    path: str
    """Folder or file, relative to the pack where possible."""
    kind: str
    """`huggingface` or `sentencepiece`."""
    vocab_size: int
    """Number of ids; every token id is below it."""
    sha256: str
    """Of the tokenizer's files."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One `.bin`/`.idx` pair of a source that is a folder of them."""

    name: str
    """File name without suffix."""
    documents: int
    """Documents in it."""
    tokens: int
    """Tokens in it."""
    idx_sha256: str
    """Of the `.idx`."""
    bin_bytes: int
    """Size of the `.bin`."""
    bin_sha256: str | None
    """Of the `.bin`, from its corpus record; None when there is no record."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus that was packed: a `.bin`/`.idx` pair, or a folder of such shards.

    Documents of a folder are numbered through its shards in the order of their names; its hashes are
    those of the shards' hashes (hex, joined by newlines).
    """

    prefix: str
    """Path without suffix, or the folder; relative to the pack where possible."""
    weight: float | None
    """Share in the train split before normalisation; None when no source has one."""
    documents: int
    """Documents of the whole corpus."""
    tokens: int
    """Tokens of the whole corpus."""
    idx_sha256: str
    """Of the `.idx`."""
    bin_bytes: int
    """Size of the `.bin`."""
    bin_sha256: str | None
    """Of the `.bin`, from the corpus record; None when there is no record."""
    raw_files: tuple[dict[str, Any], ...]
    """Raw text files, from the corpus record."""
    licence: str | None
    """From the corpus record; of shards that differ, all of them."""
    shards: tuple[Shard, ...]
    """Of a folder; none for a single pair."""


@dataclass(frozen=True, kw_only=True)
class TokenPlace:
    """One token of one source."""

    source: int
    """Index into the manifest's sources."""
    document: int
    """Document number inside the source."""
    start: int
    """Token offset inside the document."""


@dataclass(frozen=True, kw_only=True)
class SourceUse:
    """What one split took from one source."""

    documents: int
    """Documents chosen, repeats counted each time."""
    tokens: int
    """Their tokens."""
    repeated_tokens: int
    """Those of them beyond the first pass over the source."""
    unused_tokens: int
    """Tokens of the source's documents of this split that were not chosen."""


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Supervised targets per bucket of effective context."""

    lower: tuple[int, ...]
    """Lower edges, tokens."""
    counts: tuple[int, ...]
    """Targets."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """Of a pack of question-answer records: what of them is supervised. Ordinary packs have none."""

    targets: str
    """`answers`: the tokens of the answer and the EOD behind it."""
    template: str
    """Jinja source of the chat template that the records were written with."""
    template_sha256: str
    """Of its UTF-8 bytes."""
    context_place: str
    """Where a record's context stands in the question: `before` or `after` the instruction."""
    answers_sha256: tuple[str, ...]
    """Of each source's file of answer starts (`PREFIX.answers.npy`)."""
    left_out_records: int
    """Records longer than a row, which are in no source."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one split holds."""

    rows: int
    """Packed rows."""
    segments: int
    """Segments of all rows."""
    tokens: int
    """Inputs that are tokens of documents."""
    padding_tokens: int
    """Inputs that are padding; tokens + padding_tokens = rows * row_tokens."""
    left_out_tokens: int
    """Tokens of chosen documents that are no input of any row."""
    supervised_targets: int
    """Targets whose loss counts."""
    exposure: Exposure
    """Those targets by effective context."""
    next_token: TokenPlace | None
    """The token after the last row's last input (`concat` with rows), else None."""
    sources: tuple[SourceUse, ...]
    """In the order of the manifest's sources."""
    arrays: dict[str, str]
    """File name inside the split's folder to its sha256."""
