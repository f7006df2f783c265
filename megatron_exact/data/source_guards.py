"""Compare the corpora of a pack with what was packed: at packing, at a job's start and while rows are read.

`corpus_guard` describes what is compared with what. It is a file of its own because the readers of a corpus
(`indexed`, `shards`) use it, and these comparisons need manifest and records on top of them.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_exact.command_line import progress_bar
from megatron_exact.data.corpus_guard import (
    HASHING_THREADS,
    SAMPLED_BLOCKS,
    TOUCHED_BYTES,
    PartGuard,
    hash_sample,
    hash_whole,
    join_blocks,
    num_blocks,
    require_block,
    stamp_of,
)
from megatron_exact.data.corpus_record import CorpusRecord, read_corpus_record, record_path
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.manifest import Manifest, Shard
from megatron_exact.data.remote import open_bin, remote_bin
from megatron_exact.data.shards import parts_of
from megatron_exact.data.shuffle import derive_key, random_bits


def objects_sha256(manifest: Manifest, pack_dir: str | Path, source_root: str | Path) -> str:
    """Return a hash of the URLs, sizes and ETags that this node reads remote corpora with.

    Rank 0 verifies content for all ranks, so every node must read the objects that rank 0's node reads.
    """
    digest = hashlib.sha256()
    for index, source in enumerate(manifest.sources):
        prefix = manifest.source_prefix(index, pack_dir, source_root)
        for part in source.parts:
            pair = prefix / part.name if source.shards else prefix
            what = remote_bin(pair.with_name(pair.name + ".bin"))
            digest.update(f"{part.name} {what.key if what else None}\n".encode())
    return digest.hexdigest()


def guard_sources(
    manifest: Manifest, pack_dir: str | Path, source_root: str | Path | None
) -> list[list[PartGuard]]:
    """Make a guard for each pair of files of each source, with the present stamps of the files.

    A file that is missing now gives its error when it is read.

    Args:
        manifest: manifest of the pack.
        pack_dir: folder of the pack.
        source_root: where the corpora lie now, if not where the manifest says.
    """
    is_compared = sum(source.bin_bytes for source in manifest.sources) <= TOUCHED_BYTES
    guards: list[list[PartGuard]] = []
    for index, source in enumerate(manifest.sources):
        try:
            prefix = manifest.source_prefix(index, pack_dir, source_root)
        except FileNotFoundError:
            prefix = Path(source.prefix)
        mine = []
        for part in source.parts:
            pair = prefix / part.name if source.shards else prefix
            bin_path = pair.with_name(pair.name + ".bin")
            # A block of 64 MB would be fetched for a few KB; an object is compared by its ETag (`remote`)
            is_on_disk = remote_bin(bin_path) is None
            blocks = _known_blocks(pair, part) if is_compared and is_on_disk else None
            mine.append(
                PartGuard(
                    idx_sha256=part.idx_sha256,
                    idx_stamp=stamp_of(pair.with_name(pair.name + ".idx")),
                    bin_stamp=stamp_of(bin_path) if is_on_disk else None,
                    blocks=blocks,
                )
            )
        guards.append(mine)
    # Bytes of 0 in memory that this process shares with the workers it forks
    total = sum(len(guard.blocks or ()) for mine in guards for guard in mine)
    flags = memoryview(mmap.mmap(-1, max(1, total)))
    for guard in (guard for mine in guards for guard in mine):
        if guard.blocks is not None:
            guard.compared, flags = flags[: len(guard.blocks)], flags[len(guard.blocks) :]
    return guards


def _known_blocks(prefix: Path, packed: Shard) -> list[str] | None:
    """Return the hashes of blocks, if the record contains those that were packed."""
    if packed.bin_blocks_sha256 is None:
        return None
    try:
        record = read_corpus_record(prefix)
    except (ValueError, OSError):
        return None
    if record is None or record.bin_blocks is None:
        return None
    return record.bin_blocks if join_blocks(record.bin_blocks) == packed.bin_blocks_sha256 else None


def check_sources(
    pack_dir: Path, manifest: Manifest, source_root: str | Path | None, *, verify_data: bool = False
) -> list[str]:
    """Open every source and compare it with what was packed; a training job does this once at its start.

    Indices are compared in full, each `.bin` by size, sample and some blocks, or with `verify_data` in
    full.

    Args:
        pack_dir: folder of the pack.
        manifest: its manifest.
        source_root: where the corpora lie now, if not where the manifest says.
        verify_data: compare all blocks, or the whole file where there are none.

    Returns:
        Lines for the user about files that `verify_data` could not compare in full.

    Raises:
        ValueError, FileNotFoundError: a source is missing, truncated, damaged or another one.
    """
    parts: list[tuple[IndexedTokens, Shard, CorpusRecord | None]] = []
    for index, source in enumerate(manifest.sources):
        corpus = manifest.open_source(index, pack_dir, source_root)
        for tokens, packed in zip(parts_of(corpus), source.parts, strict=True):
            found = tokens.check()
            if found != packed.idx_sha256:
                raise ValueError(
                    f"{tokens.idx_path} has sha256 {found[:16]}... but {packed.idx_sha256[:16]}... was "
                    "packed: it was tokenized again or is another corpus, pack it again"
                )
            record = read_corpus_record(tokens.prefix)
            require_record(tokens, record, packed)
            require_sample(tokens, packed)
            parts.append((tokens, packed, record))
    compare_blocks(parts, SAMPLED_BLOCKS, manifest.fingerprint)
    if not verify_data:
        return []
    compare_blocks(parts, None, manifest.fingerprint)
    return [note for part in parts if (note := _compare_whole(*part)) is not None]


def require_record(tokens: IndexedTokens, record: CorpusRecord | None, packed: Shard) -> None:
    """Compare the hashes in the record of a pair with those in the manifest.

    Raises:
        ValueError: the record describes another file than was packed.
    """
    if record is None:
        return
    path = record_path(tokens.prefix)
    if packed.bin_sha256 is not None and record.bin_sha256 != packed.bin_sha256:
        raise ValueError(
            f"{path} says bin_sha256 {record.bin_sha256[:16]}... but {packed.bin_sha256[:16]}... was "
            "packed: the corpus was tokenized again, pack it again"
        )
    blocks = record.bin_blocks
    if packed.bin_blocks_sha256 is None:
        return
    if blocks is None or join_blocks(blocks) != packed.bin_blocks_sha256:
        raise ValueError(
            f"{path} has other hashes of blocks than when the corpus was packed: it was edited or belongs "
            "to another corpus, copy it again"
        )


def require_sample(tokens: IndexedTokens, packed: Shard) -> None:
    """Compare the sample of a `.bin` with the one taken at packing.

    Raises:
        ValueError: the sample differs, so it is another file.
    """
    if packed.bin_sample_sha256 is None:
        return
    file = open_bin(tokens.bin_path)
    found = hash_sample(file, packed.idx_sha256)
    if found != packed.bin_sample_sha256:
        raise ValueError(
            f"{file.name} is not the file that was packed: a sample of it has sha256 "
            f"{found[:16]}..., not {packed.bin_sample_sha256[:16]}...; restore the file, or pack it again"
        )


def compare_blocks(
    parts: Sequence[tuple[IndexedTokens, Shard, CorpusRecord | None]], most: int | None, purpose: str
) -> None:
    """Compare blocks of `.bin` files with the hashes in their records, in parallel.

    Args:
        parts: pairs; those whose record has no blocks are not compared.
        most: number of blocks to compare, chosen by `purpose`; None compares all.
        purpose: seed of the choice.

    Raises:
        ValueError: a block that differs.
    """
    known = [(tokens, record.bin_blocks) for tokens, _, record in parts if record and record.bin_blocks]
    files = [open_bin(tokens.bin_path, is_random=False) for tokens, _ in known]
    ends = np.cumsum([num_blocks(tokens.bin_bytes) for tokens, _ in known], dtype=np.int64)
    total = int(ends[-1]) if known else 0
    chosen = np.arange(total)
    if most is not None and total > most:
        order = np.argsort(random_bits(derive_key("sample of blocks", purpose), chosen))
        chosen = np.sort(order[:most])

    def compare(block: int) -> None:
        part = int(np.searchsorted(ends, block, side="right"))
        blocks = known[part][1]
        require_block(files[part], block - int(ends[part]) + len(blocks), blocks)
        bar.update(1)

    with (
        progress_bar("comparing blocks", chosen.size, "block") as bar,
        ThreadPoolExecutor(HASHING_THREADS) as threads,
    ):
        try:
            list(threads.map(compare, chosen.tolist()))
        except BaseException:
            threads.shutdown(cancel_futures=True)  # or the error would wait for all other blocks
            raise


def _compare_whole(tokens: IndexedTokens, packed: Shard, record: CorpusRecord | None) -> str | None:
    """Compare a whole `.bin` whose record has no blocks; return a line where it has no hash either."""
    if record is not None and record.bin_blocks is not None:
        return None
    if packed.bin_sha256 is None:
        return (
            f"{tokens.bin_path} has no corpus record: only its size and a sample of it could be compared "
            "with what was packed"
        )
    file = open_bin(tokens.bin_path, is_random=False)
    with progress_bar(f"reading {tokens.bin_path.name}", tokens.bin_bytes, "B") as bar:
        found = hash_whole(file, bar.update)
    if found != packed.bin_sha256:
        raise ValueError(
            f"{file.name} has sha256 {found[:16]}... but {packed.bin_sha256[:16]}... was packed: "
            "restore the file, or tokenize and pack again"
        )
    return None
