"""What-if: what a pack would be, from document lengths alone and without writing anything.

Two ways. **exact** plans as `pack_corpus` does, with its choice, order and split, so every number is the
pack's own; it needs the corpora's indices and as long as planning takes. **expected** needs a histogram
of lengths: the choice of documents keeps each source's distribution of lengths, `best-fit` is planned
over the histogram (its counts do not depend on the order), and `concat` is `exposure.expected`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.best_fit import best_fit_patterns
from megatron_exact.data.length_histogram import (
    MAX_CORPUS_TOKENS,
    LengthHistogram,
    require_countable,
    round_keeping_sum,
)
from megatron_exact.data.pack import PackOptions
from megatron_exact.data.split import CorpusSlice
from megatron_exact.exposure import counts_from_histogram
from megatron_exact.exposure.context import expected_concat

REFINED_DOCUMENTS = 10**8  # over which best-fit plans an expectation, see _forecast_best_fit


class TooFewTokensError(ValueError):
    """The train split does not fill one row."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The train split of one pack that was not made."""

    is_exact: bool
    """Whether each number is the one that `pack_corpus` would give, or an expectation, rounded."""
    documents: int
    """Documents chosen."""
    rows: int
    """Packed rows."""
    segments: int
    """Segments of all rows."""
    tokens: int
    """Inputs that are tokens."""
    padding_tokens: int
    """Inputs that are padding."""
    left_out_tokens: int
    """Tokens of chosen documents that are no input of any row."""
    cut_documents: int
    """Documents that do not stand in one piece in one row."""
    tokens_after_cut: int
    """Tokens of segments that begin inside a document."""
    counts: NDArray[np.int64]
    """[buckets], supervised targets."""

    @property
    def supervised_targets(self) -> int:
        """Targets whose loss counts."""
        return int(self.counts.sum())


@dataclass(frozen=True, kw_only=True)
class LengthSource:
    """One source of which only the lengths are known."""

    name: str
    """For messages."""
    documents: LengthHistogram
    """All its documents."""
    is_complete: bool = True
    """Whether these are all its documents; a sample that was scaled is not."""


@dataclass(frozen=True, kw_only=True)
class TrainDocuments:
    """Documents of a train split, known or expected."""

    parts: Sequence[tuple[LengthHistogram, float]]
    """Histograms, and how often each is taken."""
    is_certain: bool
    """Whether these are the documents; else they are an expectation, with fractions of documents."""

    @classmethod
    def known(cls, documents: LengthHistogram) -> TrainDocuments:
        """Exactly these."""
        return cls(parts=[(documents, 1)], is_certain=True)

    @property
    def tokens(self) -> int:
        """Tokens of all of them, rounded."""
        return round(sum(documents.tokens * factor for documents, factor in self.parts))

    def fractions(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Lengths [distinct], ascending, and how many documents have each."""
        merged = LengthHistogram.merged([documents for documents, _ in self.parts])
        counts = np.zeros(merged.lengths.size)
        for documents, factor in self.parts:
            counts[np.searchsorted(merged.lengths, documents.lengths)] += documents.counts * factor
        return merged.lengths, counts

    def whole(self, times: int = 1) -> LengthHistogram:
        """`times` as many in whole documents: the partial sums of `fractions`, rounded."""
        lengths, counts = self.fractions()
        rounded = round_keeping_sum(counts * times)
        return LengthHistogram(lengths=lengths[rounded > 0], counts=rounded[rounded > 0])


def expected_documents(
    sources: Sequence[LengthSource], weights: Sequence[float] | None, options: PackOptions
) -> TrainDocuments:
    """The lengths that the train split would hold, each source's distribution kept.

    Args:
        sources: at least one.
        weights: shares before normalisation; None takes everything once, or as much of everything as
            `train_tokens` says.
        options: of the pack.

    Raises:
        ValueError: a source is shorter than its share and may not be repeated, or too many tokens to count.
    """
    kept = _train_share(options)
    tokens = [source.documents.tokens * kept for source in sources]
    wanted = options.train_tokens
    if weights is not None:
        factors = _share_factors(sources, weights, options)
    elif wanted is None:
        factors = [Fraction(1)] * len(sources)
    else:
        factors = [wanted / sum(tokens, Fraction(0))] * len(sources)
    for source, factor, there in zip(sources, factors, tokens, strict=True):
        if factor > 1 and not options.allow_repeats:
            raise ValueError(
                f"source {source.name} should give about {int(factor * there):,} train tokens but about "
                f"{int(there):,} are there: lower --train-tokens or its weight, add data, or repeat "
                "documents with --allow-repeats"
            )
    taken = [factor * kept for factor in factors]
    whole = sum(factor * source.documents.tokens for source, factor in zip(sources, taken, strict=True))
    require_countable(whole, "the train split")
    return TrainDocuments(
        parts=[(source.documents, float(factor)) for source, factor in zip(sources, taken, strict=True)],
        is_certain=all(factor == 1 for factor in taken) and all(source.is_complete for source in sources),
    )


def _train_share(options: PackOptions) -> Fraction:
    """Which part of every source is there to choose from, in expectation."""
    slices = 1 if options.corpus_slice is None else CorpusSlice.parse(options.corpus_slice).slices
    return (1 - Fraction(options.validation_fraction)) / slices


def _share_factors(
    sources: Sequence[LengthSource], weights: Sequence[float], options: PackOptions
) -> list[Fraction]:
    """How often the train documents of each source are taken, so that the shares are as the weights say."""
    kept = _train_share(options)
    whole = sum((Fraction(weight) for weight in weights), Fraction(0))
    shares = [Fraction(weight) / whole for weight in weights]
    by_tokens = options.weight_unit == "tokens"
    there = [kept * (s.documents.tokens if by_tokens else s.documents.documents) for s in sources]
    if options.train_tokens is None:
        wanted = min(amount / share for amount, share in zip(there, shares, strict=True))
    elif by_tokens:
        wanted = Fraction(options.train_tokens)
    else:  # so many documents as hold train_tokens at each source's mean length
        means = [Fraction(s.documents.tokens, s.documents.documents) for s in sources]
        wanted = options.train_tokens / sum(
            (share * mean for share, mean in zip(shares, means, strict=True)), Fraction(0)
        )
    return [wanted * share / amount for share, amount in zip(shares, there, strict=True)]


def forecast_expected(documents: TrainDocuments, options: PackOptions) -> Forecast:
    """Forecast the pack of these documents in a random order.

    Args:
        documents: of the train split.
        options: row length, policy and mask.

    Raises:
        TooFewTokensError: they do not fill one row.
    """
    is_concat = options.policy == "concat"
    too_few = TooFewTokensError(
        f"about {documents.tokens:,} train tokens do not fill one row of {options.row_tokens:,} (and the "
        "label of its last input): choose smaller --row-tokens, more --train-tokens or more data"
    )
    if documents.tokens < options.row_tokens + is_concat:  # before arrays as long as a row are made
        raise too_few
    found = (_forecast_concat if is_concat else _forecast_best_fit)(documents, options)
    if found.rows == 0:  # fractions of documents were rounded down
        raise too_few
    return found


def _forecast_concat(documents: TrainDocuments, options: PackOptions) -> Forecast:
    lengths, times = documents.fractions()
    found = expected_concat(
        lengths,
        times,
        options.row_tokens,
        mask_cross_document_targets=options.mask_cross_document_targets,
    )
    return Forecast(
        is_exact=False,
        documents=round(times.sum()),
        rows=found.rows,
        segments=round(float(found.segments.sum())),
        tokens=found.rows * options.row_tokens,
        padding_tokens=0,
        left_out_tokens=found.left_out_tokens,
        cut_documents=round(found.cut_documents),
        tokens_after_cut=round(found.tokens_after_cut),
        counts=round_keeping_sum(found.counts),
    )


def _forecast_best_fit(documents: TrainDocuments, options: PackOptions) -> Forecast:
    """Plan over the histogram.

    An expectation has fractions of documents, and rounding them would lose the longest: then many such
    corpora are planned as one, at no cost, and every number is divided by how many they were.
    """
    size = options.row_tokens
    _, expected = documents.fractions()
    most = MAX_CORPUS_TOKENS // max(1, documents.tokens)
    refined = min(most, round(REFINED_DOCUMENTS / max(1, expected.sum())))
    times = 1 if documents.is_certain else max(1, refined)
    planned = documents.whole(times)
    lengths, counts = planned.lengths, planned.counts
    full_rows, remainder = lengths // size, lengths % size
    segments = np.zeros(size + 1, dtype=np.int64)
    np.add.at(segments, remainder, counts)
    segments[0] = 0
    rows = sum(number for _, number in best_fit_patterns(segments, size)) + int(full_rows @ counts)
    segments[size] += int(full_rows @ counts)
    is_long = lengths > size
    continuing = np.zeros(size + 1, dtype=np.int64)
    continuing[size] = ((full_rows - (remainder == 0)) * counts)[is_long].sum()
    number = int(segments.sum())
    targets = counts_from_histogram(
        segments,
        continuing=continuing,
        boundary_targets=0 if options.mask_cross_document_targets else number - rows,
    )
    tokens = documents.tokens
    rows = max(round(rows / times), -(-tokens // size))
    return Forecast(
        is_exact=documents.is_certain,
        documents=round(planned.documents / times),
        rows=rows,
        segments=round(number / times),
        tokens=tokens,
        padding_tokens=rows * size - tokens,
        left_out_tokens=0,
        cut_documents=round(int(counts[is_long].sum()) / times),
        tokens_after_cut=round(int((lengths - size)[is_long] @ counts[is_long]) / times),
        counts=targets if times == 1 else round_keeping_sum(targets / times),
    )
