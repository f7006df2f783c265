"""Pack corpora into rows: check the sources, choose and order documents, plan rows, write the pack.

Tokens are never copied. A pack is a few bytes for each segment: about 22, so a corpus of a billion
documents needs about 22 GB of plan whatever the documents' length.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.blend import SourceDocuments, choose_documents
from megatron_exact.data.corpus_record import read_corpus_record
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.manifest import (
    ARRAY_DTYPES,
    POLICIES,
    SPLITS,
    Exposure,
    Manifest,
    Source,
    SourceUse,
    Split,
    TokenizerIdentity,
    finish_manifest,
    write_manifest,
)
from megatron_exact.data.npy import write_npy
from megatron_exact.data.plan import Plan, continuing_rows, plan_exposure
from megatron_exact.data.plan_best_fit import plan_best_fit
from megatron_exact.data.plan_concat import plan_concat
from megatron_exact.data.sources import agree_on_tokenizer, check_documents, describe_sources, parse_sources
from megatron_exact.data.split import validation_documents
from megatron_exact.exposure import bucket_lower_bounds
from megatron_exact.files import atomic_folder, require_free_folder


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Everything that decides a plan besides the sources; all of it is in the fingerprint."""

    row_tokens: int
    """Inputs of a row."""
    policy: str
    """`concat` or `best-fit`."""
    seed: int
    """Of the split, the choice and the order."""
    validation_fraction: float = 0.0
    """Of each source's documents, in [0, 1)."""
    train_tokens: int | None = None
    """Tokens wanted in the train split; None means as many as there are."""
    allow_repeats: bool = False
    """Go over a source again when its share is larger than it is."""
    mask_cross_document_targets: bool = False
    """Do not supervise the first token of a document."""

    def __post_init__(self) -> None:
        if self.row_tokens < 1:
            raise ValueError(f"row length {self.row_tokens}: --row-tokens must be at least 1")
        if self.row_tokens >= 1 << 31:
            raise ValueError(f"row length {self.row_tokens}: --row-tokens must be below 2^31")
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"--validation-fraction {self.validation_fraction} is not in [0, 1)")
        if self.train_tokens is not None and self.train_tokens < 1:
            raise ValueError(f"--train-tokens {self.train_tokens} must be at least 1")
        if self.allow_repeats and self.train_tokens is None:
            raise ValueError("--allow-repeats needs --train-tokens: nothing says how much is wanted")

    @classmethod
    def of(cls, manifest: Manifest) -> PackOptions:
        """The options that a pack was made with."""
        return cls(**{name: getattr(manifest, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class PlannedSplit:
    """One split, planned but not written."""

    plan: Plan
    """Its rows."""
    uses: tuple[SourceUse, ...]
    """What it took from each source."""
    counts: NDArray[np.int64]
    """[buckets], supervised targets."""

    def describe(self, row_tokens: int, arrays: dict[str, str]) -> Split:
        """The manifest's entry."""
        return Split(
            rows=self.plan.rows,
            segments=self.plan.segments,
            tokens=self.plan.tokens,
            padding_tokens=self.plan.rows * row_tokens - self.plan.tokens,
            left_out_tokens=self.plan.left_out_tokens,
            supervised_targets=int(self.counts.sum()),
            exposure=Exposure(
                lower=tuple(bucket_lower_bounds(row_tokens).tolist()), counts=tuple(self.counts.tolist())
            ),
            next_token=self.plan.next_token,
            sources=self.uses,
            arrays=arrays,
        )


def pack_corpora(
    sources: Sequence[str],
    output: str | Path,
    options: PackOptions,
    *,
    tokenizer: TokenizerIdentity | None = None,
) -> Manifest:
    """Pack corpora into a new folder.

    Args:
        sources: `[WEIGHT:]PREFIX` each.
        output: folder that does not exist yet, or is empty.
        options: see PackOptions.
        tokenizer: which made the tokens; None means the one in the corpus records.

    Raises:
        ValueError: options, sources or amounts that cannot be packed; nothing is written then.
        FileNotFoundError: a source is missing.
    """
    output = Path(output)
    require_free_folder(output)
    weights, prefixes = parse_sources(sources)
    corpora = [IndexedTokens(prefix) for prefix in prefixes]
    for corpus in corpora:
        check_documents(corpus)
    require_long_enough(corpora, options)
    records = [read_corpus_record(prefix) for prefix in prefixes]
    described = describe_sources(corpora, weights, records, output)
    splits = plan_splits(corpora, described, options)
    _require_train_rows(splits["train"], options)
    identity = agree_on_tokenizer(prefixes, records, tokenizer, output)
    _warn_of_no_validation(splits["validation"], options)
    with atomic_folder(output) as folder:
        entries = {
            name: planned.describe(options.row_tokens, _write_arrays(folder / name, planned.plan))
            for name, planned in splits.items()
        }
        manifest = finish_manifest(
            **asdict(options), tokenizer=identity, sources=tuple(described), splits=entries
        )
        write_manifest(manifest, folder)
    return manifest


def require_long_enough(corpora: Sequence[IndexedTokens], options: PackOptions) -> None:
    """Refuse at once a row longer than all that the train split can hold; planning it takes gigabytes.

    Args:
        corpora: opened.
        options: see PackOptions.

    Raises:
        ValueError: no row can be filled, however the documents are chosen.
    """
    available = sum(corpus.num_tokens for corpus in corpora)
    if options.train_tokens is not None:
        # Each source may be over its share by its last document.
        last = sum(int(np.max(corpus.document_tokens, initial=0)) for corpus in corpora)
        wanted = options.train_tokens + last
        available = wanted if options.allow_repeats else min(available, wanted)
    if available < options.row_tokens:
        raise ValueError(_no_row_message(f"at most {available}", options))


def plan_splits(
    corpora: Sequence[IndexedTokens], sources: Sequence[Source], options: PackOptions
) -> dict[str, PlannedSplit]:
    """Plan both splits in memory; `--verify` calls this again and compares.

    Args:
        corpora: opened.
        sources: their manifest entries: weights, and index hashes for the validation split.
        options: see PackOptions.
    """
    held_out = [
        validation_documents(
            corpus.num_documents,
            options.validation_fraction,
            seed=options.seed,
            idx_sha256=source.idx_sha256,
        )
        for corpus, source in zip(corpora, sources, strict=True)
    ]
    planned = {}
    for name in SPLITS:
        is_train = name == "train"
        members = []
        for corpus, source, held in zip(corpora, sources, held_out, strict=True):
            document = np.flatnonzero(~held if is_train else held)
            members.append(
                SourceDocuments(
                    name=str(corpus.prefix),
                    weight=source.weight if is_train else None,
                    document=document,
                    tokens=np.asarray(corpus.document_tokens[document], dtype=np.int64),
                )
            )
        planned[name] = _plan_split(name, members, corpora, options)
    return planned


def _plan_split(
    name: str, members: list[SourceDocuments], corpora: Sequence[IndexedTokens], options: PackOptions
) -> PlannedSplit:
    chosen, uses = choose_documents(
        members,
        split=name,
        seed=options.seed,
        target_tokens=options.train_tokens if name == "train" else None,
        allow_repeats=options.allow_repeats,
    )
    if options.policy == "concat":
        plan = plan_concat(chosen, options.row_tokens)
    else:
        plan = plan_best_fit(chosen, options.row_tokens, seed=options.seed, split=name)
    continuing = continuing_rows(plan, final_document_tokens(plan, corpora))
    counts = plan_exposure(
        plan,
        options.row_tokens,
        policy=options.policy,
        mask_cross_document_targets=options.mask_cross_document_targets,
        continuing=continuing,
    )
    return PlannedSplit(plan=plan, uses=uses, counts=counts)


def final_document_tokens(plan: Plan, corpora: Sequence[IndexedTokens]) -> NDArray[np.int64]:
    """Whole length of the document of each row's last segment: int64 [rows]."""
    last = plan.row_offsets[1:] - 1
    source, document = plan.segment_source[last], plan.segment_document[last]
    tokens = np.empty(plan.rows, dtype=np.int64)
    for index, corpus in enumerate(corpora):
        mine = source == index
        tokens[mine] = corpus.document_tokens[document[mine]]
    return tokens


def _require_train_rows(train: PlannedSplit, options: PackOptions) -> None:
    available = sum(use.tokens for use in train.uses)
    if train.plan.rows == 0 or available < options.row_tokens:
        raise ValueError(_no_row_message(f"{available}", options))


def _no_row_message(available: str, options: PackOptions) -> str:
    remedy = "" if options.train_tokens is None else ", raise --train-tokens"
    return (
        f"the {available} train tokens do not fill one row of {options.row_tokens} (and the label of its "
        f"last input): choose a smaller --row-tokens{remedy} or add data"
    )


def _warn_of_no_validation(validation: PlannedSplit, options: PackOptions) -> None:
    if options.validation_fraction and validation.plan.rows == 0:
        held = sum(use.tokens for use in validation.uses)
        warnings.warn(
            f"the validation split has {held} tokens, too few for one row of {options.row_tokens}: it has "
            "no rows; raise --validation-fraction to evaluate on it",
            stacklevel=3,
        )


def _write_arrays(folder: Path, plan: Plan) -> dict[str, str]:
    """Write the arrays of one split; file name to sha256."""
    folder.mkdir()
    arrays = plan.arrays()
    return {
        f"{name}.npy": write_npy(folder / f"{name}.npy", arrays[name], dtype)
        for name, dtype in ARRAY_DTYPES.items()
    }
