"""Prove the sources of a pack: that they are still those that were packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_exact.command_line import progress_bar
from megatron_exact.data.answers import answer_starts
from megatron_exact.data.corpus_guard import hash_blocks
from megatron_exact.data.corpus_record import check_corpus
from megatron_exact.data.distinct import named_parts, require_distinct_content, require_distinct_files
from megatron_exact.data.manifest import Manifest, Shard, Source
from megatron_exact.data.shards import Corpus
from megatron_exact.data.source_guards import require_record, require_sample
from megatron_exact.data.sources import Part, join_hashes, provenance, read_parts
from megatron_exact.files import sha256_file

if TYPE_CHECKING:
    from megatron_exact.data.tokenizers import CorpusTokenizer


def look_at_source(
    pack_dir: Path,
    manifest: Manifest,
    index: int,
    source_root: str | Path | None,
    opened: list[Corpus],
) -> str:
    """Read every byte of source `index` and compare with the manifest.

    Args:
        pack_dir: a packed dataset.
        manifest: its manifest.
        index: of the source.
        source_root: where the corpora lie now, if not where the manifest says.
        opened: the corpus is added to it once it is known to have the packed sizes, even if a later
            comparison fails: other checks look at its records.

    Returns:
        What was proved.

    Raises:
        ValueError, OSError: what differs.
    """
    source = manifest.sources[index]
    corpus = manifest.open_source(index, pack_dir, source_root)
    parts = read_parts(corpus)
    for part, packed in zip(parts, source.parts, strict=True):
        compare(f"sha256 of {part.tokens.idx_path}", part.tokens.check(), packed.idx_sha256)
    opened.append(corpus)
    compare("the hash of all indices", _index_hash(source), source.idx_sha256)
    for part, packed in zip(parts, source.parts, strict=True):
        _look_at_tokens(part, packed, manifest, pack_dir)
        require_record(part.tokens, part.record, packed)
        require_sample(part.tokens, packed)
        if part.record is not None and part.record.bin_blocks is not None:
            found = hash_blocks(part.tokens.bin_path)
            compare(f"blocks in the record of {part.tokens.prefix}", part.record.bin_blocks, found)
    if source.bin_sha256 is not None and all(part.record is not None for part in parts):
        raw_files, licence = provenance([part.record for part in parts])
        compare(f"raw files in the record of {corpus.prefix}", raw_files, source.raw_files)
        compare(f"licence in the record of {corpus.prefix}", licence, source.licence)
    ids = (
        "ids not checked, no tokenizer known"
        if manifest.tokenizer is None
        else "every id in the vocabulary"
    )
    hashes = (
        "size of the .bin as packed (its hash was not known then)"
        if source.bin_sha256 is None
        else "both sha256 as packed"
    )
    shards = f" in {len(parts):,} shards" if source.shards else ""
    return f"{source.documents:,} documents, {source.tokens:,} tokens{shards}; {hashes}, {ids}"


def look_for_repeats(manifest: Manifest, corpora: Sequence[Corpus]) -> str:
    """No corpus is in the pack twice; packs were made that did not look for it.

    Args:
        manifest: of the pack.
        corpora: its sources, all of them opened.

    Returns:
        What was proved.

    Raises:
        ValueError: the two that are the same.
    """
    parts = named_parts(corpora)
    require_distinct_files((name, (part.idx_path, part.bin_path)) for name, part in parts)
    packed = [shard for source in manifest.sources for shard in source.parts]
    require_distinct_content(parts, packed)
    return f"{len(parts):,} pairs of files, none of them twice"


def _index_hash(source: Source) -> str | None:
    return join_hashes([shard.idx_sha256 for shard in source.parts], bool(source.shards))


def _look_at_tokens(part: Part, packed: Shard, manifest: Manifest, pack_dir: Path) -> None:
    """Compare the `.bin` and the corpus record of one pair with the manifest."""
    corpus, record = part.tokens, part.record
    if record is not None:
        if packed.bin_sha256 is not None:
            compare(f"bin_sha256 in the record of {corpus.prefix}", record.bin_sha256, packed.bin_sha256)
    elif packed.bin_sha256 is not None:
        compare(f"sha256 of {corpus.bin_path}", sha256_file(corpus.bin_path), packed.bin_sha256)
    with progress_bar(f"reading {corpus.bin_path.name}", corpus.bin_bytes, "B") as bar:
        # A manifest's identity has what check_corpus asks of a tokenizer: path, vocab_size and sha256.
        identity = manifest.tokenizer
        if identity is not None:
            identity = replace(identity, path=str(manifest.tokenizer_path(pack_dir)))
        tokenizer = cast("CorpusTokenizer | None", identity)
        check_corpus(corpus.prefix, tokenizer, bar.update, answer_starts(part))


def compare(what: str, found: object, expected: object) -> None:
    """Raise ValueError if `found` is not what was packed."""
    if found != expected:
        raise ValueError(f"{what} is {found} but {expected} was packed")
