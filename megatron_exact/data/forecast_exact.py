"""The exact what-if: choose, split and order documents as `pack_corpus` does, and write nothing.

The choice depends on neither row length nor policy, so it is made once a mix: 4 bytes a document hold
their lengths in order, and every row length of `concat` is cut from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.distinct import named_parts, require_distinct_files
from megatron_exact.data.forecast import Forecast
from megatron_exact.data.length_files import is_length_file, read_index_lengths
from megatron_exact.data.pack import PackOptions, choose_split
from megatron_exact.data.plan import ChosenDocuments, DocumentPool, Plan
from megatron_exact.data.plan_best_fit import BestFitPlan
from megatron_exact.data.plan_concat import ConcatPlan
from megatron_exact.data.plan_measure import PlanMeasure
from megatron_exact.data.shards import Corpus
from megatron_exact.data.sources import DocumentLengths, describe_sources, load_pool, open_sources
from megatron_exact.data.split import IndexedDocuments, hold_out
from megatron_exact.files import sha256_file


@dataclass(frozen=True, kw_only=True)
class OpenedCorpora:
    """Corpora as packing sees them."""

    names: Sequence[str]
    """As the user wrote them."""
    sources: Sequence[IndexedDocuments]
    """What their validation splits depend on."""
    pool: DocumentPool
    """Lengths of all documents."""


@dataclass(frozen=True, kw_only=True)
class IndexAlone:
    """A corpus of which only the `.idx` is there: all that choice, split, order and plan depend on."""

    prefix: Path
    """The `.idx`."""
    document_tokens: NDArray[np.integer]
    """int32 or int64 [documents]."""
    idx_sha256: str
    """Of the file."""

    @classmethod
    def read(cls, path: Path) -> IndexAlone:
        """Read and hash an index."""
        return cls(prefix=path, document_tokens=read_index_lengths(path), idx_sha256=sha256_file(path))

    @property
    def documents(self) -> int:
        """How many there are."""
        return int(self.document_tokens.size)

    num_documents = documents

    def release(self) -> None:
        """Nothing to close: the lengths are mapped as long as they are referred to."""


def open_corpora(paths: Sequence[Path]) -> OpenedCorpora:
    """Open and check corpora as packing does; indices are hashed, for the validation split needs that.

    Args:
        paths: prefixes, folders of shards, or an `.idx` in place of its corpus.

    Raises:
        ValueError, FileNotFoundError: what packing would refuse.
    """
    corpora, parts = open_sources([path for path in paths if not is_length_file(path)])
    require_distinct(corpora, [path for path in paths if is_length_file(path)])
    described = iter(describe_sources(corpora, parts, [None] * len(corpora), Path.cwd()))
    whole = iter(corpora)
    sources: list[IndexedDocuments] = []
    lengths: list[DocumentLengths] = []
    for path in paths:
        if is_length_file(path):
            alone = IndexAlone.read(path)
            sources.append(alone)
            lengths.append(alone)
        else:
            sources.append(next(described))
            lengths.append(next(whole))
    return OpenedCorpora(names=[str(path) for path in paths], sources=sources, pool=load_pool(lengths))


def require_distinct(corpora: Sequence[Corpus], indices: Sequence[Path]) -> None:
    """Refuse what packing would: a file that is in two sources, an `.idx` in place of its corpus included.

    Raises:
        ValueError: the two.
    """
    files: list[tuple[str, Sequence[Path]]] = [
        (name, (part.idx_path, part.bin_path)) for name, part in named_parts(corpora)
    ]
    require_distinct_files(files + [(f"source {path}", (path,)) for path in indices])


def choose_train(
    opened: OpenedCorpora, weights: Sequence[float] | None, options: PackOptions
) -> ChosenDocuments:
    """The documents of the train split, in packing order.

    Args:
        opened: the corpora.
        weights: one each, or None.
        options: of the pack; row length and policy do not matter.

    Raises:
        ValueError: amounts that packing would refuse.
    """
    shares = [None] * len(opened.sources) if weights is None else list(weights)
    held_out = hold_out(opened.sources, opened.pool, options.validation_fraction, seed=options.seed)
    chosen, _ = choose_split("train", opened.pool, opened.sources, opened.names, shares, held_out, options)
    return chosen


def lengths_in_order(chosen: ChosenDocuments) -> NDArray[np.integer]:
    """Lengths of chosen documents, in packing order: int32 or int64 [documents]."""
    lengths = np.empty(len(chosen), dtype=chosen.pool.tokens.dtype)
    done = 0
    for _, tokens in chosen.in_order():
        lengths[done : done + tokens.size] = tokens
        done += tokens.size
    return lengths


def forecast_stream(lengths: NDArray[np.integer], options: PackOptions) -> Forecast:
    """Forecast the `concat` pack of documents of these lengths in this order.

    Args:
        lengths: integers [documents], from `lengths_in_order`.
        options: of the pack.
    """
    pool = DocumentPool(tokens=lengths, first=np.array([0, lengths.size]))
    plan = ConcatPlan(ChosenDocuments(pool=pool, numbers=None, key=None), options.row_tokens)
    return _forecast_plan(plan, lengths.size, options)


def forecast_repeats(chosen: ChosenDocuments, options: PackOptions) -> Forecast:
    """Forecast the `best-fit` pack of documents that are repeated: which rounds they fall into counts.

    Args:
        chosen: from `choose_train`.
        options: of the pack.
    """
    plan = BestFitPlan(chosen, options.row_tokens, seed=options.seed, split="train")
    return _forecast_plan(plan, len(chosen), options)


def _forecast_plan(plan: Plan, documents: int, options: PackOptions) -> Forecast:
    measure = PlanMeasure(row_tokens=options.row_tokens)
    cut_documents = tokens_after_cut = 0
    for block in plan.blocks():
        measure.add(block)
        cut_documents += int(np.count_nonzero(block.goes_on & (block.start == 0)))
        tokens_after_cut += int(block.tokens.sum(dtype=np.int64, where=block.start > 0))
    masked = options.mask_cross_document_targets
    return Forecast(
        is_exact=True,
        documents=documents,
        rows=measure.rows,
        segments=measure.segments,
        tokens=measure.tokens,
        padding_tokens=measure.padding_tokens,
        left_out_tokens=plan.left_out_tokens,
        cut_documents=cut_documents,
        tokens_after_cut=tokens_after_cut,
        counts=measure.counts(policy=options.policy, mask_cross_document_targets=masked),
    )
