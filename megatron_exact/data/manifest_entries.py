"""The records that a manifest is made of, and the whole: `Manifest`. manifest.py reads and writes them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.data.shards import Corpus, open_corpus

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
    """Of what decides tokens: see tokenizer_identity.py."""


@dataclass(frozen=True, kw_only=True)
class DocumentTokens:
    """What every document of a pack's corpora starts and ends with, as the corpus records say."""

    prefix_ids: tuple[int, ...]
    """Ids at the start; may be empty."""
    eod_id: int
    """Id at the end."""
    eod_token: str
    """Its text."""


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
    bin_blocks_sha256: str | None = None
    """Of the hashes of the blocks in its record (`corpus_guard`); not in the fingerprint, which has
    `bin_sha256`."""
    bin_sample_sha256: str | None = None
    """Of a sample of the `.bin`, taken when it was packed; not in the fingerprint."""


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
    bin_blocks_sha256: str | None = None
    """As of a shard; None of a folder."""
    bin_sample_sha256: str | None = None
    """As of a shard; None of a folder."""
    empty_documents: int = 0
    """Those of `documents` that have no token and are in no split; in the file only if there are some."""
    largest_id: int | None = None
    """Largest token id of the whole corpus; None in packs made before it was kept. Not in the fingerprint,
    which has the corpus by its hashes."""

    @property
    def parts(self) -> tuple[Shard, ...]:
        """Its pairs of files: the shards, or itself."""
        if self.shards:
            return self.shards
        single = Shard(
            name=Path(self.prefix).name,
            documents=self.documents,
            tokens=self.tokens,
            idx_sha256=self.idx_sha256,
            bin_bytes=self.bin_bytes,
            bin_sha256=self.bin_sha256,
            bin_blocks_sha256=self.bin_blocks_sha256,
            bin_sample_sha256=self.bin_sample_sha256,
        )
        return (single,)


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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole manifest."""

    format_version: int
    """FORMAT_VERSION of manifest.py."""
    row_tokens: int
    """Inputs of a row."""
    policy: str
    """`concat` or `best-fit`."""
    seed: int
    """Of the split, the choice and the order."""
    mask_cross_document_targets: bool
    """Whether the first token of a document is never a supervised target."""
    validation_fraction: float
    """Of each source's documents."""
    train_tokens: int | None
    """Tokens asked for in the train split."""
    allow_repeats: bool
    """Whether a source shorter than its share was repeated."""
    weight_unit: str
    """What weights are shares of: `tokens` or `documents`."""
    tokenizer: TokenizerIdentity | None
    """None when nobody said which."""
    sources: tuple[Source, ...]
    """In the order given; `segment_source` holds indices into it."""
    splits: dict[str, Split]
    """`train` and `validation`."""
    fingerprint: str
    """See the head of manifest.py."""
    corpus_slice: str | None = None
    """`I/N`, the part of every source's training documents that the pack reads; in the file only where it
    is not all of them."""
    supervision: Supervision | None = None
    """Of question-answer records; in the file only where there is one."""
    document_tokens: DocumentTokens | None = None
    """None where no corpus record says them. Not in the fingerprint, as `Source.largest_id`."""

    @property
    def largest_id(self) -> int | None:
        """Largest token id of all sources; None if one is not known."""
        known = [source.largest_id for source in self.sources if source.largest_id is not None]
        return max(known) if len(known) == len(self.sources) else None

    def source_prefix(self, index: int, pack_dir: str | Path, source_root: str | Path | None) -> Path:
        """Where source `index` lies now.

        With `source_root`, the longest tail of the stored path that exists below it: `../data/a/train`
        is looked for as `data/a/train`, `a/train`, then `train`.

        Raises:
            FileNotFoundError: nothing below `source_root` matches.
        """
        stored = Path(self.sources[index].prefix)
        if source_root is None:
            return Path(os.path.normpath(Path(pack_dir).resolve() / stored))
        parts = [part for part in stored.parts if part not in ("..", "/")]
        for first in range(len(parts)):
            candidate = Path(source_root).joinpath(*parts[first:])
            sharded = bool(self.sources[index].shards)
            if candidate.is_dir() if sharded else candidate.with_name(candidate.name + ".idx").is_file():
                return candidate
        missing = f"folder {parts[-1]}" if self.sources[index].shards else f"{parts[-1]}.idx"
        raise FileNotFoundError(f"no {missing} below {source_root}: the pack's source {stored} is needed")

    def open_source(
        self, index: int, pack_dir: str | Path, source_root: str | Path | None = None
    ) -> Corpus:
        """Source `index`, opened where it lies now and compared with what was packed.

        Raises:
            ValueError, FileNotFoundError: it is missing, damaged or another one.
        """
        source = self.sources[index]
        known = [(shard.name, shard.documents, shard.tokens) for shard in source.shards]
        corpus = open_corpus(self.source_prefix(index, pack_dir, source_root), known)
        found = (corpus.num_documents, corpus.num_tokens, corpus.bin_bytes)
        if found != (source.documents, source.tokens, source.bin_bytes):
            raise ValueError(
                f"{corpus.prefix} holds {found[0]} documents, {found[1]} tokens and {found[2]} bytes "
                f"but {source.documents}, {source.tokens} and {source.bin_bytes} were packed: "
                "it was tokenized anew, pack it again"
            )
        return corpus

    def tokenizer_path(self, pack_dir: str | Path) -> Path | None:
        """Where the tokenizer lies now, None when it is unknown."""
        if self.tokenizer is None:
            return None
        return Path(os.path.normpath(Path(pack_dir).resolve() / self.tokenizer.path))
