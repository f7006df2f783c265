"""The manifest of a pack: what was packed, how, and what came out.

`DIR/manifest.json` stands beside the arrays of `DIR/train` and `DIR/validation`. Its fingerprint is the
sha256 of the canonical JSON (sorted keys, no spaces) of everything in it except where things lay and where
they came from (`prefix`, `raw_files`, `licence`, the tokenizer's `path`) and what follows from the hashes
of the corpora (`largest_id`, `document_tokens`): two machines that pack the same tokens with the same
options agree, and an edited number no longer matches.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.shards import Corpus, open_corpus
from megatron_exact.files import sha256_file, write_json
from megatron_exact.json_input import as_json, build_record, read_json_object

FORMAT_VERSION = 2  # 1: plans in another order, no shards
MANIFEST_NAME = "manifest.json"
POLICIES = ("concat", "best-fit")
WEIGHT_UNITS = ("tokens", "documents")
SPLITS = ("train", "validation")
ARRAY_DTYPES = {
    "row_offsets": "<i8",
    "segment_source": "<u2",
    "segment_document": "<i8",
    "segment_start": "<i8",
    "segment_tokens": "<i4",
}
DESCRIPTIVE_SOURCE_FIELDS = ("prefix", "raw_files", "licence", "largest_id")
BINDINGS = ("bin_blocks_sha256", "bin_sample_sha256")  # follow from what bin_sha256 says already
FIRST_TARGET = "segment_first_target"
FIRST_TARGET_DTYPE = "<i4"
"""Array of packs with supervised answers: the token of its document that is each segment's first target."""


def supervises_row_end[Bits: (bool, NDArray[np.bool_])](policy: str, masked: bool, goes_on: Bits) -> Bits:
    """Decide whether the target of a row's last token is supervised. Nothing else decides it.

    A document that goes on after the row has a next token, which is the target, with the tokens of its
    segment as context. Where the document ends with the row, `concat` takes the first token of the next
    row (context 0, the overlap of rows in stock Megatron) unless cross-document targets are masked;
    under `best-fit` rows are unrelated, so there is no target.

    Args:
        policy: of the pack.
        masked: whether the first token of a document is never a supervised target.
        goes_on: whether the document goes on after the row, of one row or [rows].
    """
    return goes_on | (policy == "concat" and not masked)


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
    """Hash of what decides tokens, see `data/tokenizers.py`."""


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
    """Hex sha256 of the `.idx`."""
    bin_bytes: int
    """Size of the `.bin`."""
    bin_sha256: str | None
    """Hex sha256 of the `.bin`, from its corpus record; None when there is no record."""
    bin_blocks_sha256: str | None = None
    """Of the hashes of the blocks in its record (`corpus_guard`); not in the fingerprint, which has
    `bin_sha256`."""
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
    """Share in the train split before normalisation; None when no source has one."""
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
    """Hash of the blocks as in a shard; None for a folder."""
    bin_sample_sha256: str | None = None
    """Hash of the sample as in a shard; None for a folder."""
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
    """Tokens of the chosen documents."""
    repeated_tokens: int
    """Chosen tokens beyond the first pass over the source."""
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
    """What is supervised in a pack of question-answer records. Ordinary packs have none."""

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
    """Records longer than a row, which are in no source."""


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
    """Tokens of chosen documents that are no input of any row."""
    supervised_targets: int
    """Targets whose loss counts."""
    exposure: Exposure
    """Supervised targets by bucket of effective context."""
    next_token: TokenPlace | None
    """The token after the last row's last input (`concat` with rows), else None."""
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
        """Largest token id of all sources; None if one is not known."""
        known = [source.largest_id for source in self.sources if source.largest_id is not None]
        return max(known) if len(known) == len(self.sources) else None

    def supervises_row_end[Bits: (bool, NDArray[np.bool_])](self, goes_on: Bits) -> Bits:
        """Apply the module's `supervises_row_end` to rows of this pack."""
        return supervises_row_end(self.policy, self.mask_cross_document_targets, goes_on)

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


def read_manifest(pack_dir: str | Path) -> Manifest:
    """Read and check the manifest of a packed dataset.

    Raises:
        FileNotFoundError: no manifest there.
        ValueError: not JSON, another format, a field missing, of another type or out of range, or a
            fingerprint that does not match (edited by hand).
    """
    path = Path(pack_dir) / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {pack_dir} is no packed dataset, make one with megatron-exact pack"
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
    """Name a value that no pack can have although its type is right; None if there is none."""
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
    """A Manifest from all fields but `format_version` and `fingerprint`, which are added."""
    draft = asdict(Manifest(format_version=FORMAT_VERSION, fingerprint="", **entries))
    # Built as a reader builds it before it is hashed: 0 for a float becomes 0.0.
    built = build_record(Manifest, as_json(draft), MANIFEST_NAME)
    return replace(built, fingerprint=fingerprint_of(asdict(built)))


def write_manifest(manifest: Manifest, pack_dir: str | Path) -> None:
    """Write `manifest.json` into an existing folder."""
    write_json(Path(pack_dir) / MANIFEST_NAME, without_defaults(asdict(manifest)))


def fingerprint_of(content: dict[str, Any]) -> str:
    """Fingerprint of the JSON content of a manifest, hex."""
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
    """A copy of a manifest's JSON without the fields that have their defaults.

    Such fields were added later; packs that do not use them keep their bytes and their fingerprint.
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


def array_dtypes(split: Split) -> dict[str, str]:
    """Name to dtype of the arrays of a split."""
    if f"{FIRST_TARGET}.npy" not in split.arrays:
        return ARRAY_DTYPES
    return {**ARRAY_DTYPES, FIRST_TARGET: FIRST_TARGET_DTYPE}


def verify_arrays(pack_dir: str | Path, manifest: Manifest | None = None) -> int:
    """Hash every array of a pack and compare with its manifest; a training job does this once.

    Returns:
        Bytes read.

    Raises:
        ValueError: a missing, unexpected or damaged array.
    """
    manifest = manifest or read_manifest(pack_dir)
    return sum(verify_split_arrays(pack_dir, name, split) for name, split in manifest.splits.items())


def verify_split_arrays(pack_dir: str | Path, name: str, split: Split) -> int:
    """Hash every array of one split, see `verify_arrays`."""
    expected = sorted(f"{array}.npy" for array in array_dtypes(split))
    if sorted(split.arrays) != expected:
        raise ValueError(
            f"the manifest of {pack_dir} lists arrays {sorted(split.arrays)}, not {expected}: pack again"
        )
    total = 0
    for file, sha256 in split.arrays.items():
        path = Path(pack_dir) / name / file
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy the pack again or pack again")
        found = sha256_file(path)
        if found != sha256:
            raise ValueError(
                f"{path} has sha256 {found[:16]}... but the manifest says {sha256[:16]}...: "
                "the array is damaged, copy the pack again or pack again"
            )
        total += path.stat().st_size
    return total
