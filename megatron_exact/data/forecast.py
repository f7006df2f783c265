"""Forecast packs and their exposure from document lengths, without writing anything.

There are two kinds of forecast. An **exact** one plans as `pack_corpora` does, with its choice, order and
split, so every number is that of the pack; it needs the corpora's indices and as much time as planning. An
**expected** one needs only a histogram of lengths: the choice of documents keeps each source's distribution
of lengths, `best-fit` is planned over the histogram (its counts do not depend on the order), and `concat`
is `exposure.buckets.expected_concat`.

`forecast_grid` makes either kind for every row length, policy and mix of one set of sources. The choice of
documents depends on neither row length nor policy, so it is made once for each mix: their lengths are kept
in order, 4 bytes per document, and every row length of `concat` is cut from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.blend import CorpusSlice, IndexedDocuments, hold_out, weighted_amounts
from megatron_exact.data.document_pool import ChosenDocuments, DocumentPool
from megatron_exact.data.lengths import (
    MAX_CORPUS_TOKENS,
    SAMPLE_SUFFIXES,
    LengthHistogram,
    is_length_file,
    read_index_lengths,
    read_length_file,
    require_countable,
    round_keeping_sum,
)
from megatron_exact.data.pack import PackOptions, choose_split
from megatron_exact.data.plan import BestFitPlan, ConcatPlan, Plan, PlanMeasure, best_fit_patterns
from megatron_exact.data.shards import Corpus, open_corpus, parts_of
from megatron_exact.data.sources import (
    DocumentLengths,
    describe_sources,
    load_pool,
    named_parts,
    open_sources,
    parse_sources,
    require_distinct_files,
    require_weights_for_unit,
)
from megatron_exact.exposure.buckets import expected_concat
from megatron_exact.files import sha256_file

Mix = tuple[float, ...]
REFINED_DOCUMENTS = 10**8  # over which best-fit plans an expectation, see _forecast_best_fit


class TooFewTokensError(ValueError):
    """Raised when the train split does not fill one row."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The train split of one pack that was not made."""

    is_exact: bool
    """Whether each number is that of the pack; otherwise it is a rounded expectation."""
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
    """Tokens of chosen documents that are not in any row."""
    cut_documents: int
    """Documents of more than one segment."""
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
    """A source of which only the lengths are known."""

    name: str
    """Name of the source, for messages."""
    documents: LengthHistogram
    """Lengths of its documents."""
    is_complete: bool = True
    """Whether these are its real documents; False for a scaled sample."""


@dataclass(frozen=True, kw_only=True)
class TrainDocuments:
    """Documents of a train split, known or expected."""

    parts: Sequence[tuple[LengthHistogram, float]]
    """Histograms, and how often each of them is taken."""
    is_certain: bool
    """Whether these are the documents; otherwise an expectation with fractions of documents."""

    @classmethod
    def known(cls, documents: LengthHistogram) -> TrainDocuments:
        """Make a split of exactly these documents."""
        return cls(parts=[(documents, 1)], is_certain=True)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, rounded."""
        return round(sum(documents.tokens * factor for documents, factor in self.parts))

    def fractions(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return lengths [distinct], ascending, and the number of documents of each."""
        merged = LengthHistogram.merged([documents for documents, _ in self.parts])
        counts = np.zeros(merged.lengths.size)
        for documents, factor in self.parts:
            counts[np.searchsorted(merged.lengths, documents.lengths)] += documents.counts * factor
        return merged.lengths, counts

    def whole(self, times: int = 1) -> LengthHistogram:
        """Return `times` as many documents in whole numbers: rounded partial sums of `fractions`."""
        lengths, counts = self.fractions()
        rounded = round_keeping_sum(counts * times)
        return LengthHistogram(lengths=lengths[rounded > 0], counts=rounded[rounded > 0])


def expected_documents(
    sources: Sequence[LengthSource], weights: Sequence[float] | None, options: PackOptions
) -> TrainDocuments:
    """Return the lengths that the train split would contain, with each source's distribution.

    Args:
        sources: at least one source.
        weights: shares before normalization; None takes everything once, or the fraction of everything that
            `train_tokens` asks for.
        options: options of the pack.

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
    """Return the expected part of every source that is available for training."""
    slices = 1 if options.corpus_slice is None else CorpusSlice.parse(options.corpus_slice).slices
    return (1 - Fraction(options.validation_fraction)) / slices


def _share_factors(
    sources: Sequence[LengthSource], weights: Sequence[float], options: PackOptions
) -> list[Fraction]:
    """Return how often each source's train documents are taken to give the shares of the weights."""
    kept = _train_share(options)
    tokens = [kept * source.documents.tokens for source in sources]
    documents = [kept * source.documents.documents for source in sources]
    wanted = weighted_amounts(weights, tokens, documents, options.train_tokens, options.weight_unit)
    there = tokens if options.weight_unit == "tokens" else documents
    return [amount / available for amount, available in zip(wanted, there, strict=True)]


def forecast_expected(documents: TrainDocuments, options: PackOptions) -> Forecast:
    """Forecast the pack of these documents in a random order.

    Args:
        documents: documents of the train split.
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

    An expectation has fractions of documents, and rounding them would lose the longest ones. So many such
    corpora are planned as one, at no cost, and every number is divided by their number.
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
    measure = PlanMeasure(row_tokens=size, rows=rows, segments=number)
    measure.segment_histogram, measure.continuing_histogram = segments, continuing
    targets = measure.counts(
        policy=options.policy, mask_cross_document_targets=options.mask_cross_document_targets
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


@dataclass(frozen=True, kw_only=True)
class IndexAlone:
    """A corpus of which only the `.idx` exists: choice, split, order and plan depend on nothing else."""

    prefix: Path
    """Path of the `.idx`."""
    document_tokens: NDArray[np.integer]
    """int32 or int64 [documents], tokens of each."""
    idx_sha256: str
    """Hex sha256 of the file."""

    @classmethod
    def read(cls, path: Path) -> IndexAlone:
        """Read and hash an index."""
        return cls(prefix=path, document_tokens=read_index_lengths(path), idx_sha256=sha256_file(path))

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.document_tokens.size)

    num_documents = documents

    def release(self) -> None:
        """Do nothing: the lengths stay mapped as long as they are used."""


def _open_corpora(paths: Sequence[Path]) -> tuple[list[IndexedDocuments], DocumentPool]:
    """Open and check corpora as packing does; indices are hashed, for the validation split needs that.

    Args:
        paths: prefixes, folders of shards, or an `.idx` in place of its corpus.

    Returns:
        What the validation split of each depends on, and the lengths of all documents.

    Raises:
        ValueError, FileNotFoundError: sources that cannot be packed.
    """
    corpora, parts = open_sources([path for path in paths if not is_length_file(path)])
    _require_distinct(corpora, [path for path in paths if is_length_file(path)])
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
    return sources, load_pool(lengths)


def _require_distinct(corpora: Sequence[Corpus], indices: Sequence[Path]) -> None:
    """Check that no file is in two sources, also where an `.idx` stands for its corpus.

    Raises:
        ValueError: a file occurs twice; names the two sources.
    """
    files: list[tuple[str, Sequence[Path]]] = [
        (name, (part.idx_path, part.bin_path)) for name, part in named_parts(corpora)
    ]
    require_distinct_files(files + [(f"source {path}", (path,)) for path in indices])


def _lengths_in_order(chosen: ChosenDocuments) -> NDArray[np.integer]:
    """Return the lengths of chosen documents in packing order, int32 or int64 [documents]."""
    lengths = np.empty(len(chosen), dtype=chosen.pool.tokens.dtype)
    done = 0
    for _, tokens, _ in chosen.in_order():
        lengths[done : done + tokens.size] = tokens
        done += tokens.size
    return lengths


def _forecast_plan(plan: Plan, documents: int, options: PackOptions) -> Forecast:
    measure = PlanMeasure(row_tokens=options.row_tokens)
    cut_documents = tokens_after_cut = 0
    for block in plan.blocks():
        measure.add(block)
        cut_documents += int(np.count_nonzero(block.continues & (block.start == 0)))
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


@dataclass(frozen=True, kw_only=True)
class GridSource:
    """One source of a grid."""

    path: Path
    """Path as the user gave it, without weight."""
    lengths: LengthSource | None
    """Histogram of a file of lengths; None for a corpus or its `.idx`, opened when it is needed."""


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """The forecast of one pack."""

    row_tokens: int
    """Inputs of a row."""
    policy: str
    """`concat` or `best-fit`."""
    mix: Mix | None
    """Token share of each source before normalization; None when everything is taken once."""
    forecast: Forecast
    """Numbers of the pack."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with shares: of documents for cuts, of inputs for padding and tokens."""
        found = self.forecast
        inputs = found.tokens + found.padding_tokens
        return {
            "row_tokens": self.row_tokens,
            "policy": self.policy,
            "mix": None if self.mix is None else list(self.mix),
            "exact": found.is_exact,
            "documents": found.documents,
            "rows": found.rows,
            "segments": found.segments,
            "tokens": found.tokens,
            "padding_tokens": found.padding_tokens,
            "padding_share": found.padding_tokens / inputs,
            "left_out_tokens": found.left_out_tokens,
            "cut_documents": found.cut_documents,
            "cut_documents_share": found.cut_documents / found.documents,
            "tokens_after_cut": found.tokens_after_cut,
            "tokens_after_cut_share": found.tokens_after_cut / found.tokens,
            "supervised_targets": found.supervised_targets,
            "counts": found.counts.tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class SkippedCell:
    """A pack that cannot be made."""

    row_tokens: int
    """Inputs of a row."""
    policy: str
    """`concat` or `best-fit`."""
    mix: Mix | None
    """Token shares as in GridCell."""
    reason: str
    """Why it cannot be made: the tokens that do not fill a row."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "mix": None if self.mix is None else list(self.mix)}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All forecasts of a grid."""

    cells: list[GridCell]
    """Forecasts, at least one, mix by mix."""
    skipped: list[SkippedCell]
    """Packs that cannot be made."""


def read_sources(
    texts: Sequence[str], sample_of: Sequence[int] = ()
) -> tuple[list[GridSource], Mix | None]:
    """Name the sources and read files of lengths.

    Args:
        texts: `[WEIGHT:]` and a prefix, a folder of shards or a file of lengths, each.
        sample_of: number of documents that each sample represents: one number for all, or one each.

    Returns:
        The sources, and their weights if they have any.

    Raises:
        ValueError, FileNotFoundError: a source that cannot be read, or numbers that do not fit.
    """
    weights, paths = parse_sources(texts)
    samples = [path for path in paths if is_length_file(path) and path.suffix in SAMPLE_SUFFIXES]
    if sample_of and len(sample_of) not in (1, len(samples)):
        raise ValueError(
            f"--sample-of-documents has {len(sample_of)} numbers for {len(samples)} samples "
            f"({' or '.join(SAMPLE_SUFFIXES)}): give one for all, or one each"
        )
    if sample_of and not samples:
        raise ValueError("--sample-of-documents needs a sample (.npy or .txt) among the sources")
    totals = dict(zip(samples, itertools.cycle(sample_of), strict=False))
    sources = [
        # A corpus, or its index alone, gives the length of each document, as packing needs it
        GridSource(
            path=path,
            lengths=_read_lengths(path, totals.get(path))
            if is_length_file(path) and path.suffix != ".idx"
            else None,
        )
        for path in paths
    ]
    mix = tuple(weight for weight in weights if weight is not None)
    return sources, mix or None


def _read_lengths(path: Path, total: int | None) -> LengthSource:
    documents = read_length_file(path)
    if total is not None:
        tokens = Fraction(documents.tokens * total, documents.documents)
        require_countable(tokens, f"{path} scaled to {total} documents")
        documents = documents.scaled(Fraction(total, documents.documents))
    return LengthSource(name=str(path), documents=documents, is_complete=total is None)


def parse_mix(text: str, num_sources: int) -> Mix:
    """Parse `6:24:32` as weights of the sources in their order.

    Raises:
        ValueError: not one number above 0 for each source.
    """
    try:
        mix = tuple(float(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f"--mix {text!r} is not a list of numbers such as 6:24:32") from None
    if len(mix) != num_sources:
        raise ValueError(f"--mix {text!r} has {len(mix)} weights for {num_sources} sources: give one each")
    if not all(math.isfinite(weight) and weight > 0 for weight in mix):
        raise ValueError(
            f"--mix {text!r}: every weight must be a number above 0; leave a source out instead"
        )
    return mix


def forecast_grid(
    sources: Sequence[GridSource],
    mixes: Sequence[Mix | None],
    packs: Sequence[PackOptions],
    *,
    expected: bool = False,
    on_cell: Callable[[int], object] = lambda count: None,
) -> Grid:
    """Forecast every pack of every mix, exactly unless `why_expected` gives a reason.

    Packs whose train split would not fill one row are left out and named.

    Args:
        sources: from `read_sources`.
        mixes: weights, or None to take everything once.
        packs: options, the same but for row length and policy.
        expected: do not plan document by document, whatever the sources.
        on_cell: called with 1 after each forecast.

    Raises:
        ValueError: options that are not valid for packing, or no pack that fills a row.
    """
    for mix in mixes:
        require_weights_for_unit(mix or [None], packs[0].weight_unit)
    is_exact = why_expected(sources, expected) is None
    cells: list[GridCell] = []
    skipped: list[SkippedCell] = []
    for mix, forecast in _exact(sources, mixes, packs) if is_exact else _expected(sources, mixes, packs):
        for pack in packs:
            place: dict[str, Any] = {"row_tokens": pack.row_tokens, "policy": pack.policy, "mix": mix}
            try:
                cells.append(GridCell(**place, forecast=forecast(pack)))
            except TooFewTokensError as error:
                skipped.append(SkippedCell(**place, reason=str(error)))
            on_cell(1)
    if not cells:
        raise ValueError(skipped[0].reason)
    return Grid(cells=cells, skipped=skipped)


def why_expected(sources: Sequence[GridSource], expected: bool) -> str | None:
    """Return why a grid is an expectation and what would make it exact; None where it is exact."""
    if expected:
        return "--expected is given: without it every number is the pack's own"
    unordered = [str(source.path) for source in sources if source.lengths is not None]
    if not unordered:
        return None
    return (
        f"{', '.join(unordered)}: lengths without their documents' order; a corpus or its .idx alone "
        "makes every number the pack's own"
    )


def _exact(
    sources: Sequence[GridSource], mixes: Sequence[Mix | None], packs: Sequence[PackOptions]
) -> Iterator[tuple[Mix | None, Callable[[PackOptions], Forecast]]]:
    options = packs[0]  # neither row length nor policy matters to the choice
    opened, pool = _open_corpora([source.path for source in sources])
    names = [str(source.path) for source in sources]
    held_out = hold_out(opened, pool, options.validation_fraction, seed=options.seed)
    for mix in mixes:
        weights = [None] * len(opened) if mix is None else list(mix)
        chosen, _ = choose_split("train", pool, opened, names, weights, held_out, options)
        lengths = _lengths_in_order(chosen)
        documents = TrainDocuments.known(LengthHistogram.of(lengths))  # best-fit depends on nothing else
        yield mix, partial(_forecast_exact, chosen, lengths, documents)


def _forecast_exact(
    chosen: ChosenDocuments, lengths: NDArray[np.integer], documents: TrainDocuments, pack: PackOptions
) -> Forecast:
    if pack.policy == "best-fit" and chosen.passes is not None and documents.tokens >= pack.row_tokens:
        # With repeats, the rounds in which copies are packed matter
        repeats = BestFitPlan(chosen, pack.row_tokens, seed=pack.seed, split="train")
        return _forecast_plan(repeats, len(chosen), pack)
    if pack.policy == "best-fit" or documents.tokens <= pack.row_tokens:  # too few: it says so
        return forecast_expected(documents, pack)
    pool = DocumentPool(tokens=lengths, first=np.array([0, lengths.size]))
    stream = ConcatPlan(ChosenDocuments(pool=pool, numbers=None, key=None), pack.row_tokens)
    return _forecast_plan(stream, lengths.size, pack)


def _expected(
    sources: Sequence[GridSource], mixes: Sequence[Mix | None], packs: Sequence[PackOptions]
) -> Iterator[tuple[Mix | None, Callable[[PackOptions], Forecast]]]:
    paths = [source.path for source in sources if source.lengths is None]
    corpora = [open_corpus(path) for path in paths if not is_length_file(path)]
    _require_distinct(corpora, [path for path in paths if is_length_file(path)])
    lengths = [source.lengths or _corpus_lengths(source.path) for source in sources]
    for mix in mixes:
        documents = expected_documents(lengths, mix, packs[0])
        yield mix, partial(forecast_expected, documents)


def _corpus_lengths(path: Path) -> LengthSource:
    """Count the documents of a corpus, one shard after the other, or of its `.idx` alone."""
    if is_length_file(path):
        return _read_lengths(path, None)
    histograms = []
    corpus = open_corpus(path)
    for part in parts_of(corpus):
        lengths = part.document_tokens
        histograms.append(LengthHistogram.of(lengths[lengths > 0]))
        part.release()
    documents = LengthHistogram.merged(histograms)
    if not documents.documents:
        raise ValueError(f"{path} has no document with a token: tokenize a corpus that has some")
    return LengthSource(name=str(path), documents=documents)
