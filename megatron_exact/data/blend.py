"""Which documents a split reads: the validation split, slices, and the blend of weighted sources.

A document's hash depends on the pack's seed, on the content of the source's index and on the document's
number, not on paths, row length, policy or the other sources: two packs of one corpus with one seed and
fraction (a short stage and a long one) hold out the same documents. Slice I of N contains the training
documents whose second hash lies in the I-th of N equal ranges: slices of one seed are disjoint, whatever
the row lengths of the packs, and all hold out the same validation documents. A document without a token is
in no split.

Without weights every document is taken once. With weights each source gives documents, in its own shuffled
order, until its share of the tokens (or, with `weight_unit="documents"`, of the documents) is met: the last
document is taken only if that comes nearer to the share than leaving it, so a source misses its share by at
most half a document. All chosen documents are then shuffled together, which interleaves the sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.document_pool import (
    BLOCK_DOCUMENTS,
    ChosenDocuments,
    DocumentPool,
    NumbersWithGaps,
    Passes,
    number_dtype,
)
from megatron_exact.data.manifest import SourceUse
from megatron_exact.data.shuffle import KeyedPermutation, derive_key, random_bits

MAX_SLICES = 1 << 16
SLICE = re.compile(r"(\d{1,6})/(\d{1,6})")
TOP_BITS = 16  # of the hashes, for a first histogram
GAP_FACTOR = 16  # one document in so many, or fewer, may be missing from `NumbersWithGaps`
Numbers = NDArray[np.unsignedinteger] | NumbersWithGaps


class IndexedDocuments(Protocol):
    """What a source's validation split and slices depend on; a `Source`, or an `.idx` in a forecast."""

    @property
    def documents(self) -> int:
        """Number of documents."""

    @property
    def idx_sha256(self) -> str:
        """Hex sha256 of the `.idx`, or the joint hash of those of its shards."""


@dataclass(frozen=True, kw_only=True)
class CorpusSlice:
    """One of several disjoint parts of every source's training documents."""

    number: int
    """Number of the slice, from 1."""
    slices: int
    """Number of slices."""

    @classmethod
    def parse(cls, text: str) -> CorpusSlice:
        """Read `I/N`.

        Raises:
            ValueError: another format, or a slice that does not exist.
        """
        found = SLICE.fullmatch(text)
        number, slices = (int(part) for part in found.groups()) if found else (0, 0)
        if not 1 <= number <= slices <= MAX_SLICES:
            raise ValueError(
                f"--corpus-slice {text[:40]!r}: give I/N, the I-th of N parts, such as 2/3 (N at most "
                f"{MAX_SLICES})"
            )
        return cls(number=number, slices=slices)

    def __str__(self) -> str:
        return f"{self.number}/{self.slices}"

    def is_disjoint(self, other: CorpusSlice) -> bool:
        """Return whether two slices have no document in common; N may differ."""
        first, second = sorted(
            (Fraction(one.number - 1, one.slices), Fraction(one.number, one.slices))
            for one in (self, other)
        )
        return first[1] <= second[0]

    def holds(self, documents: NDArray[np.integer], *, seed: int, idx_sha256: str) -> NDArray[np.bool_]:
        """Return whether each document of a source, by its number, is in this slice.

        The upper 32 bits of a document's hash, as a fraction of 2^32, lie in [(I - 1) / N, I / N).

        Args:
            documents: [n], numbers inside the source.
            seed: seed of the pack.
            idx_sha256: hash of the source's `.idx`.
        """
        upper = random_bits(derive_key("corpus slice", seed, idx_sha256), documents) >> np.uint64(32)
        found: NDArray[np.uint64] = (upper * np.uint64(self.slices)) >> np.uint64(32)
        return np.equal(found, np.uint64(self.number - 1))


def hold_out(
    sources: Sequence[IndexedDocuments], pool: DocumentPool, fraction: float, *, seed: int
) -> list[NDArray[np.bool_]]:
    """Mark for each source, bool [documents], which documents are in the validation split."""
    held_out = []
    for index, source in enumerate(sources):
        is_empty = None
        if not all(lengths.all() for lengths in pool.lengths_of(index)):
            is_empty = np.concatenate([lengths == 0 for lengths in pool.lengths_of(index)])
        held_out.append(
            validation_documents(
                source.documents,
                fraction,
                seed=seed,
                idx_sha256=source.idx_sha256,
                is_empty=is_empty,
            )
        )
    return held_out


def validation_documents(
    num_documents: int,
    fraction: float,
    *,
    seed: int,
    idx_sha256: str,
    is_empty: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Mark the documents of one source that belong to the validation split.

    These are the `fraction * documents` documents with the smallest hashes (rounded; with a fraction above
    0 and two documents, at least one and never all). Memory: the result and two blocks of hashes.

    Args:
        num_documents: documents of the source.
        fraction: fraction in [0, 1).
        seed: seed of the pack.
        idx_sha256: hash of the source's `.idx`.
        is_empty: [documents], whether a document has no token and so does not count; None if all have some.

    Returns:
        bool [documents].
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction {fraction} is not in [0, 1)")
    marked = np.zeros(num_documents, dtype=np.bool_)
    candidates = num_documents if is_empty is None else num_documents - int(np.count_nonzero(is_empty))
    if fraction == 0 or candidates < 2:
        return marked
    held_out = min(max(1, int(fraction * candidates + 0.5)), candidates - 1)
    key = derive_key("validation split", seed, idx_sha256)
    threshold = _smallest_hashes(num_documents, held_out, key, is_empty)
    for first, hashes in _hashes(num_documents, key):
        np.less_equal(hashes, threshold, out=marked[first : first + hashes.size])
    return marked if is_empty is None else marked & ~is_empty


def _hashes(num_documents: int, key: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    for first in range(0, num_documents, BLOCK_DOCUMENTS):
        yield first, random_bits(key, np.arange(first, min(first + BLOCK_DOCUMENTS, num_documents)))


def _smallest_hashes(
    num_documents: int, count: int, key: int, is_empty: NDArray[np.bool_] | None
) -> np.uint64:
    """Return the `count`-th smallest hash.

    Hashes of distinct documents are distinct, so exactly `count` of them lie at or below it.
    """

    def candidates() -> Iterator[NDArray[np.uint64]]:
        for first, hashes in _hashes(num_documents, key):
            yield hashes if is_empty is None else hashes[~is_empty[first : first + hashes.size]]

    shift = np.uint64(64 - TOP_BITS)
    histogram = np.zeros(1 << TOP_BITS, dtype=np.int64)
    for hashes in candidates():
        histogram += np.bincount((hashes >> shift).astype(np.int64), minlength=histogram.size)
    below = np.cumsum(histogram)
    top = int(np.searchsorted(below, count))  # the threshold begins with these bits
    rank = count - 1 - int(below[top] - histogram[top])
    near = np.concatenate([hashes[hashes >> shift == top] for hashes in candidates()])
    return np.uint64(np.partition(near, rank)[rank])


@dataclass(frozen=True, kw_only=True)
class SourceDocuments:
    """The documents of one source that belong to one split."""

    name: str
    """Name of the source, for messages."""
    weight: float | None
    """Share before normalization; None when no source has one."""
    numbers: Numbers
    """[documents], their numbers in the pool, ascending."""
    tokens: int
    """Tokens of all these documents."""
    other_tokens: int = 0
    """Tokens of the source's documents of this split that are in other slices."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.numbers.size)


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """What one source gave: whole passes over it, and perhaps part of a last pass."""

    passes: list[Numbers]
    tokens: int

    @property
    def documents(self) -> int:
        return sum(part.size for part in self.passes)


def choose_documents(
    pool: DocumentPool,
    sources: Sequence[SourceDocuments],
    *,
    split: str,
    seed: int,
    target_tokens: int | None,
    allow_repeats: bool,
    weight_unit: str = "tokens",
) -> tuple[ChosenDocuments, tuple[SourceUse, ...]]:
    """Choose and order the documents of one split.

    Args:
        pool: pool of all sources.
        sources: sources in the manifest's order; all with a weight or all without.
        split: name of the split, part of the shuffle keys.
        seed: seed of the pack.
        target_tokens: total number of tokens; None means all of them, or as many as the scarcest weighted
            source allows.
        allow_repeats: start another pass over a source, in a new order, when its share is larger than it.
        weight_unit: one of `manifest.WEIGHT_UNITS`.

    Raises:
        ValueError: a source is shorter than its share and may not be repeated, or its share is so small
            that it would give nothing.
    """
    order = derive_key("document order", seed, split)
    if sources[0].weight is not None:
        taken = []
        amounts = weighted_amounts(
            [source.weight or 0 for source in sources],
            [source.tokens for source in sources],
            [source.documents for source in sources],
            target_tokens,
            weight_unit,
        )
        for index, (source, amount) in enumerate(zip(sources, amounts, strict=True)):
            key: tuple[str | int, ...] = ("documents of a source", seed, split, index)
            name = f"source {source.name} of weight {source.weight:g}"
            knobs = "--train-tokens or the weight"
            taken.append(_take(pool, source, int(amount), key, allow_repeats, name, knobs, weight_unit))
    elif target_tokens is not None:
        numbers = np.concatenate([source.numbers for source in sources])
        names = ("the sources " if len(sources) > 1 else "source ") + ", ".join(s.name for s in sources)
        whole = SourceDocuments(
            name=names,
            weight=None,
            numbers=numbers,
            tokens=sum(source.tokens for source in sources),
            other_tokens=sum(source.other_tokens for source in sources),
        )
        key = ("documents of all sources", seed, split)
        together = _take(pool, whole, target_tokens, key, allow_repeats, names, "--train-tokens")
        return _chosen(pool, [together], order), _split_uses(pool, sources, together)
    elif sum(source.documents for source in sources) == len(pool):
        everything = ChosenDocuments(pool=pool, numbers=None, key=order)
        return everything, tuple(_use(source, source.documents, source.tokens, 0) for source in sources)
    else:
        taken = [_Taken(passes=[source.numbers], tokens=source.tokens) for source in sources]
    uses = []
    for source, one in zip(sources, taken, strict=True):
        # Every pass but the last is whole
        repeated = one.tokens - source.tokens if len(one.passes) > 1 else 0
        uses.append(_use(source, one.documents, one.tokens, repeated))
    return _chosen(pool, taken, order), tuple(uses)


def weighted_amounts(
    weights: Sequence[float],
    tokens: Sequence[int | Fraction],
    documents: Sequence[int | Fraction],
    target_tokens: int | None,
    weight_unit: str,
) -> list[Fraction]:
    """Return how many tokens, or documents, each source should give, as exact fractions.

    Args:
        weights: shares before normalization.
        tokens: tokens of each source.
        documents: documents of each source.
        target_tokens: total number of tokens; None means as many as the scarcest source allows.
        weight_unit: one of `manifest.WEIGHT_UNITS`.
    """
    whole = sum(map(Fraction, weights), Fraction(0))
    shares = [Fraction(weight) / whole for weight in weights]
    available = tokens if weight_unit == "tokens" else documents
    if target_tokens is None:
        wanted = min(amount / share for amount, share in zip(available, shares, strict=True))
    elif weight_unit == "tokens":
        wanted = Fraction(target_tokens)
    else:  # as many documents as contain target_tokens at each source's mean length
        means = [Fraction(size, count or 1) for size, count in zip(tokens, documents, strict=True)]
        mean = sum((share * mean for share, mean in zip(shares, means, strict=True)), Fraction(0))
        wanted = target_tokens / mean if mean else Fraction(target_tokens)
    return [wanted * share for share in shares]


def _take(
    pool: DocumentPool,
    source: SourceDocuments,
    share: int,
    key: tuple[str | int, ...],
    allow_repeats: bool,
    name: str,
    knobs: str,
    unit: str = "tokens",
) -> _Taken:
    """Take documents in shuffled order until they come nearest to `share` tokens or documents, at least
    one.

    Each pass over all documents has its own order; only the last pass may be partial.
    """
    total = source.tokens if unit == "tokens" else source.documents
    if share > total and (not allow_repeats or total == 0):
        slices = "use fewer slices, " if source.other_tokens else ""
        raise ValueError(
            f"{name} should give {share} train {unit} but {total} are there: lower {knobs}, add data, "
            f"{slices}or repeat documents with --allow-repeats"
        )
    passes: list[Numbers] = []
    tokens, missing = 0, share
    while missing > 0:
        if missing >= total:
            part, part_tokens = source.numbers, source.tokens
        else:
            pass_key = derive_key(*key, len(passes))
            part, part_tokens = _take_part(pool, source, missing, pass_key, unit)
        if part.size:
            passes.append(part)
        tokens += part_tokens
        missing -= total
    if not passes:
        raise ValueError(
            f"{name} should give {share} train {unit}, less than half of the document that would be its "
            f"first: it would give nothing; raise {knobs}, or leave the source out"
        )
    return _Taken(passes=passes, tokens=tokens)


def _take_part(
    pool: DocumentPool, source: SourceDocuments, missing: int, key: int, unit: str
) -> tuple[Numbers, int]:
    """The beginning of a shuffled pass that comes nearest to `missing`; (numbers, their tokens)."""
    parts: list[Numbers] = []
    tokens = reached = 0  # reached: in the unit
    for positions in KeyedPermutation(source.documents, key).blocks(BLOCK_DOCUMENTS):
        numbers = source.numbers[positions]
        lengths = pool.tokens[numbers].astype(np.int64)
        amounts = reached + np.cumsum(lengths if unit == "tokens" else np.ones_like(lengths))
        if amounts[-1] >= missing:
            count = _nearest_count(amounts, reached, missing)
            parts.append(numbers[:count])
            return _join(parts), tokens + int(lengths[:count].sum())
        parts.append(numbers)
        tokens += int(lengths.sum())
        reached = int(amounts[-1])
    raise AssertionError("the caller asks for less than the source has")


def _nearest_count(amounts: NDArray[np.int64], before_all: int, missing: int) -> int:
    """Return how many documents come nearest to `missing`; the larger number in a tie.

    Args:
        amounts: [documents], amount of the first 1, 2, ... documents; the last is not below `missing`.
        before_all: amount before the first document.
        missing: amount to reach, above `before_all`.
    """
    below = int(np.searchsorted(amounts, missing))
    before = int(amounts[below - 1]) if below else before_all
    return below + 1 if int(amounts[below]) - missing <= missing - before else below


def _chosen(pool: DocumentPool, taken: Sequence[_Taken], order: int) -> ChosenDocuments:
    """Join what the sources gave, in a shuffled order."""
    parts = [part for one in taken for part in one.passes]
    passes = None
    if any(len(one.passes) > 1 for one in taken):
        passes = Passes(
            ends=np.cumsum([part.size for part in parts]),
            number=np.concatenate([np.arange(len(one.passes)) for one in taken]),
        )
    return ChosenDocuments(pool=pool, numbers=_join(parts), key=order, passes=passes)


def _join(parts: Sequence[Numbers]) -> Numbers:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _use(source: SourceDocuments, documents: int, tokens: int, repeated: int) -> SourceUse:
    return SourceUse(
        documents=documents,
        tokens=tokens,
        repeated_tokens=repeated,
        unused_tokens=source.other_tokens + source.tokens - (tokens - repeated),
    )


def _split_uses(
    pool: DocumentPool, sources: Sequence[SourceDocuments], together: _Taken
) -> tuple[SourceUse, ...]:
    """Count what each source gave to a choice over all sources."""
    documents = np.zeros((2, len(sources)), dtype=np.int64)  # in the first pass, in later ones
    tokens = np.zeros((2, len(sources)), dtype=np.int64)
    for index, numbers in enumerate(together.passes):
        for first in range(0, numbers.size, BLOCK_DOCUMENTS):
            block = numbers[first : first + BLOCK_DOCUMENTS]
            which = pool.locate(block)[0]
            documents[min(index, 1)] += np.bincount(which, minlength=len(sources))
            lengths = pool.tokens[block].astype(np.float64)  # exact: sums of a block stay below 2^53
            tokens[min(index, 1)] += np.bincount(which, lengths, minlength=len(sources)).astype(np.int64)
    return tuple(
        _use(source, int(documents[:, index].sum()), int(tokens[:, index].sum()), int(tokens[1, index]))
        for index, source in enumerate(sources)
    )


def _nearly_all(
    pool: DocumentPool, index: int, name: str, weight: float | None, held: NDArray[np.bool_]
) -> SourceDocuments:
    """The documents of one source that have tokens and are not held out, where few are."""
    missing = []
    first = tokens = 0
    for lengths in pool.lengths_of(index):
        is_missing = held[first : first + BLOCK_DOCUMENTS] | (lengths == 0)
        tokens += int(lengths.sum(dtype=np.int64, where=~is_missing))
        missing.append(np.flatnonzero(is_missing) + first)
        first += lengths.size
    gone = np.concatenate(missing)
    dtype = number_dtype(len(pool))
    numbers: Numbers = NumbersWithGaps(int(pool.first[index]), held.size, gone, dtype)
    if gone.size * GAP_FACTOR > held.size:  # many documents without a token
        numbers = np.asarray(numbers)
    return SourceDocuments(name=name, weight=weight, numbers=numbers, tokens=tokens)


def split_members(
    pool: DocumentPool,
    names: Sequence[str],
    weights: Sequence[float | None],
    held_out: Sequence[NDArray[np.bool_]],
    *,
    train: bool,
    keep: Callable[[int, NDArray[np.int64]], NDArray[np.bool_]] | None = None,
) -> list[SourceDocuments]:
    """Return the documents of one split, source by source; empty documents are in neither split.

    Args:
        pool: pool of all sources.
        names: names of the sources.
        weights: weights of the sources; only the train split uses them.
        held_out: bool [documents] for each source, whether a document is in the validation split.
        train: whether to return the train split.
        keep: marks which of a source's documents, by number, to take; None takes all.
    """
    members = []
    for index, (name, weight, held) in enumerate(zip(names, weights, held_out, strict=True)):
        count = int(np.count_nonzero(held))
        if train and keep is None and count * GAP_FACTOR <= held.size:
            members.append(_nearly_all(pool, index, name, weight, held))
            continue
        numbers = np.empty(held.size - count if train else count, dtype=number_dtype(len(pool)))
        tokens = other_tokens = done = 0
        for first in range(0, held.size, BLOCK_DOCUMENTS):
            mine = np.flatnonzero(held[first : first + BLOCK_DOCUMENTS] != train) + first
            lengths = pool.tokens[mine + int(pool.first[index])]
            taken = lengths > 0
            if keep is not None:
                taken &= keep(index, mine)
                other_tokens += int(lengths.sum(dtype=np.int64, where=~taken))
            mine = mine[taken] + int(pool.first[index])
            numbers[done : done + mine.size] = mine
            tokens += int(lengths.sum(dtype=np.int64, where=taken))
            done += mine.size
        members.append(
            SourceDocuments(
                name=name,
                weight=weight if train else None,
                numbers=numbers[:done],
                tokens=tokens,
                other_tokens=other_tokens,
            )
        )
    return members
