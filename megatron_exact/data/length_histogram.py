"""Document lengths as a histogram of distinct lengths: all that planning and its forecasts need to know.

A corpus of a billion documents has a few hundred thousand distinct lengths, so a histogram is megabytes
where the lengths are gigabytes. Rescaling keeps its shape: counts are rounded cumulatively from the
shortest document on, so that even lengths which occur less than once on average are still represented.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK_DOCUMENTS = 1 << 22
DENSE_TOKENS = 1 << 20  # lengths below are counted in one array, longer ones by sorting
QUANTILES = (0.1, 0.5, 0.9, 0.99)
MAX_CORPUS_TOKENS = 1 << 60  # sums of lengths x counts stay in 64 bits


def round_keeping_sum(values: ArrayLike) -> NDArray[np.int64]:
    """Whole numbers near `values` [n] whose partial sums are those of `values`, rounded."""
    reached = np.floor(np.cumsum(np.asarray(values, dtype=np.float64)) + 0.5).astype(np.int64)
    return np.asarray(np.diff(reached, prepend=0), dtype=np.int64)


def require_countable(tokens: float | Fraction, what: str) -> None:
    """Refuse more tokens than sums in 64 bits hold; no corpus comes near.

    Raises:
        ValueError: `what` has them.
    """
    if tokens > MAX_CORPUS_TOKENS:
        about = float(min(tokens, 10**300))
        raise ValueError(f"{what}: about {about:.1e} tokens are more than the 2^60 that can be counted")


@dataclass(frozen=True, kw_only=True)
class LengthHistogram:
    """How many documents (or segments) have each length."""

    lengths: NDArray[np.int64]
    """[distinct], tokens, ascending, each at least 1."""
    counts: NDArray[np.int64]
    """[distinct], each at least 1."""

    @classmethod
    def of(cls, lengths: ArrayLike) -> LengthHistogram:
        """Count lengths, in chunks.

        Args:
            lengths: integers [documents], at least 1 each; may be memory-mapped.

        Raises:
            ValueError: a length below 1.
        """
        array = np.asarray(lengths)
        return cls.of_chunks(
            array[start : start + CHUNK_DOCUMENTS] for start in range(0, array.size, CHUNK_DOCUMENTS)
        )

    @classmethod
    def of_chunks(cls, chunks: Iterable[NDArray[np.integer]]) -> LengthHistogram:
        """The same from pieces of the whole; memory depends on the distinct lengths only."""
        dense = np.zeros(0, dtype=np.int64)
        sparse = cls.empty()
        for chunk in chunks:
            if not chunk.size:
                continue
            if chunk.min() < 1:
                raise ValueError(f"a length of {chunk.min()}: every document needs at least one token")
            is_long = chunk >= DENSE_TOKENS
            if is_long.any():
                sparse = cls.merged([sparse, cls._sorted(chunk[is_long])])
                chunk = chunk[~is_long]
            found = np.bincount(chunk, minlength=dense.size)
            found[: dense.size] += dense
            dense = found
        return cls.merged([cls.of_dense(dense), sparse])

    @classmethod
    def of_dense(cls, histogram: ArrayLike) -> LengthHistogram:
        """From an array whose entry k counts length k."""
        dense = np.asarray(histogram, dtype=np.int64)
        lengths = np.flatnonzero(dense)
        return cls(lengths=lengths, counts=dense[lengths])

    @classmethod
    def empty(cls) -> LengthHistogram:
        """Of no document."""
        return cls(lengths=np.zeros(0, np.int64), counts=np.zeros(0, np.int64))

    @classmethod
    def merged(cls, parts: Sequence[LengthHistogram]) -> LengthHistogram:
        """All documents of several histograms."""
        lengths = np.concatenate([part.lengths for part in parts])
        distinct, place = np.unique(lengths, return_inverse=True)
        counts = np.zeros(distinct.size, dtype=np.int64)
        np.add.at(counts, place, np.concatenate([part.counts for part in parts]))
        return cls(lengths=distinct, counts=counts)

    @classmethod
    def _sorted(cls, lengths: NDArray[np.integer]) -> LengthHistogram:
        distinct, counts = np.unique(lengths.astype(np.int64), return_counts=True)
        return cls(lengths=distinct, counts=counts)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return int(self.lengths @ self.counts)

    @property
    def longest(self) -> int:
        """The greatest length, 0 without documents."""
        return int(self.lengths[-1]) if self.lengths.size else 0

    def scaled(self, factor: Fraction) -> LengthHistogram:
        """Documents times `factor`, at every length as nearly as whole documents allow."""
        if factor == 1:
            return self
        counts = round_keeping_sum(self.counts * float(factor))
        return LengthHistogram(lengths=self.lengths[counts > 0], counts=counts[counts > 0])

    def quantile(self, fraction: float) -> int:
        """The smallest length that at least `fraction` of the documents do not exceed."""
        reached = np.cumsum(self.counts)
        return int(self.lengths[np.searchsorted(reached, fraction * reached[-1])])

    def summary(self) -> dict[str, Any]:
        """Numbers for a report.

        Returns:
            {`documents`, `tokens`, `mean`, `quantiles` {`p10`, `p50`, `p90`, `p99`, `max`}, `bins`
            [{`lower`, `documents`, `tokens`}]}, the bins from powers of two; quantiles and mean are None
            without documents.
        """
        exponents = np.log2(self.lengths).astype(np.int64)  # exact below 2^48
        documents = np.bincount(exponents, weights=self.counts)
        tokens = np.bincount(exponents, weights=self.lengths * self.counts)
        names = [f"p{round(fraction * 100)}" for fraction in QUANTILES]
        some = self.documents > 0
        quantiles = {
            name: self.quantile(fraction) if some else None
            for name, fraction in zip(names, QUANTILES, strict=True)
        }
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "mean": self.tokens / self.documents if some else None,
            "quantiles": {**quantiles, "max": self.longest if some else None},
            "bins": [
                {"lower": 1 << exponent, "documents": int(documents[exponent]), "tokens": int(total)}
                for exponent, total in enumerate(tokens)
            ],
        }
