"""Prove a pack from its sources: `pack_corpus.py --verify DIR`.

Three independent looks at the same arrays: their hashes, the plan made again in memory from the options
(which proves seed and order), and an account of every token of every source that uses neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import describe, progress_bar
from megatron_exact.data.corpus_record import check_corpus, read_corpus_record
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.manifest import ARRAY_DTYPES, Manifest, Source, read_manifest, verify_split_arrays
from megatron_exact.data.pack import PackOptions, PlannedSplit, plan_splits, require_long_enough
from megatron_exact.data.rows import open_arrays
from megatron_exact.data.verify_tokenizer import look_at_tokenizer
from megatron_exact.files import sha256_file

if TYPE_CHECKING:
    from megatron_exact.data.tokenizers import CorpusTokenizer

Arrays = dict[str, NDArray[np.integer]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    """What."""
    passed: bool
    """Whether it holds."""
    detail: str
    """What was found, or the mismatch."""


def verify_pack(pack_dir: str | Path, *, source_root: str | Path | None = None) -> Iterator[Check]:
    """Check everything about a pack, one `Check` at a time.

    A check that others build on (the manifest, the arrays, opening the sources) ends the list when it
    fails. Reads every byte of the pack and of its sources.

    Args:
        pack_dir: a packed dataset.
        source_root: where the corpora lie now, if not where the manifest says.
    """
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
    corpora: list[IndexedTokens] = []
    for index, source in enumerate(manifest.sources):
        check = _check(
            f"source {source.prefix}", _source_content(pack_dir, manifest, index, source_root, corpora)
        )
        checks.append(check)
        yield check
    yield _check("tokenizer", lambda: look_at_tokenizer(pack_dir, manifest, corpora))
    if not all(check.passed for check in checks):
        return
    arrays = {name: open_arrays(pack_dir / name, split) for name, split in manifest.splits.items()}
    try:
        options = PackOptions.of(manifest)
        require_long_enough(corpora, options)
        planned = plan_splits(corpora, manifest.sources, options)
    except ValueError as error:
        yield Check(name="plan", passed=False, detail=describe(error))
        return
    for name in manifest.splits:
        yield _check(f"plan of {name}", _same_plan(manifest, name, arrays[name], planned[name]))
    yield _check("tokens", lambda: _account_for_tokens(manifest, arrays, corpora))
    yield _check("splits", lambda: _disjoint_splits(arrays))


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name=name, passed=True, detail=look())
    except (ValueError, OSError) as error:
        return Check(name=name, passed=False, detail=describe(error))


def _array_hashes(pack_dir: Path, manifest: Manifest, name: str) -> Callable[[], str]:
    def look() -> str:
        size = verify_split_arrays(pack_dir, name, manifest.splits[name])
        open_arrays(pack_dir / name, manifest.splits[name])
        return f"{len(ARRAY_DTYPES)} files, {size:,} bytes, every sha256 as in the manifest"

    return look


def _source_content(
    pack_dir: Path,
    manifest: Manifest,
    index: int,
    source_root: str | Path | None,
    corpora: list[IndexedTokens],
) -> Callable[[], str]:
    def look() -> str:
        source = manifest.sources[index]
        corpus = IndexedTokens(manifest.source_prefix(index, pack_dir, source_root))
        found = (corpus.num_documents, corpus.num_tokens, corpus.bin_bytes)
        if found != (source.documents, source.tokens, source.bin_bytes):
            raise ValueError(
                f"documents, tokens and bytes are {found} but "
                f"{(source.documents, source.tokens, source.bin_bytes)} were packed"
            )
        _compare(f"sha256 of {corpus.idx_path}", sha256_file(corpus.idx_path), source.idx_sha256)
        corpora.append(corpus)  # even if a check below fails: the tokenizer's looks at its record
        proved = _check_tokens(corpus, source, manifest)
        return f"{source.documents:,} documents, {source.tokens:,} tokens; {proved}"

    return look


def _check_tokens(corpus: IndexedTokens, source: Source, manifest: Manifest) -> str:
    """Compare the `.bin` and the corpus record with the manifest; say what could be proved."""
    record = read_corpus_record(corpus.prefix)
    if record is not None:
        if source.bin_sha256 is not None:
            _compare(f"bin_sha256 in the record of {corpus.prefix}", record.bin_sha256, source.bin_sha256)
            _compare(
                f"raw files in the record of {corpus.prefix}", record.raw_files, list(source.raw_files)
            )
            _compare(f"licence in the record of {corpus.prefix}", record.licence, source.licence)
        if manifest.tokenizer is not None:
            _compare("sha256 of its tokenizer", record.tokenizer["sha256"], manifest.tokenizer.sha256)
    elif source.bin_sha256 is not None:
        _compare(f"sha256 of {corpus.bin_path}", sha256_file(corpus.bin_path), source.bin_sha256)
    with progress_bar(f"reading {corpus.bin_path.name}", corpus.bin_bytes, "B") as bar:
        # A manifest's identity has what check_corpus asks of a tokenizer: path, vocab_size and sha256.
        check_corpus(corpus.prefix, cast("CorpusTokenizer | None", manifest.tokenizer), bar.update)
    ids = (
        "ids not checked, no tokenizer known"
        if manifest.tokenizer is None
        else "every id in the vocabulary"
    )
    if source.bin_sha256 is None:
        return f"size of the .bin as packed (its hash was not known then), {ids}"
    return f"both sha256 as packed, {ids}"


def _compare(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{what} is {found} but {expected} was packed")


def _same_plan(manifest: Manifest, name: str, arrays: Arrays, planned: PlannedSplit) -> Callable[[], str]:
    def look() -> str:
        split = manifest.splits[name]
        for array_name, array in planned.plan.arrays().items():
            if not np.array_equal(array, arrays[array_name]):
                raise ValueError(f"{array_name} differs from what these sources and options give")
        again = asdict(planned.describe(manifest.row_tokens, split.arrays))
        for field, value in asdict(split).items():
            _compare(field, again[field], value)
        return (
            f"{split.rows:,} rows and their {split.supervised_targets:,} supervised targets "
            "are what these sources and options give"
        )

    return look


def _account_for_tokens(manifest: Manifest, arrays: dict[str, Arrays], corpora: list[IndexedTokens]) -> str:
    """Every token of the sources is in the pack once, or left out, unused or repeated as stated."""
    missing = repeated = 0
    for index, corpus in enumerate(corpora):
        covered, inputs = _coverage(index, arrays, corpus, manifest.allow_repeats)
        missing += corpus.num_tokens - covered
        repeated += inputs - covered
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
    _compare("the number of repeated tokens", repeated, stated_repeats - left_out + missing - unused)
    return (
        f"{sum(c.num_tokens for c in corpora) - missing:,} in the pack, {unused:,} unused, "
        f"{left_out:,} left out, {repeated:,} repeated"
    )


def _coverage(
    index: int, arrays: dict[str, Arrays], corpus: IndexedTokens, allow_repeats: bool
) -> tuple[int, int]:
    """(distinct tokens of one source that are inputs, inputs that come from it).

    Raises:
        ValueError: a segment reaches beyond its document, or overlaps another without repeats.
    """
    columns = ("segment_document", "segment_start", "segment_tokens")
    parts = [[split[c][split["segment_source"] == index] for c in columns] for split in arrays.values()]
    document, start, length = (
        np.concatenate([part[column] for part in parts]).astype(np.int64) for column in range(3)
    )
    if document.size == 0:
        return 0, 0
    if document.min() < 0 or document.max() >= corpus.num_documents or start.min() < 0 or length.min() < 1:
        raise ValueError(f"a segment of {corpus.prefix.name} names a document or tokens that do not exist")
    tokens = np.asarray(corpus.document_tokens, dtype=np.int64)
    if (start + length > tokens[document]).any():
        raise ValueError(f"a segment of {corpus.prefix.name} reaches beyond its document")
    begins = (np.cumsum(tokens) - tokens)[document] + start
    order = np.argsort(begins)
    begins, ends = begins[order], (begins + length)[order]
    reached = np.maximum.accumulate(ends)
    new = np.maximum(ends[1:] - np.maximum(begins[1:], reached[:-1]), 0)
    covered = int(ends[0] - begins[0] + new.sum())
    inputs = int(length.sum())
    if covered != inputs and not allow_repeats:
        raise ValueError(f"{inputs - covered} tokens of {corpus.prefix.name} are in more than one row")
    return covered, inputs


def _disjoint_splits(arrays: dict[str, Arrays]) -> str:
    documents = []
    for split in arrays.values():
        pairs = np.stack((split["segment_source"].astype(np.int64), split["segment_document"]), axis=1)
        documents.append(np.unique(pairs, axis=0))
    together = np.concatenate(documents)
    shared = together.shape[0] - np.unique(together, axis=0).shape[0]
    if shared:
        raise ValueError(f"{shared} documents are in both splits")
    return " and ".join(f"{part.shape[0]:,}" for part in documents) + " documents, none in both"
