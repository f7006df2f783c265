"""Prove the sources of a pack: that they are still those that were packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_exact.command_line import progress_bar
from megatron_exact.data.answers import answer_starts
from megatron_exact.data.corpus_record import check_corpus
from megatron_exact.data.distinct import named_parts, require_distinct_content, require_distinct_files
from megatron_exact.data.manifest import Manifest, Shard, Source
from megatron_exact.data.shards import Corpus, parts_of
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
    for part, packed in zip(parts, _packed_parts(source), strict=True):
        compare(f"sha256 of {part.tokens.idx_path}", part.tokens.check(), packed.idx_sha256)
    opened.append(corpus)
    compare("the hash of all indices", _index_hash(source), source.idx_sha256)
    for part, packed in zip(parts, _packed_parts(source), strict=True):
        _look_at_tokens(part, packed, manifest, pack_dir)
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
    packed = [shard for source in manifest.sources for shard in _packed_parts(source)]
    require_distinct_content(parts, packed)
    return f"{len(parts):,} pairs of files, none of them twice"


def check_indices(pack_dir: Path, manifest: Manifest, source_root: str | Path | None) -> None:
    """Open every source and hash its indices: what a training job does once at its start.

    Raises:
        ValueError, FileNotFoundError: a source is missing, truncated, damaged or another one.
    """
    for index, source in enumerate(manifest.sources):
        corpus = manifest.open_source(index, pack_dir, source_root)
        for tokens, packed in zip(parts_of(corpus), _packed_parts(source), strict=True):
            found = tokens.check()
            if found != packed.idx_sha256:
                raise ValueError(
                    f"{tokens.idx_path} has sha256 {found[:16]}... but {packed.idx_sha256[:16]}... was "
                    "packed: it was tokenized anew or is another corpus, pack it again"
                )


def _packed_parts(source: Source) -> Sequence[Shard]:
    """The pairs of a source as the manifest has them."""
    if source.shards:
        return source.shards
    single = Shard(
        name=Path(source.prefix).name,
        documents=source.documents,
        tokens=source.tokens,
        idx_sha256=source.idx_sha256,
        bin_bytes=source.bin_bytes,
        bin_sha256=source.bin_sha256,
    )
    return (single,)


def _index_hash(source: Source) -> str | None:
    return join_hashes([shard.idx_sha256 for shard in _packed_parts(source)], bool(source.shards))


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
