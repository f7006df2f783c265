"""The manifest of a pack: what was packed, how, and what came out.

`DIR/manifest.json` stands beside the arrays of `DIR/train` and `DIR/validation`. Its fingerprint is the
sha256 of the canonical JSON (sorted keys, no spaces) of everything in it except locations and origins
(`prefix`, `raw_files`, `licence`, the tokenizer's `path`) and what follows from the hashes of the corpora
(`largest_id`, `document_tokens`): two machines that pack the same tokens with the same options agree, and a
manifest with an edited number no longer matches its fingerprint.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_exact.data.remote import is_url, local_corpus
from megatron_exact.data.shards import Corpus, open_corpus
from megatron_exact.files import write_json
from megatron_exact.json_input import as_json, build_record, read_json_object

FORMAT_VERSION = 2  # 1: plans in another order, no shards
MANIFEST_NAME = "manifest.json"
POLICIES = ("concat", "best-fit")
WEIGHT_UNITS = ("tokens", "documents")
SPLITS = ("train", "validation")
DESCRIPTIVE_SOURCE_FIELDS = ("prefix", "raw_files", "licence", "largest_id")
BINDINGS = ("bin_blocks_sha256", "bin_sample_sha256")  # follow from the content that bin_sha256 hashes
FIRST_TARGET = "segment_first_target"
"""Array of packs with supervised answers: the token of its document that is each segment's first target."""


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """The tokenizer that made the tokens."""

    path: str
    """Folder or file, relative to the pack where possible."""
    kind: str
    """`huggingface` or `sentencepiece`."""
    vocab_size: int
    """Number of ids; every token id is below it."""
    sha256: str
    """Hash of everything that determines tokens, see `data/tokenizers.py`."""


@dataclass(frozen=True, kw_only=True)
class DocumentTokens:
    """Tokens at the start and end of every document of a pack, as the corpus records state them."""

    prefix_ids: tuple[int, ...]
    """Ids at the start; may be empty."""
    eod_id: int
    """Id at the end."""
    eod_token: str
    """Text of the token at the end."""


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
    """Hex sha256 of the `.idx`."""
    bin_bytes: int
    """Size of the `.bin`."""
    bin_sha256: str | None
    """Hex sha256 of the `.bin`, from its corpus record; None when there is no record."""
    bin_blocks_sha256: str | None = None
    """Hex sha256 over the hashes of blocks in the corpus record (`corpus_guard`); not in the fingerprint,
    which contains `bin_sha256`."""
    bin_sample_sha256: str | None = None
    """Hash of a sample of the `.bin`, taken when it was packed; not in the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus that was packed: a `.bin`/`.idx` pair, or a folder of such shards.

    Documents of a folder are numbered through its shards in the order of their names; its hashes are
    those of the shards' hashes (hex, joined by newlines).
    """

    prefix: str
    """Path without suffix, or the folder; relative to the pack where possible."""
    weight: float | None
    """Share in the train split before normalization; None when no source has one."""
    documents: int
    """Documents of the whole corpus."""
    tokens: int
    """Tokens of the whole corpus."""
    idx_sha256: str
    """Hex sha256 of the `.idx`."""
    bin_bytes: int
    """Size of the `.bin`."""
    bin_sha256: str | None
    """Hex sha256 of the `.bin`, from the corpus record; None when there is no record."""
    raw_files: tuple[dict[str, Any], ...]
    """Raw text files, from the corpus record."""
    licence: str | None
    """Licence from the corpus record; where shards differ, all of them."""
    shards: tuple[Shard, ...]
    """The shards of a folder; empty for a single pair."""
    bin_blocks_sha256: str | None = None
    """Hash of the blocks, as in `Shard`; None for a folder."""
    bin_sample_sha256: str | None = None
    """Hash of the sample, as in `Shard`; None for a folder."""
    empty_documents: int = 0
    """Documents without a token, which are in no split; in the file only if there are some."""
    largest_id: int | None = None
    """Largest token id of the whole corpus; None in older packs. Not in the fingerprint, which contains the
    hashes of the corpus."""

    @property
    def parts(self) -> tuple[Shard, ...]:
        """Pairs of files of the source: its shards, or itself."""
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
    """Tokens of the chosen documents."""
    repeated_tokens: int
    """Chosen tokens beyond the first pass over the source."""
    unused_tokens: int
    """Tokens of the source's documents of this split that were not chosen."""


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Supervised targets per bucket of effective context."""

    lower: tuple[int, ...]
    """Lower edges of the buckets, tokens."""
    counts: tuple[int, ...]
    """Supervised targets of each bucket."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What is supervised in a pack of question-answer records; other packs lack this entry."""

    targets: str
    """`answers`: the tokens of the answer and the EOD behind it."""
    template: str
    """Jinja source of the chat template that the records were written with."""
    template_sha256: str
    """Hex sha256 of the template in UTF-8."""
    context_place: str
    """Where a record's context stands in the question: `before` or `after` the instruction."""
    answers_sha256: tuple[str, ...]
    """Hex sha256 of each source's file of answer starts (`PREFIX.answers.npy`)."""
    left_out_records: int
    """Records left out of the sources because they are longer than a row."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one split contains."""

    rows: int
    """Packed rows."""
    segments: int
    """Segments of all rows."""
    tokens: int
    """Inputs that are tokens of documents."""
    padding_tokens: int
    """Inputs that are padding; tokens + padding_tokens = rows * row_tokens."""
    left_out_tokens: int
    """Tokens of chosen documents that are not in any row."""
    supervised_targets: int
    """Targets whose loss counts."""
    exposure: Exposure
    """Supervised targets by bucket of effective context."""
    next_token: TokenPlace | None
    """The token after the last row's last input under `concat` with rows; otherwise None."""
    sources: tuple[SourceUse, ...]
    """What the split took from each source, in the order of the manifest's sources."""
    arrays: dict[str, str]
    """sha256 of each array, by its file name inside the split's folder."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of `manifest.json`: what was packed, how, and what came out."""

    format_version: int
    """Version of the format, 2."""
    row_tokens: int
    """Inputs of a row."""
    policy: str
    """`concat` or `best-fit`."""
    seed: int
    """Seed of the split, of the choice of documents and of their order."""
    mask_cross_document_targets: bool
    """Whether the first token of a document is never a supervised target."""
    validation_fraction: float
    """Fraction of each source's documents in the validation split."""
    train_tokens: int | None
    """Tokens asked for in the train split; None means as many as there are."""
    allow_repeats: bool
    """Whether a source shorter than its share was repeated."""
    weight_unit: str
    """What weights are shares of: `tokens` or `documents`."""
    tokenizer: TokenizerIdentity | None
    """Tokenizer of all sources; None where no record names it."""
    sources: tuple[Source, ...]
    """Sources in the order given; `segment_source` contains indices into it."""
    splits: dict[str, Split]
    """The splits `train` and `validation`."""
    fingerprint: str
    """Hash of content and options; equal fingerprints mean equal rows."""
    corpus_slice: str | None = None
    """`I/N`, the part of every source's training documents that the pack reads; in the file only where it
    is not all of them."""
    supervision: Supervision | None = None
    """What is supervised in a pack of question-answer records; absent from the file of other packs."""
    document_tokens: DocumentTokens | None = None
    """What documents start and end with; None where no corpus record says so. Not in the fingerprint."""

    @property
    def largest_id(self) -> int | None:
        """Largest token id of all sources; None if it is not known for one of them."""
        known = [source.largest_id for source in self.sources if source.largest_id is not None]
        return max(known) if len(known) == len(self.sources) else None

    def source_prefix(self, index: int, pack_dir: str | Path, source_root: str | Path | None) -> Path:
        """Return where source `index` lies now.

        With `source_root`, this is the longest tail of the stored path that exists below it: for
        `../data/a/train` it tries `data/a/train`, `a/train`, then `train`. A URL gives the path of a
        stand-in on this node (`remote`).

        Raises:
            FileNotFoundError: nothing below `source_root` matches.
            ValueError: a URL that cannot be read.
        """
        stored = Path(self.sources[index].prefix)
        if source_root is None:
            return Path(os.path.normpath(Path(pack_dir).resolve() / stored))
        parts = [part for part in stored.parts if part not in ("..", "/")]
        if is_url(source_root):
            urls = ["/".join((str(source_root).rstrip("/"), *parts[first:])) for first in range(len(parts))]
            packed = {part.name: part.idx_sha256 for part in self.sources[index].parts}
            return local_corpus(urls, packed, is_folder=bool(self.sources[index].shards))
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
        """Open source `index` where it lies now, and compare it with what was packed.

        Raises:
            ValueError, FileNotFoundError: it is missing, damaged or not the one that was packed.
        """
        source = self.sources[index]
        known = [(shard.name, shard.documents, shard.tokens) for shard in source.shards]
        corpus = open_corpus(self.source_prefix(index, pack_dir, source_root), known)
        found = (corpus.num_documents, corpus.num_tokens, corpus.bin_bytes)
        if found != (source.documents, source.tokens, source.bin_bytes):
            raise ValueError(
                f"{corpus.prefix} contains {found[0]} documents, {found[1]} tokens and {found[2]} bytes "
                f"but {source.documents}, {source.tokens} and {source.bin_bytes} were packed: "
                "it was tokenized again, pack it again"
            )
        return corpus

    def tokenizer_path(self, pack_dir: str | Path) -> Path | None:
        """Return where the tokenizer lies now; None if it is unknown."""
        if self.tokenizer is None:
            return None
        return Path(os.path.normpath(Path(pack_dir).resolve() / self.tokenizer.path))


def read_manifest(pack_dir: str | Path) -> Manifest:
    """Read and check the manifest of a packed dataset.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: not JSON, another format, a field that is missing, of another type or out of range, or a
            fingerprint that does not match because the file was edited; a URL.
    """
    if is_url(pack_dir):
        raise ValueError(
            f"{pack_dir} is a URL, but a pack is read from a folder, and is small: copy it to a disk or a "
            "shared file system; its corpora may lie at a URL, see --source-root"
        )
    path = Path(pack_dir) / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {pack_dir} is not a packed dataset, make one with megatron-exact pack"
        )
    content = read_json_object(path, "pack the corpus again")
    if content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version")
        raise ValueError(
            f"{path} has format_version {found!r}, this program reads {FORMAT_VERSION}: pack again"
        )
    manifest = build_record(Manifest, content, str(path))
    if tuple(sorted(manifest.splits)) != tuple(sorted(SPLITS)):
        raise ValueError(f"{path} has splits {sorted(manifest.splits)}, not {sorted(SPLITS)}: pack again")
    problem = _problem(manifest)
    if problem is not None:
        raise ValueError(f"{path} {problem}: it was edited or damaged, pack the corpus again")
    expected = fingerprint_of(content)
    if manifest.fingerprint != expected:
        raise ValueError(
            f"{path} says fingerprint {manifest.fingerprint[:16]}... but its content gives "
            f"{expected[:16]}...: it was edited or damaged, pack the corpus again"
        )
    return manifest


def _problem(manifest: Manifest) -> str | None:
    """Name a value that a pack cannot have although its type is right; None if all are possible."""
    if manifest.row_tokens < 1:
        return f"has row_tokens {manifest.row_tokens}, which must be at least 1"
    if not manifest.sources:
        return "names no source"
    weights = [source.weight for source in manifest.sources]
    if None in weights and any(weight is not None for weight in weights):
        return f"gives a weight to some sources only ({weights})"
    if any(weight is not None and weight <= 0 for weight in weights):
        return f"has weights {weights}, which must be above 0"
    answers = manifest.supervision is not None
    if answers and not (manifest.policy == "best-fit" and manifest.mask_cross_document_targets):
        return "supervises answers, but documents may be cut or predict each other"
    for name, split in manifest.splits.items():
        if (f"{FIRST_TARGET}.npy" in split.arrays) != answers:
            return f"says in one place only that the {name} split supervises answers alone"
        if len(split.sources) != len(manifest.sources):
            return f"has {len(manifest.sources)} sources but the {name} split says {len(split.sources)}"
        if len(split.exposure.lower) != len(split.exposure.counts) or not split.exposure.lower:
            return (
                f"has {len(split.exposure.counts)} counts for {len(split.exposure.lower)} buckets in {name}"
            )
    return None


def finish_manifest(**entries: Any) -> Manifest:
    """Make a Manifest from all fields except `format_version` and `fingerprint`, which are added."""
    draft = asdict(Manifest(format_version=FORMAT_VERSION, fingerprint="", **entries))
    # Hash what a reader will build from the file: a 0 in a field of floats becomes 0.0
    built = build_record(Manifest, as_json(draft), MANIFEST_NAME)
    return replace(built, fingerprint=fingerprint_of(asdict(built)))


def write_manifest(manifest: Manifest, pack_dir: str | Path) -> None:
    """Write `manifest.json` into an existing folder."""
    write_json(Path(pack_dir) / MANIFEST_NAME, without_defaults(asdict(manifest)))


def fingerprint_of(content: dict[str, Any]) -> str:
    """Compute the fingerprint of the JSON content of a manifest, hex."""
    hashed = without_defaults(content)
    hashed.pop("fingerprint", None)
    hashed.pop("document_tokens", None)
    for source in hashed["sources"]:
        for field in DESCRIPTIVE_SOURCE_FIELDS:
            source.pop(field, None)
        for part in (source, *source["shards"]):
            for field in BINDINGS:
                part.pop(field, None)
    if hashed.get("tokenizer") is not None:
        hashed["tokenizer"].pop("path", None)
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def without_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a manifest's JSON without the fields that have their default value.

    These fields were added later; packs that do not use them keep their bytes and their fingerprint.
    """
    kept = copy.deepcopy(content)
    shards = [shard for source in kept["sources"] for shard in source["shards"]]
    for cls, entries in ((Manifest, [kept]), (Source, kept["sources"]), (Shard, shards)):
        defaults = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        for entry in entries:
            for name, default in defaults.items():
                if name in entry and entry[name] == default:
                    del entry[name]
    return kept
