"""A grid of what-ifs: every row length x policy x mix of one set of sources.

Packs whose train split would not fill one row are left out of it and named.
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

from megatron_exact.data.forecast import (
    Forecast,
    LengthSource,
    TooFewTokensError,
    TrainDocuments,
    expected_documents,
    forecast_expected,
)
from megatron_exact.data.forecast_exact import (
    choose_train,
    forecast_repeats,
    forecast_stream,
    lengths_in_order,
    open_corpora,
    require_distinct,
)
from megatron_exact.data.length_files import SAMPLE_SUFFIXES, is_length_file, read_length_file
from megatron_exact.data.length_histogram import LengthHistogram, require_countable
from megatron_exact.data.pack import PackOptions
from megatron_exact.data.plan import ChosenDocuments
from megatron_exact.data.shards import open_corpus, parts_of
from megatron_exact.data.sources import parse_sources, require_weights_for_unit

Mix = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class GridSource:
    """One source of a grid."""

    path: Path
    """As the user wrote it, without weight."""
    lengths: LengthSource | None
    """Histogram of a file of lengths; None for a corpus or its `.idx`, opened when it is needed."""


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """One pack that was not made."""

    row_tokens: int
    """Inputs of a row."""
    policy: str
    """`concat` or `best-fit`."""
    mix: Mix | None
    """Token share of each source before normalisation; None when everything is taken once."""
    forecast: Forecast
    """What it would be."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, shares added: of documents for cuts, of inputs for padding and tokens."""
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
    """One pack that could not be made."""

    row_tokens: int
    """Inputs of a row."""
    policy: str
    """`concat` or `best-fit`."""
    mix: Mix | None
    """As in GridCell."""
    reason: str
    """How many tokens do not fill a row."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "mix": None if self.mix is None else list(self.mix)}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that was asked for."""

    cells: list[GridCell]
    """At least one, mix by mix."""
    skipped: list[SkippedCell]
    """The others."""


def read_sources(
    texts: Sequence[str], sample_of: Sequence[int] = ()
) -> tuple[list[GridSource], Mix | None]:
    """Name the sources and read files of lengths.

    Args:
        texts: `[WEIGHT:]` and a prefix, a folder of shards or a file of lengths, each.
        sample_of: how many documents the samples stand for: one number for all, or one each.

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
        raise ValueError("--sample-of-documents needs a sample (.npy or .txt): no source is one")
    totals = dict(zip(samples, itertools.cycle(sample_of), strict=False))
    sources = [
        GridSource(path=path, lengths=None if _has_order(path) else _read_lengths(path, totals.get(path)))
        for path in paths
    ]
    mix = tuple(weight for weight in weights if weight is not None)
    return sources, mix or None


def _has_order(path: Path) -> bool:
    """Whether it tells which document has which length, and with that what packing would do."""
    return path.suffix == ".idx" or not is_length_file(path)


def _read_lengths(path: Path, total: int | None) -> LengthSource:
    documents = read_length_file(path)
    if total is not None:
        tokens = Fraction(documents.tokens * total, documents.documents)
        require_countable(tokens, f"{path} scaled to {total} documents")
        documents = documents.scaled(Fraction(total, documents.documents))
    return LengthSource(name=str(path), documents=documents, is_complete=total is None)


def parse_mix(text: str, num_sources: int) -> Mix:
    """`6:24:32` as weights of the sources in their order.

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
    """Forecast every pack of every mix: exactly unless `why_expected` says why not.

    Args:
        sources: from `read_sources`.
        mixes: weights, or None to take everything once.
        packs: options, the same but for row length and policy.
        expected: do not plan document by document, whatever the sources.
        on_cell: called with 1 after each forecast.

    Raises:
        ValueError: packs that packing would refuse, or none that fills a row.
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
    """Why a grid is an expectation and what would make it exact; None where it is exact."""
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
    opened = open_corpora([source.path for source in sources])
    for mix in mixes:
        chosen = choose_train(opened, mix, packs[0])
        lengths = lengths_in_order(chosen)
        documents = TrainDocuments.known(LengthHistogram.of(lengths))  # all that best-fit depends on
        yield mix, partial(_forecast_exact, chosen, lengths, documents)


def _forecast_exact(
    chosen: ChosenDocuments, lengths: NDArray[np.integer], documents: TrainDocuments, pack: PackOptions
) -> Forecast:
    if pack.policy == "best-fit" and chosen.passes is not None and documents.tokens >= pack.row_tokens:
        return forecast_repeats(chosen, pack)
    if pack.policy == "best-fit" or documents.tokens <= pack.row_tokens:  # too few: it says so
        return forecast_expected(documents, pack)
    return forecast_stream(lengths, pack)


def _expected(
    sources: Sequence[GridSource], mixes: Sequence[Mix | None], packs: Sequence[PackOptions]
) -> Iterator[tuple[Mix | None, Callable[[PackOptions], Forecast]]]:
    paths = [source.path for source in sources if source.lengths is None]
    corpora = [open_corpus(path) for path in paths if not is_length_file(path)]
    require_distinct(corpora, [path for path in paths if is_length_file(path)])
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
