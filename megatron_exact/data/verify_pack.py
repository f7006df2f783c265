"""Verify a pack from its sources: recompute everything that its manifest states (`pack_corpus.py
--verify`).

Three independent checks of the same arrays: their hashes; the plan made again from the options, which
verifies seed and order; and an account of every token of every source that uses neither. Memory: what
packing takes, and two bytes a document.

The account: a pack covers a document if its segments lead from the first token to the last without gap or
overlap. Seen as steps from `start` to `end`, that is so for whole passes over the document exactly if as
many steps begin at every inner place as end there. Places are compared as sums of random hashes of
(document, place), drawn for each verification, so the account takes one byte a document and no sorting;
unequal multisets have equal sums with a chance of 2^-64.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import describe, progress_bar
from megatron_exact.data.corpus_record import check_corpus
from megatron_exact.data.document_pool import DocumentPool
from megatron_exact.data.manifest import (
    Manifest,
    Shard,
    Split,
    TokenPlace,
    read_manifest,
)
from megatron_exact.data.pack import PackOptions, PlannedSplit, block_arrays, plan_splits
from megatron_exact.data.pack_arrays import open_arrays, verify_split_arrays
from megatron_exact.data.plan import PlanMeasure
from megatron_exact.data.remote import is_url
from megatron_exact.data.shards import Corpus
from megatron_exact.data.shuffle import random_bits
from megatron_exact.data.source_guards import require_record, require_sample
from megatron_exact.data.sources import (
    Part,
    answer_starts,
    count_empty,
    join_hashes,
    load_pool,
    named_parts,
    provenance,
    read_parts,
    require_distinct_content,
    require_distinct_files,
    supervise_answers,
)
from megatron_exact.data.tokenizers import files_sha256, identify_tokenizer, same_tokenizer

if TYPE_CHECKING:
    from megatron_exact.data.tokenizers import CorpusTokenizer


FIELDS = ("kind", "vocab_size", "sha256")
BLOCK_SEGMENTS = 1 << 18
Arrays = Mapping[str, NDArray[np.integer]]


@dataclass(frozen=True, kw_only=True)
class PackCheck:
    """The result of one check."""

    name: str
    """What was checked."""
    passed: bool
    """Whether it passed."""
    detail: str
    """What was found, or the mismatch."""


def verify_pack(pack_dir: str | Path, *, source_root: str | Path | None = None) -> Iterator[PackCheck]:
    """Check everything about a pack, one `PackCheck` at a time.

    A check that others build on (the manifest, the arrays, opening the sources) ends the list when it
    fails. Reads every byte of the pack and of its sources.

    Args:
        pack_dir: a packed dataset.
        source_root: where the corpora lie now, if not where the manifest says.

    Raises:
        ValueError: `source_root` is a URL.
    """
    if source_root is not None and is_url(source_root):
        raise ValueError(
            f"--source-root {source_root} is a URL, but --verify reads whole files: verify where the "
            "corpora are files, or start the job with --verify-data"
        )
    pack_dir = Path(pack_dir)
    found: list[Manifest] = []

    def look_at_manifest() -> str:
        found.append(read_manifest(pack_dir))
        return f"fingerprint {found[0].fingerprint}"

    yield _check("manifest", look_at_manifest)
    if not found:
        return
    manifest = found[0]
    checks = [
        _check(f"arrays of {name}", _array_hashes(pack_dir, manifest, name)) for name in manifest.splits
    ]
    yield from checks
    corpora: list[Corpus] = []
    for index, source in enumerate(manifest.sources):

        def look(index: int = index) -> str:
            return _look_at_source(pack_dir, manifest, index, source_root, corpora)

        check = _check(f"source {source.prefix}", look)
        checks.append(check)
        yield check
    if len(corpora) == len(manifest.sources):
        yield _check("sources", lambda: _look_for_repeats(manifest, corpora))
    yield _check("tokenizer", lambda: _look_at_tokenizer(pack_dir, manifest, corpora))
    if all(check.passed for check in checks):
        yield from _look_at_plan(pack_dir, manifest, corpora)


def _check(name: str, look: Callable[[], str]) -> PackCheck:
    try:
        return PackCheck(name=name, passed=True, detail=look())
    except (ValueError, OSError) as error:
        return PackCheck(name=name, passed=False, detail=describe(error))


def _array_hashes(pack_dir: Path, manifest: Manifest, name: str) -> Callable[[], str]:
    def look() -> str:
        size = verify_split_arrays(pack_dir, name, manifest.splits[name])
        open_arrays(pack_dir / name, manifest.splits[name])
        count = len(manifest.splits[name].arrays)
        return f"{count} files, {size:,} bytes, every sha256 as in the manifest"

    return look


def _look_at_plan(pack_dir: Path, manifest: Manifest, corpora: list[Corpus]) -> Iterator[PackCheck]:
    arrays = {name: open_arrays(pack_dir / name, split) for name, split in manifest.splits.items()}
    names = [source.prefix for source in manifest.sources]
    try:
        pool, supervision = supervise_answers(load_pool(corpora), corpora)
        compare("what is supervised", supervision, manifest.supervision)
        for index, source in enumerate(manifest.sources):
            empty = count_empty(pool, index)
            compare(f"the number of empty documents of {source.prefix}", empty, source.empty_documents)
        for planned in plan_splits(pool, manifest.sources, PackOptions.of(manifest), names=names):
            yield _check(f"plan of {planned.name}", _same_plan(manifest, arrays[planned.name], planned))
    except ValueError as error:
        yield PackCheck(name="plan", passed=False, detail=describe(error))
        return
    accounts: dict[str, SplitAccount] = {}

    def look_at_tokens() -> str:
        for name, split in manifest.splits.items():
            accounts[name] = account_for_split(arrays[name], split, pool)
        return account_for_tokens(manifest, accounts, pool)

    yield _check("tokens", look_at_tokens)
    if len(accounts) == len(manifest.splits):
        yield _check("splits", lambda: disjoint_splits(accounts))


def _same_plan(manifest: Manifest, arrays: Arrays, planned: PlannedSplit) -> Callable[[], str]:
    """Compare the arrays, block by block, with the plan made again."""

    def look() -> str:
        split = manifest.splits[planned.name]
        first_target = planned.plan.pool.first_target
        measure = PlanMeasure(row_tokens=manifest.row_tokens, first_target=first_target)
        with progress_bar(f"planning {planned.name}", planned.plan.rows, " rows") as bar:
            for block in planned.plan.blocks():
                for name, expected in block_arrays(block, planned.plan.pool, measure.segments).items():
                    first = measure.rows + 1 if name == "row_offsets" else measure.segments
                    if not np.array_equal(arrays[name][first : first + expected.size], expected):
                        raise ValueError(f"{name} differs from what these sources and options give")
                measure.add(block)
                bar.update(measure.rows - bar.n)
        again = asdict(planned.describe(PackOptions.of(manifest), measure, split.arrays))
        for field, value in asdict(split).items():
            compare(field, again[field], value)
        return (
            f"{split.rows:,} rows and their {split.supervised_targets:,} supervised targets "
            "are what these sources and options give"
        )

    return look


def _look_at_tokenizer(pack_dir: Path, manifest: Manifest, corpora: Sequence[Corpus]) -> str:
    """Compare the manifest's tokenizer with the corpus records and with the tokenizer itself.

    Args:
        pack_dir: a packed dataset.
        manifest: its manifest.
        corpora: those of its sources that could be opened.

    Returns:
        What was found. A tokenizer that is not there is said, not refused: packs travel without it.

    Raises:
        ValueError: a field that differs, or no tokenizer named although a record names one.
    """
    parts = [part for corpus in corpora for part in read_parts(corpus)]
    records = [(part.tokens.prefix, part.record) for part in parts]
    named = [(prefix, record.tokenizer) for prefix, record in records if record is not None]
    if manifest.tokenizer is None:
        if named:
            raise ValueError(
                f"the manifest names none but the record of {named[0][0]} says {named[0][1]['path']} "
                f"(sha256 {named[0][1]['sha256'][:16]}...): pack the corpus again"
            )
        return "not checked: neither the manifest nor a corpus record names one"
    path = manifest.tokenizer_path(pack_dir)
    assert path is not None  # for mypy: the manifest names one
    packed = {**asdict(manifest.tokenizer), "path": str(path)}
    for prefix, identity in named:
        is_same = same_tokenizer(identity, packed)
        if identity["sha256"] == packed["sha256"]:
            is_same = all(identity[field] == packed[field] for field in FIELDS)
        if not is_same:
            raise ValueError(_difference(packed, identity, f"the record of {prefix}"))
    proved = f"as in {len(named)} of {len(records)} corpus records"
    if not os.path.exists(path):
        return f"{path} not checked: tokenizer file is not there; {proved}"
    if manifest.tokenizer.sha256 != files_sha256(path):  # the kind of hash before: nothing else to compare
        found = identify_tokenizer(path)
        if any(found[field] != packed[field] for field in FIELDS):
            raise ValueError(_difference(packed, found, str(path)))
    return f"{path}: kind, vocabulary and sha256 as packed; {proved}"


def _difference(packed: Mapping[str, object], found: Mapping[str, object], where: str) -> str:
    field = next(field for field in FIELDS if found[field] != packed[field])
    return f"{field} is {found[field]} in {where} but {packed[field]} in the manifest"


@dataclass(kw_only=True)
class SplitAccount:
    """What the segments of one split cover."""

    seen: NDArray[np.bool_]
    """[documents of the pool], whether the split contains a token of it."""
    covers_documents: bool = True
    """Whether the segments cover each seen document from its first token to its last."""
    inputs: int = 0
    """Tokens of all segments."""
    opened_tokens: int = 0
    """Lengths of the documents, once for each time that the first token is in it."""
    cut_openings: int = 0
    """How often the document begins that the end of the stream cuts."""
    tail: int = 0
    """Tokens of that document beyond the end of the stream."""


def account_for_split(arrays: Arrays, split: Split, pool: DocumentPool) -> SplitAccount:
    """Look at every segment of one split.

    Args:
        arrays: of the split, mapped.
        split: its entry of the manifest.
        pool: lengths of all documents.

    Raises:
        ValueError: a segment that names what does not exist.
    """
    account = SplitAccount(seen=np.zeros(len(pool), dtype=np.bool_))
    keys = (secrets.randbits(64), secrets.randbits(64))
    balance = np.uint64(0)
    cut = _cut_place(split.next_token, pool)
    with np.errstate(over="ignore"):  # sums are meant modulo 2^64
        if cut is not None:
            balance += _place_hashes(keys, np.array(cut[:1]), np.array(cut[1:]))[0]
            account.tail = int(pool.tokens[cut[0]]) - cut[1]
        for first in range(0, split.segments, BLOCK_SEGMENTS):
            number, start, length = _segments(arrays, first, pool)
            tokens = pool.tokens[number].astype(np.int64)
            end = start + length
            if (end > tokens).any():
                raise ValueError(
                    f"segment {first + int(np.argmax(end > tokens))} reaches beyond its document"
                )
            opens, continues = start == 0, end < tokens
            balance += _place_hashes(keys, number[~opens], start[~opens]).sum(dtype=np.uint64)
            balance -= _place_hashes(keys, number[continues], end[continues]).sum(dtype=np.uint64)
            account.seen[number] = True
            account.inputs += int(length.sum())
            account.opened_tokens += int(tokens[opens].sum())
            if cut is not None:
                account.cut_openings += int(np.count_nonzero(number[opens] == cut[0]))
    account.covers_documents = balance == 0 and account.opened_tokens - account.tail == account.inputs
    return account


def _cut_place(next_token: TokenPlace | None, pool: DocumentPool) -> tuple[int, int] | None:
    """(document of the pool, place) where the stream's end cuts a document, None where it cuts none."""
    if next_token is None or next_token.start == 0:
        return None
    if not 0 <= next_token.source < pool.first.size - 1:
        raise ValueError(f"the next token is of source {next_token.source}, which does not exist")
    number = int(pool.first[next_token.source]) + next_token.document
    if not (
        next_token.document >= 0
        and number < int(pool.first[next_token.source + 1])
        and 0 < next_token.start < int(pool.tokens[number])
    ):
        raise ValueError("the next token is of a document or place that does not exist")
    return number, next_token.start


def _segments(
    arrays: Arrays, first: int, pool: DocumentPool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Document of the pool, start and length of the segments from number `first` on, in bounds."""
    source, document, start, length = (
        arrays[name][first : first + BLOCK_SEGMENTS].astype(np.int64)
        for name in ("segment_source", "segment_document", "segment_start", "segment_tokens")
    )
    if source.max() >= pool.first.size - 1:
        raise ValueError(f"a segment names source {source.max()}, which does not exist")
    number = pool.first[source] + document
    if document.min() < 0 or (number >= pool.first[source + 1]).any():
        raise ValueError("a segment names a document that does not exist")
    if start.min() < 0 or length.min() < 1:
        raise ValueError("a segment names tokens that do not exist")
    return number, start, length


def _place_hashes(
    keys: tuple[int, int], number: NDArray[np.int64], place: NDArray[np.int64]
) -> NDArray[np.uint64]:
    document = random_bits(keys[0], number) >> np.uint64(1)
    return random_bits(keys[1], document ^ place.astype(np.uint64))


def _tokens_where(seen: NDArray[np.bool_], pool: DocumentPool) -> int:
    """Sum the lengths of the documents that are marked."""
    total = first = 0
    for lengths in pool.blocks():
        total += int(lengths.sum(dtype=np.int64, where=seen[first : first + lengths.size]))
        first += lengths.size
    return total


def account_for_tokens(manifest: Manifest, accounts: Mapping[str, SplitAccount], pool: DocumentPool) -> str:
    """Check that every token of the sources is in the pack once, or left out, unused or repeated as stated.

    Raises:
        ValueError: the numbers that do not agree.
    """
    covered = inputs = 0
    for name, account in accounts.items():
        if not account.covers_documents:
            raise ValueError(
                f"the segments of {name} do not lead through their documents from first token to last: "
                "some tokens are missing or in more than one row"
            )
        covered += _tokens_where(account.seen, pool)
        if account.cut_openings == 1:  # no other pass over the cut document covers its tail
            covered -= account.tail
        inputs += account.inputs
    missing = pool.total_tokens() - covered
    repeated = inputs - covered
    if repeated and not manifest.allow_repeats:
        raise ValueError(f"{repeated} tokens are in more than one row")
    splits = manifest.splits.values()
    unused = sum(use.unused_tokens for split in splits for use in split.sources)
    left_out = sum(split.left_out_tokens for split in splits)
    stated_repeats = sum(use.repeated_tokens for split in splits for use in split.sources)
    # Tokens left out at the end of a repeating stream may stand elsewhere in it.
    slack = left_out if stated_repeats else 0
    if not unused + left_out - slack <= missing <= unused + left_out:
        raise ValueError(
            f"{missing} tokens are in no row but {unused} unused and {left_out} left out are stated"
        )
    expected = stated_repeats - left_out + missing - unused
    if repeated != expected:
        raise ValueError(f"{repeated} tokens are repeated but {expected} should be")
    return f"{covered:,} in the pack, {unused:,} unused, {left_out:,} left out, {repeated:,} repeated"


def disjoint_splits(accounts: Mapping[str, SplitAccount]) -> str:
    """Check that no document is in two splits; return how many documents each split has.

    Raises:
        ValueError: documents are in both splits; names their number.
    """
    seen = [account.seen for account in accounts.values()]
    shared = int(np.count_nonzero(np.logical_and.reduce(seen)))
    if shared:
        raise ValueError(f"{shared} documents are in both splits")
    return " and ".join(f"{np.count_nonzero(one):,}" for one in seen) + " documents, none in both"


def _look_at_source(
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
        What was verified.

    Raises:
        ValueError, OSError: what differs.
    """
    source = manifest.sources[index]
    corpus = manifest.open_source(index, pack_dir, source_root)
    parts = read_parts(corpus)
    for part, packed in zip(parts, source.parts, strict=True):
        compare(f"sha256 of {part.tokens.idx_path}", part.tokens.check(), packed.idx_sha256)
    opened.append(corpus)
    index_hash = join_hashes([shard.idx_sha256 for shard in source.parts], bool(source.shards))
    compare("the hash of all indices", index_hash, source.idx_sha256)
    for part, packed in zip(parts, source.parts, strict=True):
        _look_at_tokens(part, packed, manifest, pack_dir)
        require_record(part.tokens, part.record, packed)
        require_sample(part.tokens, packed)
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


def _look_for_repeats(manifest: Manifest, corpora: Sequence[Corpus]) -> str:
    """Check that no corpus is in the pack twice, which older versions did not check when packing.

    Args:
        manifest: of the pack.
        corpora: its sources, all of them opened.

    Returns:
        What was verified.

    Raises:
        ValueError: the two that are the same.
    """
    parts = named_parts(corpora)
    require_distinct_files((name, (part.idx_path, part.bin_path)) for name, part in parts)
    packed = [shard for source in manifest.sources for shard in source.parts]
    require_distinct_content(parts, packed)
    return f"{len(parts):,} pairs of files, none of them twice"


def _look_at_tokens(part: Part, packed: Shard, manifest: Manifest, pack_dir: Path) -> None:
    """Compare the `.bin` and the corpus record of one pair with the manifest."""
    corpus, record = part.tokens, part.record
    if record is not None and packed.bin_sha256 is not None:
        compare(f"bin_sha256 in the record of {corpus.prefix}", record.bin_sha256, packed.bin_sha256)
    with progress_bar(f"reading {corpus.bin_path.name}", corpus.bin_bytes, "B") as bar:
        # A manifest's identity has what check_corpus asks of a tokenizer: path, vocab_size and sha256.
        identity = manifest.tokenizer
        if identity is not None:
            identity = replace(identity, path=str(manifest.tokenizer_path(pack_dir)))
        tokenizer = cast("CorpusTokenizer | None", identity)
        check_corpus(
            corpus.prefix,
            tokenizer,
            bar.update,
            answer_starts(part),
            idx_sha256=packed.idx_sha256,  # as the caller has found it to be
            bin_sha256=packed.bin_sha256,
        )


def compare(what: str, found: object, expected: object) -> None:
    """Raise ValueError if `found` is not what was packed."""
    if found != expected:
        raise ValueError(f"{what} is {found} but {expected} was packed")
