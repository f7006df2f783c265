"""Sources of a pack: corpora and folders of shards, named, checked and described before any planning.

A pair of files may be in a pack only once, whatever its name. A corpus under two names would not only count
tokens twice: a folder of shards draws its validation split with a key of its own, so a shard that is also a
source by itself would hold out other documents there than in the folder, and train on what the folder
evaluates on.

Question-answer records are a special source: only the answer and the EOD behind it are supervised.
`PREFIX.answers.npy` beside their corpus contains, int32 [documents], the number of the first token of each
answer. Its sha256 and the template of the records are part of `PREFIX.json`, so that a pack can be verified
against the corpus.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import progress_bar
from megatron_exact.data.corpus_guard import SAMPLED_BLOCKS, hash_sample, join_blocks
from megatron_exact.data.corpus_record import (
    ANSWERS_DTYPE,
    AnswersRecord,
    CorpusRecord,
    answers_path,
    largest_id,
    read_corpus_record,
    record_path,
    scan_tokens,
)
from megatron_exact.data.document_pool import BLOCK_DOCUMENTS, CompactLengths, DocumentPool
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.manifest import DocumentTokens, Shard, Source, Supervision, TokenizerIdentity
from megatron_exact.data.remote import is_url, open_bin
from megatron_exact.data.shard_job import missing_shards
from megatron_exact.data.shards import Corpus, ShardedTokens, open_corpus, parts_of
from megatron_exact.data.source_guards import compare_blocks
from megatron_exact.data.tokenizers import current_sha256, same_tokenizer
from megatron_exact.files import sha256_file
from megatron_exact.json_input import build_record

MAX_SOURCES = 1 << 16  # segment_source is uint16
WEIGHT = re.compile(r"\+?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?")
NAMED_IN_MESSAGES = 3
HEAD_BYTES = 1 << 16  # of two .bin files, compared before they are read whole

NamedPart = tuple[str, IndexedTokens]


def parse_source(text: str) -> tuple[float | None, Path]:
    """Split `[WEIGHT:]PREFIX`.

    Raises:
        ValueError: a weight that is not a finite number above 0, a missing prefix, or a URL.
    """
    if is_url(text):
        raise ValueError(
            f"source {text!r} is a URL, but packing reads whole files: pack where the corpus is a file, "
            "then train with --source-root URL"
        )
    head, colon, tail = text.partition(":")
    if not colon or Path(text + ".idx").exists() or Path(text).is_dir():
        if not text:
            raise ValueError("a source is empty: give [WEIGHT:]PREFIX")
        return None, Path(text)
    if not WEIGHT.fullmatch(head) or float(head) <= 0:
        raise ValueError(
            f"weight {head!r} of source {text!r} is not a number above 0: give [WEIGHT:]PREFIX"
        )
    if not tail:
        raise ValueError(f"source {text!r} has a weight but no prefix: give [WEIGHT:]PREFIX")
    return float(head), Path(tail)


def parse_sources(
    sources: Sequence[str], weight_unit: str = "tokens"
) -> tuple[list[float | None], list[Path]]:
    """Return weights and prefixes of all sources.

    Raises:
        ValueError: no source, too many, some with a weight and some without, one named twice, or a unit of
            weights without weights.
    """
    if not sources:
        raise ValueError("no source: give at least one --source [WEIGHT:]PREFIX")
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"{len(sources)} sources: at most {MAX_SOURCES} fit, merge some")
    parsed = [parse_source(text) for text in sources]
    weights = [weight for weight, _ in parsed]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(
            f"{weights.count(None)} of {len(weights)} sources have no weight: give all of them one or none"
        )
    require_weights_for_unit(weights, weight_unit)
    seen: dict[Path, str] = {}
    for text, (_, prefix) in zip(sources, parsed, strict=True):
        index = prefix.with_name(prefix.name + ".idx")
        real = Path(os.path.realpath(prefix if prefix.is_dir() and not index.exists() else index))
        if real in seen:
            raise ValueError(f"sources {seen[real]!r} and {text!r} are the same corpus: name it once")
        seen[real] = text
    return weights, [prefix for _, prefix in parsed]


def require_weights_for_unit(weights: Sequence[float | None], weight_unit: str) -> None:
    """Check that a unit of weights has weights; else equal packs would have different fingerprints."""
    if weight_unit != "tokens" and None in weights:
        raise ValueError(
            f"--weight-unit {weight_unit} needs weights: give every source one, or leave the option out"
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One `.bin`/`.idx` pair of a source."""

    tokens: IndexedTokens
    """The tokens of the pair."""
    record: CorpusRecord | None
    """Record of the pair; None where there is no such file."""


def open_sources(prefixes: Sequence[Path]) -> tuple[list[Corpus], list[list[Part]]]:
    """Open corpora; the parts of a corpus are its shards, or itself.

    Raises:
        ValueError, FileNotFoundError: a corpus that is missing or damaged, one whose files are in another
            one too, or a folder of shards whose job is not finished.
    """
    corpora = [open_corpus(prefix) for prefix in prefixes]
    for corpus in corpora:
        missing = missing_shards(corpus.prefix) if isinstance(corpus, ShardedTokens) else []
        if missing:
            raise ValueError(
                f"{len(missing)} shards of {corpus.prefix} are missing, the first is number "
                f"{missing[0]}: run megatron-exact tokenize-shards again until it is finished"
            )
    named = named_parts(corpora)
    require_distinct_files((name, (part.idx_path, part.bin_path)) for name, part in named)
    return corpora, [read_parts(corpus) for corpus in corpora]


def read_parts(corpus: Corpus) -> list[Part]:
    """Return the pairs of a corpus, its shards or itself, with their records."""
    return [Part(tokens=tokens, record=read_corpus_record(tokens.prefix)) for tokens in parts_of(corpus)]


def named_parts(corpora: Iterable[Corpus]) -> list[NamedPart]:
    """Return all pairs of files of some sources, each with a name for messages."""
    return [(_name(corpus, part), part) for corpus in corpora for part in parts_of(corpus)]


def _name(corpus: Corpus, part: IndexedTokens) -> str:
    if isinstance(corpus, ShardedTokens):
        return f"shard {part.prefix.name} of the folder {corpus.prefix}"
    return f"source {corpus.prefix}"


def require_distinct_files(files: Iterable[tuple[str, Sequence[Path]]]) -> None:
    """Check that no file occurs twice, by its path, through links, or under two names of one inode.

    Args:
        files: name and files of each part.

    Raises:
        ValueError: a file occurs twice; names the two parts.
    """
    seen: dict[Hashable, int] = {}
    names: list[str] = []
    for index, (name, paths) in enumerate(files):
        names.append(name)
        for path in paths:
            status = os.stat(path)
            identities: list[Hashable] = [os.path.realpath(path)]
            if status.st_ino:  # 0 on some network file systems
                identities.append((status.st_dev, status.st_ino))
            for identity in identities:
                first = seen.setdefault(identity, index)
                if first != index:
                    raise ValueError(
                        f"{name} is the same file as {names[first]} ({path.name}): name the corpus once"
                    )


def require_distinct_content(parts: Sequence[NamedPart], described: Sequence[Shard]) -> None:
    """Check that no part is a copy of another one.

    Only pairs with equal indices can be copies. Where records do not contain a hash, their tokens are
    compared, and read whole only if they begin alike.

    Args:
        parts: from `named_parts`.
        described: their manifest entries, in the same order.

    Raises:
        ValueError: a copy; names the two parts.
    """

    def is_unrecorded(group: Sequence[int]) -> bool:
        return any(described[index].bin_sha256 is None for index in group)

    def content(index: int) -> str:
        return described[index].bin_sha256 or sha256_file(parts[index][1].bin_path)

    holding = [index for index, shard in enumerate(described) if shard.bin_bytes]  # empty shards are alike
    alike = _groups(holding, lambda i: (described[i].idx_sha256, described[i].bin_bytes))
    candidates = [
        same
        for group in alike
        for same in (_groups(group, lambda i: _head(parts[i][1])) if is_unrecorded(group) else [group])
    ]
    with progress_bar("comparing equal indices", len(candidates), "group") as bar:
        for group in candidates:
            for copies in _groups(group, content):
                first, second = (parts[index][0] for index in copies[:2])
                raise ValueError(f"{second} is a copy of {first}: name the corpus once")
            bar.update(1)


def _groups(items: Iterable[int], key: Callable[[int], Hashable]) -> Iterator[list[int]]:
    """Group items with equal keys; a key that occurs once gives no group."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return (group for group in found.values() if len(group) > 1)


def _head(part: IndexedTokens) -> str:
    with open(part.bin_path, "rb") as stream:
        return hashlib.sha256(stream.read(HEAD_BYTES)).hexdigest()


class DocumentLengths(Protocol):
    """What a pool reads from a corpus, or from a forecast's `.idx` alone."""

    @property
    def prefix(self) -> Path:
        """Name of the corpus, for messages."""

    @property
    def num_documents(self) -> int:
        """Number of documents."""

    @property
    def document_tokens(self) -> NDArray[np.integer]:
        """[documents], tokens of each."""

    def release(self) -> None:
        """Close its files."""


def load_pool(corpora: Sequence[DocumentLengths]) -> DocumentPool:
    """Read the lengths of all documents (two bytes each in memory; the files are closed again).

    Documents without a token, as stock Megatron writes them for empty texts, keep their number and get
    length 0; packing leaves them out.

    Raises:
        ValueError: a corpus without documents, or without tokens, or a damaged index.
    """

    def blocks() -> Iterator[NDArray[np.integer]]:
        for corpus in corpora:
            if corpus.num_documents == 0:
                raise ValueError(f"{corpus.prefix} has no documents: tokenize a corpus that has some")
            has_tokens = False
            for part in corpus.parts if isinstance(corpus, ShardedTokens) else (corpus,):
                lengths = part.document_tokens
                for start in range(0, lengths.size, BLOCK_DOCUMENTS):
                    block = lengths[start : start + BLOCK_DOCUMENTS]
                    if block.min() < 0:
                        raise ValueError(
                            f"{part.prefix} has a document of {block.min()} tokens: the index is damaged, "
                            "copy it again or tokenize again"
                        )
                    has_tokens = has_tokens or bool(block.any())
                    yield block
                del lengths
                part.release()
            if not has_tokens:
                raise ValueError(
                    f"{corpus.prefix}: its {corpus.num_documents} documents have no tokens: tokenize a "
                    "corpus that has some"
                )

    first = np.concatenate(([0], np.cumsum([corpus.num_documents for corpus in corpora])))
    return DocumentPool(tokens=CompactLengths(blocks(), int(first[-1])), first=first)


def describe_sources(
    corpora: Sequence[Corpus],
    parts: Sequence[Sequence[Part]],
    weights: Sequence[float | None],
    output: Path,
    pool: DocumentPool | None = None,
) -> list[Source]:
    """Return the manifest entries of all sources, after verifying and hashing every index.

    `pool` contains the lengths of their documents. Without it the `.bin` files are not read and empty
    documents are not counted, because a forecast needs neither.

    Raises:
        ValueError: a damaged index, an index or a sampled block of a `.bin` that does not match its corpus
            record, or a copy of another corpus.
    """
    described: list[Source] = []
    total = sum(part.tokens.idx_bytes for mine in parts for part in mine)
    everything: list[Shard] = []
    with progress_bar("checking indices", total, "B") as bar:
        for corpus, mine, weight in zip(corpora, parts, weights, strict=True):
            shards = [
                describe_part(part, part.tokens.check(bar.update), bind=pool is not None) for part in mine
            ]
            empty = 0 if pool is None else count_empty(pool, len(described))
            described.append(_describe(corpus, mine, shards, weight, output, empty, pool is not None))
            everything += shards
    require_distinct_content(named_parts(corpora), everything)
    if pool is not None:
        opened = [part for mine in parts for part in mine]
        pairs = [(part.tokens, shard, part.record) for part, shard in zip(opened, everything, strict=True)]
        compare_blocks(pairs, SAMPLED_BLOCKS, everything[0].idx_sha256)
    return described


def describe_part(part: Part, idx_sha256: str, *, bind: bool = True) -> Shard:
    """Return the manifest entry of a pair; to bind its `.bin` to the pack, hash a sample of it.

    Raises:
        ValueError: the record of the pair contains another hash of the index.
    """
    corpus, record = part.tokens, part.record
    if record is not None and record.idx_sha256 != idx_sha256:
        raise ValueError(
            f"{corpus.idx_path} has sha256 {idx_sha256[:16]}... but its record says "
            f"{record.idx_sha256[:16]}...: the corpus was changed, tokenize it again"
        )
    return Shard(
        name=corpus.prefix.name,
        documents=corpus.num_documents,
        tokens=corpus.num_tokens,
        idx_sha256=idx_sha256,
        bin_bytes=corpus.bin_bytes,
        bin_sha256=record.bin_sha256 if record else None,
        bin_blocks_sha256=join_blocks(record.bin_blocks) if record and record.bin_blocks else None,
        bin_sample_sha256=hash_sample(open_bin(corpus.bin_path), idx_sha256) if bind else None,
    )


def _describe(
    corpus: Corpus,
    parts: Sequence[Part],
    shards: Sequence[Shard],
    weight: float | None,
    output: Path,
    empty_documents: int,
    bind: bool,
) -> Source:
    is_folder = isinstance(corpus, ShardedTokens)
    raw_files, licence = provenance([part.record for part in parts])
    return Source(
        prefix=stored_path(corpus.prefix, output),
        weight=weight,
        documents=corpus.num_documents,
        tokens=corpus.num_tokens,
        idx_sha256=join_hashes([shard.idx_sha256 for shard in shards], is_folder) or "",
        bin_bytes=corpus.bin_bytes,
        bin_sha256=join_hashes([shard.bin_sha256 for shard in shards], is_folder),
        raw_files=raw_files,
        licence=licence,
        shards=tuple(shards) if is_folder else (),
        bin_blocks_sha256=None if is_folder else shards[0].bin_blocks_sha256,
        bin_sample_sha256=None if is_folder else shards[0].bin_sample_sha256,
        empty_documents=empty_documents,
        largest_id=max(map(largest_id_of, parts)) if bind else None,
    )


def count_empty(pool: DocumentPool, source: int) -> int:
    """Documents of one source that have no token."""
    return sum(int(lengths.size - np.count_nonzero(lengths)) for lengths in pool.lengths_of(source))


def largest_id_of(part: Part) -> int:
    """Largest token id of a pair: from its record, or from its tokens where no record can be believed.

    A corpus of another tool has no record, an older record no such number, and a `.bin` that was written
    after its record is not what the record speaks of.
    """
    tokens, record = part.tokens, part.record
    if record is not None and record.largest_id is not None:
        written = os.stat(tokens.bin_path).st_mtime_ns
        if written <= os.stat(record_path(tokens.prefix)).st_mtime_ns:
            return record.largest_id
    with progress_bar(f"largest id of {tokens.prefix.name}", tokens.bin_bytes, "B") as bar:
        return largest_id(tokens, bar.update)


def require_ids_in_vocabulary(
    parts: Sequence[Sequence[Part]], sources: Sequence[Source], identity: TokenizerIdentity | None
) -> None:
    """Check that the tokenizer has all token ids of the corpora.

    Raises:
        ValueError: an id that it does not have; names corpus, document, id and vocabulary.
    """
    if identity is None:
        return
    for mine, source in zip(parts, sources, strict=True):
        if source.largest_id is None or source.largest_id < identity.vocab_size:
            continue
        for part in mine:
            bad_token = scan_tokens(part.tokens, identity.vocab_size, None)
            if bad_token is not None:
                raise bad_token
        raise ValueError(
            f"{source.prefix} has the token id {source.largest_id} by its record, outside the "
            f"{identity.vocab_size} ids of its tokenizer: tokenize it again"
        )


def provenance(records: Sequence[CorpusRecord | None]) -> tuple[tuple[dict[str, Any], ...], str | None]:
    """Return raw files and licence of the parts of a source, as their records state them."""
    known = [record for record in records if record is not None]
    licences = sorted({record.licence for record in known if record.licence is not None})
    return tuple(file for record in known for file in record.raw_files), "; ".join(licences) or None


def join_hashes(hashes: Sequence[str | None], is_folder: bool) -> str | None:
    """Return the hash of a source from those of its parts; None if one of them is not known."""
    known = [value for value in hashes if value is not None]
    if len(known) != len(hashes):
        return None
    return hashlib.sha256("\n".join(known).encode()).hexdigest() if is_folder else known[0]


def stored_path(path: Path, output: Path) -> str:
    """Return `path` relative to the pack; absolute where they have only the root in common.

    Links in the parent folders are resolved. If the file itself is a link, it keeps its name: in a Hugging
    Face cache `tokenizer.json` is a link to a blob with a meaningless name.
    """
    real = os.path.normpath(Path(os.path.realpath(path.parent)) / path.name)
    folder = os.path.realpath(output)
    if os.path.commonpath((real, folder)) == os.path.sep:
        return real
    return os.path.relpath(real, folder)


def agree_on_tokenizer(
    parts: Sequence[Part], given: TokenizerIdentity | None, output: Path
) -> TokenizerIdentity | None:
    """Return the tokenizer of all parts of all sources, or None, with a warning, where it is not known."""
    known: list[tuple[str, dict[str, Any]]] = []
    if given is not None:
        known.append(("--tokenizer", asdict(given)))
    known += [(str(part.tokens.prefix), part.record.tokenizer) for part in parts if part.record is not None]
    if not known:
        warnings.warn(
            "no source has a corpus record and no --tokenizer is given: the pack will not say which "
            "tokenizer made it, and training cannot check the vocabulary",
            stacklevel=2,
        )
        return None
    first_name, first = known[0]
    for name, identity in known[1:]:
        if not same_tokenizer(identity, first):
            raise ValueError(
                f"{name} was made with tokenizer {identity['path']} (sha256 {identity['sha256'][:16]}...) "
                f"but {first_name} means {first['path']} ({first['sha256'][:16]}...): tokenize all with one"
            )
    hashes = {identity["sha256"] for _, identity in known}
    if len(hashes) > 1:  # older and newer records: take today's kind of hash, whatever their order
        current = next((hash for _, one in known if (hash := current_sha256(one)) is not None), None)
        first = {**first, "sha256": current or first["sha256"]}
    unknown = [str(part.tokens.prefix) for part in parts if part.record is None]
    if unknown and given is None:
        more = len(unknown) - NAMED_IN_MESSAGES
        warnings.warn(
            ", ".join(unknown[:NAMED_IN_MESSAGES])
            + (f" and {more} more have" if more > 0 else " has" if len(unknown) == 1 else " have")
            + f" no corpus record: taken to be made with {first['path']}",
            stacklevel=2,
        )
    return TokenizerIdentity(**{**first, "path": stored_path(Path(first["path"]), output)})


def agree_on_document_tokens(parts: Sequence[Part]) -> DocumentTokens | None:
    """Return what all documents of all sources start and end with; None without corpus records.

    Raises:
        ValueError: two sources whose documents start or end differently.
    """
    known = [(part.tokens.prefix, part.record.special_tokens) for part in parts if part.record is not None]
    for prefix, tokens in known[1:]:
        for what, field in (("end", "eod_id"), ("start", "prefix_ids")):
            if tokens[field] != known[0][1][field]:
                raise ValueError(
                    f"documents of {prefix} {what} with {tokens[field] or 'their text'} but those of "
                    f"{known[0][0]} with {known[0][1][field] or 'their text'}: tokenize all sources with "
                    "the same --eod-token and --no-bos"
                )
    if not known:
        return None
    first = known[0][1]
    return DocumentTokens(
        prefix_ids=tuple(map(int, first["prefix_ids"])),
        eod_id=int(first["eod_id"]),
        eod_token=str(first["eod_token"]),
    )


def supervise_answers(
    pool: DocumentPool, corpora: Sequence[Corpus]
) -> tuple[DocumentPool, Supervision | None]:
    """Find out whether corpora contain question-answer records, and read where their answers start.

    Args:
        pool: lengths of all documents of the corpora.
        corpora: in the order of the pool.

    Returns:
        The pool with `first_target`, and its entry for the manifest. For other corpora the unchanged pool
        and None.

    Raises:
        ValueError: records beside other text, records of different templates, or a file that is missing,
            damaged or of another corpus.
    """
    parts = [part for corpus in corpora for part in read_parts(corpus)]
    with_answers = [part for part in parts if part.record is not None and part.record.answers is not None]
    if not with_answers:
        return pool, None
    if len(with_answers) < len(parts):
        other = next(part for part in parts if part not in with_answers)
        raise ValueError(
            f"{with_answers[0].tokens.prefix} contains question-answer records and {other.tokens.prefix} "
            "other text: pack them apart"
        )
    records = [_record_of(part) for part in parts]
    first = records[0]
    for part, record in zip(parts, records, strict=True):
        if (record.template_sha256, record.context_place) != (first.template_sha256, first.context_place):
            raise ValueError(
                f"{part.tokens.prefix} was written with another template than {parts[0].tokens.prefix}: "
                "tokenize the records again, with one template"
            )
    starts = np.concatenate(
        [_read_answers(part, record) for part, record in zip(parts, records, strict=True)]
    )
    _check_starts(starts, pool)
    supervision = Supervision(
        targets="answers",
        template=first.template,
        template_sha256=first.template_sha256,
        context_place=first.context_place,
        answers_sha256=tuple(record.sha256 for record in records),
        left_out_records=sum(record.left_out_records for record in records),
    )
    return replace(pool, first_target=starts), supervision


def require_whole_records(pool: DocumentPool, row_tokens: int, policy: str, masked: bool) -> None:
    """Check that a question-answer record is never cut and never predicts the next one.

    Args:
        pool: pool of records.
        row_tokens: inputs of a row.
        policy: packing policy.
        masked: whether the first token of a document is never a target.

    Raises:
        ValueError: another policy, unmasked targets, or a record longer than a row.
    """
    if policy != "best-fit" or not masked:
        raise ValueError(
            "question-answer records are packed whole, by megatron-exact pack-qa: with --policy best-fit "
            "and --mask-cross-document-targets"
        )
    longest = max(int(lengths.max()) for lengths in pool.blocks())
    if longest > row_tokens:
        raise ValueError(
            f"the longest question-answer record has {longest} tokens and rows have {row_tokens}: "
            "megatron-exact pack-qa leaves such records out"
        )


def answer_starts(part: Part) -> NDArray[np.int32] | None:
    """Read where the answers of a corpus of question-answer records begin; None for other text.

    Raises:
        ValueError: a file that is missing, damaged or of another corpus.
    """
    if part.record is None or part.record.answers is None:
        return None
    return _read_answers(part, _record_of(part))


def _record_of(part: Part) -> AnswersRecord:
    assert part.record is not None
    return build_record(AnswersRecord, part.record.answers, f"{record_path(part.tokens.prefix)}: answers")


def _read_answers(part: Part, record: AnswersRecord) -> NDArray[np.int32]:
    path = answers_path(part.tokens.prefix)
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy it beside the corpus, or make the corpus again")
    if sha256_file(path) != record.sha256:
        raise ValueError(f"{path} is not the file that the corpus record names: copy the corpus again")
    starts: NDArray[np.int32] = np.load(path, allow_pickle=False)
    if starts.dtype != np.dtype(ANSWERS_DTYPE) or starts.shape != (part.tokens.num_documents,):
        raise ValueError(
            f"{path} contains {starts.dtype} {starts.shape} for {part.tokens.num_documents} records: make "
            "the corpus again"
        )
    return starts


def _check_starts(starts: NDArray[np.int32], pool: DocumentPool) -> None:
    wrong = np.flatnonzero((starts < 1) | (starts >= pool.tokens[:]))
    if wrong.size:
        number = int(wrong[0])
        raise ValueError(
            f"the answer of record {number} starts at token {starts[number]} of {pool.tokens[number]}: the "
            "corpus is damaged, make it again"
        )
